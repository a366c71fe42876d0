"A 9 x 9 surface of conv-4 with a classifier on 1,000 images: `sweep` against the naive loop, same numbers. Budget: 8x."
import subprocess
import sys
import time

import torch

NAIVE = len(sys.argv) > 1 and sys.argv[1] == 'naive'
torch.set_num_threads(1)
torch.manual_seed(0)

from mebqat.bits import BitSpace
from mebqat.layers import quantize, use_bits
from mebqat.models import cnn4
from mebqat.quantizers import LSQ

model = torch.nn.Sequential(cnn4(), torch.nn.Linear(64, 10)).eval()
x, y = torch.randn(1000, 1, 28, 28), torch.randint(10, (1000,))
quantize(model, LSQ(), example=x[:100])
grid = BitSpace.grid((2, 3, 4, 5, 6, 7, 8, 16, 32), (2, 3, 4, 5, 6, 7, 8, 16, 32))
start = time.perf_counter()
if NAIVE:
    for bits in grid:
        with torch.no_grad(), use_bits(model, bits): right = (model(x).argmax(1) == y).sum()
else:
    import mebqat
    from mebqat.evaluate import sweep
    mebqat.tune_cpu(compile=True)
    model.to(memory_format=torch.channels_last)
    sweep(model, (x, y), grid)
print(f'{time.perf_counter() - start:.2f}')
if not NAIVE:
    naive = subprocess.run([sys.executable, __file__, 'naive'], capture_output=True, text=True, check=True)
    print(f'naive loop over 81 pairs, default allocator and layout: {naive.stdout.strip()} s (the figure above is sweep, compiling included)')
