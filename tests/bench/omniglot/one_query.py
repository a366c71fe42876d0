"""What batch statistics are worth: the shipped Omniglot networks on all queries of an episode together, on one query alone, and on queries of one class.

    python tests/bench/omniglot/one_query.py --split-file omniglot_vinyals_split.json    # data/results/omniglot_one_query.json; a quarter of an hour of one CPU core

Omniglot is looked for in the folder that MEBQAT_DATA names. Batch norm has no running statistics here: every batch is normalised by its own. The usual batch holds fifteen queries of each
of the twenty classes, and is thereby told how often each class occurs. The same episodes are therefore answered again in smaller batches, each with the support where the network has it there.
Every batch goes through `proto_correct` or `inner_correct` by itself, as an episode with fewer queries, so its statistics are exactly its own. Differences are paired on the same queries.
"""
import argparse
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

import mebqat
from mebqat.bits import BitSpace
from mebqat.files import shipped, write_text
from mebqat.fewshot.evaluate import inner_correct, proto_correct
from mebqat.runs import open_run
from mebqat.fewshot.methods import InnerSteps
from mebqat.surface import mean_interval

SPACE = BitSpace.parse('W2A2 W4A4 W8A8 FP')
NETWORKS = ('omniglot_mebqat_pn', 'omniglot_mebqat_maml')


@dataclass(frozen=True)
class BesideSupport(InnerSteps):
    "MAML whose queries are normalised together with the support, as prototypes have it; the support adapts as before."
    def features(self, body, episode):
        support, both = body(episode.support), body(torch.cat([episode.support, episode.query]))
        mean = support.mean(0) if self.center else 0
        return support - mean, both[len(support):] - mean


def answers(run, episode, learner=None):
    "Right or wrong for each query, [pairs, queries]."
    if not run.spec.options.inner_loop: return torch.stack([*proto_correct(run.model, episode, SPACE).values()])
    learner = learner or run.spec.options.learner()
    return torch.stack([inner_correct(run.model, episode, b, learner, learner.steps)[-1] for b in SPACE])


def part(episode, which): return replace(episode, query=episode.query[which], query_labels=episode.query_labels[which])


def solve(run, episode):
    "Right or wrong by protocol, [pairs, batches, queries of a batch]."
    n, each = episode.n_way, episode.n_query
    together = answers(run, episode).view(len(SPACE), n, each)
    firsts, classes = [[c*each] for c in range(n)], [[*range(c*each, (c + 1)*each)] for c in range(n)]
    out = {'together': together, 'one query': torch.stack([answers(run, part(episode, q)) for q in firsts], 1),
           'one class': torch.stack([answers(run, part(episode, q)) for q in classes], 1)}
    if not run.spec.options.inner_loop: return out
    own = run.spec.options.learner()
    beside = BesideSupport(**{f.name: getattr(own, f.name) for f in fields(InnerSteps)})
    return out | {f'{k} beside the support': torch.stack([answers(run, part(episode, q), beside) for q in batches], 1) for k,batches in (('one query', firsts), ('one class', classes))}


def interval(values):
    "Mean over episodes and its 95 % interval, in percent."
    return dict(zip(('mean', 'low', 'high'), (round(v, 4) for v in mean_interval((100*values).tolist()))))


def measure(name, n, n_way):
    "Rows of one network: a protocol and a pair each."
    run = open_run(shipped(f'{name}.safetensors'))
    episodes, seen = run.episodes(n_way=n_way, k_shot=1), []
    for i in range(n):
        seen.append(solve(run, episodes[i]))
        if i % 10 == 9: print(name, i + 1, {k: f'{100*torch.stack([s[k][0].double().mean() for s in seen]).mean():.2f}' for k in seen[0]}, flush=True)
    for protocol in seen[0]:
        each = seen[0][protocol].shape[2]
        for j,bits in enumerate(SPACE):
            own, usual = (torch.stack([s[k][j, :, :each].double().mean() for s in seen]) for k in (protocol, 'together'))
            yield {'network': name, 'queries': protocol, 'bits': str(bits), 'accuracy': interval(own)} | ({} if protocol == 'together' else {'minus together': interval(own - usual)})


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--split-file', required=True, help='JSON lists of characters under train, val, test, here or in MEBQAT_DATA')
    p.add_argument('--episodes', type=int, default=100)
    p.add_argument('--results', type=Path, default='data/results/omniglot_one_query.json')
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--only', nargs='+', choices=NETWORKS, default=NETWORKS)
    a = p.parse_args()
    torch.set_num_threads(a.threads)
    for name in a.only:
        trained = open_run(shipped(f'{name}.safetensors')).spec.inputs.split_file
        if Path(trained).name != Path(a.split_file).name: raise SystemExit(f'{name} was trained on the split {trained}, not {a.split_file}: test characters would not be new')
    rows = [row for name in a.only for row in measure(name, a.episodes, 20)]
    about = {'data': f'Omniglot, 28x28, four turns of each character as classes; test characters of {a.split_file}',
             'networks': 'as shipped: omniglot_mebqat_pn (prototypes) and omniglot_mebqat_maml (five inner steps on a float classifier); batch norm has no running statistics',
             'episodes': f'the first {a.episodes} test episodes of omniglot_few_shot.json, 20-way 1-shot, 15 queries a class',
             'together': 'all 300 queries in one batch; prototypes have the support in it, MAML has not',
             'one query': 'the first query of each class, each a batch of its own: with the 20 support images (prototypes), or alone (MAML)',
             'one class': 'the 15 queries of one class in a batch, with the support (prototypes) or by themselves (MAML), for each class in turn',
             'beside the support': 'MAML only: the same batches with the support images in them; the support adapts on its own statistics as before',
             'interval': 'normal 95 % over episodes; differences on the same queries, in points',
             'command': f'python tests/bench/omniglot/one_query.py --split-file {a.split_file}' + f' --episodes {a.episodes}'*(a.episodes != 100), 'mebqat': mebqat.__version__, 'torch': torch.__version__}
    write_text(a.results, json.dumps({'format': 'mebqat-results', 'version': 1, 'about': about, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__': main()
