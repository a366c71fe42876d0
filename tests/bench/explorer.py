"SurfaceExplorer on the shipped digits and PolicyPicker with 60 layers, without a browser: time of a move in the kernel. Budget: 0.1 s."
import statistics, time
from dataclasses import replace

import torch

torch.set_num_threads(1)
from mebqat.bits import FULL, Bits
from mebqat.files import shipped
from mebqat.figures.predictions import load_explorations
from mebqat.explore.surface_explorer import SurfaceExplorer
from mebqat.explore.pickers import PolicyPicker


def timed(call):
    start = time.perf_counter()
    call()
    return 1000*(time.perf_counter() - start)


def told(what, took): print(f'{what:36} median {statistics.median(took):7.1f} ms   most {max(took):7.1f} ms   of {len(took)}')


digits = load_explorations(shipped('digits_exploration.safetensors'))
told('explorer built', [timed(lambda: SurfaceExplorer(digits, Bits(4, 4))) for _ in range(3)])
explorer = SurfaceExplorer(digits, Bits(4, 4))
for name in digits:
    explorer.method = name
    told(f'another pair, {name}', [timed(lambda b=b: setattr(explorer, 'value', b)) for b in digits[name].surface if b != explorer.value])
told('another network', [timed(lambda n=n: setattr(explorer, 'method', n)) for n in [*digits]*4])
told('another view', [timed(lambda v=v: setattr(explorer.view, 'value', v)) for v in ('relief', 'difference', 'cells')*4])
told('another budget', [timed(lambda i=i: setattr(explorer.budget.bitops, 'index', i)) for i in range(12)])
told('page', [timed(explorer.bake) for _ in range(3)])

costs = digits['MEBQAT'].costs
layer = next(l for l in costs.layers if l.quantized)
many = replace(costs, layers=tuple(replace(layer, name=f'blocks.{i}.conv') for i in range(60)), signed=())
told('policy of 60 layers built', [timed(lambda: PolicyPicker(many, value=Bits(4, 4))) for _ in range(3)])
picker = PolicyPicker(many, value=Bits(4, 4))
told('one of 60 layers', [timed(lambda b=b: setattr(picker.rows['blocks.7.conv'].w, 'value', b)) for b in (2, 3, 8, FULL, 5, 6)])
told('all of 60 layers', [timed(lambda b=b: setattr(picker.every.w, 'value', b)) for b in (2, 3, 8, FULL, 5, 6)])
