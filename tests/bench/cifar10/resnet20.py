"""Every method on CIFAR-10 with the true ResNet-20, under the same number of passes over the data.

    python tests/bench/cifar10/resnet20.py --data cifar10.zip --out runs/cifar10 --pretrain 8 --epochs 1      # what data/results holds
    python tests/bench/cifar10/resnet20.py --data cifar10.zip --out runs/full --pretrain 150 --epochs 150    # a full schedule: days of two cores

One float network is trained first; every method goes on from it for the same number of passes, the float network too.
Stopped runs are continued, finished ones kept. --schemes splits the work over processes; --collect writes the results file.
"""
import argparse
import json
import time
from pathlib import Path

import torch

import mebqat
from mebqat.bits import FP, Bits, BitSpace
from mebqat.data import load
from mebqat.evaluate import correct, sweep
from mebqat.runs import open_run, spec_of, train_run
from mebqat.runs.method_table import Setup
from mebqat.surface import wilson

DIAGONAL = BitSpace([Bits(b, b) for b in (2, 3, 4, 6, 8)] + [FP])
WIDE = BitSpace([*BitSpace.grid((2, 3, 4, 8), (2, 3, 4, 8)), Bits(6, 6), FP])


def specs(a, scheme):
    "The runs of one scheme, most telling first."
    common = dict(data=a.data, model='resnet20', val=5000, augment=True, batch_size=128, seed=a.seed, scheme=scheme, epochs=a.epochs, lr=a.lr, init=str(a.out/'float'))
    yield 'qat-W2A2', spec_of('qat', bits='W2A2', **common)
    yield 'mebqat', spec_of('mebqat', **common)
    yield 'ptq', spec_of('ptq', **{**common, 'init': str(a.out/'float-more')})
    yield 'qat-W4A4', spec_of('qat', bits='W4A4', **common)
    yield 'qat-W8A8', spec_of('qat', bits='W8A8', **common)
    yield 'adabits', spec_of('adabits', **common)
    yield 'any-precision', spec_of('any-precision', **common)
    if scheme == 'lsq': yield 'mebqat-W2A2', spec_of('mebqat', guaranteed='W2A2', **common)


def train(spec, out):
    "Train, continue or keep a run."
    if (out/'model.safetensors').exists(): return open_run(out)
    start = time.time()
    run = train_run(spec, out, resume=True, compile=True, on_row=lambda h: print(out.name, {k: round(v, 4) for k,v in h.rows[-1].items()}, flush=True))
    print(f'{out.name}: {time.time() - start:.0f} s', flush=True)
    return run


def measure(run, out, pools):
    "The test surface of a run, measured once."
    file = out/'surface.json'
    if file.exists(): return
    spec, wide = run.spec, out.name.endswith('-mebqat')
    bits = spec.space() if spec.method == 'qat' else WIDE if wide else DIAGONAL
    start = time.time()
    sweep(run.model, pools['test'], bits, bn_data=pools['train'], title=f'{spec.method} {spec.options.bits}'.strip()).save(file)
    print(f'{out.name}: surface in {time.time() - start:.0f} s', flush=True)


def collect(a):
    "All results with their protocol in one file."
    rows = []
    def add(name, scheme):
        folder = a.out/name
        if not (folder/'surface.json').exists(): return print(f'{name} is missing')
        run, surface = open_run(folder), json.loads((folder/'surface.json').read_text())
        options, training = run.spec.options, run.spec.training
        method = options.build(Setup(run.spec, run.model, 1, tuple(run.about['input']), lambda: None))
        tasks = len(method.pairs(torch.Generator())) if options.trains else 0
        rows.append({'name': name, 'scheme': scheme, 'method': run.spec.method, 'bits': options.bits, 'backward passes a step': tasks,
                     'lr': training.lr, 'epochs': training.epochs, 'surface': surface})
    for scheme in a.schemes:
        for name,_ in specs(a, scheme): add(f'{scheme}-{name}', scheme)
    test = load(a.data, 'test', val=5000)
    floats = {}
    for name in ('float', 'float-more'):
        right, _ = correct(open_run(a.out/name).model, test)
        floats[name] = {'accuracy': float(right.float().mean()), 'interval': wilson(int(right.sum()), len(right)), 'n': len(right)}
    about = {'data': f'{test.name} ({a.note})' if a.note else test.name, 'test fingerprint': test.fingerprint(), 'network': 'resnet20, option A, 0.27 M parameters; first convolution and classifier in full precision',
             'protocol': f'float training for {a.pretrain:g} passes (SGD 0.1, cosine), then {a.epochs:g} passes for every method from those weights (SGD {a.lr}, cosine), float too; '
                         'batch 128, crop and flip, weight decay 5e-4 on weights, 45,000 training and 5,000 validation images, nothing selected on either, test set once; batch norm re-estimated at each pair from 1,000 training images; one seed',
             'lists': 'AdaBits: W2A2 W4A4 W8A8; Any-Precision: the same and FP; MEBQAT: FP and 3 random pairs a step from the paper\'s set (DoReFa: FP, W1A1 and 2); mebqat-W2A2: FP, W2A2 and 2', 'interval': 'Wilson 95 % over test images (not over seeds)',
             'seed': a.seed, 'mebqat': mebqat.__version__, 'torch': torch.__version__, 'command': f'python tests/bench/cifar10/resnet20.py --pretrain {a.pretrain:g} --epochs {a.epochs:g}'}
    text = json.dumps({'format': 'mebqat-results', 'version': 1, 'about': about, 'float': floats, 'runs': rows}, indent=1)
    part = a.results.with_suffix('.part')
    part.write_text(text.replace(str(a.data), test.name))
    part.replace(a.results)
    print(f'wrote {a.results}: {len(rows)} runs')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', required=True)
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--pretrain', type=float, default=8)
    p.add_argument('--epochs', type=float, default=1)
    p.add_argument('--lr', type=float, default=0.05)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--schemes', nargs='+', default=['lsq', 'dorefa'])
    p.add_argument('--threads', type=int, default=0)
    p.add_argument('--note', default='', help='what to say about the data')
    p.add_argument('--only', help='train and measure just this run, such as mebqat-W2A2')
    p.add_argument('--collect', action='store_true', help='only write the results file')
    p.add_argument('--results', type=Path, default=Path('data/results/cifar10_resnet20.json'))
    a = p.parse_args()
    mebqat.tune_cpu()
    if a.threads: torch.set_num_threads(a.threads)
    if a.collect: return collect(a)
    pools = {s: load(a.data, s, val=5000) for s in ('train', 'test')}
    common = dict(data=a.data, model='resnet20', val=5000, augment=True, batch_size=128, seed=a.seed)
    train(spec_of('float', epochs=a.pretrain, lr=0.1, **common), a.out/'float')
    train(spec_of('float', epochs=a.epochs, lr=a.lr, init=str(a.out/'float'), **common), a.out/'float-more')
    for scheme in a.schemes:
        for name,spec in specs(a, scheme):
            if a.only in (None, name): measure(train(spec, a.out/f'{scheme}-{name}'), a.out/f'{scheme}-{name}', pools)
    if len(a.schemes) == 2 and not a.only: collect(a)


if __name__ == '__main__': main()
