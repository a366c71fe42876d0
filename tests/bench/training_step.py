"One training step of the true ResNet-20, batch 64. Budgets: QAT at most 1.2x the float step, MEBQAT with four tasks at most 4.6x."
import sys

import torch
from _paired import paired, report

import mebqat
from mebqat.bits import Bits, BitSpace
from mebqat.layers import quantize
from mebqat.methods import float_training, mebqat as meta, qat
from mebqat.models import resnet20
from mebqat.quantizers import DoReFa, LSQ
from mebqat.train import TrainConfig, make_optimizer

torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
mebqat.tune_cpu(compile=True)
batch = torch.randn(64, 3, 32, 32).to(memory_format=torch.channels_last), torch.randint(10, (64,))


def stepper(method, scheme=None):
    torch.manual_seed(0)
    model = resnet20().to(memory_format=torch.channels_last)
    if scheme: quantize(model, scheme, example=batch[0])
    optimizer, generator = make_optimizer(model, TrainConfig(1)), torch.Generator().manual_seed(0)
    def go():
        optimizer.zero_grad()
        method(model, batch, generator)
        optimizer.step()
    return go


for scheme in (LSQ(), DoReFa()):
    results = paired({'float': stepper(float_training()), 'QAT W4A4': stepper(qat(Bits(4, 4)), scheme),
                      'MEBQAT, 4 tasks': stepper(meta(BitSpace.paper(scheme.name)), scheme)})
    report(f'ResNet-20 step, {scheme.name}, {torch.get_num_threads()} thread(s)', results, 'ratio to the float step in the same setting')
