"The design's promises about quantized networks, on networks of every kind."
import copy, functools, pickle

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from mebqat.batchnorm import deployed, reestimate_bn
from mebqat.bits import FP, FULL, Bits, BitSpace, Policy
from mebqat.data import load
from mebqat.evaluate import score, sweep
from mebqat.files import load_whole
from mebqat.layer_kinds import Quantized
from mebqat.layers import SwitchableBatchNorm, bit_layers, quantize, use_bits
from mebqat.models import make
from mebqat.quantizers import LSQ, SAT, DoReFa
from mebqat.steps import WidthTable
from mebqat.runs import open_run, spec_of
from mebqat.runs.images import ImageRecipe
from mebqat.train import TrainConfig, fit

settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

SCHEMES = [LSQ(), LSQ(per_channel=True), LSQ(shared_step=True, init='paper', reference_compat=True), DoReFa(),
           DoReFa(scale=None, per_channel=True), DoReFa(act_clip='pact'), SAT(), SAT(rounding='original', rescale=False),
           SAT(rounding='centered', shared_alpha=True, alpha=8., per_channel=True)]
every_scheme = pytest.mark.parametrize('scheme', SCHEMES, ids=repr)
pairs = st.builds(Bits, *[st.integers(1, 16) | st.just(FULL)]*2)
able = st.builds(Bits, *[st.integers(2, 16) | st.just(FULL)]*2)


def randn(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Depthwise(nn.Module):
    "Grouped, depthwise, strided and dilated convolutions, with and without bias and batch norm."
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise, self.norm2 = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8, bias=False), nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=2, dilation=2, groups=4, padding_mode='circular')
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm2(self.depthwise(self.norm(self.first(x)).relu())).relu()
        return self.fc(self.grouped(x).relu().mean((2, 3)))


def audio():
    return nn.Sequential(nn.Conv1d(2, 8, 5, stride=2), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 8, 3, padding='same', groups=2),
                         nn.ReLU(), nn.AdaptiveAvgPool1d(4), nn.Flatten(), nn.Linear(32, 16), nn.Dropout(.3), nn.ReLU(), nn.Linear(16, 3))


def vision_transformer():
    from torchvision.models import VisionTransformer
    net = VisionTransformer(image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=10)
    nn.init.normal_(net.heads.head.weight)  # torchvision starts it at zero
    return net


def from_torchvision(name):
    def build():
        import torchvision
        return getattr(torchvision.models, name)(num_classes=10)
    return build


NETWORKS = {'resnet18': (from_torchvision('resnet18'), (3, 32, 32)), 'mobilenet_v2': (from_torchvision('mobilenet_v2'), (3, 32, 32)),
            'transformer': (vision_transformer, (3, 32, 32)), 'audio': (audio, (2, 50)), 'depthwise': (Depthwise, (3, 12, 12)),
            'small_cnn': (lambda: make('small_cnn', 10, 1, 8, width=4), (1, 8, 8)), 'resnet20': (lambda: make('resnet20', width=4), (3, 16, 16)),
            'preact': (lambda: make('preact_resnet20', width=4), (3, 16, 16))}
SMALL = ('audio', 'depthwise', 'small_cnn')


def network(name, batch=4):
    "A float network with used batch norms, and a batch for it."
    build, shape = NETWORKS[name]
    torch.manual_seed(0)
    net, x = build(), randn(batch, *shape)
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_mean.normal_(std=.1)
            m.running_var.uniform_(.5, 2)
            m.num_batches_tracked += 1
    return net.eval(), x


@functools.cache
def _quantized(name, scheme):
    net, x = network(name)
    return quantize(net, scheme, example=x, skip='none'), x


def quantized(name, scheme):
    "A quantized network of the test's own, every layer included, and a batch for it."
    net, x = _quantized(name, scheme)
    return copy.deepcopy(net), x


def gradients(net): return {n: p.grad.clone() for n,p in net.named_parameters() if p.grad is not None}


def train_step(net, x):
    "Logits and gradients in training mode, with the same dropout each time."
    torch.manual_seed(1)
    net.train().zero_grad()
    y = net(x)
    (y*randn(*y.shape, seed=2)).sum().backward()
    return y.detach(), gradients(net)


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# Names and notation

def test_public_names_import_as_the_design_writes_them():
    space = {}
    exec('from mebqat.bits import Bits, FULL, BitSpace, Policy\n'
         'from mebqat.kernels import lsq, dorefa_weight, dorefa_act, sat_weight, pact\n'
         'from mebqat.quantizers import LSQ, DoReFa, SAT\n'
         'from mebqat.layers import quantize, use_bits\n'
         'from mebqat.data import load\n'
         'from mebqat.evaluate import sweep\n'
         'from mebqat.surface import Surface', space)
    assert all(callable(v) for k,v in space.items() if k not in ('FULL', '__builtins__')) and space['FULL'] == 32
    assert [hasattr(space['Surface'], n) for n in ('to_frame', 'plot', 'at', 'best', 'save', 'load')] == [True]*6


@given(pairs)
def test_bits_are_read_as_they_are_written(bits):
    assert Bits.parse(str(bits)) == bits == Bits.parse(str(bits).lower()) == Bits.parse(f'  {bits} ')
    name = {FULL: 'fp'}
    if FULL not in (bits.w, bits.a): assert Bits.parse(f'{bits.w},{bits.a}') == bits
    assert Bits.parse(f'{name.get(bits.w, bits.w)} , {name.get(bits.a, bits.a)}') == bits
    assert bits.is_full == (bits.w == bits.a == FULL) and hash(bits) == hash(Bits(bits.w, bits.a))
    with pytest.raises(AttributeError): bits.w = 3


def test_bits_are_written_as_the_design_says():
    assert [str(Bits(4, 8)), str(Bits(3, FULL)), str(Bits(FULL, 3)), str(Bits(FULL, FULL))] == ['W4A8', 'W3AFP', 'WFPA3', 'FP']


@given(st.integers().filter(lambda b: not 1 <= b <= 16 and b != FULL) | st.floats() | st.booleans() | st.text() | st.none())
def test_other_widths_are_refused_by_name(b):
    for make_pair in (lambda: Bits(b, 4), lambda: Bits(4, b)):
        with pytest.raises(ValueError) as e: make_pair()
        assert repr(b) in str(e.value)


@given(st.text())
def test_no_text_makes_the_parser_fall_over(text):
    try: assert str(Bits.parse(text))
    except ValueError as e: assert '\n' not in repr(str(e))


@pytest.mark.parametrize('text', ['', 'W4', 'A4', '4', 'W4A', 'W0A4', 'W17A4', 'W4A33', 'W-1A4', 'W4A4x', 'W4.5A4', '4,4,4', 'FPFP'])
def test_what_is_no_pair_is_refused_by_name(text):
    with pytest.raises(ValueError, match='bits'): Bits.parse(text)


def test_the_papers_sets_of_pairs():
    w = [2, 3, 4, 5, 6, 7, 8, 16]
    common = {(i, j) for i in w for j in w + [32]} | {(32, 32)}
    for scheme, wanted in (('lsq', common), ('sat', common), ('dorefa', common | {(1, 1), (1, 32)})):
        space = BitSpace.paper(scheme)
        assert {(b.w, b.a) for b in space} == wanted and len(space) == len(wanted) == {'lsq': 73, 'sat': 73, 'dorefa': 75}[scheme]
        assert Bits(4, 4) in space and Bits(9, 4) not in space
        assert BitSpace.parse(f'paper-{scheme}') == space == BitSpace.parse(' '.join(map(str, space)))
        g = torch.Generator().manual_seed(0)
        drawn = [space.sample(g) for _ in range(3000)]
        assert set(drawn) == set(space)
        assert drawn[:20] == [space.sample(h) for h in [torch.Generator().manual_seed(0)] for _ in range(20)]


# Full precision, parameters, idle parameters

@pytest.mark.parametrize('name', NETWORKS)
@pytest.mark.parametrize('scheme', [LSQ(), DoReFa(act_clip='pact'), SAT()], ids=lambda s: s.name)
def test_full_precision_is_the_float_network_bit_for_bit(name, scheme): check_full(name, scheme, scheme == LSQ())


@pytest.mark.parametrize('name', SMALL)
@every_scheme
def test_full_precision_is_exact_for_every_option(name, scheme):
    for skip in ('none', 'ends'): check_full(name, scheme, True, skip)


def check_full(name, scheme, gradients_too, skip='ends'):
    net, x = network(name)
    before = net(x)
    wanted = train_step(copy.deepcopy(net), x) if gradients_too else None
    state = {k: v.clone() for k,v in net.state_dict().items()}
    assert quantize(net, scheme, example=x, skip=skip) is net
    assert all(torch.equal(net.state_dict()[k], v) for k,v in state.items()) and not net.training
    assert torch.equal(net(x), before)
    with use_bits(net, Bits(2, 2)): assert not torch.equal(net(x), before)
    with use_bits(net, FP): assert torch.equal(net(x), before)
    if not gradients_too: return
    got = train_step(net, x)
    assert torch.equal(got[0], wanted[0]) and equal(got[1], wanted[1])


def test_a_real_vision_transformer_is_exact_at_full_precision():
    from torchvision.models import vit_b_16
    torch.manual_seed(0)
    net, x = vit_b_16().eval(), randn(1, 3, 224, 224)
    with torch.no_grad():
        net.heads.head.weight.normal_()  # torchvision starts it at zero
        before = net(x)
        quantize(net, LSQ(), example=x)
        assert torch.equal(net(x), before)
        with use_bits(net, Bits(4, 4)): assert not torch.equal(net(x), before)
    assert len(bit_layers(net)) == 48  # twelve blocks: in-projection, out-projection, two of the MLP
    assert net.quantization.left_float == {
        'class_token': 'a parameter that VisionTransformer uses in its own code', 'encoder.pos_embedding': 'a parameter that Encoder uses in its own code',
        'conv_proj': 'spared by skip', 'heads.head': 'spared by skip'}


@every_scheme
@pytest.mark.parametrize('name', SMALL)
def test_parameters_never_change_with_bits(name, scheme):
    net, x = quantized(name, scheme)
    fresh, _ = quantized(name, scheme)
    seen = lambda: {k: (v.shape, v.data_ptr()) if not k.endswith('_extra_state') else bool(v) for k,v in net.state_dict(keep_vars=True).items()}
    keys = seen()
    owners = {n: id(p) for n,p in net.named_parameters()}
    for bits in (Bits(2, 2), Bits(16, 3), Bits(4, FULL), Bits(FULL, 4), FP, Policy({next(iter(bit_layers(net))): Bits(3, 5)})):
        with use_bits(net, bits):
            net(x)
            assert seen() == keys
            assert {n: id(p) for n,p in net.named_parameters()} == owners
            fresh.load_state_dict(net.state_dict())


@every_scheme
@given(able)
@settings(max_examples=8)
def test_idle_parameters_get_zero_gradient(scheme, bits):
    net, x = quantized('depthwise', scheme)
    with use_bits(net, bits): train_step(net, x)
    for layer in bit_layers(net).values():
        for quantizer, width in ((layer.weight_quantizer, bits.w), (layer.act_quantizer, bits.a)):
            for table in (m for m in quantizer.modules() if isinstance(m, WidthTable)):
                g = table.learned.grad
                if width == FULL: assert g is None or not g.any()
                else:
                    used = torch.zeros(len(g), dtype=torch.bool)
                    used[table.row(width)] = True
                    assert not g[~used].any() and g.isfinite().all()
    net.zero_grad(set_to_none=False)
    torch.optim.SGD(net.parameters(), .1, momentum=.9).step()


def test_steps_are_per_width_by_default_and_shared_by_choice():
    for scheme, rows in ((LSQ(), 16), (LSQ(shared_step=True), 1), (SAT(), 16), (SAT(shared_alpha=True), 1)):
        net, x = network('small_cnn')
        quantize(net, scheme, example=x)
        assert {len(m.log_factor) for m in net.modules() if isinstance(m, WidthTable)} == {rows}


@every_scheme
@given(able)
@settings(max_examples=6)
def test_layers_see_no_more_than_their_levels(scheme, bits):
    net, x = quantized('depthwise', scheme)
    seen = {}
    for n,m in bit_layers(net).items():
        for kind in ('weight', 'act'):
            getattr(m, f'{kind}_quantizer').register_forward_hook(lambda q, i, o, key=(n, kind): seen.update({key: o.detach()}))
    with use_bits(net, bits), torch.no_grad(): net(x)
    if bits.is_full: return
    for (n, kind), t in seen.items():
        extra = kind == 'act' and getattr(scheme, 'reference_compat', False) and not bit_layers(net)[n].signed
        width = bits.w if kind == 'weight' else bits.a
        for part in (t if kind == 'weight' and scheme.per_channel else [t]):
            if width != FULL: assert len(part.unique()) <= 2**width + extra


@given(st.integers(0, 2**32), able)
@settings(max_examples=5)
def test_a_quantized_layer_computes_with_its_quantized_parts(seed, bits):
    torch.manual_seed(seed % 2**31)
    layers = {nn.Conv2d(4, 6, 3, groups=2, padding=1, padding_mode='reflect'): (4, 7, 7), nn.Linear(5, 3): (4, 5),
              nn.Conv1d(2, 3, 3, stride=2): (2, 9)}
    for layer, x in ((m, randn(2, *shape, seed=seed)) for m,shape in layers.items()):
        plain = copy.deepcopy(layer)
        net = quantize(nn.Sequential(layer), LSQ(), example=x, skip='none')
        with use_bits(net, bits):
            y, q = net(x), net[0]
            plain.weight.data = q.weight_quantizer(q.weight, bits.w).detach()
            assert torch.equal(y, plain(q.act_quantizer(x, bits.a)))


# Switching

def state(net):
    keys = {Quantized: lambda m: str(m.bits), SwitchableBatchNorm: lambda m: m.key}
    return [f(m) for m in net.modules() for kind,f in keys.items() if isinstance(m, kind)]


@given(st.lists(able, min_size=1, max_size=5), st.integers(0, 5))
def test_use_bits_nests_and_restores_whatever_happens(inside, fails_at):
    net, start = SWITCHED, state(SWITCHED)
    def go(rest):
        if not rest: return
        before = state(net)
        try:
            with use_bits(net, rest[0]) as same:
                assert same is net and set(state(net)) == {str(rest[0])}
                go(rest[1:])
                if len(rest) == fails_at: raise KeyError('stop')
        finally: assert state(net) == before
    try: go(inside)
    except KeyError: assert fails_at
    assert state(net) == start == ['FP']*len(start)


SWITCHED, _ = quantized('small_cnn', LSQ())


def test_use_bits_refuses_what_it_cannot_do_and_changes_nothing():
    net, x = network('small_cnn')
    with pytest.raises(ValueError, match='quantize'):
        with use_bits(net, Bits(4, 4)): pass
    quantize(net, LSQ(), example=x, skip='none')
    name = next(iter(bit_layers(net)))
    for bits, word in ((Policy({'nowhere': Bits(4, 4)}), 'nowhere'), (Policy({name: Bits(4, 4), 'block9.conv': FP}), 'block9.conv'),
                       (Bits(1, 4), 'W1A4'), (Bits(4, 1), 'W4A1'), (Policy({name: Bits(1, 1)}), 'W1A1'), ('W4A4', 'W4A4'), (4, '4'),
                       (None, 'None'), ({name: Bits(4, 4)}, 'Policy')):
        with pytest.raises(ValueError, match=word):
            with use_bits(net, bits): raise AssertionError('the block must not run')
        assert set(state(net)) == {'FP'}


def test_a_policy_sets_each_layer_and_leaves_the_rest_at_full_precision():
    net, x = quantized('small_cnn', LSQ())
    names = list(bit_layers(net))
    with use_bits(net, Policy({names[1]: Bits(2, 3), names[2]: Bits(8, FULL)})):
        assert [str(m.bits) for m in bit_layers(net).values()][:4] == ['FP', 'W2A3', 'W8AFP', 'FP']
    with use_bits(net, Bits(4, 4)): same = net(x)
    with use_bits(net, Policy.uniform(names, Bits(4, 4))): assert torch.equal(net(x), same)


def test_pinned_ends_keep_their_pair_and_follow_to_full_precision():
    net, x = network('small_cnn')
    before = net(x)
    quantize(net, LSQ(), example=x, ends=Bits(8, 8))
    with use_bits(net, Bits(2, 2)): assert [str(m.bits) for m in bit_layers(net).values()] == ['W8A8', *['W2A2']*3, 'W8A8']
    with use_bits(net, FP): assert torch.equal(net(x), before)


@pytest.mark.parametrize('arguments, word', [
    ({'bn': 'frozen'}, 'frozen'), ({'bn': 'switchable'}, 'space'), ({'space': BitSpace([FP])}, 'space'), ({'skip': 'middle'}, 'middle'),
    ({'skip': ['fc9']}, 'fc9'), ({'skip': lambda n, m: True}, 'nothing to quantize'), ({'example': randn(2, 3, 8, 8)}, '3, 8, 8'),
    ({'example': torch.full((2, 1, 8, 8), float('nan'))}, 'NaN')])
def test_quantize_refuses_and_leaves_the_network_alone(arguments, word):
    net, x = network('small_cnn')
    types, keys = [type(m) for m in net.modules()], list(net.state_dict())
    with pytest.raises(ValueError, match=word): quantize(net, LSQ(), **{'example': x, **arguments})
    assert [type(m) for m in net.modules()] == types and list(net.state_dict()) == keys
    quantize(net, LSQ(), example=x)
    with pytest.raises(ValueError, match='already'): quantize(net, LSQ(), example=x)


# Batch norm as a visible choice

SPACE = BitSpace.parse('W2A2 W4A4 W8A8 FP')


def with_norms(mode, name='depthwise'):
    net, x = network(name, batch=16)
    return quantize(net, LSQ(), example=x, bn=mode, space=SPACE if mode == 'switchable' else None), x


def statistics(net): return {k: v.clone() for k,v in net.state_dict().items() if 'running' in k}


def test_batch_statistics_serve_evaluation_too():
    net, x = with_norms('batch')
    assert not statistics(net)
    with use_bits(net, Bits(4, 4)):
        alone, together = net(x[:8]), net(x)[:8]
        assert (alone - together).abs().max() > 1e-3
        assert_close(net.eval()(x), net.train()(x))
    fresh, _ = network('depthwise', batch=16)
    for m in fresh.modules(): m.training = isinstance(m, nn.BatchNorm2d)
    assert torch.equal(net(x), fresh(x))


@pytest.mark.parametrize('mode', ['running', 'switchable', 'reestimate'])
def test_running_statistics_make_images_independent(mode):
    net, x = with_norms(mode)
    with use_bits(net, Bits(4, 4)): assert_close(net(x[:8]), net(x)[:8])


def test_running_statistics_are_shared_between_widths():
    net, x = with_norms('running')
    before = statistics(net)
    with use_bits(net, Bits(2, 2)): net.train()(x)
    assert all((v != before[k]).any() for k,v in statistics(net).items())


def test_switchable_norms_are_each_pairs_own():
    net, x = with_norms('switchable')
    assert torch.equal(net(x), network('depthwise', batch=16)[0](x))
    before = statistics(net)
    with use_bits(net, Bits(2, 2)): train_step(net, x)
    changed = {k for k,v in statistics(net).items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if '.W2A2.' in k} and len(changed) == 4
    learned = {n for n,p in net.named_parameters() if 'norms' in n and p.grad is not None and p.grad.any()}
    assert learned == {n for n,_ in net.named_parameters() if '.W2A2.' in n}
    with pytest.raises(ValueError, match='W3A3.*W2A2'):
        with use_bits(net, Bits(3, 3)): pass
    assert set(state(net)) == {'FP'}


def test_reestimated_statistics_are_plain_averages_at_those_bits():
    net, x = with_norms('reestimate')
    parts = x.split(4)
    inputs = []
    hook = net.norm.register_forward_pre_hook(lambda m, i: inputs.append(i[0].detach()))
    with use_bits(net, Bits(3, 3)): reestimate_bn(net, parts)
    hook.remove()
    assert_close(net.norm.running_mean, torch.stack([i.mean((0, 2, 3)) for i in inputs]).mean(0))
    assert_close(net.norm.running_var, torch.stack([i.var((0, 2, 3)) for i in inputs]).mean(0))
    assert net.norm.momentum == .1 and not net.norm.training


def test_reestimation_wants_training_images_and_puts_everything_back():
    net, x = with_norms('reestimate')
    data, before = (x, torch.zeros(16).long()), statistics(net)
    with pytest.raises(ValueError, match='bn_data'): score(net, Bits(4, 4), data)
    with deployed(net, Bits(4, 4), data): assert not equal(statistics(net), before)
    assert equal(statistics(net), before) and set(state(net)) == {'FP'}
    surface = sweep(net, data, SPACE, bn_data=data)
    assert equal(statistics(net), before) and set(surface) == set(SPACE)
    assert all(score(net, b, data, bn_data=data).loss == surface.at(b).loss for b in SPACE)
    plain, _ = with_norms('running')
    assert list(plain.state_dict()) == list(net.state_dict())


# Files run nothing

class Payload:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (str(self.mark), 'w')


@pytest.mark.parametrize('save', [lambda o, f: f.write_bytes(pickle.dumps(o)), torch.save], ids=['pickle', 'torch.save'])
def test_a_pickle_in_disguise_is_refused_and_does_not_run(tmp_path, save):
    mark, file = tmp_path/'ran', tmp_path/'run'/'model.safetensors'
    file.parent.mkdir()
    save({'weight': Payload(mark)}, file)
    pool = load('digits')
    attempts = [lambda: open_run(file), lambda: open_run(file.parent), lambda: load_whole(file),
                lambda: ImageRecipe(spec_of('mebqat', init=str(file.parent))).float_network(pool)]
    for attempt in attempts:
        with pytest.raises(ValueError, match='model.safetensors'): attempt()
    file.rename(file.with_name('checkpoint.safetensors'))
    with pytest.raises(ValueError, match='checkpoint.safetensors'):
        fit(nn.Linear(2, 2), None, None, TrainConfig(1), file.parent, resume=True)
    assert not mark.exists()


def test_the_payload_would_have_run(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path/'ran'))).close()
    assert (tmp_path/'ran').exists()
