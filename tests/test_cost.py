"What cost's notebook cannot check about itself: an independent counter, real models, no traces, refusals."
import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mebqat.bits import FULL, Bits, BitSpace, Policy
from mebqat.cost import cost, profile
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.models import make
from mebqat.quantizers import SAT, DoReFa, LSQ

TABLE = {'W8A8': (2.595, 4.00, 268.3), 'W4A8': (1.312, 7.97, 134.7), 'W4A4': (.670, 7.97, 134.7), 'W3A8': (.991, 10.60, 101.3),
         'W3A4': (.510, 10.60, 101.3), 'W3A3': (.389, 10.60, 101.3), 'W2A4': (.349, 15.81, 67.9), 'W2A2': (.189, 15.81, 67.9)}
rand = lambda *shape: torch.rand(shape, generator=torch.Generator().manual_seed(0))
summary = lambda c: (round(c.bitops/1e9, 3), round(c.compression, 2), round(c.weight_bytes/1e3, 1))


def flops(model, x):
    "PyTorch's own counter: two operations a MAC."
    with FlopCounterMode(display=False) as counter, torch.no_grad(): model.eval()(x)
    return counter.get_total_flops()


@pytest.mark.parametrize('layer, shape', [
    (nn.Conv2d(6, 9, 3, groups=3, padding=1), (6, 8, 8)), (nn.Conv2d(6, 6, 3, groups=6, stride=2), (6, 9, 9)), (nn.Conv2d(4, 5, (3, 5), dilation=2), (4, 12, 14)),
    (nn.Conv1d(4, 6, 5, stride=3, padding=2), (4, 20)), (nn.Conv3d(2, 3, 3), (2, 5, 5, 5)), (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 5, 5)),
    (nn.Linear(7, 3), (7,)), (nn.Linear(7, 3), (5, 7)), (nn.Linear(7, 3), (2, 5, 7))])
@pytest.mark.parametrize('batch', [1, 3])
def test_layers_agree_with_torchs_counter(layer, shape, batch):
    x = rand(batch, *shape)
    assert 2*batch*cost(layer, x).macs == flops(layer, x)


@pytest.mark.parametrize('name', ['cnn4', 'cnn5', 'small_cnn', 'resnet20', 'preact_resnet20', 'mobilenet_v2'])
def test_models_agree_with_torchs_counter(name):
    net, x = make(name, 10, 3, 32), rand(1, 3, 32, 32)
    c = cost(net, x)
    assert 2*c.macs == flops(net, x) and not c.uncounted
    assert sum(l.weights for l in c.layers)*4 + c.other_bytes == sum(4*p.numel() for p in net.parameters()) + sum(
        b.numel()*(4 if b.is_floating_point() else 8) for b in net.buffers())


def test_resnet18():
    p = profile(torchvision.models.resnet18(), (1, 3, 224, 224))
    full, w8 = p.at(), p.at(p.policy(Bits(8, 8)))
    assert [round(full.macs/1e9, 3), round(full.bitops/1e9, 1), round(w8.bitops/1e9, 1)] == [1.814, 1857.6, 116.1]
    assert [round(p.at(p.policy(Bits(b, b), Bits(8, 8))).bitops/1e9, 2) for b in (4, 3)] == [34.71, 22.85]


def test_resnet20_table():
    p = profile(make('resnet20'), (1, 3, 32, 32))
    assert [round(p.at().macs/1e6, 2), round(p.at().bitops/1e9, 2), round(p.at().weight_bytes/1e6, 3)] == [40.55, 41.52, 1.073]
    assert {r: summary(p.at(p.policy(Bits.parse(r), Bits(8, 8)))) for r in TABLE} == TABLE
    assert [round(p.at(p.policy(Bits.parse(r))).bitops/1e9, 3) for r in ('W4A4', 'W3A4', 'W3A3', 'W2A2')] == [.649, .487, .365, .162]


def test_resnet20_option_b():
    c = cost(make('resnet20', shortcut='B'), (1, 3, 32, 32))
    assert [sum(l.weights for l in c.layers), round(c.macs/1e6, 2)] == [270_896, 40.81]


@pytest.mark.parametrize('scheme', [LSQ(), DoReFa(), SAT()], ids=lambda s: s.name)
def test_quantized_resnet20_gives_the_same_table(scheme):
    net = quantize(make('resnet20'), scheme, example=rand(2, 3, 32, 32), ends=Bits(8, 8))
    p = profile(net, (1, 3, 32, 32))
    assert {r: summary(p.at(Bits.parse(r))) for r in TABLE} == TABLE
    assert round(p.at().bitops/1e9, 2) == 41.52 and all(l.quantized for l in p.layers)


def test_float_ends_count_at_32():
    net = quantize(make('resnet20'), LSQ(), example=rand(2, 3, 32, 32))
    c = profile(net, (1, 3, 32, 32)).at(Bits(4, 4))
    assert [l.bits.is_full for l in c.layers] == [True] + [False]*18 + [True]
    assert c.bitops == sum(l.macs*(1024 if l.bits.is_full else 16) for l in c.layers)


@pytest.mark.parametrize('bits', [Bits(2, 8), Bits(3, FULL), Bits(FULL, FULL), Policy({'stage1.0.conv1': Bits(2, 4), 'conv': Bits(4, 4)})], ids=str)
def test_costs_what_really_runs(bits):
    net = quantize(make('resnet20'), LSQ(), example=rand(2, 3, 32, 32), ends=Bits(8, 8))
    with use_bits(net, bits): running = {n: m.bits for n,m in bit_layers(net).items()}
    assert {l.name: l.bits for l in profile(net, (1, 3, 32, 32)).at(bits).layers} == running


def test_bytes_split():
    net = make('small_cnn', 10, 1, 16)
    floats = cost(net, (1, 1, 16, 16))
    assert floats.quantizer_bytes == 0
    quantize(net, LSQ(), example=rand(2, 1, 16, 16), skip='none')
    p = profile(net, (1, 1, 16, 16))
    assert p.other_bytes == floats.other_bytes and p.quantizer_bytes == sum(
        4*q.numel() for m in bit_layers(net).values() for part in (m.weight_quantizer, m.act_quantizer) for q in (*part.parameters(), *part.buffers()))
    assert p.quantizer_bytes > 0 and not p.at().uncounted
    w4 = p.at(Bits(4, 4))
    assert w4.weight_bytes == floats.weight_bytes/8 and w4.compression == 8 and w4.total_bytes == w4.weight_bytes + w4.other_bytes + w4.quantizer_bytes


@pytest.mark.parametrize('bn', ['batch', 'switchable'])
def test_batch_norm_choices(bn):
    space = BitSpace([Bits(2, 2), Bits(4, 4)])
    net = quantize(make('cnn4', in_channels=1), LSQ(), example=rand(2, 1, 28, 28), skip='first', bn=bn, space=space if bn == 'switchable' else None)
    before = {k: v.clone() for k,v in net.state_dict().items()}
    c = cost(net, (1, 1, 28, 28), Bits(2, 2))
    assert not c.uncounted and c.macs == cost(make('cnn4', in_channels=1), (1, 1, 28, 28)).macs
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())


def test_leaves_no_trace():
    net = make('resnet20').train()
    net.stage1.eval()
    flags, before = [m.training for m in net.modules()], {k: v.clone() for k,v in net.state_dict().items()}
    profile(net, rand(2, 3, 32, 32))
    with pytest.raises(ValueError): profile(net, (1, 4, 32, 32))
    assert flags == [m.training for m in net.modules()] and not any(m._forward_hooks for m in net.modules())
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and torch.backends.mha.get_fastpath_enabled()


def test_profile_needs_no_second_pass():
    net = quantize(make('small_cnn'), LSQ(), example=rand(2, 1, 16, 16))
    p, calls = profile(net, (1, 1, 16, 16)), []
    net.register_forward_hook(lambda *_: calls.append(1))
    costs = [p.at(b).bitops for b in BitSpace.paper('lsq')]
    assert not calls and len(set(costs)) > 30


def test_vit_names_what_it_leaves_out():
    with torch.device('meta'): net = torchvision.models.vit_b_16()
    c, attention = cost(net, (1, 3, 224, 224)), [n for n,m in net.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attention) == 12 and set(attention) <= set(c.uncounted) and 'not counted' in repr(c)
    mlp, patches, head = 12*197*2*768*3072, 196*768*768, 768*1000
    assert c.macs == mlp + patches + head
    stored = c.weight_bytes + c.other_bytes
    assert stored == sum(4*p.numel() for p in net.parameters())


def test_transformer_layers_are_not_bypassed():
    c = cost(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), (2, 7, 16))
    assert [l.name for l in c.layers] == ['linear1', 'linear2'] and c.macs == 7*2*16*32


def test_other_modules_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.fc, self.unused, self.scale = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2), nn.Linear(3, 3), nn.Parameter(torch.ones(2))
        def forward(self, x): return self.fc(self.rnn(x)[0][:, -1])*self.scale
    c = cost(Net(), (2, 5, 4))
    assert set(c.uncounted) == {'rnn', 'unused', 'the model itself'} and 'never called' in c.uncounted['unused']
    assert [l.name for l in c.layers] == ['fc'] and c.macs == 16
    with pytest.raises(ValueError, match='nothing to count'): cost(nn.LSTM(4, 8), (2, 5, 4))


def test_shared_layers_and_weights():
    shared = nn.Linear(8, 8)
    c = cost(nn.Sequential(shared, nn.ReLU(), shared), (3, 8))
    assert (c.macs, c.weight_bytes, len(c.layers)) == (128, 256, 1)
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    c = cost(nn.Sequential(a, b), (3, 8))
    assert (c.macs, c.weight_bytes, c.other_bytes, len(c.layers)) == (128, 256, 0, 2)


def test_frame_and_plot():
    c = cost(make('small_cnn'), (1, 1, 16, 16))
    df = c.to_frame()
    assert list(df.index[:-1]) == [l.name for l in c.layers] and df.loc['total', 'macs'] == c.macs and df.macs.dtype == df.bitops.dtype == 'int64'
    assert (df.iloc[:-1][['weights', 'macs', 'bitops', 'bytes']].sum() == df.loc['total', ['weights', 'macs', 'bitops', 'bytes']]).all()
    fig = c.plot()
    assert list(fig.data[0].y) == [l.bitops for l in c.layers] and list(fig.data[1].y) == [l.weight_bytes for l in c.layers]
    assert all(a.title.text for a in (fig.layout.yaxis, fig.layout.yaxis2, fig.layout.xaxis2))


def test_refusals():
    net = make('small_cnn')
    p = profile(net, (1, 1, 16, 16))
    with pytest.raises(ValueError, match='W4A4'): p.at(Bits(4, 4))
    with pytest.raises(ValueError, match="'conv9'.*block1.conv"): p.at(Policy({'conv9': Bits(4, 4)}))
    with pytest.raises(ValueError, match='4'): p.at(4)
    with pytest.raises(ValueError, match='batch axis'): profile(net, (1, 16, 16))
    for bad, what in (((1, 1, 15, 8), 'does not run'), ((), 'example'), ([1, 1, 16, 16], 'example'), ((0, 1, 16, 16), 'positive'), (torch.zeros(0, 1, 16, 16), 'empty')):
        with pytest.raises(ValueError, match=what): profile(net, bad)
    quantized = profile(quantize(net, LSQ(), example=rand(2, 1, 16, 16)), (1, 1, 16, 16))
    with pytest.raises(ValueError, match='fc'): quantized.at(Policy({'fc': Bits(4, 4)}))
    with pytest.raises(ValueError, match='W1A1'): quantized.at(Bits(1, 1))
    assert quantized.at(Policy({'block2.conv': Bits(4, 4)})).layers[1].bitops == quantized.layers[1].macs*16
