"Learned bitwidths: the rule against numbers made by hand, probes that leave no trace, resuming, and bits that move and settle on digits."
import copy, functools, json, math, warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn

from mebqat.mixed.adaqat import AdaQAT, probe, random_states, task_slope
from mebqat.mixed.fracbits import FracBits, between_widths, round_to_target
from mebqat.mixed.learned import WIDEST, Relaxed, Trajectory, rows_follow
from mebqat.bits import FP, FULL, Bits, Policy
from mebqat.cost import profile
from mebqat.data import load
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.methods import qat
from mebqat.models import small_cnn
from mebqat.explore.monitor import TrainingMonitor
from mebqat.quantizers import LSQ, SAT, DoReFa
from mebqat.train import Batches, Interrupted, TrainConfig, fit, make_optimizer

settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

pytestmark = pytest.mark.filterwarnings('ignore:lam=.* drove every width')
PAPER = SAT(rounding='original', shared_alpha=True)
SCHEMES = [LSQ(), LSQ(per_channel=True), PAPER, DoReFa(act_clip='pact')]
E8 = Bits(8, 8)


@functools.cache
def digits(): return load('digits', 'train')


@functools.cache
def _network(scheme, dropout, seed):
    torch.manual_seed(seed)
    net = small_cnn(width=8, image_size=8)
    if dropout: net.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(dropout))
    return quantize(net, scheme, example=digits().batch(torch.arange(256))[0], ends=E8)


def network(scheme=LSQ(), dropout=0., seed=0): return copy.deepcopy(_network(scheme, dropout, seed))
def batches(size=64): return Batches(digits(), size)
def batch(step=0, size=64): return batches(size)(step)
def costs(model): return profile(model, batch()[0][:1])
def weights(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def cross_entropy(model, bits, images):
    with torch.no_grad(), use_bits(twin := copy.deepcopy(model), bits): return F.cross_entropy(twin(images[0]), images[1]).item()


# One width

def scripted(width, slopes):
    for s in slopes: width.move(s)
    return width


@pytest.mark.parametrize('patience', [0, 3, 10])
def test_a_width_freezes_at_the_upper_of_two_when_its_returns_exceed_the_patience(patience):
    w = scripted(Relaxed(5.1, patience=patience), [.2, -.2]*patience)
    assert not w.frozen and w.crossings == ({5: patience} if patience else {})
    w.move(.2)
    assert (w.n, w.frozen) == (5, False)
    w.move(-.2)
    assert (w.n, w.frozen, w.crossings) == (6, True, {5: patience + 1})
    w.move(3.)
    assert w.n == 6


def test_crossings_count_by_the_width_they_came_from_and_downward_ones_not_at_all():
    w = scripted(Relaxed(4.5, patience=2), [1, 1, -1, -1, 1, -1, 1, -1])
    assert w.crossings == {3: 1, 4: 3} and w.frozen and w.n == 5
    assert scripted(Relaxed(8.), [.5]*10).crossings == {}


@pytest.mark.parametrize('rounding, value, n', [('ceil', 3.0, 3), ('ceil', 3.01, 4), ('ceil', 1.5, 2), ('nearest', 3.49, 3), ('nearest', 3.5, 4), ('nearest', 1.5, 2)])
def test_rounding(rounding, value, n): assert Relaxed(value, rounding=rounding).n == n


@pytest.mark.parametrize('low', [1, 2, 5])
def test_half_a_bit_below_the_smallest_width_it_freezes_there(low):
    w = scripted(Relaxed(low + .25, low), [.25, .25, .25])
    assert (w.n, w.frozen, w.near) == (low, False, low + 1)
    w.move(.0625)
    assert (w.n, w.frozen, w.value) == (low, True, low - .5)


@given(st.floats(2, 16), st.lists(st.floats(-5, 5), max_size=40), st.sampled_from(['ceil', 'nearest']), st.integers(0, 3))
def test_a_width_stays_in_its_range_and_a_frozen_one_stays_put(start, moves, rounding, patience):
    w = Relaxed(start, 2, rounding, patience)
    for by in moves:
        frozen, n = w.frozen, w.n
        w.move(by)
        assert 2 <= w.n <= WIDEST and abs(w.near - w.n) == 1 and w.near >= 2 and w.n in w.visited
        if frozen: assert w.frozen and w.n == n


def test_the_probe_at_an_integer_is_one_less_and_the_slope_has_its_sign():
    assert (Relaxed(4.).near, Relaxed(3.5).near, Relaxed(2.).near) == (3, 3, 3)
    assert task_slope(Relaxed(4.), 1., 1.5) == -.5 and task_slope(Relaxed(2.), 1.5, 1.) == -.5
    w = Relaxed(4.)
    assert [task_slope(w, 1., there, .5) for there in (2., 1., 1.)] == [-1., -.5, -.25]
    w.move(1.)
    assert task_slope(w, 1., 1.5, .5) == -.5


# A step

@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_a_step_moves_by_slopes_made_by_hand_and_trains_like_dedicated_training(scheme):
    start, images, lam, eta = Bits(4, 6), batch(), .03, .7
    model, plain = network(scheme), network(scheme)
    here, less_w, less_a = (cross_entropy(model, b, images) for b in (start, Bits(3, 6), Bits(4, 5)))
    method = AdaQAT(lam, eta, start)
    step = method(model, images, None)
    assert (step.forwards, step.backwards, step.pairs) == (3, 1, (start,)) and step.loss == pytest.approx(here, abs=1e-5)
    assert method.w['all'].value == pytest.approx(4 - eta*(here - less_w + lam*6), abs=1e-5)
    assert method.a['all'].value == pytest.approx(6 - eta*(here - less_a + lam*4), abs=1e-5)
    assert abs(here - less_w) > 1e-4 and abs(here - less_a) > 1e-4
    qat(start)(plain, images, None)
    assert same(weights(model), weights(plain))
    tables = {id(t) for q in (q for m in bit_layers(model).values() for q in (m.weight_quantizer, m.act_quantizer)) for t in q.parameters()}
    for p,q in zip(model.parameters(), plain.parameters()):
        if id(p) not in tables: assert torch.equal(p.grad, q.grad)
        elif p.grad is not None and len(p.grad) > 1: assert all(torch.equal(p.grad[i], q.grad[i]) for i in range(16) if q.grad[i].any())


@pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
def test_a_probe_touches_nothing_at_all(scheme):
    model = network(scheme, dropout=.3).train()
    optimizer, generator = make_optimizer(model, TrainConfig(10)), torch.Generator().manual_seed(3)
    for _ in range(2):
        qat(Bits(4, 4))(model, batch(), generator)
        optimizer.step()
    keep = lambda: (weights(model), {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None},
                    {f'{i}.{k}': v.clone() for i,s in optimizer.state_dict()['state'].items() for k,v in s.items() if v is not None},
                    {'torch': torch.get_rng_state(), 'method': generator.get_state(), **{n: torch.tensor(m.training) for n,m in model.named_modules()}})
    before, bits = keep(), {n: m.bits for n,m in bit_layers(model).items()}
    assert any('running_mean' in k for k in before[0]) and before[2]
    losses = [probe(model, b, batch(1), at) for b in (Bits(3, 4), Bits(4, 3)) for at in (None, random_states())]
    begun(AdaQAT(granularity='layer'), model, acts=True).next_layer(model, batch(1))
    for a,b in zip(before, keep()): assert same(a, b)
    assert bits == {n: m.bits for n,m in bit_layers(model).items()} and len(set(losses)) > 1


def test_a_probe_that_fails_still_puts_everything_back():
    model = network(dropout=.3).train()
    before, state = weights(model), torch.get_rng_state()
    model.fc.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError('no')))
    with pytest.raises(RuntimeError, match='no'): probe(model, Bits(4, 4), batch())
    assert same(weights(model), before) and torch.equal(torch.get_rng_state(), state)


def test_probes_share_the_dropout_of_the_training_pass():
    model, method = network(dropout=.5), AdaQAT(0., start=Bits(16, 16))
    torch.manual_seed(5)
    step = method(model.train(), batch(), None)
    row = method.trajectory.to_frame().iloc[0]
    assert abs(row.task_w) < .01 and abs(row.task_a) < .01
    assert abs(step.loss - probe(model, Bits(16, 16), batch())) > .01


def test_a_probe_that_is_no_number_is_an_error():
    model = network()
    method = AdaQAT()
    model.fc.register_forward_hook(lambda m, i, out: out if torch.is_grad_enabled() else out*math.nan)
    with pytest.raises(FloatingPointError, match='the loss at W7A8 is nan; lower the learning rate'): method(model, batch(), None)


# Learned steps of widths not visited

def test_rows_not_visited_move_along_and_their_ratio_stays():
    model, method = network(), AdaQAT(0., 1e-9, Bits(4, 4), rounding='nearest')
    table = model.block2.conv.act_quantizer.step.log_factor
    before = table.detach().clone()
    fit(model, method, batches(), TrainConfig(12, .01, 'adam'))
    moved = table.detach() - before
    assert moved[3].abs() > 5e-3 and torch.allclose(moved, moved[3].expand_as(moved), atol=1e-5)
    model, method = network(), AdaQAT(.2, 1., Bits(5, 5))
    fit(model, method, batches(), TrainConfig(12, .01, 'adam'))
    moved = (model.block2.conv.act_quantizer.step.log_factor.detach() - before).flatten()
    seen = method.a['all'].visited
    assert len(seen) > 2 and len({round(float(moved[n - 1]), 6) for n in seen}) == len(seen)
    assert len({round(float(moved[n - 1]), 5) for n in range(2, 17) if n not in seen}) == 1


def test_one_level_for_all_widths_has_no_rows_to_follow():
    model = network(PAPER)
    qat(Bits(4, 4))(model, batch(), None)
    before = model.block2.conv.act_quantizer.alpha.learned.grad.clone()
    rows_follow(model.block2.conv.act_quantizer, [4], [4])
    assert torch.equal(model.block2.conv.act_quantizer.alpha.learned.grad, before)


# What bits cost

def test_prices_of_all_four_kinds():
    model = network()
    cost = costs(model)
    macs = {l.name: l.macs for l in cost.layers}
    for granularity in ('global', 'layer'):
        for hardware in ('product', 'bitops'):
            method = begun(AdaQAT(.1, start=Bits(6, 4), granularity=granularity, hardware=hardware, cost=cost), model)
            for g in method.groups:
                share = sum(macs[n] for n in method.groups[g])/sum(macs.values()) if hardware == 'bitops' else 1
                assert method.price('w', g) == pytest.approx(.1*share*4) and method.price('a', g) == pytest.approx(.1*share*6)
    method.w['block2.conv'].value = 3.
    assert method.price('a', 'block2.conv') == pytest.approx(.1*macs['block2.conv']/sum(macs.values())*3)
    method = begun(AdaQAT(.1, granularity='layer', lam_acts=.05), model)
    method.w['block2.conv'].value = 2.
    assert method.price('a', 'block3.conv') == pytest.approx(.1*(2 + 8 + 8)/3)
    for r in method.w.values(): r.frozen = True
    assert method.price('a', 'block3.conv') == pytest.approx(.05*(2 + 8 + 8)/3)


def test_operations_are_the_slope_of_bit_operations():
    model = network()
    cost = costs(model)
    shares = begun(AdaQAT(hardware='bitops', cost=cost, granularity='layer'), model).shares
    assert [*shares] == ['block2.conv', 'block3.conv', 'block4.conv']
    policy = {n: Bits(5, 3) for n in shares}
    for n in shares:
        slope = cost.at(Policy(policy | {n: Bits(6, 3)})).bitops - cost.at(Policy(policy)).bitops
        assert shares[n]*3*sum(l.macs for l in cost.layers) == pytest.approx(slope)
    assert begun(AdaQAT(hardware='bitops', cost=cost), model).shares == {'all': pytest.approx(sum(shares.values()))}


# One layer at a time

def begun(method, model, acts=False):
    "A method that has taken hold of a network; with every weight width settled for `acts`."
    method.begin(model)
    if acts:
        for r in method.w.values(): r.frozen = True
    return method


def test_the_next_layer_is_the_largest_change_of_weights_then_the_smallest_of_inputs():
    model, images = network(), batch()
    method = begun(AdaQAT(start=Bits(3, 3), granularity='layer'), model)
    gaps, inputs = {}, {}
    for n,m in method.free.items():
        q = m.weight_quantizer
        gaps[n] = float((q(m.weight, 3) - q(m.weight, 2)).square().mean().detach())
        m.register_forward_pre_hook(lambda m, x, n=n: inputs.update({n: x[0].detach()}))
    ordered = sorted(gaps, key=gaps.get)
    assert method.next_layer(model, images) == ('w', ordered[-1])
    method.w[ordered[-1]].frozen = True
    assert method.next_layer(model, images) == ('w', ordered[-2])
    for r in method.w.values(): r.frozen = True
    chosen = method.next_layer(model, images)
    def change(m, x, width): return float((m.act_quantizer(x, width.n) - m.act_quantizer(x, width.near)).detach().square().mean())
    changes = {n: change(m, inputs[n], method.a[n]) for n,m in method.free.items()}
    assert chosen == ('a', min(changes, key=changes.get)) and len(set(changes.values())) == 3
    for r in method.a.values(): r.frozen = True
    assert method.next_layer(model, images) is None


def test_per_layer_one_width_moves_at_a_time_and_activations_wait():
    model = network()
    method = AdaQAT(.2, 3., granularity='layer', hardware='bitops', cost=costs(model), patience=1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        fit(model, method, batches(32), TrainConfig(150, .05))
    frame = method.trajectory.to_frame()
    widths = frame[[c for c in frame if c[:4] in ('N_w ', 'N_a ')]]
    assert (widths.diff().iloc[1:].ne(0).sum(axis=1) <= 1).all()
    assert (frame.n_a[frame.frozen_w < 3] == 8).all() and method.done and (frame.frozen_a.iloc[-1], frame.frozen_w.iloc[-1]) == (3, 3)
    turns = frame.layer[frame.frozen_w < 3]
    assert set(turns) == set(method.free) and (turns != turns.shift()).sum() == 3
    found = method.bits
    assert isinstance(found, Policy) and set(found) == {'block2.conv', 'block3.conv', 'block4.conv'} and all(b.w < 8 and b.a < 8 for b in found.values())
    with use_bits(model, found): assert model.fc.bits == E8


# Bits move and settle

@functools.cache
def trained(lam):
    method, model = AdaQAT(lam, .5), network()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        history = fit(model, method, batches(), TrainConfig(240, .05, warmup=20, epoch_steps=80))
    return method, history, [str(w.message) for w in said], model


def test_a_larger_price_leaves_a_smaller_product_of_widths():
    products = [trained(lam)[0].bits.w*trained(lam)[0].bits.a for lam in (.004, .03, .3)]
    assert 64 > products[0] > products[1] >= products[2] == 4 and products[0] >= 2*products[1]


def test_bits_settle_and_stay():
    method, history, said, _ = trained(.03)
    frame = method.trajectory.to_frame()
    assert method.done and not said and method.concerns() == [] and len(frame) == 240
    settled = frame[(frame.frozen_w == 1) & (frame.frozen_a == 1)]
    assert len(settled) > 40 and settled[['n_w', 'n_a', 'N_w', 'N_a']].nunique().tolist() == [1]*4
    assert settled.task_w.isna().all() and max(frame.crossings_w.max(), frame.crossings_a.max()) == 11
    assert (frame.loss.iloc[-40:].mean() < .2) and history.rows[-1]['weight bits'] == method.bits.w
    assert (frame.n_w == frame.N_w.map(math.ceil)).all()


def test_the_floor_is_said_with_the_price():
    method, _, said, _ = trained(.3)
    assert said == ['lam=0.3 drove every width to the floor; a smaller lam lets the loss decide'] and method.bits == Bits(2, 2)
    with pytest.warns(UserWarning, match='lam=0.3 drove every width to the floor'): assert method.widths() == Bits(2, 2)


def test_widths_that_never_moved_or_never_settled_are_said():
    method = AdaQAT(.001, .1)
    with pytest.raises(ValueError, match='before the first step'): method.widths()
    fit(network(), method, batches(), TrainConfig(3))
    with pytest.warns(UserWarning, match='no width has moved from W8A8 in 3 steps at eta=0.1 and lam=0.001'): method.widths()
    with pytest.warns(UserWarning, match='2 of 2 widths have not settled after 240 steps'): trained(.004)[0].widths()


@pytest.mark.parametrize('scheme', SCHEMES[1:], ids=repr)
@pytest.mark.parametrize('rounding, ema', [('ceil', 0.), ('nearest', .8)])
def test_every_scheme_and_variant_comes_down_from_the_start(scheme, rounding, ema):
    method = AdaQAT(.05, .5, rounding=rounding, ema=ema)
    fit(network(scheme), method, batches(32), TrainConfig(20, .05))
    assert max(method.bits.w, method.bits.a) < 8 and math.isfinite(method.trajectory.to_frame().task_w.sum())


def test_after_settling_it_is_plain_training_at_the_widths_found():
    method, _, _, model = trained(.03)
    one, other = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    again = AdaQAT(.03, .5)
    again.load_state_dict(method.state_dict())
    step = again(one, batch(), None)
    qat(method.bits)(other, batch(), None)
    for p in (*one.parameters(), *other.parameters()): assert p.grad is None or p.grad.isfinite().all()
    assert (step.forwards, step.backwards) == (1, 1) and same(weights(one), weights(other))
    assert all(p.grad is q.grad is None or torch.equal(p.grad, q.grad) for p,q in zip(one.parameters(), other.parameters()))


# Keeping and showing

def learners(kind, model):
    return {'global': lambda: AdaQAT(.05, .7), 'ema': lambda: AdaQAT(.05, .7, ema=.5, rounding='nearest'),
            'layer': lambda: AdaQAT(.3, 3., granularity='layer', patience=0, hardware='bitops', cost=costs(model)),
            'fracbits': lambda: FracBits(24, 1e6, costs(model), eta=2.)}[kind]()


@pytest.mark.parametrize('kind', ['global', 'ema', 'layer', 'fracbits'])
@pytest.mark.parametrize('at', [4, 17, 21])
@pytest.mark.filterwarnings('ignore')
def test_resuming_equals_not_stopping(tmp_path, kind, at):
    config, runs = TrainConfig(24, .05, seed=3, epoch_steps=8), []
    for stops in (False, True):
        model, done = network(dropout=.2), []
        if stops:
            with pytest.raises(Interrupted): fit(model, learners(kind, model), batches(32), config, tmp_path, on_step=lambda *_: done.append(1), stop=lambda: len(done) == at)
            model = network(dropout=.2, seed=1)
        method = learners(kind, model)
        history = fit(model, method, batches(32), config, tmp_path if stops else None, resume=stops)
        runs.append((weights(model), json.dumps(method.state_dict()), [{k: v for k,v in r.items() if k != 'seconds'} for r in history.rows]))
    assert same(runs[0][0], runs[1][0]) and runs[0][1:] == runs[1][1:]
    assert len(method.trajectory) == 24 and 'weight bits' in runs[0][2][0]


def test_a_checkpoint_of_other_settings_or_another_method_is_refused(tmp_path):
    config = TrainConfig(3)
    fit(network(), AdaQAT(.05), batches(), config, tmp_path)
    before = (tmp_path/'checkpoint.safetensors').read_bytes()
    with pytest.raises(ValueError, match='lam=0.05 there, 0.02 here'): fit(network(), AdaQAT(), batches(), config, tmp_path, resume=True)
    with pytest.raises(ValueError, match='another method'): fit(network(), qat(E8), batches(), config, tmp_path, resume=True)
    with pytest.raises(ValueError, match='granularity=global there, layer here'): fit(network(), AdaQAT(.05, granularity='layer'), batches(), config, tmp_path, resume=True)
    assert (tmp_path/'checkpoint.safetensors').read_bytes() == before
    done = AdaQAT(.05)
    assert len(fit(network(), done, None, config, tmp_path, resume=True)) == 1 and done.bits == E8


def test_one_object_is_one_training():
    method, model = AdaQAT(), network()
    fit(model, method, batches(), TrainConfig(2))
    fit(model, method, batches(), TrainConfig(2))
    assert method.steps == 4
    with pytest.raises(ValueError, match='begun on another network; make a new one'): fit(network(), method, batches(), TrainConfig(2))


def test_a_long_trajectory_is_thinned_evenly():
    t = Trajectory(10)
    for i in range(1, 101): t.add({'step': i, 'N_w': i/7})
    frame = t.to_frame()
    assert 5 <= len(t) <= 10 and frame.step.diff().dropna().nunique() == 1 and (frame.N_w == frame.step/7).all() and frame.step.max() > 85
    with pytest.raises(ValueError, match='before the first step'): Trajectory().plot()


def test_the_monitor_and_the_figures_show_the_bits():
    monitor, method = TrainingMonitor(seconds=0), AdaQAT(.1, .5)
    history = fit(network(), method, batches(), TrainConfig(12, epoch_steps=4), on_row=monitor)
    shown = {t.name: t for t in monitor.figure.data}
    names = ['weight bits', 'activation bits', 'relaxed weight bits', 'relaxed activation bits']
    assert all(list(shown[k].y) == [r[k] for r in history.rows] for k in names) and shown[names[2]].y[-1] < 8
    axes = {shown[k].yaxis for k in names}
    assert len(axes) == 1 and monitor.figure.layout[f'yaxis{axes.pop()[1:]}'].title.text == 'bits'
    assert not [t.name for t in history.plot().data if t.name.endswith(' bits')]
    figure = method.trajectory.plot('a title')
    assert [a.title.text for a in (figure.layout.yaxis, figure.layout.yaxis2, figure.layout.xaxis2)] == ['bits', 'nats a bit', 'step']
    assert list(figure.data[1].y) == list(method.trajectory.to_frame().n_w)


# FracBits

def test_real_widths_mix_the_two_neighbours_and_have_their_difference_as_slope():
    model, x = network().train(), batch()[0]
    names = ['block2.conv', 'block3.conv', 'block4.conv']
    reals = {n: tuple(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.25, 5.5)) for n in names}
    with between_widths(model, reals):
        layer = model.block3.conv
        inputs, kernel = layer.quantized(x.expand(-1, 16, -1, -1).relu())
    q, a = layer.weight_quantizer, layer.act_quantizer
    assert torch.allclose(kernel, .75*q(layer.weight, 2) + .25*q(layer.weight, 3), atol=1e-6)
    assert torch.allclose(inputs, (a(x.expand(-1, 16, -1, -1).relu(), 5) + a(x.expand(-1, 16, -1, -1).relu(), 6))/2, atol=1e-6)
    kernel.square().sum().backward()
    wanted = (2*kernel*(q(layer.weight, 3) - q(layer.weight, 2))).sum()
    assert float(reals['block3.conv'][0].grad) == pytest.approx(wanted.item(), rel=1e-3)
    assert not any(k.startswith('quantized_') for m in bit_layers(model).values() for k in vars(m)) and layer.bits == FP
    with pytest.raises(ZeroDivisionError):
        with between_widths(model, reals): 1/0
    assert not any(k.startswith('quantized_') for m in bit_layers(model).values() for k in vars(m))


def test_the_cost_at_integer_widths_is_the_cost_of_the_policy():
    model = network()
    cost = costs(model)
    for measure in ('bitops', 'bytes'):
        target = getattr(cost.at(Bits(4, 4)), 'bitops' if measure == 'bitops' else 'weight_bytes')
        method = begun(FracBits(10, target, cost, measure), model)
        w, a = ({n: v for n,v in zip(method.groups, widths)} for widths in ((3, 5, 4), (7, 2, 4)))
        found = cost.at(Policy({n: Bits(w[n], a[n]) for n in w}))
        assert method.amount(w, a) == pytest.approx(found.bitops if measure == 'bitops' else found.weight_bytes)
        assert {r.value for r in method.w.values()} == {4.5}


def test_a_shared_tensor_costs_its_widest_reader():
    class Twins(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fc = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
            self.b.weight = self.a.weight
        def forward(self, x): return self.fc(self.b(self.a(x)))
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    model = quantize(Twins(), LSQ(), example=x, skip='none')
    cost = profile(model, x)
    method = begun(FracBits(10, cost.at(Bits(4, 4)).weight_bytes, cost, 'bytes'), model)
    for wide in ((2, 8, 3), (8, 2, 3), (5, 5, 5)):
        w = dict(zip('ab', wide)) | {'fc': wide[2]}
        assert method.amount(w, w) == cost.at(Policy({n: Bits(b, b) for n,b in w.items()})).weight_bytes
    reals = {n: torch.tensor(v, requires_grad=True) for n,v in (('a', 2.5), ('b', 4.5), ('fc', 3.))}
    method.amount(reals, reals).backward()
    assert (reals['a'].grad, float(reals['b'].grad), float(reals['fc'].grad)) == (None, 32, 6)


@given(st.lists(st.floats(2, 8), min_size=1, max_size=8), st.integers(0, 60), st.integers(0, 10**6))
def test_rounding_to_a_target_stays_within_and_wastes_no_common_step(values, slack, seed):
    sizes = torch.randint(1, 9, (len(values),), generator=torch.Generator().manual_seed(seed)).tolist()
    total = lambda widths: sum(n*w for n,w in zip(sizes, widths))
    target = 2*sum(sizes) + slack
    found = round_to_target(values, [2]*len(values), total, target)
    assert total(found) <= target and all(2 <= n <= WIDEST for n in found)
    wider = [min(n + 1, WIDEST) for n in found]
    assert total(wider) > target or found == wider
    order = sorted(range(len(values)), key=values.__getitem__)
    assert [found[i] for i in order] == sorted(found)


@pytest.mark.parametrize('measure, granularity', [('bitops', 'layer'), ('bytes', 'layer'), ('bitops', 'global')])
def test_fracbits_lands_within_its_target(measure, granularity):
    model = network()
    cost = costs(model)
    spent = lambda bits: cost.at(bits).bitops if measure == 'bitops' else cost.at(bits).weight_bytes
    target = 1.02*spent(Bits(3, 3))
    method = FracBits(60, target, cost, measure, granularity=granularity, share=.75)
    fit(model, method, batches(32), TrainConfig(60, .05))
    frame = method.trajectory.to_frame()
    assert method.done and spent(method.widths()) <= target and spent(method.bits) > .75*target
    assert frame.hard.sum() == 15 and frame.cost.iloc[-1] == pytest.approx(spent(method.bits)/target)
    assert (frame.N_w[:40] % 1 != 0).any() and frame.loss.iloc[-10:].mean() < frame.loss.iloc[:10].mean()


def test_fracbits_says_when_its_widths_are_still_real():
    model = network()
    method = FracBits(100, 6e5, costs(model))
    fit(model, method, batches(), TrainConfig(3))
    with pytest.warns(UserWarning, match='become integers after step 80, and 3 steps were trained'): method.widths()


# Bad input

@pytest.mark.parametrize('options, words', [
    ({'lam': -1}, 'lam must be 0 or more and finite, got -1'), ({'lam': math.nan}, 'lam .* got nan'), ({'eta': 0}, 'eta must be positive'),
    ({'lam_acts': -1.}, 'lam_acts'), ({'granularity': 'channel'}, "'channel'"), ({'hardware': 'watts'}, "'watts'"), ({'hardware': 'bitops'}, 'needs cost='),
    ({'rounding': 'floor'}, "'floor'"), ({'ema': 1.}, 'ema must'), ({'patience': -1}, 'patience'), ({'start': Bits(FULL, 8)}, 'WFPA8'),
    ({'start': '8,8'}, '8,8'), ({'floor': 16}, 'floor'), ({'floor': 0}, 'floor')], ids=str)
def test_bad_settings_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as e: AdaQAT(**options)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('options, words', [
    ({'steps': 0}, 'steps'), ({'target': 0.}, 'target must be positive'), ({'target': math.inf}, 'target'), ({'measure': 'joules'}, "'joules'"), ({'share': 0}, 'share'),
    ({'start': 40.}, 'start'), ({'kappa': -1}, 'kappa'), ({'granularity': 'x'}, "'x'")], ids=str)
def test_bad_targets_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words) as e: FracBits(**{'steps': 10, 'target': 1e5, 'cost': None} | options)
    assert '\n' not in str(e.value)


def test_networks_that_cannot_be_learned_on_are_refused():
    lonely = quantize(small_cnn(width=4, image_size=8), LSQ(), example=batch()[0], skip=lambda name, layer: True, ends=E8)
    other = quantize(small_cnn(width=4, image_size=8), LSQ(), example=batch()[0], skip='none')
    for model, method, words in ((small_cnn(image_size=8), AdaQAT(), 'no quantized layers'), (lonely, AdaQAT(), 'every quantized layer is pinned'),
                                 (network(), AdaQAT(start=Bits(1, 4)), 'start=W1A4 is below W2A2'), (network(), AdaQAT(start=Bits(4, 4), floor=5), 'start=W4A4 is below W5A5'),
                                 (other, AdaQAT(hardware='bitops', cost=profile(nn.Sequential(nn.Linear(3, 3)), (1, 3))), "does not know layer 'block1.conv'"),
                                 (network(), FracBits(10, 1., costs(network())), r'target=1 bitops is out of reach: this network goes from'),
                                 (network(), FracBits(10, 1e12, costs(network())), 'out of reach')):
        before = weights(model)
        with pytest.raises(ValueError, match=words) as e: fit(model, method, batches(), TrainConfig(2))
        assert '\n' not in str(e.value) and same(weights(model), before)


def test_the_floor_follows_the_scheme_and_the_signs():
    model = quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), DoReFa(), example=torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), skip='none')
    method = begun(AdaQAT(floor=1), model)
    assert (method.w['all'].low, method.a['all'].low) == (1, 2)
    assert begun(AdaQAT(), network()).w['all'].low == 2
