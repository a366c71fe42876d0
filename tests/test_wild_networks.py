"Networks that others wrote: exact at full precision, quantized in every mode, and nothing with weights left unsaid."
import copy, functools, warnings

import pytest
import torch
from torch import nn

from mebqat.bits import FP, Bits, BitSpace, Policy
from mebqat.inputs import logits_of
from mebqat.layers import bit_layers, quantize, use_bits
from mebqat.methods import mebqat
from mebqat.quantizers import LSQ

LOW = Bits(2, 2)
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.PReLU)


def torchvision(name, **options):
    import torchvision
    return getattr(torchvision.models, name)(num_classes=5, **options)


def vit():
    from torchvision.models import VisionTransformer
    return VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=64, num_classes=5)


def swin():
    from torchvision.models import SwinTransformer
    return SwinTransformer([2, 2], embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=[4, 4], num_classes=5)


def convnext():
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt
    return ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 2)], num_classes=5)


class Encoder(nn.Module):
    "A transformer over pixels' rows, as in the tutorials."
    def __init__(self):
        super().__init__()
        self.embed, self.place = nn.Linear(48, 32), nn.Parameter(torch.randn(1, 16, 32))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2)
        self.fc = nn.Linear(32, 5)
    def forward(self, x): return self.fc(self.encoder(self.embed(x.transpose(1, 2).flatten(2)) + self.place).mean(1))


def timm(name, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        module = pytest.importorskip('timm', reason='timm is not installed')
    return module.create_model(name, num_classes=5, **options)


NETWORKS = {
    'resnet18': (lambda: torchvision('resnet18'), 32), 'mobilenet_v2': (lambda: torchvision('mobilenet_v2'), 32),
    'mobilenet_v3_small': (lambda: torchvision('mobilenet_v3_small'), 32), 'efficientnet_b0': (lambda: torchvision('efficientnet_b0'), 32),
    'densenet121': (lambda: torchvision('densenet121'), 32), 'googlenet': (lambda: torchvision('googlenet', init_weights=False, aux_logits=False), 32),
    'squeezenet1_1': (lambda: torchvision('squeezenet1_1'), 32), 'shufflenet_v2_x0_5': (lambda: torchvision('shufflenet_v2_x0_5'), 32),
    'regnet_y_400mf': (lambda: torchvision('regnet_y_400mf'), 32), 'convnext': (convnext, 32),
    'mnasnet0_5': (lambda: torchvision('mnasnet0_5'), 32), 'vit': (vit, 16), 'swin': (swin, 32), 'encoder': (Encoder, 16),
    'tf_efficientnet_lite0': (lambda: timm('tf_efficientnet_lite0'), 32), 'nf_resnet26': (lambda: timm('nf_resnet26'), 32),
    'vit_tiny': (lambda: timm('vit_tiny_patch16_224', img_size=32, depth=2), 32)}


def network(name):
    "The network with used batch norms and no layer that is zero at the start, and images."
    torch.manual_seed(0)
    build, size = NETWORKS[name]
    net = build()
    for m in net.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.running_var.uniform_(.5, 2)
            m.num_batches_tracked += 1
        if isinstance(m, nn.Linear) and not m.weight.any(): nn.init.normal_(m.weight)
    return net.eval(), torch.randn(2, 3, size, size)


@functools.cache
def quantized(name):
    "The network quantized, images, what it gave for them before, its keys before, and the warnings."
    net, x = network(name)
    with torch.no_grad(): before, keys = net(x), set(net.state_dict())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter('always')
        quantize(net, LSQ(), example=x, skip='none')
    return net, x, before, keys, [str(w.message) for w in told]


def unnamed(net):
    "Modules whose own weights are neither quantized nor named in `left_float`."
    layers, left = bit_layers(net), net.quantization.left_float
    return [n for n,m in net.named_modules() if n not in layers and n not in left and not isinstance(m, NORMS)
            and any(f'{n}.{p}'.lstrip('.') not in left for p,_ in m.named_parameters(recurse=False)) and not n.endswith('quantizer.step') and not n.endswith('quantizer.alpha')]


@pytest.mark.parametrize('name', NETWORKS)
def test_quantized_in_every_mode_and_exact_without(name):
    net, x, before, keys, _ = quantized(name)
    with torch.no_grad():
        assert torch.equal(net(x), before)
        with use_bits(net, FP): assert torch.equal(net(x), before)
        with use_bits(net, LOW): low = net(x)
    assert keys <= set(net.state_dict()) and low.isfinite().all() and not torch.equal(low, before)
    with use_bits(net, LOW): assert torch.equal(net(x), low)
    with torch.inference_mode(), use_bits(net, LOW): assert torch.equal(net(x), low)
    with use_bits(net, Policy.uniform(bit_layers(net), LOW)): assert torch.equal(net(x), low)
    train, twin = [], copy.deepcopy(net).train()
    for b in (LOW, FP):
        torch.manual_seed(1)
        with torch.no_grad(), use_bits(twin, b): train.append(logits_of(twin(x)))
    assert not torch.equal(*train)


@pytest.mark.parametrize('training', [False, True])
def test_quantizers_are_in_the_mode_of_their_layer(training):
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).train(training)
    net[2].train(not training)
    quantize(net, LSQ(), example=torch.randn(8, 4), skip='none')
    assert [{m.training for m in layer.modules()} for layer in (net[0], net[2])] == [{training}, {not training}]
    if not training:
        before = net[0].act_quantizer.size.late.clone()
        with torch.no_grad(), use_bits(net, LOW): net[0](torch.randn(8, 4))
        assert torch.equal(before, net[0].act_quantizer.size.late)


@pytest.mark.parametrize('name', NETWORKS)
def test_everything_with_weights_is_quantized_or_named(name):
    net, *_, told = quantized(name)
    assert not unnamed(net)
    unreached = [n for n,why in net.quantization.left_float.items() if why == 'not reached by the example']
    assert bool(unreached) == any('does not reach' in t for t in told)


def test_what_stays_float_and_why():
    left = {n: quantized(n)[0].quantization.left_float for n in ('resnet18', 'vit', 'swin', 'encoder', 'convnext', 'tf_efficientnet_lite0', 'nf_resnet26')}
    assert left['resnet18'] == {}
    assert left['vit'] == {'class_token': 'a parameter that VisionTransformer uses in its own code', 'encoder.pos_embedding': 'a parameter that Encoder uses in its own code'}
    functional = {n for n in left['swin'] if n.endswith(('qkv', 'proj'))}
    assert len(functional) == 4 and {left['swin'][n] for n in functional} == {'not reached by the example'}
    assert left['encoder'] == {'place': 'a parameter that Encoder uses in its own code'}
    assert all(n.endswith('layer_scale') for n in left['convnext'])
    assert left['tf_efficientnet_lite0'] and all('Conv2dSame' in why for why in left['tf_efficientnet_lite0'].values())
    assert left['nf_resnet26'] and all('StdConv2d' in why or 'parameter' in why for why in left['nf_resnet26'].values())


@pytest.mark.parametrize('name', ['squeezenet1_1', 'vit'])
def test_compiled_networks_are_quantized_too(name):
    torch._dynamo.reset()
    net, x, *_ = quantized(name)
    fast = torch.compile(net, backend='eager')
    for b in (LOW, FP):
        with torch.no_grad(), use_bits(fast, b): torch.testing.assert_close(fast(x), net(x))
    with torch.no_grad(), use_bits(fast, LOW): low = fast(x)
    assert not torch.allclose(low, fast(x))
    torch._dynamo.reset()


@pytest.mark.parametrize('name', ['shufflenet_v2_x0_5', 'vit', 'swin', 'vit_tiny'])
def test_a_training_step_reaches_every_quantized_weight(name):
    net, x, *_ = copy.deepcopy(quantized(name))
    step = mebqat(BitSpace.parse('W4A4'), n_tasks=2)(net.train(), (x, torch.tensor([0, 1])), torch.Generator().manual_seed(0))
    assert step.loss > 0
    idle = [n for n,m in bit_layers(net).items() if m.weight.grad is None or not m.weight.grad.any()]
    assert not idle


def test_auxiliary_heads_that_evaluation_never_reaches_are_named():
    torch.manual_seed(0)
    net = torchvision('googlenet', init_weights=False, aux_logits=True).eval()
    with pytest.warns(UserWarning, match='does not reach aux1.*with weights that stay float'): quantize(net, LSQ(), example=torch.randn(2, 3, 64, 64), skip='none')
    assert {n.split('.')[0] for n in net.quantization.left_float} == {'aux1', 'aux2'}
