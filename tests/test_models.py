"What models' notebook cannot check about itself: no bits inside, independent twins, every parameter in use, refusals."
import ast, copy
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from mebqat import models
from mebqat.layers import bit_layers, quantize
from mebqat.models import NAMES, BasicBlock, ShiftNorm2d, cnn5, make, mobilenet_v2, preact_resnet20, resnet20
from mebqat.quantizers import DoReFa

SIZE = {n: 40 if n == 'cnn8_svhn' else 16 for n in NAMES}
images = lambda name, n=4, channels=3: torch.rand(n, channels, SIZE[name], SIZE[name], generator=torch.Generator().manual_seed(0))
count = lambda net: sum(p.numel() for p in net.parameters())


def build(name, **options):
    torch.manual_seed(0)
    return make(name, **{'n_classes': 5, 'in_channels': 3, 'image_size': SIZE[name], **options})


def test_knows_no_bits():
    "The module imports nothing of mebqat."
    for node in ast.walk(ast.parse(Path(models.__file__).read_text())):
        if isinstance(node, ast.Import): assert not any(a.name.startswith('mebqat') for a in node.names)
        if isinstance(node, ast.ImportFrom): assert node.level == 0 and not node.module.startswith('mebqat')


@pytest.mark.parametrize('name, options, expected', [
    ('cnn4', dict(in_channels=1, image_size=28), 111_936), ('cnn4', dict(in_channels=3, image_size=84), 113_088),
    ('cnn5', dict(n_classes=20, in_channels=1, image_size=28), 112_980), ('cnn5', dict(n_classes=5, in_channels=3, image_size=84, width=32), 32_773),
    ('cnn8_svhn', dict(n_classes=10), 2_081_354), ('preact_resnet20', dict(n_classes=10), 6_758_810), ('mobilenet_v2', dict(n_classes=10), 2_236_682),
    ('resnet20', dict(n_classes=10), 268_336 + 10 + 2*(16*7 + 32*6 + 64*6)), ('resnet20', dict(n_classes=10, shortcut='B'), 270_896 + 10 + 2*(16*7 + 32*7 + 64*7))])
def test_parameter_counts(name, options, expected): assert count(make(name, **options)) == expected


@pytest.mark.parametrize('name', NAMES)
def test_every_parameter_learns(name):
    net = build(name)
    net(images(name)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    idle = [n for n,p in net.named_parameters() if not p.grad.any()]
    assert all(n.endswith('conv.bias') for n in idle)  # a batch norm takes such a bias away


@pytest.mark.parametrize('name', NAMES)
def test_each_activation_is_called_once(name):
    net, calls = build(name).eval(), {}
    acts = [m for m in net.modules() if isinstance(m, (nn.ReLU, nn.ReLU6))]
    for m in acts: m.register_forward_hook(lambda m, i, o: calls.update({m: calls.get(m, 0) + 1}))
    net(images(name, 1))
    assert [calls.get(m) for m in acts] == [1]*len(acts) and not any(m.inplace for m in acts)


@pytest.mark.parametrize('name', NAMES)
def test_same_seed_same_network(name):
    a, b = build(name), build(name)
    assert all(torch.equal(p, q) for p,q in zip(a.state_dict().values(), b.state_dict().values()))
    x, twin = images(name), copy.deepcopy(a).eval()
    assert torch.equal(twin(x), b.eval()(x))


@pytest.mark.parametrize('name', NAMES)
def test_state_round_trip(name):
    a, x = build(name).eval(), images(name)
    torch.manual_seed(1)
    b = make(name, 5, 3, SIZE[name]).eval()
    assert not torch.equal(a(x), b(x))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(x), b(x))


@pytest.mark.parametrize('name, layers', [('cnn4', 4), ('cnn5', 5), ('small_cnn', 5), ('resnet20', 20), ('preact_resnet20', 22), ('cnn8_svhn', 8), ('mobilenet_v2', 53)])
def test_quantizes_to_the_papers_number_of_layers(name, layers):
    net, x = build(name).eval(), images(name)
    with torch.no_grad(): before = net(x)
    quantize(net, DoReFa(), example=x, skip='none')
    assert len(bit_layers(net)) == layers
    with torch.no_grad(): assert torch.equal(net(x), before)


def test_mobilenet_agrees_with_torchvision():
    "torchvision's network with our strides, ReLU6 and our weights gives our logits."
    theirs = torchvision.models.mobilenet_v2(num_classes=10, inverted_residual_setting=[list(b) for b in models.MOBILENET]).eval()
    theirs.features[0][0].stride = (1, 1)
    torch.manual_seed(0)
    ours = mobilenet_v2(act=nn.ReLU6).eval()
    state, target = list(ours.state_dict().values()), theirs.state_dict()
    assert [v.shape for v in state] == [v.shape for v in target.values()]
    theirs.load_state_dict(dict(zip(target, state)))
    x = torch.randn(2, 3, 32, 32)*3
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
        plain = mobilenet_v2().eval()
        plain.load_state_dict(ours.state_dict())
        assert plain(x).shape == (2, 10)
    assert sum(isinstance(m, nn.ReLU6) for m in plain.modules()) == 2


@pytest.mark.parametrize('c_in, stride', [(16, 1), (8, 2)])
def test_basic_block_agrees_with_torchvision(c_in, stride):
    down = None if c_in == 16 else nn.Sequential(nn.Conv2d(c_in, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    theirs = torchvision.models.resnet.BasicBlock(c_in, 16, stride, down).eval()
    ours = BasicBlock(c_in, 16, stride, shortcut='B').eval()
    assert len(ours.state_dict()) == len(theirs.state_dict())
    theirs.load_state_dict(dict(zip(theirs.state_dict(), ours.state_dict().values())))
    x = torch.randn(2, c_in, 8, 8)
    torch.testing.assert_close(ours(x), theirs(x))


def test_shift_norm_is_batch_norm_with_scale_one():
    ours, plain, x = ShiftNorm2d(3), nn.BatchNorm2d(3), torch.randn(8, 3, 4, 4)
    with torch.no_grad():
        for norm in (ours, plain): norm.bias.copy_(torch.tensor([1., -2., 3.]))
    torch.testing.assert_close(ours(x), plain(x))
    assert [n for n,_ in ours.named_parameters()] == ['bias'] and set(ours.state_dict()) == set(plain.state_dict())


def test_functional_call_moves_only_what_it_is_given():
    "MAML's inner loop swaps parameters without touching the module."
    net, x = cnn5(5).eval(), torch.rand(2, 1, 28, 28)
    moved = {n: p + .1 for n,p in net.named_parameters()}
    before = net(x)
    assert not torch.allclose(torch.func.functional_call(net, moved, (x,)), before)
    assert torch.equal(net(x), before)


def test_maml_start():
    torch.manual_seed(0)
    net = cnn5(20)
    for m in net.modules():
        if isinstance(m, nn.Conv2d): assert m.weight.abs().max() <= .04 and m.bias.abs().max() == 0
    assert abs(net.block2.conv.weight.std() - .0176) < 5e-4  # a normal of .02 cut at two deviations
    assert abs(net.fc.weight.std() - .02) < 2e-3 and net.fc.bias.abs().max() == 0


def test_resnet_start_is_he():
    torch.manual_seed(0)
    w = resnet20().stage3[2].conv1.weight
    assert abs(w.std()/(2/(64*9))**.5 - 1) < .02


def test_preact_classifier_sees_signed_features():
    net, seen = preact_resnet20(width=8).eval(), []
    net.fc.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    net(torch.randn(4, 3, 32, 32))
    assert (seen[0] < 0).any()


@pytest.mark.parametrize('name, smallest', [('cnn4', 16), ('cnn5', 16), ('small_cnn', 8), ('cnn8_svhn', 40)])
def test_smallest_image(name, smallest):
    net = make(name, 5, 3, smallest).eval()
    assert net(torch.zeros(1, 3, smallest, smallest)).shape[0] == 1
    with pytest.raises(ValueError, match=f'{smallest - 1} is too small.*{smallest} pixels'): make(name, 5, 3, smallest - 1)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('bad', [0, -1, 2.5, '3', True])
@pytest.mark.parametrize('which', ['n_classes', 'in_channels', 'image_size'])
def test_refuses_impossible_sizes(name, which, bad):
    with pytest.raises(ValueError, match=which): build(name, **{which: bad})


def test_refuses_names_and_options():
    with pytest.raises(ValueError, match='resnet18.*cnn4, cnn5'): make('resnet18')
    with pytest.raises(ValueError, match="'depth'.*width"): make('resnet20', depth=20)
    with pytest.raises(ValueError, match='n_classes'): make('cnn5')
    with pytest.raises(ValueError, match="'C'"): make('resnet20', shortcut='C')


def test_small_cnn_learns():
    "Four bars in 16x16 noise are told apart after a few dozen steps."
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.randint(4, (256,), generator=g)
    x = torch.rand(256, 1, 16, 16, generator=g)*.7
    for i,k in enumerate(labels): x[i, 0, 4*k:4*k+2] += .3
    net = make('small_cnn', 4, 1, 16, width=8)
    opt = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):
        for i in torch.arange(192).split(32):
            opt.zero_grad()
            nn.functional.cross_entropy(net(x[i]), labels[i]).backward()
            opt.step()
    assert (net.eval()(x[192:]).argmax(1) == labels[192:]).float().mean() > .9
