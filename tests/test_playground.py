"The few-shot playground and what feeds it: driven without a browser, then its baked twin and its drawing pad in one."
import io, json
from datetime import datetime, timezone
from unittest.mock import patch

import numpy as np
import pytest
import torch
import traitlets
from PIL import Image

from mebqat.files import shipped
from mebqat.runs.answers import answer, playing
from mebqat.bits import FP, Bits, BitSpace
from mebqat.data import load
from mebqat.episodes import Episode, Episodes
from mebqat.fewshot.evaluate import inner_correct, proto_correct
from mebqat.runs import open_run
from mebqat.fewshot.methods import InnerSteps
from mebqat.fewshot.ink import MOST_BYTES, from_strokes, skeletonize
from mebqat.layers import quantize
from mebqat.models import cnn5
from mebqat.quantizers import LSQ

pytest.importorskip('anywidget', reason="anywidget is not installed; get it with: pip install 'mebqat[lab]'")
from mebqat.explore.episode_scene import LETTERS, Plane, Verdict
from mebqat.explore.playground import PAD_SCRIPT, CharacterPad, FewShotPlayground

LOW = Bits(2, 2)
CROSS = [[[.2, .2], [.8, .8]], [[.8, .2], [.2, .8]]]


@pytest.fixture(scope='module')
def ready(): return playing(n_way=6, n_query=3)


def test_other_images_come_in_the_form_of_the_network(tmp_path):
    "A folder of coloured pictures, larger than the network's; and one form for the playground and for measuring."
    for c in range(12):
        (tmp_path/'signs'/f'sign{c:02d}').mkdir(parents=True)
        for i in range(5): Image.fromarray(np.random.default_rng([c, i]).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path/'signs'/f'sign{c:02d}'/f'{i}.png')
    given = playing(data=str(tmp_path/'signs'), split='all', n_way=12, n_query=2)
    assert given['episodes'][0].support.shape == (12, 1, 28, 28) and given['answer'](given['episodes'][0], LOW).predicted.shape == (24,)
    ours, theirs = playing(n_way=6, n_query=3)['episodes'][7], open_run(shipped('omniglot_mebqat_pn.safetensors')).episodes(n_way=6, k_shot=1, n_query=3, data='glyphs')[7]
    assert torch.equal(ours.support, theirs.support) and torch.equal(ours.query, theirs.query)


@pytest.fixture
def play(ready): return FewShotPlayground(**ready)


@pytest.fixture(scope='module')
def inner():
    "A network with a classifier of 5 ways, untrained, and its episodes."
    pool = load('glyphs', 'test', by='classes')
    torch.manual_seed(0)
    net = quantize(cnn5(5, width=8), LSQ(), example=pool.batch(slice(0, 64))[0], bn='batch').eval()
    learner = InnerSteps(steps=3, inner_lr=.5)
    return net, learner, dict(answer=lambda e, b: answer(net, learner, e, b), episodes=Episodes(pool, 5, 1, 4), space=BitSpace.parse('W2A2 W4A4 FP'))


def png(array):
    file = io.BytesIO()
    Image.fromarray(np.asarray(array, dtype=np.uint8)).save(file, 'PNG')
    return file.getvalue()


def upload(data): return ({'name': 'x.png', 'type': 'image/png', 'size': len(data), 'content': memoryview(data), 'last_modified': datetime.now(timezone.utc)},)


def predicted(play):
    "What the sheet shows as the class of each query."
    return [LETTERS.index(t[-1]) for t in play.sheet.data[3].text]


def test_answers_are_the_librarys_at_every_pair(ready):
    model = open_run(shipped('omniglot_mebqat_pn.safetensors')).model
    for i in (0, 2):
        e = ready['episodes'][i]
        theirs = proto_correct(model, e, BitSpace.parse('W2A2 W2A8 W8A2 W4A4 FP'))
        for bits,right in theirs.items():
            got = ready['answer'](e, bits)
            assert torch.equal(got.predicted == e.query_labels, right)
            assert torch.equal(got.prototypes, got.support) and got.query.shape == (18, 64)


def test_inner_answers_are_the_librarys(inner):
    net, learner, parts = inner
    e = parts['episodes'][1]
    for bits in parts['space']:
        got = parts['answer'](e, bits)
        theirs = inner_correct(net, e, bits, learner, 3, curve=True)
        assert torch.equal(got.predicted == e.query_labels, theirs[-1])
        assert torch.equal(got.accuracies, theirs.float().mean(1))
        assert got.losses[-1] < got.losses[0] and got.prototypes is None
    features = got.query
    assert features.shape[0] == 20 and features.shape[1] == net.fc.in_features


def test_an_answer_leaves_the_network_alone(inner):
    net, learner, parts = inner
    before = {k: v.clone() for k,v in net.state_dict().items()}
    net.train()
    answer(net, learner, parts['episodes'][0], LOW)
    assert net.training and all(torch.equal(v, before[k]) for k,v in net.state_dict().items())
    net.eval()


def test_unknown_queries_are_answered_and_not_counted(inner):
    *_, parts = inner
    e = parts['episodes'][0]
    twice = Episode(e.support, e.support_labels, torch.cat([e.query, e.query]), torch.cat([e.query_labels, torch.full_like(e.query_labels, -1)]), 5)
    got = parts['answer'](twice, FP)
    assert len(got.predicted) == 40
    assert got.accuracies[-1] == (got.predicted[:20] == e.query_labels).float().mean()


@pytest.mark.parametrize('bits', BitSpace.parse('W2A2 W3A8 W8A3 FP'), ids=str)
def test_the_figures_hold_what_the_network_says(play, ready, bits):
    play.picker.w.value = bits.w
    play.picker.a.value = bits.a
    e = ready['episodes'][0]
    got, full = ready['answer'](e, play.value), ready['answer'](e, FP)
    assert play.value == bits and predicted(play) == got.predicted.tolist()
    marks = [('✗' in t, '◆' in t) for t in play.sheet.data[3].text]
    assert marks == list(zip((got.predicted != e.query_labels).tolist(), (got.predicted != full.predicted).tolist()))
    plane = Plane.fit(torch.cat([full.support, full.query]))
    for trace, features in ((play.figure.data[1], got.support), (play.figure.data[2], got.query), (play.figure.data[3], got.prototypes)):
        torch.testing.assert_close(torch.tensor([trace.x, trace.y]).T, plane(features), atol=1e-3, rtol=0)
    right = int((got.predicted == e.query_labels).sum())
    assert f'{bits}: {right} of 18 right' in play.summary and f'FP: {int((full.predicted == e.query_labels).sum())} of 18' in play.summary


def test_points_drift_while_the_plane_stays(play):
    play.value = LOW
    start = np.array(play.figure.data[0].x, dtype=float).reshape(-1, 3)
    ranges = play.figure.layout.xaxis.range
    play.value = FP
    assert np.allclose(start[:, 0], np.array(play.figure.data[2].x)) and not np.allclose(start[:, 0], start[:, 1])
    assert play.figure.layout.xaxis.range == ranges and play.figure.data[0].x[0] == play.figure.data[0].x[1]


def test_every_pair_is_asked_once(ready):
    asked = []
    play = FewShotPlayground(**ready | dict(answer=lambda e, b: asked.append(b) or ready['answer'](e, b)))
    for bits in (LOW, Bits(4, 4), LOW, FP, Bits(4, 4)): play.value = bits
    play.another.click()
    play.number.value = 0
    assert sorted(map(str, asked)) == sorted(['W2A2', 'FP', 'W4A4', 'FP', 'W4A4'])


def test_new_episodes_and_shapes(play, ready):
    play.another.click()
    assert play.number.value == 1 and play.scene.names == ready['episodes'].classes(1)
    play.shots.value, play.ways.value = 5, 4
    e = Episodes(ready['episodes'].pool, 4, 5, 3)[1]
    assert torch.equal(play.scene.episode.query, e.query) and torch.equal(play.scene.episode.support, e.support)
    assert len(play.figure.data[1].x) == 20 and len(play.figure.data[3].x) == 4
    assert predicted(play) == ready['answer'](e, play.value).predicted.tolist()


@pytest.mark.parametrize('control, value, says', [('ways', 60, 'classes'), ('ways', 1, '2 or more'), ('ways', 35, 'more than the picture holds'), ('shots', 0, '1 or more'),
                                                   ('shots', 18, 'has only 20'), ('shots', 12, 'more than the picture holds'), ('number', -1, 'numbered 0, 1, 2')])
def test_impossible_shapes_are_refused_and_the_picture_stays(play, control, value, says):
    shown = predicted(play), play.scene
    before = getattr(play, control).value
    getattr(play, control).value = value
    assert says in play.message and (predicted(play), play.scene) == shown and getattr(play, control).value == before
    play.value = Bits(8, 8)
    assert play.message == '' and '<b>W8A8' in play.summary


def test_an_inner_loop_shows_its_curve_and_keeps_its_ways(inner):
    *_, parts = inner
    play = FewShotPlayground(**parts)
    full, now = play.figure.data
    assert list(now.y) == parts['answer'](parts['episodes'][0], LOW).accuracies.tolist() and list(now.x) == [0, 1, 2, 3]
    play.value = FP
    assert list(play.figure.data[1].y) == list(full.y)
    play.ways.value = 4
    assert 'classifies 5 ways, the episodes have 4' in play.message and play.ways.value == 5
    play.pad.pad.strokes = CROSS
    play.teach.click()
    assert 'classifies 5 ways, the episodes have 6' in play.message and play.scene.episode.n_way == 5
    play.ask.click()
    assert 'Your own: FP says' in play.summary and '20 right' in play.summary
    assert len(play.bake().frames) == 3


def test_bits_outside_the_space_and_failing_answers(ready):
    def fails(e, b):
        if b == Bits(3, 3): raise FloatingPointError('outputs at W3A3 are not finite')
        return ready['answer'](e, b)
    play = FewShotPlayground(**ready | dict(answer=fails))
    with pytest.raises(traitlets.TraitError, match='W9A9 is not among the 50 pairs'): play.value = Bits(9, 9)
    assert play.value == LOW
    play.value = Bits(3, 3)
    assert 'outputs at W3A3 are not finite' in play.message
    play.value = Bits(4, 4)
    assert play.message == '' and '<b>W4A4' in play.summary
    with pytest.raises(ValueError, match='classes'): FewShotPlayground(**ready | dict(episodes=Episodes(ready['episodes'].pool, 35, 1, 2)))


def test_own_characters_join_the_episode(play, ready):
    play.ask.click()
    assert play.message == 'draw a character or choose an image file first'
    play.pad.pad.strokes = CROSS
    play.teach.click()
    play.pad.pad.strokes = [[[.22, .2], [.8, .75]], [[.8, .22], [.2, .8]]]
    play.ask.click()
    e = play.scene.episode
    assert (e.n_way, len(e.support), len(e.query), int(e.query_labels[-1])) == (7, 7, 19, -1)
    torch.testing.assert_close(e.support[-1], from_strokes(CROSS))
    got = play.shown
    assert predicted(play) == got.predicted.tolist() and got.predicted[-1] == 6
    assert 'of 18 right' in play.summary and 'Your own: W2A2 says G' in play.summary
    play.another.click()
    assert play.scene.names[-1] == 'your own 1'
    play.forget.click()
    assert play.scene.episode.n_way == 6 and 'Your own' not in play.summary


def test_five_of_ones_own_are_the_most(play):
    for _ in range(6):
        play.pad.pad.strokes = CROSS
        play.ask.click()
    assert 'five characters' in play.message and (play.scene.episode.query_labels == -1).sum() == 5


@pytest.mark.parametrize('data, says', [(b'hello', 'no PNG or JPEG'), (b'', 'no PNG or JPEG'), (png(np.full((60, 60), 220)), 'nothing stands out'), (bytes(MOST_BYTES + 1), 'at most 8 MB'),
                                        (png(np.eye(200)*255)[:90], 'no PNG or JPEG'), (png(np.pad(np.zeros((8, 8)), 120, constant_values=255)), 'a dot')])
def test_uploads_that_are_no_character(data, says):
    pad = CharacterPad()
    pad.pad.strokes = CROSS
    pad.upload.value = upload(data)
    assert says in pad.message and pad.value is None and pad.pad.strokes == []
    pad.pad.strokes = CROSS
    assert pad.message == '' and pad.value is not None


@pytest.mark.parametrize('ink, paper', [(20, 240), (240, 20)])
@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P'])
def test_pictures_become_the_drawing(ink, paper, mode):
    from PIL import ImageDraw
    picture = Image.new('L', (500, 400), paper)
    draw = ImageDraw.Draw(picture)
    for stroke in CROSS: draw.line([(150 + 200*x, 80 + 200*y) for x,y in stroke], fill=ink, width=9)
    file = io.BytesIO()
    picture.convert(mode).save(file, 'PNG')
    pad = CharacterPad()
    pad.upload.value = upload(file.getvalue())
    assert pad.message == ''
    assert (pad.value - from_strokes(CROSS)).abs().mean() < .03


def test_thinning_keeps_lines_whole():
    y, x = np.mgrid[:80, :80]
    ring = abs(np.hypot(x - 40, y - 40) - 25) < 5
    line = skeletonize(ring)
    assert 120 < line.sum() < 200 and abs(np.hypot(*(np.nonzero(line)[::-1] - np.array([[40], [40]]))) - 25).max() < 3
    assert not (line & ~ring).any() and skeletonize(line).sum() == line.sum()


def test_without_anywidget_the_panel_says_what_to_install(ready):
    with patch('mebqat.explore.panels.find_spec', lambda name: None), patch('mebqat.explore.playground.find_spec', lambda name: None):
        play = FewShotPlayground(**ready)
        play.value = Bits(4, 4)
    assert '<b>W4A4' in play.summary and play.message == ''
    text = json.dumps([w.value for w in walk(play) if type(w).__name__ == 'HTML'])
    assert text.count("pip install 'mebqat[lab]'") == 3


def walk(widget):
    yield widget
    for child in getattr(widget, 'children', ()): yield from walk(child)


def test_controls_have_names_and_help(play):
    controls = [w for w in walk(play) if type(w).__name__ in ('Button', 'IntText', 'SelectionSlider', 'FileUpload')]
    assert len(controls) >= 10 and all(w.description and w.tooltip for w in controls)


@pytest.fixture(scope='module')
def page(browser):
    page = browser.new_page(viewport=dict(width=1000, height=1000))
    page.set_default_timeout(240_000)
    return page


def test_the_baked_twin_moves_without_a_network(ready, page, tmp_path):
    play = FewShotPlayground(**ready, number=2)
    fig = play.bake()
    assert len(fig.to_json()) < 1_000_000
    file, failed = tmp_path/'twin.html', []
    file.write_text(fig.to_html(include_plotlyjs=True, auto_play=False), encoding='utf-8')
    page.context.set_offline(True)
    page.on('pageerror', lambda e: failed.append(str(e)))
    page.on('requestfailed', lambda r: failed.append(r.url))
    page.goto(file.as_uri(), wait_until='commit')
    page.wait_for_selector('.slider-rail-touch-rect')
    texts = lambda: page.evaluate("document.querySelector('.js-plotly-plot').data[3].text")
    said = lambda b: [Verdict.of(play.scene, play.scene.answers[b]).words(i) for i in range(18)]
    assert texts() == said(LOW)
    rail = page.locator('.slider-rail-touch-rect').bounding_box()
    page.mouse.click(rail['x'] + rail['width'] - 8, rail['y'] + rail['height']/2)
    page.wait_for_function("() => document.querySelector('.js-plotly-plot').layout.title.text.includes('<b>FP')")
    assert texts() == said(FP)
    xs = page.evaluate("[...document.querySelector('.js-plotly-plot').data[9].x]")
    assert np.allclose(xs, play.scene.rest[:, 0], atol=1e-3) and not failed


def test_the_pad_draws_by_mouse_and_by_keyboard(page, tmp_path):
    file = tmp_path/'pad.html'
    file.write_text(f'''<div id="el"></div><script type="module">{PAD_SCRIPT.replace("export default { render }", "")}
        window.model = {{ strokes: [], sent: 0, get: k => model[k], set: (k, v) => {{ model[k] = v }}, save_changes: () => {{ model.sent++ }}, on: (e, f) => {{ model.changed = f }} }}
        render({{ model, el: document.getElementById('el') }}); window.up = true</script>''')
    page.goto(file.as_uri(), wait_until='commit')
    page.wait_for_function('() => window.up')
    strokes, pad = lambda: page.evaluate('model.strokes'), page.locator('canvas')
    box = pad.bounding_box()
    page.mouse.move(box['x'] + 40, box['y'] + 40)
    page.mouse.down()
    page.mouse.move(box['x'] + 160, box['y'] + 160, steps=4)
    page.mouse.up()
    assert len(strokes()) == 1 and np.allclose([strokes()[0][0], strokes()[0][-1]], [[.2, .2], [.8, .8]], atol=.02)
    pad.focus()
    for key in (' ', *['ArrowRight']*10, *['ArrowDown']*6, ' '): page.keyboard.press(key)
    assert len(strokes()) == 2 and np.allclose([strokes()[1][0], strokes()[1][-1]], [[.25, .25], [.75, .55]], atol=.01)
    assert from_strokes(strokes()).max() == 1
    page.keyboard.press('Backspace')
    assert len(strokes()) == 1
    page.evaluate("model.strokes = []; model.changed(); document.querySelector('canvas').blur()")
    assert page.evaluate("[...document.querySelector('canvas').getContext('2d').getImageData(0, 0, 448, 448).data].every(v => v === 0)")
