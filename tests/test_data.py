"What data's notebooks cannot check about themselves: refusals, faults, caches, the real sets."
import io, json, math, os, pickle, shutil, signal, socket, struct, subprocess, sys, threading, time, types, unicodedata, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mebqat import data, folders, image_cache, memory
from mebqat.pools import Pool, by_content, choose, split_classes
from mebqat.data import augment, epoch_batches, jitter, load
from mebqat.files import shipped
from mebqat.glyphs import glyphs

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
    assert [p.drawn for p in pools] == ['given' if 'valid' in layout else 'content']*3 and len({p.data for p in pools}) == 1
    if 'test' in layout: assert len(pools[2]) == 60
    else: assert torch.equal(load(root, 'test', drawn='seed').labels.bincount(), torch.full((3,), 2))


def test_published_split_is_the_same_everywhere():
    assert [load('digits', s).fingerprint() for s in ('train', 'val', 'test')] == DIGITS
    code = "from mebqat.data import load; print(load('digits', 'val').fingerprint())"
    env = {**os.environ, 'PYTHONHASHSEED': '7'}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == DIGITS[1]


DIGITS = ['39bb48237d5961ef', 'd3d7c66105cf702f', '77c99b57f97bed07']


@pytest.mark.parametrize('rule', ['seed', 'content'])
def test_val_and_seed_change_the_split(tmp_path, rule):
    root = tree(tmp_path/'d')
    get = lambda s, **k: load(root, s, drawn=rule, **k)
    n_test = len(get('test'))
    assert len(get('val', val=9)) == 9 and len(get('train', val=9)) == 60 - n_test - 9
    if rule == 'seed': assert n_test == 6 and torch.equal(get('val', val=9).labels.bincount(), torch.full((3,), 3))
    assert rows(get('test', val=9)) == rows(get('test', val=3))
    assert rows(get('val', seed=1)) != rows(get('val')) and rows(get('test', seed=1)) != rows(get('test'))
    assert len(get('train', val=0)) == 60 - n_test


def test_the_seeded_rule_is_the_old_one(tmp_path):
    "Fingerprints from before there was another rule: runs on folders that were trained then ask for it."
    root = tree(tmp_path/'d')
    assert [load(root, s, drawn='seed').fingerprint() for s in ('train', 'val', 'test', 'all')] == BEFORE
    assert load(root, 'val', by='classes', drawn='seed').classes == tuple(split_classes('abc')['val'])


BEFORE = ['cf04b8e971b9fb5d', 'a7a67e0f6efe7ffa', '4c61322723072575', '5b415fa518263063']


# splits by content

def splits_of(path, **how): return {s: rows(load(path, s, **how)) for s in ('train', 'val', 'test')}


@pytest.mark.parametrize('as_zip', [False, True])
def test_a_picture_more_moves_no_other(tmp_path, as_zip):
    root = tree(tmp_path/'d', n=40)
    path = lambda: zipped(root, tmp_path/'d.zip') if as_zip else root
    before = splits_of(path())
    assert all(before.values())
    for k in range(8):
        picture(7000 + k).save(root/'abc'[k % 3]/f'{k - 4:04}.png')
        after = splits_of(path())
        assert all(before[s] <= after[s] for s in before)
    (root/'b'/'007.png').unlink()
    assert all(after[s] >= now for s, now in splits_of(path()).items())


def test_a_split_is_the_same_in_a_zip_and_at_any_size(tmp_path):
    root = tree(tmp_path/'d', n=30, size=(8, 8))
    for k,f in enumerate(sorted(root.rglob('*.png'))): f.rename(f.with_name(f'{(k*37) % 1000:04}.png'))
    archive = zipped(root, tmp_path/'other.zip')
    assert {s: load(root, s).fingerprint() for s in ('val', 'test')} == {s: load(archive, s).fingerprint() for s in ('val', 'test')}
    small = {s: load(root, s, size=4, gray=False) for s in ('train', 'val', 'test')}
    assert {s: len(p) for s,p in small.items()} == {s: len(x) for s,x in splits_of(archive).items()}
    assert len({p.data for p in (*small.values(), load(archive), load(root, 'all', seed=5))}) == 1


def test_copies_stay_together(tmp_path):
    root = tree(tmp_path/'d', n=25)
    for f in sorted(root.rglob('*.png')): shutil.copy(f, f.with_name(f'copy of {f.name}'))
    for how in ({}, {'val': 10}, {'seed': 3}):
        parts = splits_of(root, **how)
        assert sum(map(len, parts.values())) == 75 == len(set.union(*parts.values()))
    assert len(load(root, 'val', val=10)) == 10


@pytest.mark.parametrize('n', range(3, 14))
def test_no_split_is_empty_and_no_class_goes_without(n):
    for trial in range(60):
        g = gen(trial)
        keys, y = torch.randint(2**63 - 1, (n,), generator=g), torch.randint(3, (n,), generator=g)
        parts = by_content(y, keys, ('test', 'val'))
        assert sorted(torch.cat([*parts.values()]).tolist()) == list(range(n)) and all(map(len, parts.values()))
        free = n - len(y.unique())
        if free >= 2: assert {*y[parts['train']].tolist()} == {*y.tolist()}
        held = by_content(y, keys, ('val',), val=min(2, free))
        assert len(held['val']) == min(2, free) and {*y[held['train']].tolist()} == {*y.tolist()}


def test_tenths_by_content_are_tenths():
    keys, y = torch.randint(2**63 - 1, (20_000,), generator=gen()), torch.arange(20_000) % 7
    sizes = {s: len(i)/20_000 for s,i in by_content(y, keys, ('test', 'val')).items()}
    assert abs(sizes['test'] - .1) < .01 and abs(sizes['val'] - .1) < .01


def test_a_class_more_moves_no_other(tmp_path):
    names = [f'kind{i:02}' for i in range(40)]
    before, after = (split_classes(n, hashed=True) for n in (names, [*names, 'a new one']))
    assert all({*after[s]} - {'a new one'} == {*before[s]} for s in before)
    assert split_classes(map(unicodedata.normalize, ['NFD']*40, names), hashed=True) == before != split_classes(names, 1, hashed=True)
    for n in range(3, 12): assert all(split_classes(names[:n], hashed=True).values())


def test_who_drew_the_split_is_kept(tmp_path):
    root = tree(tmp_path/'d', n=8)
    pool = load(root)
    assert pool.drawn == 'content' and load(root, drawn='seed').drawn == 'seed' and load('digits').drawn == 'seed'
    assert load(tree(tmp_path/'cifar10', n=8), 'val').drawn == 'seed' and load('digits', drawn='content').drawn == 'content'
    for part in (pool.take(slice(0, 4)), pool.subset(5, gen()), pool.to('cpu'), load(root, rotations=True)):
        assert (part.data, part.drawn) == (pool.data, 'content') and len(part.data) == 16
    assert Pool(pool.images, pool.labels, pool.classes, 'x', 'all', (0,), (1,)).data == ''
    assert "drawn='chance'" in refusal(root, drawn='chance')
    picture(5).save(root/'a'/'more.png')
    assert load(root).data != pool.data
    os.rename(root/'a', root/'z')
    assert len({load(root).data, pool.data}) == 2


def test_glyphs_and_digits_have_prints_of_their_own():
    prints = [load('glyphs', n_classes=k, per_class=p, seed=s).data for k, p, s in ((4, 5, 0), (5, 4, 0), (4, 5, 1))]
    assert len({*prints, load('digits').data}) == 4 and load('glyphs', 'all', n_classes=4, per_class=5, size=20, gray=False).data == prints[0]


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


# splits over classes, and what goes with them

def test_class_split_depends_on_names_and_seed_alone():
    names = [f'c{i}' for i in range(50)]
    parts = split_classes(names)
    assert [len(c) for c in parts.values()] == [32, 8, 10] and sorted(sum(parts.values(), [])) == sorted(names)
    assert split_classes(names[::-1]) == parts != split_classes(names, seed=1)
    assert split_classes(map(str, range(9))) == {'train': ['1', '3', '4', '5', '6', '7'], 'val': ['8'], 'test': ['0', '2']}
    assert [[len(c) for c in split_classes('abcdefg'[:n]).values()] for n in (3, 4, 7)] == [[1, 1, 1], [2, 1, 1], [5, 1, 1]]
    assert [len(c) for c in split_classes([f'{i:04}' for i in range(1623)]).values()] == [1028, 172, 423]


@pytest.mark.parametrize('layout', [('',), ('train', 'test')])
def test_by_classes_pools_parts_and_keeps_classes_whole(tmp_path, layout):
    root, names = tmp_path/'data', 'abcdefghij'
    for k,part in enumerate(layout):
        for c in names:
            (root/part/c).mkdir(parents=True)
            for i in range(6): picture(10000*k + 100*ord(c) + i).save(root/part/c/f'{i}.png')
    pools = {s: load(root, s, by='classes') for s in ('train', 'val', 'test')}
    assert {s: p.classes for s,p in pools.items()} == {s: tuple(c) for s,c in split_classes(names, hashed=True).items()}
    assert load(root, 'val', by='classes', drawn='seed').classes == tuple(split_classes(names)['val'])
    every = load(root, 'all')
    for p in pools.values():
        assert p.counts.tolist() == [6*len(layout)]*len(p.classes)
        assert all(rows(p.take(p.table[i])) == rows(every.take(every.table[names.index(c)])) for i,c in enumerate(p.classes))
    train = pools['train'].images.double()/255
    for p in pools.values():
        assert p.mean == pytest.approx((train.mean().item(),)) and p.std == pytest.approx((train.std(correction=0).item(),))


def test_own_disjoint_parts_stay(tmp_path):
    for part, names in (('train', 'abcde'), ('val', 'fg'), ('test', 'hi')): tree(tmp_path/'few'/part, names, 3)
    for s in ('train', 'val', 'test'):
        assert load(tmp_path/'few', s, by='classes').fingerprint() == load(tmp_path/'few', s, by='images').fingerprint()
    for part, names in (('train', 'abcde'), ('test', 'hi')): tree(tmp_path/'two'/part, names, 3)
    got = {s: load(tmp_path/'two', s, by='classes').classes for s in ('train', 'val', 'test')}
    assert got['test'] == ('h', 'i') and len(got['val']) == 1 and sorted(got['train'] + got['val']) == [*'abcde']


def split_file(path, **lists):
    path.write_text(json.dumps(lists))
    return path


def test_a_split_file_decides(tmp_path):
    for part, names in (('train', 'abc'), ('val', 'd'), ('test', 'ef')): tree(tmp_path/'few'/part, names, 3)
    path = split_file(tmp_path/'s.json', train=['f', 'a'], val=['b'], test=['c', 'd'])
    pools = {s: load(tmp_path/'few', s, split_file=path) for s in ('train', 'val', 'test')}
    assert {s: p.classes for s,p in pools.items()} == {'train': ('a', 'f'), 'val': ('b',), 'test': ('c', 'd')}
    every = load(tmp_path/'few', 'all')
    assert torch.equal(pools['test'].images, torch.cat([every.images[6:9], every.images[9:12]])) and pools['test'].labels.tolist() == [0]*3 + [1]*3


def test_refuses_bad_split_files(tmp_path):
    root, path = tree(tmp_path/'d', 'abc', 3), tmp_path/'s.json'
    def said(**k): return refusal(root, split_file=split_file(path, **k))
    assert 'no split file at' in refusal(root, split_file=tmp_path/'none.json', kind=FileNotFoundError)
    assert 'no split file at' in refusal(root, split_file=tmp_path, kind=FileNotFoundError)
    assert "s.json: it has no 'test'; a split file lists classes under train, val and test" in said(train=['a'], val=['b'])
    assert "s.json: val is 'b', not a list" in said(train=['a'], val='b', test=['c'])
    assert "'x', under val, is not a class" in said(train=['a'], val=['x'], test=['c'])
    assert 's.json: val[0] is ["b"], not text' in said(train=['a'], val=[['b']], test=['c'])
    assert "'a' is under train and again under test" in said(train=['a'], val=['b'], test=['c', 'a'])
    assert 'no classes to train on' in said(train=[], val=['b'], test=['c'])
    assert 's.json lists no class' in refusal(root, 'val', split_file=split_file(path, train=['a'], val=[], test=['c']))
    path.write_text('{"train": ["a"')
    assert 's.json: not JSON' in refusal(root, split_file=path)
    path.write_text('["a"]')
    assert 's.json: not a JSON object' in refusal(root, split_file=path)
    path.write_bytes(b'\xff\xfe\x00')
    assert 's.json: not JSON' in refusal(root, split_file=path)
    assert "by='images'" in refusal(root, split_file=path, by='images')


def test_refuses_impossible_class_splits(tmp_path):
    assert 'there are 2' in refusal(tree(tmp_path/'d', 'ab', 3), by='classes')
    assert 'val=5' in refusal(tree(tmp_path/'e', 'abc', 3), by='classes', val=5)
    assert "by='alphabets'" in refusal('digits', by='alphabets')
    assert '6x4' in refusal(tree(tmp_path/'f', 'abc', 3, size=(6, 4)), rotations=True)


def test_rotations_and_inversion_of_any_data():
    plain, turned = load('digits'), load('digits', rotations=True)
    assert len(turned) == 4*len(plain) and turned.classes[:12] == (*'0123456789', '0@90', '1@90') and turned.classes[-1] == '9@270'
    for k in range(4):
        part = slice(k*len(plain), (k + 1)*len(plain))
        assert torch.equal(turned.images[part], plain.images.rot90(k, (2, 3))) and torch.equal(turned.labels[part], plain.labels + 10*k)
    dark = load('digits', invert=True)
    assert torch.equal(dark.images, 255 - plain.images)
    torch.testing.assert_close(dark.batch(slice(0, 9))[0], -plain.batch(slice(0, 9))[0], rtol=1e-4, atol=1e-4)


def omniglot_tree(root, n=2):
    for half, alphabet in (('images_background', 'Greek'), ('images_evaluation', 'Keble')):
        tree(root/half/alphabet, [f'character{i:02}' for i in range(5)], n, size=(35, 35), mode='1')
    return root


def test_omniglot_defaults_follow_the_name(tmp_path, monkeypatch):
    path = zipped(omniglot_tree(tmp_path/'omniglot'), tmp_path/'Omniglot.zip')
    pools = [load(path), load(tmp_path/'omniglot'), load('omniglot', root=tmp_path)]
    monkeypatch.setenv('MEBQAT_DATA', str(tmp_path))
    pools.append(load('omniglot'))
    assert len({p.fingerprint() for p in pools}) == 1
    assert all(p.images.shape == (48, 1, 28, 28) and len(p.classes) == 24 and (p.name, p.mean, p.std) == ('omniglot', (0,), (1,)) for p in pools)
    other = load(path.rename(tmp_path/'letters.zip'), size=28)
    assert len(other.classes) == 10 and other.mean != (0,)
    assert load('omniglot', 'all', size=14, gray=False, rotations=False).images.shape == (20, 3, 14, 14)


def test_mini_imagenet_defaults_follow_the_name(tmp_path):
    for part, names in (('train', 'abc'), ('val', 'd'), ('test', 'ef')): tree(tmp_path/'miniimagenet'/part, names, 3, size=(90, 90), mode='RGB')
    for name in ('mini_imagenet', 'miniimagenet', 'mini-imagenet'):
        pool = load(name, 'test', root=tmp_path)
        assert pool.images.shape == (6, 3, 84, 84) and (pool.name, pool.mean, pool.std) == ('mini_imagenet', (0,)*3, (1,)*3)
    assert pool.classes == ('e', 'f') and len(load(tmp_path/'miniimagenet', 'all').classes) == 6


def test_few_shot_sets_that_are_not_there(tmp_path, monkeypatch):
    said = refusal('omniglot', root=tmp_path, kind=FileNotFoundError)
    assert 'download=True' in said and '--data PATH' in said and str(tmp_path) in said
    said = refusal('mini_imagenet', root=tmp_path, kind=FileNotFoundError)
    assert 'download=True' in said and '--data PATH' in said and 'train, val, test' in said
    for name in ('omniglot.zip', 'miniimagenet.zip'):
        assert f'no data at {tmp_path/name}' in refusal(tmp_path/name, kind=FileNotFoundError)
    monkeypatch.setitem(sys.modules, 'learn2learn.vision.datasets', None)
    assert 'learn2learn==0.2.0' in refusal('mini_imagenet', root=tmp_path, download=True)


def test_torchvision_omniglot(tmp_path, monkeypatch):
    from torchvision import datasets
    asked = []
    def fetch(root, background, download):
        asked.append((background, download))
        if background: omniglot_tree(Path(root)/'omniglot-py')
    monkeypatch.setattr(datasets, 'Omniglot', fetch)
    said = refusal('omniglot', root=tmp_path, download=True)
    assert '20 of 32,460' in said and asked == [(True, True), (False, True)]
    labels = torch.arange(1623).repeat_interleave(20)
    source = image_cache.Source('omniglot-py', tuple(f'{i:04}' for i in range(1623)), ('all',),
                            {'all.labels': labels, 'all.images': (labels % 251).to(torch.uint8).view(-1, 1, 1, 1)}.get)
    monkeypatch.setattr(data, 'image_folders', lambda path, size, gray: source if (path.name, size, gray) == ('omniglot-py', 28, True) else None)
    pool = load('omniglot', 'test', root=tmp_path, download=True)
    assert (pool.name, len(pool.classes), len(pool), len(asked)) == ('omniglot', 4*423, 80*423, 2)
    def offline(*a, **k): raise OSError('no route to host')
    monkeypatch.setattr(datasets, 'Omniglot', offline)
    assert 'no route to host' in refusal('omniglot', root=tmp_path/'new', download=True, kind=FileNotFoundError)


def mini_pickle(mode, n=4):
    names = {'train': 'cab', 'validation': 'd', 'test': 'fe'}[mode]
    images = torch.randint(256, (n*len(names), 84, 84, 3), dtype=torch.uint8, generator=gen(ord(names[0]))).numpy()
    return {'image_data': images, 'class_dict': {c: list(range(k*n, k*n + n)) for k,c in enumerate(names)}}


def test_learn2learn_mini_imagenet(tmp_path, monkeypatch):
    sys.modules.setdefault('gym_notices', None)
    mini = pytest.importorskip('learn2learn.vision.datasets.mini_imagenet', reason='only this check needs learn2learn')
    asked = []
    def fetch(url, target, size=None):
        asked.append(Path(target))
        Path(target).write_bytes(pickle.dumps(mini_pickle(Path(target).stem.split('-')[-1])))
    monkeypatch.setattr(mini, 'download_file', fetch)
    pools = {s: load('mini_imagenet', s, root=tmp_path, download=True) for s in ('train', 'val', 'test')}
    assert {s: p.classes for s,p in pools.items()} == {'train': ('a', 'b', 'c'), 'val': ('d',), 'test': ('e', 'f')}
    want = torch.from_numpy(mini_pickle('train')['image_data']).permute(0, 3, 1, 2)
    assert torch.equal(pools['train'].images, want) and pools['train'].labels.tolist() == [2]*4 + [0]*4 + [1]*4
    assert len(asked) == 3 and not any(f.exists() for f in asked) and not [*tmp_path.rglob('*.pkl')]
    assert load('mini_imagenet', 'test', root=tmp_path).fingerprint() == pools['test'].fingerprint() and len(asked) == 3
    assert load('mini_imagenet', 'val', size=42, gray=True, root=tmp_path).images.shape == (4, 1, 42, 42)
    file = tmp_path/'cache'/'mini_imagenet-val.safetensors'
    raw = bytearray(file.read_bytes())
    raw[-50] ^= 255
    file.write_bytes(raw)
    assert 'mini_imagenet-val.safetensors is damaged' in refusal('mini_imagenet', 'val', root=tmp_path)


def test_a_pickle_beside_the_data_is_never_opened(tmp_path, monkeypatch):
    for part in ('train', 'validation', 'test'):
        for folder in (tmp_path, tmp_path/'cache'):
            folder.mkdir(exist_ok=True)
            (folder/f'mini-imagenet-cache-{part}.pkl').write_bytes(pickle.dumps(mini_pickle(part)))
    asked = []
    class Loader:
        def __init__(self, root, mode, download):
            asked.append([*Path(root).iterdir()])
            raise OSError('no route to host')
    monkeypatch.setitem(sys.modules, 'learn2learn.vision.datasets', types.SimpleNamespace(MiniImagenet=Loader))
    assert 'download=True' in refusal('mini_imagenet', root=tmp_path, kind=FileNotFoundError) and not asked
    said = refusal('mini_imagenet', root=tmp_path, download=True, kind=FileNotFoundError)
    assert 'OSError: no route to host' in said and asked == [[]]


# pools

def test_table_and_counts():
    y = torch.randint(7, (60,), generator=gen()) + (torch.rand(60, generator=gen(1)) < .5)
    y[y == 3] = 4
    pool = Pool(torch.zeros(60, 1, 1, 1, dtype=torch.uint8), y, tuple('abcdefgh'), 'x', 'all', (0,), (1,))
    assert pool.counts.tolist() == [(y == c).sum() for c in range(8)] and pool.counts[3] == 0
    assert pool.table.shape == (8, pool.counts.max()) and pool.table.dtype == torch.int64
    for c in range(8):
        where = (y == c).nonzero()[:, 0].tolist()
        assert pool.table[c].tolist() == where + [-1]*(pool.table.shape[1] - len(where))
    assert pool.take(torch.arange(5)).table.shape == (8, pool.take(torch.arange(5)).counts.max())


@pytest.mark.parametrize('device', ['cpu', 'meta', pytest.param('cuda', marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU'))])
def test_to_moves_images_and_labels(device):
    pool = load('digits', 'val')
    there = pool.to(device)
    assert there.images.device.type == there.labels.device.type == device
    assert (there.classes, there.mean, there.name, there.split) == (pool.classes, pool.mean, pool.name, pool.split)
    assert pool.images.device.type == 'cpu'
    if device == 'meta': return
    for idx in (torch.tensor([3, 1, 3]), torch.tensor([3, 1, 3], device=device), slice(0, 5)):
        x, y = there.batch(idx)
        assert x.device.type == y.device.type == device
        want = pool.batch(idx.cpu() if torch.is_tensor(idx) else idx)
        torch.testing.assert_close(x.cpu(), want[0])
        assert torch.equal(y.cpu(), want[1])
    assert there.table.device.type == device and torch.equal(there.table.cpu(), pool.table)
    assert there.fingerprint() == pool.fingerprint() and there.subset(20, gen()).fingerprint() == pool.subset(20, gen()).fingerprint()


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
        m.setattr(image_cache, '_block', lambda *a: pytest.fail('decoded again'))
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
    pieces = image_cache._pieces
    def full(blocks, write, sums):
        pieces(list(blocks)[:1], write, sums)
        raise OSError('no space left on device')
    monkeypatch.setattr(image_cache, '_pieces', full)
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
    with pytest.raises(FileNotFoundError, match='lost.bin'): shipped('lost.bin')


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
    assert 'b/002.png' in said and 'cannot read the image' in said and '<' not in said and not [*tmp_path.glob('cache/*')]


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


# pictures as a viewer shows them

def saved(root, arrays, ext='png', classes='ab', **how):
    "A tree whose classes share out some pictures, arrays or images."
    for i,a in enumerate(arrays):
        folder = root/classes[i % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        (a if isinstance(a, Image.Image) else Image.fromarray(a)).save(folder/f'{i:02}.{ext}', **how)
    return root


def loaded(root, **how):
    "Its images in the order they were given, quietly."
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        every = load(root, 'all', **how)
    half = len(every)//2
    return torch.stack([every.images[half*(i % 2) + i//2] for i in range(len(every))])


def notes(path, **how):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        load(path, 'all', **how)
    assert all(x.category is UserWarning and '\n' not in str(x.message) for x in w)
    return ' | '.join(str(x.message) for x in w)


noise = lambda seed, shape=(9, 9), high=256: np.random.default_rng(seed).integers(0, high, shape)


@pytest.mark.parametrize('ext, how', [('jpg', {'quality': 100}), ('png', {}), ('tiff', {}), ('webp', {'lossless': True})])
def test_every_orientation(tmp_path, ext, how):
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8], upright[4:, 8:] = (250, 0, 0), (0, 0, 250)
    lying = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.transpose(1, 0, 2),
             6: np.rot90(upright), 7: np.rot90(upright, 2).transpose(1, 0, 2), 8: np.rot90(upright, -1)}
    for orientation, pixels in lying.items():
        exif = Image.Exif()
        exif[274] = orientation
        folder = tmp_path/'d'/'ab'[orientation % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder/f'{orientation}.{ext}', exif=exif, **how)
    Image.fromarray(255 - upright).save(tmp_path/'d'/'a'/f'other.{ext}', **how)
    every = load(tmp_path/'d', 'all').images.double()
    want = torch.from_numpy(upright).permute(2, 0, 1).double()
    close = [(x - want).abs().mean() < 30 for x in every]
    assert sum(close) == 8 and every.shape[2:] == (8, 16)


def test_damaged_notes_leave_a_picture_as_it_lies(tmp_path):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)], exif=b'Exif\0\0II*\0\xff\xff\xff\xff nonsense')
    assert torch.equal(loaded(root)[2, 0], torch.from_numpy(noise(2)).to(torch.uint8))


def on_nothing(colour, seed):
    a = np.zeros((9, 9, 4), np.uint8)
    a[..., :3], a[..., 3] = colour, 255*(noise(seed) > 128)
    return a


@pytest.mark.parametrize('colour, ground', [((0, 0, 0), 255), ((255,)*3, 0), ((250, 252, 255), 0), ((200, 30, 30), 255)])
def test_strokes_on_nothing_are_seen(tmp_path, colour, ground):
    root = saved(tmp_path/'d', [on_nothing(colour, i) for i in range(8)])
    for i,x in enumerate(loaded(root)):
        strokes = torch.from_numpy(noise(i) > 128)
        assert (x[:, ~strokes] == ground).all() and (x[:, strokes].T == torch.tensor(colour)).all()
    assert ('laid on black' in notes(root)) == (ground == 0)


def test_black_and_white_strokes_go_on_grey(tmp_path):
    root = saved(tmp_path/'d', [on_nothing((255*(i//2 % 2),)*3, i) for i in range(8)])
    assert loaded(root).unique().tolist() == [0, 128, 255] and 'laid on grey' in notes(root)


@pytest.mark.parametrize('form', ['LA', 'P', 'gif', 'tRNS'])
def test_other_transparency(tmp_path, form):
    pictures = [Image.fromarray(on_nothing((0, 0, 0), i)) for i in range(6)]
    if form == 'LA': root = saved(tmp_path/'d', [p.convert('LA') for p in pictures])
    elif form == 'tRNS': root = saved(tmp_path/'d', [Image.fromarray(np.where(noise(i) > 128, 0, 77).astype(np.uint8)) for i in range(6)], transparency=77)
    else:
        flat = []
        for i in range(6):
            p = Image.fromarray((noise(i) > 128).astype(np.uint8)).convert('P')
            p.putpalette([0, 0, 0]*2)
            flat.append(p)
        root = saved(tmp_path/'d', flat, 'gif' if form == 'gif' else 'png', transparency=0)
    got = loaded(root)
    assert all(torch.equal(x[0] == 0, torch.from_numpy(noise(i) > 128)) and x.unique().tolist() == [0, 255] for i,x in enumerate(got))


WIDE = {'12 of 16 bits': (lambda a: (a*16).astype(np.uint16), 'png'), 'a narrow band of 16 bits': (lambda a: (a + 30000).astype(np.uint16), 'tiff'),
        'int32': (lambda a: a.astype(np.int32), 'tiff'), '20 bits': (lambda a: (a*4000).astype(np.int32), 'tiff'), 'below 0': (lambda a: (a - 1000).astype(np.int32), 'tiff'),
        'float 0..1': (lambda a: (a/255).astype(np.float32), 'tiff'), 'float -1..1': (lambda a: (a/127.5 - 1).astype(np.float32), 'tiff')}


@pytest.mark.parametrize('kind', WIDE)
def test_more_than_a_byte_keeps_its_levels(tmp_path, kind):
    make, ext = WIDE[kind]
    plain = [noise(i, (16, 16)) for i in range(6)]
    plain[0][0, :2] = 0, 255
    root = saved(tmp_path/'d', [make(a) for a in plain], ext)
    assert all(torch.equal(x[0], torch.from_numpy(a).to(torch.uint8)) for x,a in zip(loaded(root), plain))
    assert 'became 0 to 255' in notes(root) and load(root).images.shape[1] == 1


def test_one_range_for_all_pictures(tmp_path):
    root = saved(tmp_path/'d', [(noise(i)*k).astype(np.uint16) for i,k in enumerate((1, 4, 16, 16))])
    tops = loaded(root).flatten(1).amax(1).tolist()
    assert tops[0] < 18 and tops[1] < 70 and tops[2] > 230


def test_no_number_is_refused(tmp_path):
    bad = np.full((4, 4), np.nan, np.float32)
    root = saved(tmp_path/'d', [*(noise(i, (4, 4)).astype(np.float32) for i in range(3)), bad], 'tiff')
    assert 'b/03.tiff: it holds NaN or infinity' in refusal(root)


def test_wide_and_plain_pictures_together(tmp_path):
    root = saved(tmp_path/'d', [noise(0).astype(np.uint8), (noise(1)*9).astype(np.uint16), noise(2, (9, 9, 3)).astype(np.uint8), on_nothing((0, 0, 0), 3)])
    got = loaded(root)
    assert got.shape[1] == 3 and torch.equal(got[0, 1], torch.from_numpy(noise(0)).to(torch.uint8)) and got[1].max() == 255


def test_a_set_of_one_picture_is_refused(tmp_path):
    root = saved(tmp_path/'d', [noise(1).astype(np.uint8)]*7)
    assert 'all 7 images are the same picture' in refusal(root) and not [*tmp_path.glob('cache/*')]
    assert 'all 6 images are the same picture' in refusal(saved(tmp_path/'e', [np.zeros((5, 5, 4), np.uint8)]*6))


def test_frames_are_counted(tmp_path):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)], 'gif')
    Image.fromarray(noise(9).astype(np.uint8)).save(root/'a'/'moving.gif', save_all=True, append_images=[Image.fromarray(noise(8).astype(np.uint8))]*2)
    Image.fromarray(noise(7).astype(np.uint8)).save(root/'a'/'pages.tiff', save_all=True, append_images=[Image.fromarray(noise(6).astype(np.uint8))])
    assert '2 have more pages or frames; the first of each was taken' in notes(root)


# what is not opened

def test_only_named_formats_are_opened(tmp_path, monkeypatch):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)])
    monkeypatch.setenv('PATH', str(tmp_path/'bin'))
    (tmp_path/'bin').mkdir()
    (tmp_path/'bin'/'gs').write_text(f'#!/bin/sh\n/usr/bin/touch {tmp_path}/started\n/bin/touch {tmp_path}/started\n')
    (tmp_path/'bin'/'gs').chmod(0o755)
    (root/'a'/'page.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n')
    assert 'a/page.png: it is no PNG' in refusal(root) and not (tmp_path/'started').exists()
    Image.fromarray(noise(1).astype(np.uint8)).save(root/'a'/'page.png', 'TGA')
    assert 'a/page.png: it is no PNG' in refusal(root)


def test_jfif_and_upper_case_are_images(tmp_path):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)], 'PNG')
    Image.fromarray(noise(9).astype(np.uint8)).save(root/'a'/'x.JFIF', 'JPEG')
    assert len(load(root, 'all')) == 5


def test_too_many_pixels_or_bytes(tmp_path, monkeypatch):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)])
    wide = io.BytesIO()
    Image.new('1', (10_000, 9_000)).save(wide, 'PNG')
    (root/'a'/'wide.png').write_bytes(wide.getvalue())
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert 'a/wide.png: it has too many pixels' in refusal(root)
        assert 'too many pixels' in refusal(zipped(root, tmp_path/'d.zip'))
    (root/'a'/'wide.png').unlink()
    with zipfile.ZipFile(tmp_path/'padded.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for f in root.rglob('*.png'): z.writestr(f'{f.parent.name}/{f.name}', f.read_bytes() + b'\0'*(300 << 20 if f.name == '00.png' else 0))
    start = time.perf_counter()
    assert 'a/00.png: it has 314,57' in refusal(tmp_path/'padded.zip') and time.perf_counter() - start < 5
    monkeypatch.setattr(folders, 'LARGEST_FILE', 50)
    assert 'up to 50 are read' in refusal(root)


def test_a_zip_that_lies_about_a_size(tmp_path):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)])
    path = zipped(root, tmp_path/'d.zip')
    raw = bytearray(path.read_bytes())
    place = raw.rindex(b'PK\x01\x02')
    raw[place + 24:place + 28] = struct.pack('<I', 40)
    path.write_bytes(raw)
    assert '.png: ' in refusal(path)


@pytest.mark.parametrize('kind', ['pipe', 'device', 'socket', 'dangling', 'loop'])
def test_what_is_no_file(tmp_path, kind):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(4)])
    odd = root/'a'/'x.png'
    if kind == 'pipe': os.mkfifo(odd)
    elif kind == 'device': odd.symlink_to('/dev/zero')
    elif kind == 'dangling': odd.symlink_to(tmp_path/'nothing')
    elif kind == 'loop': odd.symlink_to(odd)
    else:
        short = Path('/tmp')/f'mebqat-{os.getpid()}.s'
        short.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as s: s.bind(str(short))
        short.rename(odd) if short.stat().st_dev == root.stat().st_dev else pytest.skip('another disk')
    start = time.perf_counter()
    message = refusal(root)
    assert 'a/x.png' in message and ('link to nothing' if kind in ('dangling', 'loop') else 'pipe or a device') in message
    assert time.perf_counter() - start < 5 and len(message) < 300


def test_links_that_lead_round(tmp_path):
    root = saved(tmp_path/'d', [noise(i).astype(np.uint8) for i in range(6)])
    for k in range(3): (root/'a'/f'up{k}').symlink_to(root)
    (root/'self').symlink_to(root/'self')
    (root/'c').symlink_to(root/'b')
    assert load(root, 'all').classes == ('a', 'b', 'c')
    deep = tmp_path/'deep'
    for k in range(20):
        (deep/f'{k:02}').mkdir(parents=True)
        for j in range(2): (deep/f'{k:02}'/f'{j}').symlink_to(deep/f'{k + 1:02}')
    (deep/'20').mkdir()
    start = time.perf_counter()
    assert 'links' in refusal(deep) and time.perf_counter() - start < 20


# folders as people have them

def names_in(tmp_path, *names, as_zip=False):
    "A tree with a picture of its own under each name."
    root = tmp_path/f'tree{len([*tmp_path.glob("tree*")])}'
    for i,n in enumerate(names):
        (root/n).parent.mkdir(parents=True, exist_ok=True)
        if n.endswith(('.png', '.PNG')): Image.fromarray(noise(i, (4, 4)).astype(np.uint8)).save(root/n)
        else: (root/n).write_bytes(b'?')
    return zipped(root, root.with_suffix('.zip')) if as_zip else root


PART_NAMES = [('Train', 'Test'), ('TRAINING', 'TESTING'), ('seg_train', 'seg_test'), ('train_set', 'test_set'), ('train-images', 'eval'), ('Training Set', 'Validation Set'),
              ('train', 'dev'), ('trainset', 'testset'), ('train', 'Evaluation')]


@pytest.mark.parametrize('as_zip', [False, True])
@pytest.mark.parametrize('parts', PART_NAMES, ids='/'.join)
def test_usual_names_of_parts(tmp_path, parts, as_zip):
    for depth in ('{p}/{c}', '{p}/{p}/{c}', 'wrapper/{p}/{c}', 'w/{p}/{p}/{c}'):
        root = names_in(tmp_path, *(f'{depth.format(p=p, c=c)}/{i}.png' for p in parts for c in 'xy' for i in range(3)), as_zip=as_zip)
        pool = load(root, 'val' if parts[1] in ('dev', 'Validation Set') else 'test')
        assert pool.classes == ('x', 'y') and len(pool) == 6 and notes(root) == ''


def test_classes_that_only_sound_like_parts(tmp_path):
    root = names_in(tmp_path, *(f'{c}/{i}.png' for c in ('test tube', 'train', 'crash test', 'development') for i in range(2)))
    assert load(root, 'all').classes == ('crash test', 'development', 'test tube', 'train')


@pytest.mark.parametrize('as_zip', [False, True])
def test_what_is_passed_over_is_counted(tmp_path, as_zip):
    root = names_in(tmp_path, 'a/0.png', 'a/1.png', 'b/0.png', *(f'a/{i}.heic' for i in range(12)), *(f'b/{i}.npy' for i in range(8)), 'b/.hidden', 'Thumbs.db', as_zip=as_zip)
    assert 'took 3 of 23 files as images; passed over 20: 12 .heic, 8 .npy' in notes(root)
    assert 'took 3 of 23' in notes(root), 'from the cache as well'


@pytest.mark.parametrize('aside', ['thumbnails', '@eaDir', '__MACOSX', '.ipynb_checkpoints', 'Thumbnails', 'lost+found'])
def test_folders_that_hold_no_data(tmp_path, aside):
    root = names_in(tmp_path, 'cat/0.png', 'cat/1.png', 'dog/0.png', f'cat/{aside}/0.png', f'{aside}/cat/0.png')
    pool = load(root, 'all')
    assert pool.classes == ('cat', 'dog') and len(pool) == 3 and f'2 {aside}' in notes(root)
    (root/'dog'/aside).mkdir()
    assert len(load(root, 'all')) == 3


def test_doubtful_trees_say_how_they_were_read(tmp_path):
    assert 'unequal depths' in (n := notes(names_in(tmp_path, 'cat/0.png', 'cat/wild/0.png', 'dog/0.png'))) and 'cat and cat/wild' in n
    assert 'hold the same names' in (n := notes(names_in(tmp_path, 'images/x/0.png', 'images/y/0.png', 'masks/x/0.png', 'masks/y/0.png'))) and 'images/x and masks/x' in n
    assert 'lie in no folder' in notes(names_in(tmp_path, 'x/0.png', 'y/0.png', 'preview.png'))
    assert notes(names_in(tmp_path, 'x/0.png', 'y/0.png')) == ''


def test_empty_class_of_another_kind_of_file(tmp_path):
    message = refusal(names_in(tmp_path, 'x/0.png', 'y/0.png', 'z/0.heic'))
    assert 'folder z holds no images' in message and '1 .heic' in message
    assert '2 .heic' in refusal(names_in(tmp_path, 'x/0.heic', 'y/0.heic'))


def test_unicode_forms_are_one_class(tmp_path):
    forms = [unicodedata.normalize(f, 'Zürich') for f in ('NFC', 'NFD')]
    root = names_in(tmp_path, *(f'{c}/{k}.png' for k,c in enumerate(forms)), 'Bern/0.png')
    assert load(root, 'all').classes == ('Bern', forms[0]) and len(load(root, 'all')) == 3
    assert load(zipped(root, tmp_path/'u.zip'), 'all').classes == ('Bern', forms[0])


def test_names_that_are_no_utf8(tmp_path):
    root = names_in(tmp_path, 'x/0.png', 'y/0.png')
    os.rename(os.fsencode(root/'x'), os.path.join(os.fsencode(root), b'caf\xe9'))
    pool = load(root, 'all')
    assert pool.classes == ('caf\\xe9', 'y') and load(root, 'all').data == pool.data
    (root/'y'/'0.png').write_bytes(b'?')
    refusal(root).encode()


def test_zips_from_windows_and_twice_named(tmp_path):
    path, files = tmp_path/'w.zip', {}
    for i in range(4):
        file = io.BytesIO()
        Image.fromarray(noise(i, (4, 4)).astype(np.uint8)).save(file, 'PNG')
        files[i] = file.getvalue()
    with zipfile.ZipFile(path, 'w') as z, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for name, i in (('top\\a\\0.png', 0), ('top\\b\\0.png', 1), ('top\\a\\0.png', 2), ('.\\top\\b\\1.png', 3)):
            info = zipfile.ZipInfo('x')
            info.filename = name
            z.writestr(info, files[i])
        z.writestr(zipfile.ZipInfo('top/'), b'')
    pool = load(path, 'all')
    assert pool.classes == ('a', 'b') and len(pool) == 3 and torch.equal(pool.images[0, 0], torch.from_numpy(noise(2, (4, 4))).to(torch.uint8))
    assert '1 names stand there more than once' in notes(path)


def test_damaged_zips_are_one_line(tmp_path):
    path = zipped(tree(tmp_path/'d', n=6), tmp_path/'d.zip')
    raw, kinds, draws = path.read_bytes(), set(), np.random.default_rng(0)
    directory = raw.index(b'PK\x01\x02')
    for trial in range(120):
        bad = bytearray(raw)
        for _ in range(3): bad[draws.integers(directory, len(raw))] ^= int(draws.integers(1, 256))
        path.write_bytes(bad[:draws.integers(directory, len(raw))] if trial % 7 == 0 else bad)
        try: load(path, 'all')
        except ValueError as e: kinds.add(str(e).partition('(')[0][-20:]) or pytest.fail(str(e)) if '\n' in str(e) else None
    for version in (99,):
        bad = bytearray(raw)
        bad[directory + 6] = version
        path.write_bytes(bad)
        assert 'd.zip' in refusal(path)


def test_a_folder_of_a_built_in_name_is_told(tmp_path, monkeypatch):
    tree(tmp_path/'digits', n=4)
    zipped(tree(tmp_path/'other', n=4), tmp_path/'glyphs.zip')
    monkeypatch.chdir(tmp_path)
    for name, there in (('digits', 'digits'), ('glyphs', 'glyphs.zip')):
        said = notes(name)
        assert f'passed over {there}' in said and f'give ./{there}' in said
    assert notes('./digits') == '' and load('./digits', 'all').classes == ('a', 'b', 'c') and load('./digits').drawn == 'content'


# memory, caches

def test_what_no_memory_holds_is_refused_first(tmp_path, monkeypatch):
    root = tree(tmp_path/'d', n=4)
    for name in ('digits', 'glyphs', root):
        start = time.perf_counter()
        message = refusal(name, size=400_000)
        assert 'TB of memory' in message and 'smaller size=' in message and time.perf_counter() - start < 5
    monkeypatch.setattr(memory, 'available_memory', lambda root='/': 100_000)
    assert 'four turns of' in refusal('digits', rotations=True) and 'inverted' in refusal('digits', 'all', invert=True)
    monkeypatch.setattr(memory, 'available_memory', lambda root='/': None)
    assert len(load('digits', rotations=True)) == 4308


def test_a_limit_on_address_space_counts(tmp_path):
    code = ("import resource, torch; from mebqat.memory import available_memory\n"
            "now = available_memory(); resource.setrlimit(resource.RLIMIT_AS, (64 << 30, 64 << 30)); print(now, available_memory())\n"
            "from mebqat.data import load\ntry: load('digits', size=9000)\nexcept ValueError as e: print(e)")
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert int(out[0].split()[1]) <= 64 << 30 and 'would take' in out[1]


def test_a_set_larger_than_memory_is_mapped(tmp_path, monkeypatch):
    root = tree(tmp_path/'d', n=30)
    want = {s: load(root, s) for s in ('train', 'val', 'test', 'all')}
    monkeypatch.setattr(data, 'available_memory', lambda: 10)
    monkeypatch.setattr(data, 'check_memory', lambda n, what, do: pytest.fail('copied') if 'images' in what else None)
    got = {s: load(root, s) for s in want}
    assert all(torch.equal(got[s].images, p.images) and torch.equal(got[s].labels, p.labels) for s,p in want.items())
    assert got['train'].fingerprint() == want['train'].fingerprint() and got['train'].mean == want['train'].mean
    files = {*(tmp_path/'cache').iterdir()}
    assert len(files) == 4
    if os.path.exists('/proc/self/maps'): assert all(str(f) in Path('/proc/self/maps').read_text() for f in files)
    got['val'].images.zero_()
    assert torch.equal(load(root, 'val').images, want['val'].images) and {*(tmp_path/'cache').iterdir()} == files
    picture(5).save(root/'a'/'new.png')
    load(root, 'val')
    assert len({*(tmp_path/'cache').iterdir()} & files) == 0, 'what is stale goes'


@pytest.mark.skipif(sys.platform != 'linux', reason='sparse files and /proc')
def test_a_file_larger_than_the_machine_is_mapped(tmp_path):
    total = 1024*memory._figures(Path('/proc/meminfo'))['MemTotal']
    try:
        with open(tmp_path/'sparse', 'wb') as f: f.truncate(2*total)
    except OSError: pytest.skip('no file of that size here')
    every = image_cache._mapped(tmp_path/'sparse', 4096, 2*total - 4096)
    assert len(every) == 2*total - 4096 and every[-5:].tolist() == [0]*5
    every[7] = 1
    assert every[7] == 1 and (tmp_path/'sparse').open('rb').read(8192)[4096 + 7] == 0


def test_a_replaced_file_is_noticed(tmp_path):
    root = tree(tmp_path/'d', n=6)
    first = load(root, 'all')
    file, other = root/'a'/'000.png', root/'a'/'001.png'
    times, size = os.stat(file), max(file.stat().st_size, other.stat().st_size)
    for f in (file, other): f.write_bytes(f.read_bytes().ljust(size, b'\0'))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    load(root, 'all')
    time.sleep(.02)
    file.write_bytes(other.read_bytes())
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = load(root, 'all')
    assert torch.equal(again.images[0], again.images[1]) and not torch.equal(first.images[0], first.images[1])


def test_litter_goes_and_living_parts_stay(tmp_path):
    root, cache = tree(tmp_path/'d', n=6), tmp_path/'cache'
    load(root)
    old, = cache.iterdir()
    (cache/'.d-x.safetensors.4711.part').write_bytes(b'half')
    (cache/'keep.txt').write_text('mine')
    load(tree(tmp_path/'elsewhere'/'d', n=5))
    kept, = set(cache.glob('d-*')) - {old}
    living = open(cache/'.living.part', 'wb')
    assert image_cache._lock(living)
    picture(3).save(root/'a'/'new.png')
    load(root)
    assert {f.name for f in cache.iterdir()} - {f.name for f in cache.glob('d-*')} == {'keep.txt', '.living.part'}
    assert not old.exists() and kept.exists() and len([*cache.glob('d-*')]) == 2


@pytest.mark.parametrize('how', ['KILL', 'INT'])
def test_an_interrupted_decoding(tmp_path, how):
    root = tree(tmp_path/'d', n=300, size=(60, 60))
    code = f"import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\nfrom mebqat.data import load\nprint('go', flush=True)\nload({str(root)!r})"
    for wait in (.0, .1, .25):
        with subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as p:
            p.stdout.readline()
            time.sleep(wait)
            p.send_signal(getattr(signal, f'SIG{how}'))
        left = [f for f in tmp_path.glob('cache/*')]
        if how == 'INT': assert all(f.suffix == '.safetensors' for f in left)
        for f in tmp_path.glob('cache/*.safetensors'): f.unlink()
    load(root)
    assert [f.suffix for f in tmp_path.glob('cache/*')] == ['.safetensors']


def test_headers_are_checked(tmp_path):
    root = tree(tmp_path/'d', n=6)
    want = load(root, 'all')
    file, = (tmp_path/'cache').iterdir()
    raw, draws = file.read_bytes(), np.random.default_rng(1)
    room = int.from_bytes(raw[:8], 'little')
    used = len(raw[8:8 + room].rstrip())
    for trial in range(60):
        bad = bytearray(raw)
        bad[draws.integers(0, 8 + used)] ^= 1 << int(draws.integers(0, 8))
        file.write_bytes(bad)
        pool = load(root, 'all')
        assert pool.fingerprint() == want.fingerprint() and pool.classes == want.classes and pool.data == want.data
    file.write_bytes(raw[:8] + (b'['*100_000).ljust(room) + raw[8 + room:])
    assert load(root, 'all').fingerprint() == want.fingerprint()


def test_a_cache_of_before_is_still_read(tmp_path):
    "miniImageNet's caches were written by safetensors itself, with one checksum a tensor."
    from safetensors.torch import save_file
    import zlib
    t = {'images': torch.arange(24, dtype=torch.uint8).view(2, 3, 2, 2), 'labels': torch.tensor([1, 0])}
    about = {'classes': ['a', 'b'], 'crc': {k: zlib.crc32(v.numpy()) for k,v in t.items()}}
    save_file(t, tmp_path/'old.safetensors', metadata={'about': json.dumps(about)})
    read, get = image_cache.read_cache(tmp_path/'old.safetensors')
    assert read['classes'] == ['a', 'b'] and all(torch.equal(get(k), v) for k,v in t.items())


def test_no_home_is_no_error(tmp_path):
    root = tree(tmp_path/'d', n=6)
    env = {k: v for k,v in os.environ.items() if k not in ('HOME', 'MEBQAT_CACHE')}
    code = f"import os, pathlib\ndef nowhere(cls): raise RuntimeError('Could not determine home directory.')\npathlib.Path.home = classmethod(nowhere)\nfrom mebqat.data import load, cache_dir\nprint(len(load({str(root)!r}, 'all')), cache_dir())"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.stdout.startswith('18 ') and not out.stderr and not Path(out.stdout.split()[1]).exists()


def test_sums_are_the_same_in_pieces(tmp_path):
    big = torch.randint(256, (70, 3, 90, 111), dtype=torch.uint8, generator=gen())
    wide = big.flatten(2).long()
    assert torch.equal(image_cache.moments(big), torch.stack([wide.sum(2), (wide*wide).sum(2)], 1))
    for n in (0, 1, 5): assert image_cache.moments(big[:n]).shape == (n, 2, 3)
    file = tmp_path/'x.safetensors'
    image_cache.write_tensors(file, {'a': image_cache.Entry((70, 3, 90, 111), lambda: (b.numpy() for b in big.split(9))), 'b': image_cache.Entry((0,), lambda: [], 'int64')}, dict)
    about, get = image_cache.read_cache(file)
    assert torch.equal(get('a'), big) and len(about['crc']['a']) == 1 and get('b').shape == (0,)


def test_a_large_file_has_many_checksums(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, 'PIECE', 1000)
    x = torch.randint(256, (77, 1, 7, 11), dtype=torch.uint8, generator=gen())
    file = tmp_path/'x.safetensors'
    image_cache.write_cache(file, {'x': x}, {})
    about, get = image_cache.read_cache(file)
    assert len(about['crc']['x']) == 6 and torch.equal(get('x'), x)
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 4
    file.write_bytes(raw)
    with pytest.raises(image_cache.Damaged): image_cache.read_cache(file)[1]('x')


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


def by_hand(x, u, degrees, scale, shear, shift):
    "Every output pixel looked up one at a time."
    b, c, h, w = x.shape
    out = torch.zeros_like(x)
    for i in range(b):
        turn, wide, tall, slant = math.radians(degrees*u[0, i]), 1 + scale*u[1, i], 1 + scale*u[2, i], shear*u[3, i]
        for row in range(h):
            for col in range(w):
                q = (col + .5 - w/2 - shift*u[4, i], row + .5 - h/2 - shift*u[5, i])
                s = (wide*q[0] + slant*q[1], tall*q[1])
                px = math.cos(turn)*s[0] - math.sin(turn)*s[1] + w/2 - .5
                py = math.sin(turn)*s[0] + math.cos(turn)*s[1] + h/2 - .5
                for yy in (math.floor(py), math.floor(py) + 1):
                    for xx in (math.floor(px), math.floor(px) + 1):
                        if 0 <= yy < h and 0 <= xx < w: out[i, :, row, col] += x[i, :, yy, xx]*(1 - abs(py - yy))*(1 - abs(px - xx))
    return out


@pytest.mark.parametrize('shape', [(3, 1, 9, 9), (2, 3, 6, 10)])
@pytest.mark.parametrize('how', [{}, dict(degrees=90, scale=0, shear=0, shift=0), dict(degrees=0, scale=0, shear=.5, shift=3), dict(degrees=30, scale=.5)])
def test_jitter_equals_a_loop(shape, how):
    how = dict(degrees=10, scale=.15, shear=.15, shift=2.) | how
    x = torch.rand(shape, generator=gen(1))
    u = (torch.rand(6, len(x), generator=gen(2))*2 - 1).tolist()
    want = by_hand(x, torch.tensor(u, dtype=torch.float64), **how)
    torch.testing.assert_close(jitter(x, gen(2), **how), want, rtol=0, atol=1e-4)


def test_jitter_keeps_shape_layout_and_input():
    x = torch.rand(5, 3, 8, 8, generator=gen()).to(memory_format=torch.channels_last)
    before, out = x.clone(), jitter(x, gen())
    assert out.shape == x.shape and out.is_contiguous(memory_format=torch.channels_last) and torch.equal(x, before)
    assert torch.equal(out, jitter(x, gen())) and not torch.equal(out, jitter(x, gen(1)))
    same = jitter(x[:1].expand(5, -1, -1, -1), gen())
    assert len({o.numpy().tobytes() for o in same.contiguous()}) == 5
    torch.testing.assert_close(jitter(x, gen(), 0, 0, 0, 0), x, rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_jitter_on_a_gpu():
    x = torch.rand(5, 1, 8, 8, generator=gen())
    torch.testing.assert_close(jitter(x.cuda(), gen()).cpu(), jitter(x, gen()), rtol=0, atol=1e-4)
    assert jitter(x.cuda(), torch.Generator('cuda').manual_seed(0)).is_cuda


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
def real(data_root):
    def find(name):
        if not (data_root/name).exists(): pytest.skip(f'{name} is not in {data_root}')
        return data_root/name
    return find


def test_cifar10_zip(real):
    pools = {s: load(real('cifar10.zip'), s, val=5000) for s in ('train', 'val', 'test')}
    assert {s: len(p) for s,p in pools.items()} == {'train': 45000, 'val': 5000, 'test': 10000}
    for p in pools.values():
        assert len(p.classes) == 10 and len(p.labels.bincount().unique()) == 1 and p.images.shape[1:] == (3, 32, 32)
    assert pools['test'].mean == pytest.approx((.4914, .4822, .4465), abs=.005)
    assert pools['test'].std == pytest.approx((.2470, .2435, .2616), abs=.005)


def test_omniglot_zip(real):
    pools = {s: load(real('omniglot.zip'), s) for s in ('train', 'val', 'test')}
    assert {s: (len(p.classes), len(p)) for s,p in pools.items()} == {s: (4*n, 80*n) for s,n in (('train', 1028), ('val', 172), ('test', 423))}
    for p in pools.values():
        assert p.images.shape[1:] == (1, 28, 28) and p.counts.unique().tolist() == [20] and (p.mean, p.std) == ((0,), (1,))
        assert (p.name, p.images[0, 0, 0, 0]) == ('omniglot', 0) and (p.images > 127).float().mean() < .2
    base = [{c.split('@')[0] for c in p.classes} for p in pools.values()]
    assert len(set.union(*base)) == 1623 == sum(map(len, base)) and 'Greek/character01' in set.union(*base)
    again, other = (load(real('omniglot.zip'), 'val', seed=s) for s in (0, 1))
    assert again.fingerprint() == pools['val'].fingerprint() and {*again.classes} != {*other.classes}


def test_omniglot_otherwise(real):
    plain = load(real('omniglot.zip'), 'all', by='images', invert=False)
    assert len(plain) == 32460 and len(plain.classes) == 1623 and plain.counts.unique().tolist() == [20]
    assert plain.images[0, 0, 0, 0] == 255
    upright = load(real('omniglot.zip'), 'test', rotations=False)
    turned = load(real('omniglot.zip'), 'test')
    assert turned.classes[:423] == upright.classes and turned.classes[423:846] == tuple(f'{c}@90' for c in upright.classes)
    assert torch.equal(turned.images[8460:16920], upright.images.rot90(1, (2, 3)))
    assert torch.equal(turned.table[423:846] - 8460, upright.table)
    i = plain.classes.index(upright.classes[5])
    assert torch.equal(upright.images[upright.table[5]], 255 - plain.images[plain.table[i]])


def test_omniglot_is_resized_in_grey(real):
    small = load(real('omniglot.zip'), 'all', by='images')
    assert len(small.images.unique()) > 50
    with zipfile.ZipFile(real('omniglot.zip')) as z:
        name = min(n for n in z.namelist() if n.endswith('.png') and '/Greek/character01/' in n)
        with z.open(name) as f: whole = torch.from_numpy(np.asarray(Image.open(f).convert('L')).copy())
    want = F.interpolate(whole[None, None].float(), size=(28, 28), mode='bilinear', antialias=True)[0, 0]
    got = 255 - small.images[small.table[small.classes.index('Greek/character01'), 0], 0].float()
    assert (got - want).abs().max() <= 2


def test_vinyals_split(real):
    path = real('omniglot_vinyals_split.json')
    lists = json.loads(path.read_text())
    for s,n in (('train', 1028), ('val', 172), ('test', 423)):
        pool = load(real('omniglot.zip'), s, split_file=path)
        assert len(pool.classes) == 4*n and {c.split('@')[0] for c in pool.classes} == {*lists[s]}


def test_mini_imagenet_zip(real):
    pools = {s: load(real('miniimagenet.zip'), s) for s in ('train', 'val', 'test')}
    assert {s: (len(p.classes), len(p)) for s,p in pools.items()} == {'train': (64, 12800), 'val': (16, 1600), 'test': (20, 4000)}
    assert len({c for p in pools.values() for c in p.classes}) == 100 and all(c.startswith('n') for c in pools['val'].classes)
    for p in pools.values():
        assert p.images.shape[1:] == (3, 84, 84) and len(p.counts.unique()) == 1 and (p.mean, p.std) == ((0,)*3, (1,)*3)
    assert load(real('miniimagenet.zip'), 'val', by='images').fingerprint() == pools['val'].fingerprint()
    x, _ = pools['val'].batch(slice(0, 8))
    assert torch.equal(x, pools['val'].images[:8]/255)


def test_few_shot_sets_are_found_by_name(real, monkeypatch):
    real('omniglot.zip')
    monkeypatch.setenv('MEBQAT_DATA', str(real('miniimagenet.zip').parent))
    assert (len(load('omniglot', 'val').classes), len(load('mini_imagenet', 'val').classes)) == (688, 16)


def test_other_modules_are_not_imported():
    code = "import sys, mebqat; a = set(sys.modules); import mebqat.data; print(*sorted(set(sys.modules) - a))"
    new = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split()
    assert [m for m in new if m.startswith('mebqat')] == ['mebqat.data', 'mebqat.files', 'mebqat.folders', 'mebqat.glyphs', 'mebqat.image_cache', 'mebqat.memory', 'mebqat.pictures', 'mebqat.pools']
    assert not {'sklearn', 'scipy', 'torchvision', 'IPython'} & set(new)
    assert {m for m in new if m.startswith('fastcore')} <= {'fastcore', 'fastcore.basics', 'fastcore.imports'}  # `patch`, in milliseconds


def test_what_another_library_says_of_a_damaged_zip_is_cut(tmp_path):
    "A name in an entry's own header that is not the directory's is quoted by zipfile, however long it is."
    root = tmp_path/'d'
    for c in 'ab':
        (root/c).mkdir(parents=True)
        for i in range(3): Image.fromarray(np.random.default_rng(i).integers(0, 255, (8, 8), dtype=np.uint8)).save(root/c/f'{i}.png')
    file = tmp_path/'d.zip'
    with zipfile.ZipFile(file, 'w') as z:
        for p in sorted(root.rglob('*.png')): z.write(p, p.relative_to(root).as_posix())
    data = bytearray(file.read_bytes())
    at = data.index(b'PK\x03\x04', 1)
    data[at + 26:at + 28] = (400).to_bytes(2, 'little')
    file.write_bytes(data)
    with pytest.raises(ValueError, match='cannot read the image') as e: load(file, 'all')
    assert len(str(e.value).replace(str(file), '')) < 300 and '\n' not in str(e.value)
