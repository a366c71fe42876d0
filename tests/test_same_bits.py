"The same bits everywhere: in every mode, wrapper, copy, thread, transform and process a layer runs at the pair that its block asks for."
import copy, io, pickle, subprocess, sys, threading, warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from mebqat.mixed.adaqat import AdaQAT
from mebqat.batchnorm import deployed
from mebqat.bits import FP, FULL, Bits, BitSpace, Policy
from mebqat.episodes import Episode
from mebqat.fewshot.methods import mebqat_pn, pn
from mebqat.layers import SwitchableBatchNorm, bit_layers, quantize, use_bits
from mebqat.observing import unwrapped
from mebqat.observing import plain_attention
from mebqat.methods import adabits, any_precision, mebqat, qat
from mebqat.models import make
from mebqat.quantizers import LSQ, SAT, DoReFa

settings.register_profile('mebqat', deadline=None, max_examples=40, derandomize=True, database=None)
settings.load_profile('mebqat')

LOW = Bits(2, 2)
SCHEMES = [LSQ(), LSQ(per_channel=True), DoReFa(), SAT()]
every_scheme = pytest.mark.parametrize('scheme', SCHEMES, ids=lambda s: s.name + '-channel'*s.per_channel)


def gen(seed=0): return torch.Generator().manual_seed(seed)
def randn(*shape, seed=0, **options): return torch.randn(*shape, generator=gen(seed), **options)
def at_full(net): return all(m.bits == FP for m in bit_layers(net).values())


X, Y = randn(16, 3, 8, 8), torch.arange(16) % 4
POINTS, CLASSES = randn(32, 6), torch.arange(32) % 4


def convnet(bn=True):
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if bn else lambda c: nn.GroupNorm(2, c)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1, groups=2), norm(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def quantized(scheme=LSQ(), bn=True): return quantize(convnet(bn), scheme, example=X, skip='none').eval()


MODES = {'no_grad': torch.no_grad, 'inference': torch.inference_mode, 'grad': torch.enable_grad}


def outputs(net, run, bits):
    "What `run` gives in every mode."
    out = {}
    for name,mode in MODES.items():
        with mode(), use_bits(net, bits): out[name] = run(net.eval()).detach().clone()
    with use_bits(net, bits): out['train'] = run(net.train()).detach().clone()
    net.eval()
    return out


def same(values): return all(torch.equal(v, next(iter(values.values()))) for v in values.values())


# Attention

def encoder(batch_first, nested=True, norm_first=False, layers=2):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0., batch_first=batch_first, norm_first=norm_first)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # nested tensors want batch_first
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=nested).eval()


def padding(n=4, length=6): return torch.arange(length)[None] >= torch.tensor([6, 4, 3, 5])[:n, None]


@pytest.mark.filterwarnings('ignore:The PyTorch API of nested tensors')
@pytest.mark.parametrize('batch_first, nested, norm_first', [(True, True, False), (True, False, False), (False, False, False), (True, False, True)])
@pytest.mark.parametrize('masked', [False, True])
def test_an_encoder_is_quantized_on_every_path(batch_first, nested, norm_first, masked):
    net = encoder(batch_first, nested, norm_first)
    x = randn(4, 6, 16) if batch_first else randn(6, 4, 16)
    run = lambda m: m(x, src_key_padding_mask=padding() if masked else None)
    with torch.no_grad(): fused = run(net)
    slow = run(net).detach()
    quantize(net, LSQ(), example=x, skip='none').eval()
    names = [f'layers.{i}.{part}' for i in range(2) for part in ('self_attn', 'self_attn.out_proj', 'linear1', 'linear2')]
    assert list(bit_layers(net)) == names and not net.quantization.left_float
    with torch.no_grad(): assert torch.equal(run(net), fused)
    assert torch.equal(run(net), slow)
    low = outputs(net, run, LOW)
    assert same(low) and (low['no_grad'] - slow).abs().max() > .05
    with torch.no_grad(): assert torch.equal(run(net), fused) and torch.backends.mha.get_fastpath_enabled()
    for name in names:
        with torch.no_grad(), use_bits(net, Policy({name: LOW})): assert not torch.equal(run(net), fused), name


def attention(cross=False, seed=0, **options):
    torch.manual_seed(seed)
    net = nn.MultiheadAttention(16, 4, **options).eval()
    q, kv = randn(5, 3, 16), randn(7, 3, 16, seed=1)
    args = (q, kv, kv) if cross else (q, q, q)
    return net, tuple(t.transpose(0, 1) for t in args) if options.get('batch_first') else args


def calls(net, args):
    "Every way to call it: both kinds of masks, causal, padded, weights wanted, averaged or not."
    n, m = ((args[i].shape[1] if net.batch_first else len(args[i])) for i in range(2))
    ban = torch.rand(n, m, generator=gen(5)) < .3
    ban[:, 0] = False
    padded = torch.zeros(3, m, dtype=torch.bool)
    padded[1, -2:] = True
    options = [{}, {'need_weights': False}, {'average_attn_weights': False}, {'attn_mask': randn(n, m, seed=6)}, {'attn_mask': ban},
               {'key_padding_mask': padded}, {'attn_mask': ban, 'key_padding_mask': padded, 'need_weights': False}]
    if n == m: options.append({'attn_mask': nn.Transformer.generate_square_subsequent_mask(n), 'is_causal': True, 'need_weights': False})
    return [t for o in options for t in net(*args, **o) if t is not None]


@pytest.mark.parametrize('cross', [False, True])
@pytest.mark.parametrize('options', [{}, {'batch_first': True}, {'bias': False}, {'add_zero_attn': True}], ids=repr)
def test_attention_alone(cross, options):
    net, args = attention(cross, **options)
    before = calls(net, args)
    with torch.no_grad(): fused = calls(net, args)
    quantize(net, LSQ(), example=args, skip='none').eval()
    assert list(bit_layers(net)) == ['', 'out_proj'] and not net.quantization.left_float
    assert all(map(torch.equal, calls(net, args), before))
    with torch.no_grad(): assert all(map(torch.equal, calls(net, args), fused))
    with use_bits(net, LOW): low = calls(net, args)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), use_bits(net, LOW): assert all(map(torch.equal, calls(net, args), low))
    assert all((a - b).abs().max() > 1e-3 for a,b in zip(low, before))
    with use_bits(net, Policy({'out_proj': LOW})): outside = calls(net, args)
    assert torch.equal(outside[1], before[1]) and not torch.equal(outside[0], before[0])  # the shares of attention come before it


def test_attention_by_hand():
    net, (q, k, v) = attention(cross=True, batch_first=True)
    quantize(net, LSQ(), example=(q, k, v), skip='none').eval()
    with use_bits(net, Bits(3, 4)), torch.no_grad():
        got, shares = net(q, k, v, average_attn_weights=False)
        w, a = net.weight_quantizer(net.in_proj_weight, 3), lambda t: net.act_quantizer(t, 4)
        heads = lambda t, i: F.linear(a(t), w[16*i:16*i + 16], net.in_proj_bias[16*i:16*i + 16]).unflatten(2, (4, 4)).transpose(1, 2)
        wanted = (heads(q, 0) @ heads(k, 1).mT/2).softmax(-1)
        assert_close(shares, wanted)
        out = net.out_proj
        assert_close(got, F.linear(out.act_quantizer((wanted @ heads(v, 2)).transpose(1, 2).flatten(2), 4), out.weight_quantizer(out.weight, 3), out.bias))


@pytest.mark.parametrize('options, why', [({'kdim': 8, 'vdim': 12}, 'another size than its queries'), ({'add_bias_kv': True}, 'learned keys and values')])
def test_attention_that_cannot_be_quantized_is_named(options, why):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.attend, self.fc = nn.MultiheadAttention(16, 4, **options), nn.Linear(16, 4)
        def forward(self, q, k, v): return self.fc(self.attend(q, k, v)[0])
    args = randn(5, 3, 16), randn(7, 3, options.get('kdim', 16)), randn(7, 3, options.get('vdim', 16))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        net = quantize(Net().eval(), LSQ(), example=args, skip='none')
    assert list(bit_layers(net)) == ['fc'] and why in net.quantization.left_float['attend'] and 'attend.out_proj' in net.quantization.left_float
    with use_bits(net, LOW): assert net(*args).isfinite().all()


def test_overlapping_blocks_put_the_fused_path_back():
    a, b = (quantize(encoder(True), LSQ(), example=randn(4, 6, 16), skip='none').eval() for _ in range(2))
    def hold(net):
        with use_bits(net, LOW): yield
    first, second = hold(a), hold(b)
    next(first), next(second)
    first.close()
    assert not torch.backends.mha.get_fastpath_enabled()
    second.close()
    assert torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with plain_attention(), use_bits(a, LOW): pass
        assert not torch.backends.mha.get_fastpath_enabled()
    finally: torch.backends.mha.set_fastpath_enabled(True)


# Modes and compilation

@every_scheme
def test_every_mode_gives_the_same(scheme):
    net = quantized(scheme, bn=False)
    for bits in (LOW, Bits(3, FULL), FP, Policy({'3': Bits(2, 4)})):
        low = outputs(net, lambda m: m(X), bits)
        assert same(low)
    assert not torch.equal(outputs(net, lambda m: m(X), LOW)['grad'], net(X))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


COMPILED_NETWORKS = {'conv': (lambda: quantized(bn=True), X), 'encoder': (lambda: quantize(encoder(True, layers=1), LSQ(), example=randn(4, 6, 16), skip='none').eval(), randn(4, 6, 16)),
                     'attention': (lambda: quantize(nn.Sequential(nn.Linear(16, 16), Attend()), DoReFa(), example=randn(4, 6, 16), skip='none').eval(), randn(4, 6, 16))}


class Attend(nn.Module):
    def __init__(self): super().__init__(); self.attend = nn.MultiheadAttention(16, 4, batch_first=True)
    def forward(self, x): return self.attend(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize('name', COMPILED_NETWORKS)
def test_a_compiled_network_runs_at_each_pair(name, fresh_compiler):
    build, x = COMPILED_NETWORKS[name]
    net = build()
    wanted = {}
    pairs = (LOW, FP, LOW) if name == 'encoder' else (LOW, Bits(3, FULL), FP, LOW, FP)
    for b in pairs:
        with torch.no_grad(), use_bits(net, b): wanted[b] = net(x)
    fast = torch.compile(net, backend='eager')
    for mode in (torch.no_grad, torch.enable_grad)[:1 if name == 'encoder' else 2]:
        for b in pairs:
            with mode(), use_bits(fast, b): got = fast(x)
            if b.is_full: assert_close(got, wanted[b])  # compiled, attention may take another path of PyTorch's
            else: assert torch.equal(got, wanted[b]), (mode, b)
    assert at_full(net)


def dense(): return quantize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), LSQ(), example=POINTS, skip='none').eval()


def test_a_compiled_network_trains_at_each_pair(fresh_compiler):
    net = dense()
    twin = copy.deepcopy(net)
    fast = torch.compile(twin, backend='aot_eager')
    for b in (LOW, FP):
        for model in (net, fast):
            model.zero_grad()
            with use_bits(model, b): F.cross_entropy(model(POINTS), CLASSES).backward()
        for (n, p), q in zip(net.named_parameters(), twin.parameters()): assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=lambda m: f'{n} at {b}: {m}')


def test_a_fully_compiled_network_gives_the_same(fresh_compiler):
    pytest.importorskip('torch._inductor')
    net = dense()
    fast = torch.compile(net)
    for b in (LOW, FP):
        with torch.no_grad(), use_bits(net, b):
            wanted = net(POINTS)
            try: got = fast(POINTS)
            except torch._dynamo.exc.BackendCompilerFailed as e: pytest.skip(f'no compiler here: {str(e)[:80]}')
        assert_close(got, wanted)


# Checkpointing

class Saved(nn.Module):
    "A block that is run again on the way back."
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.fc, self.reentrant = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4), reentrant

    def block(self, h): return self.c(self.b(h).relu()).relu()

    def forward(self, x):
        h = self.a(x).relu()
        return self.fc(self.block(h) if self.reentrant is None else checkpoint(self.block, h, use_reentrant=self.reentrant))


SPACE = BitSpace.parse('W2A2 W4A4 W8A2')
METHODS = {'mebqat': lambda: mebqat(SPACE), 'qat': lambda: qat(LOW), 'policy': lambda: qat(Policy({'b': LOW, 'c': Bits(3, 8)})), 'adabits': lambda: adabits(SPACE),
           'any-precision': lambda: any_precision(SPACE)}


def gradients(reentrant, method):
    net = quantize(Saved(reentrant), LSQ(), example=POINTS, skip='none')
    method(net, (POINTS, CLASSES), gen(2))
    assert at_full(net)
    return {n: p.grad for n,p in net.named_parameters()}


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_changes_no_gradient(method, reentrant):
    wanted, got = (gradients(r, METHODS[method]()) for r in (None, reentrant))
    for n,g in wanted.items(): assert_close(got[n], g, msg=lambda m: f'{n}: {m}')


@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_changes_no_training(reentrant):
    # several steps, whose sizes of inputs change between and never within
    out = []
    for r in (None, reentrant):
        net = quantize(Saved(r), LSQ(), example=POINTS, skip='none').train()
        optimizer, method = torch.optim.SGD(net.parameters(), .05), mebqat(SPACE)
        for k in range(4):
            optimizer.zero_grad()
            method(net, ((1 + k)*POINTS, CLASSES), gen(k))
            optimizer.step()
        out.append(net.state_dict())
    assert any(not v.equal(torch.ones(3)) for k,v in out[0].items() if k.endswith('growth'))
    for k,v in out[0].items(): assert_close(out[1][k], v, msg=lambda m: f'{k}: {m}')


@pytest.mark.parametrize('granularity', ['global', 'layer'])
@pytest.mark.parametrize('reentrant', [True, False])
def test_checkpointing_under_learned_bits(reentrant, granularity):
    steps = []
    for r in (None, reentrant):
        net = quantize(Saved(r), LSQ(), example=POINTS, skip='none')
        method = AdaQAT(start=Bits(3, 3), granularity=granularity)
        for _ in range(3): method(net, (POINTS, CLASSES), gen(2))
        steps.append(({n: p.grad for n,p in net.named_parameters() if p.grad is not None}, method.bits))
    assert steps[0][0].keys() == steps[1][0].keys() and steps[0][1] == steps[1][1]
    for n,g in steps[0][0].items(): assert_close(steps[1][0][n], g)


@pytest.mark.parametrize('method', [lambda: mebqat_pn(SPACE, 3), lambda: pn(LOW)], ids=['mebqat-pn', 'pn'])
def test_checkpointing_under_prototypes(method):
    episode = Episode(POINTS[:8], CLASSES[:8], POINTS[8:], CLASSES[8:], 4)
    wanted, got = ({}, {})
    for r,out in ((None, wanted), (False, got)):  # PyTorch's reentrant kind knows no torch.autograd.grad
        net = quantize(Saved(r), LSQ(), example=POINTS, skip='none')
        method()(net, [episode], gen(2))
        out |= {n: p.grad for n,p in net.named_parameters() if p.grad is not None}
    assert wanted.keys() == got.keys() and len(wanted) > 8
    for n,g in wanted.items(): assert_close(got[n], g, msg=lambda m: f'{n}: {m}')


@pytest.mark.parametrize('reentrant', [True, False])
def test_a_backward_pass_outside_the_block_is_refused_in_words(reentrant):
    net = quantize(Saved(reentrant), LSQ(), example=POINTS, skip='none')
    with use_bits(net, LOW): loss = F.cross_entropy(net(POINTS), CLASSES)
    with pytest.raises(RuntimeError, match='ran at W2A2 and is repeated at FP.*same use_bits block'): loss.backward()
    with use_bits(net, LOW): loss = F.cross_entropy(net(POINTS), CLASSES)
    with pytest.raises(RuntimeError, match='ran at W2A2 and is repeated at W8A8'):
        with use_bits(net, Bits(8, 8)): loss.backward()
    assert at_full(net)
    loss = F.cross_entropy(net(POINTS), CLASSES)
    loss.backward()


# Copies

def copies(net):
    "Every way to copy a network, while it runs at a pair."
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return {'deepcopy': copy.deepcopy(net), 'pickle': pickle.loads(pickle.dumps(net)), 'file': torch.load(file, weights_only=False), 'copy of a part': nn.Sequential(*copy.deepcopy(list(net)))}


@pytest.mark.parametrize('bn', ['running', 'switchable'])
def test_copies_made_in_a_block_wake_up_at_full_precision(bn):
    net = quantize(convnet(), LSQ(), example=X, skip='none', bn=bn, space=SPACE if bn == 'switchable' else None).eval()
    full = net(X)
    file = io.BytesIO()
    torch.save(net, file)
    before = file.tell()
    def held():
        with use_bits(net, LOW): yield
    with use_bits(net, Bits(4, 4)):
        made = copies(net)
        suspended = held()
        next(suspended)
        made |= {f'{k} of a suspended generator': v for k,v in copies(net).items()}
        file = io.BytesIO()
        torch.save(net, file)
        assert abs(file.tell() - before) < 200
        low = net(X)
        for name,twin in made.items():
            assert at_full(twin) and torch.equal(twin(X), full), name
            with use_bits(twin, LOW): assert torch.equal(twin(X), low), name
            assert at_full(twin)
        suspended.close()
        assert {str(m.bits) for m in bit_layers(net).values()} == {'W4A4'}
    assert at_full(net) and torch.equal(net(X), full)


@given(st.permutations(range(3)))
@settings(max_examples=6)
def test_blocks_may_end_in_any_order(order):
    net = quantize(convnet(), LSQ(), example=X, skip='none', bn='switchable', space=SPACE)
    pairs = list(SPACE)[:3]
    def held(b):
        with use_bits(net, b): yield
    open_blocks = {i: held(b) for i,b in enumerate(pairs)}
    for g in open_blocks.values(): next(g)
    for i in order:
        open_blocks.pop(i).close()
        latest = pairs[max(open_blocks)] if open_blocks else FP
        assert {m.bits for m in bit_layers(net).values()} == {latest}
        assert {m.key for m in net.modules() if isinstance(m, SwitchableBatchNorm)} == {str(latest)}


# Threads

def in_thread(f):
    "What `f` gives, or its exception, in another thread."
    out = []
    def run():
        try: out.append(f())
        except Exception as e: out.append(e)
    t = threading.Thread(target=run)
    t.start()
    t.join(60)
    return out[0]


def test_another_thread_is_refused_in_words_and_the_block_goes_on():
    net = quantized()
    with use_bits(net, LOW):
        low = net(X)
        def take():
            with use_bits(net, Bits(8, 8)): return net(X)
        for f in (take, lambda: net(X)):
            refusal = in_thread(f)
            assert isinstance(refusal, RuntimeError) and 'another thread' in str(refusal) and 'deepcopy' in str(refusal)
        twin = copy.deepcopy(net)
        def alone():
            with use_bits(twin, LOW): return twin(X)
        assert torch.equal(in_thread(alone), low) and torch.equal(net(X), low)
    assert at_full(net) and torch.equal(in_thread(lambda: net(X)), net(X))
    assert torch.equal(in_thread(take), take())


def test_many_threads_never_mix_and_never_leave_a_pair_behind():
    net, wanted, wrong, refused = quantized(), {}, [], []
    pairs = [LOW, Bits(3, 8), Bits(8, 3), FP]
    for b in pairs:
        with torch.no_grad(), use_bits(net, b): wanted[b] = net(X)
    def work(b):
        for _ in range(30):
            try:
                with torch.no_grad(), use_bits(net, b): wrong.append(not torch.equal(net(X), wanted[b]))
            except RuntimeError as e: refused.append('thread' in str(e))
    threads = [threading.Thread(target=work, args=(b,)) for b in pairs]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not any(wrong) and all(refused) and len(wrong) + len(refused) == 120 and at_full(net)


def test_a_block_may_be_closed_from_another_thread():
    net = quantized()
    def held():
        with use_bits(net, LOW): yield
    g = held()
    next(g)
    in_thread(g.close)
    assert at_full(net)
    with use_bits(net, LOW): pass


# Transforms of torch.func

@every_scheme
def test_functional_gradients_are_the_usual_ones(scheme):
    net = quantized(scheme)
    params = dict(net.named_parameters())
    for bits in (LOW, Bits(5, 3), FP):
        net.zero_grad()
        with use_bits(net, bits):
            got = grad(lambda p: F.cross_entropy(functional_call(net, p, (X,)), Y))(params)
            F.cross_entropy(net(X), Y).backward()
        for n,p in params.items(): assert_close(got[n], torch.zeros_like(p) if p.grad is None else p.grad, msg=lambda m: f'{n}: {m}')


@every_scheme
def test_gradients_of_single_images_equal_a_loop(scheme):
    net = quantized(scheme, bn=False)
    params = dict(net.named_parameters())
    def loss(p, x, y): return F.cross_entropy(functional_call(net, p, (x[None],)), y[None])
    with use_bits(net, Bits(3, 3)):
        together = vmap(grad(loss), in_dims=(None, 0, 0))(params, X[:5], Y[:5])
        for i in range(5):
            alone = grad(loss)(params, X[i], Y[i])
            for n,g in alone.items(): assert_close(together[n][i], g, rtol=1e-4, atol=1e-6, msg=lambda m: f'{n}: {m}')


@every_scheme
def test_forward_derivatives_match_backward_ones(scheme):
    net = quantized(scheme, bn=False)
    params = {n: p.detach() for n,p in net.named_parameters()}
    along = {n: .1*randn(*p.shape, seed=i) for i,(n,p) in enumerate(params.items())}
    def loss(p): return F.cross_entropy(functional_call(net, p, (X,)), Y)
    with use_bits(net, Bits(3, 4)):
        value, slope = jvp(loss, (params,), (along,))
        gradient = grad(loss)(params)
    assert_close(slope, sum((gradient[n]*v).sum() for n,v in along.items()), rtol=1e-3, atol=1e-6)


def test_networks_stacked_by_vmap_run_at_the_pair():
    nets = [quantize(convnet(bn=False), LSQ(), example=X, skip='none').eval() for _ in range(3)]
    for i,net in enumerate(nets):
        for p in net.parameters(): p.data.add_(.05*randn(*p.shape, seed=i))
    params, buffers = torch.func.stack_module_state(nets)
    with use_bits(nets[0], LOW):
        got = vmap(lambda p, b: functional_call(nets[0], (p, b), (X,)))(params, buffers)
    for out,net in zip(got, nets):
        with use_bits(net, LOW): assert_close(out, net(X))


# Wrappers and processes

def test_wrapped_networks_run_at_the_pair():
    net = quantized()
    with use_bits(net, LOW): low = net(X)
    assert unwrapped(nn.DataParallel(torch.compile(nn.DataParallel(net)))) is net
    for wrapped in (nn.DataParallel(net), torch.optim.swa_utils.AveragedModel(net)):
        assert isinstance(unwrapped(wrapped), nn.Sequential) and list(bit_layers(wrapped)) == list(bit_layers(net))
        for setting in (LOW, Policy.uniform(bit_layers(wrapped), LOW)):
            with use_bits(wrapped.eval(), setting): assert torch.equal(wrapped(X), low)
        assert at_full(wrapped)


def test_an_averaged_network_averages_what_was_trained():
    net = quantized(bn=False)
    average = torch.optim.swa_utils.AveragedModel(net)
    with torch.no_grad():
        for p in net.parameters(): p.add_(1)
    average.update_parameters(net)
    with torch.no_grad():
        for p in net.parameters(): p.sub_(1)
    average.update_parameters(net)
    for a,p in zip(average.module.parameters(), net.parameters()): assert_close(a, p + .5)  # after 1 more and 1 less
    with use_bits(average, LOW): assert {m.bits for m in bit_layers(average.module).values()} == {LOW} and at_full(net)


DISTRIBUTED = '''
import gc, os, sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from mebqat.bits import BitSpace
from mebqat.layers import quantize
from mebqat.methods import mebqat
from mebqat.quantizers import LSQ
g = lambda seed: torch.Generator().manual_seed(seed)
def net():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4))
    return quantize(m, LSQ(), example=torch.randn(8, 3, 8, 8, generator=g(1)), skip='none')
x, y = torch.randn(8, 3, 8, 8, generator=g(2)), torch.arange(8) % 4
method = mebqat(BitSpace.parse('W2A2 W4A8 W8A4'), n_tasks=3)
def work(rank, file):
    dist.init_process_group('gloo', init_method='file://' + file, rank=rank, world_size=2)
    one, model = net(), net()
    method(one, (x, y), g(3))
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    half = slice(4*rank, 4*rank + 4)
    for _ in range(2):
        ddp.zero_grad()
        method(ddp, (x[half], y[half]), g(3))
    off = [n for (n, p), q in zip(model.named_parameters(), one.parameters()) if '.step.' not in n and not torch.allclose(p.grad, q.grad, rtol=1e-4, atol=1e-6)]
    plain, refused = DistributedDataParallel(net()), ''
    try: method(plain, (x[half], y[half]), g(3))
    except ValueError as e: refused = str(e)
    steps = torch.cat([p.grad.flatten() for n, p in model.named_parameters()])
    both = [torch.empty_like(steps) for _ in 'ab']
    dist.all_gather(both, steps)
    dist.barrier()
    del ddp, plain
    gc.collect()
    dist.destroy_process_group()
    if off or 'find_unused_parameters=True' not in refused or not torch.equal(*both): sys.exit(f'rank {rank}: {off} {refused!r}')
if __name__ == '__main__':
    torch.multiprocessing.spawn(work, (sys.argv[1],), nprocs=2)
'''


def test_two_processes_take_the_step_of_one(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()): pytest.skip('this torch has no gloo')
    (tmp_path/'run.py').write_text(DISTRIBUTED)
    done = subprocess.run([sys.executable, tmp_path/'run.py', tmp_path/'meeting'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]


# Half types

@every_scheme
@pytest.mark.parametrize('kind', [torch.bfloat16, torch.float16])
def test_half_types_run_where_they_hold_the_grid_and_say_so_where_not(scheme, kind):
    net, most = quantized(scheme, bn=False).to(kind), {torch.bfloat16: 8, torch.float16: 11}[kind]
    for bits in (Bits(most, most), LOW, FP):
        with torch.no_grad(), use_bits(net, bits): assert net(X.to(kind)).dtype == kind and net(X.to(kind)).isfinite().all()
    for bits in (Bits(most + 1, 4), Bits(4, most + 1), Bits(16, 16)):
        with pytest.raises(ValueError, match=f'{str(kind)[6:]} tells {most}-bit numbers apart, not {max(bits.w, bits.a)}-bit ones.*float32'):
            with use_bits(net, bits): net(X.to(kind))
    assert at_full(net)


@every_scheme
def test_autocast_uses_the_same_levels(scheme):
    net, seen = quantized(scheme, bn=False), {}
    for n,m in bit_layers(net).items(): m.weight_quantizer.register_forward_hook(lambda q, i, o, n=n: seen.setdefault(n, []).append(o.detach()))
    with use_bits(net, Bits(4, 4)):
        y = net(X)
        with torch.autocast('cpu', torch.bfloat16): z = net(X)
    for a, b in seen.values(): assert torch.equal(a, b) and len(a.unique()) <= 16*len(a)
    assert (y - z).norm() < .3*y.norm()
    for bits in (Bits(12, 4), Bits(4, 12)):
        with pytest.raises(ValueError, match='bfloat16.*not 12-bit ones.*no autocast'):
            with use_bits(net, bits), torch.autocast('cpu', torch.bfloat16): net(X)
    with use_bits(net, Bits(8, 8)), torch.autocast('cpu', torch.bfloat16): F.cross_entropy(net(X).float(), Y).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())


# A pair, and the policy that gives every layer that pair

class Reused(nn.Module):
    "One batch norm in two places, one convolution before two norms."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv, self.norm, self.other, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.Linear(8, 4)
        self.again = self.norm
    def forward(self, x):
        h = self.norm(self.stem(x)).relu()
        h = h + self.again(self.conv(h))
        return self.fc((h + self.other(self.conv(h.relu()))).mean((2, 3)))


UNIFORM = {'plain': lambda: (convnet(), X), 'preact': lambda: (make('preact_resnet20', width=4), randn(4, 3, 16, 16)),
           'resnet': lambda: (make('resnet20', width=4), randn(4, 3, 16, 16)), 'reused': lambda: (Reused(), X), 'norm first': lambda: (nn.Sequential(nn.BatchNorm2d(3), convnet()), X)}


@pytest.mark.parametrize('network', UNIFORM)
@pytest.mark.parametrize('bn', ['running', 'batch', 'switchable', 'reestimate'])
@pytest.mark.parametrize('ends', [None, Bits(8, 8)])
def test_a_pair_is_the_policy_that_gives_it_to_every_layer(network, bn, ends):
    torch.manual_seed(0)
    net, x = UNIFORM[network]()
    space = BitSpace.parse('W2A2 W8A8 FP')
    quantize(net, LSQ(), example=x, bn=bn, ends=ends, space=space if bn == 'switchable' else None)
    for i,b in enumerate(space):
        with torch.no_grad(), use_bits(net.train(), b): net(x*(1 + i))
    net.eval()
    pinned = {n: m.pinned for n,m in bit_layers(net).items()}
    for b in space:
        policy = Policy({n: FP if b.is_full else p or b for n,p in pinned.items()})
        out = []
        for setting in (b, policy, Policy({n: v for n,v in policy.items() if not pinned[n] or b.is_full})):
            with torch.no_grad(), deployed(net, setting, x): out.append(net(x))
        assert torch.equal(out[0], out[1]) and torch.equal(out[0], out[2])


# Layers by hand

BY_HAND = {'transposed 1d': (nn.ConvTranspose1d, (4, 9), {'stride': 2, 'padding': 1}), 'transposed 2d': (nn.ConvTranspose2d, (4, 5, 6), {'stride': 2, 'dilation': 2}),
           'transposed 3d': (nn.ConvTranspose3d, (4, 3, 4, 3), {'stride': 2}), '3d': (nn.Conv3d, (4, 5, 6, 5), {'padding': 1, 'padding_mode': 'circular'})}


@pytest.mark.parametrize('kind', BY_HAND)
@pytest.mark.parametrize('groups, bias', [(1, True), (2, False), (4, True)])
@every_scheme
def test_layers_compute_with_their_quantized_parts(kind, groups, bias, scheme):
    make_layer, shape, options = BY_HAND[kind]
    torch.manual_seed(0)
    layer = make_layer(4, 8, 3, groups=groups, bias=bias, **options)
    plain, x = copy.deepcopy(layer), randn(2, *shape)
    net = quantize(nn.Sequential(layer), scheme, example=x, skip='none')
    assert torch.equal(net(x), plain(x))
    for bits in (LOW, Bits(5, FULL), Bits(FULL, 3)):
        with torch.no_grad(), use_bits(net, bits):
            w = layer.weight.transpose(0, 1) if 'transposed' in kind else layer.weight
            w = layer.weight_quantizer(w, bits.w)
            plain.weight.copy_(w.transpose(0, 1) if 'transposed' in kind else w)
            wanted = plain(layer.act_quantizer(x, bits.a))
            assert torch.equal(net(x), wanted)
            if 'transposed' in kind:
                size = [n + 1 for n in wanted.shape[2:]]
                assert torch.equal(layer(x, output_size=size), plain(layer.act_quantizer(x, bits.a), output_size=size))
    if scheme == LSQ(per_channel=True):
        assert layer.weight_quantizer.step.learned.shape == (16, 8//(groups if 'transposed' in kind else 1))


def test_a_transposed_layer_trains_and_is_exact_when_its_weights_are_on_the_grid():
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(3, 5, 4, stride=2)
    x = randn(2, 3, 6, 6)
    net = quantize(nn.Sequential(layer), LSQ(per_channel=True), example=x, skip='none')
    with use_bits(net, Bits(4, 4)): net(x).square().mean().backward()
    assert layer.weight.grad.any() and layer.weight_quantizer.step.learned.grad[3].all()
