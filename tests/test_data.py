"What data's notebook cannot check about itself: refusals, faults, caches, the real sets."
import os, subprocess, sys, zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mebqat import data, folders
from mebqat.data import Pool, augment, choose, epoch_batches, load
from mebqat.glyphs import glyphs

REAL = Path(os.environ.get('MEBQAT_DATA') or Path(__file__).resolve().parents[2]/'shared'/'data')
gen = lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch, request):
    if 'real' not in request.fixturenames: monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'cache'))


def picture(seed, size=(6, 6), mode='L'):
    pixels = torch.randint(256, (size[1], size[0], 3), dtype=torch.uint8, generator=gen(seed))
    return Image.fromarray(pixels.numpy()).convert(mode)


def tree(root, classes=('a', 'b', 'c'), n=20, **how):
    for k,c in enumerate(classes):
        (root/c).mkdir(parents=True)
        for i in range(n): picture(1000*k + i, **how).save(root/c/f'{i:03}.png')
    return root


def zipped(root, target):
    with zipfile.ZipFile(target, 'w') as z:
        for f in sorted(root.rglob('*')): z.write(f, f'{root.name}/{f.relative_to(root).as_posix()}')
    return target


def rows(pool): return {x.numpy().tobytes() for x in pool.images}


# splits

@pytest.mark.parametrize('layout', [('',), ('train',), ('train', 'test'), ('train', 'valid', 'test')])
def test_splits_are_disjoint_and_complete(tmp_path, layout):
    root = tmp_path/'data'
    for k,part in enumerate(layout):
        for c in 'abc':
            (root/part/c).mkdir(parents=True)
            for i in range(20): picture(10000*k + 100*ord(c) + i).save(root/part/c/f'{i}.png')
    pools = [load(root, s) for s in ('train', 'val', 'test')]
    found = [rows(p) for p in pools]
    assert sum(map(len, found)) == len(set.union(*found)) == 60*len(layout) and all(found)
    assert set.union(*found) == rows(load(root, 'all'))
    assert all(p.classes == ('a', 'b', 'c') and p.mean == pools[0].mean for p in pools)
    if 'test' in layout: assert len(pools[2]) == 60
    else: assert torch.equal(pools[2].labels.bincount(), torch.full((3,), 2))


def test_published_split_is_the_same_everywhere():
    assert [load('digits', s).fingerprint() for s in ('train', 'val', 'test')] == DIGITS
    code = "from mebqat.data import load; print(load('digits', 'val').fingerprint())"
    env = {**os.environ, 'PYTHONHASHSEED': '7'}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == DIGITS[1]


DIGITS = ['39bb48237d5961ef', 'd3d7c66105cf702f', '77c99b57f97bed07']


def test_val_and_seed_change_the_split_but_not_its_fairness(tmp_path):
    root = tree(tmp_path/'d')
    assert len(load(root, 'val', val=9)) == 9 and len(load(root, 'train', val=9)) == 60 - 6 - 9
    assert torch.equal(load(root, 'val', val=9).labels.bincount(), torch.full((3,), 3))
    assert rows(load(root, 'test', val=9)) == rows(load(root, 'test', val=3))
    assert rows(load(root, 'val', seed=1)) != rows(load(root, 'val'))
    assert len(load(root, 'train', val=0)) == 54


def test_choose_is_fair_for_uneven_classes():
    y = torch.tensor([0]*50 + [1]*30 + [2]*20)[torch.randperm(100, generator=gen(1))]
    idx = choose(y, 10, gen())
    assert torch.equal(idx, idx.unique()) and y[idx].bincount().tolist() == [5, 3, 2]
    assert y[choose(y, 60, gen(), even=True)].bincount().tolist() == [20, 20, 20]
    assert y[choose(y, 80, gen(), even=True)].bincount().tolist() == [30, 30, 20]
    assert len(choose(y, 0, gen())) == 0 and len(choose(y, 100, gen())) == 100


def test_choose_reaches_every_image():
    y = torch.arange(4).repeat_interleave(5)
    seen = torch.stack([torch.bincount(choose(y, 4, gen(s)), minlength=20) for s in range(400)]).sum(0)
    assert seen.sum() == 1600 and seen.min() > 40 and seen.max() < 130


def test_parts_without_a_common_class_keep_their_own(tmp_path):
    for part, names in (('train', 'abc'), ('val', 'de'), ('test', 'fg')): tree(tmp_path/'few'/part, names, 3)
    pools = {s: load(tmp_path/'few', s) for s in ('train', 'val', 'test', 'all')}
    assert [p.classes for p in pools.values()] == [tuple('abc'), tuple('de'), tuple('fg'), tuple('abcdefg')]
    assert pools['val'].labels.tolist() == [0]*3 + [1]*3
    assert pools['all'].labels.tolist() == sum(([i]*3 for i in range(7)), [])


def test_a_class_missing_from_one_part_does_not_shift_labels(tmp_path):
    tree(tmp_path/'d'/'train', 'abc', 5)
    tree(tmp_path/'d'/'test', 'ac', 5)
    pool = load(tmp_path/'d', 'test')
    assert pool.classes == ('a', 'b', 'c') and pool.labels.unique().tolist() == [0, 2]


# pools

def test_digits():
    pools = [load('digits', s) for s in ('train', 'val', 'test')]
    assert [len(p) for p in pools] == [1077, 180, 540] and len(load('digits', 'all')) == 1797
    for p in pools:
        assert p.images.shape[1:] == (1, 8, 8) and p.images.dtype == torch.uint8 and p.labels.dtype == torch.int64
        assert p.classes == tuple('0123456789') and len(p.labels.unique()) == 10
    assert load('digits', size=16).images.shape == (1077, 1, 16, 16)
    assert load('digits', gray=False).batch(slice(0, 4))[0].shape == (4, 3, 8, 8)


def test_digits_match_scikit_learn():
    sk = pytest.importorskip('sklearn.datasets', reason='only this check needs scikit-learn').load_digits()
    pool = load('digits', 'all')
    assert torch.equal(pool.images[:, 0], torch.tensor(sk.images*255/16).round().to(torch.uint8))
    assert pool.labels.tolist() == sk.target.tolist()


@pytest.mark.parametrize('channels', [1, 3])
def test_batch_normalises(channels):
    mean, std = (.4, .5, .6)[:channels], (.1, .2, .3)[:channels]
    images = torch.randint(256, (9, channels, 5, 7), dtype=torch.uint8, generator=gen())
    pool = Pool(images, torch.arange(9) % 2, ('a', 'b'), 'x', 'train', mean, std)
    idx = torch.tensor([3, 3, 0])
    x, y = pool.batch(idx)
    want = torch.stack([torch.stack([(im[c]/255 - mean[c])/std[c] for c in range(channels)]) for im in images[idx]])
    torch.testing.assert_close(x, want)
    assert y.tolist() == [1, 1, 0] and x.dtype == torch.float32
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pool.batch(slice(2, 4))[0], pool.batch(torch.tensor([2, 3]))[0])
    assert torch.equal(pool.images, images)


def test_subset_and_take():
    pool = load('digits')
    small = pool.subset(50, gen())
    assert torch.equal(small.labels.bincount(), torch.full((10,), 5)) and rows(small) <= rows(pool)
    assert small.fingerprint() == pool.subset(50, gen()).fingerprint() != pool.subset(50, gen(1)).fingerprint()
    assert (small.mean, small.classes) == (pool.mean, pool.classes)
    assert torch.equal(pool.take(torch.tensor([5, 2])).labels, pool.labels[[5, 2]])
    with pytest.raises(ValueError, match='cannot take 5000'): pool.subset(5000, gen())


def test_fingerprint_sees_images_labels_and_shape():
    pool = load('digits', 'val')
    images, labels = pool.images.clone(), pool.labels.clone()
    images[0, 0, 0, 0] ^= 1
    labels[0] = (labels[0] + 1) % 10
    def change(**k): return data.replace(pool, **k).fingerprint()
    wide = pool.images.view(-1, 1, 4, 16)
    prints = {pool.fingerprint(), change(images=images), change(labels=labels), change(images=wide)}
    assert len(prints) == 4 and change(images=pool.images.clone()) in prints


def test_moments_are_of_the_training_images_only(tmp_path):
    for part, level in (('train', 50), ('test', 250)):
        for c in 'ab':
            (tmp_path/'d'/part/c).mkdir(parents=True)
            for i in range(10): Image.new('RGB', (4, 4), (level, level//2, 0)).save(tmp_path/'d'/part/c/f'{i}.png')
    pool = load(tmp_path/'d', 'test')
    assert pool.mean == pytest.approx((50/255, 25/255, 0)) and pool.std == (1, 1, 1)


# trees, zips, caches

def test_zip_equals_folder(tmp_path):
    root = tree(tmp_path/'nested', ('greek/alpha', 'greek/beta', 'latin/a'), 10, mode='1')
    (root/'greek'/'readme.txt').write_text('not an image')
    (root/'.hidden').mkdir()
    (root/'__MACOSX'/'latin').mkdir(parents=True)
    for s in ('train', 'val', 'test', 'all'):
        a, b = load(root, s), load(zipped(root, tmp_path/'nested.zip'), s)
        assert a.fingerprint() == b.fingerprint() and a.classes == b.classes == ('greek/alpha', 'greek/beta', 'latin/a')
    assert a.images.unique().tolist() == [0, 255]


def test_omniglot_halves_are_one_set(tmp_path):
    for half, alphabet in (('images_background', 'Greek'), ('images_evaluation', 'Keble')):
        tree(tmp_path/'omniglot'/half/alphabet, ('character01', 'character02'), 3)
    assert load(zipped(tmp_path/'omniglot', tmp_path/'o.zip'), 'all').classes == tuple(
        f'{a}/character0{i}' for a in ('Greek', 'Keble') for i in (1, 2))


def test_channels_and_sizes(tmp_path):
    root = tree(tmp_path/'d', n=4)
    assert load(root).images.shape[1] == 1 and load(root, gray=False).images.shape[1] == 3
    picture(0, mode='RGB').save(root/'a'/'colour.png')
    mixed = load(root, 'all')
    assert mixed.images.shape[1] == 3 and load(root, gray=True).images.shape[1] == 1
    plain = mixed.images[mixed.labels == 1]
    assert torch.equal(plain[:, 0], plain[:, 2])
    picture(1, size=(9, 5)).save(root/'b'/'wide.png')
    with pytest.raises(ValueError, match=r'a/000.png is 6x6 but b/wide.png is 9x5; give size='): load(root)
    assert load(root, 'all', size=8).images.shape == (14, 3, 8, 8)


def test_cache_is_used_and_noticed_when_stale(tmp_path, monkeypatch):
    root = tree(tmp_path/'d')
    first = load(root)
    assert len(list((tmp_path/'cache').iterdir())) == 1
    with monkeypatch.context() as m:
        m.setattr(folders, '_decode_all', lambda *a: pytest.fail('decoded again'))
        assert load(root).fingerprint() == first.fingerprint()
    picture(77).save(root/'a'/'new.png')
    assert len(load(root, 'all')) == 61


@pytest.mark.parametrize('damage', ['truncate', 'flip', 'garbage', 'empty'])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    root = tree(tmp_path/'d')
    want = load(root).fingerprint()
    file, = (tmp_path/'cache').iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[-300] ^= 255
    half = whole[:len(whole)//2]
    file.write_bytes({'truncate': half, 'flip': bytes(flipped), 'garbage': b'x'*500, 'empty': b''}[damage])
    assert load(root).fingerprint() == want
    load(root, 'all')
    assert file.read_bytes() == whole and len(list((tmp_path/'cache').iterdir())) == 1


def test_no_cache_where_none_can_be_written(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'file'/'below'))
    assert len(load(tree(tmp_path/'d'), 'all')) == 60


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, path, **_):
        Path(path).write_bytes(b'half')
        raise OSError('no space left on device')
    monkeypatch.setattr(folders, 'save_file', full)
    assert len(load(tree(tmp_path/'d'), 'all')) == 60 and not list((tmp_path/'cache').iterdir())


# refusals: one line, naming the culprit

def refusal(*args, kind=ValueError, **kwargs):
    with pytest.raises(kind) as e: load(*args, **kwargs)
    assert '\n' not in str(e.value)
    return str(e.value)


def test_refuses_what_is_not_there(tmp_path, monkeypatch):
    said = refusal(tmp_path/'nowhere.zip', kind=FileNotFoundError)
    assert 'nowhere.zip' in said and '--data PATH' in said and 'digits' in said
    assert "'tset'" in refusal('digits', 'tset')
    (tmp_path/'text.zip').write_text('hello')
    assert 'text.zip is not a zip' in refusal(tmp_path/'text.zip')
    said = refusal('cifar10', root=tmp_path, kind=FileNotFoundError)
    assert 'download=True' in said and '--data PATH' in said and str(tmp_path) in said
    monkeypatch.setattr(data, 'find_spec', lambda name: None)
    assert 'pip install scipy' in refusal('svhn', root=tmp_path)
    monkeypatch.setattr(data, 'find_spec', lambda name: True)
    assert 'download=True' in refusal('svhn', root=tmp_path, kind=FileNotFoundError)
    with pytest.raises(FileNotFoundError, match='lost.bin'): data.shipped('lost.bin')


@pytest.mark.parametrize('as_zip', [False, True])
def test_refuses_bad_trees(tmp_path, as_zip):
    def said(root): return refusal(zipped(root, tmp_path/f'{root.name}.zip') if as_zip else root)
    (tmp_path/'bare').mkdir()
    assert 'no class folders' in said(tmp_path/'bare')
    picture(0).save(tmp_path/'bare'/'x.png')
    assert ("one class, 'bare'" if as_zip else 'no class folders') in said(tmp_path/'bare')
    assert "one class, 'only'" in said(tree(tmp_path/'one', ('only',)))
    root = tree(tmp_path/'hollow', n=3)
    (root/'d').mkdir()
    assert 'folder ' in said(root) and 'd holds no images' in said(root)
    root = tree(tmp_path/'beside'/'train', n=3).parent
    tree(root/'extra', n=1)
    assert 'extra/a/000.png' in said(root)
    tree(tmp_path/'untrained'/'test', n=3)
    tree(tmp_path/'untrained'/'val', n=3)
    assert 'no train folder' in said(tmp_path/'untrained')
    for part in ('train', 'test'):
        (tmp_path/'flat'/part).mkdir(parents=True)
        picture(0).save(tmp_path/'flat'/part/'x.png')
    assert 'not in a class folder' in said(tmp_path/'flat')


def test_refuses_a_zip_of_loose_images(tmp_path):
    with zipfile.ZipFile(tmp_path/'loose.zip', 'w') as z:
        for i in range(3): z.writestr(f'{i}.png', b'')
    assert 'no class folders' in refusal(tmp_path/'loose.zip')


@pytest.mark.parametrize('as_zip', [False, True])
@pytest.mark.parametrize('content', ['truncated', 'text', 'empty'])
def test_names_the_unreadable_image(tmp_path, as_zip, content):
    root = tree(tmp_path/'d', n=4, size=(40, 40))
    whole = (root/'b'/'002.png').read_bytes()
    bad = {'truncated': whole[:len(whole)//2], 'text': b'not a picture', 'empty': b''}[content]
    (root/'b'/'002.png').write_bytes(bad)
    said = refusal(zipped(root, tmp_path/'d.zip') if as_zip else root)
    assert 'b/002.png' in said and 'cannot read the image' in said and not (tmp_path/'cache').exists()


def test_names_the_damaged_zip_member(tmp_path):
    path = zipped(tree(tmp_path/'d', n=4, size=(40, 40)), tmp_path/'d.zip')
    raw = bytearray(path.read_bytes())
    raw[len(raw)//3] ^= 255
    path.write_bytes(raw)
    assert '.png' in refusal(path)


def test_refuses_bad_numbers(tmp_path):
    root = tree(tmp_path/'d', n=5)
    assert 'val=99' in refusal(root, val=99) and 'val=-1' in refusal(root, val=-1)
    assert 'no val images' in refusal(root, 'val', val=0)
    tree(tmp_path/'own'/'train', n=5)
    tree(tmp_path/'own'/'val', n=5)
    assert 'its own val folder' in refusal(tmp_path/'own', val=3)
    assert 'n_classes' in refusal('glyphs', n_classes=1) and 'per_class' in refusal('glyphs', per_class=0)


# glyphs

def test_glyphs_depend_on_the_seed_alone():
    torch.manual_seed(1)
    x, y = glyphs(6, 4, seed=3)
    torch.manual_seed(2)
    assert torch.equal(x, glyphs(6, 4, seed=3)[0]) and not torch.equal(x, glyphs(6, 4, seed=4)[0])
    assert x.shape == (24, 1, 28, 28) and x.dtype == torch.uint8 and y.tolist() == sorted([0, 1, 2, 3, 4, 5]*4)
    assert glyphs(2, 2, size=20)[0].shape == (4, 1, 20, 20)
    assert len(rows(load('glyphs', 'all', n_classes=6, per_class=4))) == 24


def test_glyphs_hold_ink_and_grey_edges():
    x, _ = glyphs(30, 4)
    ink = (x > 127).float().mean((1, 2, 3))
    assert ink.min() > .02 and ink.max() < .45
    assert ((x > 0) & (x < 255)).flatten(1).any(1).all()
    edge = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 0], x[..., -1]], -1)
    assert (edge > 127).float().mean() < .02


def test_glyph_classes_can_be_told_apart():
    x, _ = glyphs(60, 20)
    x = x.float().flatten(1).view(60, 20, -1)
    nearest = torch.cdist(x[:, 10:].flatten(0, 1), x[:, :10].mean(1)).argmin(1)
    assert (nearest == torch.arange(60).repeat_interleave(10)).float().mean() > .9


# augmentation and batches

@pytest.mark.parametrize('shape, layout', [
    ((16, 3, 8, 8), torch.channels_last), ((16, 3, 8, 8), torch.contiguous_format),
    ((16, 1, 7, 9), torch.contiguous_format), ((1, 3, 5, 6), torch.channels_last)])
@pytest.mark.parametrize('flip', [True, False])
@pytest.mark.parametrize('pad', [0, 4])
def test_augment_equals_a_loop(shape, layout, flip, pad):
    x = torch.randn(shape, generator=gen()).to(memory_format=layout)
    before, g = x.clone(), gen(5)
    top, left, mirror = (torch.randint(n, (len(x), 1), generator=g) for n in (2*pad + 1, 2*pad + 1, 2))
    out = augment(x, gen(5), pad, flip)
    for i, image in enumerate(F.pad(x, (pad,)*4)):
        want = image[:, top[i]:top[i] + shape[2], left[i]:left[i] + shape[3]]
        assert torch.equal(out[i], want.flip(-1) if flip and mirror[i] else want)
    assert out.is_contiguous(memory_format=layout) and torch.equal(x, before)


def test_augment_varies_over_images_and_draws():
    x = torch.arange(64.).view(1, 1, 8, 8).expand(256, 1, 8, 8)
    g = gen()
    a, b = augment(x, g), augment(x, g)
    assert len(rows(Pool(a, torch.zeros(256), (), '', '', (), ()))) > 100 and not torch.equal(a, b)


def test_epoch_batches():
    g = gen()
    a, b = (torch.cat(list(epoch_batches(103, 10, g, drop_last=False))) for _ in range(2))
    assert a.sort().values.tolist() == list(range(103)) and not torch.equal(a, b)
    assert [len(i) for i in epoch_batches(103, 10, gen())] == [10]*10
    assert torch.equal(torch.cat(list(epoch_batches(103, 10, gen(), drop_last=False))), a)
    for size in (0, 104):
        with pytest.raises(ValueError, match=f'got {size}'): epoch_batches(103, size, gen())


# the real sets, where they are

@pytest.fixture
def real():
    def find(name):
        if not (REAL/name).exists(): pytest.skip(f'{name} is not in {REAL}')
        return REAL/name
    return find


def test_cifar10_zip(real):
    pools = {s: load(real('cifar10.zip'), s, val=5000) for s in ('train', 'val', 'test')}
    assert {s: len(p) for s,p in pools.items()} == {'train': 45000, 'val': 5000, 'test': 10000}
    for p in pools.values():
        assert len(p.classes) == 10 and len(p.labels.bincount().unique()) == 1 and p.images.shape[1:] == (3, 32, 32)
    assert pools['test'].mean == pytest.approx((.4914, .4822, .4465), abs=.005)
    assert pools['test'].std == pytest.approx((.2470, .2435, .2616), abs=.005)


def test_omniglot_zip(real):
    pool = load(real('omniglot.zip'), 'all', size=28)
    assert len(pool) == 32460 and len(pool.classes) == 1623 and pool.labels.bincount().unique().tolist() == [20]
    assert pool.images.shape[1:] == (1, 28, 28) and 'Greek/character01' in pool.classes


def test_other_modules_are_not_imported():
    code = "import sys, mebqat; a = set(sys.modules); import mebqat.data; print(*sorted(set(sys.modules) - a))"
    new = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert [m for m in new if m.startswith('mebqat')] == ['mebqat.data', 'mebqat.folders', 'mebqat.glyphs']
    assert not {'sklearn', 'scipy', 'torchvision', 'fastcore', 'IPython'} & set(new)
