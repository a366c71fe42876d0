"""Prototypes and MAML on Omniglot over bitwidths: every method from one float start, under the same number of backward passes.

    python tests/bench/omniglot/few_shot.py --out runs/omniglot                                       # every run, then the results file
    python tests/bench/omniglot/few_shot.py --out runs/omniglot --only mebqat-pn pn-qat-W2A2          # some; the results file says which it holds
    python tests/bench/omniglot/few_shot.py --out runs/long --start 60000 --passes 60000 --maml 20000 # a long schedule, for a GPU: --device cuda

Omniglot is looked for in the folder that MEBQAT_DATA names (omniglot.zip or a folder), with the class split --split-file.
One float prototypical network is trained first; every other run goes on from its weights. Stopped runs are continued, finished ones kept.
--only NAME trains and measures one run (after the float start); --collect writes the results file from what is there.
"""
import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import torch

import mebqat
from mebqat.bits import Bits, BitSpace
from mebqat.episodic import EpisodeScores
from mebqat.fewruns import FewShotSpec, few_network, few_pool, open_few, train_few

SIX = BitSpace.parse('W2A2 W2A8 W8A3 W4A4 W8A8 FP')
MAML_PAIRS = BitSpace.parse('W2A2 W3A8 W4A4 W8A8 FP')


def specs(a):
    "Every run by name, the start first."
    data = dict(data='omniglot', split_file=a.split_file, jitter=0.75, seed=a.seed)
    proto = dict(n_way=60, k_shot=1, n_query=5, turns=True, **data)
    more = dict(init=str(a.out/'start'), lr=1e-3, **proto)
    inner = dict(init=str(a.out/'start'), n_way=20, k_shot=1, n_query=5, n_tasks=4, steps=a.maml, lr=1e-3, inner_steps=5, inner_lr=0.2,
                 adapts='head', second_order=True, learn_rates=True, **data)
    yield 'start', FewShotSpec('pn', steps=a.start, n_tasks=1, lr=2e-3, **proto)
    yield 'mebqat-pn', FewShotSpec('mebqat-pn', steps=a.passes//4, n_tasks=4, guaranteed='W2A2', **more)
    yield 'pn', FewShotSpec('pn', steps=a.passes, n_tasks=1, **more)
    for b in SIX.pairs[:-1]: yield f'pn-qat-{b}', FewShotSpec('pn-qat', bits=str(b), steps=a.passes, n_tasks=1, **more)
    yield 'mebqat-maml', FewShotSpec('mebqat-maml', guaranteed='W2A2', **inner)
    yield 'maml', FewShotSpec('fomaml', **inner)
    yield 'maml-qat-W3A8', FewShotSpec('fomaml-qat', bits='W3A8', **inner)


def train(name, spec, a):
    "Train, continue or keep a run."
    out = a.out/name
    if (out/'model.safetensors').exists(): return open_few(out)
    start = time.time()
    run = train_few(spec, out, resume=True, device=a.device, on_row=lambda h: print(name, {k: round(v, 4) for k,v in h.rows[-1].items()}, flush=True))
    print(f'{name}: {time.time() - start:.0f} s', flush=True)
    return run


def handicapped(run, a):
    "The trained float weights with quantizers as the reference code has them: one step for all widths, set up on the random start."
    options = (('shared_step', True), ('init', 'paper'), ('reference_compat', True))
    start = replace(run.spec, init='', options=options)
    model = few_network(start, few_pool(start))
    model.load_state_dict({k: v if k.endswith('log_value') else run.model.state_dict()[k] for k,v in model.state_dict().items()})
    return replace(run, spec=start, model=model.eval())


def pairs_of(name):
    "Where a run is measured: everywhere, or at the pair it was trained for."
    if '-qat-' in name: return BitSpace([Bits.parse(name.rpartition('-')[2])])
    return MAML_PAIRS if 'maml' in name else SIX


def measure(name, run, a):
    "Per-episode test accuracies, 1 and 5 shots for prototypes, measured once."
    for shot in (1, 5) if run.spec.prototypical else (1,):
        file = a.out/name/f'{shot}-shot.safetensors'
        if file.exists(): continue
        start = time.time()
        scores = run.sweep(pairs_of(name), run.episodes(n_way=20, k_shot=shot), a.episodes)
        scores.save(file)
        print(f'{name}, {shot}-shot: {time.time() - start:.0f} s', {str(b): round(100*p.accuracy, 2) for b,p in scores.surface().points.items()}, flush=True)


def collect(a):
    "All results with their protocol in one file."
    rows, kept = [], {}
    every = dict(specs(a))
    for name, spec in {**every, 'pn-handicap': every['pn']}.items():
        for shot in (1, 5):
            file = a.out/name/f'{shot}-shot.safetensors'
            if not file.exists(): continue
            kept[name, shot] = s = EpisodeScores.load(file)
            points = [{'bits': str(b), 'accuracy': p.accuracy, 'low': p.low, 'high': p.high, 'bytes': p.bytes, 'bitops': p.bitops} for b,p in s.surface().points.items()]
            passes = spec.steps*spec.n_tasks*(1 if spec.prototypical else spec.inner_steps + 1)
            rows.append({'name': name, 'method': spec.method, 'k_shot': shot, 'training steps': spec.steps, 'tasks a step': spec.n_tasks, 'backward passes': passes, 'points': points, 'protocol': s.meta})
    paired = []
    for ours, others in (('mebqat-pn', ('start', 'pn')), ('mebqat-maml', ('maml',))):
        for (name, shot), s in kept.items():
            if name.startswith(others) and (ours, shot) in kept:
                frame = kept[ours, shot].minus(s).reset_index()
                paired += [{'ours': ours, 'other': name, 'k_shot': shot, **row} for row in frame.to_dict('records')]
    done = [n for n in (*every, 'pn-handicap') if any(name == n for name,_ in kept)]
    only = '' if len(done) > len(every) else ' --only ' + ' '.join(n for n in done if n != 'start')
    about = {'data': 'Omniglot, 28x28, ink 1, four turns of each character as classes; ' + (f'split file {a.split_file}' if a.split_file else 'the package\'s seeded split'),
             'protocol': f'a float prototypical network, {a.start} steps of 60-way 1-shot episodes with 5 queries, every image taking its turn as support (Adam 2e-3, cosine); from its weights every prototypical run but the start itself had {a.passes} further backward passes on such episodes (Adam 1e-3, cosine), '
                         f'MEBQAT-PN as {a.passes//4} steps of W2A2 and 3 random pairs on one episode; MAML runs: {a.maml} steps of four 20-way 1-shot tasks, 5 inner steps on the classifier alone, second order, learned rates; training images under random affine maps of strength 0.75; one seed',
             'evaluation': f'{a.episodes} test episodes, 20-way, 15 queries a class, the same for every run and pair; batch norm on the statistics of support and query together (prototypes) or of each (MAML); the start, PN and MAML quantized with steps measured from their trained weights; pn-handicap is PN as the public reference code quantizes it: one step for all widths by the paper\'s rule, set up at two bits on the random start, and one activation level too many',
             'interval': 'normal 95 % over episodes (not over seeds)', 'seed': a.seed, 'mebqat': mebqat.__version__, 'torch': torch.__version__,
             'command': f'python tests/bench/omniglot/few_shot.py --out runs/omniglot --start {a.start} --passes {a.passes} --maml {a.maml} --split-file {a.split_file}{only}',
             'runs': done}
    part = a.results.with_suffix('.part')
    part.write_text(json.dumps({'format': 'mebqat-results', 'version': 1, 'about': about, 'runs': rows, 'paired': paired}, indent=1) + '\n')
    part.replace(a.results)
    print(f'wrote {a.results}: {len(rows)} measurements')


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--split-file', default='', help='JSON lists of characters under train, val, test, here or in MEBQAT_DATA')
    p.add_argument('--start', type=int, default=5000, help='steps of the float start')
    p.add_argument('--passes', type=int, default=2400, help='backward passes of every prototypical run after it')
    p.add_argument('--maml', type=int, default=1500, help='steps of every MAML run after it')
    p.add_argument('--episodes', type=int, default=600)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--threads', type=int, default=0)
    p.add_argument('--device', default='cpu')
    p.add_argument('--only', nargs='+', help='train and measure just these runs')
    p.add_argument('--collect', action='store_true', help='only write the results file')
    p.add_argument('--results', type=Path, default=Path('data/results/omniglot_few_shot.json'))
    a = p.parse_args()
    mebqat.tune_cpu()
    if a.threads: torch.set_num_threads(a.threads)
    if a.collect: return collect(a)
    for name, spec in specs(a):
        if name == 'start' or a.only is None or name in a.only: measure(name, train(name, spec, a), a)
    if a.only is None or 'pn-handicap' in a.only: measure('pn-handicap', handicapped(open_few(a.out/'pn'), a), a)
    if a.only is None: collect(a)


if __name__ == '__main__': main()
