"Search: costs are the network's, repair always ends, exact is exact, and nothing that was scored is ever lost or scored again."
import errno, itertools, math, re, subprocess, sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings, strategies as st

from mebqat.bits import Bits, BitSpace, Policy
from mebqat.cost import profile
from mebqat.data import load
from mebqat.layers import quantize, use_bits
from mebqat.models import make, small_cnn
from mebqat.quantizers import LSQ
from mebqat.mixed.front import Front
from mebqat.mixed.ledger import SearchResult
from mebqat.mixed.searches import (Sensitivity, crossed, exact, finalists, genetic, greedy, measure_sensitivity, mutated,
                                   random_search, uniform)
from mebqat.mixed.space import Budget, Layer, Scored, SearchSpace
from mebqat.train import Interrupted

settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

GRID = BitSpace.grid(range(2, 9), range(2, 9))
FACTS = {'W8A8': (2.595, 268.3), 'W4A8': (1.312, 134.7), 'W4A4': (.670, 134.7), 'W3A8': (.991, 101.3),
         'W3A4': (.510, 101.3), 'W3A3': (.389, 101.3), 'W2A4': (.349, 67.9), 'W2A2': (.189, 67.9)}
rng = lambda seed=0: torch.Generator().manual_seed(seed)


def small_space(n=6, widths=(2, 3, 4, 8)):
    "A few layers with costs of their own; the first and the last are fixed."
    return SearchSpace([Layer(f'l{i}', 1000*(i + 2), 100*(n - i) + 7) for i in range(n)], BitSpace.grid(widths, widths), ends=Bits(8, 8))


def part(space, b=.5, o=.4):
    "A budget by its place between the smallest and the largest policy: of bytes, of bit operations."
    at = lambda f, share: None if share is None else f(space.smallest) + share*(f(space.largest) - f(space.smallest))
    return Budget(at(space.bytes, b), at(space.bitops, o))


def toy(space, seed=0):
    "An additive fitness with the same value on every machine."
    s = torch.rand(len(space.names), 2, generator=rng(seed)).tolist()
    return lambda p: 1 - sum(x*2.**-b for n,row in zip(space.names, s) for x,b in zip(row, (p[n].w, p[n].a)))


def counted(fitness):
    "The fitness and the list of policies it was asked for."
    calls = []
    return (lambda p: calls.append(p) or fitness(p)), calls


def whole(result): return replace(result, seconds=0., space=None)


# Costs

@pytest.mark.parametrize('ends', [None, Bits(8, 8)])
@pytest.mark.parametrize('name, side', [('resnet20', 32), ('small_cnn', 16)])
def test_costs_are_those_of_the_network(name, side, ends):
    channels = 3 if name == 'resnet20' else 1
    kwargs = dict(ends=ends) if ends else dict(skip='ends')
    model = quantize(make(name, 10, channels, side), LSQ(), torch.randn(8, channels, side, side), **kwargs)
    p = profile(model, (1, channels, side, side))
    space = SearchSpace(p, GRID, ends=ends)
    assert SearchSpace(p, GRID).record() == SearchSpace(p.at(), GRID, ends=ends).record() == space.record()
    assert len(space.free) == len(p.layers) - 2 and len(space.fixed) == (2 if ends else 0)
    drawn = space.random_policies(20, rng())
    size, bitops = space.costs(space.genes(drawn))
    for policy,s,b in zip(drawn, size.tolist(), bitops.tolist()):
        c = p.at(policy)
        assert (space.bytes(policy), space.bitops(policy)) == (s, b) == (c.weight_bytes, c.bitops)
        with use_bits(model, policy): pass
    assert space.policies(space.genes(drawn)) == drawn


class Language(torch.nn.Module):
    "A classifier on the embedding's tensor, and two layers that may share theirs."
    def __init__(self, twins):
        super().__init__()
        self.embed, self.a, self.b, self.fc = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 20)
        self.fc.weight = self.embed.weight
        if twins: self.b.weight = self.a.weight
    def forward(self, x): return self.fc(self.b(self.a(self.embed(x))))


def test_weights_that_something_float_reads_cost_the_same_at_any_width():
    x = torch.arange(20)[None]
    p = profile(quantize(Language(False), LSQ(), x, skip='none'), x)
    space = SearchSpace(p, GRID)
    drawn = space.random_policies(20, rng())
    assert [space.bytes(d) for d in drawn] == space.costs(space.genes(drawn))[0].tolist() == [p.at(d).weight_bytes for d in drawn]
    assert space.record()['layers'][-1]['kept'] == 32 and 'kept' not in space.record()['layers'][0]


def test_costs_that_do_not_add_up_are_refused():
    x = torch.arange(20)[None]
    p = profile(quantize(Language(True), LSQ(), x, skip='none'), x)
    with pytest.raises(ValueError, match="layers 'a', 'b' share one tensor"): SearchSpace(p, GRID)


def test_resnet20_has_the_known_figures():
    space = SearchSpace(profile(make('resnet20'), (1, 3, 32, 32)), GRID, ends=Bits(8, 8))
    cost = lambda p: (round(space.bitops(p)/1e9, 3), round(space.bytes(p)/1e3, 1))
    assert {k: cost(space.uniform(Bits.parse(k))) for k in FACTS} == FACTS
    assert (cost(space.smallest), cost(space.largest)) == (FACTS['W2A2'], FACTS['W8A8'])
    assert '67.9 kB to 268 kB' in repr(space) and space.size == 49**18


def test_resnet18_has_the_known_figures():
    space = SearchSpace(profile(torchvision.models.resnet18(), (1, 3, 224, 224)), GRID, ends=Bits(8, 8))
    assert [round(space.bitops(space.uniform(Bits(b, b)))/1e9, 2) for b in (8, 4, 3)] == [116.10, 34.71, 22.85]


def test_large_totals_are_exact():
    layers = [Layer(f'l{i}', 10**11 + i, 10**10 + 3*i + 1) for i in range(4)]
    space = SearchSpace(layers, BitSpace.grid((2, 3), (2, 3)))
    genes = space.genes([space.largest, space.smallest])
    size, bitops = space.costs(genes)
    assert bitops.tolist() == [sum(9*l.macs for l in layers), sum(4*l.macs for l in layers)]
    assert size.tolist() == [sum(3*l.weights for l in layers)/8, sum(2*l.weights for l in layers)/8]


def test_choices_by_layer_ladders_and_one_width():
    layers = [Layer(n, 10, 10) for n in 'abcd']
    space = SearchSpace(layers, {'a': [Bits(2, 2), Bits(4, 4), Bits(8, 8)], 'b': [Bits(w, 8) for w in (8, 2)], 'c': BitSpace.grid((2, 4), (4, 8))}, fixed={'d': Bits(6, 6)})
    assert space.gene_names == ('a.pair', 'b.w', 'c.w', 'c.a') and space.size == 3*2*4 and space.free == ('a', 'b', 'c')
    every = space.policies(torch.tensor(list(itertools.product(range(3), range(2), range(2), range(2)))))
    assert len(set(every)) == 24 and {p['d'] for p in every} == {Bits(6, 6)} and space.largest in every
    assert space.policies(space.genes(every)) == every


L = [Layer(n, 10, 10) for n in 'abc']
@pytest.mark.parametrize('args, word', [
    (([], GRID), 'no layers'), ((L, []), 'empty'), ((L, {'a': GRID, 'b': GRID}), "'c' is empty"), ((L, {'z': GRID}), "'z' is no quantized layer"),
    ((L, GRID, {'z': Bits(8, 8)}), "'z'"), ((L, ['W4A4']), 'must be Bits'), ((L, [Bits(2, 8), Bits(8, 2)]), 'neither a full grid nor a ladder'),
    ((L, [Bits(4, 4)]), 'nothing to search'), (([Layer('x', 1, 1, False), *L], GRID, None, Bits(8, 8)), "'x' is no quantized layer"),
    ((L + L[:1], GRID), "two layers are called 'a'")])
def test_refuses_spaces(args, word):
    with pytest.raises(ValueError, match=word): SearchSpace(*args)


def test_refuses_policies_of_another_network():
    space = small_space()
    for bad,word in ((Policy({'conv': Bits(4, 4)}), "'conv', which is no layer"), (Policy.uniform(space.free, Bits(4, 4)), "'l0'"), (Bits(4, 4), 'must be a Policy')):
        for f in (space.bytes, space.bitops, lambda p: space.genes([p]), lambda p: space.scored(p, 1.), lambda p: space.repair(p, Budget(max_bytes=space.bytes(space.largest)), rng())):
            with pytest.raises(ValueError, match=word): f(bad)
    with pytest.raises(ValueError, match="'l1' has no candidate W16A16"): space.genes([space.uniform(Bits(16, 16))])
    assert space.bytes(space.uniform(Bits(16, 16))) > space.bytes(space.largest)


# Budgets

def test_budgets_say_the_range():
    space = small_space()
    low, high = space.bytes(space.smallest), space.bytes(space.largest)
    for b in (low, high): assert Budget(max_bytes=b).check(space)
    for bad,word in ((low - .125, 'below'), (high + .125, 'above')):
        with pytest.raises(ValueError, match=f'{word} what policies cost here: .* to .*B \\({low:.9g} to {high:.9g}\\)'): Budget(max_bytes=bad).check(space)
    with pytest.raises(ValueError, match='BitOPs'): Budget(low, 1).check(space)
    fitness, calls = counted(toy(space))
    for method in (genetic, random_search, greedy, exact, uniform):
        with pytest.raises(ValueError, match='below'): method(space, fitness, Budget(max_bytes=1))
    assert not calls


@pytest.mark.parametrize('kwargs', [{}, {'max_bytes': 0}, {'max_bytes': -1}, {'max_bitops': math.nan}, {'max_bitops': math.inf}, {'max_bytes': '0 MB'}])
def test_refuses_budgets(kwargs):
    with pytest.raises(ValueError, match='max_b'): Budget(**kwargs)


def test_budgets_are_read_from_text():
    assert Budget('1 MB', '0.4G') == Budget(1e6, 4e8)
    for bad in ('much', '1 MBit', ''):
        with pytest.raises(ValueError, match=f'100kB.*not {bad!r}'): Budget(max_bytes=bad)


# Drawing and repairing

@st.composite
def problems(draw, most=8):
    "A space with grids, ladders and fixed layers, tied weights and free operations among them, and a budget within its range."
    kinds = st.sampled_from([BitSpace.grid((2, 4, 8), (2, 8)), [Bits(w, 8) for w in (2, 3, 5, 8)], [Bits(b, b) for b in (1, 2, 16)], [Bits(8, 8)], [Bits(4, a) for a in (2, 4)]])
    sizes = st.integers(0, 10**6)
    n = draw(st.integers(1, most))
    layers = [Layer(f'l{i}', draw(sizes), draw(sizes), draw(st.booleans())) for i in range(n)] + [Layer('last', 10**5, 10**5)]
    choices = {l.name: draw(kinds) for l in layers if l.quantized} | {'last': BitSpace.grid((2, 3), (2, 3))}
    space = SearchSpace(layers, choices)
    between = lambda f: f(space.smallest) + draw(st.floats(0, 1))*(f(space.largest) - f(space.smallest))
    which = draw(st.sampled_from(['bytes', 'bitops', 'both']))
    return space, Budget(between(space.bytes) if which != 'bitops' else None, between(space.bitops) if which != 'bytes' else None)


@given(problems(), st.integers(0, 2**31), st.booleans())
def test_repair_meets_any_budget_and_ends(problem, seed, fill):
    space, budget = problem
    genes = (torch.rand(20, len(space.steps), generator=rng(seed))*space.steps).long()
    out, limits = space.repair_genes(genes, space.limits(budget), rng(seed), fill), space.limits(budget)
    assert ((out >= 0) & (out < space.steps)).all()
    assert all(budget.allows(space.bytes(p), space.bitops(p)) for p in space.policies(out))
    fitted = (space.totals(genes) <= limits[:, None]).all(0)
    if fill:
        can, change = space.moves(out, 1)
        assert not (can & (space.totals(out)[:, :, None] + change <= limits[:, None, None]).all(0)).any()
    else: assert (out <= genes).all() and torch.equal(out[fitted], genes[fitted])


@given(problems(), st.integers(0, 2**31), st.booleans())
def test_random_policies_fit_and_repeat(problem, seed, fill):
    space, budget = problem
    drawn = space.random_policies(8, rng(seed), budget, fill)
    assert all(budget.allows(space.bytes(p), space.bitops(p)) for p in drawn)
    assert drawn == space.random_policies(8, rng(seed), budget, fill)


@pytest.mark.parametrize('cost, key', [('bytes', 'max_bytes'), ('bitops', 'max_bitops')])
def test_random_policies_see_every_budget(cost, key):
    space = SearchSpace(profile(make('resnet20'), (1, 3, 32, 32)), GRID, ends=Bits(8, 8))
    f, top = getattr(space, cost), .6*getattr(space, cost)(space.largest)
    values = np.array([f(p) for p in space.random_policies(1000, rng(), Budget(**{key: top}))])
    counts, _ = np.histogram(values, bins=8, range=(f(space.smallest), top))
    assert counts.min() > 70 and counts.max() < 220  # 125 each if perfectly even; independent uniform genes leave most bins empty


# Evolution

def test_genetic_never_scores_twice_and_stays_inside():
    space, budget = small_space(6), part(small_space(6), .4, .3)
    fitness, calls = counted(toy(space))
    seen = []
    r = genetic(space, fitness, budget, population=20, generations=6, mutants=10, crossovers=8, parents=5, on_generation=seen.append)
    assert len(calls) == len(set(calls)) == r.evaluations == len({s.policy for s in r.evaluated})
    assert all(budget.allows(s.bytes, s.bitops) and s.fitness == toy(space)(s.policy) for s in r.evaluated)
    assert [s.policy for s in r.evaluated] == calls and r.best.fitness == max(s.fitness for s in r.evaluated)
    assert [g['best'] for g in r.generations] == sorted(g['best'] for g in r.generations) and len(seen) == len(r.generations)
    assert [x.evaluations for x in seen] == [g['evaluations'] for g in r.generations] and not seen[0].finished and r.finished


def test_seeds_decide():
    space, budget = small_space(8), part(small_space(8), None, .4)
    for method,kwargs in ((genetic, dict(generations=3)), (random_search, dict(evaluations=40))):
        a, b, c = (method(space, toy(space), budget, seed=s, **kwargs) for s in (3, 3, 4))
        state = torch.random.get_rng_state()
        assert whole(a) == whole(b) and a.evaluated != c.evaluated and a.seed == 3
        method(space, toy(space), budget, seed=3, **kwargs)
        assert torch.equal(state, torch.random.get_rng_state())


def test_genetic_beats_luck_and_uniform_where_there_is_something_to_learn():
    space = SearchSpace(profile(make('resnet20'), (1, 3, 32, 32)), GRID, ends=Bits(8, 8))
    fitness, budget = toy(space), Budget(1.1e5, 4.5e8)
    for seed in range(2):
        g, r = (m(space, fitness, budget, seed=seed, **k) for m,k in ((genetic, dict(generations=10)), (random_search, dict(evaluations=500))))
        assert g.evaluations == r.evaluations == 500
        assert g.best.fitness > r.best.fitness > uniform(space, fitness, budget).best.fitness


def test_a_space_that_runs_out_ends_the_search():
    space = SearchSpace([Layer('a', 5, 5), Layer('b', 3, 3)], BitSpace.grid((2, 4), (2, 4)))
    budget = Budget(max_bytes=space.bytes(space.largest))
    for r in (genetic(space, toy(space), budget, fill=False), random_search(space, toy(space), budget)):
        assert r.finished and r.evaluations <= 16 and r.best.policy == space.largest
    assert genetic(space, toy(space), budget, fill=False).evaluations == 16
    tight = Budget(max_bytes=space.bytes(space.smallest), max_bitops=space.bitops(space.smallest))
    assert [m(space, toy(space), tight).best.policy for m in (genetic, random_search, greedy, exact, uniform)] == [space.smallest]*5


def test_start_policies_come_first_and_repaired():
    space, budget = small_space(), part(small_space())
    fits = space.repair(space.largest, budget, rng())
    r = genetic(space, toy(space), budget, generations=2, start=[fits, space.largest])
    assert r.evaluated[0].policy == fits and budget.allows(r.evaluated[1].bytes, 0) and r.evaluations > 2
    with pytest.raises(ValueError, match='no candidate'): genetic(space, toy(space), budget, start=[space.uniform(Bits(5, 5))])


@given(st.lists(st.integers(2, 7), min_size=1, max_size=9), st.integers(0, 999), st.sampled_from([.1, .5, 1.]))
def test_a_chosen_gene_always_changes(steps, seed, share):
    genes, steps = (torch.rand(400, len(steps), generator=rng(seed))*torch.tensor(steps)).long(), torch.tensor(steps)
    out = mutated(genes, steps, rng(seed), share)
    assert ((out >= 0) & (out < steps)).all()
    assert abs((out != genes).float().mean() - share) <= 4.5*(share*(1 - share)/genes.numel())**.5
    child = crossed(genes, out, rng(seed))
    assert ((child == genes) | (child == out)).all()


@pytest.mark.parametrize('kwargs, word', [({'population': 9}, 'population of 9'), ({'mutants': 40}, '40 mutants'), ({'parents': 0}, 'parents'), ({'generations': 0}, 'generations'),
                                          ({'mutation': 0}, 'mutation'), ({'mutation': 1.5}, 'mutation'), ({'mutants': -1}, 'mutants'), ({'population': 2.5}, 'population'),
                                          ({'meta': {'x': math.nan}}, 'JSON-able')])
def test_genetic_refuses(kwargs, word):
    fitness, calls = counted(toy(small_space()))
    with pytest.raises(ValueError, match=word): genetic(small_space(), fitness, part(small_space()), **kwargs)
    assert not calls


# Interruptions

METHODS = {'genetic': (genetic, dict(population=20, generations=4, mutants=8, crossovers=8)), 'random': (random_search, dict(evaluations=70)),
           'greedy': (greedy, {}), 'remeasured': (greedy, dict(remeasure=True)), 'exact': (exact, {}), 'uniform': (uniform, {})}


def test_finalists_are_the_best_of_each_search_scored_again(tmp_path):
    space, calls = small_space(), []
    limit, fresh = part(space), lambda p: calls.append(p) or toy(space)(p)/2
    results = [random_search(space, toy(space), limit, 40, seed=s) for s in (0, 1)]
    won = finalists(results, fresh, n=3, checkpoint=tmp_path/'again.json')
    top = {s.policy: s.fitness for r in results for s in sorted(r.evaluated, key=lambda s: -s.fitness)[:3]}
    assert set(calls) == set(top) == {s.policy for s in won.evaluated} and len(calls) == len(top)
    assert won.best.policy == max(top, key=top.get) and won.best.fitness == pytest.approx(max(top.values())/2)
    assert SearchResult.load(tmp_path/'again.json').finished and finalists(results[0], fresh, n=1).evaluations == 1


def test_scores_of_another_kind_are_named_and_never_mixed(tmp_path):
    space, own = small_space(), toy(small_space())
    likely = lambda p: own(p)/2
    likely.by = 'likelihood'
    limit, file = part(space), tmp_path/'search.json'
    a, b = (random_search(space, f, limit, 6, checkpoint=c) for f,c in ((own, None), (likely, file)))
    front = Front.of(b)
    assert (a.meta, b.meta, Front.of(a).meta, front.meta) == ({}, {'by': 'likelihood'}, {}, {'by': 'likelihood'})
    assert front.plot().layout.yaxis.title.text == 'likelihood' and 'likelihood' in front.to_frame() and Front.of(a).plot().layout.yaxis.title.text == 'accuracy'
    front.save(tmp_path/'front.json')
    assert Front.load(tmp_path/'front.json').meta == front.meta
    hover = [t for trace in front.plot().data for t in trace.hovertext]
    assert all(t.startswith('<b>likelihood 0.') for t in hover) and not any('%' in t for t in hover)
    for mix in (lambda: Front.of(a, b), lambda: front.merge(Front.of(a))):
        with pytest.raises(ValueError, match='accuracy and likelihood'): mix()
    with pytest.raises(ValueError, match='holds another search'): random_search(space, own, limit, 6, checkpoint=file, resume=True)


@pytest.mark.parametrize('results, word', [(lambda s: [], 'no finalists'), (lambda s: [random_search(s, toy(s), part(s, b), 5) for b in (.4, .5)], 'one budget')], ids=['none', 'two budgets'])
def test_finalists_refuse(results, word):
    with pytest.raises(ValueError, match=word): finalists(results(small_space()), toy(small_space()))
    with pytest.raises(ValueError, match='n must be'): finalists([], toy(small_space()), n=0)


@pytest.mark.parametrize('name', METHODS)
def test_resumes_to_the_same_result(name, tmp_path):
    "Stopped by Ctrl-C inside the fitness, three times over, once before anything is scored."
    method, kwargs = METHODS[name]
    space, budget, file = small_space(6), part(small_space(6), .5, .4), tmp_path/'search.json'
    straight, calls = method(space, toy(space), budget, **kwargs), []
    n = straight.evaluations
    for stop in sorted({0, n//3, n - 1}):
        def fitness(policy):
            if len(calls) == stop: raise KeyboardInterrupt
            calls.append(policy)
            return toy(space)(policy)
        with pytest.raises(Interrupted, match=f'{stop} policies were scored and are in .*search.json'): method(space, fitness, budget, checkpoint=file, resume=True, **kwargs)
        kept = SearchResult.load(file)
        assert not kept.finished and [s.policy for s in kept.evaluated] == calls == [s.policy for s in straight.evaluated[:stop]]
    fitness, rest = counted(toy(space))
    again = method(space, fitness, budget, checkpoint=file, resume=True, **kwargs)
    assert whole(again) == whole(straight) and calls + rest == [s.policy for s in straight.evaluated]
    assert whole(SearchResult.load(file)) == whole(straight)
    fitness, rest = counted(toy(space))
    assert whole(method(space, fitness, budget, checkpoint=file, resume=True, **kwargs)) == whole(straight) and not rest
    assert [p.name for p in tmp_path.iterdir()] == ['search.json']


def test_scores_ahead_survive_a_stop_in_the_past(tmp_path):
    "A resumed search that is stopped while it retraces its steps still keeps what it has not reached again."
    space, budget, file = small_space(6), part(small_space(6)), tmp_path/'s.json'
    genetic(space, toy(space), budget, generations=3, checkpoint=file)
    def stop(result): raise KeyboardInterrupt
    with pytest.raises(Interrupted): genetic(space, toy(space), budget, generations=3, checkpoint=file, resume=True, on_generation=stop)
    assert SearchResult.load(file).evaluations == 150
    fitness, calls = counted(toy(space))
    r = genetic(space, fitness, budget, generations=3, checkpoint=file, resume=True)
    assert not calls and whole(r) == whole(genetic(space, toy(space), budget, generations=3))


def test_stop_is_asked_after_each_score(tmp_path):
    space, file = small_space(), tmp_path/'s.json'
    fitness, calls = counted(toy(space))
    with pytest.raises(Interrupted, match='7 policies'): random_search(space, fitness, part(space), 30, checkpoint=file, stop=lambda: len(calls) == 7)
    assert SearchResult.load(file).evaluations == 7


KILLED = '''
import os, sys, time
from mebqat.bits import BitSpace
from mebqat.mixed.searches import genetic
from mebqat.mixed.space import Budget, Layer, SearchSpace
space = SearchSpace([Layer(f'l{i}', 1000*(i + 2), 100*(8 - i) + 7) for i in range(8)], BitSpace.grid((2, 3, 4, 8), (2, 3, 4, 8)))
calls = []
def fitness(p):
    if len(calls) == 60: os._exit(9)
    calls.append(p)
    time.sleep(.2 if len(calls) == 60 else .001)
    return sum(b.w for b in p.values())
genetic(space, fitness, Budget(max_bitops=1e6), generations=3, checkpoint=sys.argv[1])
'''


def test_a_killed_search_leaves_a_whole_file(tmp_path):
    "No chance to clean up: the file is older than the last scores at worst, but sound."
    file = tmp_path/'s.json'
    assert subprocess.run([sys.executable, '-c', KILLED, str(file)], cwd=tmp_path).returncode == 9
    kept = SearchResult.load(file)
    assert not kept.finished and 1 <= kept.evaluations <= 60
    fitness, calls = counted(lambda p: sum(b.w for b in p.values()))
    r = genetic(kept.space, fitness, kept.budget, generations=3, checkpoint=file, resume=True)
    assert len(calls) == r.evaluations - kept.evaluations and r.evaluated[:kept.evaluations] == kept.evaluated


@pytest.mark.parametrize('bad', [math.nan, math.inf, None, 'high', [1, 2], torch.zeros(2), 1j])
def test_a_fitness_that_is_no_number_names_the_policy_and_loses_nothing(bad, tmp_path):
    space, budget, file = small_space(), part(small_space()), tmp_path/'s.json'
    calls = []
    def fitness(policy): return calls.append(policy) or (bad if len(calls) == 12 else toy(space)(policy))
    with pytest.raises(ValueError) as e: genetic(space, fitness, budget, generations=2, checkpoint=file)
    assert repr(bad) in str(e.value) and repr(calls[-1]) in str(e.value) and '11 policies were scored and are in' in str(e.value) and '\n' not in str(e.value)
    assert SearchResult.load(file).evaluations == 11
    again, rest = counted(toy(space))
    assert whole(genetic(space, again, budget, generations=2, checkpoint=file, resume=True)) == whole(genetic(space, toy(space), budget, generations=2))
    assert rest[0] == calls[-1]


def test_errors_of_the_fitness_come_through_and_lose_nothing(tmp_path):
    space, file, calls = small_space(), tmp_path/'s.json', []
    def fitness(policy):
        if len(calls) == 9: raise RuntimeError('out of memory')
        return calls.append(policy) or 1.
    with pytest.raises(RuntimeError, match='out of memory'): uniform(space, fitness, part(space, .9), checkpoint=file)
    assert SearchResult.load(file).evaluations == 9


def test_a_checkpoint_belongs_to_one_search(tmp_path):
    space, budget, file = small_space(), part(small_space()), tmp_path/'s.json'
    run = lambda **kwargs: random_search(**dict(space=space, fitness=fitness, budget=budget, evaluations=10, checkpoint=file) | kwargs)
    fitness = toy(space)
    run(meta={'data': 'digits'})
    fitness, calls = counted(toy(space))
    with pytest.raises(ValueError, match='holds a search already'): run(meta={'data': 'digits'})
    others = ((dict(seed=1), 'config differs'), (dict(budget=part(space, .6)), 'budget differs.*max_bytes'), (dict(meta={'data': 'svhn'}), 'meta differs.*svhn'),
              (dict(space=small_space(5), budget=part(small_space(5))), 'budget|space'), (dict(space=small_space(widths=(2, 4, 8))), 'space differs'))
    for kwargs,word in others:
        with pytest.raises(ValueError, match=word): run(**{'meta': {'data': 'digits'}, 'resume': True} | kwargs)
    with pytest.raises(ValueError, match='method differs'): uniform(space, fitness, budget, checkpoint=file, resume=True, meta={'data': 'digits'})
    with pytest.raises(OSError, match='nowhere'): run(checkpoint=tmp_path/'nowhere'/'s.json')
    file.write_text('{"format": "other"}')
    with pytest.raises(ValueError, match='s.json: it holds no search'): run(resume=True)
    assert not calls and file.read_text() == '{"format": "other"}'


def test_a_full_disk_keeps_the_file_before(tmp_path, monkeypatch):
    import mebqat.files as module
    space, file, calls = small_space(), tmp_path/'s.json', []
    real = module.write_text
    def full(path, text):
        if len(calls) >= 5: raise OSError(errno.ENOSPC, 'No space left on device', str(path))
        return real(path, text)
    monkeypatch.setattr(module, 'write_text', full)
    with pytest.raises(OSError, match='No space left'): random_search(space, lambda p: calls.append(p) or 1., part(space), 20, checkpoint=file)
    assert 0 <= SearchResult.load(file).evaluations <= 5


def test_known_scores_save_calls_and_count():
    space, budget = small_space(6), part(small_space(6))
    drops = measure_sensitivity(space, toy(space))
    for method,kwargs in ((greedy, {}), (exact, {})):
        fitness, calls = counted(toy(space))
        r = method(space, fitness, budget, known=drops.points, **kwargs)
        assert len(calls) == 1 and r.evaluations == len(drops.points) + 1 and whole(r) == whole(method(space, toy(space), budget, **kwargs))
        fitness, calls = counted(toy(space))
        given_drops = method(space, fitness, budget, sensitivity=drops)
        assert given_drops.best == r.best and given_drops.evaluations == len(calls) == 1
        with pytest.raises(ValueError, match='another space'): method(small_space(5), fitness, part(small_space(5)), sensitivity=drops)


# Sensitivity, greedy, exact

def brute(space, budget, value):
    "The best value of all policies within the budget."
    every = (Policy(dict(zip(space.names, bits))) for bits in itertools.product(*space.choices.values()))
    return max(value(p) for p in every if budget.allows(space.bytes(p), space.bitops(p)))


@given(problems(most=3), st.integers(0, 2**31))
def test_exact_is_exact(problem, seed):
    "Any drops, also negative ones, against trying everything."
    space, budget = problem
    steps = space.steps.tolist()
    noise = (torch.rand(sum(steps), generator=rng(seed), dtype=torch.float64) - .2).tolist()
    rows = [[noise.pop() for _ in range(n - 1)] + [0.] for n in steps]
    s = Sensitivity(space, 1., tuple(map(tuple, rows)))
    found = s.solve(budget)
    assert budget.allows(space.bytes(found), space.bitops(found))
    assert s.predict(found) == pytest.approx(brute(space, budget, s.predict), abs=1e-8)


@pytest.mark.parametrize('seed', range(4))
def test_exact_on_a_large_space_against_dynamic_programming(seed):
    "20 layers, seven widths, drops in no order; totals of bits are few enough to keep the best of each."
    g = rng(seed)
    space = SearchSpace([Layer(f'l{i}', 1, int(n)) for i,n in enumerate(torch.randint(5, 60, (20,), generator=g))], [Bits(w, 8) for w in range(2, 9)])
    drops = [[*row, 0.] for row in torch.rand(20, 6, generator=g, dtype=torch.float64).tolist()]
    limit, best = int(4.3*sum(l.weights for l in space.layers)), {0: 0.}
    for layer,row in zip(space.layers, drops):
        after = {}
        for bits,lost in best.items():
            for w,d in zip(range(2, 9), row):
                total = bits + w*layer.weights
                if total <= limit: after[total] = min(after.get(total, math.inf), lost + d)
        best = after
    s = Sensitivity(space, 1., tuple(map(tuple, drops)))
    assert s.predict(s.solve(Budget(max_bytes=limit/8))) == pytest.approx(1 - min(best.values()), abs=1e-9)


@pytest.mark.parametrize('scale', [1e-9, 1e9, 0.])
def test_exact_at_any_scale_of_fitness(scale):
    space, budget = small_space(4, (2, 4, 8)), part(small_space(4, (2, 4, 8)), .5, .4)
    fitness = lambda p: scale*toy(space)(p)
    assert exact(space, fitness, budget).best.fitness == pytest.approx(brute(space, budget, fitness), rel=1e-9)


def test_an_additive_fitness_is_predicted():
    space, budget = small_space(6), part(small_space(6), .5, .4)
    drops = measure_sensitivity(space, toy(space))
    assert len(drops.points) == 1 + int((space.steps - 1).sum()) and drops.base == toy(space)(space.largest)
    for p in space.random_policies(20, rng()): assert drops.predict(p) == pytest.approx(toy(space)(p))
    df = drops.to_frame()
    assert df.shape == (8, 4) and list(df.columns) == [2, 3, 4, 8] and (df[8] == 0).all()
    one = dict(space.largest) | {'l2': Bits(3, 8)}
    assert df.loc['l2.w', 3] == pytest.approx(toy(space)(space.largest) - toy(space)(Policy(one)))
    r = exact(space, toy(space), budget)
    assert r.details['predicted'] == pytest.approx(r.best.fitness) and r.evaluations == len(drops.points) + 1


@given(problems(most=5), st.integers(0, 100), st.booleans())
@settings(max_examples=20)
def test_greedy_fits_and_never_beats_exact_on_an_additive_fitness(problem, seed, remeasure):
    space, budget = problem
    fitness = toy(space, seed)
    g, e = greedy(space, fitness, budget, remeasure=remeasure), exact(space, fitness, budget)
    assert budget.allows(g.best.bytes, g.best.bitops) and g.best.fitness <= e.best.fitness + 1e-9
    if not remeasure: assert g.best.fitness == pytest.approx(greedy(space, fitness, budget, remeasure=True).best.fitness, abs=.2)


def test_greedy_by_hand():
    "Two layers, one byte must go: the layer that loses less gives it up."
    space = SearchSpace([Layer('a', 1, 8), Layer('b', 1, 8)], [Bits(w, 8) for w in (3, 4)])
    fitness = lambda p: {Bits(3, 8): -.3, Bits(4, 8): 0.}[p['a']] + {Bits(3, 8): -.1, Bits(4, 8): 0.}[p['b']]
    assert greedy(space, fitness, Budget(max_bytes=7)).best.policy == Policy({'a': Bits(4, 8), 'b': Bits(3, 8)})
    dear = SearchSpace([Layer('a', 1, 80), Layer('b', 1, 40), Layer('c', 1, 40)], [Bits(w, 8) for w in (3, 4)])
    per_layer = lambda p: -sum(loss*(p[n].w == 3) for n,loss in (('a', .3), ('b', .25), ('c', .2)))
    found = greedy(dear, per_layer, Budget(max_bytes=70), measure_sensitivity(dear, per_layer)).best.policy
    assert [found[n].w for n in 'abc'] == [3, 4, 4]  # a loses most, but least per byte


def test_without_scipy_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, 'scipy.optimize', None)
    fitness, calls = counted(toy(small_space()))
    with pytest.raises(ImportError, match=r'pip install "mebqat\[search\]"'): exact(small_space(), fitness, part(small_space()))
    assert not calls and genetic(small_space(), fitness, part(small_space()), generations=1).evaluations == len(calls) > 10


def test_uniform_takes_the_best_pair_that_fits():
    space, budget = small_space(), part(small_space(), .6, .5)
    r = uniform(space, toy(space), budget)
    fits = [p for p in map(space.uniform, space.choices['l1']) if budget.allows(space.bytes(p), space.bitops(p))]
    assert [s.policy for s in r.evaluated] == fits and r.best.fitness == max(map(toy(space), fits))
    apart = SearchSpace([Layer('a', 1, 1), Layer('b', 1, 1)], {'a': [Bits(2, 2), Bits(3, 3)], 'b': [Bits(4, 4), Bits(5, 5)]})
    with pytest.raises(ValueError, match='share none'): uniform(apart, toy(apart), Budget(max_bitops=30))


# Files

def test_a_result_round_trips_and_shows_itself(tmp_path):
    space, budget = small_space(), part(small_space(), None, .4)
    r = genetic(space, toy(space), budget, generations=2, meta={'network': 'toy'})
    again = SearchResult.load(r.save(tmp_path/'r.json'))
    assert whole(again) == whole(r) and again.seconds == r.seconds and again.space.record() == space.record() and again.meta == {'network': 'toy'}
    df = r.to_frame()
    assert len(df) == r.evaluations and df.best.iloc[-1] == r.best.fitness and df.best.is_monotonic_increasing and df.within.all()
    assert 'W8A8' in df.policy[1] and 'best' in r._repr_html_() and 'l3' in r._repr_html_() and 'seed 0' in r._repr_html_()
    fig = r.plot()
    assert fig.layout.xaxis.title.text and fig.layout.yaxis.title.text and fig.data[0].y[-1] == r.best.fitness
    outside = greedy(space, toy(space), budget).to_frame()
    assert not outside.within.iloc[0] and math.isnan(outside.best.iloc[0]) and outside.within.iloc[-1]


@pytest.mark.parametrize('spoil, word', [
    (lambda t: t[:len(t)//2], 'not JSON'), (lambda t: '[]', 'not a JSON object'), (lambda t: '{}', 'no search'), (lambda t: t.replace('"version": 1', '"version": 9'), 'version 9'),
    (lambda t: t.replace('W8A8 W', 'W99A8 W', 1), 'damaged'), (lambda t: t.replace('"layers"', '"lairs"'), 'damaged'), (lambda t: t.replace('W8A8 W', 'W', 1), 'damaged'),
    (lambda t: t.replace('"fitness"', '"x"').replace('"evaluated": [\n  [', '"evaluated": [\n  ["W8A8", null], ['), 'damaged')])
def test_a_bad_file_is_refused(spoil, word, tmp_path):
    space = small_space()
    path = random_search(space, toy(space), part(space), 5).save(tmp_path/'r.json')
    unsigned = re.sub(r',\n "checksum": "\w+"', '', path.read_text()).replace('"version": 2', '"version": 1')
    path.write_text(spoil(unsigned))
    with pytest.raises(ValueError, match=f'r.json: .*{word}'): SearchResult.load(path)


# Fronts

def cloud(n, seed, method='', space=small_space()):
    "Random points with random policies."
    v = torch.rand(n, 3, generator=rng(seed), dtype=torch.float64).tolist()
    return [Scored(p, f, 1000*b, int(1e6*o), method) for p,(f,b,o) in zip(space.random_policies(n, rng(seed)), v)]


@given(st.integers(1, 40), st.integers(0, 999), st.sampled_from([('bytes',), ('bitops',), ('bytes', 'bitops')]), st.integers(1, 8))
def test_non_dominated_is_what_it_says(n, seed, costs, coarse):
    points = [replace(p, fitness=round(p.fitness*coarse)/coarse, bytes=round(p.bytes*coarse/1000), bitops=round(p.bitops*coarse/1e6)) for p in cloud(n, seed)]
    key = lambda p: (-p.fitness, *(getattr(p, c) for c in costs))
    beats = lambda p, q: all(a <= b for a,b in zip(key(p), key(q))) and key(p) != key(q)
    kept = Front(points).non_dominated(costs).points
    assert sorted(map(key, kept)) == sorted({key(p) for p in points if not any(beats(q, p) for q in points)})


def inclusion_exclusion(boxes):
    "Volume of a union of boxes from the origin's far corner, by all subsets."
    total = 0.
    for k in range(1, len(boxes) + 1):
        for some in itertools.combinations(boxes, k): total -= (-1)**k*math.prod(min(b[d] for b in some) for d in range(3))
    return total


@given(st.integers(1, 9), st.integers(0, 999))
def test_hypervolume_by_inclusion_and_exclusion(n, seed):
    points = cloud(n, seed)
    reference = {'bytes': 700., 'bitops': 8e5}
    part = lambda v, r: max(0., 1 - v/r)
    boxes = [(part(p.bytes, 700), part(p.bitops, 8e5), max(0., p.fitness - .3)) for p in points]
    assert Front(points).hypervolume(reference, .3) == pytest.approx(inclusion_exclusion(boxes), abs=1e-12)
    flat = [(part(p.bytes, 700), 1., max(0., p.fitness - .3)) for p in points]
    assert Front(points).hypervolume({'bytes': 700}, .3) == pytest.approx(inclusion_exclusion(flat), abs=1e-12)


def test_hypervolume_is_the_mean_best_under_a_random_budget():
    points = cloud(30, 5)
    draws = np.random.default_rng(0).random((20_000, 2))*[900, 9e5]
    cost, fit = np.array([(p.bytes, p.bitops) for p in points]), np.array([p.fitness for p in points])
    best = np.where((cost[None] <= draws[:, None]).all(2), fit, 0).max(1)
    assert Front(points).hypervolume({'bytes': 900, 'bitops': 9e5}) == pytest.approx(best.mean(), abs=4*best.std()/20_000**.5)
    more = Front(points).merge(Front(cloud(5, 6)))
    assert len(more) == 35 and more.hypervolume({'bitops': 1e6}) >= Front(points).hypervolume({'bitops': 1e6})


def test_a_front_of_several_methods(tmp_path):
    space, budget = small_space(), part(small_space())
    g, r = genetic(space, toy(space), budget, generations=2), random_search(space, toy(space), budget, 30)
    front = Front.of(g, r, Front([space.scored(space.largest, .9, 'float-ish')]), title='toy')
    assert front.methods == ('genetic', 'random', 'float-ish') and {m: len(f) for m,f in front.by_method().items()} == {'genetic': g.evaluations, 'random': 30, 'float-ish': 1}
    assert front.best(max_bytes=1500) == max((p for p in front if p.bytes <= 1500), key=lambda p: p.fitness)
    with pytest.raises(ValueError, match='no point costs at most 1 B'): front.best(max_bytes=1)
    with pytest.raises(ValueError, match='max_bytes, max_bitops or both'): front.best()
    again = Front.load(front.save(tmp_path/'f.json'))
    assert (again.points, again.title, again.meta) == (front.points, 'toy', {})
    df = front.to_frame()
    assert list(df) == ['method', 'accuracy', 'bytes', 'bitops', 'policy'] and len(df) == len(front) and '<table' in front._repr_html_()
    for x in ('bytes', 'bitops'):
        fig = front.plot(x)
        drawn = [(t.name, a, b) for t in fig.data for a,b in zip(t.x, t.y)]
        assert sorted(drawn) == sorted((p.method, getattr(p, x), p.fitness) for p in front)
        texts = [h for t in fig.data for h in t.hovertext]
        assert all('l3 W' in h for h in texts) and x.rstrip('s')[:3] in fig.layout.xaxis.title.text and fig.layout.yaxis.title.text == 'accuracy'
    with pytest.raises(ValueError, match="'bytes' or 'bitops'"): front.plot('accuracy')
    for bad in ((), ('seconds',)):
        with pytest.raises(ValueError, match="'bytes', 'bitops' or both"): front.non_dominated(bad)
    with pytest.raises(ValueError, match='positive'): front.hypervolume({'bytes': 0})


def test_fronts_refuse(tmp_path):
    with pytest.raises(ValueError, match='at least one point'): Front([])
    with pytest.raises(ValueError, match='Scored'): Front([Bits(4, 4)])
    with pytest.raises(ValueError, match='nan'): Front([replace(cloud(1, 0)[0], fitness=math.nan)])
    path = Front(cloud(3, 0)).save(tmp_path/'f.json')
    good = path.read_text()
    for spoiled,word in ((good[:-20], 'not JSON'), (good.replace('mebqat-front', 'x'), 'no front'), (good.replace('"bitops"', '"ops"'), 'damaged'), (good.replace('"version": 2', '"version": 3'), 'version 3'), (good.replace('0', '1', 1), 'checksum')):
        path.write_text(spoiled)
        with pytest.raises(ValueError, match=f'f.json: .*{word}'): Front.load(path)


# A real network

@pytest.fixture(scope='module')
def digits_network():
    "A small network trained at random widths for a moment, its profile and its accuracy on held-out digits."
    torch.manual_seed(0)
    train, test = (load('digits', split) for split in ('train', 'test'))
    x, y = train.batch(torch.arange(len(train)))
    side = x.shape[-1]
    model = quantize(small_cnn(image_size=side, width=8), LSQ(), x[:64], ends=Bits(8, 8), bn='batch')
    opt, g, widths = torch.optim.Adam(model.parameters(), 5e-3), rng(), BitSpace.grid((2, 3, 4, 8), (2, 3, 4, 8))
    for _ in range(200):
        i = torch.randint(len(x), (64,), generator=g)
        with use_bits(model, widths.sample(g)): loss = F.cross_entropy(model(x[i]), y[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
    xt, yt = test.batch(torch.arange(len(test)))
    def accuracy(policy):
        with use_bits(model, policy), torch.no_grad(): return (model(xt).argmax(1) == yt).float().mean().item()
    return profile(model, x[:1]), accuracy


def test_a_real_network_is_searched(digits_network):
    costs, accuracy = digits_network
    space = SearchSpace(costs, BitSpace.grid((2, 3, 4, 8), (2, 3, 4, 8)), ends=Bits(8, 8))
    assert accuracy(space.largest) > .8
    middle = lambda f: (f(space.smallest) + f(space.largest))/2
    budget = Budget(middle(space.bytes), .4*space.bitops(space.largest))
    even = uniform(space, accuracy, budget)
    found = genetic(space, accuracy, budget, population=12, generations=5, mutants=6, crossovers=4, parents=4, start=[even.best.policy])
    for r in (even, found, exact(space, accuracy, budget), greedy(space, accuracy, budget)):
        c = costs.at(r.best.policy)
        assert (r.best.bytes, r.best.bitops, r.best.fitness) == (c.weight_bytes, c.bitops, accuracy(r.best.policy))
        assert budget.allows(c.weight_bytes, c.bitops)
    assert found.best.fitness >= accuracy(found.evaluated[0].policy) and found.best.fitness > .8
