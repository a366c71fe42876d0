"Few-shot methods, runs and evaluation: against loops by hand, through interruptions and damaged files, and with input that cannot work."
import copy, functools, json, math, shutil, signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import mebqat.runs.episodes as fewruns
from mebqat.adapt import adaptable, learn_rates
from mebqat.files import load_whole, save_whole
from mebqat.runs.answers import answer
from mebqat.bits import FP, Bits, BitSpace
from mebqat.data import load
from mebqat.episodes import Episode, Episodes
from mebqat.fewshot.evaluate import EpisodeScores, adaptation_curve, inner_correct, proto_correct, sweep_episodes
from mebqat.fewshot.methods import (FewShot, InnerSteps, Prototypes, maml, mebqat_maml, mebqat_pn, pn, proto_loss,
                                    split_stem, task_loss, trainable)
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.models import cnn4, cnn5
from mebqat.quantizers import LSQ, SAT, DoReFa
from mebqat.runs import open_run, spec_of, train_run
from mebqat.runs.episodes import EpisodeRecipe, fold_scales
from mebqat.speed import Replay
from mebqat.train import Interrupted

SPACE = BitSpace.parse('W2A2 W2A4 W4A4 W3AFP WFPA2 FP')
SCHEMES = {'lsq': LSQ(), 'lsq per channel': LSQ(per_channel=True), 'sat': SAT(), 'dorefa': DoReFa()}
few = settings(max_examples=12, deadline=None, derandomize=True, database=None)
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU here')
gen = lambda seed=0: torch.Generator().manual_seed(seed)


@functools.cache
def pool(split='train'): return load('glyphs', split, by='classes', size=16, n_classes=40)


@functools.cache
def _network(maml, scheme, bn):
    torch.manual_seed(0)
    net = cnn5(3, width=4, image_size=16) if maml else cnn4(width=4, image_size=16)
    with torch.no_grad():
        for p in (p for n,p in net.named_parameters() if maml and 'conv.weight' in n): p.mul_(10)
    return quantize(net, SCHEMES[scheme], example=pool().batch(slice(0, 64))[0], skip='ends' if maml else 'first', bn=bn)


def network(maml=False, scheme='lsq', bn='batch'): return copy.deepcopy(_network(maml, scheme, bn))
def double(e): return Episode(e.support.double(), e.support_labels, e.query.double(), e.query_labels, e.n_way)
def drawn(n, seed=0): return [double(e) for e in Episodes(pool(), 3, 2, 3, seed).take(n)]
def tensors(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def grads(model): return {n: None if p.grad is None else p.grad.clone() for n,p in model.named_parameters()}
def names(folder): return sorted(p.name for p in folder.rglob('*') if p.name != '.writer.lock') if folder.exists() else []
def plain(row): return {k: v for k,v in row.items() if k != 'seconds'}


# one step

def task_by_hand(model, bits, e, learner):
    "Loss, and gradients by name, written as a paper would."
    named = dict(model.named_parameters())
    with use_bits(model, bits):
        if isinstance(learner, Prototypes):
            z = model(torch.cat([e.support, e.query]))
            means = torch.stack([z[:len(e.support)][e.support_labels == c].mean(0) for c in range(e.n_way)])
            far = (z[len(e.support):, None] - means).square().sum(2)
            loss = F.cross_entropy(-far, e.query_labels)
            if learner.distill and bits != FP:
                with use_bits(model, FP), torch.no_grad(): own = model(torch.cat([e.support, e.query]))
                means = torch.stack([own[:len(e.support)][e.support_labels == c].mean(0) for c in range(e.n_way)])
                answers = (-(own[len(e.support):, None] - means).square().sum(2)).softmax(1)
                loss = loss - (answers*(-far).log_softmax(1)).sum(1).mean()
        elif learner.center:
            mean = model[:-1](e.support).mean(0)
            support, query, w, b = model[:-1](e.support) - mean, model[:-1](e.query) - mean, model.fc.weight, model.fc.bias
            for k in range(learner.steps):
                slopes = torch.autograd.grad(F.cross_entropy(support @ w.T + b, e.support_labels), (w, b), create_graph=not learner.first_order)
                w, b = w - learner.inner_lr*slopes[0], b - learner.inner_lr*slopes[1]
            loss = F.cross_entropy((query @ w.T + b)/learner.temperature, e.query_labels)
        else:
            fast, moving, points = dict(named), adaptable(model, learner.kinds), []
            for k in range(learner.steps):
                inner = F.cross_entropy(functional_call(model, fast, (e.support,)), e.support_labels)
                slopes = torch.autograd.grad(inner, [fast[n] for n in moving], create_graph=not learner.first_order, allow_unused=True)
                fast |= {n: fast[n] - learner.inner_lr*s for n,s in zip(moving, slopes) if s is not None}
                points.append(dict(fast))
            points = points if learner.every_step else points[-1:]
            loss = torch.stack([F.cross_entropy(functional_call(model, p, (e.query,))/learner.temperature, e.query_labels) for p in points]).mean()
    return float(loss.detach()), dict(zip(named, torch.autograd.grad(loss, named.values(), allow_unused=True)))


def mean_by_hand(model, pairs, tasks, clamp):
    "Means over the tasks that a parameter, or a row of a width table, took part in."
    widths = {}
    for n in bit_layers(model): widths |= {f'{n}.weight_quantizer': [b.w for b in pairs], f'{n}.act_quantizer': [b.a for b in pairs]}
    for name, p in model.named_parameters():
        total = sum((t[name] for t in tasks if t[name] is not None), torch.zeros_like(p))
        if name.endswith('log_factor'):
            w = widths[name.rsplit('.', 2)[0]]
            yield name, torch.stack([r/max(w.count(i + 1), 1) for i,r in enumerate(total)]).clamp(-clamp, clamp)
        else: yield name, (total/len(pairs)).clamp(-clamp, clamp)


STEPS = {
    'mebqat-pn, inner': (mebqat_pn(SPACE, 4), 1), 'mebqat-pn, both': (mebqat_pn(SPACE, 4), 4), 'mebqat-pn, guaranteed': (mebqat_pn(SPACE, 4, [Bits(2, 2), Bits(2, 2)]), 1),
    'pn': (pn(), 1), 'pn-qat': (pn(Bits(2, 4), 2), 2), 'pn, apart': (FewShot('x', Prototypes(share_stem=False), (Bits(2, 2), FP)), 1),
    'mebqat-pn, taught': (mebqat_pn(SPACE, 4, [FP], Prototypes(distill=True)), 1), 'mebqat-pn, both, taught': (mebqat_pn(SPACE, 3, [Bits(2, 2), FP], Prototypes(distill=True)), 3),
    'mebqat-maml': (mebqat_maml(SPACE, 4, learner=InnerSteps(2, .3)), 4), 'fomaml-qat': (maml(Bits(3, 4), 2, InnerSteps(2, .3)), 2),
    'maml': (maml(FP, 1, InnerSteps(2, .3, first_order=False)), 1),
    'everything': (mebqat_maml(SPACE, 3, [Bits(2, 2)], InnerSteps(2, .1, False, True, ('weights', 'norms', 'steps'), temperature=2.)), 3),
    'one episode': (mebqat_maml(SPACE, 2, learner=InnerSteps(1, .3)), 1),
    'centered': (mebqat_maml(SPACE, 4, learner=InnerSteps(3, 2., False, kinds=('head',), center=True, temperature=.25)), 4), 'centered, first order': (maml(Bits(3, 4), 2, InnerSteps(2, 1., kinds=('head',), center=True)), 2),
}


@pytest.mark.parametrize('clamp', (10., .01))
@pytest.mark.parametrize('case', STEPS)
def test_a_step_is_the_mean_of_its_tasks(case, clamp):
    (method, n), scheme = STEPS[case], 'lsq per channel' if 'both' in case else 'lsq'
    method = replace(method, clamp=clamp)
    model, episodes = network(isinstance(method.learner, InnerSteps), scheme).double().train(), drawn(n)
    step = method(model, episodes, gen(5))
    mine = grads(model)
    tasks = [task_by_hand(model, b, e, method.learner) for b,e in zip(step.pairs, episodes*(len(step.pairs)//n))]
    assert len(step.pairs) == method.n_tasks and step.pairs[:len(method.fixed)] == method.fixed
    assert_close(step.loss, sum(t[0] for t in tasks)/len(tasks))
    for name, mean in mean_by_hand(model, step.pairs, [t[1] for t in tasks], clamp):
        if mine[name] is None: assert not mean.any(), name
        else: assert_close(mine[name], mean, atol=1e-9, rtol=1e-6, msg=name)
    if clamp < 1: assert max(g.abs().max() for g in mine.values() if g is not None) == clamp


def answers_by_hand(z, t, k_shot):
    "Logits of the queries, class by class, where the image at place `t` of a class [n_way, images, d] is its first support."
    order = [(t + i) % z.shape[1] for i in range(z.shape[1])]
    return -torch.stack([(z[:, j, None] - z[:, order[:k_shot]].mean(1)).square().sum(-1) for j in order[k_shot:]], 1).flatten(0, 1)


@few
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 4), st.integers(0, 99))
def test_every_image_takes_its_turn_as_support(n_way, k_shot, n_query, seed):
    z = torch.randn(n_way, k_shot + n_query, 4, generator=gen(seed), dtype=torch.float64)
    flat, labels = torch.cat([z[:, :k_shot].flatten(0, 1), z[:, k_shot:].flatten(0, 1)]), torch.arange(n_way).repeat_interleave(n_query)
    losses = [F.cross_entropy(answers_by_hand(z, t, k_shot), labels) for t in range(k_shot + n_query)]
    loss, right = task_loss(flat, labels, n_way, turns=True)
    assert_close(loss, sum(losses)/len(losses))
    assert torch.equal(right, proto_loss(flat, labels, n_way)[1])
    assert_close(proto_loss(flat, labels, n_way)[0], losses[0])
    own = (2*flat).requires_grad_()
    taught, plain = (task_loss(flat.requires_grad_(), labels, n_way, turns=True, teacher=t)[0] for t in (own, None))
    least = [-(p*p.log()).sum(1).mean() for t in range(k_shot + n_query) for p in [answers_by_hand(2*z, t, k_shot).softmax(1)]]
    assert taught - plain >= sum(least)/len(least) - 1e-9  # a cross entropy is at least the teacher's entropy
    assert torch.autograd.grad(taught, (flat, own), allow_unused=True)[1] is None
    agreeing = task_loss(flat, labels, n_way, turns=True, teacher=flat)[0] - plain
    least = [-(p*p.log()).sum(1).mean() for t in range(k_shot + n_query) for p in [answers_by_hand(z, t, k_shot).softmax(1)]]
    assert_close(agreeing, sum(least)/len(least))


@few
@given(st.lists(st.sampled_from(SPACE.pairs), min_size=1, max_size=5), st.sampled_from(list(SCHEMES)), st.integers(0, 9), st.integers(0, 2), st.booleans())
def test_a_shared_stem_changes_nothing(pairs, scheme, i, frozen, distill):
    "Whatever of the stem is frozen: nothing, its weights, all of it."
    model, e = network(scheme=scheme).double(), double(Episodes(pool(), 3, 1, 2)[i])
    for p in list(split_stem(model)[0].parameters())[:(0, 1, 9)[frozen]]: p.requires_grad_(False)
    shared, apart = (Prototypes(share_stem=s, distill=distill).tasks(model, pairs, e) for s in (True, False))
    for a, b in zip(shared, apart): assert_close((a.loss, a.accuracy), (b.loss, b.accuracy))
    for columns in zip(*(zip(*(r.grads for r in results)) for results in (shared, apart))):
        a, b = (sum((g for g in c if g is not None), torch.zeros(())) for c in columns)
        assert_close(a, b, atol=1e-9, rtol=1e-7)
    assert len(shared[0].grads) == len(apart[0].grads) == len(trainable(model))


@pytest.mark.parametrize('case', [c for c in STEPS if c != 'everything'] + ['every step', 'no steps'])
def test_passes_are_counted(case, monkeypatch):
    extra = {'every step': (mebqat_maml(SPACE, 2, learner=InnerSteps(3, .1, every_step=True)), 2), 'no steps': (maml(FP, 1, InnerSteps(0, every_step=True)), 1)}
    method, n = (STEPS | extra)[case]
    model, seen, real = network(isinstance(method.learner, InnerSteps)).double(), {'block1': 0, 'block2': 0, 'grad': 0}, torch.autograd.grad
    if alone := getattr(method.learner, 'kinds', ()) == ('head',): seen['fc'] = 0
    for k in seen.keys() - {'grad'}: getattr(model, k).register_forward_hook(lambda *_, k=k: seen.update({k: seen[k] + 1}))
    monkeypatch.setattr(torch.autograd, 'grad', lambda *a, **k: (seen.update(grad=seen['grad'] + 1), real(*a, **k))[1])
    step = method(model, drawn(n), gen())
    taught, shared = getattr(method.learner, 'distill', False), getattr(method.learner, 'share_stem', False) and n == 1 and method.n_tasks > 1
    if taught: assert step.forwards == method.n_tasks + (any if n == 1 else sum)(b != FP for b in step.pairs)
    if alone: assert seen == {'block1': 2*method.n_tasks, 'block2': 2*method.n_tasks, 'fc': step.forwards, 'grad': step.backwards}  # the body meets support and query once
    else: assert seen == {'block1': 1 if shared else step.forwards, 'block2': step.forwards, 'grad': step.backwards + shared}


def test_randomness_is_the_generators():
    for case in ('mebqat-pn, inner', 'mebqat-maml'):
        method, n = STEPS[case]
        model, found = network('maml' in case).double(), []
        for seed in (1, 2):
            torch.manual_seed(seed)
            state = torch.get_rng_state()
            model.zero_grad()
            g = gen(7)
            step = method(model, drawn(n), g)
            assert torch.equal(state, torch.get_rng_state())
            found.append((step, grads(model), g.get_state()))
        expected = gen(7)
        assert list(found[0][0].pairs) == [SPACE.sample(expected) for _ in range(4)] and torch.equal(expected.get_state(), found[0][2])
        assert found[0][0] == found[1][0]
        for n in found[0][1]: assert found[0][1][n] is found[1][1][n] is None or torch.equal(found[0][1][n], found[1][1][n])
        assert len({method(model, drawn(1), gen(s)).pairs for s in range(6)}) > 3


@pytest.mark.parametrize('kind', ('pn', 'maml'))
def test_a_step_writes_gradients_and_sizes_of_inputs_only(kind):
    model = network(kind == 'maml').double().train()
    model.block2.conv.weight.requires_grad_(False)
    rest = lambda: {k: v for k,v in tensors(model).items() if not k.endswith('size.late')}
    before = rest()
    (pn(Bits(2, 2)) if kind == 'pn' else maml(Bits(2, 2), 1))(model, drawn(1), gen())
    assert same(rest(), before) and model.training and all(m.bits == FP for m in bit_layers(model).values())
    assert model.block2.conv.weight.grad is None and model.block3.conv.weight.grad.any()


def test_learned_rates_get_a_gradient_and_must_fit():
    model = network(True).double()
    learn_rates(model, adaptable(model), 2, .3)
    maml(Bits(3, 4), 2, InnerSteps(2, .3))(model.double(), drawn(2), gen())
    assert model.log_rate.grad.shape == (2, len(adaptable(model))) and model.log_rate.grad.any(1).all()
    with pytest.raises(ValueError, match=r'learned rates for 10 tensors, but 14 adapt here \(weights, norms\)'):
        maml(FP, 1, InnerSteps(kinds=('weights', 'norms')))(model, drawn(1), gen())


def test_distilling_is_asked_for():
    assert [spec_of('mebqat-pn', turns=True, **k).options.learner() for k in ({}, dict(distill=True))] == [Prototypes(turns=True), Prototypes(turns=True, distill=True)]


def test_methods_that_cannot_be():
    for n, text in ((0, 'n_tasks=0 is fewer than 1'), (1, 'the 2 guaranteed pairs')):
        with pytest.raises(ValueError, match=text): mebqat_pn(SPACE, n, [FP, Bits(2, 2)] if n else ())
    for n in (0, 2, 3, 5):
        with pytest.raises(ValueError, match=f'mebqat-maml has 4 pairs a step; give it 1 episode or as many, not {n}'): mebqat_maml(SPACE)(network(True).double(), drawn(n), gen())
    with pytest.raises(ValueError, match='goes down to W2A2'): pn(Bits(1, 1))(network().double(), drawn(1), gen())
    with pytest.raises(ValueError, match="distill with bn='batch'"): mebqat_pn(SPACE, learner=Prototypes(distill=True))(network(bn='running').double(), drawn(1), gen())


def test_divergence_in_training_names_the_inner_step():
    model = network(True).double()
    with torch.no_grad(): model.fc.weight.fill_(1e308)
    with pytest.raises(FloatingPointError, match='at inner step 0 of 2 with inner_lr=0.1; lower inner_lr'): maml(FP, 1, InnerSteps(2))(model, drawn(1), gen())


# recorded steps

def test_without_a_gpu_replay_only_calls():
    calls, x = [], torch.ones(2)
    replay = Replay(lambda key, *t: (calls.append((key, t)), [t[0]*2, None])[1])
    assert replay('k', x)[0].equal(2*x) and replay('k', x)[1] is None
    assert [(k, t[0] is x) for k,t in calls] == [('k', True)]*2 and not replay.graphs


@pytest.mark.parametrize('case', [c for c in STEPS if 'apart' not in c])
def test_a_task_survives_being_taken_apart_for_the_recording(case, monkeypatch):
    "The path of recorded steps, where nothing is recorded."
    method, n = STEPS[case]
    model, episodes = network(isinstance(method.learner, InnerSteps)).double().train(), drawn(n)
    step, before = method(model, episodes, gen(0)), grads(model)
    monkeypatch.setattr('mebqat.fewshot.methods._recordable', lambda *_: True)
    model.zero_grad()
    again = method(model, episodes, gen(0))
    assert_close(again.loss, step.loss, rtol=1e-5, atol=1e-6)
    for k,g in grads(model).items():
        if g is None: assert before[k] is None, k
        else: assert_close(g, before[k], rtol=1e-6, atol=1e-9, msg=k)


@gpu
@pytest.mark.parametrize('case', [c for c in STEPS if 'apart' not in c])
def test_recorded_steps_equal_eager_ones(case, monkeypatch):
    method, n = STEPS[case]
    model = network(isinstance(method.learner, InnerSteps)).cuda().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=.01)
    for i in range(4):
        episodes = [e.to('cuda') for e in Episodes(pool(), 3, 2, 3, i).take(n)]
        step, mine = method(model, episodes, gen(i)), grads(model)
        with monkeypatch.context() as m:
            m.setattr(FewShot, '_replayed', lambda self, model, bits, e: self.learner.task(model, bits, e))
            eager = method(model, episodes, gen(i))
        assert step.pairs == eager.pairs and step.forwards == eager.forwards
        assert_close(step.loss, eager.loss, rtol=1e-4, atol=1e-4)
        for k,g in grads(model).items():
            if g is None: assert mine[k] is None or not mine[k].any(), k
            else: assert_close(mine[k], g, rtol=1e-3, atol=1e-4, msg=k)
        optimizer.step()


@gpu
def test_a_run_on_the_gpu_opens_on_the_cpu(tmp_path):
    for spec in (small('mebqat-pn'), small('mebqat-maml', learn_rates=True)):
        run = train_run(spec, tmp_path/spec.method, device='cuda')
        assert all(v.device.type == 'cpu' for v in run.model.state_dict().values())
        assert same(tensors(run.model), tensors(open_run(tmp_path/spec.method).model))


# runs

_load = functools.cache(load)


@pytest.fixture(autouse=True)
def _small_runs(monkeypatch):
    "Two validation episodes; glyphs are drawn once."
    monkeypatch.setattr(fewruns, 'sweep_episodes', lambda *args: sweep_episodes(*args[:4], 2))
    monkeypatch.setattr(fewruns, 'load', _load)


def small(method, **changes):
    common = dict(glyph_classes=40, width=4, size=16, n_way=3, n_query=2, n_tasks=2, steps=3)
    inner_loop = {'inner_steps': 2} if 'maml' in method else {}
    bits = {'bits': 'W2A2 W4A4'} if method.startswith('mebqat') else {'bits': 'W3A3'} if method.endswith('qat') else {}
    return spec_of(method, **common | inner_loop | bits | changes)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "Two small runs, the second from the first."
    folder = tmp_path_factory.mktemp('runs')
    train_run(small('mebqat-pn', steps=20), folder/'pn')
    train_run(small('mebqat-maml', init=str(folder/'pn'), learn_rates=True), folder/'maml')
    return folder


@pytest.mark.parametrize('spec', [small('mebqat-pn', jitter=1., steps=20), small('mebqat-maml', jitter=.5, steps=20, learn_rates=True, bn='running')], ids=lambda s: s.method)
def test_resuming_is_bit_identical(spec, tmp_path, monkeypatch):
    straight, real, left = train_run(spec, tmp_path/'a'), EpisodeRecipe.feed, {5, 12, 13}

    def cut(*args):
        episodes = real(*args)
        def f(step):
            if step in left: left.discard(step), signal.raise_signal(signal.SIGINT)
            return episodes(step)
        return f
    monkeypatch.setattr(EpisodeRecipe, 'feed', cut)
    for stop in (6, 13, 14):
        with pytest.raises(Interrupted, match=f'after step {stop} of 20'): train_run(spec, tmp_path/'b', resume=stop > 6)
        with pytest.raises(ValueError, match='checkpoint of an unfinished run; finish it with.*--resume'): open_run(tmp_path/'b')
    with pytest.raises(ValueError, match='holds a run already'): train_run(spec, tmp_path/'b')
    run = train_run(spec, tmp_path/'b', resume=True)
    assert not left and same(tensors(run.model), tensors(straight.model)) and len(run.history) == 10
    assert [plain(r) for r in run.history.rows] == [plain(r) for r in straight.history.rows]
    assert names(tmp_path/'b') == ['checkpoint.safetensors', 'model.safetensors', 'run.json']
    with pytest.raises(ValueError, match='holds another run: .*seed=0 there, 1 here'): train_run(spec.changed(seed=1), tmp_path/'b', resume=True)


def test_the_seed_decides_everything(tmp_path):
    for method in ('mebqat-pn', 'mebqat-maml'):
        spec, found = small(method, jitter=1., steps=2), []
        for i,seed in enumerate((0, 0, 1)):
            torch.manual_seed(i)
            found.append(train_run(spec.changed(seed=seed), tmp_path/f'{method}{i}'))
        a, b, c = (tensors(r.model) for r in found)
        assert same(a, b) and [plain(r) for r in found[0].history.rows] == [plain(r) for r in found[1].history.rows]
        assert not any(torch.equal(a[k], c[k]) for k in a if k.endswith('conv.weight'))


ROUND_TRIPS = [small('mebqat-pn', options=(('per_channel', True), ('init', 'paper'))), small('pn-qat', scheme='dorefa', bits='W1A1'),
               small('mebqat-pn', scheme='dorefa', options=(('act_clip', 'pact'),), bn='running'), small('mebqat-maml', scheme='sat', options=(('rounding', 'centered'),)),
               small('mebqat-maml', adapts='weights norms', learn_rates=True, every_step=True, second_order=True), small('fomaml', options=(('shared_step', True),)),
               small('mebqat-maml', adapts='head', center=True, learn_rates=True), small('mebqat-pn', design='both', guaranteed='W2A2', test_way=4, n_way=5, distill=True)]


@pytest.mark.parametrize('spec', ROUND_TRIPS, ids=repr)
def test_saved_and_opened_again(spec, tmp_path):
    run = train_run(spec.changed(steps=2), tmp_path/'run')
    shutil.copy(tmp_path/'run'/'model.safetensors', tmp_path/'alone.safetensors')
    shutil.rmtree(tmp_path/'run')
    again = open_run(tmp_path/'alone.safetensors')
    assert again.spec == run.spec and same(tensors(again.model), tensors(run.model)) and again.about == json.loads(json.dumps(run.about))
    assert again.history.rows == run.history.rows and not again.model.training
    assert {n: (m.signed, m.scheme) for n,m in bit_layers(again.model).items()} == {n: (m.signed, m.scheme) for n,m in bit_layers(run.model).items()}
    space = BitSpace([b for b in (*spec.space(), FP) if b != Bits(1, 1) or spec.quantization.scheme == 'dorefa'])
    a, b = (r.sweep(space, r.episodes(n_query=2), n=2) for r in (run, again))
    for bits in space: assert torch.equal(a.accuracy[bits], b.accuracy[bits])
    assert a.meta == b.meta and a.meta['method'] == spec.method


@pytest.mark.parametrize('method', ('pn', 'fomaml'))
def test_calibrate_measures_the_trained_network(method, tmp_path):
    "With `calibrate=False` quantizers stay as the random start had them, which is the reference's way."
    spec = small(method, lr=.1)
    runs = [tensors(train_run(spec.changed(calibrate=c), tmp_path/str(c)).model) for c in (True, False)]
    train = EpisodeRecipe(spec).pool('train')
    start = [tensors(EpisodeRecipe(spec.changed(calibrate=c)).network(train)) for c in (True, False)]
    tables = [k for k in start[1] if k.endswith('.value')]
    for k in tables: assert torch.equal(runs[1][k], start[1][k]), k
    for k in start[0].keys() & start[1].keys(): assert torch.equal(runs[0][k], runs[1][k]), k
    inputs = [k for k in start[0] if k.endswith('act_quantizer.step.start')]
    assert all(not torch.allclose(runs[0][k], start[0][k], rtol=1e-3) for k in inputs)
    assert len(tables) == 6 and len(inputs) == 3 and not torch.equal(runs[0]['block2.conv.weight'], start[0]['block2.conv.weight'])


# starting from another run

@few
@given(st.lists(st.floats(-4, 4), min_size=12, max_size=12), st.integers(0, 999))
def test_folding_positive_scales_keeps_the_function(logs, seed):
    torch.manual_seed(seed)
    embed, classify, x = cnn4(width=3, image_size=16).double(), cnn5(3, width=3, image_size=16).double(), torch.rand(6, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        for k in range(4):
            norm = getattr(embed, f'block{k + 1}').norm
            norm.weight.copy_(torch.tensor(logs[3*k:3*k + 3]).exp())
            norm.bias.normal_()
        embed.block3.conv.bias.normal_()
        done = classify.load_state_dict(fold_scales(embed.state_dict()), strict=False)
        assert not done.unexpected_keys
        assert_close(embed.train()(x), classify[:-1].train()(x)*embed.block4.norm.weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize('value', (0., -.5, math.nan))
def test_scales_that_cannot_be_folded(value, tmp_path):
    state = cnn4(width=4, image_size=16).state_dict()
    state['block3.norm.weight'][1] = value
    with pytest.raises(ValueError, match=f'^block3 has a batch norm scale of {value:.3g}; only positive'): fold_scales(state)
    save_whole(tmp_path/'pn.safetensors', state, {'spec': {'method': 'pn'}})
    with pytest.raises(ValueError, match=r'pn.safetensors \(pn\) cannot start fomaml: block3 has a batch norm scale'):
        train_run(small('fomaml', init=str(tmp_path/'pn.safetensors')), tmp_path/'out')
    assert names(tmp_path) == ['pn.safetensors']


def test_a_maml_run_starts_from_an_embedding(trained):
    spec = small('fomaml', init=str(trained/'pn'))
    train = EpisodeRecipe(spec).pool('train')
    start, (theirs, _) = tensors(EpisodeRecipe(spec).network(train)), load_whole(trained/'pn'/'model.safetensors')
    for k,v in fold_scales(theirs).items(): assert torch.equal(start[k], v), k
    more = EpisodeRecipe(small('mebqat-maml', init=str(trained/'maml'), learn_rates=True)).network(train)
    assert same(tensors(more), load_whole(trained/'maml'/'model.safetensors')[0])  # tables and rates come along


WRONG_STARTS = {
    'another width': (dict(method='pn', init='pn', width=6), r'\(mebqat-pn\) cannot start pn: size mismatch'),
    'a wider MAML': (dict(method='fomaml', init='maml', width=6), r'\(mebqat-maml\) cannot start fomaml: size mismatch'),
    'other ways': (dict(method='fomaml', init='maml', n_way=4), r'cannot start fomaml: size mismatch for fc'),
    'another network': (dict(method='pn', init='other'), r'\(qat\) cannot start pn: .*block1.conv.weight'),
    'another network for MAML': (dict(method='fomaml', init='other'), r'\(qat\) cannot start fomaml: .*block1.norm.weight'),
    'nothing there': (dict(method='pn', init='nowhere'), 'no run at .*nowhere; make one with'),
    'no weights': (dict(method='pn', init='text'), 'text is damaged or no mebqat file'),
}


@pytest.mark.parametrize('case', WRONG_STARTS)
def test_what_cannot_start_a_run(case, trained, tmp_path):
    options, text = WRONG_STARTS[case]
    folder = trained if options['init'] in ('pn', 'maml') else tmp_path
    save_whole(tmp_path/'other', nn.Sequential(nn.Conv2d(1, 4, 3)).state_dict(), {'spec': {'method': 'qat'}})
    (tmp_path/'text').write_text('hello')
    with pytest.raises((ValueError, FileNotFoundError), match=text) as e: train_run(small(**options | {'init': str(folder/options['init'])}), tmp_path/'out')
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


# files

DAMAGE = {
    'another format': ({'format': 'mebqat-weights'}, 'does not describe a network of this version: it is no file of mebqat-maml'), 'no kind': ({'format': None}, 'is no run'),
    'another version': ({'version': 3}, 'it has fewshot version 3 of mebqat .*, and this mebqat reads 1 and 2; update mebqat'), 'no spec': ({'spec': None}, 'damaged fewshot: spec is None, not a table'),
    'spec of another kind': ({'spec': [1]}, r'damaged fewshot: spec is \[1\], not a table'), 'a method of tomorrow': ({'spec': {'method': 'leo'}}, "no method 'leo'"),
    'no method': ({'spec': {}}, "damaged fewshot: spec has no 'method'"), 'no input': ({'input': None}, 'damaged fewshot: input is None, not a list'), 'a flat input': ({'input': [28]}, 'does not describe'),
    'a tiny input': ({'input': [1, 4, 4]}, 'image_size 4 is too small'), 'more channels': ({'input': [3, 16, 16]}, 'does not describe'),
    'no signs': ({'signed': None}, 'damaged fewshot: signed is None, not a table'), 'history of numbers': ({'history': [1]}, r'damaged fewshot: history\[0\] is 1, not a table'), 'no torch': ({'torch': ...}, "damaged fewshot: it has no 'torch'"),
    'no classes': ({'classes': ...}, "damaged fewshot: it has no 'classes'"),
}


@pytest.mark.parametrize('case', DAMAGE)
def test_descriptions_that_do_not_describe(case, trained, tmp_path):
    weights, about = load_whole(trained/'maml'/'model.safetensors')
    changes, text = DAMAGE[case]
    save_whole(tmp_path/'model.safetensors', weights, {k: v for k,v in (about | changes).items() if v is not ...})
    with pytest.raises(ValueError, match=text) as e: open_run(tmp_path)
    assert '\n' not in str(e.value) and 'model.safetensors' in str(e.value)


@pytest.mark.parametrize('change', ('missing', 'extra', 'shape', 'rates'))
def test_weights_of_another_network(change, trained, tmp_path):
    weights, about = load_whole(trained/'maml'/'model.safetensors')
    if change == 'missing': del weights['block2.act_quantizer.step.log_factor' if 'block2.act_quantizer.step.log_factor' in weights else 'block2.conv.weight']
    else: weights |= {'extra': {'head.weight': torch.zeros(1)}, 'shape': {'block1.conv.weight': torch.zeros(8, 1, 3, 3)}, 'rates': {'log_rate': torch.zeros(2, 3)}}[change]
    save_whole(tmp_path/'x.safetensors', weights, about)
    with pytest.raises(ValueError, match='x.safetensors does not describe a network of this version') as e: open_run(tmp_path/'x.safetensors')
    assert '\n' not in str(e.value)


def test_truncated_files(trained, tmp_path):
    whole, file = (trained/'pn'/'model.safetensors').read_bytes(), tmp_path/'model.safetensors'
    for n in (0, 7, 8, 200, len(whole)//2, len(whole) - 1):
        file.write_bytes(whole[:n])
        with pytest.raises(ValueError, match='is damaged or no mebqat file') as e: open_run(tmp_path)
        assert '\n' not in str(e.value)


# evaluation

class Edited:
    "Episodes, looked up otherwise."
    def __init__(self, episodes, find): self.pool, self.seed, self.find = episodes.pool, episodes.seed, find
    def __getitem__(self, i): return self.find(i)


@pytest.mark.parametrize('bn', ('batch', 'running'))
@pytest.mark.parametrize('scheme', SCHEMES)
def test_prototype_sweep_is_the_plain_loop(scheme, bn):
    model, given = network(scheme=scheme, bn=bn).double().train(), Episodes(pool('test'), 4, 2, 3)
    for p in model.parameters(): p.data += .1*torch.randn(p.shape, generator=gen(p.numel()))
    before, episodes = tensors(model), [double(e) for e in given.take(3)]
    scores = sweep_episodes(model, Prototypes(), Edited(given, episodes.__getitem__), SPACE, n=3)
    assert same(tensors(model), before) and model.training and all(m.bits == FP for m in bit_layers(model).values())
    model.eval()
    for bits in SPACE:
        for i,e in enumerate(episodes):
            with torch.no_grad(), use_bits(model, bits): z = model(torch.cat([e.support, e.query]))
            means = z[:8].view(4, 2, -1).mean(1)
            right = torch.cdist(z[8:], means).argmin(1) == e.query_labels
            assert float(scores.accuracy[bits][i]) == float(right.double().mean()), (bits, i)


@pytest.mark.parametrize('learner', (Prototypes(), InnerSteps(1, .5)), ids=lambda l: type(l).__name__)
def test_evaluation_follows_the_rule_of_batch_norm(learner):
    "Each module's flag is put back; a network that re-estimates is refused, as there is nothing to measure from."
    given = Episodes(pool('test'), 3, 1, 2)
    model = network(isinstance(learner, InnerSteps), bn='running').train()
    next(m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)).eval()
    flags, before = [m.training for m in model.modules()], tensors(model)
    sweep_episodes(model, learner, given, SPACE, n=2)
    assert [m.training for m in model.modules()] == flags and same(tensors(model), before)
    with pytest.raises(ValueError, match="not 'reestimate'"): sweep_episodes(network(isinstance(learner, InnerSteps), bn='reestimate'), learner, given, SPACE, n=2)


@pytest.mark.parametrize('bn', ('batch', 'running'))
def test_centered_features_are_another_start_of_the_bias(bn):
    "What centering learns is an ordinary network: the mean's logits move into the bias."
    model, episodes, learner = network(True, bn=bn), Episodes(pool('test'), 3, 2, 3), InnerSteps(3, 2., kinds=('head',), center=True)
    scores = sweep_episodes(model, learner, episodes, SPACE, n=3)
    assert scores.meta['adapts'] == "head, features less the support's mean"
    for bits in SPACE:
        for i,e in enumerate(episodes.take(3)):
            mine = copy.deepcopy(model).eval()
            with use_bits(mine, bits), torch.no_grad(): mean, support = (h := mine[:-1](e.support)).mean(0), h
            optimizer = torch.optim.SGD(mine.fc.parameters(), lr=2.)
            for _ in range(3):
                optimizer.zero_grad()
                F.cross_entropy(mine.fc(support - mean), e.support_labels).backward()
                optimizer.step()
            with use_bits(mine, bits), torch.no_grad():
                mine.fc.bias -= mine.fc.weight @ mean
                right = mine(e.query).argmax(1) == e.query_labels
            assert float(scores.accuracy[bits][i]) == float(right.double().mean()), (bits, i)
            assert torch.equal(answer(model, learner, e, bits).predicted == e.query_labels, right)


@pytest.mark.parametrize('bad', (0, -1., float('inf'), float('nan')))
def test_a_temperature_is_positive(bad):
    for make in (lambda: small('mebqat-maml', temperature=bad), lambda: InnerSteps(1, temperature=bad)):
        with pytest.raises(ValueError, match=f'temperature must be positive, got {bad}'): make()


def test_centering_needs_a_classifier_that_adapts_alone():
    for make, kinds in ((lambda: InnerSteps(1, .3, center=True), 'weights'), (lambda: small('mebqat-maml', center=True, adapts='head norms'), 'head norms')):
        with pytest.raises(ValueError, match=f"centered features are for a classifier that adapts alone, 'head'; here the inner loop adapts '{kinds}'"): make()
    whole = torch.nn.ModuleList([network(True)])
    with pytest.raises(ValueError, match='centered features need a chain of layers that ends in the classifier; this is a ModuleList'): InnerSteps(1, kinds=('head',), center=True).check(whole)


@pytest.mark.parametrize('kinds', (('weights',), ('weights', 'norms')))
@pytest.mark.parametrize('bn', ('batch', 'running'))
def test_maml_sweep_is_the_loop_by_hand(bn, kinds):
    "A copy of the network, an optimizer, a few steps on the support in evaluation mode: no functional calls."
    model, episodes, learner = network(True, bn=bn).train(), Episodes(pool('test'), 3, 2, 3), InnerSteps(3, .5, kinds=kinds)
    before = tensors(model)
    scores = sweep_episodes(model, learner, episodes, SPACE, n=3)
    assert same(tensors(model), before) and model.training and all(p.grad is None for p in model.parameters())
    for bits in SPACE:
        for i,e in enumerate(episodes.take(3)):
            mine = copy.deepcopy(model).eval()
            optimizer = torch.optim.SGD([mine.get_parameter(n) for n in adaptable(mine, kinds)], lr=.5)
            with use_bits(mine, bits):
                for _ in range(3):
                    optimizer.zero_grad()
                    F.cross_entropy(mine(e.support), e.support_labels).backward()
                    optimizer.step()
                with torch.no_grad(): right = mine(e.query).argmax(1) == e.query_labels
            assert float(scores.accuracy[bits][i]) == float(right.double().mean()), (bits, i)


@pytest.mark.parametrize('bn', ('batch', 'running'))
@pytest.mark.parametrize('learner', (Prototypes(), InnerSteps(2, .5)), ids=lambda l: type(l).__name__)
def test_neither_order_matters(learner, bn):
    "Of pairs or of episodes: no statistics leak from one to the next."
    model, episodes = network(isinstance(learner, InnerSteps), bn=bn).train(), Episodes(pool('test'), 3, 1, 4)
    scores = sweep_episodes(model, learner, episodes, SPACE, n=5)
    backwards = sweep_episodes(model, learner, Edited(episodes, lambda i: episodes[4 - i]), BitSpace(SPACE.pairs[::-1]), n=5)
    alone = sweep_episodes(model, learner, episodes, BitSpace([Bits(2, 4)]), n=5)
    for b in SPACE: assert torch.equal(scores.accuracy[b], backwards.accuracy[b].flip(0)), b
    assert torch.equal(scores.accuracy[Bits(2, 4)], alone.accuracy[Bits(2, 4)])
    assert len({tuple(v.tolist()) for v in scores.accuracy.values()}) > 1 and any(len(set(v.tolist())) > 1 for v in scores.accuracy.values())


@few
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), min_size=2, max_size=30))
def test_means_intervals_and_paired_differences(rows):
    a, b = np.array(rows).T/20
    one, two = (EpisodeScores({Bits(2, 2): torch.tensor(v), FP: torch.tensor(a)}, meta={'episodes': 'these'}) for v in (a, b))
    half = lambda v: 1.96*v.std(ddof=1)/len(v)**.5
    point = one.surface().at(Bits(2, 2))
    assert_close([point.accuracy, point.low, point.high], [a.mean(), max(a.mean() - half(a), 0), min(a.mean() + half(a), 1)], check_dtype=False)
    row, d = one.minus(two).loc['W2A2'], 100*(a - b)
    assert_close([row.difference, row.low, row.high], [d.mean(), d.mean() - half(d), d.mean() + half(d)], atol=1e-9, rtol=1e-9)
    assert row.clear == (abs(d.mean()) > half(d)) and one.minus(two).loc['FP', 'difference'] == 0


def test_differences_need_the_same_episodes_and_a_shared_pair():
    make = lambda n, seed, bits=FP: EpisodeScores({bits: torch.rand(n)}, meta={'episodes': f'seed {seed}'})
    with pytest.raises(ValueError, match='other episodes: episodes seed 1 there, seed 0 here'): make(3, 0).minus(make(3, 1))
    with pytest.raises(ValueError, match='has 4 episodes, this one 3'): make(3, 0).minus(make(4, 0))
    elsewhere = EpisodeScores({FP: torch.rand(3)}, meta={'episodes': 'seed 0', 'split': 'val'})
    with pytest.raises(ValueError, match='split val there, None here'): make(3, 0).minus(elsewhere)
    with pytest.raises(ValueError, match='share no pair'): make(3, 0).minus(make(3, 0, Bits(2, 2)))
    with pytest.raises(ValueError, match=r'there are \[2, 3\]'): EpisodeScores({FP: torch.rand(2), Bits(2, 2): torch.rand(3)})
    with pytest.raises(ValueError, match='no pairs'): EpisodeScores({})


def test_the_curve_passes_through_the_sweeps():
    model, episodes, learner = network(True), Episodes(pool('test'), 3, 1, 4), InnerSteps(3, .5)
    curve = adaptation_curve(model, learner, episodes, SPACE, n=4, steps=3)
    assert len(curve) == 4*len(SPACE)
    for k in (0, 1, 3):
        scores = sweep_episodes(model, learner, episodes, SPACE, 4, steps=k).surface()
        for r in curve[curve.step == k].itertuples(): assert_close([r.accuracy, max(r.low, 0)], [scores.at(Bits.parse(r.bits)).accuracy, scores.at(Bits.parse(r.bits)).low])


@pytest.mark.parametrize('steps', (None, 0, 2))
def test_weights_that_are_no_numbers_get_no_accuracy(steps):
    model, learner = network(steps is not None), Prototypes() if steps is None else InnerSteps(2)
    episodes, space = Episodes(pool('test'), 3, 1, 2), BitSpace.parse('FP W3A3 W2A2')
    with torch.no_grad(): model.block3.conv.weight_quantizer.step.log_factor[1] = math.nan
    with pytest.raises(FloatingPointError, match='at W2A2') as e: sweep_episodes(model, learner, episodes, space, 1, steps)
    assert '\n' not in str(e.value)
    sweep_episodes(model, learner, episodes, BitSpace.parse('FP W3A3'), 1, steps)
    with torch.no_grad(): model.block1.conv.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match='at FP'): sweep_episodes(model, learner, episodes, space, 1, steps)


def test_adapting_once_too_far_gets_no_accuracy():
    "The support's loss is looked at before each step; after the last one only the answers can tell."
    model, e = network(True), Episodes(pool('test'), 3, 1, 2)[0]
    learn_rates(model, adaptable(model), 2, .1)
    with torch.no_grad(): model.log_rate[1] = 1e4
    with pytest.raises(FloatingPointError, match='outputs after 2 inner steps are not finite'): inner_correct(model, e, FP, InnerSteps(2), 2)
    with pytest.raises(FloatingPointError, match='support loss nan at inner step 2 of 3'): inner_correct(model, e, FP, InnerSteps(2), 3)
    assert inner_correct(model, e, FP, InnerSteps(2), 1).shape == (1, 6)


# what cannot work

BAD = {
    'more ways than classes': (dict(method='mebqat-pn', n_way=27), 'n_way=27 is more than the 26 classes of glyphs train'),
    'more ways than validation classes': (dict(method='mebqat-maml', n_way=20), 'n_way=20 is more than the .* classes of glyphs val'),
    'more test ways than classes': (dict(method='mebqat-maml', n_way=1), 'n_way must be a whole number, 2 or more; got 1'),
    'more shots than images': (dict(method='pn', k_shot=15, n_query=6), r'k_shot \+ n_query = 15 \+ 6 = 21 images a class, but class .* has only 20'),
    'no queries': (dict(method='pn', n_query=0), 'n_query must be .* got 0'), 'no shots': (dict(method='pn', k_shot=0), 'k_shot must be .* got 0'),
    'bits below the scheme': (dict(method='pn-qat', bits='W1A1'), 'lsq goes down to W2A2; .* asked for W1A1'),
    'guaranteed below the scheme': (dict(method='mebqat-pn', guaranteed='W1A2'), 'asked for W1A2'),
    'a dedicated network as its own teacher': (dict(method='pn-qat', bits='W2A2', distill=True), 'distill= is not an option of pn-qat; it is for mebqat-pn'),
    'more guaranteed than tasks': (dict(method='mebqat-maml', guaranteed='W2A2 W3A3 W4A4'), 'n_tasks=2 is fewer than 1 or than the 3 guaranteed'),
    'no bits': (dict(method='pn-qat', bits=''), 'needs bits='), 'two pairs': (dict(method='pn-qat', bits='W2A2 W3A3'), 'trains at one pair'),
    'unreadable bits': (dict(method='mebqat-pn', bits='W2'), "cannot read bits from 'W2'"), 'bits for float': (dict(method='pn', bits='W2A2'), 'bits= is not an option of pn'),
    'an inner rate of nothing': (dict(method='fomaml', inner_lr=0.), 'inner_lr must be positive, got 0'), 'an endless inner rate': (dict(method='fomaml', inner_lr=math.inf), 'inner_lr must be positive, got inf'),
    'backward inner steps': (dict(method='fomaml', inner_steps=-1), 'fomaml learns through 1 inner step or more; got inner_steps=-1'), 'no inner steps': (dict(method='mebqat-maml', inner_steps=0), 'got inner_steps=0'),
    'rates for no steps': (dict(method='fomaml', inner_steps=0, learn_rates=True), '1 inner step or more; got inner_steps=0'),
    'adapting scales': (dict(method='fomaml', adapts='scales'), "got 'scales'"), 'adapting what is not there': (dict(method='fomaml', scheme='dorefa', adapts='steps'), 'no steps to adapt'),
    'a rate of nothing': (dict(method='pn', lr=0.), 'lr must be positive, got 0'), 'too small': (dict(method='pn', size=8), 'image_size 8 is too small'), 'no width': (dict(method='pn', width=0), 'width must be .* got 0'),
    'no steps': (dict(method='pn', steps=0), 'steps must be 1 or more, got 0'), 'a strong jitter': (dict(method='pn', jitter=9.), 'jitter must be 0 to 3, got 9'),
    'a scheme of tomorrow': (dict(method='pn', scheme='ternary'), "no scheme called 'ternary'"), 'an option of tomorrow': (dict(method='pn', options=(('bias', True),)), "no option 'bias'"),
    'no such data': (dict(method='pn', data='nowhere'), 'nowhere'), 'no such optimizer': (dict(method='pn', optimizer='lion'), "got 'lion'"),
}


@pytest.mark.parametrize('case', BAD)
def test_runs_that_cannot_work_write_nothing(case, tmp_path):
    options, text = BAD[case]
    with pytest.raises((ValueError, FileNotFoundError), match=text) as e: train_run(small(**options), tmp_path/'out')
    assert '\n' not in str(e.value) and not names(tmp_path)


def test_a_pool_of_one_class(tmp_path, monkeypatch):
    monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'cache'))
    (tmp_path/'data'/'only').mkdir(parents=True)
    for i in range(6): Image.new('L', (16, 16), 40*i).save(tmp_path/'data'/'only'/f'{i}.png')
    with pytest.raises(ValueError, match='class') as e: train_run(small('mebqat-pn', data=str(tmp_path/'data')), tmp_path/'out')
    assert '\n' not in str(e.value) and not (tmp_path/'out').exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU')
@pytest.mark.parametrize('device', ('cuda', 'abacus'))
def test_a_device_that_is_not_there(device, tmp_path):
    with pytest.raises(ValueError, match=f"^device '{device}' cannot be used here: ") as e: train_run(small('pn'), tmp_path/'out', device=device)
    assert '\n' not in str(e.value) and not names(tmp_path)


def test_a_diverging_run_leaves_no_weights(tmp_path):
    with pytest.raises(FloatingPointError, match=r'at inner step \d of 2 with inner_lr=1e\+38; lower inner_lr|loss is nan at step 0 of 3') as e:
        train_run(small('fomaml-qat', inner_lr=1e38), tmp_path)
    assert '\n' not in str(e.value) and names(tmp_path) == ['run.json']


def test_measuring_what_does_not_fit(trained):
    run = open_run(trained/'maml')
    with pytest.raises(ValueError, match='classifies 3 ways, not 4'): run.episodes(n_way=4)
    with pytest.raises(ValueError, match='k_shot must be a whole number, 1 or more; got 0'): run.episodes(k_shot=0)
    with pytest.raises(ValueError, match=r'k_shot \+ n_query = 10 \+ 15 = 25'): run.episodes(k_shot=10)
    for args, text in ((dict(space=BitSpace([Bits(1, 2)])), 'asked for W1A2'), (dict(n=0), '1 episode or more, not 0'), (dict(steps=-1), 'got -1'),
                       (dict(episodes=Episodes(pool('test'), 4, 1, 2)), 'classifies 3 ways, the episodes have 4'),
                       (dict(episodes=Episodes(load('glyphs', 'test', by='classes', size=32, n_classes=40), 3, 1, 2)), 'images of 1x32x32 do not fit the network')):
        with pytest.raises(ValueError, match=text) as e: run.sweep(**dict(space=SPACE, episodes=run.episodes(), n=1) | args)
        assert '\n' not in str(e.value)


def test_answers_do_not_depend_on_the_other_pairs():
    model, e = network().eval(), Episodes(pool('test'), 3, 1, 4)[0]
    together = proto_correct(model, e, SPACE)
    for b in SPACE: assert torch.equal(together[b], proto_correct(model, e, [b])[b])


def test_other_methods_refuse_unlike_classes(tmp_path):
    "By the name of the data, before any is read; and by what a folder holds."
    with pytest.raises(ValueError, match='omniglot is split over classes, and qat needs the same'): spec_of('qat', bits='W2A2', data='omniglot.zip')
    for split, classes in (('train', 'ab'), ('val', 'cd'), ('test', 'ef')):
        for c in classes:
            (tmp_path/'data'/split/c).mkdir(parents=True)
            for i in range(3): Image.new('L', (16, 16), 40*i).save(tmp_path/'data'/split/c/f'{i}.png')
    with pytest.raises(ValueError, match='training and validation images of data show different classes, and float'): train_run(spec_of('float', data=str(tmp_path/'data'), batch_size=2), tmp_path/'run')
    assert not (tmp_path/'run').exists()
