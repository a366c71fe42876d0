"LSQ fake quantization, forward and backward, 3.2 million floats, one thread. Budget: compiled at most 2.5x the copy floor of five streams."
import torch
from _paired import paired, report

import mebqat
from mebqat.kernels import _COMPILED, compile_kernels, fake_quant, fake_quant_plain

torch.set_num_threads(1)
mebqat.tune_cpu()
x = torch.randn(3_200_000, requires_grad=True)
step, dy, out = torch.tensor(0.3, requires_grad=True), torch.randn(3_200_000), torch.empty(3_200_000)


def floor():
    "Read x, write y; read x and dy, write dx: five streams of copying."
    with torch.no_grad():
        out.copy_(x)
        torch.add(x, dy, out=out)


def run(function, compiled=False):
    def go():
        kept = dict(_COMPILED)
        if not compiled: _COMPILED.clear()
        function(x, step, 0, 15, 1e-3).backward(dy)
        _COMPILED.update(kept)
        x.grad = step.grad = None
    return go


candidates = {'copy floor': floor, 'plain (autograd)': run(fake_quant_plain), 'closed form, eager': run(fake_quant)}
if compile_kernels(): candidates['closed form, compiled'] = run(fake_quant, True)
report('LSQ forward + backward', paired(candidates), 'ratio to the copy floor')
