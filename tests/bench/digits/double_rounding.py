"""Must the floats be kept? Accuracy with weights stored as integers, afterwards and in training, on the shipped digits.

    python tests/bench/digits/double_rounding.py --seeds 10 --out data/results/digits_double_rounding.json
"""
import argparse
import copy
import json
import statistics as st
from pathlib import Path

import torch

from mebqat.bits import BitSpace
from mebqat.data import load
from mebqat.evaluate import score
from mebqat.files import write_text
from mebqat.layers import quantize
from mebqat.methods import adabits, mebqat
from mebqat.mixed.double_rounding import double_rounding, round_twice, store_integers
from mebqat.models import small_cnn
from mebqat.quantizers import LSQ
from mebqat.train import Batches, TrainConfig, fit

STORES = {8: 'W2A2 W4A4 W6A6 W8A8', 4: 'W2A2 W3A3 W4A4 W4A8', 3: 'W2A2 W2A8 W3A3 W3A8'}
ANY = ('W2A2', 'W2A8', 'W3A3')


def network(seed, train):
    torch.manual_seed(seed)
    model = small_cnn(image_size=8, width=8)
    return quantize(model, LSQ(), train.batch(slice(0, 256))[0], skip='none', bn='reestimate')


def trained(model, method, seed, train, epochs):
    batches = Batches(train, 64, seed)
    fit(model, method, batches, TrainConfig(epochs*batches.per_epoch, lr=.05, warmup=20, seed=seed))
    return model


def one(seed, master, epochs):
    "Accuracy in percent of three networks of the same passes, by name and pair."
    train, test, space = load('digits', 'train'), load('digits', 'test'), BitSpace.parse(STORES[master])
    floats = trained(network(seed, train), adabits(space), seed, train, epochs)
    afterwards = store_integers(round_twice(copy.deepcopy(floats), master))
    method = double_rounding(space, master)
    integers = store_integers(trained(round_twice(network(seed, train), master), method, seed, train, epochs))
    networks = {'floats kept': floats, 'stored afterwards': afterwards, 'Double Rounding': integers}
    return {k: {str(b): 100*score(m, b, test, train).accuracy for b in space} for k,m in networks.items()}


def any_bits(seed, epochs):
    "A MEBQAT network over the paper's pairs, and its accuracies by what is stored afterwards."
    train, test = load('digits', 'train'), load('digits', 'test')
    model = trained(network(seed, train), mebqat(BitSpace.paper('lsq')), seed, train, epochs)
    stored = {f'{n} bits': store_integers(round_twice(copy.deepcopy(model), n)) for n in STORES}
    return {k: {b: 100*score(m, BitSpace.parse(b).pairs[0], test, train).accuracy for b in ANY}
            for k,m in {'floats': model, **stored}.items()}


def summary(values):
    error = st.stdev(values)/len(values)**.5 if len(values) > 1 else None
    return {'mean': round(st.mean(values), 2), 'standard error': error and round(error, 2)}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=10)
    p.add_argument('--epochs', type=int, default=10)
    p.add_argument('--out', type=Path)
    a = p.parse_args()
    torch.set_num_threads(1)
    protocol = {'data': 'digits, test', 'network': 'small_cnn, width 8, all layers quantized, batch norm re-estimated',
                'scheme': 'LSQ()', 'training': f'{a.epochs} passes, batch 64, SGD 0.05, 20 steps of warm-up, cosine; '
                'every pair of the list in every step, labels only', 'seeds': a.seeds, 'torch': torch.__version__}
    runs = [any_bits(seed, a.epochs) for seed in range(a.seeds)]
    of_any = {k: {b: summary([r[k][b] for r in runs]) for b in ANY} for k in runs[0]}
    print(json.dumps(of_any, indent=1), flush=True)
    results = {}
    for master, pairs in STORES.items():
        runs = [one(seed, master, a.epochs) for seed in range(a.seeds)]
        results[str(master)] = {
            'accuracy': {k: {b: summary([r[k][b] for r in runs]) for b in pairs.split()} for k in runs[0]},
            'Double Rounding minus stored afterwards':
                {b: summary([r['Double Rounding'][b] - r['stored afterwards'][b] for r in runs]) for b in pairs.split()}}
        print(master, json.dumps(results[str(master)], indent=1), flush=True)
    if a.out: write_text(a.out, json.dumps({'protocol': protocol, 'MEBQAT, stored afterwards': of_any, 'bits in store': results}, indent=1) + '\n')


if __name__ == '__main__': main()
