"A fourth scheme: one class and one entry, the package untouched. And a network from a file, without calibration."
import time
import warnings
from dataclasses import dataclass
from typing import ClassVar

from dataclasses import asdict

import pytest
import torch
from torch import Tensor, nn

from mebqat.batchnorm import deployed
from mebqat.bits import FP, FULL, Bits, BitSpace, candidates
from mebqat.evaluate import sweep
from mebqat.layers import bit_layers, quantize, restore, use_bits
from mebqat.methods import mebqat
from mebqat.quantizers import LSQ, SAT, SCHEMES, DoReFa, Scheme, make_scheme
from mebqat.steps import SignedInput
from mebqat.train import TrainConfig, fit


def power_of_two(x, bits):
    "Signs and powers of two: `2**(bits - 1)` magnitudes below the largest, and zero; gradients pass."
    top = x.detach().abs().max().log2().ceil()
    power = x.detach().abs().clamp_min(1e-30).log2().round().clamp_max(top)
    rounded = torch.where(power > top - 2**(bits - 1), power.exp2()*x.sign(), 0)
    return x + (rounded - x).detach()


class PowerWeight(nn.Module):
    def forward(self, w:Tensor, bits:int) -> Tensor: return w if bits == FULL else power_of_two(w, bits)
    def calibrate(self, w:Tensor): pass


class PowerInput(SignedInput):
    def __init__(self, signed):
        super().__init__()
        self.signed = signed
    def forward(self, x:Tensor, bits:int) -> Tensor: return x if bits == FULL else power_of_two(x, bits)
    def calibrate(self, x:Tensor, signed:bool): self.signed = signed


@dataclass(frozen=True)
class PowerOfTwo(Scheme):
    "A toy: every level is a power of two."
    inputs: bool = True  # Round inputs too?
    name: ClassVar[str] = 'power of two'
    min_bits: ClassVar[Bits] = Bits(3, 3)

    def weight(self, weight, fan=None): return PowerWeight()
    def act(self, x, signed): return PowerInput(signed)


@pytest.fixture
def fourth(monkeypatch): monkeypatch.setitem(SCHEMES, PowerOfTwo.name, PowerOfTwo)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6), nn.ReLU(),
                         nn.Conv2d(6, 6, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6*16, 3))


X = torch.randn(96, 1, 8, 8, generator=torch.Generator().manual_seed(0))
Y = (X.mean((1, 2, 3)) > 0).long() + (X[:, 0, 0, 0] > 1).long()


def test_a_fourth_scheme_needs_one_class_and_one_entry(fourth):
    scheme = make_scheme('power of two', inputs=False)
    assert make_scheme(scheme.name, **asdict(scheme)) == scheme and not scheme.inverse and scheme.fixed_steps() is scheme
    space = make_scheme('power of two').space()
    assert len(space) == 7*8 + 1 and FP in space and not [b for b in space if b.w < 3 or b.a < 3]
    with pytest.raises(ValueError, match='inputs must be true or false'): PowerOfTwo(inputs='yes')
    with pytest.raises(TypeError, match=r'LSQ\(\), DoReFa\(\), SAT\(\) or PowerOfTwo\(\), an object'): quantize(network(), 'power of two', X)


def test_a_fourth_scheme_quantizes_trains_and_is_measured(fourth):
    scheme = make_scheme('power of two')
    net, before = network().eval(), network().eval()(X)
    quantize(net, scheme, X, bn='reestimate')
    assert torch.equal(net(X), before) and len(bit_layers(net)) == 2
    with pytest.raises(ValueError, match='goes down to W3A3'):
        with use_bits(net, Bits(2, 4)): pass
    with use_bits(net, Bits(3, FULL)): assert len(bit_layers(net)['3'].quantized_weight().unique()) <= 2*4 + 1
    history = fit(net.train(), mebqat(scheme.space()), (X, Y), TrainConfig(30, .02, epoch_steps=10))
    assert history.rows[-1]['loss'] < history.rows[0]['loss']
    surface = sweep(net, (X, Y), BitSpace.parse('W3A3 W4A4 W8A8 FP'), (X, Y))
    assert surface.meta['scheme'] == 'power of two' and len(surface) == 4
    opened = restore(network(), scheme, net.state_dict(), X[:2], bn='reestimate').to(memory_format=torch.channels_last)
    for bits in (Bits(3, 3), FP):
        with deployed(net, bits, (X, Y)), deployed(opened, bits, (X, Y)): assert torch.equal(net(X), opened(X))


def test_a_class_is_no_scheme():
    with pytest.raises(TypeError, match='an object with its options'): quantize(network(), LSQ, X)
    with pytest.raises(TypeError, match='abstract'): Scheme()


def test_the_papers_pairs_come_from_the_schemes():
    for name in ('lsq', 'sat', 'dorefa'):
        space, paper = make_scheme(name).space(), BitSpace.paper(name)
        assert space == paper and space.name == paper.name == f'paper-{name}'
    assert Bits(1, 4) not in candidates(Bits(1, 1)) and Bits(1, FULL) in candidates(Bits(1, 1))
    assert not [b for b in candidates(Bits(1, 2)) if b.a == 1] and Bits(1, FULL) in candidates(Bits(1, 2))


def test_flags_say_what_names_said():
    assert [SCHEMES[n].inverse for n in ('lsq', 'dorefa', 'sat')] == [False, True, False]
    assert LSQ(per_channel=True).fixed_steps() == LSQ(per_channel=True, rule='published')
    assert SAT().fixed_steps() == SAT() and DoReFa().fixed_steps() == DoReFa()


SOME = [LSQ(), LSQ(per_channel=True), LSQ(rule='published', init='paper'), LSQ(shared_step=True), DoReFa(), DoReFa(act_clip='pact'), SAT(), SAT(shared_alpha=True, alpha=8.)]


@pytest.mark.parametrize('scheme', SOME, ids=str)
@pytest.mark.parametrize('how', [{}, {'bn': 'switchable', 'space': BitSpace.parse('W2A2 W4A4 FP'), 'ends': Bits(8, 8)}, {'skip': 'first', 'bn': 'batch'}], ids=str)
def test_restore_is_quantize_and_load(scheme, how):
    "Bit for bit, also where training goes on."
    saved = quantize(network(), scheme, X, **how)
    fit(saved.train(), mebqat(BitSpace.parse('W2A2 W4A4 FP')), (X, Y), TrainConfig(3, .02))
    state = {k: v.clone() for k,v in saved.state_dict().items()}
    slow, fast = quantize(network(), scheme, X[:4] + 5, **how), restore(network(), scheme, state, X[:4] + 5, **how)
    slow.load_state_dict(state)
    for net in (slow, fast): net.to(memory_format=torch.channels_last)  # as `fit` left the other
    assert [(k, v.shape) for k,v in slow.state_dict().items()] == [(k, v.shape) for k,v in fast.state_dict().items()]
    assert slow.quantization == fast.quantization
    for bits in (Bits(2, 2), Bits(4, 4), FP):
        outs = []
        for net in (saved, slow, fast):
            with use_bits(net.eval(), bits): outs.append(net(X))
        assert torch.equal(outs[0], outs[1]) and torch.equal(outs[1], outs[2])
    for net in (slow, fast): fit(net.train(), mebqat(BitSpace.parse('W2A2 W4A4 FP')), (X, Y), TrainConfig(3, .02))
    assert all(torch.equal(a, b) for a,b in zip(slow.state_dict().values(), fast.state_dict().values()))


def test_restore_refuses_as_quantize_does_and_another_state():
    with pytest.raises(ValueError, match='space'): restore(network(), LSQ(), {}, X, bn='switchable')
    with pytest.raises(ValueError, match='does not run'): restore(network(), LSQ(), {}, X[:, 0])
    with pytest.raises(RuntimeError, match='Missing key'): restore(network(), LSQ(), {}, X)


def test_restore_builds_before_it_loads_and_says_nothing_of_noise():
    def add(model): model.register_parameter('extra', nn.Parameter(torch.zeros(2)))
    saved = quantize(network(), LSQ(), X)
    add(saved)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        opened = restore(network(), LSQ(), saved.state_dict() | {'extra': torch.ones(2)}, torch.zeros(2, 1, 8, 8), before=add)
    assert opened.extra.tolist() == [1, 1]


def test_restore_does_not_search_for_steps():
    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start
    scheme, big = LSQ(rule='published'), lambda: nn.Sequential(*[nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)])
    x = torch.randn(2, 64, 8, 8)
    state = quantize(big(), scheme, x).state_dict()
    slow, fast = (min(seconds(f) for _ in range(3)) for f in (lambda: quantize(big(), scheme, x), lambda: restore(big(), scheme, state, x)))
    assert fast < slow/3
