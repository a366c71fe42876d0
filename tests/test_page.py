"Pages and figures: one file that opens without a network and shows what the surfaces hold."
import errno
import os
import re
from importlib.metadata import version
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest
from plotly.offline import get_plotlyjs

from mebqat.bits import FULL, Bits, BitSpace
from mebqat.figures.plots import compare, diagonal, difference, frontier, training
from mebqat.figures.html import write_page
from mebqat.surface import Point, Surface, wilson


def made_up(top=0.95, fragile=0.8, space='lsq'):
    def point(b):
        right = round(600*max(0.1, top - fragile*(2.0**-b.w + 2.0**-b.a)))
        return Point(right/600, *wilson(right, 600), 600, bytes=14_000.*b.w, bitops=3e6*b.w*b.a)
    return Surface({b: point(b) for b in BitSpace.paper(space)}, 'made up <b>&</b> shown', {'data': 'made up'})


ONE, TWO = made_up(), made_up(0.97, 2.5, 'dorefa')
BOTH = {'one': ONE, 'two': TWO}
HISTORY = pd.DataFrame({'step': [0, 1, 2, 3], 'epoch': [0, 0, 1, 1], 'loss': [2., 1., .5, .4], 'val_accuracy': [.1, None, .6, None],
                        'seconds': [.1, .2, .3, .4], 'note': list('abcd')})


def every_figure():
    return [ONE.plot('both', caption='Two </script> views & one "caption".'), compare(BOTH, 'Maps', 'Side by side.'), difference(ONE, TWO),
            diagonal(BOTH, {'alone': {Bits(4, 4): Point(0.9, 0.8, 0.95, 50)}}, caption='Equal bits.'),
            frontier(BOTH, 'bitops'), frontier(BOTH), training(HISTORY, caption='Down it goes.')]


def test_compare_keeps_numbers_axes_and_colours():
    fig = compare({str(i): (ONE, TWO)[i % 2] for i in range(5)})
    assert [t.xaxis for t in fig.data] == ['x', 'x2', 'x3', 'x4', 'x5'] and {t.coloraxis for t in fig.data} == {'coloraxis'}
    for i,t in enumerate(fig.data):
        s = (ONE, TWO)[i % 2]
        assert list(t.x) == list(fig.data[0].x) and list(t.y)[0] == '1' and list(t.y)[-1] == 'FP'
        got = {Bits.parse(f'{w},{a}'): z for w,row in zip(t.y, t.z) for a,z in zip(t.x, row) if z is not None}
        assert got == {b: p.accuracy for b,p in s.points.items()}
    with pytest.raises(ValueError, match='at least one'): compare({})


def test_difference_is_antisymmetric_and_over_shared_pairs():
    there, back = difference(ONE, TWO).data[0], difference(TWO, ONE).data[0]
    cells = [(x, y) for r,q in zip(there.z, back.z) for x,y in zip(r, q)]
    assert all((x is None and y is None) or x == pytest.approx(-y) for x,y in cells)
    assert sum(x is not None for x,_ in cells) == len(set(ONE) & set(TWO)) == 73
    assert there.zmax == -there.zmin == pytest.approx(max(abs(x) for x,_ in cells if x is not None))
    assert difference(ONE, ONE).data[0].zmax > 0


def test_diagonal_draws_the_intervals():
    fig = diagonal({'one': ONE}, {'alone': {Bits(4, 4): Point(0.5, 0.4, 0.7, 9), Bits(8, 8): Point(0.6, float('-inf'), float('inf'), 1)}})
    line, alone = fig.data
    widths = [2, 3, 4, 5, 6, 7, 8, 16, FULL]
    assert list(line.y) == [ONE.at(Bits(w, w)).accuracy for w in widths] and list(fig.layout.xaxis.ticktext)[-1] == 'FP'
    assert [y + e for y,e in zip(line.y, line.error_y.array)] == pytest.approx([ONE.at(Bits(w, w)).high for w in widths])
    assert [y - e for y,e in zip(line.y, line.error_y.arrayminus)] == pytest.approx([ONE.at(Bits(w, w)).low for w in widths])
    assert alone.mode == 'markers' and [round(x) for x in alone.x] == [2, 6]
    assert list(alone.error_y.array) == pytest.approx([0.2, 0]) and list(alone.error_y.arrayminus) == pytest.approx([0.1, 0])


@pytest.mark.parametrize('cost', ['bytes', 'bitops'])
def test_frontier_is_the_pareto_front(cost):
    cloud, stairs = frontier({'one': ONE}, cost).data
    front = ONE.pareto(cost)
    assert list(zip(stairs.x, stairs.y)) == [(getattr(ONE.at(b), cost), ONE.at(b).accuracy) for b in front]
    assert len(cloud.x) + len(stairs.x) == len(ONE) and stairs.line.shape == 'hv'


def test_training_panels():
    fig = training(HISTORY)
    assert [(t.name, list(t.x)) for t in fig.data] == [('loss', [0, 1, 2, 3]), ('val_accuracy', [0, 2]), ('seconds', [0, 1, 2, 3])]
    assert [fig.layout[f'yaxis{i}'].title.text for i in ('', 2, 3)] == ['loss', 'accuracy', 'seconds']
    assert fig.layout.xaxis3.title.text == 'step' and training(HISTORY[['epoch', 'loss']]).layout.xaxis.title.text == 'epoch'


@pytest.mark.parametrize('fig', every_figure(), ids=lambda f: f.layout.title.text or f.data[0].type)
def test_figures_name_their_axes(fig):
    shown = [a for a in fig.select_xaxes() if a.showticklabels is not False and a.visible is not False]
    assert all(a.title.text for a in shown if a.title.text is not None) and any(a.title.text for a in shown)
    assert any(a.title.text for a in fig.select_yaxes())


def test_write_page_leaves_figures_alone(tmp_path):
    fig = ONE.plot('both', caption='Seen.')
    before = fig.to_json()
    write_page(tmp_path/'p.html', 'x', [fig])
    assert fig.to_json() == before


def test_one_library_and_no_addresses_of_ours(tmp_path):
    text = write_page(tmp_path/'p.html', 'A <title> & more', every_figure()).read_text()
    own = text.replace(get_plotlyjs(), 'PLOTLY')
    assert own.count('PLOTLY') == 1
    assert '://' not in own and 'mathjax' not in own.lower() and '<link' not in own and ' src=' not in own
    assert '<title>A &lt;title&gt; &amp; more</title>' in own and own.count('</script>') == len(every_figure()) + 3


def test_a_page_is_whole_or_absent(tmp_path, monkeypatch):
    old = write_page(tmp_path/'p.html', 'old', ['text'])
    before = old.read_text()
    def full(self, text, **kw):
        with open(self, 'w') as f: f.write(text[:20])
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(Path, 'write_text', full)
    with pytest.raises(OSError) as e: write_page(old, 'new', ['text'])
    assert e.value.errno == errno.ENOSPC and str(old) in str(e.value)
    assert old.read_text() == before and os.listdir(tmp_path) == ['p.html']


def test_a_page_cannot_go_where_no_folder_is(tmp_path):
    with pytest.raises(FileNotFoundError, match='none/p.html'): write_page(tmp_path/'none'/'p.html', 'x', [])
    (tmp_path/'file').write_text('')
    with pytest.raises(NotADirectoryError, match='file/p.html'): write_page(tmp_path/'file'/'p.html', 'x', [])
    with pytest.raises(ValueError, match='got dict'): write_page(tmp_path/'p.html', 'x', [{}])
    assert os.listdir(tmp_path) == ['file']


@pytest.fixture(scope='module')
def page_file(tmp_path_factory):
    plain = go.Figure(go.Scatter(y=[1, 2, 3]))
    parts = ['Plain text &amp; an entity.', '<h2>Part</h2>', *every_figure(), plain, ONE.table(), ONE.to_frame().head(2)]
    return write_page(tmp_path_factory.mktemp('page')/'page.html', 'Bits & pieces', parts)


def visit(browser, path, **kwargs):
    "Open a page offline; the list collects everything that went wrong."
    context, wrong = browser.new_context(offline=True, **kwargs), []
    context.route(lambda url: not url.startswith(('file:', 'data:', 'blob:')), lambda route: (wrong.append(route.request.url), route.abort()))
    page = context.new_page()
    page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' or 'WARN' in m.text else None)
    page.on('pageerror', lambda e: wrong.append(str(e)))
    page.on('requestfailed', lambda r: wrong.append(r.url))
    page.goto(path.as_uri())
    page.wait_for_function('() => [...document.querySelectorAll(".plot")].every(d => d.querySelector(".main-svg"))')
    return page, wrong


def test_page_shows_the_surface_offline(browser, page_file):
    page, wrong = visit(browser, page_file)
    assert page.locator('.plot .main-svg').count() >= 8 and page.locator('table').count() == 2
    z = page.evaluate('document.querySelectorAll(".plot")[0].data[0].z')
    assert z == [[ONE.points[Bits(w, a)].accuracy if Bits(w, a) in ONE else None for a in (2, 3, 4, 5, 6, 7, 8, 16, FULL)]
                 for w in (2, 3, 4, 5, 6, 7, 8, 16, FULL)]
    written = page.locator('.plot').nth(0).locator('.heatmap-label').all_text_contents()
    assert sorted(t for t in written if t) == sorted(f'{100*p.accuracy:.1f}' for p in ONE.points.values())
    said = page.locator('figcaption').all_text_contents()
    assert said == ['Two </script> views & one "caption".', 'Side by side.', 'Equal bits.', 'Down it goes.']
    assert 'Plain text & an entity.' in page.locator('main > p').first.text_content()
    assert wrong == []


def test_buttons_switch_between_map_and_relief(browser, page_file):
    page, wrong = visit(browser, page_file)
    visible = lambda: page.evaluate('document.querySelector(".plot")._fullData.map(t => t.visible)')
    box = page.locator('.plot').first
    assert visible() == [True, False, False] and box.locator('.heatmaplayer image').count() == 1
    box.get_by_text('3-D').click()
    page.wait_for_function('() => document.querySelector(".plot .gl-container canvas, .plot #scene canvas")')
    assert visible() == [False, True, True] and box.locator('.heatmaplayer image').count() == 0
    assert page.evaluate('document.querySelector(".plot").layout.xaxis.visible') is False
    box.get_by_text('heat map').click()
    page.wait_for_function('() => document.querySelector(".plot .heatmaplayer image")')
    assert visible() == [True, False, False] and wrong == []


def test_page_follows_the_screen(browser, page_file):
    page, wrong = visit(browser, page_file, color_scheme='dark')
    paper = 'document.querySelectorAll(".plot")[1]._fullLayout.paper_bgcolor'
    body = 'getComputedStyle(document.body).backgroundColor'
    dark = page.evaluate(paper), page.evaluate(body)
    page.emulate_media(color_scheme='light')
    page.wait_for_function(f'() => {paper} !== "{dark[0]}"')
    assert page.evaluate(paper) == '#ffffff' and page.evaluate(body) != dark[1]
    assert wrong == []


@pytest.mark.parametrize('width', [1000, 600])
def test_nothing_is_cut_off(browser, page_file, width):
    page, wrong = visit(browser, page_file, viewport={'width': width, 'height': 800})
    assert page.evaluate('document.documentElement.scrollWidth') <= width
    cut = page.evaluate('''() => [...document.querySelectorAll(".plot")].flatMap(d => {
        const box = d.getBoundingClientRect();
        return [...d.querySelectorAll(".main-svg text")].filter(t => t.textContent && t.getBoundingClientRect().width).filter(t => {
            const r = t.getBoundingClientRect();
            return r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1;
        }).map(t => t.textContent)})''')
    assert cut == [] and wrong == []


# What every button of a figure is called, and where every link of the page leads.
OFFERS = '''() => [...document.querySelectorAll('.modebar-btn')].map(b => b.dataset.title + ' ' + (b.dataset.name ?? ''))
    .concat([...document.querySelectorAll('a[href], button, form')].map(e => e.textContent + ' ' + (e.href ?? '') + (e.action ?? '')))'''
UPLOAD = re.compile('share|cloud|upload|publish|studio|https?:', re.I)


def offers(page): return [text for text in page.evaluate(OFFERS) if UPLOAD.search(text)]


def test_a_page_offers_no_upload(browser, page_file):
    page, wrong = visit(browser, page_file)
    assert len(page.evaluate(OFFERS)) > 20 and offers(page) == [] and wrong == []


@pytest.mark.parametrize('figure', [go.Figure(go.Scatter(y=[1, 2, 3])), ONE.plot('both'), training(HISTORY)], ids=('plain', 'surface', 'training'))
@pytest.mark.parametrize('renderer', ['notebook', 'colab', 'browser'])
def test_a_figure_in_a_notebook_offers_no_upload(browser, tmp_path, renderer, figure):
    how = pio.renderers[renderer]
    part = pio.to_html(figure.to_dict(), how.config, full_html=True)
    (tmp_path/'f.html').write_text(part.replace('class="plotly-graph-div"', 'class="plotly-graph-div plot"'), encoding='utf-8')
    page, wrong = visit(browser, tmp_path/'f.html')
    assert page.evaluate(OFFERS) and offers(page) == [] and wrong == []


def test_a_named_figure_offers_no_upload_however_it_is_shown(browser, tmp_path):
    "With plotly's own settings, which a plain figure shows to offer it."
    found = {}
    for name,figure in (('named', ONE.plot()), ('plain', go.Figure(go.Scatter(y=[1])))):
        (tmp_path/f'{name}.html').write_text(pio.to_html(figure, {}).replace('plotly-graph-div', 'plotly-graph-div plot'), encoding='utf-8')
        page, _ = visit(browser, tmp_path/f'{name}.html')
        assert page.evaluate(OFFERS)
        found[name] = [t for t in offers(page) if 'https' not in t]
    assert found['named'] == [] and (found['plain'] or int(version('plotly').split('.')[0]) < 7)


def test_the_page_may_not_reach_out(browser, page_file):
    page, _ = visit(browser, page_file)
    asked = page.evaluate('fetch("https://example.org/x").then(() => "reached", e => "refused")')
    assert asked == 'refused'
    broken = page.evaluate('''() => new Promise(done => {
        document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective));
        document.body.append(Object.assign(new Image(), {src: "https://example.org/x.png"}))})''')
    assert broken == 'img-src'
