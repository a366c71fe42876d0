"The site: it builds without a warning, stands alone on the disk, and its figures, sliders, formulas and links work."
import importlib, importlib.util, inspect, json, re, shlex, subprocess, sys, time
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import typer

from conftest import ROOT

sys.path.insert(0, str(ROOT/'docs'))
from reference import modules  # noqa: E402

HAND = sorted(p.stem for p in (ROOT/'docs').glob('*.md'))
NOTEBOOKS = sorted(p.relative_to(ROOT/'nbs').as_posix().removesuffix('.ipynb') for p in (ROOT/'nbs').rglob('[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = [*modules(ROOT)]


def build(folder):
    done = subprocess.run([sys.executable, ROOT/'docs'/'make.py', '--out', folder, '--strict', '--jobs', '1'], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope='session')
def site(tmp_path_factory):
    "Folder of the built pages; processes that test side by side share one build."
    if not all(map(importlib.util.find_spec, ('sphinx', 'myst_nb', 'furo', 'latex2mathml'))): pytest.skip('sphinx is not installed')
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if base.name.startswith('popen-') else base)/'site'
    said = shared/'said.json'
    try: shared.mkdir()
    except FileExistsError:
        while not said.exists(): time.sleep(0.5)
    else:
        outcome = build(shared)
        (shared/'part').write_text(json.dumps(outcome))
        (shared/'part').rename(said)
    code, text = json.loads(said.read_text())
    assert code == 0, text
    return shared/'html'


class Seen(HTMLParser):
    "What a page links to, loads and can be linked at."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids = set(), set(), set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'): self.ids.add(a['id'])
        if tag == 'a' and a.get('href'): self.links.add(a['href'])
        elif tag in ('script', 'img', 'iframe', 'source') and a.get('src'): self.loads.add(a['src'])
        elif tag == 'link' and a.get('href'): self.loads.add(a['href'])


def pages(site): return {p.relative_to(site).as_posix(): Seen(p.read_text(encoding='utf-8')) for p in sorted(site.rglob('*.html')) if 'baked' not in p.parts}


def test_every_page_is_there(site):
    made = pages(site)
    wanted = [f'{h}.html' for h in HAND] + [f'nbs/{n}.html' for n in NOTEBOOKS] + [f'reference/{m}.html' for m in MODULES]
    assert not [w for w in wanted if w not in made]
    reached, todo = set(), ['index.html']
    while todo:
        here = todo.pop()
        if here in reached or here not in made: continue
        reached.add(here)
        todo += [(site/here).parent.joinpath(unquote(urlsplit(u).path)).resolve().relative_to(site.resolve()).as_posix()
                 for u in made[here].links if not urlsplit(u).scheme and urlsplit(u).path]
    assert not [w for w in wanted if w not in reached], 'no way leads there'


def test_links_lead_somewhere(site):
    made, broken = pages(site), []
    for name, page in made.items():
        for url in page.links | page.loads:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc: continue
            target = (site/name).parent/unquote(parts.path) if parts.path else site/name
            key = target.resolve().relative_to(site.resolve()).as_posix()
            if not target.exists() or parts.fragment and key in made and unquote(parts.fragment) not in made[key].ids: broken.append((name, url))
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site):
    made = pages(site)
    assert not [(n, u) for n,p in made.items() for u in p.loads if urlsplit(u).scheme not in ('', 'data') or urlsplit(u).netloc]
    text = {n: (site/n).read_text(encoding='utf-8').lower() for n in made}
    assert not [n for n,t in text.items() if 'mathjax' in t or 'require.min.js' in t or 'widget-state' in t]
    assert len([*site.rglob('plotly*.js')]) == 1


def test_notebooks_show_no_machinery(site):
    for n in NOTEBOOKS:
        text = re.sub(r'<[^>]+>', '', (site/'nbs'/f'{n}.html').read_text(encoding='utf-8'))
        assert not re.search(r'^#\| ?\w+', text, re.M), n
    hidden = (site/'nbs'/'course'/'04_real_data.html').read_text(encoding='utf-8')
    assert 'surface_of' not in re.sub(r'<[^>]+>', '', hidden), 'a hidden cell shows'


@pytest.mark.parametrize('module', MODULES)
def test_reference_holds_what_is_exported(site, module):
    m, text = importlib.import_module(f'mebqat.{module}'), (site/'reference'/f'{module}.html').read_text(encoding='utf-8')
    ids = Seen(text).ids
    things = [n for n in m.__all__ if (inspect.isclass(o := getattr(m, n)) or inspect.isfunction(o)) and o.__module__ == m.__name__]
    assert not [n for n in things if f'{module}.{n}' not in ids]


def test_reference_says_type_and_comment(site):
    rows = re.findall(r'<tr>(.*?)</tr>', (site/'reference'/'surface.html').read_text(encoding='utf-8'))
    plain = [re.findall(r'<td>(.*?)</td>', re.sub(r'</?(?:code|em)>', '', r)) for r in rows]
    assert ['z', 'float', '1.96', 'Width in standard deviations; 1.96 is 95 %'] in plain
    assert ['max_bytes', 'float | str | None', 'None', 'Storage allowed, such as 100kB'] in plain


def test_results_are_those_of_the_files(site):
    text = (site/'results.html').read_text(encoding='utf-8')
    for r in json.loads((ROOT/'data'/'results'/'cifar10_resnet20.json').read_text())['runs']:
        at = {p['bits']: p['accuracy'] for p in r['surface']['points']}
        for b in {'W2A2', 'W4A4', 'W8A8'} & at.keys(): assert f'<td>{100*at[b]:.2f} (' in text, (r['name'], b)
    for r in json.loads((ROOT/'data'/'results'/'cifar10_policies.json').read_text())['runs']: assert f'<td>{100*r["accuracy"]:.2f} (' in text, r['name']
    for name in ('omniglot_few_shot', 'miniimagenet_few_shot'):
        for r in json.loads((ROOT/'data'/'results'/f'{name}.json').read_text())['runs']:
            for q in r['points'] if r['name'] != 'start' else (): assert f'<td>{100*q["accuracy"]:.2f} (' in text, (name, r['name'], q['bits'])
    for name in ('cifar10_resnet20', 'cifar10_policies', 'omniglot_few_shot', 'omniglot_one_query', 'miniimagenet_few_shot'):
        assert json.loads((ROOT/'data'/'results'/f'{name}.json').read_text())['about']['command'] in text


def blocks(page, language): return re.findall(rf'^```{language}\n(.*?)^```', (ROOT/'docs'/f'{page}.md').read_text(encoding='utf-8'), re.M | re.S)


def test_recipes_run(tmp_path):
    program = '\n'.join(blocks('how-to', 'python'))
    assert len(blocks('how-to', 'python')) >= 8
    done = subprocess.run([sys.executable, '-c', program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/'surface.html').stat().st_size > 1e6 and (tmp_path/'surface.json').exists()


@pytest.mark.parametrize('page', HAND)
def test_commands_exist(page):
    from mebqat.cli import app
    commands, targets = typer.main.get_command(app).commands, set(re.findall(r'^(\w+):', (ROOT/'Makefile').read_text(), re.M))
    for line in ' '.join(blocks(page, 'sh')).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ['mebqat']: commands[words[1]].make_context(words[1], words[2:])
        elif words[:1] == ['make'] and len(words) > 1: assert words[1] in targets, line


@pytest.fixture
def visit(browser, site):
    "Open pages offline; `wrong` collects everything that went wrong and every request that is not for a file."
    wrong, contexts = [], []
    def start(**how):
        context = browser.new_context(offline=True, viewport={'width': 1000, 'height': 900}, **how)
        context.set_default_timeout(60_000)
        contexts.append(context)
        page = context.new_page()
        page.on('request', lambda r: wrong.append(r.url) if not r.url.startswith(('file:', 'data:', 'blob:')) else None)
        page.on('console', lambda m: wrong.append(m.text) if m.type == 'error' or 'WARN' in m.text else None)
        page.on('pageerror', lambda e: wrong.append(str(e)))
        page.on('requestfailed', lambda r: wrong.append(r.url))
        return page
    start.wrong, start.at = wrong, lambda name: (site/f'{name}.html').as_uri()
    yield start
    for c in contexts: c.close()


def drawn(page):
    "Bring every figure into view, one after the other; how many there are."
    plots = page.locator('.plot')
    for i in range(plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
        plots.nth(i).locator('.main-svg').first.wait_for(state='attached')
    return plots.count()


GROUPS = {'pages': HAND, 'lessons': [f'nbs/{n}' for n in NOTEBOOKS if n.startswith('course/')], 'notebooks': [f'nbs/{n}' for n in NOTEBOOKS if not n.startswith('course/')],
          'reference': ['reference/index', 'reference/surface', 'reference/figures.plots']}


def stored_figures(name):
    "How many plotly outputs a notebook shows."
    cells = json.loads((ROOT/f'{name}.ipynb').read_text(encoding='utf-8'))['cells']
    open_ = [c for c in cells if not re.search(r'^#\|\s*hide\s*$', ''.join(c['source']), re.M)]
    return sum('application/vnd.plotly.v1+json' in o.get('data', {}) for c in open_ for o in c.get('outputs', []))


MATHS = '[...document.querySelectorAll("math")].map(m => [m.getBoundingClientRect().width, m.getBoundingClientRect().height, m.textContent])'


@pytest.mark.parametrize('group', GROUPS)
def test_pages_open_and_draw(visit, group):
    page, formulas = visit(), 0
    for name in GROUPS[group]:
        page.goto(visit.at(name))
        figures = drawn(page)
        assert visit.wrong == [], name
        assert page.locator('.modebar-btn[data-title*="hare"], .modebar-btn[data-title*="loud"]').count() == 0, f'{name} offers to upload'
        assert not name.startswith('nbs/') or figures == stored_figures(name), name
        assert page.evaluate('document.documentElement.scrollWidth') <= 1000, f'{name} is wider than the window'
        boxes = page.evaluate(MATHS)
        assert all(w > 0 and h > 0 for w,h,_ in boxes) and not [t for *_,t in boxes if '\\' in t], name
        formulas += len(boxes)
    assert formulas > 30 or group in ('pages', 'reference')


def test_figures_follow_the_theme(visit):
    page = visit(color_scheme='light')
    page.goto(visit.at('nbs/figures/00_plots'))
    drawn(page)
    ink = 'document.querySelector(".plot")._fullLayout.font.color'
    light = page.evaluate(ink)
    page.emulate_media(color_scheme='dark')
    page.wait_for_function(f'() => {ink} !== "{light}"')
    while page.evaluate('document.body.dataset.theme') != 'light': page.locator('.theme-toggle:visible').first.click()
    page.wait_for_function(f'() => {ink} === "{light}"')
    assert visit.wrong == []


def test_search_finds_a_function(visit):
    page = visit()
    page.goto(visit.at('search') + '?q=wilson')
    page.locator('#search-results li a').first.wait_for()
    assert any('surface' in t for t in page.locator('#search-results li a').evaluate_all('all => all.map(a => a.href)')) and visit.wrong == []


def test_baked_controls_change_their_figures(visit):
    from playwright.sync_api import expect
    page, moved, keyed = visit(), [], []
    page.goto(visit.at('explorers'))
    assert drawn(page) + page.locator('.content iframe').count() > 0
    state = 'd => JSON.stringify([d._fullData.map(t => [t.visible, t.x, t.y, t.z]), d.layout.title])'
    for box in page.locator('.plot').all():
        box.scroll_into_view_if_needed()
        before = box.evaluate(state)
        rail = box.locator('.slider-rail-touch-rect').first
        if box.locator('.slider-container').count(): rail.click(position={'x': 0.6*rail.bounding_box()['width'], 'y': 5})
        elif box.locator('.updatemenu-button').count(): box.locator('.updatemenu-button').last.click()
        else: continue
        page.wait_for_function('([d, before, state]) => eval(state)(d) !== before', arg=[box.element_handle(), before, state])
        moved.append(box.get_attribute('id'))
        if box.get_attribute('role') == 'slider':
            before = box.evaluate(state)
            box.press('Home')
            page.wait_for_function('([d, before, state]) => eval(state)(d) !== before', arg=[box.element_handle(), before, state])
            expect(box).to_have_attribute('aria-valuenow', '0')
            keyed.append(box.get_attribute('id'))
    for frame in page.locator('.content iframe').all():
        frame.scroll_into_view_if_needed()
        inside = frame.content_frame
        inside.locator('.plot .main-svg, .main-svg').first.wait_for(state='attached')
        before = inside.locator('body').inner_text()
        slider = inside.locator('input[type=range]').first
        slider.press('ArrowLeft' if slider.evaluate('s => s.value === s.max') else 'ArrowRight')
        expect(inside.locator('body')).not_to_have_text(before, use_inner_text=True)
        moved.append(frame.get_attribute('title'))
    assert len(moved) >= 3 and len(keyed) >= 2
    assert visit.wrong == []
