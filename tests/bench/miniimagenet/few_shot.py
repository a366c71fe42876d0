"""Prototypes on miniImageNet over bitwidths: the paper's three designs and their baselines from one float start, under the same number of backward passes.

    python tests/bench/miniimagenet/few_shot.py --out runs/miniimagenet                                # every run, then the results file
    python tests/bench/miniimagenet/few_shot.py --out runs/long --start 20000 --passes 20000           # a long schedule, for a GPU: --device cuda

miniImageNet is looked for in the folder that MEBQAT_DATA names (miniimagenet.zip or a folder).
--only NAME trains and measures one run (after the float start); --collect writes the results file from what is there.
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from _matrix import Matrix, arguments
from mebqat.bits import Bits, BitSpace
from mebqat.runs import spec_of
from mebqat.runs.episodes import EpisodeRecipe

PAIRS = BitSpace.parse('W2A2 FP')
QAT = ('W2A2',)


class MiniImageNet(Matrix):
    "PN, PN+QAT and the three designs of Table 7."
    n_way = 5
    compared = (('inner', ('start', 'pn', 'both', 'single')), ('both', ('single', 'pn')))

    def runs(self):
        a = self.a
        episodes = dict(data='mini_imagenet', n_way=20, k_shot=1, n_query=4, test_way=5, turns=True, jitter=a.jitter, seed=a.seed)
        more = dict(init=str(a.out/'start'), lr=1e-3, **episodes)
        yield 'start', spec_of('pn', steps=a.start, n_tasks=1, **episodes)
        yield 'inner', spec_of('mebqat-pn', steps=a.passes//4, n_tasks=4, **more)
        yield 'both', spec_of('mebqat-pn', steps=a.passes//4, n_tasks=4, design='both', **more)
        yield 'single', spec_of('mebqat-pn', steps=a.passes, n_tasks=1, **more)
        yield 'single-as-many-steps', spec_of('mebqat-pn', steps=a.passes//4, n_tasks=1, **more)
        for b in QAT: yield f'pn-qat-{b}', spec_of('pn-qat', bits=b, steps=a.passes, n_tasks=1, **more)
        yield 'pn', spec_of('pn', steps=a.passes, n_tasks=1, **more)

    def pairs(self, name): return BitSpace([Bits.parse(name.rpartition('-')[2])]) if '-qat-' in name else PAIRS

    def about(self):
        a, train = self.a, EpisodeRecipe(self.specs['start']).pool('train')
        n = len(train)//len(train.classes)
        return {'data': f'miniImageNet, 84x84 RGB, 64/16/20 classes; {n} images of each training class' + (', a subset: the whole has 600' if n < 600 else ''),
                'protocol': f'a float prototypical network, {a.start} steps of 20-way 1-shot episodes with 4 queries, every image taking its turn as support (Adam 2e-3, cosine); from its weights every other run but one had {a.passes} further backward passes on such episodes (Adam 1e-3, cosine): '
                            f'inner (MEBQAT-PN) {a.passes//4} steps of one episode at 4 random pairs, both {a.passes//4} steps of 4 episodes at a random pair each, single {a.passes} steps of one episode at one random pair, and single-as-many-steps {a.passes//4} of them, a quarter of the passes; no pair guaranteed; training images under random affine maps of strength {a.jitter}; one seed',
                'evaluation': f'{a.episodes} test episodes, 5-way, 15 queries a class, the same for every run and pair; 1 and 5 shots with the same network; batch norm on the statistics of support and query together; the start and PN quantized with steps measured from their trained weights',
                'command': f'python tests/bench/miniimagenet/few_shot.py --out {a.out} --start {a.start} --passes {a.passes}'}


if __name__ == '__main__':
    p = arguments(__doc__, 'data/results/miniimagenet_few_shot.json')
    p.add_argument('--start', type=int, default=3000, help='steps of the float start')
    p.add_argument('--passes', type=int, default=1200, help='backward passes of every run after it')
    p.add_argument('--jitter', type=float, default=0.75, help='strength of random affine maps')
    MiniImageNet(p.parse_args()).main()
