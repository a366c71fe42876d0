"""Prototypes and MAML on Omniglot over bitwidths: every method from one float start, under the same number of backward passes.

    python tests/bench/omniglot/few_shot.py --out runs/omniglot                                       # every run, then the results file
    python tests/bench/omniglot/few_shot.py --out runs/omniglot --only mebqat-pn pn-qat-W2A2          # some; the results file says which it holds
    python tests/bench/omniglot/few_shot.py --out runs/long --start 60000 --passes 60000 --maml 20000 # a long schedule, for a GPU: --device cuda

Omniglot is looked for in the folder that MEBQAT_DATA names (omniglot.zip or a folder), with the class split --split-file.
One float prototypical network is trained first; every other run goes on from its weights. Stopped runs are continued, finished ones kept.
--only NAME trains and measures one run (after the float start); --collect writes the results file from what is there.
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from _matrix import Matrix, arguments
from mebqat.bits import Bits, BitSpace
from mebqat.runs import spec_of
from mebqat.runs.episodes import EpisodeRecipe

SIX = BitSpace.parse('W2A2 W2A8 W8A3 W4A4 W8A8 FP')
MAML_PAIRS = BitSpace.parse('W2A2 W3A8 W4A4 W8A8 FP')
DEDICATED = ('W2A2', 'W2A8', 'W8A3', 'W4A4', 'W8A8', 'W3A8')


class Omniglot(Matrix):
    "The prototypical family and the MAML family, each with its dedicated networks."
    n_way = 20
    compared = (('mebqat-pn', ('start', 'pn', 'mebqat-pn-inner', 'mebqat-pn-taught')), ('mebqat-pn-taught', ('pn-qat',)), ('mebqat-maml', ('maml', 'untrained-maml')))

    @property
    def extra(self): return {'pn-handicap': 'pn', **({'untrained-maml': 'mebqat-maml'} if self.a.maml else {})}

    def runs(self):
        a = self.a
        data = dict(data='omniglot', split_file=a.split_file, jitter=0.75, seed=a.seed)
        proto = dict(n_way=60, k_shot=1, n_query=5, turns=True, **data)
        more = dict(init=str(a.out/'start'), lr=1e-3, **proto)
        inner = dict(n_way=20, k_shot=1, n_query=5, n_tasks=4, steps=a.maml, lr=1e-3 if a.raw else 2e-4, inner_steps=5, inner_lr=0.2 if a.raw == 'features' else 3.,
                     adapts='head', center=a.raw != 'features', temperature=1. if a.raw else 0.25, second_order=True, learn_rates=True, **data)
        def after(name): return dict(init=str(a.out/('start' if a.raw else name)), **inner)
        yield 'start', spec_of('pn', steps=a.start, n_tasks=1, lr=2e-3, **proto)
        yield 'mebqat-pn', spec_of('mebqat-pn', steps=a.passes//2, n_tasks=2, design='both', guaranteed='W2A2', **more)
        yield 'mebqat-pn-inner', spec_of('mebqat-pn', steps=a.passes//4, n_tasks=4, guaranteed='W2A2', **more)
        yield 'mebqat-pn-taught', spec_of('mebqat-pn', steps=a.passes//2, n_tasks=2, design='both', guaranteed='W2A2', distill=True, **more)
        yield 'pn', spec_of('pn', steps=a.passes, n_tasks=1, **more)
        for b in DEDICATED: yield f'pn-qat-{b}', spec_of('pn-qat', bits=b, steps=a.passes, n_tasks=1, **more)
        if not a.maml: return
        yield 'mebqat-maml', spec_of('mebqat-maml', guaranteed='W2A2', **after('mebqat-pn'))
        yield 'maml', spec_of('fomaml', **after('pn'))
        yield 'maml-qat-W3A8', spec_of('fomaml-qat', bits='W3A8', **after('pn-qat-W3A8'))

    def pairs(self, name):
        if '-qat-' in name: return BitSpace([Bits.parse(name.rpartition('-')[2])])
        return MAML_PAIRS if 'maml' in name else SIX

    def make(self, name):
        "PN's trained float weights with quantizers as the reference code has them: one step for all widths, set up on the random start; or the network that MEBQAT-MAML starts from."
        if name == 'untrained-maml':
            run, spec = self.train('mebqat-pn'), self.specs['mebqat-maml']
            recipe = EpisodeRecipe(spec)
            return replace(run, spec=spec, model=recipe.network(recipe.pool('train')).eval())
        run = self.train('pn')
        options = (('shared_step', True), ('init', 'paper'), ('reference_compat', True))
        start = run.spec.changed(init='', options=options)
        recipe = EpisodeRecipe(start)
        model = recipe.network(recipe.pool('train'))
        model.load_state_dict({k: v if '_quantizer.' in k else run.model.state_dict()[k] for k,v in model.state_dict().items()})
        return replace(run, spec=start, model=model.eval())

    def effort(self, name):
        done = super().effort(name)
        return done if name != 'untrained-maml' else done | {'training steps': 0, 'backward passes': 0}

    def about(self):
        a = self.a
        maml = (f'; then {a.maml} steps of four 20-way 1-shot tasks (Adam 2e-4, cosine), 5 inner steps from 3 on the classifier alone, features less the mean of the support, second order, learned rates, query logits divided by a temperature of 0.25 in the loss: '
                'MEBQAT-MAML from the weights of MEBQAT-PN, MAML from PN, MAML+QAT from PN+QAT at its pair; untrained-maml is MEBQAT-MAML before its first step') if a.maml else ''
        return {'data': 'Omniglot, 28x28, ink 1, four turns of each character as classes; ' + (f'split file {a.split_file}' if a.split_file else 'the package\'s seeded split'),
                'protocol': f'a float prototypical network, {a.start} steps of 60-way 1-shot episodes with 5 queries, every image taking its turn as support (Adam 2e-3, cosine); from its weights every prototypical run but the start itself had {a.passes} further backward passes on such episodes (Adam 1e-3, cosine): '
                            f'MEBQAT-PN as {a.passes//2} steps of two episodes, one at W2A2 and one at a random pair, mebqat-pn-inner as {a.passes//4} steps of one episode at W2A2 and 3 random pairs, mebqat-pn-taught as MEBQAT-PN with the network in full precision as a teacher of the other pairs (one more forward pass for each){maml}; training images under random affine maps of strength 0.75; one seed',
                'evaluation': f'{a.episodes} test episodes, 20-way, 15 queries a class, the same for every run and pair; batch norm on the statistics of support and query together (prototypes) or of each (MAML); the start, PN and MAML quantized with steps measured from their trained weights; pn-handicap is PN as the public reference code quantizes it: one step for all widths by the paper\'s rule, set up at two bits on the random start, and one activation level too many',
                'command': f'python tests/bench/omniglot/few_shot.py --out {a.out} --start {a.start} --passes {a.passes} --maml {a.maml}' + (f' --split-file {a.split_file}' if a.split_file else '')}


if __name__ == '__main__':
    p = arguments(__doc__, 'data/results/omniglot_few_shot.json')
    p.add_argument('--split-file', default='', help='JSON lists of characters under train, val, test, here or in MEBQAT_DATA')
    p.add_argument('--start', type=int, default=5000, help='steps of the float start')
    p.add_argument('--passes', type=int, default=2400, help='backward passes of every prototypical run after it')
    p.add_argument('--raw', default='', choices=('', 'features', 'loss'), help='MAML from the float start with Adam 1e-3 and without the temperature (loss) or without centering, too (features): see plateau.py')
    p.add_argument('--maml', type=int, default=1500, help='steps of every MAML run after it; 0 for none')
    Omniglot(p.parse_args()).main()
