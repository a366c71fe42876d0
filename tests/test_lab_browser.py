"What a reader does, in a real browser: JupyterLab with the tour, the explorer as an app, a panel whose kernel is gone."
import json, os, re, signal, socket, subprocess, sys, time
from contextlib import contextmanager

import pytest

from mebqat.bits import FP, FULL, Bits
from mebqat.files import shipped
from mebqat.figures.predictions import load_explorations
from mebqat.explore.surface_figures import confusion_cells
from mebqat.explore.panels import GONE
from mebqat.launch import START, TOUR, free_port

for needed in ('jupyterlab', 'voila', 'anywidget'): pytest.importorskip(needed, reason=f"{needed} is not installed; get it with: pip install 'mebqat[dev]'")
api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')

LONG = 120_000  # a loaded machine takes its time; nothing here waits longer than it must
TOKEN = 'a-token-of-this-test'
LATE = '[anywidget] Failed to initialize model.'  # said on a slow machine; a LiveFigure follows all the same, see the test of it


def answers(port):
    with socket.socket() as s: return s.connect_ex(('127.0.0.1', port)) == 0


@contextmanager
def served(folder, *command, ready):
    "A server of the command line in `folder`, with settings of its own; killed in the end. Gives what it said up to `ready`, a pattern."
    own = {f'JUPYTER{k}': str(folder/'jupyter'/k.lower()) for k in ('_CONFIG_DIR', '_DATA_DIR', 'LAB_SETTINGS_DIR', 'LAB_WORKSPACES_DIR')}
    quiet = folder/'jupyter'/'lab_settings_dir'/'@jupyterlab'/'apputils-extension'
    quiet.mkdir(parents=True)
    (folder/'tmp').mkdir(exist_ok=True)
    (quiet/'notification.jupyterlab-settings').write_text('{"fetchNews": "false", "checkForUpdates": false}')
    with open(folder/'log', 'wb') as log:
        child = subprocess.Popen([sys.executable, '-m', 'mebqat.cli', *map(str, command)], cwd=folder, env=os.environ | own | {'TMPDIR': str(folder/'tmp')}, stdout=log, stderr=log, start_new_session=True,
                                 preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a suite started in the background hears no Ctrl-C, and its children neither
    try:
        end = time.monotonic() + LONG/1000
        while not (found := re.search(ready, (folder/'log').read_text(errors='replace'))):
            assert child.poll() is None and time.monotonic() < end, (folder/'log').read_text(errors='replace')
            time.sleep(.1)
        yield child, found
    finally:
        if child.poll() is None: os.killpg(child.pid, signal.SIGINT)
        try: child.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)
            try: child.wait(20)
            except subprocess.TimeoutExpired: os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def watched(context):
    "A page, and a list of the errors in it."
    page, wrong = context.new_page(), []
    page.set_default_timeout(LONG)
    page.on('pageerror', lambda e: wrong.append(str(e)) if str(e) != LATE else None)
    return page, wrong


FOUND = load_explorations(shipped('digits_exploration.safetensors'))['MEBQAT']
WIDTHS = [2, 3, 4, 5, 6, 7, 8, FULL]


# The explorer's figures by what they hold: the map with the chosen pair's frame around a cell, and the confusion matrix.
SEEN = '''() => {
    const all = [...document.querySelectorAll('.mebqat-panel .js-plotly-plot')].slice(0, 3).filter(d => d.data?.[0]?.type === 'heatmap');
    const frame = d => d.layout.shapes?.find(s => s.name === 'chosen pair'), map = all.find(frame), confusion = all.find(d => d !== map);
    if (!map || !confusion) return null;
    const {x0, x1, y0, y1} = frame(map), [x, y] = [(x0 + x1)/2, (y0 + y1)/2].map(Math.round);
    return {x, y, z: map.data[0].z[y][x], said: confusion.data[0].hovertext};
}'''


def shows(page, bits):
    "Wait until the explorer frames a pair, and its map and confusion matrix hold what the library computes for it."
    want = dict(x=WIDTHS.index(bits.a), y=WIDTHS.index(bits.w), z=FOUND.at(bits).accuracy, said=confusion_cells(FOUND.confusion(bits), FOUND.classes)['hovertext'])
    try: page.wait_for_function(f'want => {{ const seen = ({SEEN})(); return seen && Object.keys(want).every(k => JSON.stringify(seen[k]) === JSON.stringify(want[k])) }}', arg=want)
    except api.TimeoutError: assert page.evaluate(SEEN) == want


def handle(page, name): return page.locator('.mebqat-panel').first.locator('.widget-slider', has_text=name).first.locator('.noUi-handle')


def drag(page, knob, share):
    "Drag a slider's knob to a share of its track, as a hand does."
    knob.scroll_into_view_if_needed()
    box, track = knob.bounding_box(), knob.locator('xpath=ancestor::*[contains(@class, "noUi-target")]').bounding_box()
    page.mouse.move(box['x'] + box['width']/2, box['y'] + box['height']/2)
    page.mouse.down()
    page.mouse.move(track['x'] + share*track['width'], box['y'] + box['height']/2, steps=8)
    page.mouse.up()


@pytest.fixture(scope='module')
def lab(browser, tmp_path_factory):
    "JupyterLab as `mebqat lab` starts it, from its first page to the tour, every cell run; the page and its errors."
    folder, port = tmp_path_factory.mktemp('lab'), free_port(None)
    options = ('--no-browser', f'--IdentityProvider.token={TOKEN}', *(['--allow-root'] if hasattr(os, 'geteuid') and os.geteuid() == 0 else []))
    with served(folder, 'lab', 'mine', '--port', port, *options, ready=rf'http://127\.0\.0\.1:{port}/lab/tree/{START}\?token='):
        page, wrong = watched(browser.new_context(viewport=dict(width=1300, height=1000)))
        assert page.request.get(f'http://127.0.0.1:{port}/api/contents').status == 403
        page.goto(f'http://127.0.0.1:{port}/?token={TOKEN}')
        cards = page.locator('.jp-RenderedMarkdown td a')  # the tour, eleven lessons, a reader's own data
        api.expect(cards).to_have_count(13, timeout=LONG)
        cards.first.click()
        page.wait_for_url(f'**/{TOUR}*')
        page.get_by_text('| Idle').wait_for()
        page.locator('.jp-Notebook:visible .jp-CodeCell').first.wait_for()
        page.get_by_role('menuitem', name='Run', exact=True).click()
        page.get_by_text('Run All Cells', exact=True).click()
        page.wait_for_function('() => [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].every(p => /\\d/.test(p.textContent))')
        yield page, wrong, folder/'mine'
        page.context.close()


def test_the_tour_runs_and_its_explorer_follows_mouse_keys_and_clicks(lab, click_plot):
    page, wrong, _ = lab
    assert TOUR in page.url and page.locator('.jp-OutputArea', has_text='Traceback').count() == 0
    assert not [t for t in page.locator('.modebar-btn').evaluate_all('all => all.map(b => b.dataset.title)') if re.search('share|cloud', t, re.I)]
    shows(page, FP)
    drag(page, handle(page, 'weight bits'), 0)
    shows(page, Bits(2, 8))
    handle(page, 'activation bits').focus()
    for bits in (Bits(2, 7), Bits(2, 6)):
        page.keyboard.press('ArrowLeft')
        shows(page, bits)
    plot = page.locator('.mebqat-panel').first.locator('.js-plotly-plot').first
    cell = 'd => { const l = d._fullLayout, b = d.getBoundingClientRect(); return [b.left + l.xaxis._offset + l.xaxis.c2p(2), b.top + l.yaxis._offset + l.yaxis.c2p(4)] }'
    click_plot(plot, cell, f'() => {{ const seen = ({SEEN})(); return seen && seen.x === 2 && seen.y === 4 }}')
    shows(page, Bits(6, 4))
    assert wrong == []


TRAINS = '''from mebqat.explore.monitor import TrainingMonitor
from mebqat.runs import spec_of, train_run

monitor = TrainingMonitor('a long training')
monitor.run(lambda on_row, stop: train_run(spec_of('mebqat', width=4, epochs=2000), 'long', on_row=on_row, stop=stop))
monitor'''


def test_stop_ends_a_training_in_the_background_and_saves(lab):
    page, _, folder = lab
    cell = dict(cell_type='code', id='train', metadata={}, execution_count=None, outputs=[], source=TRAINS)
    (folder/'stop.ipynb').write_text(json.dumps(dict(cells=[cell], metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')), nbformat=4, nbformat_minor=5)))
    own = page.context.new_page()
    own.set_default_timeout(LONG)
    own.goto(page.url.partition('/lab')[0] + '/lab/workspaces/stop/tree/stop.ipynb')
    own.get_by_text('| Idle').wait_for()
    own.get_by_role('menuitem', name='Run', exact=True).click()
    own.get_by_text('Run All Cells', exact=True).click()
    panel = own.locator('.mebqat-panel')
    panel.get_by_text(re.compile(r'running · step [1-9]')).wait_for()
    panel.get_by_role('button', name='Stop and save').click()
    panel.get_by_text('go on with resume').wait_for()
    step = int(re.search(r'stopped after step (\d+) of', panel.inner_text())[1])
    assert step > 0 and (folder/'long'/'checkpoint.safetensors').exists() and not (folder/'long'/'model.safetensors').exists()
    own.close()


def test_a_panel_says_that_its_kernel_is_gone(lab):
    page, wrong, _ = lab
    page.get_by_role('menuitem', name='Kernel', exact=True).click()
    page.get_by_text('Shut Down Kernel', exact=True).click()
    page.wait_for_function('said => getComputedStyle(document.querySelector(".mebqat-panel"), "::before").content.includes(said)', arg=GONE)
    assert wrong == []


def test_figures_follow_on_a_machine_that_is_too_slow_for_anywidget(browser, tmp_path):
    "anywidget gives a widget two seconds to get ready and then drops its messages; here it gives one millisecond."
    with served(tmp_path, 'explore', 'digits_exploration', '--no-open', '--port', free_port(None), ready=r'http://\S+') as (_, found):
        page, wrong = watched(browser.new_context(viewport=dict(width=1000, height=1000)))
        late = []
        page.on('pageerror', lambda e: late.append(str(e)))
        page.add_init_script('const given = AbortSignal.timeout; AbortSignal.timeout = ms => given.call(AbortSignal, ms === 2000 ? 1 : ms)')
        page.goto(found[0])
        shows(page, FP)
        for key,bits in (('Home', Bits(2, 8)), ('ArrowRight', Bits(3, 8))):
            handle(page, 'weight bits').press(key)
            shows(page, bits)
        assert {*late} == {LATE} and wrong == []
        page.context.close()


def test_explore_serves_the_explorer_and_puts_everything_away(browser, tmp_path):
    port = free_port(None)
    with served(tmp_path, 'explore', 'digits_exploration', '--no-open', '--port', port, ready=r'http://\S+') as (child, found):
        page, wrong = watched(browser.new_context(viewport=dict(width=1000, height=1000)))
        requests = []
        page.on('request', lambda r: requests.append(r.url))
        assert '/login' in page.request.get(f'http://127.0.0.1:{port}/').url
        page.goto(found[0])
        shows(page, FP)
        handle(page, 'weight bits').focus()
        page.keyboard.press('ArrowLeft')
        shows(page, Bits(8, 8))
        drag(page, handle(page, 'activation bits'), 0)
        shows(page, Bits(8, 2))
        home = (f'http://127.0.0.1:{port}/', f'ws://127.0.0.1:{port}/', 'data:', 'blob:')
        assert len(requests) > 10 and not [url for url in requests if not url.startswith(home)]
        star = page.locator('i.fa-star').first  # its picture comes from Voila's own scripts
        assert star.bounding_box()['width'] > 5 and 'Awesome' in star.evaluate("i => getComputedStyle(i, ':before').fontFamily")
        assert page.locator('.modebar-btn', has_text=re.compile('share|cloud', re.I)).count() == 0
        assert wrong == [] and len(list((tmp_path/'tmp').glob('mebqat-*'))) == 1
        page.context.close()
        os.kill(child.pid, signal.SIGINT)
        assert child.wait(60) == 0
    assert not list((tmp_path/'tmp').glob('mebqat-*')) and not answers(port)
