"What cost's notebook cannot check about itself: an independent counter, real models, no traces, refusals."
import warnings

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from mebqat.bits import FP, FULL, Bits, BitSpace, Policy
from mebqat.cost import cost, profile
from mebqat.layer_kinds import QLinear, Quantized
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.models import make
from mebqat.quantizers import SAT, DoReFa, LSQ
from mebqat.steps import WidthTable

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


@pytest.mark.parametrize('bits', [Bits(2, 8), Bits(3, FULL), FP, Policy({'stage1.0.conv1': Bits(2, 4), 'conv': Bits(4, 4)})], ids=str)
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
    assert p.other_bytes == floats.other_bytes and p.quantizer_bytes == 4*16*2*len(bit_layers(net)) and not p.at().uncounted
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


def test_vit_agrees_with_torchvisions_own_count():
    with torch.device('meta'): net = torchvision.models.vit_b_16()
    c, attention = cost(net, (1, 3, 224, 224)), [n for n,m in net.named_modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attention) == 12 and set(attention) < {l.name for l in c.layers} and set(c.uncounted) == {'the model itself', 'encoder'}
    mlp, patches, head, projections = 12*197*2*768*3072, 196*768*768, 768*1000, 12*197*4*768*768
    assert c.macs == mlp + patches + head + projections
    products = 12*2*197*197*768 # softmax(QK)V, which has no weights
    assert round((c.macs + products)/1e9, 3) == torchvision.models.ViT_B_16_Weights.IMAGENET1K_V1.meta['_ops'] == 17.564
    assert c.weight_bytes + c.other_bytes == sum(4*p.numel() for p in net.parameters())


def state_bytes(model):
    "What the network's own state takes, tied tensors once, floats at 4 bytes."
    return sum(t.numel()*(4 if t.is_floating_point() else t.element_size()) for t in (*model.parameters(), *model.buffers()))


ATTENTION = [dict(), dict(kdim=6), dict(kdim=6, vdim=4), dict(bias=False), dict(add_bias_kv=True, add_zero_attn=True)]


class Attends(nn.Module):
    "Attention with queries, keys and values of their own lengths, given by name or by place; the batch comes first outside."
    def __init__(self, first, by_name, **options):
        super().__init__()
        self.attend, self.by_name = nn.MultiheadAttention(8, 2, batch_first=first, **options), by_name
    def forward(self, q, k, v):
        q, k, v = (x if self.attend.batch_first else x.transpose(0, 1) for x in (q, k, v))
        return self.attend(query=q, key=k, value=v)[0] if self.by_name else self.attend(q, k, v, need_weights=False)[0]


@pytest.mark.parametrize('options', ATTENTION, ids=str)
@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('batch, by_name', [(1, True), (3, False)])
def test_attention_agrees_with_torchs_counter(options, first, batch, by_name):
    net = Attends(first, by_name, **options)
    kdim, vdim = options.get('kdim', 8), options.get('vdim', 8)
    args = rand(batch, 5, 8), rand(batch, 7, kdim), rand(batch, 7, vdim)
    c = cost(net, args)
    assert [(l.name, l.kind, l.macs, l.weights) for l in c.layers] == [
        ('attend', 'MultiheadAttention', 5*8*8 + 7*kdim*8 + 7*vdim*8, 8*(8 + kdim + vdim)),
        ('attend.out_proj', 'NonDynamicallyQuantizableLinear', 5*8*8, 64)]
    assert not c.uncounted and c.total_bytes == state_bytes(net)
    keys = 7 + 2*bool(options.get('add_bias_kv'))
    products = 2*2*5*keys*8*batch # queries with keys, then with values
    net.train() # the fused path of evaluation has no name in torch's counter
    with FlopCounterMode(display=False) as counter, torch.no_grad(): net.attend(*(x if first else x.transpose(0, 1) for x in args), need_weights=True)
    assert 2*batch*c.macs + products == counter.get_total_flops()
    assert not net.attend._forward_hooks and not net.attend._forward_pre_hooks


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('net, macs', [
    (lambda first: nn.TransformerEncoderLayer(16, 2, 32, batch_first=first), 7*(4*16*16 + 2*16*32)),
    (lambda first: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=first), 3, enable_nested_tensor=False), 3*7*(4*16*16 + 2*16*32)),
    (lambda first: nn.Sequential(nn.Linear(16, 16), nn.TransformerEncoderLayer(16, 2, 32, batch_first=first)), 7*(5*16*16 + 2*16*32))])
def test_the_batch_is_found_on_either_axis(first, net, macs):
    for batch in (1, 2, 7, 11):
        c = cost(net(first), (batch, 7, 16) if first else (7, batch, 16))
        assert c.macs == macs and not c.uncounted


def test_a_recurrent_layer_tells_the_batch_axis_too():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.rnn, self.fc = nn.GRU(4, 8), nn.Linear(8, 2)
        def forward(self, x): return self.fc(self.rnn(x)[0])
    assert [cost(Net(), (5, batch, 4)).macs for batch in (1, 3)] == [5*16]*2


def test_attention_without_a_batch_is_refused():
    with pytest.raises(ValueError, match='batch axis'): cost(nn.TransformerEncoderLayer(16, 2, 32), (7, 16))


def test_a_decoder_attends_twice():
    c = cost(nn.TransformerDecoderLayer(16, 2, 32, batch_first=True), (rand(2, 5, 16), rand(2, 9, 16)))
    assert {l.name: l.macs for l in c.layers} == {
        'self_attn': 5*3*16*16, 'self_attn.out_proj': 5*16*16, 'multihead_attn': (5 + 9 + 9)*16*16, 'multihead_attn.out_proj': 5*16*16,
        'linear1': 5*16*32, 'linear2': 5*32*16}


class QuantizedAttention(Quantized, nn.MultiheadAttention):
    "Quantized projections in; the one out is called as a layer."
    @property
    def weight(self): return self.in_proj_weight

    def forward(self, query, key, value):
        x, w = self.quantized(query)
        b, n, e = x.shape
        q, k, v = nn.functional.linear(x, w, self.in_proj_bias).view(b, n, 3, self.num_heads, e//self.num_heads).permute(2, 0, 3, 1, 4)
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, e)), None


def test_quantized_attention_counts_like_the_float_one():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.stem, self.attend, self.head = nn.Linear(8, 8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        def forward(self, x): return self.head(self.attend(*[self.stem(x)]*3)[0])
    net, x = Net(), rand(2, 5, 8)
    floats = cost(net, x)
    a, scheme = net.attend, LSQ()
    quantize(net, scheme, example=x, skip='none')
    if not isinstance(a, Quantized):
        a.__class__ = QuantizedAttention
        a.weight_quantizer, a.act_quantizer, a.scheme, a.signed = scheme.weight(a.in_proj_weight), scheme.act(x, True), scheme, True
        a.out_proj.__class__ = QLinear
        a.out_proj.weight_quantizer, a.out_proj.act_quantizer, a.out_proj.scheme, a.out_proj.signed = scheme.weight(a.out_proj.weight), scheme.act(x, True), scheme, True
    p = profile(net, x)
    assert [(l.name, l.macs, l.weights) for l in p.layers] == [(l.name, l.macs, l.weights) for l in floats.layers] and all(l.quantized for l in p.layers)
    c = p.at(Policy({'attend': Bits(2, 4), 'attend.out_proj': Bits(3, 5), 'stem': Bits(8, 8), 'head': Bits(8, 8)}))
    assert {l.name: (l.bitops, l.weight_bytes) for l in c.layers if 'attend' in l.name} == {
        'attend': (5*3*64*2*4, 3*64*2/8), 'attend.out_proj': (5*64*3*5, 64*3/8)}
    assert not c.uncounted and p.other_bytes == floats.other_bytes


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


def test_weights_used_by_hand_are_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.gru, self.taps, self.fc = nn.Embedding(9, 4), nn.GRU(4, 8, batch_first=True), nn.ParameterList([torch.ones(8, 1, 3), torch.ones(8)]), nn.Linear(8, 2)
            self.by_hand = ByHand()
        def forward(self, i):
            h = nn.functional.conv1d(self.gru(self.embed(i))[0].mT, self.taps[0], self.taps[1], groups=8)
            return self.fc(self.by_hand(h).mean(2))
    class ByHand(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(8, 8, 1))
        def forward(self, x): return nn.functional.conv1d(x, self.w)
    c = cost(Net(), torch.zeros(2, 5, dtype=torch.long))
    assert c.uncounted == {'embed': 'Embedding, 36 parameters', 'gru': 'GRU, 336 parameters', 'taps': 'ParameterList, 32 parameters', 'by_hand': 'ByHand, 64 parameters'}
    assert c.total_bytes == state_bytes(Net())


def test_shared_layers_and_weights():
    shared = nn.Linear(8, 8)
    c = cost(nn.Sequential(shared, nn.ReLU(), shared), (3, 8))
    assert (c.macs, c.weight_bytes, len(c.layers)) == (128, 256, 1)
    a, b = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
    b.weight = a.weight
    c = cost(nn.Sequential(a, b), (3, 8))
    assert (c.macs, c.weight_bytes, c.other_bytes, len(c.layers)) == (128, 256, 0, 2)


class Shares(nn.Module):
    "Three square layers on one tensor: a parameter, its alias, and a parameter made from its data."
    order = ('a', 'b', 'c')
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in 'abc')
        self.b.weight, self.c.weight = self.a.weight, nn.Parameter(self.a.weight.data)
    def forward(self, x):
        for n in self.order: x = getattr(self, n)(x)
        return x


@pytest.mark.parametrize('order', ['abc', 'cba', 'bac', 'bca'])
@pytest.mark.parametrize('widths', [(2, 8, 4), (8, 2, 4), (3, 3, 3), (2, 2, FULL)])
def test_a_shared_tensor_is_stored_once_at_the_widest(order, widths):
    net = Shares()
    net.order = order
    p = profile(quantize(net, LSQ(), example=rand(4, 16), skip='none'), rand(1, 16))
    c = p.at(Policy({n: Bits(w, 8) for n,w in zip('abc', widths)}))
    assert c.weight_bytes == 256*max(widths)/8 and c.bitops == 256*8*sum(widths)
    rows = {l.name: l for l in c.layers}
    assert sorted(l.weights for l in c.layers) == [0, 0, 256] and max(c.layers, key=lambda l: l.weights).bits.w == max(widths)
    assert {n: l.bits.w for n,l in rows.items()} == dict(zip('abc', widths)) and c.compression == 32/max(widths)
    assert c.to_frame().loc['total', 'bytes'] == c.to_frame().iloc[:-1].bytes.sum() == c.weight_bytes
    assert p.at(Bits(4, 4)).weight_bytes == 128 and p.at().total_bytes == 4*256 + p.quantizer_bytes and p.other_bytes == 0


def test_a_pinned_or_spared_layer_keeps_the_shared_tensor_wide():
    for how, bytes in ((dict(skip='first', ends=Bits(8, 8)), 256), (dict(skip='first'), 1024), (dict(skip='none'), 64)):
        p = profile(quantize(Shares(), LSQ(), example=rand(4, 16), **how), rand(1, 16))
        assert p.at(Bits(2, 8)).weight_bytes == bytes


def test_a_float_policy_charges_the_widest_too():
    p = profile(Shares(), (1, 16))
    assert p.at(Policy({'a': Bits(2, 2), 'b': Bits(5, 2), 'c': Bits(3, 2)})).weight_bytes == 256*5/8
    assert p.at(p.policy(Bits(4, 4), Bits(8, 8))).weight_bytes == 256


def test_views_of_one_tensor_are_one():
    class Mirror(nn.Module):
        def __init__(self): super().__init__(); self.down, self.up = nn.Linear(12, 5, bias=False), Up()
        def forward(self, x): return self.up(self.down(x))
    class Up(nn.Linear):
        def __init__(self):
            super().__init__(5, 12, bias=False)
            del self.weight
        @property
        def weight(self): return self.source[0].weight.t()
    net = Mirror()
    net.up.source = (net.down,)
    p = profile(net, (1, 12))
    assert p.at().weight_bytes == 240 == state_bytes(net) and p.at(Policy({'down': Bits(2, 2), 'up': Bits(6, 6)})).weight_bytes == 60*6/8


@pytest.mark.parametrize('first', ['encoder', 'decoder'])
def test_convolutions_share_as_well(first):
    class Auto(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Conv2d(3, 6, 3, bias=False), nn.ConvTranspose2d(6, 3, 3, bias=False)
            self.decoder.weight = self.encoder.weight
        def forward(self, x): return self.decoder(self.encoder(x)) if first == 'encoder' else self.encoder(self.decoder(x))
    p = profile(Auto(), (1, 3, 8, 8) if first == 'encoder' else (1, 6, 8, 8))
    assert p.at(Policy({'encoder': Bits(8, 8), 'decoder': Bits(4, 8)})).weight_bytes == p.at(Policy({'encoder': Bits(4, 8), 'decoder': Bits(8, 8)})).weight_bytes == 162


class Language(nn.Module):
    "An embedding and a classifier on one tensor."
    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.fc = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50)
        self.fc.weight = self.embed.weight
    def forward(self, tokens): return self.fc(self.mix(self.embed(tokens)))


@pytest.mark.parametrize('skip', ['none', 'last'])
def test_a_float_embedding_keeps_the_classifiers_tensor(skip):
    tokens = torch.zeros(1, 7, dtype=torch.long)
    p = profile(quantize(Language(), LSQ(), example=tokens, skip=skip), tokens)
    c = p.at(Bits(2, 8))
    assert c.weight_bytes == 4*800 + 256*2/8 and c.other_bytes == 4*(16 + 50) and set(c.uncounted) == {'embed'}
    assert c.layers[1].bits.w == (2 if skip == 'none' else 32) and 'kept at 32 bits' in list(c.to_frame().tensor)


def test_a_second_name_in_a_container_is_no_reader():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(16, 16))
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.a.weight = self.b.weight = self.w
        def forward(self, x): return self.b(self.a(x))
    c = profile(Net(), (1, 16)).at(Policy({'a': Bits(2, 2), 'b': Bits(4, 4)}))
    assert not c.uncounted and c.total_bytes == 128


def test_parts_of_one_buffer_are_several():
    flat = torch.ones(512)
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    for m,part in zip(net, flat.view(2, 16, 16)): m.weight = nn.Parameter(part)
    assert cost(net, (1, 16)).weight_bytes == 2048
    with torch.device('meta'): net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False))
    assert cost(net, (1, 16)).weight_bytes == 2048


def old_weight_norm(layer):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return nn.utils.weight_norm(layer)


@pytest.mark.parametrize('wrap, beside', [
    (old_weight_norm, 8), (nn.utils.parametrizations.weight_norm, 8), (nn.utils.spectral_norm, 8 + 72), (nn.utils.parametrizations.spectral_norm, 8 + 72),
    (lambda layer: prune.l1_unstructured(layer, 'weight', .5), 576), (nn.utils.parametrizations.orthogonal, None)])
def test_a_computed_weight_is_stored_once(wrap, beside):
    plain = lambda: [nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10)]
    layers, floats = plain(), cost(nn.Sequential(*plain()), (1, 1, 16, 16))
    layers[2] = wrap(layers[2])
    net = nn.Sequential(*layers).train()
    before = {k: v.clone() for k,v in net.state_dict().items()}
    p = profile(net, (1, 1, 16, 16))
    c = p.at()
    assert c.total_bytes == state_bytes(net) and not c.uncounted and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    assert (c.macs, c.weight_bytes) == (floats.macs, floats.weight_bytes) and p.at(p.policy(Bits(4, 4))).weight_bytes == floats.weight_bytes/8
    if beside is not None: assert c.other_bytes == floats.other_bytes + 4*beside


def test_weight_norm_quantized():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), old_weight_norm(nn.Conv2d(8, 8, 3)), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
    p = profile(quantize(net, LSQ(), example=rand(4, 1, 16, 16), skip='none'), (1, 1, 16, 16))
    assert p.at().total_bytes == 49_192 and p.at(Bits(4, 4)).weight_bytes == (72 + 576 + 11520)/2


def test_quantizer_bytes_are_a_value_per_width_and_channel():
    net = quantize(make('small_cnn'), LSQ(per_channel=True), example=rand(2, 1, 16, 16), skip='none')
    p = profile(net, (1, 1, 16, 16))
    assert p.quantizer_bytes == sum(4*16*(len(m.weight) + 1) for m in bit_layers(net).values())
    for m in net.modules():
        if isinstance(m, WidthTable): m.register_buffer('start_of_a_test', torch.ones(16, 3))
    again = profile(net, (1, 1, 16, 16))
    assert (again.quantizer_bytes, again.other_bytes) == (p.quantizer_bytes, p.other_bytes)


@pytest.mark.parametrize('wrap', [torch.optim.swa_utils.AveragedModel, nn.DataParallel])
def test_wrapped_networks_cost_what_is_inside(wrap):
    net = quantize(make('small_cnn'), LSQ(), example=rand(2, 1, 16, 16))
    assert profile(wrap(net), (1, 1, 16, 16)).at(Bits(2, 4)) == profile(net, (1, 1, 16, 16)).at(Bits(2, 4))


@pytest.mark.parametrize('dim', [1, 2, 3])
@pytest.mark.parametrize('groups, stride, dilation', [(1, 1, 1), (2, 3, 1), (1, 2, 2)])
def test_transposed_convolutions_by_hand(dim, groups, stride, dilation):
    layer = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dim - 1](4, 6, 3, stride=stride, groups=groups, dilation=dilation)
    c = cost(layer, (2, 4, *[5]*dim))
    assert c.macs == 5**dim * 4 * 6//groups * 3**dim and c.weight_bytes == 4*layer.weight.numel()


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
