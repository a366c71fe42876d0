"""Do the quantizer's steps stay on good grids? MEBQAT over the paper's pairs on the digits, every layer quantized, SGD and Adam, from random and from trained weights.

    python tests/bench/digits/steps.py --seeds 5 --out steps.json    # about half an hour of one CPU core
    python tests/bench/digits/steps.py --seeds 1 --scheme per_channel=True

For each width: the error of a layer's weights, and of what reaches it, over that of the best uniform grid, and the share of its weights that the grid clips, median and largest over layers and seeds;
test accuracy with the standard error over seeds. It uses nothing that versions before the relative steps lack, so the two can be compared.
"""
import argparse
import ast
import json
import statistics as st
from pathlib import Path

import torch

from mebqat.bits import Bits, BitSpace
from mebqat.data import load
from mebqat.evaluate import score
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.methods import float_training, mebqat
from mebqat.models import small_cnn
from mebqat.quantizers import LSQ
from mebqat.train import Batches, TrainConfig, fit

WIDTHS, PAIRS = (2, 3, 4, 6, 8, 16), ('W2A2', 'W3A3', 'W4A4', 'W8A8', 'FP')
RATES = {'sgd': .05, 'adam': 2e-3, 'adamw': 2e-3}


def grids(layer):
    "Relative error, that of the best grid (for the tensor, or for each channel) and clipped share of a layer's weights, by width."
    w, quantizer, out = layer.weight.detach(), layer.weight_quantizer, {}
    rows = w.flatten(1) if getattr(layer.scheme, 'per_channel', False) else w.reshape(1, -1)
    for bits in WIDTHS:
        low, high = -2**(bits - 1), 2**(bits - 1) - 1
        def squared(step): return (((rows/step).round().clamp(low, high)*step - rows)**2).sum(1)
        top = rows.abs().amax(1, keepdim=True).clamp_min(1e-12)
        best = torch.stack([squared(top*k/2**(bits - 1)) for k in torch.linspace(.05, 1.1, 150)]).amin(0).sum().sqrt()/w.norm()
        q = quantizer(w, bits)
        step = (q.flatten(1) if len(rows) > 1 else q.reshape(1, -1))
        clipped = ((rows >= step.amax(1, keepdim=True)) & (rows > step) | (rows <= step.amin(1, keepdim=True)) & (rows < step)).float().mean()
        out[bits] = float((q - w).norm()/w.norm()), float(best), float(clipped)
    return out


def inputs(model, images):
    "Relative error of what reaches each layer, and that of the best grid, by width; batch norm takes the images' own statistics."
    out, seen = {}, {}
    hooks = [m.register_forward_pre_hook(lambda m, a, n=n: seen.update({n: a[0].detach().flatten()})) for n,m in bit_layers(model).items()]
    for bits in WIDTHS:
        with torch.no_grad(), use_bits(model, Bits(bits, bits)): model.train()(images)
        for name,layer in bit_layers(model.eval()).items():
            x, signed = seen[name], bool((seen[name] < 0).any())
            low, high = (-2**(bits - 1), 2**(bits - 1) - 1) if signed else (0, 2**bits - 1)
            def squared(step): return ((x/step).round().clamp(low, high)*step - x).square().sum()
            best = min(squared(x.abs().max()*k/high) for k in torch.linspace(.05, 1.1, 100)).sqrt()
            with torch.no_grad(): error = (layer.act_quantizer(x, bits) - x).norm()
            out.setdefault(name, {})[bits] = float(error/x.norm()), float(best/x.norm())
    for h in hooks: h.remove()
    return out


def one(seed, optimizer, lr, trained, epochs, width, scheme, bits_from):
    "A training: accuracy by pair, `grids` of every layer, and `inputs`."
    train, test = load('digits', 'train'), load('digits', 'test')
    torch.manual_seed(seed)
    model, batches = small_cnn(image_size=8, width=width), Batches(train, 64, seed)
    config = dict(warmup=20, seed=seed)
    if trained: fit(model, float_training(), batches, TrainConfig(10*batches.per_epoch, lr=.05, **config))
    quantize(model, scheme, example=train.batch(slice(0, 256))[0], skip='none', bn='reestimate')
    fit(model, mebqat(BitSpace.parse(bits_from)), batches, TrainConfig(round(epochs*batches.per_epoch), lr=lr, optimizer=optimizer, **config))
    accuracy = {p: score(model, Bits.parse(p), test, bn_data=train).accuracy*100 for p in PAIRS}
    return accuracy, {n: grids(m) for n,m in bit_layers(model).items()}, inputs(model, train.batch(slice(256, 768))[0])


def summary(runs):
    "What the table shows of some seeds."
    accuracy = {p: (st.mean(a[p] for a,*_ in runs), st.stdev([a[p] for a,*_ in runs])/len(runs)**.5 if len(runs) > 1 else None) for p in PAIRS}
    rows, reach = ({b: [layer[b] for run in runs for layer in run[k].values()] for b in WIDTHS} for k in (1, 2))
    ratio, off = ({b: [(e + 1e-5)/(best + 1e-5) for e,best,*_ in r[b]] for b in WIDTHS} for r in (rows, reach))
    return {'accuracy': {p: {'mean': round(m, 2), 'standard error': e and round(e, 2)} for p,(m, e) in accuracy.items()},
            'error over best': {b: {'median': round(st.median(r), 3), 'largest': round(max(r), 2)} for b,r in ratio.items()},
            'inputs, error over best': {b: {'median': round(st.median(r), 3), 'largest': round(max(r), 2)} for b,r in off.items()},
            'clipped': {b: {'median': round(st.median(c for *_,c in rows[b]), 4), 'largest': round(max(c for *_,c in rows[b]), 4)} for b in WIDTHS}}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=5)
    p.add_argument('--epochs', type=float, default=10)
    p.add_argument('--width', type=int, default=8)
    p.add_argument('--optimizers', nargs='+', default=['sgd', 'adam'], choices=RATES)
    p.add_argument('--starts', nargs='+', default=['random', 'trained'], choices=['random', 'trained'])
    p.add_argument('--scheme', nargs='*', default=[], help='Options of LSQ, such as per_channel=True')
    p.add_argument('--bits', default='paper-lsq', help='Pairs to train at')
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    def value(text):
        try: return ast.literal_eval(text)
        except ValueError: return text
    scheme = LSQ(**{k: value(v) for k,v in (o.split('=') for o in a.scheme)})
    found = {'protocol': {'data': 'digits, test', 'network': f'small_cnn, width {a.width}, all layers quantized, batch norm re-estimated', 'scheme': repr(scheme), 'bits': a.bits,
                          'training': f'mebqat, {a.epochs:g} passes, batch 64, 20 steps of warm-up, cosine, weight decay 5e-4; rates {", ".join(f"{o} {RATES[o]}" for o in a.optimizers)}; trained: 10 float passes first',
                          'seeds': a.seeds, 'torch': torch.__version__}, 'results': {}}
    for start in a.starts:
        for o in a.optimizers:
            rows = summary([one(seed, o, RATES[o], start == 'trained', a.epochs, a.width, scheme, a.bits) for seed in range(a.seeds)])
            found['results'][f'{o} from {start} weights'] = rows
            print(o, start, {p: tuple(v.values()) for p,v in rows['accuracy'].items()}, *({b: tuple(v.values()) for b,v in rows[k].items()} for k in ('error over best', 'inputs, error over best', 'clipped')), sep='\n  ', flush=True)
    if a.out: a.out.write_text(json.dumps(found, indent=1) + '\n')


if __name__ == '__main__': main()
