"""Few-shot steps of the Omniglot networks (64 channels, 28 x 28 pixels). Budgets: a MAML task no slower than learn2learn, higher or TorchOpt and
within 1.25x of the plain forwards and backwards of its passes; a prototype episode 2.5x faster than an untuned plain PyTorch loop.
Arguments: threads (1), rounds (10)."""
import importlib
import sys

import torch
import torch.nn.functional as F
from _paired import paired, report
from torch import nn
from torch.func import functional_call

import mebqat
from mebqat.adapt import adapt, adaptable
from mebqat.bits import FP, Bits
from mebqat.data import load
from mebqat.episodes import Episodes
from mebqat.fewshot.methods import FewShot, InnerSteps, Prototypes, trainable
from mebqat.layers import quantize
from mebqat.models import cnn4, cnn5
from mebqat.quantizers import LSQ

THREADS, ROUNDS = int(sys.argv[1]) if len(sys.argv) > 1 else 1, int(sys.argv[2]) if len(sys.argv) > 2 else 10
STEPS, RATE = 5, .1
torch.set_num_threads(THREADS)
pool = load('glyphs', by='classes')
one_shot, five_shot = Episodes(pool, 20, 1, 5)[0], Episodes(pool, 20, 5, 5)[0]
generator, clear = torch.Generator().manual_seed(0), lambda model: model.zero_grad(set_to_none=True)


def seeded(make, scheme=None):
    torch.manual_seed(0)
    net = make()
    return quantize(net, scheme, example=pool.batch(slice(0, 64))[0], skip='first', bn='batch') if scheme else net


def ours(method, model, episode):
    def go():
        clear(model)
        method(model, [episode], generator)
    return go


# MAML on the float network: the peers have no bits, and adapt weights and norms alike

def floor(model, e=one_shot):
    "The passes alone: five on the support, one on the query, nothing adapted."
    def go():
        for _ in range(STEPS): torch.autograd.grad(F.cross_entropy(model(e.support), e.support_labels), trainable(model))
        torch.autograd.grad(F.cross_entropy(model(e.query), e.query_labels), trainable(model))
    return go


def in_learn2learn(first_order, e=one_shot):
    sys.modules.setdefault('gym_notices', None)
    model = importlib.import_module('learn2learn').algorithms.MAML(seeded(lambda: cnn5(20)), lr=RATE, first_order=first_order)
    def go():
        clear(model)
        clone = model.clone()
        for _ in range(STEPS): clone.adapt(F.cross_entropy(clone(e.support), e.support_labels))
        F.cross_entropy(clone(e.query), e.query_labels).backward()
    return go


def in_higher(first_order, e=one_shot):
    higher, model = importlib.import_module('higher'), seeded(lambda: cnn5(20))
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    def go():
        clear(model)
        with higher.innerloop_ctx(model, inner, track_higher_grads=not first_order, copy_initial_weights=False) as (fast, descent):
            for _ in range(STEPS): descent.step(F.cross_entropy(fast(e.support), e.support_labels))
            loss = F.cross_entropy(fast(e.query), e.query_labels)
            torch.autograd.grad(loss, list(fast.parameters() if first_order else model.parameters()))
    return go


def in_torchopt(first_order, e=one_shot):
    torchopt, model = importlib.import_module('torchopt'), seeded(lambda: cnn5(20))
    inner = torchopt.MetaSGD(model, lr=RATE)
    def go():
        clear(model)
        start, state = torchopt.extract_state_dict(model), torchopt.extract_state_dict(inner)
        for _ in range(STEPS): inner.step(F.cross_entropy(model(e.support), e.support_labels))
        F.cross_entropy(model(e.query), e.query_labels).backward()
        torchopt.recover_state_dict(model, start)
        torchopt.recover_state_dict(inner, state)
    return go


def in_mebqat(first_order, e=one_shot):
    model = seeded(lambda: cnn5(20))
    names = adaptable(model, ('weights', 'norms'))
    def go():
        clear(model)
        adapted = adapt(model, e.support, e.support_labels, STEPS, RATE, names, first_order)
        F.cross_entropy(functional_call(model, adapted, (e.query,)), e.query_labels).backward()
    return go


def maml():
    for first_order in (True, False):
        method = FewShot('maml', InnerSteps(STEPS, RATE, first_order, kinds=('weights', 'norms')), (FP,))
        runs = {'passes alone': floor(seeded(lambda: cnn5(20))), 'mebqat.adapt': in_mebqat(first_order), 'mebqat, quantizable, at FP': ours(method, seeded(lambda: cnn5(20), LSQ()), one_shot),
                'the same, channels last': ours(method, seeded(lambda: cnn5(20), LSQ()).to(memory_format=torch.channels_last), one_shot)}
        for name, peer in (('learn2learn', in_learn2learn), ('higher', in_higher), ('torchopt', in_torchopt)):
            if first_order and name == 'torchopt': continue  # it has no first-order switch
            try: runs[name] = peer(first_order)
            except ImportError: print(f'{name} is not installed here')
        report(f'MAML, {"first" if first_order else "second"} order: a task of {one_shot}, {STEPS} inner steps, {THREADS} thread(s)', paired(runs, ROUNDS),
               'ratio to the plain passes')


# prototypes

class PlainQuant(nn.Module):
    "LSQ as its formula is usually written down, autograd doing the rest."
    def __init__(self, step, q_n, q_p, size): super().__init__(); self.step, self.q_n, self.q_p, self.scale = nn.Parameter(step), q_n, q_p, (size*q_p)**-.5
    def forward(self, x):
        step = (self.step - self.step*self.scale).detach() + self.step*self.scale
        v = (x/step).clamp(self.q_n, self.q_p)
        return (v + (v.round() - v).detach())*step


class PlainConv(nn.Conv2d):
    def forward(self, x): return self._conv_forward(self.act(x), self.weights(self.weight), self.bias)


def plain_loop(e=five_shot):
    "An untuned loop of one's own at W4A4: support and query apart, distances by broadcasting."
    model = seeded(cnn4)
    for k in range(2, 5):
        conv = getattr(model, f'block{k}').conv
        conv.__class__, conv.weights = PlainConv, PlainQuant(conv.weight.detach().abs().mean()/1.3, -8, 7, conv.weight.numel())
        conv.act = PlainQuant(torch.tensor(.2), 0, 15, 64*14**2)
    def go():
        clear(model)
        means = model(e.support).view(20, 5, -1).mean(1)
        z = model(e.query)
        F.cross_entropy(-(z[:, None] - means).square().sum(2), e.query_labels).backward()
    return go


def prototypes(how):
    four, pairs = (Bits(4, 4),), (Bits(2, 2), Bits(4, 4), Bits(8, 8), FP)
    step = lambda share, pairs: ours(FewShot('pn', Prototypes(share), pairs), seeded(cnn4, LSQ()).to(memory_format=torch.channels_last), five_shot)
    report(f'Prototypes, {five_shot}, W4A4, {how}, {THREADS} thread(s)', paired({'mebqat': step(True, four), 'untuned plain loop': plain_loop()}, ROUNDS), 'ratio to mebqat')
    report(f'Prototypes, {five_shot}, four pairs, {how}, {THREADS} thread(s)', paired({'stem shared': step(True, pairs), 'stem four times': step(False, pairs)}, ROUNDS), 'ratio to the shared stem')


maml()
prototypes('eager')
mebqat.tune_cpu(compile=True)  # its allocator switch helps the plain loop too
prototypes('after tune_cpu(compile=True)')
