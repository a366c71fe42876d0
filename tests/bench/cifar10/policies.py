"""Which bits under a budget: AdaQAT, FracBits, MetaQuantNet, MEBQAT and searches on CIFAR-10 with the true ResNet-20.

    python tests/bench/cifar10/policies.py --out runs/policies --only float                    # first: everything but the runs from scratch starts here
    python tests/bench/cifar10/policies.py --out runs/policies                                 # then the rest in one process, or
    python tests/bench/cifar10/policies.py --out runs/policies --only meta search-meta         # some of it, in as many processes as there are cores
    python tests/bench/cifar10/policies.py --out runs/policies --collect                       # and the results file
    python tests/bench/cifar10/policies.py --out runs/tiny --tiny --results runs/tiny.json     # every branch once, on the shipped digits

That is an afternoon on two cores. The full schedule, for a GPU:

    python tests/bench/cifar10/policies.py --out runs/policies-full --device cuda --epochs-start 150 --epochs 150 --lr 0.01 \\
        --lams 0.002 0.005 0.01 0.02 0.05 --widths 2 3 4 5 6 7 8 --images 3000 --evaluations 1000

CIFAR-10 (cifar10.zip) is looked for in the folder that MEBQAT_DATA names. One float network is trained first; every finetuned run starts from its weights
and sees as many training images again (--epochs); runs from scratch see --epochs-scratch, by itself as many as both together. Every policy comes from held-out training images, and
nothing is chosen by the test images. Names: qat-W3A4 trains at one pair from the float network, scratch-W3A4 from random weights, controls all
pairs that AdaQAT found, search-NET all searches over an any-bit network, finalists-NET their best policies scored again, paired-NET the differences between what they chose, policy-NET-halfway-genetic the policy that was found, from the float network.
LSQ is the quantizer of all: at eight bits it starts at the float network's own answers (DoReFa and SAT change every weight), it keeps a step per width, as any-bit networks
and AdaQAT's probes need, and it lost least in data/results/cifar10_resnet20.json. Stopped runs and searches are continued, finished ones kept.
"""
import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path

import torch

import mebqat
from mebqat.files import load_whole, save_whole, write_text
from mebqat.mixed.adaqat import AdaQAT
from mebqat.mixed.fracbits import FracBits
from mebqat.batchnorm import deployed
from mebqat.bits import FP, Bits, BitSpace, Policy
from mebqat.cost import profile
from mebqat.data import augment, load
from mebqat.pools import choose
from mebqat.evaluate import correct, fitness
from mebqat.layers import quantize
from mebqat.mixed.metaquantnet import at_policy, export_weights, generate, metaquantnet, policies_of
from mebqat.methods import float_training, qat
from mebqat.methods import mebqat as any_bits
from mebqat.models import resnet20
from mebqat.quantizers import LSQ
from mebqat.mixed.ledger import SearchResult
from mebqat.mixed.searches import exact, finalists, genetic, greedy, measure_sensitivity, random_search, uniform
from mebqat.mixed.space import Budget, SearchSpace
from mebqat.surface import wilson
from mebqat.train import Batches, TrainConfig, fit

ENDS = Bits(8, 8)
UNIFORM = BitSpace.parse('W2A2 W3A3 W4A4 W8A8')
NETWORKS = {'meta': 'generators', 'shared': 'shared weights, trained as the generators are', 'mebqat': 'MEBQAT over uniform pairs'}
BUDGETS = {'W3A3': ('bytes', 'bitops'), 'W4A4': ('bytes', 'bitops'), 'W2A4': ('bitops',), 'halfway': ('bytes', 'bitops')}  # what of the uniform network's cost is a limit
HALFWAY = 'W2A2', 'W3A3'  # `halfway` is the mean cost of these two
SEARCHES = ('genetic', 'random', 'greedy', 'exact', 'uniform')
TINY = dict(data='digits', val=200, width=4, epochs_start=2, epochs=2, batch=64, widths=[2, 3, 8], images=100, bn_images=50, evaluations=20)


def to_text(bits): return {n: str(b) for n,b in bits.items()} if isinstance(bits, Policy) else bits and str(bits)
def read(bits): return Policy({n: Bits.parse(b) for n,b in bits.items()}) if isinstance(bits, dict) else bits and Bits.parse(bits)


def pace(lam, steps, share):
    "AdaQAT's rate: both widths would fall from 8 to 2 bits in this share of the steps if the loss did not object."
    return min(2.0, math.log(4)/(lam*share*steps))


@dataclass(frozen=True)
class Plan:
    "A training run."
    network: Callable        # `network()` is where it begins
    method: Callable         # `method(network)` is how it is trained
    passes: float            # Over the training images
    lr: float                # Peak learning rate
    after: str = ''          # Run whose weights it goes on from
    bits: Bits|Policy|None = None # Where it is measured, unless the method finds that


class Counted:
    "A method whose forward and backward passes are counted, stops included."
    def __init__(self, method): self.method, self.forwards, self.backwards = method, 0, 0

    def __call__(self, *args):
        step = self.method(*args)
        self.forwards, self.backwards = self.forwards + step.forwards, self.backwards + step.backwards
        return step

    def report(self): return self.method.report() if hasattr(self.method, 'report') else {}
    def state_dict(self): return {'passes': [self.forwards, self.backwards], 'method': self.method.state_dict() if hasattr(self.method, 'state_dict') else None}

    def load_state_dict(self, state):
        self.forwards, self.backwards = state['passes']
        if state['method']: self.method.load_state_dict(state['method'])

    def found(self):
        "What a method that learns widths has to say."
        if not hasattr(self.method, 'trajectory'): return {}
        frame = self.method.trajectory.to_frame()
        some = frame[[c for c in ('step', 'N_w', 'N_a', 'n_w', 'n_a', 'cost') if c in frame]].iloc[::max(1, len(frame)//100)].round(4)
        return {'settings': self.method.settings, 'concerns': self.method.concerns(), 'trajectory': some.to_dict('list')}


class Experiment:
    "Runs by name: `do(name)` trains, searches and measures."
    def __init__(self, a): self.a = a

    @cache
    def pool(self, split): return load(self.a.data, split, val=self.a.val)

    # networks

    def place(self, model): return model.to(self.a.device, memory_format=torch.channels_last)

    def fresh(self):
        train = self.pool('train')
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.a.seed)
            return resnet20(len(train.classes), self.a.width, in_channels=train.images.shape[1])

    def quantized(self, model):
        some = torch.randperm(len(self.pool('train')), generator=torch.Generator().manual_seed(self.a.seed))[:512]
        return quantize(model.cpu(), LSQ(), self.pool('train').batch(some)[0], ends=ENDS, bn='reestimate')

    @cached_property
    def costs(self): return profile(self.quantized(self.fresh()), (1, *self.pool('train').images.shape[1:]))

    def budget(self, name):
        costs = [self.costs.at(Bits.parse(pair)) for pair in (HALFWAY if name == 'halfway' else [name])]
        mean = {'bytes': sum(c.weight_bytes for c in costs)/len(costs), 'bitops': sum(c.bitops for c in costs)//len(costs)}
        return Budget(**{f'max_{k}': mean[k] for k in BUDGETS[name]})

    def policy(self, search):
        "The policy that a finished search found."
        file = self.a.out/search/'search.json'
        if not file.exists() or not (result := SearchResult.load(file)).finished: raise SystemExit(f'{search} has not finished; run --only search-{search.partition("-")[0]}')
        return result.best.policy

    # plans

    def plan(self, name):
        "What a name means."
        a, both = self.a, self.scratch
        start, steps = lambda: self.quantized(self.open('float')), self.steps(a.epochs)
        more = dict(passes=a.epochs, lr=a.lr, after='float')
        def at(policy, network=start, **other): return Plan(network, lambda m: qat(policy), **{**more, 'bits': policy, **other})
        match name.split('-', 1):
            case ['float']: return Plan(self.fresh, lambda m: float_training(), a.epochs_start, a.lr_start)
            case ['float', 'more']: return Plan(lambda: self.open('float'), lambda m: float_training(), **more)
            case ['qat', pair]: return at(Bits.parse(pair))
            case ['scratch', pair]: return at(Bits.parse(pair), lambda: self.quantized(self.fresh()), passes=both, lr=a.lr_start, after='')
            case ['adaqat', 'scratch']: return Plan(lambda: self.quantized(self.fresh()), lambda m: AdaQAT(a.lam, pace(a.lam, self.steps(both), .5)), both, a.lr_start)
            case ['adaqat', lam]: return Plan(start, lambda m: AdaQAT(float(lam), pace(float(lam), steps, .25)), **more)
            case ['fracbits', pair]: return Plan(start, lambda m: FracBits(steps, self.costs.at(Bits.parse(pair)).bitops, self.costs), **more)
            case ['mebqat']: return Plan(start, lambda m: any_bits(BitSpace.grid(a.widths, a.widths)), **more, bits=Bits.parse(a.finish))
            case [('meta' | 'shared') as kind]:
                network = lambda: generate(start(), a.widths, a.hidden if kind == 'meta' else 0, a.seed)
                return Plan(network, lambda m: metaquantnet(policies_of(m, a.widths, a.widths), self.open('float')), **more, bits=Bits.parse(a.finish))
            case ['policy', search]: return at(self.policy(search))
            case ['found', how] if (how := how.removesuffix(self.suffix)) in ('generator', 'export', 'long'):
                policy = self.policy(f'meta-{a.deploy}-genetic{self.suffix}')
                if how == 'long': return at(policy, passes=2*a.epochs)
                if how == 'export': return at(policy, lambda: export_weights(self.open('meta'), policy), after='meta')
                return Plan(lambda: self.open('meta'), lambda m: at_policy(policy), **{**more, 'after': 'meta', 'bits': policy})
        raise SystemExit(f'no run {name}; there are {", ".join(self.names())}')

    @property
    def scratch(self): return self.a.epochs_scratch or self.a.epochs_start + self.a.epochs

    def names(self):
        "Everything, in an order in which it can be done."
        a = self.a
        yield from ('float', 'float-more', *(f'qat-{b}' for b in UNIFORM), *self.learned(), 'controls', f'fracbits-{a.finish}')
        for net in NETWORKS: yield from (net, f'search-{net}', f'finalists-{net}', f'paired-{net}')
        yield from (f'policy-{s}-{a.deploy}-{m}{self.suffix}' for s,m in (('meta', 'genetic'), ('mebqat', 'genetic'), ('meta', 'random')))
        yield from (f'found-{how}{self.suffix}' for how in ('generator', 'export', 'long'))

    def learned(self): return [*(f'adaqat-{lam:g}' for lam in self.a.lams), 'adaqat-scratch']

    def control(self, name):
        "QAT from step 0 at the pair that an AdaQAT run found."
        bits = load_whole(self.a.out/name/'model.safetensors')[1]['bits']
        return f'{"scratch" if name == "adaqat-scratch" else "qat"}-{bits}'

    def steps(self, passes): return max(1, round(passes*(len(self.pool('train'))//self.a.batch)))

    # training

    def config(self, plan):
        steps = self.steps(plan.passes)
        return TrainConfig(steps, plan.lr, warmup=min(100, steps//10), seed=self.a.seed, epoch_steps=min(steps, self.steps(1)))

    def done(self, name): return (self.a.out/name/'model.safetensors').exists()

    def train(self, name):
        "Train, continue or keep a run."
        plan, file = self.plan(name), self.a.out/name/'model.safetensors'
        config = self.config(plan)
        if file.exists():
            if (theirs := load_whole(file)[1]['config']) != json.loads(json.dumps(asdict(config))): raise SystemExit(f'{file} was trained with {theirs}; choose another --out')
            return
        model = self.place(plan.network())
        method = Counted(plan.method(model))
        batches = Batches(self.pool('train'), self.a.batch, self.a.seed, augment, self.a.device)
        history = fit(model, method, batches, config, file.parent, resume=True, desc=name, on_row=lambda h: print(name, {k: round(v, 4) for k,v in h.rows[-1].items()}, flush=True))
        about = {'bits': to_text(getattr(method.method, 'bits', plan.bits)), 'config': asdict(config), 'forward passes': method.forwards, 'backward passes': method.backwards,
                 'seconds': sum(r['seconds'] for r in history.rows), 'learned': method.found()}
        save_whole(file, model.state_dict(), about)

    def open(self, name):
        "A trained network."
        if not self.done(name): raise SystemExit(f'{name} is not trained yet; run --only {name} first')
        model = self.plan(name).network()
        model.load_state_dict(load_whole(self.a.out/name/'model.safetensors')[0])
        return self.place(model)

    # measuring

    def accuracy(self, model, bits, split):
        "Accuracy with its interval, batch norm re-estimated from training images unless the network is a float one."
        with deployed(model, bits, self.pool('train')) if bits else nullcontext(): right, _ = correct(model, self.pool(split))
        k, n = int(right.sum()), len(right)
        return dict(zip(('accuracy', 'low', 'high', 'n'), (k/n, *wilson(k, n), n)))

    def point(self, model, bits):
        cost = self.costs.at(bits or FP)
        return {**self.accuracy(model, bits, 'test'), 'bytes': cost.weight_bytes, 'bitops': cost.bitops, 'bits': to_text(bits or FP)}

    def before(self, name): return (plan := self.plan(name)).passes + (self.before(plan.after) if plan.after else 0)

    def keep(self, name, row):
        (self.a.out/name).mkdir(parents=True, exist_ok=True)
        write_text(self.a.out/name/'result.json', json.dumps({'name': name, **row}, indent=1))
        print(name, f'{100*row["accuracy"]:.2f} % at {row["bytes"]/1e3:.1f} KB, {row["bitops"]/1e9:.3f} GBitOPs', flush=True)

    def measure(self, name):
        "The row of a training run, measured once."
        if (self.a.out/name/'result.json').exists(): return
        model, plan, about = self.open(name), self.plan(name), load_whole(self.a.out/name/'model.safetensors')[1]
        bits = read(about['bits'])
        row = {'starts from': plan.after or 'random weights', 'lr': plan.lr, 'passes over the training images': plan.passes, 'passes with those before': self.before(name),
               **{k: about[k] for k in ('forward passes', 'backward passes', 'seconds')}, **about['learned']}
        if name in self.learned(): row['control'] = self.control(name)
        self.keep(name, {**row, 'validation accuracy': self.accuracy(model, bits, 'val')['accuracy'], **self.point(model, bits)})

    # searching

    @property
    def suffix(self): return '' if self.a.fitness == 'accuracy' else f'-by-{self.a.fitness}'

    def held(self):
        "Held-out images that searches score on, and the others."
        val = self.pool('val')
        seen = choose(val.labels, self.a.images, torch.Generator().manual_seed(self.a.seed), even=True)
        rest = torch.ones(len(val), dtype=torch.bool)
        rest[seen] = False
        return val.take(seen), val.take(rest.nonzero()[:, 0])

    def again(self, net):
        "The ten best policies of each search once more, on held-out images that no search has seen."
        a, model, (_, fresh) = self.a, self.open(net), self.held()
        score = fitness(model, fresh, self.pool('train'), a.bn_images, by=a.fitness)
        for limit in a.budgets:
            results = [SearchResult.load(file) for m in ('genetic', 'random', 'uniform', 'greedy', 'exact') if (file := a.out/f'{net}-{limit}-{m}{self.suffix}'/'search.json').exists()]
            name = f'{net}-{limit}-finalists{self.suffix}'
            if not results or (a.out/name/'result.json').exists(): continue
            (a.out/name).mkdir(parents=True, exist_ok=True)
            won = finalists(results, score, 10, {'network': net, 'by': a.fitness, 'images': len(fresh), 'held out': fresh.fingerprint()}, checkpoint=a.out/name/'search.json', resume=True)
            before = {s.policy: s.fitness for r in results for s in r.evaluated}
            self.keep(name, {'network': NETWORKS[net], 'search': 'finalists', 'by': a.fitness, 'budget': limit, 'passes with those before': self.before(net), 'evaluations': won.evaluations, 'images': len(fresh),
                             'images forward': won.evaluations*(len(fresh) + a.bn_images), 'seconds': won.seconds, 'scores': [[round(before[s.policy], 4), round(s.fitness, 4)] for s in won.evaluated],
                             'fitness': won.best.fitness, **self.point(model, won.best.policy)})

    def search(self, net):
        "All searches over an any-bit network; the test images see only what each has chosen."
        a, model = self.a, self.open(net)
        space = SearchSpace(self.costs, BitSpace.grid(a.widths, a.widths), ends=ENDS)
        held, _ = self.held()
        score, of = (fitness(model, held, self.pool('train'), a.bn_images, by=by) for by in (a.fitness, 'accuracy'))
        meta = {'network': net, **({'by': a.fitness} if a.fitness != 'accuracy' else {}), 'weights': load_whole(a.out/net/'model.safetensors')[1]['config'], 'images': a.images, 'batch norm images': a.bn_images, 'held out': held.fingerprint()}
        def settings(name):
            (a.out/name).mkdir(parents=True, exist_ok=True)
            return dict(meta=meta, checkpoint=a.out/name/'search.json', resume=True)
        drops = measure_sensitivity(space, score, **settings(f'{net}-sensitivity{self.suffix}'))
        n = min(50, max(4, a.evaluations//8))
        family = dict(population=n, generations=a.evaluations//n, parents=max(2, n//5), mutants=n//2, crossovers=n//2)
        calls = {'genetic': lambda b, **k: genetic(space, score, b, seed=a.seed, **family, **k), 'random': lambda b, **k: random_search(space, score, b, a.evaluations, a.seed, **k),
                 'greedy': lambda b, **k: greedy(space, score, b, drops, **k), 'exact': lambda b, **k: exact(space, score, b, drops, **k), 'uniform': lambda b, **k: uniform(space, score, b, **k)}
        tested = cache(lambda policy: self.point(model, policy))
        for limit in a.budgets:
            for method in SEARCHES:
                name = f'{net}-{limit}-{method}{self.suffix}'
                if (a.out/name/'result.json').exists(): continue
                found = calls[method](self.budget(limit), **settings(name))
                shared = len(drops.points) if method in ('greedy', 'exact') else 0
                row = {'network': NETWORKS[net], 'search': method, 'by': a.fitness, 'budget': limit, 'limits': asdict(self.budget(limit)), 'passes with those before': self.before(net),
                       'evaluations': found.evaluations, 'evaluations shared by all budgets': shared, 'images forward': (found.evaluations + shared)*(a.images + a.bn_images),
                       'seconds': found.seconds, 'settings': {k: v for k,v in found.config.items() if k != 'drops'}, 'best so far': [r['best'] for r in found.generations], **found.details}
                self.keep(name, {**row, 'fitness': found.best.fitness, 'validation accuracy': of(found.best.policy), **tested(found.best.policy)})

    def paired(self, net):
        "What the genetic search chose less what the others chose, image by image on the test set."
        a, model, right = self.a, self.open(net), {}
        def answered(bits):
            if bits not in right:
                with deployed(model, bits, self.pool('train')): right[bits] = correct(model, self.pool('test'))[0].float()
            return right[bits]
        for limit in a.budgets:
            chosen = {m: SearchResult.load(f).best.policy for m in (*SEARCHES, 'finalists') if (f := a.out/f'{net}-{limit}-{m}{self.suffix}'/'search.json').exists()}
            for m in chosen.keys() - {'genetic'}:
                d = answered(chosen['genetic']) - answered(chosen[m])
                mean, half = float(d.mean()), 1.96*float(d.std())/len(d)**.5
                row = {'network': net, 'budget': limit, 'by': a.fitness, 'ours': 'genetic', 'other': m, 'difference': 100*mean, 'low': 100*(mean - half), 'high': 100*(mean + half)}
                write_text(a.out/f'{net}-{limit}-{m}{self.suffix}'/'paired.json', json.dumps(row, indent=1))
                print(f'{net} {limit} by {a.fitness}: genetic less {m} {row["difference"]:+.2f} ({row["low"]:+.2f} to {row["high"]:+.2f})', flush=True)

    # all together

    def do(self, name):
        "One name of `names`, or a run of the kinds that it lists."
        start = time.time()
        if name == 'controls': return [self.do(self.control(n)) for n in self.learned() if self.done(n)]
        if name.startswith('search-'): self.search(name.removeprefix('search-'))
        elif name.startswith('finalists-'): self.again(name.removeprefix('finalists-'))
        elif name.startswith('paired-'): self.paired(name.removeprefix('paired-'))
        else:
            self.train(name)
            self.measure(name)
        print(f'{name}: {time.time() - start:.0f} s', flush=True)

    def collect(self):
        "All results with their protocol in one file."
        a, rows = self.a, []
        known = [*self.names(), *(self.control(n) for n in self.learned() if self.done(n)), *(f'{net}-{b}-{m}' for net in NETWORKS for b in a.budgets for m in (*SEARCHES, 'finalists') for b, m in [(b, m + self.suffix)]), *sorted(f.parent.name for f in a.out.glob('*/result.json'))]
        for name in dict.fromkeys(known):
            file = a.out/name/'result.json'
            if name.startswith(('finalists-', 'paired-')): continue
            if file.exists(): rows.append(json.loads(file.read_text()))
            elif name != 'controls' and not name.startswith('search-'): print(f'{name} is missing')
        if not rows or rows[0]['name'] != 'float': raise SystemExit('the float network is missing, and every drop is from it')
        rows = [{**r, 'drop': 100*(rows[0]['accuracy'] - r['accuracy'])} for r in rows]
        write_text(a.results, json.dumps({'format': 'mebqat-results', 'version': 1, 'about': self.about(), 'runs': rows, 'paired': [json.loads(f.read_text()) for f in sorted(a.out.glob('*/paired.json'))]}, indent=1) + '\n')
        print(f'wrote {a.results}: {len(rows)} rows')

    def about(self):
        a, test = self.a, self.pool('test')
        given = ' '.join(f'--{k.replace("_", "-")} {" ".join(map(str, v)) if isinstance(v, list) else v}' for k in ('epochs_start', 'epochs', 'epochs_scratch', 'lr_start', 'lr', 'lams', 'lam', 'widths', 'hidden', 'budgets', 'finish', 'deploy', 'images', 'bn_images', 'fitness', 'evaluations', 'seed') for v in [getattr(a, k)])
        return {'data': f'{test.name} ({a.note})' if a.note else test.name, 'test fingerprint': test.fingerprint(),
                'network': f'resnet20, option A; first convolution and classifier at {ENDS}; LSQ with a step per width; KB and BitOPs count convolution and linear weights, ends included, a multiply-accumulate as w x a bit operations',
                'protocol': f'float training for {a.epochs_start:g} passes over the training images (SGD {a.lr_start:g}, cosine), then {a.epochs:g} passes for every run from those weights (SGD {a.lr:g}, cosine; labels only, but MetaQuantNet and shared weights learn from the float network too, MEBQAT from its own full precision), '
                            f'{self.scratch:g} for runs from scratch, {2*a.epochs:g} for found-long, which matches the any-bit training and the finetune of found-generator and found-export; batch {a.batch}, crop and flip, weight decay 5e-4; forward and backward passes of batches are counted for each run; last checkpoint; any-bit networks by themselves are measured at {a.finish}; one seed',
                'selection': f'policies by likelihood (rows that say so: by accuracy) on {a.images} of {len(self.pool("val"))} held-out training images, batch norm re-estimated from {a.bn_images} training images before each evaluation; test images once for each run and each search, batch norm re-estimated from 1,000 training images; lambdas all reported, none chosen; finalists are the ten best of each search, scored again on the other held-out images',
                'AdaQAT': f'one pair for the network, from W8A8, price the product of the widths (lambda of the run from scratch: {a.lam:g}); rate such that both would fall to 2 bits in a quarter of the steps (from scratch: half) if the loss did not object',
                'FracBits': f'per layer, to the bit operations of uniform {a.finish}',
                'searches': f'widths {" ".join(map(str, a.widths))} for weights and for activations of each layer; budgets are the costs of uniform networks: ' + ', '.join(f'{b}{f" (the mean of {HALFWAY[0]} and {HALFWAY[1]})"*(b == "halfway")} by {" and ".join(BUDGETS[b])}' for b in a.budgets),
                'reconstruction': 'AdaQAT and MetaQuantNet are reconstructions; what their papers are known to say is in the notebooks',
                'interval': 'Wilson 95 % over test images (not over seeds)', 'drop': 'points below our own float network', 'seed': a.seed, 'mebqat': mebqat.__version__, 'torch': torch.__version__,
                'command': f'python tests/bench/cifar10/policies.py --out runs/policies {given}',
                'rows by accuracy': 'the same command with --fitness accuracy; policy-meta-halfway-genetic and found-export were trained at what it found'}

    def main(self):
        mebqat.tune_cpu(compile=self.a.device == 'cpu')
        torch.set_num_threads(self.a.threads)
        if self.a.collect: return self.collect()
        for name in self.a.only or self.names(): self.do(name)
        if not self.a.only: self.collect()


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder of the runs')
    p.add_argument('--only', nargs='+', help='train, search and measure just these')
    p.add_argument('--collect', action='store_true', help='only write the results file')
    p.add_argument('--tiny', action='store_true', help='every branch once, on digits; no results worth keeping')
    p.add_argument('--data', default='cifar10.zip')
    p.add_argument('--note', default='', help='what to say about the data')
    p.add_argument('--val', type=int, default=5000, help='held-out training images')
    p.add_argument('--width', type=int, default=16, help='channels of the first stage')
    p.add_argument('--epochs-start', type=float, default=8, help='passes of the float network')
    p.add_argument('--epochs', type=float, default=2, help='passes of every run after it')
    p.add_argument('--epochs-scratch', type=float, default=0, help='passes of runs from random weights; 0: as many as both together')
    p.add_argument('--batch', type=int, default=128)
    p.add_argument('--lr-start', type=float, default=0.1, help='of the float network and of runs from scratch')
    p.add_argument('--lr', type=float, default=0.02, help='of runs from the float network')
    p.add_argument('--lams', type=float, nargs='+', default=[0.005, 0.02, 0.08], help='of AdaQAT from the float network')
    p.add_argument('--lam', type=float, default=0.02, help='of AdaQAT from scratch')
    p.add_argument('--widths', type=int, nargs='+', default=[2, 3, 4, 6, 8], help='candidates of the any-bit networks and searches')
    p.add_argument('--hidden', type=int, default=32, help='hidden units of the generators')
    p.add_argument('--budgets', nargs='+', default=list(BUDGETS), choices=BUDGETS)
    p.add_argument('--finish', default='W3A3', choices=[b for b in BUDGETS if b != 'halfway'], help='pair that any-bit networks are measured at by themselves, and budget of FracBits')
    p.add_argument('--deploy', default='halfway', choices=BUDGETS, help='budget whose policy is finetuned')
    p.add_argument('--images', type=int, default=2000, help='held-out images of an evaluation')
    p.add_argument('--fitness', default='likelihood', choices=('accuracy', 'likelihood'), help='what searches look at; searches by accuracy and by likelihood stand beside each other')
    p.add_argument('--bn-images', type=int, default=1000, help='training images of its batch norm')
    p.add_argument('--evaluations', type=int, default=144, help='of a genetic and of a random search; a multiple of 8 gives both the same number')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--threads', type=int, default=1)
    p.add_argument('--device', default='cpu')
    p.add_argument('--results', type=Path, default=Path('data/results/cifar10_policies.json'))
    a = p.parse_args()
    if a.tiny: vars(a).update(TINY)
    if a.tiny and a.results == p.get_default('results'): raise SystemExit('--tiny needs --results, another file than the real one')
    if a.images >= a.val: raise SystemExit(f'--images {a.images} of {a.val} held-out images (--val) leaves none that no search has seen, for finalists; give fewer')
    if a.deploy not in a.budgets: raise SystemExit(f'--deploy {a.deploy} is not among the budgets')
    return a


if __name__ == '__main__':
    try: Experiment(arguments()).main()
    except KeyboardInterrupt as e: raise SystemExit(str(e) or 'stopped; the same command goes on') from None
