"""What becomes of MAML on features that are never negative, and what centering them changes: accuracy by inner rate before any training, then validation and test accuracy of three runs without centering.

    python tests/bench/omniglot/few_shot.py --out runs/plateau --raw features --only mebqat-maml maml maml-qat-W3A8 ...    # the runs, an inner rate of 0.2 and no centering
    python tests/bench/omniglot/few_shot.py --out runs/unsure --raw loss --only mebqat-maml ...                            # centered, without the temperature
    python tests/bench/omniglot/plateau.py --out runs/plateau --unsure runs/unsure --split-file omniglot_vinyals_split.json

Omniglot is looked for in the folder that MEBQAT_DATA names.
"""
import argparse
import json
from pathlib import Path

import torch

import mebqat
from mebqat.bits import FP, BitSpace
from mebqat.episodes import Episodes
from mebqat.fewshot.evaluate import sweep_episodes
from mebqat.files import write_text
from mebqat.runs import open_run
from mebqat.runs.episodes import EpisodeRecipe
from mebqat.runs.surfaces import open_scores

RATES, CENTERED, EPISODES, RESULTS = (0.01, 0.02, 0.04, 0.1, 0.2), (0.1, 0.3, 1., 3., 10.), 30, Path('data/results/omniglot_maml_plateau.json')


def probe(run, rates, center):
    "Accuracy of five inner steps on a classifier of zeros, the start's embedding under it, by inner rate."
    inputs, out = run.spec.inputs, {}
    pool = EpisodeRecipe(run.spec).pool('val')
    for rate in rates:
        spec = run.spec.changed(center=center, inner_lr=rate, learn_rates=False)
        model = EpisodeRecipe(spec).network(pool)
        torch.nn.init.zeros_([m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1].weight)
        episodes = Episodes(pool, inputs.n_way, inputs.k_shot, 15, seed=0)
        out[rate] = sweep_episodes(model.eval(), spec.options.learner(), episodes, BitSpace([FP]), EPISODES).surface().at(FP).accuracy
        print(f'inner rate {rate}{", centered" if center else ""}: {100*out[rate]:.1f} %', flush=True)
    return out


@torch.no_grad()
def features(run):
    "How long a support image's features are at the start, and how far from the support's mean."
    inputs, recipe = run.spec.inputs, EpisodeRecipe(run.spec.changed(learn_rates=False))
    pool = recipe.pool('val')
    model = recipe.network(pool).eval()
    seen = [model[:-1](e.support) for e in Episodes(pool, inputs.n_way, inputs.k_shot, 15, seed=0).take(EPISODES)]
    return {'length': float(torch.stack([s.norm(dim=1).mean() for s in seen]).mean()), 'distance from the mean': float(torch.stack([(s - s.mean(0)).norm(dim=1).mean() for s in seen]).mean())}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder of the runs')
    p.add_argument('--unsure', type=Path, required=True, help='folder of the run without the temperature')
    p.add_argument('--split-file', default='')
    p.add_argument('--threads', type=int, default=1)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    files = {n: a.out/n for n in ('mebqat-maml', 'maml', 'maml-qat-W3A8')} | {'mebqat-maml, centered': a.unsure/'mebqat-maml'}
    runs, rows = {n: open_run(f) for n,f in files.items()}, []
    for name,run in runs.items():
        keep = lambda r: {k: (v if isinstance(v, int) else round(v, 4)) for k,v in r.items() if k == 'step' or k.startswith('val')}
        test = {str(b): [q.accuracy, q.low, q.high] for b,q in open_scores(files[name]/'1-shot.safetensors').surface().points.items()}
        rows.append({'name': name, 'history': [*map(keep, run.history.rows)], 'test': test})
        print(name, test)
    options, training = runs['maml'].spec.options, runs['maml'].spec.training
    about = {'data': f'Omniglot, 28x28, 20-way 1-shot; split file {a.split_file}', 'recipe': f'{training.steps} steps of {training.n_tasks} tasks from the float prototypical network of omniglot_few_shot.json; {options.inner_steps} inner steps on the classifier alone, second order, learned rates from {options.inner_lr}, Adam {training.lr:g}, cosine; seed {training.seed}; MEBQAT-MAML with W2A2 in every step; its centered run on features less the mean of the support, rates from 3',
             'probe': f'{EPISODES} validation episodes, 15 queries a class, full precision, five inner steps on a classifier of zeros on the same start, before any MAML training; centered: features less the mean of the support',
             'features': features(runs['maml']), 'test': '600 test episodes, 15 queries a class, 95 % intervals over episodes',
             'command': f'python tests/bench/omniglot/plateau.py --out runs/plateau --unsure runs/unsure --split-file {a.split_file}', 'mebqat': mebqat.__version__, 'torch': torch.__version__}
    write_text(RESULTS, json.dumps({'format': 'mebqat-results', 'version': 1, 'about': about, 'rates': probe(runs['maml'], RATES, False), 'centered rates': probe(runs['maml'], CENTERED, True), 'runs': rows}, indent=1) + '\n')


if __name__ == '__main__': main()
