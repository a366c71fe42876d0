"Surfaces: intervals, choosing under a budget, files, and plots that say what the table says."
import errno
import json
import math
import os
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from mebqat.bits import FULL, Bits, BitSpace
from mebqat.surface import Point, Surface, mean_interval, wilson


def made_up(space='lsq', seed=0, n=500):
    "Random points over a paper's set of pairs; costs in the usual proportions."
    rng = random.Random(seed)
    def point(b):
        right = rng.randrange(n + 1)
        return Point(right/n, *wilson(right, n), n, bytes=1000.*b.w, bitops=10.*b.w*b.a, loss=rng.random())
    return Surface({b: point(b) for b in BitSpace.paper(space)}, f'made up {space}', {'data': 'made up', 'seeds': [seed]})


def flat(**points): return Surface({Bits.parse(k): Point(v[0], 0, 1, 10, *v[1:]) for k,v in points.items()})


@pytest.mark.parametrize('n', [1, 2, 10, 333])
def test_wilson_holds_the_proportion_and_mirrors(n):
    for k in range(n + 1):
        low, high = wilson(k, n)
        assert 0 <= low <= k/n <= high <= 1 and high > low
        assert wilson(n - k, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_wilson_covers_about_95_percent():
    n = 60
    for p in (0.1, 0.5, 0.85):
        mass = [math.comb(n, k)*p**k*(1 - p)**(n - k) for k in range(n + 1)]
        covered = sum(m for k,m in enumerate(mass) if wilson(k, n)[0] <= p <= wilson(k, n)[1])
        assert 0.92 < covered < 0.985


@pytest.mark.parametrize('k, n', [(-1, 5), (6, 5), (0, 0), (math.nan, 5)])
def test_wilson_refuses(k, n):
    with pytest.raises(ValueError): wilson(k, n)


def test_mean_interval_agrees_with_numpy():
    np = pytest.importorskip('numpy')
    v = np.random.default_rng(0).random(40)
    half = 1.96*v.std(ddof=1)/40**0.5
    assert mean_interval(v) == pytest.approx((v.mean(), v.mean() - half, v.mean() + half))
    assert mean_interval(iter([0.5, 0.5])) == (0.5, 0.5, 0.5)
    for bad in ([], [0.5, math.inf]):
        with pytest.raises(ValueError): mean_interval(bad)


@pytest.mark.parametrize('space', ['lsq', 'dorefa'])
def test_file_round_trip_is_exact(tmp_path, space):
    s = made_up(space)
    path = s.save(tmp_path/'s.json')
    back = Surface.load(path)
    assert back == s and list(back) == list(s) and back.meta == s.meta and back.title == s.title
    assert [asdict(back.at(b)) for b in back] == [asdict(s.at(b)) for b in s]
    assert os.listdir(tmp_path) == ['s.json']
    json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f'{c} is not JSON'))


def test_unbounded_interval_survives_a_file(tmp_path):
    s = Surface({Bits(2, 2): Point(*mean_interval([0.4]), 1)})
    assert Surface.load(s.save(tmp_path/'one.json')) == s
    assert s.at(Bits(2, 2)).high == math.inf
    assert 'unknown' in s.plot().data[0].hovertext[0][0]


def change(**kw): return lambda d: d | kw
def change_point(**kw): return lambda d: d | {'points': [d['points'][0] | kw] + d['points'][1:]}


def unsigned(path):
    "A file's document as version 1 wrote it, without a checksum, so that an edit reaches the checks behind it."
    d = json.loads(path.read_text())
    return {k: v for k,v in d.items() if k != 'checksum'} | {'version': 1}


@pytest.mark.parametrize('edit, says', [
    (change(version=2), 'checksum'), (change(version=9), 'version 9'), (change(version=None), 'version None'), (change(version=True), 'version True'),
    (change(format='other'), "no surface but 'other'"),
    (change(points=[]), 'at least one point'), (change(points=None), 'damaged'), (change(meta=None), 'damaged'), (change(title=3), 'title is 3'),
    (lambda d: {k: v for k,v in d.items() if k != 'meta'}, "no 'meta'"),
    (lambda d: d | {'points': d['points'] + d['points'][:1]}, 'W2A2 stands there twice'),
    (lambda d: [d], 'not a JSON object'), (lambda d: 3, 'not a JSON object'),
    (change_point(accuracy=None), 'points[0].accuracy is None'), (change_point(accuracy=math.nan), 'points[0].accuracy'), (change_point(accuracy='high'), "accuracy is 'high'"),
    (change_point(accuracy=1.5), 'W2A2'), (change_point(n=0), 'W2A2'), (change_point(n=2.5), 'points[0].n is 2.5'), (change_point(n=None), 'points[0].n'),
    (change_point(n=True), 'points[0].n is True'), (change_point(bits='W99A1'), '99'), (change_point(bits=None), 'damaged'), (change_point(extra=1), "'extra'"),
    (change_point(bytes=-1), 'bytes at W2A2'), (change_point(bitops=math.inf), 'points[0].bitops'), (change_point(low=[1]), 'points[0].low is [1]'),
])
def test_a_damaged_file_is_named(tmp_path, edit, says):
    path = tmp_path/'s.json'
    made_up().save(path)
    path.write_text(json.dumps(edit(unsigned(path))))
    with pytest.raises(ValueError) as e: Surface.load(path)
    assert str(path) in str(e.value) and says in str(e.value) and '\n' not in str(e.value)


def test_a_file_of_version_1_still_opens(tmp_path):
    path = tmp_path/'s.json'
    s = made_up()
    s.save(path)
    path.write_text(json.dumps(unsigned(path)))
    assert Surface.load(path) == s


@pytest.mark.parametrize('seed', range(3))
def test_no_changed_byte_goes_unnoticed(tmp_path, seed):
    path, rng = tmp_path/'s.json', random.Random(seed)
    s = flat(W2A2=(0.512,), W4A4=(0.938,))
    good = s.save(path).read_bytes()
    for _ in range(200):
        bad, i = bytearray(good), rng.randrange(len(good))
        bad[i] ^= 1 << rng.randrange(8)
        path.write_bytes(bad)
        try: assert Surface.load(path) == s  # white space, or a number written otherwise
        except ValueError as e: assert 's.json' in str(e) and '\n' not in str(e)


def test_no_cut_of_a_file_loads(tmp_path):
    path = tmp_path/'s.json'
    whole = flat(W2A2=(0.5,), W4A4=(0.9,)).save(path).read_bytes()
    for cut in range(0, len(whole) - 2, 7):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match='not JSON'): Surface.load(path)
    for junk in (b'\x80\x04\x95', b'\xff\xfe\x00', b'['*100_000):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match='s.json'): Surface.load(path)


def test_a_missing_file_is_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.json'): Surface.load(tmp_path/'none.json')


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = flat(W2A2=(0.5,)).save(tmp_path/'s.json')
    before = path.read_text()
    def full(self, text, **kw):
        with open(self, 'w') as f: f.write(text[:20])
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(OSError) as e: made_up().save(path)
    assert e.value.errno == errno.ENOSPC and str(path) in str(e.value)
    assert path.read_text() == before and os.listdir(tmp_path) == ['s.json']


@pytest.mark.parametrize('seed', range(4))
def test_best_agrees_with_trying_them_all(seed):
    s = made_up(seed=seed, n=20)
    frame = s.to_frame()
    for limit in (2000, 4000, 8000, 40_000):
        allowed = frame[frame.bytes <= limit]
        top = allowed[allowed.accuracy == allowed.accuracy.max()]
        cheap = top[top.bytes == top.bytes.min()]
        b = s.best(max_bytes=limit)
        assert s.at(b).accuracy == top.accuracy.iloc[0] and s.at(b).bytes == cheap.bytes.iloc[0]
        assert s.at(b).bitops == cheap.bitops.min()
    both = frame[(frame.bytes <= 4000) & (frame.bitops <= 200)]
    assert s.at(s.best(max_bytes=4000, max_bitops=200)).accuracy == both.accuracy.max()


def test_best_at_the_limit_and_below_it():
    s = flat(W2A2=(0.5, 20., 400.), W4A4=(0.9, 40., 1600.))
    assert s.best(max_bytes=40) == Bits(4, 4) and s.best(max_bytes=39.9) == Bits(2, 2)
    with pytest.raises(ValueError, match='20 bytes'): s.best(max_bytes=19)
    with pytest.raises(ValueError, match='20 bytes, 400 bitops'): s.best(max_bytes=19, max_bitops=9999)
    with pytest.raises(ValueError, match='knows its bitops'): flat(W2A2=(0.5, 20.)).best(max_bitops=1)


def test_a_pair_of_unknown_cost_never_fits_a_budget():
    s = flat(W2A2=(0.5, 20.), W8A8=(0.99,))
    assert s.best(max_bytes=1e9) == Bits(2, 2) and s.best() == Bits(8, 8) and s.pareto('bytes') == [Bits(2, 2)]


@pytest.mark.parametrize('cost', ['bytes', 'bitops'])
@pytest.mark.parametrize('seed', range(4))
def test_pareto_is_exactly_the_undominated(cost, seed):
    s = made_up(seed=seed, n=20)
    c = {b: getattr(s.at(b), cost) for b in s}
    front = s.pareto(cost)
    beats = lambda p, q: c[p] <= c[q] and s.at(p).accuracy >= s.at(q).accuracy and (c[p], s.at(p).accuracy) != (c[q], s.at(q).accuracy)
    undominated = {(c[b], s.at(b).accuracy) for b in s if not any(beats(o, b) for o in s)}
    assert {(c[b], s.at(b).accuracy) for b in front} == undominated and len(front) == len(undominated)
    assert [c[b] for b in front] == sorted(c[b] for b in front)


@pytest.mark.parametrize('space', ['lsq', 'dorefa'])
def test_table_and_plot_hold_the_same_numbers(space):
    s = made_up(space)
    t, trace = s.table(), s.plot().data[0]
    assert list(t.index) == list(trace.y) and list(t.columns) == list(trace.x)
    assert list(t.index)[-1] == 'FP' and list(t.index)[:-1] == sorted(t.index[:-1], key=int)
    for i,w in enumerate(t.index):
        for j,a in enumerate(t.columns):
            b, z = Bits.parse(f'{w},{a}'), trace.z[i][j]
            assert (z is None) == math.isnan(t.loc[w, a]) == (b not in s)
            assert b not in s or z == t.loc[w, a] == s.at(b).accuracy
            assert (f'>{100*s.at(b).accuracy:.1f}<' in trace.text[i][j]) if b in s else trace.text[i][j] == ''
    fig = s.plot()
    assert fig.layout.yaxis.autorange == 'reversed' and (fig.layout.coloraxis.cmin, fig.layout.coloraxis.cmax) == (0, 1)


def test_large_maps_have_no_cell_text():
    wide = Surface({b: Point(0.5, 0, 1, 9) for b in BitSpace.grid(range(1, 12), range(1, 12))})
    assert wide.plot().data[0].text is None


def test_relief_and_both():
    s = made_up()
    mesh, dots = s.plot('surface').data
    assert len(dots.z) == 73 and sorted(dots.z) == sorted(s.to_frame().accuracy)
    fig = s.plot('both', caption='What to see.')
    assert [t.type for t in fig.data] == ['heatmap', 'surface', 'scatter3d']
    assert [t.visible for t in fig.data] == [None, False, False]
    assert [b.args[0]['visible'] for b in fig.layout.updatemenus[0].buttons] == [[True, False, False], [False, True, True]]
    assert fig.layout.meta['caption'] == 'What to see.' and list(map(list, mesh.z)) == list(map(list, fig.data[0].z))
    with pytest.raises(ValueError, match="'pie'"): s.plot('pie')


def test_frame_space_and_mean():
    s = made_up()
    f = s.to_frame()
    assert list(f.columns)[:8] == ['w', 'a', 'accuracy', 'low', 'high', 'n', 'bytes', 'bitops'] and len(f) == len(s) == 73
    assert s.space == BitSpace.paper('lsq') and s.mean() == pytest.approx(f.accuracy.mean())
    assert f.iloc[-1][['w', 'a']].tolist() == [FULL, FULL]
    assert s.table('bytes').loc['4', 'FP'] == 4000


def test_equality_sees_points_title_and_protocol():
    s = made_up()
    other = dict(s.points) | {Bits(2, 2): replace(s.at(Bits(2, 2)), loss=9.)}
    assert s == made_up() and s != Surface(other, s.title, s.meta)
    assert s != Surface(s.points, 'else', s.meta) and s != Surface(s.points, s.title, {}) and s != 3


def test_the_callers_data_stay_the_callers():
    points, meta = {Bits(2, 2): Point(0.5, 0, 1, 9)}, {'seeds': [0]}
    s = Surface(points, meta=meta)
    points.clear(), meta['seeds'].append(1)
    assert len(s) == 1 and s.meta == {'seeds': [0]}


@pytest.mark.parametrize('points, says', [
    ({}, 'at least one'), ({(2, 2): Point(0.5, 0, 1, 9)}, r'\(2, 2\)'), ({Bits(2, 2): 0.5}, '0.5'),
    ({Bits(2, 2): Point(math.nan, 0, 1, 9)}, 'accuracy at W2A2'), ({Bits(2, 2): Point(0.5, 0.6, 1, 9)}, 'interval at W2A2'),
    ({Bits(2, 2): Point(0.5, math.nan, 1, 9)}, 'interval at W2A2'), ({Bits(2, 2): Point(0.5, 0, 1, 0)}, 'n at W2A2'),
    ({Bits(2, 2): Point(0.5, 0, 1, 9, loss=math.nan)}, 'loss at W2A2'),
])
def test_what_cannot_be_a_surface(points, says):
    with pytest.raises(ValueError, match=says): Surface(points)


@pytest.mark.parametrize('meta', [{'x': math.nan}, {'x': {1, 2}}, {'x': Bits(2, 2)}])
def test_protocol_must_be_json(meta):
    with pytest.raises(ValueError, match='JSON'): Surface({Bits(2, 2): Point(0.5, 0, 1, 9)}, meta=meta)


def test_html_escapes_what_files_say():
    s = Surface({Bits(2, 2): Point(0.5, 0, 1, 9)}, '<script>alert(1)</script>', {'data': '<img src=x onerror=alert(1)>'})
    assert '<script' not in s._repr_html_() and '<img' not in s._repr_html_()


def test_at_names_the_pair_and_its_neighbours():
    with pytest.raises(ValueError, match='W9A2; nearest: W8A2'): made_up().at(Bits(9, 2))
    with pytest.raises(ValueError, match='Bits'): made_up().at('W4A4')
