"Batch norm at a pair of bits: one rule, only what ran is replaced, everything is put back."
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from mebqat.batchnorm import check_bn_data, deployed, evaluating, keep_statistics, reestimate_bn, reestimates
from mebqat.bits import FP, Bits, BitSpace, Policy
from mebqat.evaluate import correct, fitness, score, sweep
from mebqat.figures.predictions import explore
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.quantizers import LSQ, SAT

X = torch.randn(60, 2, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(60) % 3
TRAIN = (3*X + 1, Y)
SPACE = BitSpace([Bits(2, 3), Bits(4, 4), FP])
CHOICES = ('running', 'batch', 'switchable', 'reestimate')


def network(bn='running', scheme=LSQ(), passes=3):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.1),
                        nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    net = quantize(net, scheme, example=X, skip='none', bn=bn, space=SPACE if bn == 'switchable' else None).train()
    for bits in SPACE:
        for _ in range(passes):
            with use_bits(net, bits): net(X)
    return net


def tensors(net): return {k: v.clone() for k,v in net.state_dict().items()}
def same(a, b): return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)
def norms(net): return [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


# The rule

@pytest.mark.parametrize('bn', CHOICES)
def test_everybody_measures_the_same_network(bn):
    net = network(bn)
    before, flags = tensors(net), [m.training for m in net.modules()]
    surface = sweep(net, (X, Y), SPACE, bn_data=TRAIN)
    for bits in SPACE:
        values = [score(net, bits, (X, Y), TRAIN).loss, surface.at(bits).loss]
        with deployed(net, bits, TRAIN): values.append(correct(net, (X, Y))[1])
        values.append(-torch.tensor(fitness(net, (X, Y), TRAIN, by='likelihood')(bits)).log().item())
        if bn == 'reestimate': assert reestimates(net)
        else: values.append(score(net, bits, (X, Y)).loss)
        assert values == pytest.approx([values[0]]*len(values), rel=1e-5)
    whole = Policy.uniform(bit_layers(net), Bits(4, 4))
    if bn != 'switchable': assert fitness(net, (X, Y), TRAIN)(whole) == score(net, whole, (X, Y), TRAIN).accuracy == surface.at(Bits(4, 4)).accuracy
    assert same(tensors(net), before) and [m.training for m in net.modules()] == flags


def test_only_reestimation_asks_for_images():
    net = network('reestimate')
    for use in (lambda: score(net, FP, (X, Y)), lambda: sweep(net, (X, Y), SPACE), lambda: fitness(net, (X, Y)), lambda: check_bn_data(net, None),
                lambda: deployed(net, FP).__enter__(), lambda: explore(net, (X, Y), SPACE)):
        with pytest.raises(ValueError, match='bn_data='): use()
    bare = quantize(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), LSQ(), example=X, skip='none', bn='reestimate')
    assert not reestimates(bare) and score(bare, Bits(4, 4), (X, Y)).n == 60


@pytest.mark.parametrize('form', [TRAIN, list(TRAIN), TRAIN[0], TRAIN[0].numpy(), TensorDataset(*TRAIN), DataLoader(TensorDataset(*TRAIN), 17, shuffle=True),
                                  DataLoader(TRAIN[0], 60), TRAIN[0].split(11)], ids=lambda f: type(f).__name__)
def test_training_images_in_any_form(form):
    net, bits = network('reestimate'), Bits(2, 3)
    wanted = score(net, bits, (X, Y), TRAIN).loss
    assert score(net, bits, (X, Y), form).loss == pytest.approx(wanted, rel=.05) == fitness_loss(net, bits, form)


def fitness_loss(net, bits, form): return pytest.approx(-torch.tensor(fitness(net, (X, Y), form, by='likelihood')(bits)).log().item(), rel=.05)


# Measuring again

@pytest.mark.parametrize('sizes', [[60], [20, 20, 20], [32, 27, 1], [1, 59]], ids=str)
def test_averages_are_over_images(sizes):
    net, inputs = network(), []
    hook = net[1].register_forward_pre_hook(lambda m, i: inputs.append(i[0]))
    torch.manual_seed(0)
    with use_bits(net, Bits(4, 4)): reestimate_bn(nn.Sequential(*net[:6]), X.split(sizes))
    hook.remove()
    assert_close(net[1].running_mean, sum(len(i)*i.mean((0, 2, 3)) for i in inputs)/60)
    assert_close(net[1].running_var, sum(len(i)*i.var((0, 2, 3)) for i in inputs)/60)
    assert net[1].momentum == net[4].momentum == .1 and net[1].training


class Branches(nn.Module):
    "A norm that runs twice a pass, one that runs now and then, one that never does."
    def __init__(self):
        super().__init__()
        self.a, self.twice, self.seldom, self.never = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
        self.side = False
    def forward(self, x):
        h = self.twice(self.a(x))
        return self.twice(self.seldom(h + 5) if self.side else h + 9)


@pytest.mark.parametrize('side', [False, True])
def test_only_norms_that_run_are_replaced(side):
    torch.manual_seed(0)
    net, z = quantize(Branches().train(), SAT(), example=(x := torch.randn(30, 4)), skip='none'), []
    net(x)
    before, net.side = tensors(net), side
    hook = net.twice.register_forward_pre_hook(lambda m, i: z.append(i[0]))
    reestimate_bn(net, [x[:10], x[10:]])
    hook.remove()
    assert {k.split('.')[0] for k,v in tensors(net).items() if not v.equal(before[k])} == {'twice', *(['seldom'] if side else [])}
    assert_close(net.twice.running_mean, sum(len(i)*i.mean(0) for i in z)/60)


@pytest.mark.parametrize('bits', [Bits(2, 3), FP])
def test_other_pairs_keep_their_copies(bits):
    net = network('switchable')
    before = tensors(net)
    with use_bits(net, bits): reestimate_bn(net, TRAIN)
    changed = {k for k,v in tensors(net).items() if not v.equal(before[k])}
    assert changed and all(f'.norms.{bits}.' in k for k in changed)


def broken():
    yield X[:30]
    raise KeyboardInterrupt


@pytest.mark.parametrize('batches, error', [(iter([]), ValueError), ([], ValueError), (X[:0], ValueError), (broken, KeyboardInterrupt), ([X, 'x'], TypeError),
                                            ([X, X[:, :1]], RuntimeError), ([X, X[:, :, :5, :5]], RuntimeError)])
@pytest.mark.parametrize('bn', ['running', 'switchable'])
def test_whatever_goes_wrong_changes_nothing(bn, batches, error):
    net = network(bn)
    net[4].eval()
    before, flags = tensors(net), [m.training for m in net.modules()]
    with pytest.raises(error): reestimate_bn(net, batches() if callable(batches) else batches)
    assert same(tensors(net), before) and [m.training for m in net.modules()] == flags
    assert all(m.momentum == .1 and not m._forward_pre_hooks for m in norms(net))


def test_one_value_a_channel_is_explained():
    for run in (lambda: reestimate_bn(network(), X[:1]), lambda: score(network('batch'), FP, (X[:1], Y[:1])), lambda: fitness(network('batch'), (X[:1], Y[:1]))(FP)):
        with pytest.raises(ValueError, match=r'from the batch here.*\(1, 2, 6, 6\) leaves one value a channel; give more images'): run()


# Put back

def test_evaluation_puts_each_flag_back_even_after_an_error():
    net = network()
    net[4].eval()
    net[6].eval()
    flags = [m.training for m in net.modules()]
    for use in (lambda: score(net, FP, (X, Y)), lambda: sweep(net, (X, Y), SPACE), lambda: fitness(net, (X, Y))(FP), lambda: score(net, FP, (X, Y + 1))):
        try: use()
        except ValueError: pass
        assert [m.training for m in net.modules()] == flags
    with evaluating(net): assert not any(m.training for m in net.modules())
    with keep_statistics(net): net(9*X)
    assert_close(net[1].running_mean, network()[1].running_mean)


# Wrapped

@pytest.mark.parametrize('wrap', [torch.optim.swa_utils.AveragedModel, nn.DataParallel, lambda m: torch.compile(m, backend='eager'), lambda m: nn.Sequential(m),
                                  lambda m: nn.Sequential(torch.compile(m, backend='eager'))], ids=['averaged', 'parallel', 'compiled', 'inside', 'compiled inside'])
@pytest.mark.parametrize('bn', CHOICES)
def test_a_wrapped_network_is_the_network_inside(bn, wrap):
    net, bits = network(bn).eval(), Bits(2, 3)
    wanted = score(net, bits, (X, Y), TRAIN)
    wrapped = wrap(net)
    wrapped(X)
    assert score(wrapped, bits, (X, Y), TRAIN) == wanted
    assert sweep(wrapped, (X, Y), SPACE, bn_data=TRAIN).points == sweep(net, (X, Y), SPACE, bn_data=TRAIN).points
    assert fitness(wrapped, (X, Y), TRAIN)(bits) == wanted.accuracy
