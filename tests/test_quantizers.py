"Kernels and quantizers against second derivations: levels, gradients, layouts, and the compiled path."
import shutil, subprocess, sys

from dataclasses import asdict

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from mebqat.bits import FULL
from mebqat.kernels import (dorefa_act, dorefa_weight, fake_quant, fake_quant_plain, grid, lsq, pact, sat_rescale, sat_weight,
                            straight_through)
from mebqat.quantizers import LSQ, SAT, DoReFa, LSQAct, PACTQuantizer, make_scheme
from mebqat.steps import RANGE_FROM, WidthTable

settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

SCHEMES = [LSQ(), LSQ(per_channel=True), LSQ(shared_step=True), LSQ(init='paper'), DoReFa(), DoReFa(scale=None), DoReFa(per_channel=True),
           DoReFa(act_clip='pact'), SAT(), SAT(rounding='original'), SAT(rounding='centered'), SAT(shared_alpha=True, alpha=8.),
           SAT(per_channel=True, rescale=False)]
every_scheme = pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
dtypes, seeds, signs = st.sampled_from([torch.float32, torch.float64]), st.integers(0, 2**32), st.booleans()
widths = st.integers(2, 16)
ROUNDINGS = ('original', 'modified', 'centered')


def noise(shape, seed, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@st.composite
def tensors(draw, dims=(1, 5)):
    "A tensor of any shape, type and memory order: contiguous, channels last, transposed or cut out of a larger one."
    shape = draw(st.lists(st.integers(1, 6), min_size=dims[0], max_size=dims[1]))
    x = noise(shape, draw(seeds), draw(dtypes))
    layout = draw(st.sampled_from(['plain', 'last', 'transposed', 'cut']))
    if layout == 'last' and x.dim() in (4, 5): return x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    if layout == 'transposed' and x.dim() > 1: return x.transpose(0, -1)
    return torch.stack([x, x + 1], -1)[..., 0] if layout == 'cut' else x


class Frozen:
    "A straight-through step that finite differences can follow: argument plus a residual fixed on the first run."
    def __init__(self): self.residuals, self.at, self.recording = [], 0, True

    def __call__(self, soft, hard):
        if self.recording: self.residuals.append((hard - soft).detach())
        self.at += 1
        return soft + self.residuals[self.at - 1]

    def again(self): self.recording, self.at = False, 0


def slope(f, inputs, which, dy, h=1e-6):
    "Central differences of sum(f*dy) in every element of one input, float64; `f(frozen, *inputs)`."
    frozen, out = Frozen(), torch.zeros(inputs[which].numel(), dtype=torch.float64)
    f(frozen, *inputs)
    for i in range(len(out)):
        values = []
        for sign in (1, -1):
            moved = [t.detach().clone() for t in inputs]
            moved[which].view(-1)[i] += sign*h
            frozen.again()
            values.append((f(frozen, *moved)*dy).sum())
        out[i] = (values[0] - values[1])/(2*h)
    return out.view(inputs[which].shape)


def agrees(kernel, formula, *inputs, wrt=None):
    "The kernel's value and gradients are the formula's and its surrogate's."
    inputs = [t.detach().clone().requires_grad_() for t in inputs]
    y = kernel(*inputs)
    dy = noise(y.shape, 1, torch.float64)
    with torch.no_grad():
        assert_close(y.detach(), formula(Frozen(), *inputs), rtol=1e-12, atol=1e-12)
        wanted = [slope(formula, inputs, i, dy) for i in range(len(inputs)) if wrt is None or i in wrt]
    got = torch.autograd.grad((y*dy).sum(), [t for i,t in enumerate(inputs) if wrt is None or i in wrt])
    for g,w in zip(got, wanted): assert_close(g, w, rtol=1e-5, atol=1e-6)


def off_ends(x, step, q_n, q_p):
    "Move values away from the kinks of the clipping, where a finite difference means nothing."
    for end in (q_n, q_p): x = torch.where((x/step - end).abs() < .02, x + .05*step, x)
    return x


# Formulas, written from the papers: sign conventions as in Esser 2020, Zhou 2016, Jin 2020, Choi 2018.

def lsq_formula(bits, signed):
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    def f(frozen, x, s):
        v = torch.minimum(torch.maximum(x/s, torch.tensor(low)), torch.tensor(high))
        return frozen(v, v.round())*s
    return f


def pact_formula(bits, signed):
    def f(frozen, x, alpha):
        half = 1 << bits - 1
        if signed: low, high, n = -alpha, alpha*(half - 1)/half, half
        else: low, high, n = 0*alpha, alpha, (1 << bits) - 1
        share = torch.minimum(torch.maximum(x, low), high)/alpha
        return alpha*frozen(share, (share*n).round()/n)
    return f


def unit(w):
    t = (w.exp() - (-w).exp())/(w.exp() + (-w).exp())
    return t/t.abs().max()/2 + .5


def dorefa_formula(bits, scale):
    def f(frozen, w):
        n, u = (1 << bits) - 1, unit(w)
        fixed = frozen(torch.zeros(()), w.abs().mean())
        return (2*frozen(u, (u*n).round()/n) - 1)*(fixed if scale else 1)
    return f


def sat_formula(bits, rounding):
    def f(frozen, w):
        levels, u = 1 << bits, unit(w)
        if rounding == 'original': q = (u*(levels - 1)).round()/(levels - 1)
        else: q = (torch.minimum((u*levels).floor(), torch.tensor(levels - 1.)) + (.5 if rounding == 'centered' else 0))/levels
        return 2*frozen(u, q) - 1
    return f


@given(seeds, widths, signs)
def test_lsq_gradient_is_the_surrogates_slope(seed, bits, signed):
    low, high = grid(bits, signed)
    step = torch.tensor(.7, dtype=torch.float64)
    x = off_ends(noise((2, 7), seed, torch.float64)*step*high*.8, step, low, high)
    agrees(lambda x, s: fake_quant(x, s, low, high), lsq_formula(bits, signed), x, step)


@given(seeds, st.integers(2, 8), signs, st.integers(1, 4))
def test_lsq_gradient_is_the_papers_closed_form(seed, bits, signed, n):
    low, high = grid(bits, signed)
    x, dy = noise((n, 3, 5), seed)*high*.3, noise((n, 3, 5), seed + 1)
    for step in (torch.tensor(.3), torch.tensor([.2, .3, .5])[:, None]):
        a, s = x.clone().requires_grad_(), step.clone().requires_grad_()
        lsq(a, s, bits, signed).backward(dy)
        v = x/step
        term = torch.where(v <= low, low, torch.where(v >= high, high, v.round() - v)).double()*dy
        ds = term.sum() if s.dim() == 0 else term.sum((0, 2)).view(3, 1)
        assert_close(s.grad.double(), ds/(x.numel()//s.numel()*high)**.5, rtol=1e-4, atol=1e-5)
        assert torch.equal(a.grad, torch.where((v > low) & (v < high), dy, 0.))


def test_lsq_gradient_scale_is_one_over_root_numel_times_top():
    x = torch.full((4, 25), 1e9)
    for signed, bits, top in ((False, 2, 3), (False, 8, 255), (True, 4, 7)):
        s = torch.tensor(1., requires_grad=True)
        lsq(x, s, bits, signed).sum().backward()
        assert s.grad.item() == pytest.approx(100*top/(100*top)**.5, rel=1e-6)


@given(seeds, widths, signs)
def test_pact_gradient_is_the_calibrated_one(seed, bits, signed):
    alpha = torch.tensor(1.3, dtype=torch.float64)
    low, high = grid(bits, signed)
    x = off_ends(noise((2, 7), seed, torch.float64)*1.5, alpha/(high + signed), low, high)
    agrees(lambda x, a: pact(x, a, bits, signed), pact_formula(bits, signed), x, alpha)


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_pact_gradient_by_hand(bits):
    n = 2**bits - 1
    for x, share in ((5., 1.), (-1., 0.), (.4, round(n*.2)/n - .2)):
        alpha = torch.tensor(2., requires_grad=True)
        pact(torch.tensor([x]), alpha, bits).backward()
        assert alpha.grad.item() == pytest.approx(share, abs=1e-6)


@given(seeds, st.integers(2, 8), st.sampled_from(['mean', None]))
def test_dorefa_weight_gradient_is_the_surrogates_slope(seed, bits, scale):
    agrees(lambda w: dorefa_weight(w, bits, scale), dorefa_formula(bits, scale), noise((3, 5), seed, torch.float64))


@given(seeds, st.integers(2, 8), st.sampled_from(ROUNDINGS))
def test_sat_weight_gradient_is_the_surrogates_slope(seed, bits, rounding):
    agrees(lambda w: sat_weight(w, bits, rounding), sat_formula(bits, rounding), noise((3, 5), seed, torch.float64))


@given(seeds, st.integers(1, 16))
def test_dorefa_act_is_the_papers_formula(seed, bits):
    x = noise((40,), seed).requires_grad_()
    y, n = dorefa_act(x, bits), 2**bits - 1
    assert_close(y.detach(), (x.detach().clamp(0, 1)*n).round()/n, rtol=1e-6, atol=0)
    y.sum().backward()
    assert torch.equal(x.grad, ((x > 0) & (x < 1)).float())


@given(tensors(), signs)
def test_one_bit_weights_are_a_scaled_sign(w, per_channel):
    w = w.detach().requires_grad_()
    y = dorefa_weight(w, 1, per_channel=per_channel)
    mean = w.detach().abs().mean(tuple(range(per_channel, w.dim())), keepdim=True) if w.dim() > per_channel else w.detach().abs()
    assert_close(y.detach(), torch.where(w.detach() < 0, -mean, mean.expand_as(w)))
    y.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def test_dorefa_scale_carries_no_gradient_but_the_maximum_does():
    w = torch.tensor([.5, -1., .1], dtype=torch.float64, requires_grad=True)
    dorefa_weight(w, 4, scale=None).sum().backward()
    t = w.detach().tanh()
    largest, others = t[1].abs(), t[0] + t[2]
    assert w.grad[1].item() == pytest.approx((1 - t[1]**2).item()*(others/largest**2).item())
    plain = w.grad.clone()
    w.grad = None
    dorefa_weight(w, 4).sum().backward()
    assert_close(w.grad, plain*w.detach().abs().mean())


@given(tensors(), seeds, widths, signs, st.sampled_from(['one', 'channel']))
def test_fast_path_is_the_plain_path_three_times_over(x, seed, bits, signed, steps):
    low, high = grid(bits, signed)
    x = (x*high*.4).detach()
    step = (noise(() if steps == 'one' else (x.shape[0], *[1]*(x.dim() - 1)), seed, x.dtype).abs() + .3)
    first, again = [], []
    for f in (fake_quant, fake_quant_plain):
        a, s, dy = (t.clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, step, torch.ones_like(x)*.7))
        y = f(a, s, low, high, .3)
        first.append((y, *torch.autograd.grad(y, (a, s), dy.detach())))
        y = f(a, s, low, high, .3)
        g = torch.autograd.grad(y, (a, s), dy, create_graph=True)
        mix = sum((t*noise(t.shape, i, t.dtype)).sum() for i,t in enumerate(g))
        again.append((*g, *torch.autograd.grad(mix, (a, s, dy), allow_unused=True, materialize_grads=True)))
    assert torch.equal(first[0][0], first[1][0])
    tight = dict(rtol=1e-4, atol=1e-4*high) if x.dtype == torch.float32 else dict(rtol=1e-9, atol=1e-9*high)
    for got, want in zip(first[0] + again[0], first[1] + again[1]): assert_close(got, want, **tight)


@given(seeds, st.integers(1, 16), signs)
def test_second_order_mode_has_the_first_orders_gradient_even_on_the_ends(seed, bits, signed):
    if signed and bits == 1: return
    low, high = grid(bits, signed)
    on_grid = torch.arange(low - 2, high + 3)[torch.randint(high - low + 5, (60,), generator=torch.Generator().manual_seed(seed))].float()
    kernels = {1/2**(bits - 1) if signed else 1/high: lambda x: dorefa_act(x, bits, signed),
               .25: lambda x: fake_quant(x, torch.tensor(.25), low, high), .5: lambda x: fake_quant_plain(x, torch.tensor(.5), low, high)}
    for step, f in kernels.items():
        x = (on_grid*step).requires_grad_()
        grads = [torch.autograd.grad(f(x).sum(), x, create_graph=second)[0] for second in (False, True)]
        assert torch.equal(*grads)
        assert torch.equal(grads[0], ((on_grid >= low) & (on_grid <= high)).float())


@given(tensors())
def test_straight_through_is_hard_forward_and_soft_backward(x):
    x = x.detach().requires_grad_()
    y = straight_through(x.round(), x*3)
    assert torch.equal(y, x.round())
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 3))


@given(tensors(), seeds, widths, signs)
def test_memory_order_and_type_are_kept_and_do_not_matter(x, seed, bits, signed):
    step = torch.tensor(.37, dtype=x.dtype)
    for f in (lambda t: lsq(t, step, bits, signed), lambda t: pact(t, step, bits, signed), lambda t: dorefa_act(t, bits, signed),
              lambda t: dorefa_weight(t, bits), lambda t: sat_weight(t, bits)):
        a, b = x.detach().requires_grad_(), x.detach().contiguous().clone().requires_grad_()
        ya, yb = f(a), f(b)
        assert ya.dtype == x.dtype and ya.shape == x.shape
        assert_close(ya, yb)
        dy = noise(x.shape, seed, x.dtype)
        (ya*dy).sum().backward()
        (yb*dy).sum().backward()
        assert_close(a.grad, b.grad)


@given(tensors(), signs)
def test_full_precision_is_the_very_same_tensor(x, signed):
    step = torch.tensor(.1)
    assert lsq(x, step, FULL, signed) is x and pact(x, step, FULL, signed) is x and dorefa_act(x, FULL, signed) is x
    assert dorefa_weight(x, FULL) is x and sat_weight(x, FULL) is x


@pytest.mark.parametrize('bits', range(1, 17))
def test_kernels_use_every_level_and_no_other(bits):
    for signed in (False, True):
        low, high = grid(bits, signed)
        assert high - low + 1 == 2**bits
        wide = torch.arange(2*low - 5, 2*high + 6, .25)
        one = torch.tensor(1.)
        top = 2**(bits - 1) if signed else high
        if signed and bits == 1: continue
        assert len(lsq(wide*.1, one*.1, bits, signed).unique()) == 2**bits
        assert len(pact(wide*.1, one*.1*top, bits, signed).unique()) == 2**bits
        assert len(dorefa_act(wide/top, bits, signed).unique()) == 2**bits
    w = torch.linspace(-.999, .999, 2**(bits + 3)).atanh()
    for scale in ('mean', None): assert len(dorefa_weight(w, bits, scale).unique()) == 2**bits
    if bits > 1:
        for rounding in ROUNDINGS: assert len(sat_weight(w, bits, rounding).unique()) == 2**bits
        assert len(sat_rescale(sat_weight(w, bits), 9).unique()) == 2**bits


def test_reference_compat_has_one_level_more_for_activations_only():
    x, s = torch.arange(-40, 40).float(), torch.tensor(1.)
    assert len(lsq(x, s, 3, signed=False, reference_compat=True).unique()) == 9
    assert len(lsq(x, s, 3, signed=True, reference_compat=True).unique()) == 8


def test_one_signed_bit_is_refused_where_there_is_no_grid():
    x, s = torch.randn(3), torch.tensor(1.)
    for f in (lambda: lsq(x, s, 1), lambda: pact(x, s, 1, signed=True), lambda: dorefa_act(x, 1, signed=True)):
        with pytest.raises(ValueError, match='1-bit|2 bits'): f()
    for bad in (0, 17, 31, -1, 2.5, True, '4', None):
        with pytest.raises(ValueError, match='1 to 16'): lsq(x, s, bad)
        with pytest.raises(ValueError, match='1 to 16'): sat_weight(x, bad)
    with pytest.raises(ValueError, match='nearest'): sat_weight(x, 4, 'nearest')
    with pytest.raises(ValueError, match='max'): dorefa_weight(x, 4, 'max')


@given(seeds, st.integers(2, 8))
def test_quantizing_twice_changes_nothing(seed, bits):
    x = noise((50,), seed)
    for signed in (True, False):
        y = lsq(x, torch.tensor(.25), bits, signed)
        assert torch.equal(lsq(y, torch.tensor(.25), bits, signed), y)


@pytest.mark.parametrize('rounding, levels', [('modified', [-1, -.5, 0, .5]), ('original', [-1, -1/3, 1/3, 1]), ('centered', [-.75, -.25, .25, .75])])
def test_sat_levels_at_two_bits(rounding, levels):
    assert_close(sat_weight(torch.linspace(-3, 3, 500), 2, rounding).unique(), torch.tensor(levels))


def test_sat_rescale_gives_the_fan_its_deviation():
    w = sat_weight(noise((32, 100), 0), 4)
    assert sat_rescale(w, 32).std().item() == pytest.approx(32**-.5, rel=1e-5)


@every_scheme
@given(seeds, st.integers(1, 16), signs)
@settings(max_examples=12)
def test_scheme_never_exceeds_its_levels(scheme, seed, bits, signed):
    w, x = noise((3, 40, 3, 3), seed), noise((4, 500), seed + 1).mul(2)
    x = x if signed else x.relu()
    if bits >= scheme.min_bits.w:
        w_hat, per_channel = scheme.weight(w, 40)(w, bits), scheme.per_channel
        for part in (w_hat if per_channel else [w_hat]): assert len(part.unique()) <= 2**bits
    if bits >= scheme.min_bits.a and (bits > 1 or not signed):
        assert len(scheme.act(x, signed)(x, bits).unique()) <= 2**bits


@every_scheme
def test_scheme_uses_every_level_given_enough_values(scheme):
    w = torch.stack([torch.linspace(-1, 1, 20000), torch.linspace(-3, 3, 20000)])
    x = torch.cat([torch.linspace(0, top, 20000) for top in (1, 9, 100, 900)])
    weight, act = scheme.weight(w, None), scheme.act(x[:40000], False)
    for bits in (2, 3, 4, 6):
        w_hat = weight(w*(40 if scheme.name == 'lsq' else 1), bits)
        for part in (w_hat if scheme.per_channel else [w_hat]): assert len(part.unique()) == 2**bits
        assert len(act(x, bits).unique()) == 2**bits


@every_scheme
def test_full_precision_quantizers_hand_the_tensor_back(scheme):
    w, x = noise((4, 5), 0), noise((6, 5), 1)
    assert scheme.weight(w, 4)(w, FULL) is w and scheme.act(x, True)(x, FULL) is x


@every_scheme
def test_only_the_row_in_use_learns(scheme):
    w, x = noise((4, 50), 0), noise((6, 50), 1).relu()
    for quantizer, t in ((scheme.weight(w), w), (scheme.act(x, False), x)):
        for bits in (2, 5, 16):
            quantizer.zero_grad()
            (quantizer(t.clone().requires_grad_(), bits)*noise(t.shape, 2)).sum().backward()
            for table in (m for m in quantizer.modules() if isinstance(m, WidthTable)):
                used = torch.zeros(len(table.log_factor), dtype=torch.bool)
                used[0 if len(used) == 1 else bits - 1] = True
                told = bits < RANGE_FROM or not getattr(quantizer, 'relative', False)  # else the tensor's own range decides
                assert bool((table.learned.grad[used] != 0).any()) == told and not table.learned.grad[~used].any()


def test_a_step_for_every_width_by_default_and_one_by_choice():
    w, x = noise((4, 50), 0), noise((6, 50), 1).relu()
    shape = lambda q: [tuple(p.shape) for p in q.parameters()]
    assert shape(LSQ().weight(w)) == shape(LSQ().act(x, False)) == shape(SAT().act(x, False)) == [(16, 1)]
    assert shape(LSQ(per_channel=True).weight(w)) == [(16, 4)] and shape(LSQ(per_channel=True).act(x, False)) == [(16, 1)]
    assert shape(LSQ(shared_step=True).weight(w)) == shape(SAT(shared_alpha=True).act(x, False)) == [(1, 1)]
    assert shape(DoReFa().weight(w)) == shape(DoReFa().act(x, False)) == shape(SAT().weight(w)) == []
    table = LSQ(shared_step=True).weight(w).step
    assert table(2) == table(16)


def test_steps_start_where_stated():
    x = noise((1, 4000), 3).relu()
    for bits in (2, 4, 8):
        paper = LSQAct(x, False, init='paper').step(bits).item()
        assert paper == pytest.approx(2*x.abs().mean().item()/(2**bits - 1)**.5, rel=1e-5)
        found = LSQAct(x, False).step(bits).item()
        error = lambda s: (lsq(x, torch.tensor(s), bits, False) - x).square().mean().item()
        tried = [error(f*x.max().item()/(2**bits - 1)) for f in torch.linspace(.02, 1.05, 120).tolist()]
        assert error(found) < 1.2*min(tried)
    assert PACTQuantizer(x, False, alpha=8.).alpha(5).item() == pytest.approx(8)


@every_scheme
def test_text_and_back(scheme): assert make_scheme(scheme.name, **asdict(scheme)) == scheme


@pytest.mark.parametrize('name, options, word', [
    ('binary', {}, 'binary'), ('lsq', {'scale': None}, 'scale'), ('lsq', {'min_bits': 1}, 'min_bits'), ('lsq', {'per_channel': 'maybe'}, 'maybe'),
    ('lsq', {'shared_step': 1.0}, '1.0'), ('lsq', {'init': 'zero'}, 'zero'), ('dorefa', {'scale': 'max'}, 'max'), ('dorefa', {'act_clip': 'tanh'}, 'tanh'),
    ('sat', {'rounding': 'up'}, 'up'), ('sat', {'alpha': -1}, '-1'), ('sat', {'alpha': 'big'}, 'big'), ('sat', {'alpha': float('nan')}, 'nan')])
def test_bad_schemes_are_refused_by_name(name, options, word):
    with pytest.raises(ValueError, match=word): make_scheme(name, **options)


COMPILED = '''
import itertools, sys, torch
from mebqat.kernels import _COMPILED, compile_kernels, dorefa_act, fake_quant, grid
def cases():
    shapes = [(1,), (7,), (4099,), (3, 5), (2, 3, 4), (2, 3, 8, 8), (2, 16, 7, 7), (2, 3, 2, 4, 4)]
    for i,(shape, layout, dtype) in enumerate(itertools.product(shapes, ('plain', 'last', 'cut'), (torch.float32, torch.float64))):
        g = torch.Generator().manual_seed(i)
        x, dy = (torch.randn(shape, generator=g, dtype=dtype) for _ in 'xy')
        if layout == 'last' and x.dim() in (4, 5): x = x.to(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
        if layout == 'cut': x = torch.stack([x, x], -1)[..., 0]
        bits, signed = 2 + i % 7, bool(i % 2)
        step = torch.tensor(.13, dtype=dtype) if i % 3 else torch.full((x.shape[0], *[1]*(x.dim() - 1)), .13, dtype=dtype)
        yield x, dy, step, *grid(bits, signed), bits, signed
def run():
    out = []
    for x, dy, step, low, high, bits, signed in cases():
        a, s = x.clone().requires_grad_(), step.clone().requires_grad_()
        y = fake_quant(a, s, low, high, .3)
        dx, ds = torch.autograd.grad(y, (a, s), dy)
        z = dorefa_act(a, bits, signed)
        v = x/step
        terms = dy*torch.where(v < low, low, torch.where(v > high, high, v.round() - v))
        out.append((y.detach(), dx, z.detach(), torch.autograd.grad(z, a, dy)[0], ds, .3*terms.square().sum().sqrt()))
    return out
eager = run()
assert not _COMPILED
if not compile_kernels(): sys.exit(77)
assert compile_kernels() and set(_COMPILED) == {'forward', 'backward'}
calls = dict.fromkeys(_COMPILED, 0)
def counted(name, f):
    def g(*a):
        calls[name] += 1
        return f(*a)
    return g
_COMPILED.update({k: counted(k, f) for k,f in _COMPILED.items()})
for a, b in zip(eager, run()):
    assert all(torch.equal(p, q) and p.stride() == q.stride() for p, q in zip(a[:4], b[:4]))
    assert a[4].shape == b[4].shape and bool(((a[4] - b[4]).abs() <= 1e-5*torch.maximum(a[4].abs(), a[5])).all()), (a[4], b[4])
assert min(calls.values()) >= 20, calls
from torch._dynamo.utils import counters
from mebqat.bits import Bits
from mebqat.layers import quantize, use_bits
from mebqat.quantizers import LSQ
counters.clear()
for bits, signed, n in itertools.product(range(1, 17), (True, False), (4099, 640)):
    if bits == 1 and signed: continue
    a, s = torch.randn(n, requires_grad=True), torch.tensor(.1, requires_grad=True)
    fake_quant(a, s, *grid(bits, signed), None).sum().backward()
    dorefa_act(a, bits, signed).sum().backward()
net = quantize(torch.nn.Sequential(torch.nn.Conv2d(2, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 4)), LSQ(), example=torch.randn(8, 2, 8, 8), skip='none')
for w, a in ((2, 2), (16, 3), (5, 32), (32, 7), (9, 9)):
    with use_bits(net, Bits(w, a)): net(torch.randn(3 + w, 2, 8, 8).to(memory_format=torch.channels_last if w % 2 else torch.contiguous_format)).sum().backward()
assert not counters['stats'].get('unique_graphs', 0), counters  # all that there are were compiled above
assert not counters['graph_break'] and not counters['unimplemented'], counters
'''


def test_compiled_kernels_equal_the_eager_ones(tmp_path):
    if not any(map(shutil.which, ('c++', 'g++', 'clang++'))): pytest.skip('no C++ compiler here; on Debian: apt-get install g++')
    done = subprocess.run([sys.executable, '-c', COMPILED], cwd=tmp_path, capture_output=True, text=True)
    if done.returncode == 77: pytest.skip(f'the compiler here cannot build the kernels: {done.stderr.strip()[-200:]}')
    assert done.returncode == 0, done.stderr
    assert 'recompile' not in done.stderr, done.stderr
