"Quantizer lab: from a moved control to the figure's new data in Python, a million values, one thread. Budget: 100 ms a move."
from itertools import cycle

import torch
from _paired import paired, report

from mebqat.explore.quantizer_lab import QuantizerLab
from mebqat.figures.quantizer_curves import Setting

torch.set_num_threads(1)
x = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))


def turn(value, knob, values):
    "A panel whose knob goes round and round."
    lab, turns = QuantizerLab(x, value), cycle(values)
    def go(): lab.knobs[knob].value = next(turns)
    return go


notches = [.02*1.07**i for i in range(40)]
report('A move of the quantizer lab, 1,000,000 values', paired({
    'LSQ, bits': turn(None, 'bits', (3, 4, 5, 6, 7, 8)),
    'LSQ, step': turn(Setting('lsq', 4, step=.1), 'step', notches),
    'PACT, clip': turn(Setting('pact', 4, clip=2.), 'clip', [10*n for n in notches]),
    'SAT, bits': turn(Setting('sat weight', 4), 'bits', (3, 4, 5, 6, 7, 8)),
    'DoReFa, bits': turn(Setting('dorefa weight', 4), 'bits', (3, 4, 5, 6, 7, 8)),
}, rounds=20, warmup=8), 'milliseconds; every scheme and width has been seen once before, as after the first look round')
lab = QuantizerLab(x)
first = iter(('pact', 'sat weight', 'dorefa weight', 'dorefa activation'))
def choose(): lab.knobs['scheme'].value = next(first)
report('The first look at a scheme, which finds its best at every width', paired({'scheme': choose}, rounds=4, warmup=0), 'once per tensor and scheme')
print(f'\nbake(): {len(lab.bake().to_json())/1e3:.0f} kB of JSON')
