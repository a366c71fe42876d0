"What the episodes' notebook cannot check about itself: every shape, fairness, other processes, learn2learn itself."
import json, subprocess, sys

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mebqat.pools import Pool
from mebqat.data import load
from mebqat.episodes import Episode, Episodes, Learn2LearnEpisodes, draw, from_learn2learn, sample_episode, to_learn2learn

quick = settings(max_examples=40, deadline=None)
gen = lambda seed=0: torch.Generator().manual_seed(seed)


def numbered(counts, channels=1, seed=0):
    "A pool whose image i shows nothing but i, labels shuffled unless seed is None; mean 0 and std 1/255, so `batch` gives i back."
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    if seed is not None: labels = labels[torch.randperm(len(labels), generator=gen(seed))]
    images = torch.arange(len(labels)).to(torch.uint8)[:, None, None, None].repeat(1, channels, 2, 2)
    assert len(labels) <= 256
    return Pool(images, labels, tuple(f'c{i}' for i in range(len(counts))), 'numbered', 'train', (0.,)*channels, (1/255,)*channels)


def parts(episode):
    "The numbers of the images, support and query, each [n_way, ...]."
    return [x[:, 0, 0, 0].round().long().view(episode.n_way, -1) for x in (episode.support, episode.query)]


@st.composite
def cases(draw):
    "An uneven pool and a shape of episode that fits it, often only just."
    k_shot, n_query = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(k_shot + n_query, 14), min_size=2, max_size=9))
    return numbered(counts, draw(st.sampled_from((1, 3))), draw(st.integers(0, 9))), draw(st.integers(2, len(counts))), k_shot, n_query


# sampling

@quick
@given(cases(), st.integers(0, 2**31))
def test_an_episode_is_what_it_says(case, seed):
    pool, n_way, k_shot, n_query = case
    e = sample_episode(pool, n_way, k_shot, n_query, gen(seed))
    assert (e.n_way, e.k_shot, e.n_query) == (n_way, k_shot, n_query)
    assert (e.support.dtype, e.query.dtype, e.support_labels.dtype, e.query_labels.dtype) == (torch.float32,)*2 + (torch.int64,)*2
    assert e.support.shape == (n_way*k_shot, *pool.images.shape[1:]) and e.query.shape == (n_way*n_query, *pool.images.shape[1:])
    assert e.support_labels.tolist() == [c for c in range(n_way) for _ in range(k_shot)]
    assert e.query_labels.tolist() == [c for c in range(n_way) for _ in range(n_query)]
    support, query = parts(e)
    both = torch.cat([support, query], 1)
    assert len(both.unique()) == n_way*(k_shot + n_query), 'an image appears twice'
    true = pool.labels[both]
    assert (true == true[:, :1]).all() and len(true[:, 0].unique()) == n_way


@quick
@given(cases(), st.integers(0, 5), st.integers(0, 10**6))
def test_images_are_those_at_the_indices(case, seed, i):
    pool, n_way, k_shot, n_query = case
    episodes = Episodes(pool, n_way, k_shot, n_query, seed=seed)
    idx = episodes.indices(i)
    assert idx.dtype == torch.int64 and idx.shape == (n_way, k_shot + n_query) and idx.device.type == 'cpu'
    support, query = parts(episodes[i])
    assert torch.equal(torch.cat([support, query], 1), idx)
    assert episodes.classes(i) == tuple(pool.classes[c] for c in pool.labels[idx[:, 0]])


def test_every_class_and_every_image_of_a_class_is_equally_likely():
    pool, g, n = numbered([6, 9, 20, 7]), gen(), 6000
    table, counts = pool.table, pool.counts
    drawn = [draw(table, 2, 3, g) for _ in range(n)]
    classes = torch.stack([c for c,_ in drawn])
    for column in classes.T: assert (column.bincount(minlength=4) - n/4).abs().max() < 4.5*(n*3/16)**.5
    for place in range(3):
        seen = torch.stack([i[:, place] for _,i in drawn]).flatten().bincount(minlength=len(pool))
        for c,row in enumerate(table):
            p = .5/counts[c]
            assert (seen[row[row >= 0]] - n*p).abs().max() < 4.5*(n*p*(1 - p))**.5


def test_the_whole_class_can_be_drawn():
    e = sample_episode(numbered([5, 5]), 2, 2, 3, gen())
    assert torch.cat(parts(e), 1).flatten().sort().values.tolist() == list(range(10))


# numbers

IN_A_FRESH_PROCESS = 'import json, sys; from mebqat.data import load; from mebqat.episodes import Episodes\n' \
         'e = Episodes(load("glyphs", n_classes=12), 3, 1, 2, seed=7); print(json.dumps([e.indices(i).tolist() for i in map(int, sys.argv[1:])]))'


def test_this_machine_draws_the_indices_that_others_draw():
    episodes = Episodes(numbered([12]*12, seed=None), 3, 1, 2, seed=7)
    assert [episodes.indices(i).tolist() for i in (0, 1, 1000)] == [
        [[85, 84, 94], [55, 54, 48], [47, 45, 40]], [[9, 11, 7], [76, 74, 77], [48, 54, 52]], [[14, 16, 21], [24, 30, 34], [77, 74, 79]]]
    assert episodes.classes(0) == ('c7', 'c4', 'c3')


def test_order_history_and_process_do_not_matter():
    episodes = Episodes(load('glyphs', n_classes=12), 3, 1, 2, seed=7)
    torch.manual_seed(123)
    backwards = {i: episodes.indices(i).tolist() for i in (5, 3, 4, 0, 3)}
    done = subprocess.run([sys.executable, '-c', IN_A_FRESH_PROCESS, '3', '0', '5'], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [backwards[i] for i in (3, 0, 5)]
    before = torch.random.get_rng_state()
    episodes[1]
    assert torch.equal(torch.random.get_rng_state(), before), 'the global stream was used'


def test_seeds_and_numbers_give_different_episodes():
    pool = load('glyphs', n_classes=30)
    seen = {tuple(Episodes(pool, 5, 1, 2, seed=s).indices(i).flatten().tolist()) for s in range(5) for i in range(20)}
    assert len(seen) == 100


def test_steps_take_consecutive_episodes():
    episodes = Episodes(numbered([8]*4), 3, 1, 2, seed=1, per_step=3)
    flat = [e for step in range(4) for e in episodes(step)]
    assert len(flat) == 12
    assert all(torch.equal(a.support, b.support) and torch.equal(a.query, b.query) for a,b in zip(flat, episodes.take(12), strict=True))


def test_augmentation_sees_all_images_at_once_and_changes_no_draw():
    calls = []
    def shift(x, generator):
        calls.append((tuple(x.shape), torch.rand(1, generator=generator).item()))
        return x + 1000
    plain, changed = (Episodes(numbered([8]*4), 3, 1, 2, augment=a) for a in (None, shift))
    for i in (0, 1, 0): assert torch.equal(changed[i].support, plain[i].support + 1000) and torch.equal(changed[i].query, plain[i].query + 1000)
    assert [c for c,_ in calls] == [(9, 1, 2, 2)]*6
    assert calls[0] == calls[1] == calls[4] != calls[2]


def test_endless_episodes_cannot_be_looped_over():
    episodes = Episodes(numbered([8]*4), 3, 1, 2)
    with pytest.raises(TypeError): iter(episodes)
    assert [e.n_way for e in episodes.take(2)] == [3, 3]


@pytest.mark.parametrize('i', [-1, 1.5, '3', None, slice(2)])
def test_a_number_that_is_none_is_refused(i):
    with pytest.raises(ValueError, match='numbered'): Episodes(numbered([8]*4), 3, 1, 2)[i]


# refusals

@pytest.mark.parametrize('make', [lambda *a: sample_episode(*a, gen()), Episodes], ids=['sample_episode', 'Episodes'])
@pytest.mark.parametrize('counts, shape, says', [
    ([9, 9, 9], (4, 1, 1), ['n_way=4', '3 classes']),
    ([9, 4, 9], (2, 2, 3), ['2 + 3 = 5', "'c1'", 'only 4']),
    ([9, 0, 9], (2, 1, 1), ["'c1'", 'only 0']),
    ([9], (2, 1, 1), ['at least 2 classes', 'has 1']),
    ([9, 9], (1, 1, 1), ['n_way', '2 or more', 'got 1']),
    ([9, 9], (2, 0, 1), ['k_shot', '1 or more', 'got 0']),
    ([9, 9], (2, 1, 0), ['n_query', '1 or more', 'got 0']),
    ([9, 9], (2, 1, -3), ['n_query', 'got -3']),
    ([9, 9], (2., 1, 1), ['n_way', 'whole number', 'got 2.0']),
    ([9, 9], (2, '1', 1), ['k_shot', "got '1'"]),
    ([9, 9], (2, True, 1), ['k_shot', 'got True']),
    ([9, 9], (2, 1, None), ['n_query', 'got None']),
])
def test_what_does_not_fit_is_refused_in_one_line(make, counts, shape, says):
    with pytest.raises(ValueError) as e: make(numbered(counts), *shape)
    assert '\n' not in str(e.value) and all(s in str(e.value) for s in says), str(e.value)


@pytest.mark.parametrize('per_step', [0, -1, 1.5])
def test_a_step_needs_episodes(per_step):
    with pytest.raises(ValueError, match='per_step'): Episodes(numbered([9, 9]), 2, 1, 1, per_step=per_step)


# the value

def test_an_episode_describes_itself():
    e = Episode(torch.zeros(5, 1, 28, 28), torch.arange(5), torch.zeros(75, 1, 28, 28), torch.arange(5).repeat_interleave(15))
    assert repr(e) == '5-way 1-shot, 15 queries a class, 1x28x28'
    assert repr(sample_episode(numbered([3, 3], 3), 2, 2, 1, gen())) == '2-way 2-shot, 1 query a class, 3x2x2'


def test_an_episode_moves_whole():
    e = sample_episode(numbered([3, 3]), 2, 1, 1, gen())
    moved = e.to('meta')
    assert {t.device.type for t in (moved.support, moved.support_labels, moved.query, moved.query_labels)} == {'meta'}
    assert repr(moved) == repr(e) and e.support.device.type == 'cpu'


@pytest.mark.parametrize('n_images, support, query', [(4, [0, 1, 0, 1], [0, 1]), (4, [0, 0, 1, 1], [1, 0]), (4, [0, 0, 0, 1], [0, 1]),
    (4, [0, 0, 2, 2], [0, 2]), (4, [0, 0, 1, 1], [0, 1, 1]), (4, [0, 0, 1], [0, 1]), (4, [0, 0, 1, 1], []), (4, [0]*4, [0]), (0, [], [])])
def test_a_hand_made_episode_out_of_order_is_refused(n_images, support, query):
    labels = [torch.tensor(y, dtype=torch.long) for y in (support, query)]
    with pytest.raises(ValueError, match='class by class|at least 2 classes'):
        Episode(torch.zeros(n_images, 1, 2, 2), labels[0], torch.zeros(len(query), 1, 2, 2), labels[1])


def test_colour_comes_channels_last_as_from_the_pool():
    e = sample_episode(numbered([5, 5, 5], 3), 3, 2, 2, gen())
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (e.support, e.query))


# learn2learn

@quick
@given(cases(), st.integers(0, 99))
def test_to_learn2learn_and_back(case, seed):
    pool, n_way, k_shot, n_query = case
    e = sample_episode(pool, n_way, k_shot, n_query, gen(seed))
    data, labels = to_learn2learn(e)
    assert data.shape == (n_way*(k_shot + n_query), *pool.images.shape[1:]) and labels.tolist() == sorted(labels.tolist())
    back = from_learn2learn(data, labels, k_shot)
    for name in ('support', 'support_labels', 'query', 'query_labels'): assert torch.equal(getattr(back, name), getattr(e, name)), name
    again, same = to_learn2learn(back)
    assert torch.equal(again, data) and torch.equal(same, labels)


def test_bytes_become_floats():
    e = from_learn2learn(torch.arange(4, dtype=torch.uint8)[:, None, None, None], torch.tensor([0, 0, 1, 1]), 1)
    assert e.support.dtype == e.query.dtype == torch.float32 and e.query.flatten().tolist() == [1, 3]


@quick
@given(st.lists(st.integers(-50, 900), min_size=2, max_size=6, unique=True), st.integers(1, 3), st.integers(1, 3), st.randoms())
def test_any_labels_in_any_order(values, k_shot, n_query, random):
    labels = values*(k_shot + n_query)
    random.shuffle(labels)
    data = torch.arange(len(labels)).float()[:, None, None, None]
    e = from_learn2learn(data, torch.tensor(labels), k_shot)
    for c,v in enumerate(sorted(values)):
        places = [i for i,y in enumerate(labels) if y == v]
        assert [p.tolist()[c] for p in parts(e)] == [places[:k_shot], places[k_shot:]]


@pytest.mark.parametrize('labels, k_shot, says', [
    ([0, 0, 0, 7, 7], 1, ['class 7 has 2', 'class 0 has 3']),
    ([0, 0, 1, 1], 2, ['k_shot must be 1 to 1', '2 images', 'got 2']),
    ([0, 0, 1, 1], 0, ['got 0']),
    ([0, 0, 1, 1], 1., ['got 1.0']),
    ([3, 3, 3], 1, ['at least 2 classes', 'has 1']),
    ([], 1, ['at least 2 classes', 'has 0']),
    ([0., 0., 1., 1.], 1, ['integer', 'torch.float32']),
    ([[0, 0, 1, 1]], 1, ['[1, 4]']),
])
def test_a_learn2learn_task_that_does_not_fit_is_refused(labels, k_shot, says):
    y = torch.tensor(labels) if labels else torch.tensor(labels, dtype=torch.long)
    with pytest.raises(ValueError) as e: from_learn2learn(torch.zeros(y.numel(), 1, 2, 2), y, k_shot)
    assert '\n' not in str(e.value) and all(s in str(e.value) for s in says), str(e.value)


def test_labels_and_images_must_be_as_many():
    with pytest.raises(ValueError, match='each of the 5 images'): from_learn2learn(torch.zeros(5, 1, 2, 2), torch.tensor([0, 0, 1, 1]), 1)


@pytest.fixture(scope='module')
def learn2learn():
    sys.modules.setdefault('gym_notices', None)
    return pytest.importorskip('learn2learn')


def task_set(learn2learn, pool, n_way, each, num_tasks=-1):
    t = learn2learn.data.transforms
    dataset = learn2learn.data.MetaDataset(torch.utils.data.TensorDataset(*pool.batch(slice(None))))
    return learn2learn.data.Taskset(dataset, [t.FusedNWaysKShots(dataset, n=n_way, k=each), t.LoadData(dataset), t.RemapLabels(dataset),
                                                  t.ConsecutiveLabels(dataset)], num_tasks=num_tasks)


def test_a_real_task_is_cut_as_learn2learn_cuts_it(learn2learn):
    tasks = task_set(learn2learn, numbered([9, 12, 7, 10]), 3, 6)
    for k_shot in (1, 2, 5):
        data, labels = tasks.sample()
        mine, ((x, y), (qx, qy)) = from_learn2learn(data, labels, k_shot), learn2learn.data.partition_task(data, labels, shots=k_shot)
        for a,b in ((mine.support, x), (mine.support_labels, y), (mine.query, qx), (mine.query_labels, qy)): assert torch.equal(a, b)


def test_our_episodes_are_cut_by_learn2learn_as_by_us(learn2learn):
    e = Episodes(numbered([9, 12, 7, 10]), 4, 2, 3)[0]
    (x, y), (qx, qy) = learn2learn.data.partition_task(*to_learn2learn(e), shots=2)
    for a,b in ((e.support, x), (e.support_labels, y), (e.query, qx), (e.query_labels, qy)): assert torch.equal(a, b)


def test_a_real_task_set_feeds_steps(learn2learn):
    pool = numbered([9, 12, 7, 10])
    episodes = Learn2LearnEpisodes(task_set(learn2learn, pool, 3, 6), k_shot=2, per_step=2)
    for e in episodes(0) + episodes(1):
        assert (e.n_way, e.k_shot, e.n_query) == (3, 2, 4)
        both = torch.cat(parts(e), 1)
        true = pool.labels[both]
        assert len(both.unique()) == 18 and (true == true[:, :1]).all() and len(true[:, 0].unique()) == 3


# a GPU

@pytest.mark.skipif(not torch.cuda.is_available(), reason='no GPU')
def test_a_pool_on_a_gpu_gives_the_same_episodes():
    from dataclasses import replace
    pool = numbered([9, 12, 7, 10])
    there = replace(pool, images=pool.images.cuda(), labels=pool.labels.cuda())
    a, b = (Episodes(p, 3, 2, 2, seed=3) for p in (pool, there))
    assert torch.equal(a.indices(5), b.indices(5))
    assert b[5].query.is_cuda and b[5].support_labels.is_cuda
    torch.testing.assert_close(a[5].query, b[5].query.cpu())
