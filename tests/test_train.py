"Training: resumes bit for bit, survives interruptions, full disks and bad files, and does exactly the steps a method says."
import copy, errno, functools, json, math, os, re, shutil, signal, subprocess, sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, Dataset
from typer.testing import CliRunner

from mebqat.bits import FP, FULL, Bits, BitSpace, Policy
from mebqat.cli import app
from mebqat.files import load_whole, save_whole
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.methods import (BitwidthTraining, Step, adabits, any_precision, average_gradients, float_training, mebqat, qat,
                            soft_cross_entropy)
from mebqat.quantizers import LSQ, SAT, DoReFa
from mebqat.steps import WidthTable
from mebqat.runs import open_run, spec_of, train_run
from mebqat.runs.run_folder import run_record, writing
from mebqat.seeds import generator_for, seed_for
from mebqat.train import Batches, History, Interrupted, TrainConfig, fit, gentle_interrupt, make_optimizer

STOPS = [getattr(signal, n) for n in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, n)]
settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

SPACE = BitSpace.parse('W2A2 W4A4 W8A8 W3AFP FP')


class Images:
    "A toy pool: noisy images whose class is where they are bright."
    def __init__(self, n=96):
        g = torch.Generator().manual_seed(0)
        self.y = torch.randint(4, (n,), generator=g)
        self.x = torch.randn(n, 2, 8, 8, generator=g)
        for i,y in enumerate(self.y): self.x[i, :, 4*(y//2):4*(y//2) + 4, 4*(y % 2):4*(y % 2) + 4] += 1

    def __len__(self): return len(self.y)
    def batch(self, i): return self.x[i], self.y[i]


IMAGES = Images()


def shaky(x, generator): return x + .1*torch.randn(x.shape, generator=generator)


def network(scheme=LSQ(), bn='running', seed=0):
    "A small network with everything that could go astray on resuming: batch norm, dropout, 4-D weights."
    return copy.deepcopy(_network(scheme, bn, seed))


@functools.cache
def _network(scheme, bn, seed):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8),
                        nn.ReLU(), nn.Dropout(.2), nn.Conv2d(8, 8, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4))
    return quantize(net, scheme, example=IMAGES.x, bn=bn, space=SPACE if bn == 'switchable' else None) if scheme else net


def batches(seed=0): return Batches(IMAGES, 16, seed, shaky)
def weights(model): return {k: v.clone() for k,v in model.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def validate(model): return {'norm': float(sum(p.detach().square().sum() for p in model.parameters()))}
def leftovers(folder): return sorted(p.name for p in Path(folder).rglob('*') if p.is_file() and p.name != '.writer.lock')


def cut(batch_at, *steps):
    "The same batches, with a Ctrl-C in the middle of these steps."
    left = set(steps)
    def f(step):
        if step in left:
            left.discard(step)
            signal.raise_signal(signal.SIGINT)
        return batch_at(step)
    return f


# Resuming

@pytest.mark.parametrize('optimizer, schedule', [('sgd', 'cosine'), ('sgd', 'step'), ('adam', 'constant'), ('adamw', 'cosine')])
def test_resumed_training_is_bit_for_bit_the_same(tmp_path, optimizer, schedule):
    config = TrainConfig(16, .01, optimizer, schedule=schedule, warmup=3, milestones=(9, 14), seed=5, epoch_steps=6)
    method, straight = mebqat(SPACE), network()
    wanted = fit(straight, method, batches(), config, validate=validate)
    for at in (0, 7, 11):
        parts = network()
        with pytest.raises(Interrupted, match=f'stopped after step {at + 1} of 16.*--resume'):
            fit(parts, method, cut(batches(), at), config, tmp_path/str(at), validate=validate)
        fresh = network(seed=9)
        got = fit(fresh, method, batches(), config, tmp_path/str(at), resume=True, validate=validate)
        assert same(weights(fresh), weights(straight))
        rows, wanted_rows = ([{k: v for k,v in r.items() if k != 'seconds'} for r in h.rows] for h in (got, wanted))
        assert rows == wanted_rows


@pytest.mark.parametrize('scheme, bn', [(LSQ(per_channel=True), 'running'), (DoReFa(), 'batch'), (SAT(), 'reestimate'), (LSQ(), 'switchable'),
                                        (None, 'running')])
def test_resuming_twice_with_any_scheme_and_batch_norm(tmp_path, scheme, bn):
    config = TrainConfig(16, .02, seed=1, epoch_steps=5)
    method, straight = mebqat(SPACE) if scheme else float_training(), network(scheme, bn)
    fit(straight, method, batches(), config)
    for seed, at in ((0, 2), (3, 8)):
        with pytest.raises(Interrupted): fit(network(scheme, bn, seed), method, cut(batches(), at), config, tmp_path, resume=True)
    last = network(scheme, bn, 4)
    fit(last, method, batches(), config, tmp_path, resume=True)
    assert same(weights(last), weights(straight))
    assert len(fit(network(scheme, bn), method, None, config, tmp_path, resume=True)) == 4


def test_the_global_generator_neither_matters_nor_is_touched():
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        net = copy.deepcopy(START)
        fit(net, mebqat(SPACE), batches(), TrainConfig(4))
        assert torch.equal(torch.get_rng_state(), before)
        runs.append(weights(net))
    assert same(*runs)


START = network()


def test_a_seed_decides_and_another_seed_decides_otherwise(tmp_path):
    common = dict(method='mebqat', width=4, epochs=.5, batch_size=256, bits='W2A2 W4A4 FP')
    runs = {name: train_run(spec_of(seed=seed, **common), tmp_path/name) for name,seed in (('a', 0), ('b', 0), ('c', 1))}
    a, b, c = (weights(r.model) for r in runs.values())
    assert same(a, b) and a.keys() == c.keys() and not torch.equal(a['block2.conv.weight'], c['block2.conv.weight'])
    assert same(weights(open_run(tmp_path/'a').model), a)
    files = [(tmp_path/n/'model.safetensors').stat().st_mode & 0o777 for n in 'ab']
    (tmp_path/'plain').touch()
    assert set(files) == {(tmp_path/'plain').stat().st_mode & 0o777}


@given(st.integers(), st.lists(st.text(max_size=4) | st.integers(), max_size=3))
def test_seeds_are_stable_and_fit_a_generator(seed, purpose):
    s = seed_for(seed, *purpose)
    assert s == seed_for(seed, *purpose) and 0 <= s < 2**63
    generator_for(seed, *purpose)
    assert seed_for(seed, *purpose, 'x') != s != seed_for(seed + 1, *purpose)


def test_seeds_are_the_same_on_every_machine():
    assert seed_for(0, 'order', 3) == 8307221573466005009


def test_batches_pass_over_every_image_once_and_differ_by_epoch_and_seed():
    plain = Batches(IMAGES, 16, seed=0)
    epochs = [torch.cat([plain(6*e + i)[0] for i in range(plain.per_epoch)]) for e in range(2)]
    for e in epochs: assert torch.equal(e.flatten(1).sum(1).sort().values, IMAGES.x.flatten(1).sum(1).sort().values)
    assert not torch.equal(*epochs) and not torch.equal(Batches(IMAGES, 16, seed=1)(0)[0], plain(0)[0])
    assert torch.equal(batches()(7)[0], batches()(7)[0]) and not torch.equal(batches()(7)[0], plain(7)[0])
    for bad in (0, -1, 97):
        with pytest.raises(ValueError, match=f'{bad}'): Batches(IMAGES, bad)


# Ctrl-C and kill, for real

def command(out, *more):
    return [sys.executable, '-m', 'mebqat.cli', 'train', '--out', str(out), '--width', '4', '--epochs', '5', '--batch-size', '32',
            '--optimizer', 'adam', '--lr', '.003', '--bits', 'W2A2 W4A4 FP', '--seed', '3', '--augment', '--no-compile', *more]


SPEC = spec_of('mebqat', width=4, epochs=5, batch_size=32, optimizer='adam', lr=.003, bits='W2A2 W4A4 FP', seed=3, augment=True)


@contextmanager
def under_way(folder, *more):
    "A training process that has finished its first epoch."
    p = subprocess.Popen(command(folder, *more), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first = ''.join(p.stderr.readline() for _ in range(3))  # the data, the heading and the row of an epoch
        assert re.search(r'^ *33/165 .*\n\Z', first, re.M), first + p.stderr.read()
        yield p
    finally:
        p.kill()
        p.communicate()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    "Tensors of the run that nobody disturbed."
    return weights(train_run(SPEC, tmp_path_factory.mktemp('whole')/'run').model)


def test_ctrl_c_stops_cleanly_and_resume_finishes_bit_for_bit(tmp_path, uninterrupted):
    with under_way(tmp_path/'run') as p:
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=120)
    last = err.strip().splitlines()[-1]
    assert p.returncode == 130 and out == '' and 'Traceback' not in err
    done, total = map(int, re.fullmatch(r'stopped after step (\d+) of (\d+); go on with resume \(--resume\) from .*run', last).groups())
    assert 33 <= done < total and load_whole(tmp_path/'run'/'checkpoint.safetensors')[1]['step'] == done
    assert leftovers(tmp_path) == ['checkpoint.safetensors', 'run.json']
    again = subprocess.run(command(tmp_path/'run'), capture_output=True, text=True)
    assert again.returncode == 2 and '--resume' in again.stderr and len(again.stderr.splitlines()) == 1
    rest = subprocess.run(command(tmp_path/'run', '--resume'), capture_output=True, text=True)
    assert rest.returncode == 0, rest.stderr
    assert same(load_whole(tmp_path/'run'/'model.safetensors')[0], uninterrupted)


def test_a_killed_run_leaves_a_checkpoint_that_goes_on(tmp_path, uninterrupted):
    with under_way(tmp_path/'run') as p: p.send_signal(signal.SIGKILL)
    assert p.returncode == -signal.SIGKILL
    tensors, about = load_whole(tmp_path/'run'/'checkpoint.safetensors')
    assert about['step'] % 33 == 0 and about['step'] > 0 and all(t.isfinite().all() for t in tensors.values())
    with pytest.raises(ValueError, match='unfinished'): open_run(tmp_path/'run')
    assert same(weights(train_run(SPEC, tmp_path/'run', resume=True).model), uninterrupted)


def test_the_first_ctrl_c_is_gentle_and_the_second_is_not():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job starts with SIGINT ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            with gentle_interrupt() as flag:
                signal.raise_signal(signal.SIGINT)
                assert flag['stop']
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally: signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize('signum', STOPS, ids=lambda s: s.name)
def test_a_signal_saves_as_ctrl_c_does_and_resume_finishes_bit_for_bit(tmp_path, uninterrupted, signum):
    with under_way(tmp_path/'run') as p:
        for _ in range(1 + (signum == signal.SIGHUP)): p.send_signal(signum)  # SIGHUP comes twice where shell and terminal both send it
        out, err = p.communicate(timeout=120)
    assert p.returncode == 128 + signum and out == '' and 'Traceback' not in err
    assert f'go on with resume (--resume) from {tmp_path}/run' in err.strip().splitlines()[-1]
    assert load_whole(tmp_path/'run'/'checkpoint.safetensors')[1]['step'] >= 33
    assert same(weights(train_run(SPEC, tmp_path/'run', resume=True).model), uninterrupted)


def test_a_hangup_that_is_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with gentle_interrupt() as flag: signal.raise_signal(signal.SIGHUP)
        assert flag == {'stop': False, 'signal': None} and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally: signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize('signum', STOPS, ids=lambda s: s.name)
def test_the_second_signal_of_any_kind_acts_as_usual(signum):
    before = {s: signal.signal(s, signal.default_int_handler) for s in STOPS}
    try:
        with pytest.raises(KeyboardInterrupt):
            with gentle_interrupt() as flag:
                signal.raise_signal(STOPS[0])
                assert flag == {'stop': True, 'signal': STOPS[0]}
                signal.raise_signal(signum)
    finally:
        for s,handler in before.items(): signal.signal(s, handler)


def test_training_works_outside_the_main_thread():
    from threading import Thread
    done = []
    t = Thread(target=lambda: done.append(fit(network(), qat(Bits(4, 4)), batches(), TrainConfig(2))))
    t.start()
    t.join()
    assert len(done[0]) == 1


# Numbers that are none

def spoiled(at, what):
    "Dedicated training whose loss, or gradient, turns into NaN."
    method = qat(Bits(4, 4))
    def f(model, batch, generator):
        seen = method(model, batch, generator)
        if f.step == at and what == 'gradient': model[0].weight.grad.fill_(math.nan)
        f.step += 1
        return Step(math.nan, *list(vars(seen).values())[1:]) if f.step == at + 1 and what == 'loss' else seen
    f.step = 0
    return f


@pytest.mark.parametrize('at', [5, 9])
def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path, at):
    net = network()
    with pytest.raises(FloatingPointError, match=f'nan at step {at} of 12.*lower the learning rate.*checkpoint is in'):
        fit(net, spoiled(at, 'loss'), batches(), TrainConfig(12, .01, epoch_steps=4), tmp_path)
    tensors, about = load_whole(tmp_path/'checkpoint.safetensors')
    assert about['step'] == at//4*4 and all(t.isfinite().all() for t in tensors.values()) and leftovers(tmp_path) == ['checkpoint.safetensors']
    assert all(p.isfinite().all() for p in net.parameters())


def test_a_spoiled_weight_is_never_saved(tmp_path):
    with pytest.raises(FloatingPointError, match='0.weight is not finite after step 8; lower the learning rate'):
        fit(network(), spoiled(7, 'gradient'), batches(), TrainConfig(12, .01, epoch_steps=4), tmp_path)
    assert load_whole(tmp_path/'checkpoint.safetensors')[1]['step'] == 4


def test_without_a_checkpoint_none_is_promised(tmp_path):
    for out in (None, tmp_path):
        with pytest.raises(FloatingPointError) as e: fit(network(), spoiled(1, 'loss'), batches(), TrainConfig(12, .01, epoch_steps=4), out)
        assert 'checkpoint' not in str(e.value)


def test_a_rate_that_blows_up_is_said_on_the_command_line(tmp_path):
    done = CliRunner().invoke(app, ['train', '--out', str(tmp_path/'run'), '--width', '4', '--method', 'float', '--lr', '1e30', '--epochs', '3',
                                    '--batch-size', '256'])
    assert done.exit_code == 2 and 'lower the learning rate' in done.stderr.splitlines()[-1] and done.stdout == ''
    assert leftovers(tmp_path/'run') in (['run.json'], ['checkpoint.safetensors', 'run.json'])


# Gradients and steps

def alone(model, pairs, batch, teacher=False):
    "Gradient of each pair by itself, on copies; the teacher's logits come from the first pair."
    (x, y), out, taught = batch, [], None
    for i,bits in enumerate(pairs):
        torch.manual_seed(0)
        copied = copy.deepcopy(model)
        with use_bits(copied, bits): logits = copied(x)
        loss = F.cross_entropy(logits, y)
        if teacher and i: loss = loss - (taught.softmax(1)*F.log_softmax(logits, 1)).sum()/len(y)
        else: taught = logits.detach()
        loss.backward()
        out.append({n: p.grad for n,p in copied.named_parameters()})
    return out


@pytest.mark.parametrize('scheme', [LSQ(), LSQ(shared_step=True), SAT(), DoReFa()], ids=repr)
@pytest.mark.parametrize('teacher', [False, True])
def test_a_step_leaves_the_mean_gradient_of_the_tasks_that_took_part(scheme, teacher):
    pairs = [FP, Bits(2, 4), Bits(2, FULL), Bits(8, 4)]
    model, batch = network(scheme, 'batch'), IMAGES.batch(slice(0, 32))
    model[6].p = 0.
    apart = alone(model, pairs, batch, teacher)
    method = BitwidthTraining('these', tuple(pairs), teacher='full' if teacher else 'none', clamp=None)
    method(model, batch, generator_for(0))
    tables = {n + '.log_factor': m for n,m in model.named_modules() if isinstance(m, WidthTable)}
    for n,p in model.named_parameters():
        grads = [g[n] for g in apart]
        total = sum(g for g in grads if g is not None) if any(g is not None for g in grads) else None
        if total is None: assert p.grad is None
        elif n not in tables: assert_close(p.grad, total/4, rtol=1e-4, atol=1e-6)
        else:
            widths = [b.w if 'weight_quantizer' in n else b.a for b in pairs]
            for row in range(len(p)):
                took = sum(w != FULL and tables[n].row(w) == row for w in widths)
                assert_close(p.grad[row], total[row]/max(took, 1), rtol=1e-4, atol=1e-6)


def test_switchable_norms_average_over_their_own_tasks():
    pairs = [FP, Bits(2, 2), Bits(2, 2), Bits(8, 8)]
    model, batch = network(LSQ(), 'switchable').train(), IMAGES.batch(slice(0, 32))
    model[6].p = 0.
    apart = alone(model, pairs, batch)
    BitwidthTraining('these', tuple(pairs), clamp=None)(model, batch, generator_for(0))
    for key, took in (('FP', 1), ('W2A2', 2), ('W8A8', 1), ('W4A4', 0)):
        p, name = model[1].norms[key].weight, f'1.norms.{key}.weight'
        if not took: assert p.grad is None
        else: assert_close(p.grad, sum(g[name] for g in apart if g[name] is not None)/took, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('method, forwards', [
    (mebqat(SPACE), 4), (mebqat(SPACE, n_tasks=7), 7), (mebqat(SPACE, guaranteed=[FP, Bits(2, 2)]), 4), (qat(Bits(3, 3)), 1), (float_training(), 1),
    (adabits(SPACE), 5), (any_precision(SPACE), 5), (any_precision([Bits(2, 2)]), 2)], ids=lambda m: getattr(m, 'name', m))
def test_a_step_does_exactly_the_passes_it_says(method, forwards):
    model, counts = network(), {'forward': 0, 'backward': 0}
    def back(_): counts['backward'] += 1
    def forth(m, i, out):
        counts['forward'] += 1
        out.register_hook(back)
    model.register_forward_hook(forth)
    seen = method(model, IMAGES.batch(slice(0, 16)), generator_for(0))
    assert counts == {'forward': forwards, 'backward': forwards} and (seen.forwards, seen.backwards, len(seen.pairs)) == (forwards,)*3
    assert {str(m.bits) for m in bit_layers(model).values()} == {'FP'}


def test_mebqat_always_has_full_precision_first_and_draws_the_rest_from_its_space():
    drawn = [mebqat(SPACE).pairs(generator_for(0, i)) for i in range(300)]
    assert all(p[0] == FP and len(p) == 4 for p in drawn) and {b for p in drawn for b in p[1:]} == set(SPACE)
    with pytest.raises(ValueError, match='n_tasks=1'): mebqat(SPACE, 1, [FP, Bits(1, 1)])
    with pytest.raises(ValueError, match='full precision'): mebqat(SPACE, 4, [Bits(2, 2)])
    assert mebqat(SPACE, 4, [Bits(2, 2)], distill=False).pairs(generator_for(0))[0] == Bits(2, 2)


def test_lists_are_walked_from_the_widest_down():
    cost = [b.w*b.a for b in adabits(SPACE).fixed]
    assert set(adabits(SPACE).fixed) == set(SPACE) and cost == sorted(cost, reverse=True) and adabits(SPACE).fixed[0] == FP
    assert any_precision([Bits(2, 2), Bits(8, 8)]).fixed == (FP, Bits(8, 8), Bits(2, 2))


def test_any_precision_is_taught_by_the_pair_before_and_sees_labels_once():
    model, batch = network(LSQ(), 'batch'), IMAGES.batch(slice(0, 32))
    model[6].p = 0.
    copied, losses, before = copy.deepcopy(model), [], None
    for bits in (FP, Bits(8, 8), Bits(2, 2)):
        with use_bits(copied, bits): logits = copied(batch[0])
        taught = before is not None
        losses.append(-(before.softmax(1)*logits.log_softmax(1)).sum(1).mean() if taught else F.cross_entropy(logits, batch[1]))
        before = logits.detach()
    seen = any_precision([Bits(2, 2), Bits(8, 8)])(model, batch, generator_for(0))
    assert seen.loss == pytest.approx(float(sum(losses).detach())/3, rel=1e-5)


def test_soft_cross_entropy_is_divergence_plus_entropy_and_spares_the_teacher():
    a, b = (torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in 'ab')
    p = b.detach().softmax(1)
    wanted = F.kl_div(a.log_softmax(1), p, reduction='batchmean') - (p*p.log()).sum(1).mean()
    loss = soft_cross_entropy(a, b)
    assert_close(loss, wanted)
    loss.backward()
    assert b.grad is None
    assert_close(a.grad, (a.detach().softmax(1) - p)/5)


@pytest.mark.parametrize('clamp', [None, 1e-3, 10.])
def test_gradients_are_clamped_element_by_element(clamp):
    model = network()
    (sum(p.square().sum() for p in model.parameters())*50).backward()
    free = {n: p.grad.clone() for n,p in model.named_parameters()}
    average_gradients(model, [Bits(4, 4)], clamp)
    for n,p in model.named_parameters(): assert torch.equal(p.grad, free[n] if clamp is None else free[n].clamp(-clamp, clamp))
    assert any(g.abs().max() > 10 for g in free.values())


def test_methods_clamp_at_ten_unless_told_otherwise():
    assert {m.clamp for m in (mebqat(SPACE), qat(FP), adabits(SPACE), any_precision(SPACE), float_training())} == {10.}
    model = network()
    with torch.no_grad(): model[10].weight.mul_(1e4)
    qat(Bits(4, 4))(model, IMAGES.batch(slice(0, 16)), generator_for(0))
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) == 10


def small(seed=0):
    "A network without batch norm and dropout, so that calls repeat exactly."
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4, 4))
    return quantize(net, LSQ(), example=IMAGES.x, skip='none')


METHODS = [mebqat(SPACE), mebqat(SPACE, n_tasks=1), qat(Bits(2, 2)), qat(Policy({'2': Bits(2, 2)})), adabits(SPACE), any_precision(SPACE), float_training()]
every_method = pytest.mark.parametrize('method', METHODS, ids=lambda m: f'{m.name}-{len(m.fixed) + m.n_random}')


def gradients(model): return {n: p.grad.clone() for n,p in model.named_parameters() if p.grad is not None}


@every_method
def test_gradients_of_calls_add_up(method):
    parts, seeds = [IMAGES.batch(slice(0, 16)), IMAGES.batch(slice(16, 48)), IMAGES.batch(slice(48, 64))], range(3)
    together, apart = small(), []
    for part, seed in zip(parts, seeds):
        one = small()
        method(one, part, generator_for(seed))
        method(together, part, generator_for(seed))
        apart.append(gradients(one))
    for n,g in gradients(together).items(): assert_close(g, sum(a[n] for a in apart if n in a), rtol=1e-5, atol=1e-7, msg=lambda m: f'{n}: {m}')


@every_method
def test_an_earlier_gradient_is_neither_divided_nor_cut(method):
    model, batch = small(), IMAGES.batch(slice(0, 32))
    method(model, batch, generator_for(1))
    alone = gradients(model)
    model.zero_grad()
    (1000*sum(p.sum() for p in model.parameters())).backward()
    held = {n: p.grad for n,p in model.named_parameters()}
    method(model, batch, generator_for(1))
    for n,p in model.named_parameters():
        assert_close(p.grad, 1000 + alone.get(n, torch.zeros_like(p)), rtol=1e-6, atol=0)
        assert p.grad is held[n]  # what an optimizer or a hook holds on to


@every_method
def test_a_step_that_fails_leaves_the_gradients_as_they_were(method):
    model, (x, y) = small(), IMAGES.batch(slice(0, 32))
    method(model, (x, y), generator_for(1))
    held = {n: (p.grad, p.grad.clone()) for n,p in model.named_parameters() if p.grad is not None}
    for fails_at in range(1, 1 + min(3, len(method.pairs(generator_for(0))))):
        calls = []
        def fail(*_):
            calls.append(1)
            if len(calls) == fails_at: raise KeyError('stop')
        for hooked in (model[5].register_forward_hook(fail), model[5].register_full_backward_hook(fail)):
            calls.clear()
            with pytest.raises(KeyError): method(model, (x, y), generator_for(2))
            hooked.remove()
            assert all(p.grad is held[n][0] and torch.equal(p.grad, held[n][1]) if n in held else p.grad is None for n,p in model.named_parameters())
            assert {str(m.bits) for m in bit_layers(model).values()} == {'FP'}
    with pytest.raises(ValueError, match='labels'): method(model, (x, y + 9), generator_for(0))
    assert all(torch.equal(p.grad, held[n][1]) for n,p in model.named_parameters() if n in held)


@pytest.mark.parametrize('method', [qat(Bits(2, 2)), mebqat(SPACE), adabits([Bits(4, 4)]), any_precision([Bits(4, 4)]), qat(Policy({'0': Bits(2, 2)}))], ids=lambda m: m.name)
def test_a_network_without_bits_is_not_trained_at_any(method):
    torch.manual_seed(0)
    for net in (network(None), nn.Sequential(nn.Flatten(), nn.Linear(128, 4))):
        with pytest.raises(ValueError, match=r'no bits.*quantize\(model, scheme, example=\.\.\.\)'): method(net, IMAGES.batch(slice(0, 16)), generator_for(0))
        assert all(p.grad is None for p in net.parameters())
        assert float_training()(net, IMAGES.batch(slice(0, 16)), generator_for(0)).loss > 0
    with pytest.raises(ValueError, match='no bits'): fit(network(None), method, batches(), TrainConfig(3))


@pytest.mark.parametrize('bound', [1e-3, 1e-2, 10., None])
def test_a_step_counts_what_its_bound_cut(bound):
    model, free = small(), small()
    pairs = (FP, Bits(2, 2), Bits(4, 8))
    BitwidthTraining('these', pairs, clamp=None)(free, IMAGES.batch(slice(0, 32)), generator_for(0))
    step = BitwidthTraining('these', pairs, clamp=bound)(model, IMAGES.batch(slice(0, 32)), generator_for(0))
    wanted = gradients(free)
    assert step.clamped == (0 if bound is None else sum(int((g.abs() > bound).sum()) for g in wanted.values()))
    assert (step.clamped > 0) == (bound in (1e-3, 1e-2))
    for n,g in gradients(model).items(): assert torch.equal(g, wanted[n] if bound is None else wanted[n].clamp(-bound, bound))


def test_any_precision_walks_from_the_most_bit_operations_down():
    pairs = [Bits(2, 8), Bits(8, 2), Bits(4, 4), Bits(2, 2), Bits(FULL, 2), Bits(3, FULL), Bits(8, 8), FP]
    order = any_precision(reversed(pairs)).fixed
    assert order == any_precision(pairs).fixed == (FP, Bits(3, FULL), Bits(FULL, 2), Bits(8, 8), Bits(8, 2), Bits(4, 4), Bits(2, 8), Bits(2, 2))
    assert len(any_precision([FP, FP, Bits(2, 2), Bits(2, 2)]).fixed) == 2


@every_method
def test_ignored_labels_count_for_nothing(method):
    (x, y), some = IMAGES.batch(slice(0, 32)), torch.arange(32) % 3 != 0
    masked, fewer = small(), small()
    a = method(masked, (x, torch.where(some, y, -100)), generator_for(4))
    b = method(fewer, (x[some], y[some]), generator_for(4))
    assert a.accuracy == pytest.approx(b.accuracy) and a.loss == pytest.approx(b.loss, rel=1e-5)
    wanted = gradients(fewer)
    for n,g in gradients(masked).items():
        if '.step.' not in n: assert_close(g, wanted[n], rtol=1e-4, atol=1e-6, msg=lambda m: f'{n}: {m}')  # a step's pace counts all inputs


class Answers(nn.Module):
    "A network that returns its logits in a wrapping."
    def __init__(self, body, wrap):
        super().__init__()
        self.body, self.wrap = body, wrap
    def forward(self, x): return self.wrap(self.body(x))


class Output:
    def __init__(self, logits): self.loss, self.logits = None, logits


@pytest.mark.parametrize('wrap', [lambda z: (z, z - 1), lambda z: [z], Output, lambda z: {'logits': z, 'hidden': None}, lambda z: Output((z, z))],
                         ids=['tuple', 'list', 'object', 'mapping', 'object of a tuple'])
@every_method
def test_answers_may_come_wrapped(wrap, method):
    batch = IMAGES.batch(slice(0, 32))
    bare, wrapped = Answers(small(), lambda z: z), Answers(small(), wrap)
    if any(isinstance(b, Policy) for b in method.fixed): method = qat(Policy({'body.2': Bits(2, 2)}))
    assert method(bare, batch, generator_for(0)) == method(wrapped, batch, generator_for(0))
    assert same(gradients(bare), gradients(wrapped))
    with pytest.raises(TypeError, match='must return logits'): method(Answers(small(), lambda z: {'scores': z}), batch, generator_for(0))


# Settings

@pytest.mark.parametrize('bad', [{'steps': 0}, {'steps': -3}, {'lr': 0.}, {'lr': -1.}, {'lr': math.nan}, {'lr': math.inf}, {'optimizer': 'lion'},
                                 {'warmup': -1}, {'warmup': 11}, {'schedule': 'linear'}, {'weight_decay': -1e-4}, {'weight_decay': math.nan}], ids=str)
def test_bad_settings_are_refused_by_value(bad):
    with pytest.raises(ValueError, match=re.escape(str(next(iter(bad.values()))))): TrainConfig(**{'steps': 10, **bad})


def test_learning_rates_follow_their_schedule():
    cosine, steps = TrainConfig(100, .4, warmup=10), TrainConfig(100, 1., schedule='step', milestones=(30, 60))
    assert [cosine.lr_at(i) for i in (0, 4, 9, 10, 55)] == pytest.approx([.04, .2, .4, .4, .2])
    assert [steps.lr_at(i) for i in (0, 29, 30, 59, 60, 99)] == pytest.approx([1, 1, .1, .1, .01, .01])
    assert {TrainConfig(9, .3, schedule='constant').lr_at(i) for i in range(9)} == {.3}


def test_weight_decay_spares_biases_norms_and_steps():
    for scheme in (LSQ(per_channel=True), SAT()):
        model = network(scheme)
        groups = make_optimizer(model, TrainConfig(1, weight_decay=.1)).param_groups
        decays = {id(p) for g in groups if g['weight_decay'] == .1 for p in g['params']}
        assert {n for n,p in model.named_parameters() if id(p) in decays} == {f'{i}.weight' for i in (0, 3, 7, 10)}
        assert sum(len(g['params']) for g in groups) == len(list(model.parameters()))


@pytest.mark.parametrize('wrap', [lambda m: m, lambda m: torch.optim.swa_utils.AveragedModel(m), lambda m: nn.Sequential(nn.Identity(), m)])
def test_weight_decay_spares_tables_whatever_they_call_their_numbers(wrap):
    class Renamed(WidthTable):
        "A table whose numbers have another name and two dimensions."
        def __init__(self):
            nn.Module.__init__(self)
            self.value, self.log_factor = (nn.Parameter(torch.ones(16, 3)) for _ in range(2))
    model = network()
    model[3].act_quantizer.step, model[10].value = Renamed(), nn.Parameter(torch.ones(2, 2))
    groups = make_optimizer(whole := wrap(model), TrainConfig(1, weight_decay=.1)).param_groups
    decays = {id(p) for g in groups if g['weight_decay'] == .1 for p in g['params']}
    names = {n for n,p in whole.named_parameters() if id(p) in decays}
    assert {'.'.join(n.split('.')[-2:]) for n in names} == {f'{i}.weight' for i in (0, 3, 7, 10)} | {'10.value'}


# Data and frozen parts

class Items(Dataset):
    def __len__(self): return len(IMAGES)
    def __getitem__(self, i): return IMAGES.x[i], int(IMAGES.y[i])


@pytest.mark.parametrize('data', [lambda: (IMAGES.x, IMAGES.y), lambda: [IMAGES.x.numpy(), IMAGES.y.numpy()], lambda: IMAGES, Items], ids=['pair', 'arrays', 'pool', 'items'])
def test_data_of_any_form_trains_like_its_batches(data):
    nets = network(), network()
    for net,given in zip(nets, (data(), Batches(IMAGES, 64, 7))): fit(net, qat(Bits(4, 4)), given, TrainConfig(5, .05, seed=7))
    assert same(*map(weights, nets))


@pytest.mark.parametrize('workers', [0, 1])
def test_a_loader_is_walked_again_and_again(workers):
    seen, runs = [], []
    def method(model, batch, generator):
        seen.append(batch[1])
        return qat(Bits(4, 4))(model, batch, generator)
    for _ in range(2):
        torch.rand(3)
        net = network()
        fit(net, method, DataLoader(Items(), 36, shuffle=True, num_workers=workers), TrainConfig(7, .05, seed=3))
        runs.append(weights(net))
    assert same(*runs) and [len(y) for y in seen] == [36, 36, 24, 36, 36, 24, 36]*2
    for passed in (seen[:3], seen[3:6]): assert torch.cat(passed).bincount().equal(IMAGES.y.bincount())
    assert not torch.cat(seen[:3]).equal(torch.cat(seen[3:6]))


@pytest.mark.parametrize('data, error, text', [(DataLoader(Items(), 200, drop_last=True), ValueError, 'no batches'), ({'x': 1}, TypeError, 'a DataLoader'),
                                               (DataLoader(IMAGES.x, 8), TypeError, 'pair'), ((IMAGES.x, IMAGES.y[:-1]), ValueError, '95 labels for 96')])
def test_what_is_no_training_data(data, error, text):
    with pytest.raises(error, match=text): fit(network(), qat(FP), data, TrainConfig(2))


@pytest.mark.parametrize('bn', ['running', 'switchable'])
def test_frozen_parts_stay_frozen_also_after_a_validation(bn):
    net = network(bn=bn).train()
    net[1].eval()
    net[6].eval()
    flags, before = [m.training for m in net.modules()], weights(net)
    def validate(model):
        model.eval()
        return {}
    def method(model, batch, generator):
        assert [m.training for m in model.modules()] == flags
        return mebqat(SPACE)(model, batch, generator)
    fit(net, method, batches(), TrainConfig(6, .05, epoch_steps=2), validate=validate)
    moved = {k.split('.')[0] for k,v in weights(net).items() if 'num_batches' in k and not v.equal(before[k])}
    assert moved == {'4'}


def test_a_network_in_evaluation_mode_trains_as_a_whole():
    nets = network().eval(), network().train()
    for net in nets: fit(net, mebqat(SPACE), batches(), TrainConfig(4, .05))
    assert same(*map(weights, nets))


# Files

def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_else(tmp_path, monkeypatch):
    real, calls = save_file, []
    def full(tensors, name, metadata):
        calls.append(name)
        if len(calls) == 2:
            Path(name).write_bytes(b'half')
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(name))
        real(tensors, name, metadata=metadata)
    monkeypatch.setattr('safetensors.torch.save_file', full)
    with pytest.raises(OSError, match='No space left.*nothing was changed') as e:
        fit(network(), qat(Bits(4, 4)), batches(), TrainConfig(12, .01, epoch_steps=4), tmp_path)
    assert str(tmp_path/'checkpoint.safetensors') in str(e.value) and '\n' not in str(e.value)
    assert load_whole(tmp_path/'checkpoint.safetensors')[1]['step'] == 4 and leftovers(tmp_path) == ['checkpoint.safetensors']


@pytest.fixture
def small_disk(tmp_path):
    "A file system of 200 kB."
    folder = tmp_path/'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', folder]
    if sys.platform != 'linux' or subprocess.run(mount, capture_output=True).returncode: pytest.skip('no small disk could be mounted (root on Linux can); another test pretends one')
    try: yield folder
    finally: subprocess.run(['umount', folder], check=True)


def fill(folder, leave=0):
    "Use up the disk but for a few bytes."
    with open(folder/'filler', 'wb', buffering=0) as f:
        try:
            while f.write(b'x'*4096): pass
        except OSError: pass
        f.truncate(f.tell()//4096*4096 - leave)


def test_a_really_full_disk_on_the_way(small_disk):
    out, spec = small_disk/'run', spec_of('qat', bits='W4A4', width=4, epochs=3, batch_size=256)
    with pytest.raises(OSError, match='could not write .*checkpoint.safetensors.*nothing was changed'):
        train_run(spec, out, on_row=lambda h: fill(small_disk, 4096))
    assert leftovers(out) == ['checkpoint.safetensors', 'run.json']
    assert load_whole(out/'checkpoint.safetensors')[1]['step'] == 4
    (small_disk/'filler').unlink()
    train_run(spec, out, resume=True)
    assert leftovers(out) == ['checkpoint.safetensors', 'model.safetensors', 'run.json']


@pytest.mark.parametrize('leave', [0, 8192])
def test_a_really_full_disk_at_the_command_line(small_disk, leave):
    fill(small_disk, leave)
    done = CliRunner().invoke(app, ['train', '--out', str(small_disk/'run'), '--method', 'qat', '--bits', 'W4A4', '--width', '8', '--epochs', '.1',
                                    '--no-compile'])
    lines = [l for l in done.stderr.splitlines() if not re.match('digits: |note: 2 steps are few', l)]
    assert done.exit_code == 2 and done.stdout == '' and len(lines) == 1 and lines[0].startswith('mebqat: ') and 'No space left' in lines[0]
    assert not [n for n in leftovers(small_disk) if 'part' in n]
    for n in leftovers(small_disk/'run'): assert (small_disk/'run'/n).stat().st_size > 0


def checkpoint(folder):
    "A finished small run's checkpoint, its configuration and method."
    config = TrainConfig(4, .01, epoch_steps=2)
    fit(network(), qat(Bits(4, 4)), batches(), config, folder)
    return folder/'checkpoint.safetensors', config


@pytest.fixture(scope='module')
def kept(tmp_path_factory): return checkpoint(tmp_path_factory.mktemp('kept'))


@given(st.floats(0, 1, exclude_max=True))
@settings(max_examples=25)
def test_a_checkpoint_cut_anywhere_is_refused(kept, at):
    whole = kept[0].read_bytes()
    file = kept[0].with_name('cut.safetensors')
    file.write_bytes(whole[:int(at*len(whole))])
    with pytest.raises(ValueError, match='cut.safetensors is damaged') as e: load_whole(file)
    assert '\n' not in str(e.value)


@given(st.integers(0, 4000), st.integers(0, 255))
@settings(max_examples=80)
def test_a_changed_byte_is_refused_or_harmless_but_never_a_crash(kept, at, byte):
    whole = bytearray(kept[0].read_bytes())
    whole[at % len(whole)] = byte
    folder = kept[0].parent/'changed'
    folder.mkdir(exist_ok=True)
    (folder/'checkpoint.safetensors').write_bytes(whole)
    try: fit(network(), qat(Bits(4, 4)), batches(), kept[1], folder, resume=True)
    except (ValueError, FloatingPointError) as e: assert '\n' not in str(e)


@pytest.mark.parametrize('about', [{}, [], None, 7, 'text', {'step': 2}, {'config': {}, 'history': [], 'sums': [0, 0, 0]}], ids=repr)
def test_a_foreign_file_in_the_checkpoints_place_is_refused(tmp_path, about):
    save_whole(tmp_path/'checkpoint.safetensors', {'x': torch.zeros(2)}, about)
    with pytest.raises(ValueError, match='checkpoint'): fit(network(), qat(Bits(4, 4)), batches(), TrainConfig(4), tmp_path, resume=True)


def test_a_checkpoint_of_other_settings_or_another_network_is_refused(kept):
    folder, config, method = kept[0].parent, kept[1], qat(Bits(4, 4))
    before = kept[0].read_bytes()
    others = {'lr=0.01 there, 0.02 here': TrainConfig(4, .02, epoch_steps=2), 'a run of 4 steps, and 3 are fewer': TrainConfig(3, .01, epoch_steps=2),
              'seed=0 there, 1 here': TrainConfig(4, .01, epoch_steps=2, seed=1)}
    for words, other in others.items():
        with pytest.raises(ValueError, match=words): fit(network(), method, batches(), other, folder, resume=True)
    for net in (network(LSQ(per_channel=True)), network(None), nn.Linear(3, 3)):
        with pytest.raises(ValueError, match='another network or scheme'): fit(net, method, batches(), config, folder, resume=True)
    with pytest.raises(ValueError, match='holds a run already.*--resume'): fit(network(), method, batches(), config, folder)
    assert kept[0].read_bytes() == before


def test_files_keep_tensors_and_description_exactly(tmp_path):
    last = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    tensors = {'a': torch.randn(3, 4)[:, ::2], 'b': last, 'c': torch.tensor(7), 'tied': last}
    file = save_whole(tmp_path/'new'/'x.safetensors', tensors, {'what': ['é', 1.5, None]})
    got, about = load_whole(file)
    assert same(got, tensors) and about == {'what': ['é', 1.5, None]} and leftovers(tmp_path) == ['x.safetensors']
    with pytest.raises(FileNotFoundError, match='nothing.safetensors'): load_whole(tmp_path/'nothing.safetensors')
    for other in (tmp_path, tmp_path/'new'):
        with pytest.raises(FileNotFoundError): load_whole(other)


def test_a_write_that_is_cut_off_leaves_the_old_file(tmp_path, monkeypatch):
    file = save_whole(tmp_path/'x.safetensors', {'a': torch.ones(2)}, {})
    monkeypatch.setattr(os, 'replace', lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt): save_whole(file, {'a': torch.zeros(2)}, {})
    assert torch.equal(load_whole(file)[0]['a'], torch.ones(2)) and leftovers(tmp_path) == ['x.safetensors']


# A run folder

TINY = spec_of('qat', bits='W4A4', width=4, epochs=.5, batch_size=256)


def test_a_run_folder_belongs_to_one_description(tmp_path):
    train_run(TINY, tmp_path/'run')
    before = {n: (tmp_path/'run'/n).read_bytes() for n in leftovers(tmp_path/'run')}
    changes = {'epochs=0.5 there, 1 here': {'epochs': 1}, 'seed=0 there, 4 here': {'seed': 4}, "bits='W4A4' there, 'W2A2' here": {'bits': 'W2A2'}}
    for words, change in changes.items():
        for resume in (False, True)[:1 + ('epochs' not in change)]:
            with pytest.raises(ValueError, match=words): train_run(TINY.changed(**change), tmp_path/'run', resume)
    with pytest.raises(ValueError, match='--resume'): train_run(TINY, tmp_path/'run')
    assert {n: (tmp_path/'run'/n).read_bytes() for n in leftovers(tmp_path/'run')} == before
    assert len(train_run(TINY, tmp_path/'run', resume=True).history) == 1


@pytest.mark.parametrize('text', ['', '{', '[]', '7', '{"spec": 5}', '{"spec": null}', '{}'])
def test_a_damaged_run_description_is_named(tmp_path, text):
    (tmp_path/'run').mkdir()
    (tmp_path/'run'/'run.json').write_text(text)
    with pytest.raises(ValueError, match=r'/run.*run\.json') as e: train_run(TINY, tmp_path/'run')
    assert '\n' not in str(e.value) and re.search(r'damaged|holds files that mebqat did not write', str(e.value))
    assert leftovers(tmp_path) == ['run.json'] and (tmp_path/'run'/'run.json').read_text() == text


@pytest.mark.parametrize('change', [
    {'bits': 'W1A4'}, {'bits': 'W4A99'}, {'bits': ''}, {'lr': -1.}, {'optimizer': 'x'}, {'batch_size': 9999}, {'batch_size': 0}, {'epochs': math.inf},
    {'method': 'mebqat', 'n_tasks': 0}, {'skip': 'nowhere'}, {'bn': 'x'}, {'width': 0}, {'size': 0}, {'weight_decay': -1.}, {'init': 'nowhere'},
    {'method': 'mebqat', 'bits': 'W2A2,W1A1'}, {'model': 'x'}, {'data': 'nowhere'}, {'options': (('per_channel', 3.),)}], ids=str)
def test_what_can_be_refused_is_refused_before_the_folder_is_made(tmp_path, change):
    with pytest.raises((ValueError, FileNotFoundError)) as e: train_run(spec_of(**TINY.to_dict() | change), tmp_path/'run')
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()


def test_history_is_a_table():
    h = History([{'step': 1, 'loss': .5}])
    assert len(h) == 1 and list(h.to_frame().columns) == ['step', 'loss']


# The first checkpoint, longer runs, other data, one writer

def saves(monkeypatch, seconds_a_step, cost=0.):
    "The steps after which a training of 40 steps saves, where steps and savings take their time on a clock of this test."
    at, clock = [], [0.]
    monkeypatch.setattr('mebqat.train.time.monotonic', lambda: clock[0])
    def save(file, tensors, about):
        at.append(about['step'])
        clock[0] += cost
    monkeypatch.setattr('mebqat.train.save_whole', save)
    def tick(step, steps, loss): clock[0] += seconds_a_step
    fit(network(), qat(Bits(4, 4)), batches(), TrainConfig(40, .01), 'nowhere', on_step=tick)
    return at


def test_the_first_checkpoint_comes_within_a_minute_and_saving_costs_little(monkeypatch):
    assert saves(monkeypatch, 20)[:3] == [4, 8, 12]
    assert saves(monkeypatch, 100)[:3] == [1, 2, 3]
    assert saves(monkeypatch, 20, cost=6) == [4, 20, 36, 40]  # two hundredths of the time: each 300 s
    assert saves(monkeypatch, .1) == [40]


def rates(history): return [r['lr'] for r in history.rows]


@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
@pytest.mark.parametrize('at', [None, 3], ids=['finished', 'stopped'])
def test_a_longer_training_is_the_shorter_one_and_then_the_longer_schedule(tmp_path, optimizer, at):
    short, long = (TrainConfig(n, .01, optimizer, seed=5, epoch_steps=4) for n in (8, 20))
    if at is None: fit(network(), mebqat(SPACE), batches(), short, tmp_path)
    else:
        with pytest.raises(Interrupted): fit(network(), mebqat(SPACE), cut(batches(), at), short, tmp_path)
    done = load_whole(tmp_path/'checkpoint.safetensors')[1]['step']
    def both(step): return short.lr_at(step) if step < done else long.lr_at(step)
    straight = network()
    both_config = copy.copy(long)
    object.__setattr__(both_config, 'lr_at', both)
    fit(straight, mebqat(SPACE), batches(), both_config)
    got = network(seed=3)
    history = fit(got, mebqat(SPACE), batches(), long, tmp_path, resume=True)
    assert same(weights(got), weights(straight)) and [r['step'] for r in history.rows] == [4, 8, 12, 16, 20]
    with pytest.raises(ValueError, match='a run of 20 steps, and 8 are fewer; a run can be made longer, not shorter'):
        fit(network(), mebqat(SPACE), batches(), short, tmp_path, resume=True)


LEARNED = {'adaqat': {}, 'fracbits': dict(target_bytes=900)}
FEW = dict(glyph_classes=20, n_way=3, n_query=2, n_tasks=2, width=4, bits='W2A2 FP')


@pytest.mark.parametrize('method', ['qat', 'adaqat', 'fracbits', 'mebqat-pn', 'metaquantnet'])
def test_a_run_is_made_longer_and_says_so(tmp_path, method):
    small = dict(width=4, epochs=1, batch_size=256)
    if method == 'metaquantnet': train_run(spec_of('float', **small), tmp_path/'float')
    more = {'qat': dict(bits='W4A4'), 'metaquantnet': dict(init=str(tmp_path/'float'), bits='W4A8 W8A8'), **LEARNED}.get(method, {})
    spec = spec_of(method, steps=2, **FEW) if method == 'mebqat-pn' else spec_of(method, **small, **more)
    option = 'steps' if method == 'mebqat-pn' else 'epochs'
    longer, out = spec.changed(**{option: 3}), tmp_path/'run'
    first = train_run(spec, out)
    before = first.history.rows[-1]['step']
    with pytest.raises(ValueError, match=f'{option}={getattr(spec.training, option)} there, 3 here; to make it longer, go on with resume'): train_run(longer, out)
    with pytest.warns(UserWarning, match=f'goes on from step {before} to {option}=3'): run = train_run(longer, out, resume=True)
    assert run.history.rows[0] == first.history.rows[0] and run.history.rows[-1]['step'] > before and run.spec == longer
    change = [{'option': option, 'from': getattr(spec.training, option), 'to': 3, 'step': before}]
    assert run.about['extended'] == open_run(out).about['extended'] == json.loads((out/'run.json').read_text())['extended'] == change
    with pytest.raises(ValueError, match=f'{option}=3, and .* is less'): train_run(spec, out, resume=True)
    if method in LEARNED: assert run.setting == first.setting or method == 'adaqat'
    assert same(weights(train_run(longer, out, resume=True).model), weights(run.model))


def test_a_folder_without_a_checkpoint_takes_other_settings(tmp_path):
    out = tmp_path/'run'
    with pytest.raises(Interrupted): train_run(TINY, out, stop=lambda: True)
    (out/'checkpoint.safetensors').unlink()  # as a kill before the first one leaves it
    other = TINY.changed(seed=4)
    assert train_run(other, out).spec == other and run_record(out)['spec']['seed'] == 4
    with pytest.raises(ValueError, match='seed=4 there, 0 here'): train_run(TINY, out)
    (out/'checkpoint.safetensors').unlink()
    with pytest.raises(ValueError, match='holds a run already'): train_run(other, out)


def test_resuming_nothing_says_so(tmp_path):
    with pytest.warns(UserWarning, match='holds nothing to resume; the run starts from the beginning'): train_run(TINY, tmp_path/'run', resume=True)


def drawn(folder, seed, classes='ab', n=12):
    "A folder of image folders, divided into parts by name."
    from PIL import Image
    g = torch.Generator().manual_seed(seed)
    for part, many in {'train': n, 'val': 2, 'test': 3}.items():
        for c in classes:
            (folder/part/c).mkdir(parents=True, exist_ok=True)
            for i in range(many): Image.fromarray(torch.randint(256, (8, 8), generator=g, dtype=torch.uint8).numpy()).save(folder/part/c/f'{i}.png')
    return folder


@pytest.mark.parametrize('finished', [False, True])
@pytest.mark.parametrize('words, change', [('training images, but others', dict(seed=1)), ('classes were b, and here are c', dict(seed=0, classes='ac')),
                                           ('it had 24 training images, and here are 30', dict(seed=0, n=15))])
def test_a_run_does_not_go_on_with_other_data_by_mistake(tmp_path, monkeypatch, finished, words, change):
    monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'cache'))
    data, out = drawn(tmp_path/'data', 0), tmp_path/'run'
    spec = spec_of('qat', bits='W4A4', width=4, epochs=4, batch_size=9, data=str(data))
    if finished: train_run(spec, out)
    else:
        with pytest.raises(Interrupted): train_run(spec, out, on_step=lambda step, *_: None, stop=lambda: True)
    shutil.rmtree(data)
    drawn(data, **change)
    before = (out/'checkpoint.safetensors').read_bytes()
    with pytest.raises(ValueError, match=rf'data are not those of .*run.*{words}.*changed_data \(--changed-data\)'): train_run(spec, out, resume=True)
    assert (out/'checkpoint.safetensors').read_bytes() == before
    with pytest.warns(UserWarning, match='goes on with other data'): run = train_run(spec, out, resume=True, changed_data=True)
    assert [c['to'] for c in run.about['changed data']] == [run.about['fingerprint']] and json.loads((out/'run.json').read_text())['changed data']


def test_a_checkpoint_that_says_nothing_of_its_data_resumes_as_before(tmp_path, uninterrupted):
    with pytest.raises(Interrupted): train_run(SPEC, tmp_path/'run', stop=lambda: True)
    tensors, about = load_whole(tmp_path/'run'/'checkpoint.safetensors')
    about['config']['checkpoint_minutes'] = 5.
    save_whole(tmp_path/'run'/'checkpoint.safetensors', tensors, {k: v for k,v in about.items() if k != 'data'})
    assert same(weights(train_run(SPEC, tmp_path/'run', resume=True).model), uninterrupted)


def test_a_run_finds_its_data_from_any_folder(tmp_path, monkeypatch):
    drawn(tmp_path/'here'/'data', 0)
    (tmp_path/'there').mkdir()
    monkeypatch.chdir(tmp_path/'here')
    spec = spec_of('qat', bits='W4A4', width=4, epochs=1, batch_size=9, data='data')
    run = train_run(spec, '../run')
    wanted = run.pool('test').fingerprint()
    monkeypatch.chdir(tmp_path/'there')
    run = open_run('../run')
    assert run.spec.inputs.data == 'data' and run.pool('test').fingerprint() == wanted
    monkeypatch.chdir(tmp_path)
    again = train_run(spec.changed(data='here/data'), 'run', resume=True)  # the same place, named from another folder
    assert same(weights(again.model), weights(run.model))


def test_a_folder_has_one_writer_at_a_time(tmp_path):
    with under_way(tmp_path/'run') as p:
        with pytest.raises(ValueError, match=f'is being written to by process {p.pid} on .* since '): train_run(SPEC, tmp_path/'run', resume=True)
        p.kill()
        p.wait()
        with writing(tmp_path/'run'): pass
    done = subprocess.run([sys.executable, '-c', 'import sys, time\nfrom mebqat.runs.run_folder import writing\nwith writing(sys.argv[1]): print(len(open(sys.argv[1] + "/.writer.json").read()) > 9)',
                           str(tmp_path/'new')], capture_output=True, text=True)
    assert done.stdout == 'True\n' and [f.name for f in (tmp_path/'new').iterdir()] == ['.writer.lock'], done.stderr


def test_where_there_are_no_locks_it_works_without(tmp_path, monkeypatch):
    def refuse(*args, **kw): raise OSError(95, 'Operation not supported')
    monkeypatch.setattr('mebqat.runs.run_folder.FileLock.acquire', refuse)
    with writing(tmp_path/'run') as folder: assert folder.is_dir()
