"The inner loop against learn2learn, against Hessians by hand, and against quantizers that leave everything to autograd."
import copy, functools, math, sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import mebqat.kernels as kernels
from mebqat.adapt import (PARAMETER_KINDS, adapt, adaptable, check_inner, check_losses, inner_path, kind_of, learn_rates, prototype_logits, prototypes,
                          rates_of)
from mebqat.bits import FP, Bits
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.models import cnn5
from mebqat.quantizers import LSQ, SAT, DoReFa
from mebqat.steps import WidthTable

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)
ALL = ('weights', 'norms')
SCHEMES = {'lsq': LSQ(), 'lsq per channel': LSQ(per_channel=True), 'lsq shared': LSQ(shared_step=True), 'sat': SAT(), 'dorefa': DoReFa(),
           'dorefa pact': DoReFa(act_clip='pact')}


def images(n, seed=0): return torch.rand(n, 1, 16, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


SUPPORT, QUERY, LABELS, ASKED = images(6), images(9, 1), torch.arange(3).repeat(2), torch.arange(3).repeat(3)


@functools.cache
def _network(scheme, bn):
    torch.manual_seed(0)
    net = cnn5(3, width=4, image_size=16)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, nn.Conv2d): m.weight.mul_(10)  # MAML's start is so small that one step says little
    return (quantize(net, SCHEMES[scheme], example=SUPPORT.float(), bn=bn) if scheme else net).double()


def network(scheme=None, bn='batch'): return copy.deepcopy(_network(scheme, bn))
def weights(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def at(model, bits): return use_bits(model, bits) if bits is not None else nullcontext()


def outer(model, bits=None, steps=2, lr=.3, kinds=ALL, first_order=True):
    "Adapted parameters, and the query's gradient for every parameter."
    with at(model, bits):
        adapted = adapt(model, SUPPORT, LABELS, steps, lr, adaptable(model, kinds), first_order)
        loss = F.cross_entropy(functional_call(model, adapted, (QUERY,)), ASKED)
    params = dict(model.named_parameters())
    return adapted, dict(zip(params, torch.autograd.grad(loss, params.values(), allow_unused=True)))


def learn2learn():
    sys.modules.setdefault('gym_notices', None)
    return pytest.importorskip('learn2learn')


# peers and hand derivations

@pytest.mark.parametrize('first_order', (True, False))
@pytest.mark.parametrize('steps', (1, 3))
def test_learn2learn_agrees(first_order, steps):
    net, theirs = network(), learn2learn().algorithms.MAML(network(), lr=.3, first_order=first_order)
    adapted, grads = outer(net, steps=steps, first_order=first_order)
    clone = theirs.clone()
    for _ in range(steps): clone.adapt(F.cross_entropy(clone(SUPPORT), LABELS))
    F.cross_entropy(clone(QUERY), ASKED).backward()
    assert max(float((adapted[n] - p).detach().abs().max()) for n,p in net.named_parameters()) > .01
    for n,p in clone.module.named_parameters(): assert_close(adapted[n], p, msg=n)
    for n,p in theirs.module.named_parameters(): assert_close(grads[n], p.grad, msg=n)


def test_learn2learn_agrees_on_learned_rates():
    "Its Meta-SGD has a rate per number where this package has one per tensor: a tensor's gradient is the sum of theirs."
    net, theirs = network(), learn2learn().algorithms.MetaSGD(network(), lr=.3)
    learn_rates(net, adaptable(net, ALL), 1, .3)
    net.double()
    table = rates_of(net, 9)
    adapted = adapt(net, SUPPORT, LABELS, 2, table, adaptable(net, ALL), first_order=False)
    mine, = torch.autograd.grad(F.cross_entropy(functional_call(net, adapted, (QUERY,)), ASKED), table)
    clone = theirs.clone()
    for _ in range(2): clone.adapt(F.cross_entropy(clone(SUPPORT), LABELS))
    F.cross_entropy(clone(QUERY), ASKED).backward()
    rates = torch.stack([lr.grad.sum() for lr in theirs.lrs])
    assert_close(mine[0], rates, atol=1e-6, rtol=1e-5)  # the table starts in single precision
    assert rates.abs().max() > 1e-4


@pytest.mark.parametrize('seed', range(3))
def test_second_order_is_the_product_of_hessians(seed):
    "d loss(theta_2)/d theta_0 = (1 - a H_0)(1 - a H_1) g(theta_2), with the Hessians written out."
    torch.manual_seed(seed)
    net, rate = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double(), .7
    x, xq = torch.randn(6, 3, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    theta = nn.utils.parameters_to_vector(net.parameters()).detach()

    def loss(v, x, y):
        a, b, c, d = v.split([12, 4, 12, 3])
        z = (x @ a.view(4, 3).T + b).tanh() @ c.view(3, 4).T + d
        return (z.logsumexp(1) - z[torch.arange(len(y)), y]).mean()

    slope = lambda v, x, y: torch.autograd.functional.jacobian(lambda u: loss(u, x, y), v)
    factor = lambda v: torch.eye(31, dtype=torch.float64) - rate*torch.autograd.functional.hessian(lambda u: loss(u, x, LABELS), v)
    theta1 = theta - rate*slope(theta, x, LABELS)
    theta2 = theta1 - rate*slope(theta1, x, LABELS)
    first = slope(theta2, xq, ASKED)
    by_hand = {True: first, False: factor(theta) @ factor(theta1) @ first}
    for first_order, expected in by_hand.items():
        adapted = adapt(net, x, LABELS, 2, rate, first_order=first_order)
        assert_close(nn.utils.parameters_to_vector(adapted.values()), theta2)
        got = torch.autograd.grad(F.cross_entropy(functional_call(net, adapted, (xq,)), ASKED), list(net.parameters()))
        assert_close(torch.cat([g.flatten() for g in got]), expected)
    assert (by_hand[True] - by_hand[False]).norm() > .01*first.norm()


def _plain_apply(x, step, q_n, q_p, grad_scale, inverse):
    "What `_FakeQuant` stands for, left to autograd."
    return kernels.fake_quant_plain(x, step, q_n, q_p, grad_scale, inverse)


@pytest.mark.parametrize('bits', ('W2A2', 'W3A8', 'W4AFP', 'WFPA4'))
@pytest.mark.parametrize('scheme', SCHEMES)
def test_fast_quantizers_have_the_plain_ones_second_order(scheme, bits, monkeypatch):
    # Sums of two-bit products tie inside max-pool windows, and which of two equal numbers is the largest hangs on the last bit.
    if scheme == 'dorefa pact' and bits == 'W2A2': bits = 'W3A3'
    net, kinds = network(scheme), PARAMETER_KINDS if scheme != 'dorefa' else ALL
    run = lambda first_order: outer(net, Bits.parse(bits), kinds=kinds, lr=.1, first_order=first_order)
    fast, first = run(False), run(True)
    monkeypatch.setattr(kernels, '_FakeQuant', SimpleNamespace(apply=_plain_apply))
    plain = run(False)
    for a,b in zip(fast, plain):
        for n in a:
            if b[n] is None: assert a[n] is None or not a[n].any(), n
            else: assert_close(a[n], b[n], atol=1e-10, rtol=1e-7, msg=lambda m: f"{n}: {m}")
    assert any(g is not None and not torch.allclose(g, first[1][n], rtol=1e-3) for n,g in fast[1].items()), 'second order changed nothing'


# what it leaves alone

@pytest.mark.parametrize('bn', ('batch', 'running'))
@pytest.mark.parametrize('grad', (True, False))
def test_the_model_is_never_written_to(bn, grad):
    net = network('lsq', bn).eval()
    before, flags = weights(net), [(m, m.training) for m in net.modules()]
    with torch.set_grad_enabled(grad), use_bits(net, Bits(3, 4)):
        adapted = adapt(net, SUPPORT, LABELS, 3, .5, adaptable(net, PARAMETER_KINDS))
        functional_call(net, adapted, (QUERY,))
    assert same(weights(net), before) and all(p.grad is None and p.requires_grad and p.is_leaf for p in net.parameters())
    assert [(m, m.training) for m in net.modules()] == flags and all(layer.bits == FP for layer in bit_layers(net).values())
    assert not all(torch.equal(adapted[n], p) for n,p in net.named_parameters())


@pytest.mark.parametrize('first_order', (True, False))
@pytest.mark.parametrize('norm', (nn.BatchNorm2d, lambda c: nn.InstanceNorm2d(c, affine=True, track_running_stats=True), lambda c: nn.BatchNorm2d(c, momentum=None)))
def test_running_statistics_stay_in_training_mode(norm, first_order):
    "And the path is the one of an ordinary loop on a copy, whose statistics do move; steps of inputs stay where they are."
    torch.manual_seed(0)
    net = quantize(nn.Sequential(nn.Conv2d(1, 4, 3, stride=3), norm(4), nn.ReLU(), nn.Conv2d(4, 4, 3), norm(4), nn.Flatten(), nn.Linear(36, 3)),
                   LSQ(), example=SUPPORT.float()).double().train()
    net[4].eval()
    before, copied = weights(net), copy.deepcopy(net)
    for layer in bit_layers(copied).values(): layer.act_quantizer.eval()
    optimizer = torch.optim.SGD([copied.get_parameter(n) for n in adaptable(copied, ALL)], lr=.3)
    with use_bits(net, Bits(3, 4)), use_bits(copied, Bits(3, 4)):
        adapted = adapt(net, SUPPORT, LABELS, 3, .3, adaptable(net, ALL), first_order)
        for _ in range(3):
            optimizer.zero_grad()
            F.cross_entropy(copied(SUPPORT), LABELS).backward()
            optimizer.step()
    assert same(weights(net), before)
    assert not copied[1].running_mean.equal(net[1].running_mean) and copied[4].running_mean.equal(net[4].running_mean)
    for n,p in copied.named_parameters(): assert_close(adapted[n], p)


def test_a_norm_by_itself_keeps_its_statistics():
    net = nn.BatchNorm1d(3).train()
    adapt(net, torch.randn(6, 3), LABELS, 2, names=['weight'])
    assert net.num_batches_tracked == 0 and not net.running_mean.any()


def test_frozen_parameters_stay():
    net = network('lsq')
    frozen = ['block2.conv.weight', 'fc.bias']
    for n in frozen: net.get_parameter(n).requires_grad_(False)
    assert not set(frozen) & set(adaptable(net, PARAMETER_KINDS))
    with use_bits(net, Bits(3, 4)): adapted = adapt(net, SUPPORT, LABELS, 2, .3)
    for n in frozen: assert adapted[n] is net.get_parameter(n)
    assert not torch.equal(adapted['fc.weight'], net.fc.weight)


def test_kinds_divide_the_parameters():
    net = network('lsq')
    names = {k: adaptable(net, [k]) for k in PARAMETER_KINDS}
    learn_rates(net, names['weights'], 2)
    every = [n for n,_ in net.named_parameters()]
    assert names['head'] == ['fc.weight', 'fc.bias'] and set(names['head']) < set(names['weights'])
    assert sorted([*names['weights'], *names['norms'], *names['steps'], 'log_rate']) == sorted(every) and kind_of('log_rate', net) == 'rates'
    assert all(n.endswith(('conv.weight', 'conv.bias', 'fc.weight', 'fc.bias')) for n in names['weights'])
    assert all('.norm.' in n for n in names['norms']) and all(n.endswith('log_factor') for n in names['steps'])
    assert adaptable(net, PARAMETER_KINDS) == [n for n in every if n != 'log_rate']


@pytest.mark.parametrize('kinds', [('weights',), ('norms',), ('steps',), ('norms', 'steps'), ('head',), ('head', 'norms')])
def test_only_the_chosen_kinds_move(kinds):
    net = network('lsq')
    adapted, _ = outer(net, Bits(2, 3), kinds=kinds)
    moved = {n for n,p in net.named_parameters() if not torch.equal(adapted[n], p)}
    assert moved <= set(adaptable(net, kinds)) and all(moved & set(adaptable(net, [k])) for k in kinds)


@pytest.mark.parametrize('first_order', (True, False))
@pytest.mark.parametrize('bits', ('W3A4', 'WFPA4', 'W3AFP', 'FP'))
def test_idle_steps_stay_without_an_error(bits, first_order):
    net, bits = network('lsq'), Bits.parse(bits)
    adapted, grads = outer(net, bits, kinds=PARAMETER_KINDS, first_order=first_order)
    used = 0
    for name, layer in bit_layers(net).items():
        for part, width in (('weight_quantizer', bits.w), ('act_quantizer', bits.a)):
            key, rows = f'{name}.{part}.step.log_factor', torch.arange(16) == width - 1
            moved, grad = adapted[key] != net.get_parameter(key), grads[key]
            assert not moved[~rows].any() and (grad is None or not grad[~rows].any()), key
            if rows.any(): assert moved[rows].all() and grad[rows].all(), key
            else: assert grad is None, key
            used += int(rows.any())
    assert used == 3*((bits.w < 32) + (bits.a < 32))


def test_full_precision_is_the_float_network():
    adapted, grads = outer(network('lsq'), FP, steps=3, first_order=False)
    expected = outer(network(), steps=3, first_order=False)
    for n in expected[0]: assert torch.equal(adapted[n], expected[0][n]) and torch.equal(grads[n], expected[1][n]), n


# the loop itself

@pytest.mark.parametrize('first_order', (True, False))
def test_no_grad_gives_the_same_weights_and_no_graph(first_order):
    net = network('lsq')
    with use_bits(net, Bits(2, 4)):
        there = adapt(net, SUPPORT, LABELS, 3, .3, adaptable(net, PARAMETER_KINDS), first_order)
        with torch.no_grad(): here = adapt(net, SUPPORT, LABELS, 3, .3, adaptable(net, PARAMETER_KINDS), first_order)
    for n in adaptable(net, PARAMETER_KINDS):
        assert_close(here[n], there[n].detach(), rtol=1e-12, atol=1e-12, msg=n)  # a graph of the backward pass sums in another order
        assert here[n].grad_fn is None and there[n].grad_fn is not None, n


def test_the_path_passes_through_every_step():
    net, losses = network(), []
    path = list(inner_path(net, SUPPORT, LABELS, 4, .3, adaptable(net), losses=losses))
    assert len(path) == 5 and len(losses) == 4 and all(path[0][n] is p for n,p in net.named_parameters())
    for k in range(5):
        for n,p in adapt(net, SUPPORT, LABELS, k, .3).items(): assert torch.equal(p, path[k][n])
    for k in range(4): assert_close(losses[k], F.cross_entropy(functional_call(net, path[k], (SUPPORT,)), LABELS).detach())
    assert losses[-1] < losses[0] and not losses[0].requires_grad


def test_a_table_of_rates_is_read_row_by_row_and_its_last_row_repeated():
    net = network()
    names = adaptable(net)
    table = torch.rand(2, len(names), dtype=torch.float64)*.5
    table[1, 3] = 0
    adapted = adapt(net, SUPPORT, LABELS, 3, table, names)
    params = dict(net.named_parameters())
    for row in (table[0], table[1], table[1]):
        loss = F.cross_entropy(functional_call(net, params, (SUPPORT,)), LABELS)
        grads = torch.autograd.grad(loss, [params[n] for n in names])
        params = params | {n: (params[n] - r*g).detach().requires_grad_() for n,r,g in zip(names, row, grads)}
    for n in names: assert_close(adapted[n], params[n], msg=n)


@pytest.mark.parametrize('scheme', (None, 'lsq'))
def test_gradients_of_rates_by_finite_differences(scheme):
    "The query's loss is smooth in the last step's biases whatever the quantizer does; in float, in every rate."
    net = network(scheme)
    names = adaptable(net, ['norms']) if scheme is None else ['fc.weight', 'fc.bias']
    learn_rates(net, names, 2, .3)
    net.double()

    def loss(): return F.cross_entropy(functional_call(net, adapt(net, SUPPORT, LABELS, 2, rates_of(net, 9), names, False), (QUERY,)), ASKED)

    with at(net, Bits(3, 3) if scheme else None):
        grad, = torch.autograd.grad(loss(), net.log_rate)
        for k in range(2):
            for i in range(len(names)):
                ends = []
                for shift in (1e-4, -2e-4):
                    with torch.no_grad():
                        net.log_rate[k, i] += shift
                        ends.append(float(loss()))
                with torch.no_grad(): net.log_rate[k, i] += 1e-4
                assert math.isclose((ends[0] - ends[1])/2e-4, float(grad[k, i]), rel_tol=1e-3, abs_tol=1e-7), (names[i], k)


# refusals

@pytest.mark.parametrize('steps, rate, text', [(-1, .1, 'got -1'), (1.5, .1, 'got 1.5'), (True, .1, 'got True'), (1, 0, 'positive, got 0'), (1, -2., 'got -2.0'),
                                               (1, math.nan, 'got nan'), (1, math.inf, 'got inf')])
def test_impossible_loops(steps, rate, text):
    with pytest.raises(ValueError, match=text): check_inner(steps, rate)
    with pytest.raises(ValueError, match=text): adapt(network(), SUPPORT, LABELS, steps, rate)
    with pytest.raises(ValueError, match=text): learn_rates(net := network(), adaptable(net), steps, rate)
    assert not hasattr(net, 'log_rate')


def test_nothing_to_adapt():
    with pytest.raises(ValueError, match='no steps to adapt'): adaptable(network('dorefa'), ['steps'])
    with pytest.raises(ValueError, match='no head to adapt'): adaptable(network()[:-1], ['head'])
    with pytest.raises(ValueError, match="got 'rates'"): adaptable(network(), ['weights', 'rates'])
    with pytest.raises(ValueError, match='at least 1 inner step, got 0'): learn_rates(net := network(), adaptable(net), 0)


def test_divergence_names_its_step_and_rate():
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(256, 3)).double(), 1000*SUPPORT
    with pytest.raises(FloatingPointError, match=r'at inner step 1 of 3 with inner_lr=1e\+308; lower inner_lr'): adapt(net, x, LABELS, 3, 1e308)
    table = torch.full((3, 2), 1e-9, dtype=torch.float64)
    table[1] = 1e308
    with pytest.raises(FloatingPointError, match=r'at inner step 2 of 3 with learned rates up to 1e\+308; lower'): adapt(net, x, LABELS, 3, table)
    with torch.no_grad(), pytest.raises(FloatingPointError, match='support loss nan at inner step 0 of 1'): adapt(net, x/0, LABELS, 1, .1)
    check_losses([], .1)
    check_losses([torch.tensor(3.)], .1)


# prototypes

@quick
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
def test_prototypes_are_class_means_and_logits_squared_distances(n_way, k_shot, m, d, seed):
    g = torch.Generator().manual_seed(seed)
    support, query = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (n_way*k_shot, m))
    means = prototypes(support, n_way)
    for c in range(n_way): assert_close(means[c], support[c*k_shot:(c + 1)*k_shot].mean(0))
    assert_close(prototype_logits(query, means), -(query[:, None] - means).square().sum(2))


@pytest.mark.parametrize('offset', [0., -3e3, 2e5])
def test_distances_survive_an_offset(offset):
    g = torch.Generator().manual_seed(1)
    q, m = (torch.randn(n, 48, generator=g).add(offset) for n in (30, 10))
    exact = -(q.double()[:, None] - m.double()).square().sum(2)
    assert_close(prototype_logits(q, m).double(), exact, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize('n_way', [1, 4])
def test_gradients_of_distances(n_way):
    q, m = (torch.randn(n, 3, dtype=torch.float64).add(7).requires_grad_() for n in (5, n_way))
    assert torch.autograd.gradcheck(prototype_logits, (q, m)) and torch.autograd.gradgradcheck(prototype_logits, (q, m))
    taken = torch.autograd.grad(prototype_logits(q, m).sin().sum(), (q, m))
    plain = torch.autograd.grad((-(q[:, None] - m).square().sum(2)).sin().sum(), (q, m))
    for a, b in zip(taken, plain): assert_close(a, b)


@pytest.mark.parametrize('n, n_way', [(7, 3), (4, 0), (5, -5), (2, 4)])
def test_unequal_classes_have_no_prototypes(n, n_way):
    with pytest.raises(ValueError, match=f'{n} support images cannot belong to {n_way} classes'): prototypes(torch.zeros(n, 2), n_way)


def test_tables_are_what_the_steps_kind_adapts():
    net = network('sat')
    tables = [f'{n}.log_factor' for n,m in net.named_modules() if isinstance(m, WidthTable)]
    assert adaptable(net, ['steps']) == tables and len(tables) == 3
