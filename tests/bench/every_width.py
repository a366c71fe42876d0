"""MEBQAT's step over the paper's 73 pairs, compiled, against the float step; and dedicated steps width by width. True ResNet-20, batch 64.

    python tests/bench/every_width.py [THREADS] [REPEATS]

Every network first sees all its widths, so that whatever compiles has compiled; the seconds of that are printed too.
"""
import sys
import time

import torch
from _paired import paired, report

import mebqat
from mebqat.bits import Bits, BitSpace
from mebqat.layers import quantize
from mebqat.methods import float_training, mebqat as meta, qat
from mebqat.models import resnet20
from mebqat.quantizers import LSQ
from mebqat.train import TrainConfig, make_optimizer

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
start = time.perf_counter()
compiled = mebqat.tune_cpu(compile=True)['compiled']
batch = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (64,))
space = BitSpace.paper('lsq')


def network():
    torch.manual_seed(0)
    model = quantize(resnet20().to(memory_format=torch.channels_last), LSQ(), example=batch[0])
    return model, make_optimizer(model, TrainConfig(1)), torch.Generator().manual_seed(0)


def stepper(model, optimizer, generator, method):
    def go():
        optimizer.zero_grad()
        method(model, batch, generator)
        optimizer.step()
    return go


parts = network()
for w in (2, 3, 4, 5, 6, 7, 8, 16): stepper(*parts, qat(Bits(w, w)))()
print(f'compiled: {compiled}; first use of eight widths, compiling included: {time.perf_counter() - start:.1f} s')
steps = {'float': stepper(*parts, float_training()), 'MEBQAT, 4 tasks of 73 pairs': stepper(*parts, meta(space))}
steps |= {f'QAT W{w}A{w}': stepper(*parts, qat(Bits(w, w))) for w in (2, 4, 8, 16)}
report(f'ResNet-20 step, {torch.get_num_threads()} thread(s)', paired(steps, *map(int, sys.argv[2:3])), 'ratio to the float step')
