"Data, outputs and labels in the forms that users have them."
import pathlib
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import (BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, TensorDataset,
                              WeightedRandomSampler)

from mebqat.bits import FP, Bits, BitSpace
from mebqat.evaluate import correct, fitness, predict, score, sweep
from mebqat.inputs import batches_of, check_labels, device_of, images_of, logits_of, pool_of, walk
from mebqat.layers import quantize
from mebqat.quantizers import DoReFa

X = torch.randn(45, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(45) % 3


class Pool:
    "The least that a pool can be."
    def __len__(self): return 45
    def batch(self, i): return X[i], Y[i]


class Rows(Dataset):
    "A data set of NumPy rows and plain integers."
    def __len__(self): return 45
    def __getitem__(self, i): return X[i].numpy(), int(Y[i])


class Stream(IterableDataset):
    def __iter__(self): return iter(zip(X, Y))


FORMS = {'pool': Pool(), 'tuple': (X, Y), 'list of arrays': [X.numpy(), Y.numpy()], 'narrow labels': (X, Y.to(torch.int16)), 'data set': Rows(),
         'subset': Subset(TensorDataset(X, Y), range(45)), 'loader': DataLoader(Rows(), 7), 'shuffling loader': DataLoader(TensorDataset(X, Y), 8, shuffle=True),
         'sampled loader': DataLoader(TensorDataset(X, Y), batch_sampler=BatchSampler(RandomSampler(Y, generator=torch.Generator()), 10, False)),
         'stream': DataLoader(Stream(), 20)}
each_form = pytest.mark.parametrize('data', FORMS.values(), ids=FORMS)


def network(n=3, head=None):
    torch.manual_seed(0)
    net = quantize(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, n)), DoReFa(), example=X, skip='none')
    return net.append(head) if head else net


class Answer(nn.Module):
    "Wraps the logits as some library would."
    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap
    def forward(self, x): return self.wrap(x)


@each_form
def test_every_form_is_the_same_images(data):
    batches = list(batches_of(data, 16))
    x, y = (torch.cat(t) for t in zip(*batches))
    assert sorted(map(tuple, torch.cat([x, y[:, None]], 1).tolist())) == sorted(map(tuple, torch.cat([X, Y[:, None]], 1).tolist()))
    again = list(batches_of(data, 16))
    assert all(a[0].equal(b[0]) and a[1].equal(b[1]) for a,b in zip(batches, again, strict=True))
    assert torch.cat([x for x,_ in batches_of(data, 16, 20)]).equal(x[:20])


@each_form
def test_every_form_gives_the_same_numbers(data):
    net, space, bits = network(), BitSpace([Bits(2, 2), Bits(4, 4), FP]), Bits(4, 4)
    surface, wanted = sweep(net, data, space), sweep(net, (X, Y), space)
    assert [(p.accuracy, p.n) for p in surface.points.values()] == [(p.accuracy, p.n) for p in wanted.points.values()]
    assert surface.meta['images'] == 45 and score(net, bits, data).accuracy == fitness(net, data)(bits) == wanted.at(bits).accuracy
    assert len(correct(net, data)[0]) == len(predict(net, data)[2]) == 45
    assert sum(map(len, images_of(data))) == 45


def test_pools_and_pairs_keep_their_old_order():
    "Stored results depend on it."
    assert torch.cat([y for _,y in batches_of((X, torch.arange(45)), 20)])[:8].tolist() == [25, 6, 36, 31, 41, 13, 30, 5]
    assert [len(y) for _,y in batches_of(Pool(), 20)] == [15, 15, 15]


@pytest.mark.parametrize('data', ['digits', {'x': X, 'y': Y}, X, None, 3, (X,), (X, Y, Y), [X, None], [(X[0], 1), (X[1], 2)], Stream(), zip(X, Y), torch.zeros(()).numpy()],
                         ids=lambda d: type(d).__name__)
def test_other_things_are_refused_in_one_line(data):
    for use in (batches_of, pool_of, lambda d: score(network(), FP, d), lambda d: fitness(network(), d), lambda d: sweep(network(), d, BitSpace([FP]))):
        with pytest.raises(TypeError, match=r'a pool, a pair \(images, labels\), a Dataset or a DataLoader') as e: use(data)
        assert '\n' not in str(e.value)


def test_contradictions_are_named():
    with pytest.raises(ValueError, match='44 labels for 45 images'): batches_of((X, Y[1:]))
    with pytest.raises(ValueError, match='no images'): next(batches_of((X[:0], Y[:0])))
    with pytest.raises(ValueError, match='no images'): next(batches_of(DataLoader(TensorDataset(X, Y), 64, drop_last=True)))
    for how in ({'batch_size': 0}, {'most': 0}):
        with pytest.raises(ValueError, match='1 or more'): batches_of(Pool(), **how)
    class Bare(Rows):
        def __getitem__(self, i): return pathlib.Path('picture.png'), 0
    with pytest.raises(TypeError, match='image tensor, label'): next(batches_of(Bare()))
    for odd in (DataLoader(X, 5), DataLoader(TensorDataset(X, Y, Y), 5), DataLoader([{'image': x} for x in X], 5)):
        with pytest.raises(TypeError, match=r'a pair \(images, labels\)'): next(batches_of(odd))


@pytest.mark.parametrize('how', [{'shuffle': True}, {'shuffle': True, 'generator': torch.Generator().manual_seed(3)}, {'shuffle': True, 'num_workers': 1},
                                 {'sampler': WeightedRandomSampler([1.]*45, 90, generator=torch.Generator())}], ids=['shuffled', 'seeded', 'worker', 'sampler'])
def test_a_walk_repeats_and_touches_nothing(how):
    class Noisy(Rows):
        def __getitem__(self, i): return X[i] + torch.rand(6), Y[i]
    loader = DataLoader(Noisy(), 10, **how)
    owned = [torch.default_generator, *(g for o in (loader, loader.sampler) if (g := getattr(o, 'generator', None)) is not None)]
    before = [g.get_state() for g in owned]
    first = torch.cat([x for x,_ in walk(loader)])
    half = walk(loader)
    next(half)
    torch.rand(5)
    between = [g.get_state() for g in owned]
    second = torch.cat([x for x,_ in walk(loader)])
    assert first.equal(second) and all(g.get_state().equal(s) for g,s in zip(owned, between))
    assert all(g.get_state().equal(s) for g,s in zip(owned[1:], before[1:]))


def test_images_alone_need_no_labels():
    for data in (X, X.numpy(), DataLoader(X, 10), [X[:20], X[20:]], (X[:20], X[20:]), iter([(X[:30], None), X[30:]])):
        assert sum(map(len, images_of(data, 10))) == 45
    for what in ('images', {'x': X}, 3, None):
        with pytest.raises(TypeError, match='a pool, a pair'): next(images_of(what))


Tuple = namedtuple('Tuple', 'logits aux_logits2 aux_logits1')


@pytest.mark.parametrize('wrap', [lambda t: {'loss': None, 'logits': t}, lambda t: SimpleNamespace(logits=t), lambda t: Tuple(t, None, None),
                                  lambda t: [t, t.mean()], lambda t: SimpleNamespace(logits=(t,))])
def test_outputs_of_other_libraries(wrap):
    plain, wrapped = network(), network(head=Answer(wrap))
    assert logits_of(wrap(X)) is X
    assert score(wrapped, Bits(2, 4), (X, Y)) == score(plain, Bits(2, 4), (X, Y))
    assert fitness(wrapped, (X, Y))(Bits(2, 4)) == fitness(plain, (X, Y))(Bits(2, 4))


@pytest.mark.parametrize('output', [None, {}, {'scores': X}, (), ('a', X), 3.], ids=repr)
def test_outputs_without_logits(output):
    with pytest.raises(TypeError, match='must return logits'): logits_of(output)


WRONG = {'soft labels': (lambda y: torch.eye(3)[y], 'argmax'), 'a column of floats': (lambda y: y[:, None].float(), 'squeeze'),
         'masks': (lambda y: y[:, None, None].expand(-1, 4, 4), 'segmentation'), 'doubles': (lambda y: y.double(), 'long'),
         'bool': (lambda y: y > 0, 'long'), 'from one': (lambda y: y + 1, 'subtract 1'), 'far': (lambda y: y*100, '0 to 2'),
         'negative': (lambda y: y - 1, '0 to 2')}


@pytest.mark.parametrize('change, word', WRONG.values(), ids=WRONG)
def test_labels_that_are_no_class_numbers(change, word):
    data = X, change(Y)
    for use in (lambda d: score(network(), FP, d), lambda d: fitness(network(), d, by='likelihood')(FP), lambda d: sweep(network(), DataLoader(TensorDataset(*d), 9), BitSpace([FP]))):
        with pytest.raises(ValueError, match='labels.*') as e: use(data)
        assert word in str(e.value) and '\n' not in str(e.value)


@pytest.mark.parametrize('logits', [torch.zeros(45), torch.zeros(45, 1), torch.zeros(45, 3, 4, 4)], ids=lambda t: str(tuple(t.shape)))
def test_logits_of_no_classifier(logits):
    with pytest.raises(ValueError, match='logits'): check_labels(logits, Y)


def test_ignored_labels_do_not_count():
    net, y = network(), Y.clone()
    y[::4] = -100
    kept = y >= 0
    point, alone = score(net, Bits(4, 4), (X, y)), score(net, Bits(4, 4), (X[kept], Y[kept]))
    assert (point.n, point.accuracy) == (alone.n, alone.accuracy) == (int(kept.sum()), alone.accuracy) and point.loss == pytest.approx(alone.loss)
    assert fitness(net, (X, y), by='likelihood')(FP) == pytest.approx(fitness(net, (X[kept], Y[kept]), by='likelihood')(FP))
    assert len(correct(net, (X, y))[0]) == point.n and len(predict(net, (X, y))[0]) == 45
    for use in (lambda d: score(net, FP, d), lambda d: fitness(net, d)(FP)):
        with pytest.raises(ValueError, match='no label counts'): use((X, torch.full_like(Y, -100)))


def test_device_of():
    assert device_of(nn.ReLU()) == torch.device('cpu') and device_of(nn.BatchNorm1d(2, affine=False).to('meta')).type == 'meta'
