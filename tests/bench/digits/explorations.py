"""The shipped networks of the explorer: three ways to run one small network of the digits at any bits, explored on the same 540 test images.

    python tests/bench/digits/explorations.py --out runs/digits --data data    # about five minutes of one CPU core

Writes digits_mebqat.safetensors and digits_exploration.safetensors to --data. Stopped runs are continued, finished ones kept.
"""
import argparse
import shutil
from pathlib import Path

from mebqat.bits import BitSpace
from mebqat.data import load
from mebqat.figures.predictions import explore, save_explorations
from mebqat.runs import open_run, spec_of, train_run

GRID = BitSpace.grid(range(2, 9), range(2, 9), full=True)
COMMON = dict(data='digits', model='small_cnn', width=8, batch_size=32, seed=0)
NAMES = {'MEBQAT': 'mebqat', 'AdaBits': 'adabits', 'Post-training quantization': 'ptq'}


def specs(out, epochs):
    "Runs by folder name; the float network comes first, as one starts from it."
    network = COMMON | dict(epochs=epochs)
    common = network | dict(skip='none')
    return {'float': spec_of('float', **network), 'mebqat': spec_of('mebqat', **common),
            'adabits': spec_of('adabits', bits='W2A2 W4A4 W8A8 FP', **common), 'ptq': spec_of('ptq', init=str(out/'float'), **common)}


def trained(spec, folder):
    "A finished run, trained or continued if it is not there."
    if (folder/'model.safetensors').is_file() and (run := open_run(folder)).spec == spec: return run
    return train_run(spec, folder, resume=folder.is_dir())


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='Folder for the runs')
    p.add_argument('--data', type=Path, required=True, help='Folder for the two files')
    p.add_argument('--epochs', type=float, default=60, help='Passes over the images (default: 60)')
    a = p.parse_args()
    runs = {name: trained(spec, a.out/name) for name,spec in specs(a.out, a.epochs).items()}
    train, test, seen = load('digits', 'train'), load('digits', 'test'), {}
    for name,method in NAMES.items():
        spec = runs[method].spec
        about = {'method': method, 'model': spec.network.model, 'bits': spec.options.bits, 'epochs': spec.training.epochs, 'seed': spec.training.seed}
        seen[name] = explore(runs[method].model, test, GRID, train, name, about)
        print(seen[name], {str(b): round(seen[name].at(b).accuracy, 4) for b in GRID if b.w == b.a})
    print(save_explorations(a.data/'digits_exploration.safetensors', seen))
    print(shutil.copyfile(a.out/'mebqat'/'model.safetensors', a.data/'digits_mebqat.safetensors'))


if __name__ == '__main__': main()
