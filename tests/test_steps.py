"Steps that learn, wherever training begins and whoever's optimizer moves them; ranges, signs and calibration."
import copy, warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from mebqat.bits import FULL, Bits, BitSpace
from mebqat.kernels import grid
from mebqat.layers import bit_layers, calibrate, clipped, describe, from_version_1, quantize, use_bits
from mebqat.methods import mebqat, qat
from mebqat.quantizers import LSQ, SAT, DoReFa, LSQAct, LSQWeight, PACTQuantizer
from mebqat.steps import fitted_step
from mebqat.train import TrainConfig, make_optimizer

settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

WIDTHS = range(2, 17)
seeds = st.integers(0, 2**32)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, **options): return torch.randn(*shape, generator=gen(seed), **options)


def images(n=256):
    "Noisy images whose class is where they are bright."
    y = torch.randint(4, (n,), generator=gen())
    x = .5*randn(n, 2, 8, 8)
    for i,k in enumerate(y): x[i, :, 4*(k//2):4*(k//2) + 4, 4*(k % 2):4*(k % 2) + 4] += 1
    return x, y


X, Y = images()


def network(trained=False):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 8, 5, padding=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, stride=2),
                        nn.BatchNorm2d(12), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40*trained):
        optimizer.zero_grad()
        F.cross_entropy(net(X), Y).backward()
        optimizer.step()
    return net


def train(net, method, optimizer, steps=60):
    g = gen(1)
    for _ in range(steps):
        optimizer.zero_grad()
        i = torch.randint(len(X), (64,), generator=g)
        method(net, (X[i], Y[i]), g)
        optimizer.step()


# How far a grid is from the best one, by trying steps

def errors(x, steps, bits, signed=True):
    "Norm of what each of some steps leaves of `x`, in float64."
    x, steps, (low, high) = x.detach().double().flatten(), steps.detach().double().reshape(-1, 1), grid(bits, signed)
    return ((x/steps).round().clamp(low, high)*steps - x).norm(dim=1)


def least(x, bits, signed=True):
    "The error of the best of many steps."
    top = x.abs().max()/(2**(bits - 1) if signed else 2**bits - 1)
    return errors(x, top*torch.cat([torch.linspace(.02, 1.2, 240), torch.logspace(-5, -1.7, 40)]), bits, signed).min()


def off_best(layer, bits):
    "Error of a layer's weights over that of the best grid, or of the best grid for each channel."
    w = layer.weight.detach()
    rows = w if layer.weight_quantizer.per_channel else [w]
    best = torch.stack([least(r, bits) for r in rows]).norm()
    return float((layer.weight_quantizer(layer.weight, bits).detach().double() - w).norm()/best)


OPTIMIZERS = {'sgd': lambda m: make_optimizer(m, TrainConfig(1, .05, 'sgd', weight_decay=5e-4)), 'adam': lambda m: make_optimizer(m, TrainConfig(1, 5e-3, 'adam')),
              'adamw': lambda m: make_optimizer(m, TrainConfig(1, 5e-3, 'adamw', weight_decay=.1)),
              'plain sgd': lambda m: torch.optim.SGD(m.parameters(), .05, momentum=.9, weight_decay=5e-3),
              'plain adamw': lambda m: torch.optim.AdamW(m.parameters(), 5e-3, weight_decay=.1),
              'rmsprop': lambda m: torch.optim.RMSprop(m.parameters(), 1e-3, weight_decay=1e-2)}


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('trained', [False, True])
@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_every_width_sits_on_a_good_grid_after_training(optimizer, trained, per_channel):
    net = quantize(network(trained), LSQ(per_channel=per_channel), example=X, skip='none', bn='batch')
    train(net, mebqat(BitSpace([Bits(b, b) for b in WIDTHS])), OPTIMIZERS[optimizer](net), 40)
    for name,layer in bit_layers(net).items():
        learned = layer.weight_quantizer.step.log_factor.detach()
        assert learned[1:5].any(1).all() and not learned[5:].any(), name
        assert layer.act_quantizer.step.log_factor[1:].any()
        off = {b: off_best(layer, b) for b in WIDTHS}
        assert all(off[b] <= (2 if b < 6 else 1.5) for b in WIDTHS), (name, off)


@pytest.mark.parametrize('per_channel', [False, True])
def test_idle_widths_follow_the_weights(per_channel):
    net = quantize(network(), LSQ(per_channel=per_channel), example=X, skip='none', bn='batch')
    train(net, qat(Bits(2, 2)), torch.optim.SGD(net.parameters(), .2, momentum=.9))
    with torch.no_grad(): net[3].weight.mul_(torch.logspace(-2, 2, 12).view(12, 1, 1, 1))
    for layer in bit_layers(net).values():
        assert not layer.weight_quantizer.step.log_factor[2:].any()
        assert all(off_best(layer, b) <= 1.5 for b in (4, 8, 16))


def test_one_shared_step_and_the_published_rule_keep_what_they_say():
    for scheme in (LSQ(rule='published'), LSQ(rule='published', per_channel=True, init='paper'), LSQ(shared_step=True)):
        net = quantize(network(), scheme, example=X, skip='none', bn='batch')
        before = {n: (p, p.clone()) for n,p in net.named_parameters() if '.step.' in n}
        train(net, mebqat(BitSpace([Bits(2, 2), Bits(4, 4)])), make_optimizer(net, TrainConfig(1, .05)), 20)
        assert len(before) == 6 and {n.split('.')[-1] for n in before} == {'value' if scheme.rule == 'published' else 'log_factor'}
        for now, was in before.values():
            changed = (now != was).any(1)
            assert changed.all() if scheme.shared_step else changed.tolist() == [False, True, False, True, *[False]*12]


# Steps of inputs, which grow too

def growing(seed=0):
    "No batch norm and small weights: what reaches the last layer grows many times over."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 12, 3, padding=1, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(192, 4))
    with torch.no_grad():
        for m in net[:3:2]: m.weight.mul_(.2)
    return net


def reached(net, bits, x=X):
    "What reaches each layer at a pair, in evaluation mode."
    seen, hooks = {}, []
    for name,layer in bit_layers(net).items(): hooks.append(layer.register_forward_pre_hook(lambda m, a, name=name: seen.update({name: a[0].detach()})))
    with torch.no_grad(), use_bits(net, bits): net.eval()(x)
    for h in hooks: h.remove()
    net.train()
    return seen


@pytest.mark.parametrize('optimizer', ['sgd', 'adamw', 'plain adamw', 'fused', 'by hand'])
def test_steps_of_inputs_follow_what_grows(optimizer):
    class ByHand:
        def __init__(self, params): self.params = list(params)
        def zero_grad(self): [setattr(p, 'grad', None) for p in self.params]
        @torch.no_grad()
        def step(self): [p.sub_(.1*p.grad) for p in self.params if p.grad is not None]

    net = quantize(growing(), LSQ(), example=X, skip='none')
    before = {n: float(x.square().mean().sqrt()) for n,x in reached(net, Bits(16, 16)).items()}
    makers = OPTIMIZERS | {'fused': lambda m: torch.optim.AdamW(m.parameters(), 5e-3, fused=True), 'by hand': lambda m: ByHand(m.parameters())}
    train(net, mebqat(BitSpace([Bits(b, b) for b in (2, 3, 4, 6, 8)])), makers[optimizer](net), 80)
    grown = max(float(x.square().mean().sqrt())/before[n] for n,x in reached(net, Bits(16, 16)).items())
    assert grown > 3
    for bits in (3, 4, 8):
        for name,x in reached(net, Bits(bits, bits)).items():
            q = bit_layers(net)[name].act_quantizer
            off = errors(x, q.step_of(bits), bits, q.signed)/least(x, bits, q.signed)
            assert off < 2.5, (name, bits, float(off))
            assert not q.step.log_factor[5:].any()


def sizes(net): return {k: v.clone() for k,v in net.state_dict().items() if '.size.' in k}


def test_only_passes_in_training_mode_are_noted():
    net = quantize(network(), LSQ(), example=X, skip='none', bn='batch')
    before = sizes(net)
    with use_bits(net, Bits(4, 4)):
        net.eval()(9*X).sum().backward()
        torch.func.vmap(net.eval())(9*X[None])
    assert before and all(v.equal(before[k]) for k,v in sizes(net).items())
    with use_bits(net, Bits(4, 4)): net.train()(9*X)
    assert not sizes(net)['0.act_quantizer.size.late'].equal(before['0.act_quantizer.size.late'])


def test_every_pass_of_one_training_step_has_the_same_steps():
    net = quantize(growing(), LSQ(), example=X, skip='none').train()
    optimizer, last = torch.optim.SGD(net.parameters(), .01), bit_layers(net)['5'].act_quantizer
    used = []
    for _ in range(4):
        for k in (1, 4):
            with use_bits(net, Bits(8, 8)): F.cross_entropy(net(k*X), Y).backward()
            used.append(last.step_of(8).item())
        optimizer.step()
    assert used[::2] == used[1::2] and len(set(used)) > 2


@pytest.mark.parametrize('kind', ['zeros', 'nan', 'infinite'])
def test_batches_that_say_nothing_are_not_noted(kind):
    q = LSQAct(X, True).train()
    bad = {'zeros': torch.zeros_like(X), 'nan': X.clone().fill_(torch.nan), 'infinite': X/0}[kind]
    before = {k: v.clone() for k,v in q.size.state_dict().items()}
    q(bad, 4)
    q.size.use()
    assert all(v.equal(before[k]) for k,v in q.size.state_dict().items())


def test_a_layer_that_gets_nothing_passes_nothing_on():
    net = quantize(nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3)), LSQ(), example=randn(64, 8), skip='none').train()
    before = sizes(net)
    with use_bits(net, Bits(4, 4)): y = net(torch.zeros(0, 8))
    y.sum().backward()
    assert y.shape == (0, 3) and all(v.equal(before[k]) for k,v in sizes(net).items())
    assert not any(p.grad.any() for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float16, torch.bfloat16])
def test_sizes_are_measured_in_every_type(dtype):
    q = LSQAct(X, True)
    for _ in range(200): q.size.note(1000*X.to(dtype), moved=True)
    assert_close(q.size.growth, torch.full((3,), 1000.), rtol=.02, atol=0)


def test_large_batches_are_looked_at_in_part_and_small_ones_whole():
    q, x = LSQAct(X, True), randn(64, 64, 32, 32)
    assert_close(q.size.measure(x)[:2], torch.tensor([3**.25, 15**(1/6)]), rtol=.02, atol=0)  # of a normal distribution
    x[0] = 99
    assert q.size.measure(x)[2] == 99 and q.size.measure(X[:3])[2] == X[:3].abs().max()


def test_states_without_sizes_keep_their_steps_and_follow_from_then_on():
    net = quantize(growing(), LSQ(), example=X, skip='none')
    old = {k: v for k,v in net.state_dict().items() if '.size.' not in k}
    other = quantize(growing(), LSQ(), example=9*X, skip='none')
    other.load_state_dict(old)
    q, wanted = bit_layers(other)['5'].act_quantizer, bit_layers(net)['5'].act_quantizer.step_of(8)
    assert_close(q.step_of(8), wanted, rtol=0, atol=0)
    h = randn(64, 192).relu()
    for k in torch.linspace(1, 3, 200): q.size.note(k*h, moved=True)
    assert_close(q.step_of(8), 3*wanted, rtol=.05, atol=0)


def test_inputs_that_were_all_zeros_at_first_are_followed_from_unit_size():
    q = LSQAct(torch.zeros(8, 4), False).train()
    for _ in range(200): q.size.note(100*randn(256, 4).abs(), moved=True)
    assert_close(q.step_of(4), 100*LSQAct(randn(8192).abs(), False).step_of(4), rtol=.2, atol=0)


def test_the_shared_and_the_published_step_do_not_follow():
    for scheme in (LSQ(rule='published'), LSQ(shared_step=True)):
        q = scheme.act(X, True).train()
        before = q.step_of(4).clone()
        for _ in range(5): q(9*X, 4)
        assert q.step_of(4).equal(before) and not any('size' in k for k in q.state_dict())


def test_a_compiled_network_notes_as_a_plain_one_does_at_the_first_pass():
    plain = quantize(growing(), LSQ(), example=X, skip='none').train()
    other = copy.deepcopy(plain)
    with use_bits(plain, Bits(4, 4)): wanted = plain(3*X)
    with use_bits(other, Bits(4, 4)): assert_close(torch.compile(other)(3*X), wanted, rtol=1e-4, atol=1e-5)
    for k,v in sizes(plain).items(): assert_close(sizes(other)[k], v, msg=lambda m: f'{k}: {m}')


# The published rule, from the paper's equation 3 and section 2.2

def closed_form(x, step, bits, signed, dy, over):
    low, high = grid(bits, signed)
    v = x/step
    term = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v))*dy
    n = x.numel()//step.numel()
    return term.sum(over, keepdim=True)/(n*high)**.5


@given(seeds, st.integers(2, 16), st.booleans(), st.sampled_from(['mse', 'paper']))
def test_the_published_rule_is_lsqs_formula(seed, bits, per_channel, init):
    w, dy = (randn(4, 3, 2, 5, seed=seed + i, dtype=torch.float64) for i in range(2))
    q = LSQWeight(w, per_channel, init=init, rule='published').double()
    over = (1, 2, 3) if per_channel else (0, 1, 2, 3)
    with torch.no_grad(): q.step.value[bits - 1] *= .6
    step = q.step.value[bits - 1].detach().reshape(-1, 1, 1, 1).clone()
    q(w, bits).backward(dy)
    assert_close(q.step.value.grad[bits - 1].reshape(step.shape), closed_form(w, step, bits, True, dy, over), rtol=1e-6, atol=1e-9)
    assert not q.step.value.grad[torch.arange(16) != bits - 1].any()
    if init == 'paper':
        fresh = LSQWeight(w, per_channel, init=init, rule='published')
        wanted = 2*w.abs().mean(over).flatten()/(2**(bits - 1) - 1)**.5
        assert_close(fresh.step(bits).detach().double(), wanted, rtol=1e-5, atol=0)


@given(seeds, st.integers(2, 16), st.booleans())
def test_the_published_rule_for_inputs(seed, bits, signed):
    x, dy = (randn(6, 7, seed=seed + i, dtype=torch.float64) for i in range(2))
    if not signed: x = x.abs()
    q = LSQAct(x, signed, rule='published').double()
    with torch.no_grad(): q.step.value[bits - 1] *= .6
    step = q.step.value[bits - 1].detach().clone()
    q(x, bits).backward(dy)
    assert_close(q.step.value.grad[bits - 1, 0], closed_form(x, step, bits, signed, dy, (0, 1)).squeeze(), rtol=1e-6, atol=1e-9)


def test_a_published_step_may_cross_zero_and_stays_a_step():
    q = LSQWeight(randn(8, 8), rule='published')
    with torch.no_grad(): q.step.value.neg_()
    assert (q.step_of(randn(8, 8), 4) > 0).all() and len(q(randn(8, 8), 4).unique()) <= 16


@given(seeds, st.integers(2, 5))
def test_a_relative_step_moves_by_the_pace_of_its_tensor(seed, bits):
    w, dy = (randn(5, 40, seed=seed + i) for i in range(2))
    q = LSQWeight(w)
    q(w, bits).backward(dy)
    step, (low, high) = q.step_of(w, bits).detach(), grid(bits)
    v = w/step
    terms = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v))*step   # slope of the weights by log step
    wanted = (dy*terms).sum()/(terms.norm()*w.norm())
    assert_close(q.step.log_factor.grad[bits - 1, 0], wanted, rtol=1e-3, atol=1e-5)


# The best grid of a tensor

KINDS = {'normal': lambda n, g: torch.randn(n, generator=g), 'uniform': lambda n, g: torch.rand(n, generator=g)*2 - 1,
         'laplace': lambda n, g: torch.empty(n).exponential_(generator=g)*torch.randn(n, generator=g).sign(),
         'sparse': lambda n, g: torch.randn(n, generator=g)*(torch.rand(n, generator=g) < .1),
         'two': lambda n, g: torch.randn(n, generator=g)*torch.where(torch.rand(n, generator=g) < .5, .1, 1.)}


@given(st.sampled_from(list(KINDS)), seeds, st.integers(2, 16), st.booleans(), st.sampled_from([torch.float32, torch.float64]), st.integers(-12, 12))
@settings(max_examples=60)
def test_a_fitted_step_is_nearly_the_best_of_many(kind, seed, bits, signed, dtype, exponent):
    x = KINDS[kind](4096, gen(seed)).to(dtype)*10.**exponent
    if not signed: x = x.abs()
    step = fitted_step(x, bits, signed)
    assert step.dtype == dtype and step.shape == (1,) and not step.requires_grad
    assert errors(x, step, bits, signed) <= 1.12*least(x, bits, signed)


@given(seeds, st.integers(4, 16), st.booleans(), st.floats(10, 50))
def test_outliers_cost_at_most_a_little_more_than_they_must(seed, bits, signed, size):
    x = torch.cat([randn(4096, seed=seed), size*torch.ones(4)])
    if not signed: x = x.abs()
    assert errors(x, fitted_step(x, bits, signed), bits, signed) <= 1.6*least(x, bits, signed)


@given(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=4), seeds, st.integers(2, 16))
def test_channels_are_fitted_each_by_itself(kinds, seed, bits):
    x = torch.stack([KINDS[k](512, gen(seed + i))*10.**(i - 1) for i,k in enumerate(kinds)]).view(len(kinds), 8, 64)
    steps = fitted_step(x, bits, per_channel=True)
    assert steps.shape == (len(kinds), 1, 1)
    for row, step in zip(x, steps): assert_close(step.flatten(), fitted_step(row, bits).flatten())


@pytest.mark.parametrize('bits', [2, 3, 8, 16])
def test_few_values_and_none_are_fitted_too(bits):
    for signed in (True, False):
        for x in (torch.tensor([.37]), torch.full((9,), 3.), torch.tensor([0., 0., 5.]), torch.tensor(2.)):
            assert errors(x, fitted_step(x, bits, signed), bits, signed) <= .67*2.**-bits/.5*x.norm()
    assert not fitted_step(torch.zeros(3, 4), bits).any()
    mixed = torch.stack([torch.zeros(50), randn(50)])
    assert fitted_step(mixed, bits, per_channel=True).flatten().gt(0).tolist() == [False, True]


def test_the_largest_of_many_values_is_within_reach():
    x = randn(300_000)
    x[12_345] = -20.
    for q in (LSQWeight(x.view(1, -1), per_channel=True), LSQWeight(x.view(300, -1))):
        assert (q(x.view(1, -1) if q.per_channel else x.view(300, -1), 16).flatten()[12_345] + 20).abs() < .03
    act = quantize(nn.Sequential(nn.Linear(3, 2)), LSQ(), example=x.view(-1, 3), skip='none')[0].act_quantizer
    assert (act(x, 16)[12_345] + 20).abs() < .03


# What begins as zeros

LEARNERS = [LSQ(), LSQ(per_channel=True), LSQ(shared_step=True), LSQ(rule='published'), LSQ(rule='published', init='paper', per_channel=True), DoReFa(),
            DoReFa(per_channel=True), DoReFa(scale=None), DoReFa(act_clip='pact'), SAT(), SAT(per_channel=True), SAT(rescale=False), SAT(rounding='original', alpha=3.)]


def learns(net, bits, x, y, steps=150):
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        with use_bits(net, bits): loss = F.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def head(zeros=()):
    "A network whose last layer, or some channels of it, are zeros."
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad(): net[4].weight[zeros] = 0
    return net


POINTS = randn(256, 4)
CLASSES = (POINTS[:, 0] > 0).long() + (POINTS[:, 1] > .5)
ALL, SECOND = slice(None), [1]


@pytest.mark.parametrize('scheme', LEARNERS, ids=repr)
def test_zeros_learn_under_every_scheme(scheme):
    usual = learns(quantize(head([]), scheme, example=POINTS, skip='none'), Bits(4, 4), POINTS, CLASSES)
    for zeros in (ALL, SECOND):
        net = quantize(head(zeros), scheme, example=POINTS, skip='none')
        assert learns(net, Bits(4, 4), POINTS, CLASSES) < usual + .1
        assert net[4].weight_quantizer(net[4].weight, 4).flatten(1).any(1).all()
    net = quantize(head([]), scheme, example=POINTS, skip='none')
    nn.init.zeros_(net[4].weight)  # a head that is begun again later on
    assert learns(net, Bits(4, 4), POINTS, CLASSES) < usual + .1


@pytest.mark.parametrize('scheme', [DoReFa(), DoReFa(scale=None, per_channel=True), DoReFa(act_clip='pact')], ids=repr)
def test_zeros_learn_at_one_bit(scheme):
    x = POINTS.abs()
    losses = [learns(quantize(head(zeros), scheme, example=x, skip='none'), Bits(1, 2), x, CLASSES) for zeros in ([], ALL, SECOND)]
    assert max(losses[1:]) < losses[0] + .1, losses


class Branch(nn.Module):
    "A residual branch, closed at the start by a batch norm of zeros."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.fc = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 4), nn.Linear(4, 3)
        nn.init.zeros_(self.norm.weight)
    def forward(self, x): return self.fc(x + self.b(F.silu(self.norm(self.a(x)))))


@pytest.mark.filterwarnings('ignore:negative values')
@pytest.mark.parametrize('scheme', [LSQ(), LSQ(rule='published'), DoReFa(), DoReFa(act_clip='pact'), SAT()], ids=repr)
def test_a_branch_that_starts_closed_opens(scheme):
    with pytest.warns(UserWarning, match='b nothing but zeros'): net = quantize(Branch(), scheme, example=POINTS, skip='none')
    loss = learns(net, Bits(4, 4), POINTS, CLASSES)
    with pytest.warns(UserWarning, match='b nothing'): closed = quantize(Branch(), scheme, example=POINTS, skip='none')
    closed.norm.requires_grad_(False)
    assert net.norm.weight.any() and loss < learns(closed, Bits(4, 4), POINTS, CLASSES) - .1


# Calibration

def mlp(seed=0, scale=1.):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))
    for p in net.parameters(): p.data.mul_(scale)
    return net


SCHEMES = [LSQ(), LSQ(shared_step=True), LSQ(rule='published'), LSQ(per_channel=True, init='paper'), DoReFa(), DoReFa(act_clip='pact'), SAT(), SAT(shared_alpha=True)]


@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_calibrating_is_quantizing_again(scheme):
    x = randn(32, 6)
    net = quantize(mlp(), scheme, example=x.abs(), skip='none')
    other = mlp(1, 3.)
    net.load_state_dict(other.state_dict(), strict=False)
    optimizer = torch.optim.SGD(net.parameters(), .1)
    kept = [p for g in optimizer.param_groups for p in g['params']]
    calibrate(net, x)
    assert all(a is b for a,b in zip(kept, net.parameters(), strict=True))
    fresh = quantize(other, scheme, example=x, skip='none')
    assert [m.signed for m in bit_layers(net).values()] == [m.signed for m in bit_layers(fresh).values()] == [True, False, True]
    assert not net.training or fresh.training
    for bits in (Bits(2, 2), Bits(5, 3), Bits(8, 8), Bits(16, 16)):
        with use_bits(net, bits), use_bits(fresh, bits): assert torch.equal(net(x), fresh(x))


def test_calibrating_inside_a_block_measures_full_precision():
    x = randn(32, 6)
    a, b = (quantize(mlp(), LSQ(), example=x, skip='none') for _ in range(2))
    with use_bits(a, Bits(2, 2)):
        calibrate(a, 5*x)
        assert {m.bits for m in bit_layers(a).values()} == {Bits(2, 2)}
    calibrate(b, 5*x)
    with use_bits(a, Bits(3, 3)), use_bits(b, Bits(3, 3)): assert torch.equal(a(x), b(x))


def test_calibration_warns_of_layers_it_does_not_reach_and_leaves_them():
    class Routed(nn.Module):
        def __init__(self): super().__init__(); self.low, self.high, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        def forward(self, x):
            low = x[:, 0] < 0
            h = torch.zeros_like(x)
            h[low], h[~low] = self.low(x[low]), self.high(x[~low])
            return self.out(h.relu())
    torch.manual_seed(0)
    x, net = randn(64, 4), Routed()
    with pytest.warns(UserWarning, match='does not reach high: 1 with weights'): other = quantize(copy.deepcopy(net), LSQ(), example=-x.abs(), skip='none')
    assert other.quantization.left_float == {'high': 'not reached by the example'} and list(bit_layers(other)) == ['low', 'out']
    quantize(net, LSQ(), example=x, skip='none')
    before = {k: v.clone() for k,v in net.state_dict().items() if k.startswith('high')}
    with pytest.warns(UserWarning, match='does not reach high'): calibrate(net, -9*x.abs())
    assert all(torch.equal(net.state_dict()[k], v) for k,v in before.items())


def test_blind_layers_are_named_and_begin_at_unit_size():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    nn.init.constant_(net[0].bias, -100.)
    x = randn(16, 4)
    with pytest.warns(UserWarning, match='shows 2 nothing but zeros.*calibrate'): quantize(net, LSQ(), example=x, skip='none')
    nn.init.zeros_(net[0].bias)
    y = net(x)
    with use_bits(net, Bits(8, 8)): assert (net(x) - y).norm() < .1*y.norm()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        calibrate(net, x)


# Signs

@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_signs_travel_with_the_state(tmp_path, scheme):
    x = randn(32, 6)
    net = quantize(mlp(), scheme, example=x, skip='none').eval()
    state = net.state_dict()
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    save_file({k: v.clone() for k,v in state.items()}, tmp_path/'net.safetensors')
    for loaded in (state, load_file(tmp_path/'net.safetensors')):
        other = quantize(mlp(3), scheme, example=.1*x.abs(), skip='none').eval()
        assert [m.signed for m in bit_layers(other).values()] == [False, False, True]
        assert other.load_state_dict(loaded).missing_keys == []
        assert [m.signed for m in bit_layers(other).values()] == [True, False, True]
        for bits in (Bits(2, 2), Bits(8, 8)):
            with use_bits(net, bits), use_bits(other, bits): assert torch.equal(net(x), other(x))


@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_states_from_before_signs_and_sizes_were_kept_load(scheme):
    x = randn(32, 6)
    net = quantize(mlp(), scheme, example=x, skip='none').eval()
    old = {k: v for k,v in net.state_dict().items() if not k.endswith(('.extra', '_extra_state'))}
    other = quantize(mlp(3), scheme, example=x, skip='none').eval()
    missing = other.load_state_dict(old, strict=False).missing_keys
    assert all(k.endswith('_extra_state') for k in missing)
    with use_bits(net, Bits(3, 3)), use_bits(other, Bits(3, 3)): assert torch.equal(net(x), other(x))


def test_states_of_format_1_keep_the_steps_they_had():
    x, scale = randn(32, 6), torch.linspace(.7, 1.4, 16)
    net, other = (quantize(mlp(k), LSQ(), example=(k + 1)*x, skip='none') for k in (0, 3))
    old = {k: v for k,v in net.state_dict().items() if '_quantizer' not in k}
    for name,layer in bit_layers(net).items():
        rows = [torch.cat([q(b).reshape(1)*s for b,s in zip(range(1, 17), scale)]).log() for q in (lambda b: layer.weight_quantizer.step_of(layer.weight, b), layer.act_quantizer.step_of)]
        for part,row in zip(('weight', 'act'), rows): old[f'{name}.{part}_quantizer.step.log_value'] = row.detach()[:, None]
    other.load_state_dict(from_version_1(other, old))
    for (name,a),b in zip(bit_layers(net).items(), bit_layers(other).values()):
        for bits in range(2, 17):
            assert_close(b.act_quantizer.step_of(bits), a.act_quantizer.step_of(bits)*scale[bits - 1])
            assert_close(b.weight_quantizer.step_of(b.weight, bits), a.weight_quantizer.step_of(a.weight, bits)*(scale[bits - 1] if bits < 6 else 1))
        assert not b.act_quantizer.size.started.any() and (b.act_quantizer.size.growth == 1).all()


@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_negatives_at_a_grid_without_any_are_said_once(scheme):
    x = randn(32, 6)
    net = quantize(mlp(), scheme, example=x.abs(), skip='none').eval()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        net(x)  # at full precision nothing is cut off
        with use_bits(net, Bits(4, 4)): net(x.abs())
        with use_bits(net, Bits(4, FULL)): net(x)
    with use_bits(net, Bits(4, 4)):
        with pytest.warns(UserWarning, match="layer '0'.*calibrate") as told: net(x)
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            for _ in range(40): net(x)
    assert len(told) == 1
    calibrate(net, x)
    assert net[0].signed


# The example is looked at, never changed, and what is recorded is a copy

class InPlace(nn.Module):
    "Writes into its input and into what its layers got and gave."
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        h = self.a(x)
        y = self.b(h) + F.dropout(h, .5, self.training)
        h.fill_(100.)
        z = self.c(y)
        y.neg_().relu_()
        return z


def test_calibration_records_copies():
    torch.manual_seed(0)
    x, net = randn(64, 6), InPlace()
    h = net.a(x).detach()
    y = (net.b(h) + h).detach()
    quantize(net, LSQ(), example=x, skip='none')
    for layer, real in ((net.a, x), (net.b, h), (net.c, y)):
        assert layer.signed
        assert_close(layer.act_quantizer.step(4).detach(), fitted_step(real, 4, rounds=8).flatten(), rtol=.2, atol=0)


def test_what_follows_an_example_given_by_reference_changes_nothing():
    x, buffer = randn(64, 6), torch.empty(64, 6)
    buffer.copy_(x)
    net = quantize(mlp(), LSQ(), example=buffer, skip='none')
    same = quantize(mlp(), LSQ(), example=x, skip='none')
    assert torch.equal(buffer, x)
    buffer.zero_()
    assert all(torch.equal(v, same.state_dict()[k]) for k,v in net.state_dict().items())


@pytest.mark.parametrize('bn', ['running', 'switchable'])
@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_a_network_quantized_in_inference_mode_learns_later(scheme, bn):
    net, space = network(), BitSpace([Bits(2, 2), Bits(4, 4)])
    with torch.inference_mode():
        quantize(net, scheme, example=X[:32], skip='none', bn=bn, space=space if bn == 'switchable' else None)
        calibrate(net, X[:32])
        with use_bits(net, Bits(2, 2)): net(X[:32])
    assert mebqat(space)(net.train(), (X[:32], Y[:32]), gen()).loss > 0
    assert not any(t.is_inference() for t in net.state_dict().values())


# Reports

@given(seeds, st.integers(2, 8), st.booleans())
def test_the_clipped_share_counts_weights_beyond_the_ends(seed, bits, per_channel):
    torch.manual_seed(seed % 2**31)
    net = quantize(nn.Sequential(nn.Linear(30, 10)), LSQ(per_channel=per_channel, rule='published'), example=randn(8, 30), skip='none')
    with torch.no_grad(): net[0].weight.mul_(3)
    w, step = net[0].weight.detach(), net[0].weight_quantizer.step.value[bits - 1].detach().view(-1, 1)
    low, high = grid(bits)
    beyond = ((w/step).round() > high) | ((w/step).round() < low)
    assert clipped(net[0], bits) == pytest.approx(beyond.float().mean().item(), abs=.004) and clipped(net[0], FULL) == 0


def test_describe_shows_clipped_shares_at_the_widths_asked_for():
    net = quantize(mlp(), LSQ(), example=randn(8, 6), skip='none')
    table = describe(net, widths=(3, 16))
    assert list(table.columns[-2:]) == ['clipped W3', 'clipped W16'] and list(table.index) == ['0', '2', '4']
    assert (table['clipped W3'] < .2).all() and (table['clipped W16'] == 0).all()
    assert (describe(quantize(mlp(), SAT(), example=randn(8, 6)))['clipped W2'] == 0).all()


def test_pact_levels_start_where_the_steps_do():
    for signed in (False, True):
        x = randn(4096) if signed else randn(4096).relu()
        q = PACTQuantizer(x, signed)
        for b in (2, 4, 8): assert errors(x, q.alpha(b)/(2**(b - 1) if signed else 2**b - 1), b, signed) <= 1.12*least(x, b, signed)
