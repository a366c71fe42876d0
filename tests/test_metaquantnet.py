"MetaQuantNet: starts at the pretrained network, trains what it should, practises where budgets are, and can be written down."
import copy, functools, warnings
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import mebqat.mixed.metaquantnet as module
from mebqat.bits import FP, FULL, Bits, BitSpace, Policy
from mebqat.cost import profile
from mebqat.data import load
from mebqat.evaluate import fitness, score, sweep
from mebqat.layers import bit_layers, bits_of, describe, quantize, use_bits
from mebqat.mixed.metaquantnet import (CANDIDATE_WIDTHS, GeneratedWeight, PolicySampler, at_policy, export_weights, generate, generator_size, generators,
                                 metaquantnet, policies_of, tilted)
from mebqat.files import load_whole, save_whole
from mebqat.methods import float_training, qat
from mebqat.models import resnet20, small_cnn
from mebqat.quantizers import LSQ, SAT, DoReFa
from mebqat.train import Batches, TrainConfig, fit

SCHEMES = {'lsq': LSQ(), 'lsq per channel': LSQ(per_channel=True), 'dorefa': DoReFa(act_clip='pact'), 'sat': SAT()}
TRAIN, VAL, TEST = (load('digits', s) for s in ('train', 'val', 'test'))
EXAMPLE = TRAIN.batch(slice(0, 128))[0]
BATCH = TRAIN.batch(slice(0, 48))


def generator(seed=0): return torch.Generator().manual_seed(seed)


@functools.cache
def _pretrained():
    torch.manual_seed(0)
    net = small_cnn(image_size=8, width=4)
    fit(net, float_training(), Batches(TRAIN, 64), TrainConfig(steps=150, lr=.05, warmup=10))
    return net.eval()


def pretrained(): return copy.deepcopy(_pretrained())


@functools.cache
def _quantized(scheme, bn, ends): return quantize(pretrained(), SCHEMES[scheme], example=EXAMPLE, ends=ends, bn=bn).eval()


def plain(scheme='lsq', bn='reestimate', ends=None): return copy.deepcopy(_quantized(scheme, bn, ends))


def shaken(model, seed=3):
    "The same model with generators that have something to say."
    g = generator(seed)
    with torch.no_grad():
        for gen in generators(model).values(): gen.A2.normal_(0, .02, generator=g)
    return model


def state(model): return {k: v.clone() for k,v in model.state_dict().items()}


def same(model, before): return before.keys() == model.state_dict().keys() and all(v.equal(before[k]) for k,v in model.state_dict().items())


def step(model, method, seed=0):
    model.zero_grad(set_to_none=True)
    return method(model, BATCH, generator(seed))


# one layer

def test_by_hand():
    w = torch.tensor([[[1., 2.]], [[3., -1.]]])
    class Plain(nn.Module):
        def forward(self, weight, bits): return weight*10 + bits
    gen = GeneratedWeight(Plain(), w, (2, 4), 2, generator())
    with torch.no_grad():
        gen.A1.copy_(torch.tensor([4., -2.]))
        gen.c1.copy_(torch.tensor([-1., 1.5]))
        gen.A2.copy_(torch.tensor([[1., 2.], [0., -2.], [3., 0.], [-1., 1.]]))
    # u = 1/2: hidden (1, 0.5); u = 1: hidden (3, 0)
    assert_close(gen.generated(w, 2), torch.tensor([[[1 + 2., 2 - 1.]], [[3 + 3., -1 - .5]]]), rtol=0, atol=0)
    assert_close(gen.generated(w, 4), torch.tensor([[[1 + 3., 2 + 0.]], [[3 + 9., -1 - 3.]]]), rtol=0, atol=0)
    assert_close(gen(w, 4), torch.tensor([[[44., 24.]], [[124., -36.]]]), rtol=0, atol=0)
    assert gen.generated(w, 16).equal(gen.generated(w, 4)) and gen.generated(w, FULL) is w


@pytest.mark.parametrize('widths, hidden', [(CANDIDATE_WIDTHS, 32), ((2, 4), 1), ((3, 8, 16), 7), ((4,), 32)])
def test_no_unit_is_dead_and_the_start_is_scaled(widths, hidden):
    gen = GeneratedWeight(nn.Identity(), torch.zeros(3), widths, hidden, generator())
    units = torch.stack([F.relu(gen.A1*b/max(widths) + gen.c1) for b in widths]).detach()
    if len(widths) > 1: assert (units.amax(0) > 0).all()
    else: assert (units > 0).any()
    if hidden == 32 and len(widths) > 1: assert all(.6 < units[i].norm() < 1.5 for i in (0, -1))


def test_seeds_decide_the_kinks_and_layers_differ():
    a, b, c = (generators(generate(plain(), seed=s)) for s in (0, 0, 1))
    first, second = list(a)[:2]
    assert all(a[n].A1.equal(b[n].A1) and a[n].c1.equal(b[n].c1) and not a[n].c1.equal(c[n].c1) for n in a)
    assert not a[first].c1.equal(a[second].c1)


# the start

@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('ends', [None, Bits(8, 8)], ids=str)
def test_starts_at_the_pretrained_network_at_every_policy(scheme, ends):
    before, model = plain(scheme, ends=ends), generate(plain(scheme, ends=ends))
    names = list(generators(model))
    assert names == ['block2.conv', 'block3.conv', 'block4.conv']
    policies = [Policy({n: Bits(w, a) for n,w,a in zip(names, ws, (8, 4, 3))}) for ws in product((2, 5, 8), repeat=3)]
    for bits in (FP, Bits(16, 16), Bits(FULL, 4), Bits(3, FULL), Policy({names[1]: Bits(2, 2)}), *policies):
        with use_bits(before, bits), use_bits(model, bits): assert model(EXAMPLE[:16]).equal(before(EXAMPLE[:16])), bits


def test_full_precision_is_the_float_network_even_after_training():
    model, net = shaken(generate(plain())), pretrained()
    assert model(EXAMPLE).equal(net(EXAMPLE))
    with use_bits(model, Bits(4, 8)), use_bits(other := plain(), Bits(4, 8)): assert not model(EXAMPLE).equal(other(EXAMPLE))


def test_no_hidden_units_is_the_plain_network():
    model = plain()
    before = state(model)
    assert generate(model, hidden=0) is model and not generators(model) and same(model, before)


def test_bits_change_no_key_and_layers_keep_their_names():
    before, model = plain(), generate(plain())
    keys = list(model.state_dict())
    with use_bits(model, Bits(2, 4)): assert list(model.state_dict()) == keys
    assert {k for k in keys if 'weight_quantizer' not in k} == {k for k in before.state_dict() if 'weight_quantizer' not in k}
    fixed = ['kind', 'weights', 'signed input', 'pinned', 'bits']  # what the grids cut off may differ in the last bit
    assert describe(model)[fixed].equals(describe(before)[fixed]) and bits_of(model, Bits(3, 3)) == bits_of(before, Bits(3, 3))
    copied = copy.deepcopy(shaken(model))
    with use_bits(model, Bits(2, 4)), use_bits(copied, Bits(2, 4)): assert copied(EXAMPLE).equal(model(EXAMPLE))
    with torch.no_grad(): generators(copied)['block2.conv'].A2.zero_()
    assert generators(model)['block2.conv'].A2.any()


# size and cost

def test_sizes():
    net = quantize(resnet20(), LSQ(), example=torch.randn(2, 3, 32, 32, generator=generator()), skip='none')
    weights = [m.weight.numel() for m in bit_layers(net).values()]
    assert sum(weights) == 268_336 and len(weights) == 20
    assert generator_size(weights, 32) == sum(32*n + 32 + 32 for n in weights) == 8_588_032
    assert round((generator_size(weights, 32) + sum(weights))/1e6, 1) == 8.9 and round((generator_size(weights, 8) + sum(weights))/1e6, 1) == 2.4
    before = sum(p.numel() for p in net.parameters())
    generate(net, hidden=3)
    assert sum(p.numel() for p in net.parameters()) - before == generator_size(weights, 3)


def test_cost_counts_weights_once_and_leaves_the_generators_out():
    before, model = (profile(m, (1, 1, 8, 8)) for m in (plain(), generate(plain(), hidden=5)))
    for bits in (FP, Bits(2, 4), Policy({'block3.conv': Bits(3, 3)})):
        a, b = before.at(bits), model.at(bits)
        assert a.layers == b.layers and a.other_bytes == b.other_bytes and b.weight_bytes == a.weight_bytes and b.uncounted == a.uncounted
        assert (b.quantizer_bytes, b.total_bytes) == (a.quantizer_bytes, a.total_bytes)
    written = profile(export_weights(generate(plain(), hidden=5), Bits(2, 4)), (1, 1, 8, 8))
    assert written.at(Bits(2, 4)) == before.at(Bits(2, 4))


def test_a_huge_generator_warns(monkeypatch):
    monkeypatch.setattr(module, '_HUGE', generator_size([144, 288, 576], 8))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        generate(plain(), hidden=8)
    with pytest.warns(UserWarning, match='million numbers'): generate(plain(), hidden=9)


# gradients

@pytest.mark.parametrize('scheme', SCHEMES)
def test_gradients_reach_all_four_tensors_of_the_layers_in_use(scheme):
    model, policy = shaken(generate(plain(scheme))), Policy({'block2.conv': Bits(2, 4), 'block4.conv': Bits(5, 4)})
    seen = step(model, replace(at_policy(policy, pretrained()), clamp=1e9))
    assert seen.pairs == (policy,) and (seen.forwards, seen.backwards) == (2, 1)
    for n,gen in generators(model).items():
        if n not in policy:
            assert gen.A1.grad is None and gen.c1.grad is None and gen.A2.grad is None
            continue
        weight, u = model.get_submodule(n).weight, policy[n].w/8
        hidden, dw = F.relu(gen.A1*u + gen.c1).detach(), weight.grad.reshape(-1)
        through = (gen.A2.detach().T @ dw)*(hidden > 0)
        assert all(t.grad.any() for t in (weight, gen.A1, gen.c1, gen.A2))
        assert_close(gen.A2.grad, dw[:, None]*hidden)
        assert_close(gen.A1.grad, through*u)
        assert_close(gen.c1.grad, through)
        assert (hidden == 0).any() and not gen.A2.grad[:, hidden == 0].any()


def test_the_generator_opens_after_the_first_step():
    model, method = generate(plain()), at_policy(Policy.uniform(['block2.conv'], Bits(3, 4)), pretrained())
    gen = generators(model)['block2.conv']
    step(model, method)
    assert gen.A2.grad.any() and not gen.A1.grad.any() and not gen.c1.grad.any()
    torch.optim.SGD(model.parameters(), .1).step()
    step(model, method)
    assert gen.A2.grad.any() and gen.A1.grad.any() and gen.c1.grad.any()


def test_steps_of_other_widths_get_no_gradient():
    model = shaken(generate(plain()))
    step(model, at_policy(Policy.uniform(generators(model), Bits(3, 5))))
    for n in generators(model):
        layer = model.get_submodule(n)
        for table,width in ((layer.weight_quantizer.quantizer.step, 3), (layer.act_quantizer.step, 5)):
            rows = table.learned.grad.any(1)
            assert rows[width - 1] and rows.sum() == 1


def test_loss_and_sandwich_against_separate_passes():
    model, net = shaken(generate(plain())), pretrained()
    x, y = BATCH
    sampler = policies_of(model, a=(4,))
    method = metaquantnet(sampler, net, sandwich=True)
    seen = step(model, method, seed=5)
    assert seen.pairs == (sampler.lowest, sampler.highest, sampler.sample(generator(5))) and (seen.forwards, seen.backwards) == (4, 3)
    assert {b.w for b in sampler.lowest.values()} == {2} and {b.w for b in sampler.highest.values()} == {8}
    got = {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}
    losses, grads = [], []
    for policy in seen.pairs:
        model.zero_grad(set_to_none=False)
        with use_bits(model, policy): logits = model(x)
        losses.append(F.cross_entropy(logits, y) + F.cross_entropy(logits, net(x).softmax(1)))
        losses[-1].backward()
        grads.append({n: p.grad.clone() for n,p in model.named_parameters() if n in got})
    assert_close(seen.loss, sum(losses).item()/3)
    for n,g in got.items(): assert_close(g, sum(each[n] for each in grads)/3, atol=1e-5, rtol=1e-4)
    alone = step(model, metaquantnet(sampler, net, labels=False), seed=5)
    with use_bits(model, alone.pairs[0]), torch.no_grad(): assert_close(alone.loss, F.cross_entropy(model(x), net(x).softmax(1)).item())


def test_labels_alone_at_one_policy_are_plain_qat():
    policy = Policy.uniform(['block2.conv', 'block4.conv'], Bits(2, 4))
    a, b = shaken(generate(plain())), shaken(generate(plain()))
    assert step(a, at_policy(policy)).loss == step(b, qat(policy)).loss
    pairs = list(zip(a.parameters(), b.parameters()))
    assert all(p.grad.equal(q.grad) if p.grad is not None else q.grad is None for p,q in pairs) and any(p.grad is not None for p,_ in pairs)


def test_no_gradient_is_larger_than_the_clamp():
    model, method = generate(plain('sat')), at_policy(Policy.uniform(['block2.conv', 'block4.conv'], Bits(2, 4)))
    step(model, replace(method, clamp=1e9))
    free = {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}
    step(model, replace(method, clamp=.01))
    assert max(g.abs().max() for g in free.values()) > .01
    for n,p in model.named_parameters():
        if n in free: assert_close(p.grad, free[n].clamp(-.01, .01))


def test_the_teacher_is_frozen_and_left_alone():
    net = pretrained().train()
    method, before = metaquantnet(policies_of(plain()), net), state(net)
    step(generate(plain()), method)
    assert net.training and same(net, before) and all(p.grad is None for p in net.parameters())
    assert not method.teacher.training and not any(p.requires_grad for p in method.teacher.parameters())
    with torch.no_grad(): net.fc.weight.zero_()
    assert method.teacher.fc.weight.any()


# policies

def chance_of_low_means(layers, widths, mean):
    "P(mean <= `mean`) of independent uniform genes, by convolution."
    total = torch.ones(1, dtype=torch.float64)
    for _ in range(layers):
        new = torch.zeros(len(total) + len(widths) - 1, dtype=torch.float64)
        for b in range(len(widths)): new[b:b + len(total)] += total/len(widths)
        total = new
    return float(total[:int(layers*(mean - widths[0])) + 1].sum())


def draws(kind, n=1500, **rest):
    sampler, g = PolicySampler(tuple(f'layer{i}' for i in range(18)), kind=kind, **rest), generator()
    return [sampler.sample(g) for _ in range(n)]


def means(policies, of='w'): return torch.tensor([[getattr(b, of) for b in p.values()] for p in policies], dtype=torch.float).mean(1)


def test_budgets_are_practised_alike():
    assert 4.5e-6 < chance_of_low_means(18, CANDIDATE_WIDTHS, 3) < 5.5e-6
    even, alone = means(draws('budget')), means(draws('independent'))
    assert (alone <= 3).sum() == 0 and (alone >= 7).sum() == 0
    for low in range(2, 8): assert .1 < ((low <= even) & (even < low + 1)).float().mean() < .24
    assert even.min() < 2.2 and even.max() > 7.8


def test_two_genes_and_a_range_of_budgets():
    policies = draws('budget', 600, a=(2, 4, 8), mean=(3, 4))
    w, a = means(policies), means(policies, 'a')
    assert 3.3 < w.mean() < 3.7 and w.std() < .6 and a.std() > 1.2
    assert {b.a for p in policies for b in p.values()} == {2, 4, 8} and {b.w for p in policies for b in p.values()} == set(CANDIDATE_WIDTHS)
    assert abs(torch.corrcoef(torch.stack([w, a]))[0, 1]) < .2
    assert {b.a for p in draws('budget', 20) for b in p.values()} == {8}


def test_a_generator_decides_the_policy():
    sampler = policies_of(plain())
    assert sampler.sample(generator(1)) == sampler.sample(generator(1))
    assert len({sampler.sample(generator(i)) for i in range(40)}) > 20


@pytest.mark.parametrize('widths', [CANDIDATE_WIDTHS, (2, 3), (2, 4, 16), (1, 2, 8)])
def test_tilted_has_its_mean_and_is_the_most_even(widths):
    b = torch.tensor(widths, dtype=torch.float64)
    for t in (0, .1, .37, .5, .99, 1):
        mean = widths[0] + t*(widths[-1] - widths[0])
        p = tilted(widths, mean)
        assert_close(p.sum().item(), 1.)
        assert_close((p @ b).item(), float(mean), atol=1e-6, rtol=0)
        if 0 < t < 1: assert_close((slope := p.log().diff()/b.diff()), slope[0].expand(len(slope)), atol=1e-6, rtol=1e-4)
    assert_close(tilted(widths, b.mean().item()), torch.full_like(b, 1/len(b)))


def test_pinned_layers_are_outside_the_policy():
    model = plain(ends=Bits(8, 8))
    sampler = policies_of(generate(model))
    assert sampler.names == ('block2.conv', 'block3.conv', 'block4.conv') and len(bit_layers(model)) == 5
    assert bits_of(model, sampler.lowest)['block1.conv'] == Bits(8, 8)


# training

@functools.cache
def trained(hidden=32):
    "A short meta-training, the network before it, and the sampler."
    model = generate(plain(), hidden=hidden)
    sampler = policies_of(model, w=(2, 3, 4), a=(3,))
    fit(model, metaquantnet(sampler, pretrained()), Batches(TRAIN, 64), TrainConfig(steps=120, lr=.02, warmup=10))
    return model, sampler


@pytest.mark.parametrize('hidden', [0, 32])
def test_training_lifts_random_low_policies(hidden):
    model, sampler = trained(hidden)
    g = generator(7)
    policies = [sampler.sample(g) for _ in range(6)]
    before, after = (torch.tensor([ask(p) for p in policies]) for ask in (fitness(m, TEST, TRAIN, 500) for m in (plain(), model)))
    assert after.mean() > before.mean() + .03, (before, after)


def test_a_training_is_a_function_of_its_seed():
    def run():
        model = generate(plain(), hidden=4)
        fit(model, metaquantnet(policies_of(model), pretrained()), Batches(TRAIN, 32), TrainConfig(steps=4, seed=3))
        return state(model)
    a = run()
    assert all(v.equal(a[k]) for k,v in run().items())


def test_finetuning_at_a_policy_both_ways():
    model, sampler = trained()
    policy = sampler.lowest
    start = score(model, policy, TRAIN, TRAIN).loss
    for each in (copy.deepcopy(model), export_weights(model, policy)):
        fit(each, at_policy(policy, pretrained()), Batches(TRAIN, 64), TrainConfig(steps=60, lr=.01))
        assert score(each, policy, TRAIN, TRAIN).loss < start


# writing down

@pytest.mark.parametrize('scheme', SCHEMES)
@pytest.mark.parametrize('channels_last', [False, True])
def test_exported_weights_answer_alike(scheme, channels_last):
    model = shaken(generate(plain(scheme)))
    if channels_last: model.to(memory_format=torch.channels_last)
    before, g = state(model), generator()
    for bits in (*(policies_of(model, a=(3, 8)).sample(g) for _ in range(4)), Policy({'block3.conv': Bits(3, 3)}), Bits(2, 4), FP):
        written = export_weights(model, bits)
        with use_bits(model, bits), use_bits(written, bits): assert written(EXAMPLE).equal(model(EXAMPLE)), bits
        assert not generators(written) and written.state_dict().keys() == plain(scheme).state_dict().keys()
    assert same(model, before)


def test_exporting_unties_layers_that_share_their_weights():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(6, 6) for _ in range(4))
            self.c.weight = self.b.weight
        def forward(self, x): return self.d(self.c(self.b(self.a(x))))
    torch.manual_seed(0)
    model = shaken(generate(quantize(Twice(), LSQ(), example=(x := torch.randn(32, 6)))))
    policy = Policy({'b': Bits(2, 4), 'c': Bits(6, 4)})
    written = export_weights(model, policy)
    with use_bits(model, policy), use_bits(written, policy): assert written(x).equal(model(x))


def test_exporting_a_plain_network_copies_it():
    model = plain()
    written = export_weights(model, Bits(2, 2))
    assert same(written, state(model)) and written is not model and written.fc.weight is not model.fc.weight


def test_files(tmp_path):
    model = shaken(generate(plain(), widths=(2, 4), hidden=6))
    save_whole(tmp_path/'m.safetensors', model.state_dict(), {})
    loaded = generate(plain(), hidden=6)  # other widths: the file's count
    loaded.load_state_dict(load_whole(tmp_path/'m.safetensors')[0])
    for bits in (Bits(2, 4), Bits(3, 3), FP):
        with use_bits(model, bits), use_bits(loaded, bits): assert loaded(EXAMPLE).equal(model(EXAMPLE))
    with pytest.raises(RuntimeError, match='size mismatch'): generate(plain(), hidden=7).load_state_dict(load_whole(tmp_path/'m.safetensors')[0])


# evaluation

def test_fitness_is_the_score_and_restores_everything():
    model, sampler = trained()
    model = copy.deepcopy(model).train()
    model.block2.norm.eval()
    before, flags, rng = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    ask = fitness(model, VAL, TRAIN)
    policies = [sampler.lowest, sampler.sample(generator()), sampler.highest]
    first = [ask(p) for p in policies]
    assert first == [ask(p) for p in policies] == [score(copy.deepcopy(model), p, VAL, TRAIN).accuracy for p in policies]
    assert same(model, before) and flags == [m.training for m in model.modules()] and torch.get_rng_state().equal(rng)
    assert all(m.bits == FP for m in bit_layers(model).values()) and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize('bn', ['running', 'batch', 'switchable'])
def test_fitness_of_other_batch_norms(bn):
    space = {'space': BitSpace([Bits(2, 4), Bits(3, 4)])} if bn == 'switchable' else {}
    model = quantize(pretrained(), LSQ(), example=EXAMPLE, bn=bn, **space).eval()
    before, bits = state(model), Bits(2, 4)
    assert fitness(model, VAL)(bits) == score(model, bits, VAL).accuracy
    with use_bits(model, bits), torch.no_grad(): plain_loop = (model(VAL.batch(slice(0, len(VAL)))[0]).argmax(1) == VAL.labels).double().mean()
    if bn != 'batch': assert fitness(model, VAL)(bits) == float(plain_loop)
    assert fitness(model, VAL, TRAIN)(bits) == fitness(model, VAL)(bits) == score(model, bits, VAL, TRAIN).accuracy
    assert same(model, before)


def test_fitness_refuses_answers_that_are_not_numbers_and_recovers():
    model = generate(plain())
    ask, before = fitness(model, VAL, TRAIN), state(model)
    good = ask(Bits(4, 8))
    with torch.no_grad(): generators(model)['block3.conv'].A2[0] = float('nan')
    with pytest.raises(FloatingPointError, match='NaN or infinity at W4A8'): ask(Bits(4, 8))
    assert all(m.bits == FP for m in bit_layers(model).values())
    with torch.no_grad(): generators(model)['block3.conv'].A2.zero_()
    assert same(model, before) and ask(Bits(4, 8)) == good


def test_sweeps_and_scores_run_unchanged():
    model, _ = trained()
    surface = sweep(model, VAL, BitSpace([Bits(2, 3), Bits(4, 3), FP]), bn_data=TRAIN)
    assert surface.at(Bits(2, 3)).bytes < surface.at(FP).bytes and surface.at(Bits(4, 3)).accuracy > .6


# bad input

WRONG = {
    'no widths': (lambda: generate(plain(), widths=()), 'weight widths: an empty set'),
    'a width below the scheme': (lambda: generate(plain(), widths=(1, 4)), 'lsq goes down to W2A2'),
    'full precision as a width': (lambda: generate(plain(), widths=(4, FULL)), 'full precision'),
    'a width that is none': (lambda: generate(plain(), widths=(4, 20)), '20'),
    'hidden negative': (lambda: generate(plain(), hidden=-1), 'hidden must be 0 .* got -1'),
    'hidden a fraction': (lambda: generate(plain(), hidden=1.5), 'hidden must be 0 .* got 1.5'),
    'a float network': (lambda: generate(pretrained()), 'no quantized layers'),
    'generators twice': (lambda: generate(generate(plain())), 'generators already'),
    'all layers pinned': (lambda: generate(quantize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), LSQ(), example=torch.randn(4, 2), ends=Bits(8, 8))), 'pinned'),
    'a sampler of a float network': (lambda: policies_of(pretrained()), 'no quantized layers'),
    'no activation widths': (lambda: policies_of(plain(), a=()), 'activation widths: an empty set'),
    'too few activation bits': (lambda: policies_of(plain(), a=(1,)), 'W2A2'),
    'an unknown kind': (lambda: policies_of(plain(), kind='fair'), "got 'fair'"),
    'a range outside': (lambda: policies_of(plain(), mean=(1, 4)), 'within 2 to 8'),
    'no layers': (lambda: PolicySampler(()), 'layer names: an empty set'),
    'a mean outside': (lambda: tilted((2, 3), 4), 'within 2 to 3'),
    'no loss': (lambda: metaquantnet(policies_of(plain()), labels=False), 'needs a teacher'),
    'a pair for a policy': (lambda: at_policy(Bits(2, 2)), 'takes a Policy'),
    'another teacher': (lambda: step(plain(), metaquantnet(policies_of(plain()), small_cnn(7, image_size=8, width=4))), '7 classes, the network with 10'),
    "another network's sampler": (lambda: step(plain(), metaquantnet(PolicySampler(('conv9',)))), "'conv9', which is no quantized layer"),
    "another network's policy": (lambda: export_weights(generate(plain()), Policy({'conv9': Bits(2, 2)})), "'conv9', which is no quantized layer"),
    'fitness of it': (lambda: fitness(plain(), VAL, TRAIN)(Policy({'conv9': Bits(2, 2)})), "'conv9', which is no quantized layer"),
    'fitness of a float network': (lambda: fitness(pretrained(), VAL), 'no quantized layers'),
    'fitness without statistics': (lambda: fitness(plain(), VAL), 'bn_data'),
    'fitness without images': (lambda: fitness(plain(), (torch.zeros(0, 1, 8, 8), torch.zeros(0)), TRAIN), 'no images'),
}


@pytest.mark.parametrize('attempt, message', WRONG.values(), ids=WRONG)
def test_bad_input_is_one_clear_line(attempt, message):
    with pytest.raises(ValueError, match=message) as e: attempt()
    assert '\n' not in str(e.value) and len(str(e.value)) < 220


def test_a_refused_generator_changes_nothing():
    model = plain()
    before = state(model)
    for bad in ({'widths': ()}, {'widths': (1,)}, {'hidden': -2}):
        with pytest.raises(ValueError): generate(model, **bad)
    assert same(model, before)
