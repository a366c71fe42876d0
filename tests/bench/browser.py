"From a slider's move to the redrawn figure, measured in a headless chromium: the shipped explorer as `mebqat explore` serves it, and the shipped network asked live."
import json, os, secrets, shutil, subprocess, sys, time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_lab_browser import LONG, handle, served
from mebqat.launch import app_folder, free_port

ABOUT = 'python tests/bench/browser.py FILE: milliseconds from the key that moves a slider to the redrawn map, headless chromium 1000 pixels wide, voila, two CPU cores for browser, server and kernel together; load is that of the last minute'
BUDGET = {'precomputed': 100, 'live': 1000}  # ms
# Time from the key that moves the slider to plotly's word that the map is drawn with its frame at the new place, and one frame on screen.
WATCH = '''() => {
    const map = [...document.querySelectorAll('.mebqat-panel .js-plotly-plot')].find(d => d.data[0].type === 'heatmap' && d.layout.shapes?.length);
    window.times = [];
    let asked = 0, before = null;
    const place = () => JSON.stringify(map.layout.shapes);
    document.addEventListener('keydown', () => { asked = performance.now(); before = place(); }, true);
    map.on('plotly_afterplot', () => { if (asked && place() !== before) { const start = asked; asked = 0; requestAnimationFrame(() => window.times.push(performance.now() - start)); } });
}'''
LIVE = '''from mebqat.bits import Bits, BitSpace
from mebqat.files import shipped
from mebqat.figures.predictions import live_answers
from mebqat.explore.surface_explorer import SurfaceExplorer
from mebqat.runs import open_run

run = open_run(shipped('digits_mebqat.safetensors'))
SurfaceExplorer.live(space=BitSpace.grid(range(2, 9), range(2, 9)), value=Bits(8, 8), **live_answers(run.model, run.pool(), run.pool('train')))'''


@contextmanager
def live(folder):
    "A page that asks the network, served by voila; its address."
    port, token = free_port(None), secrets.token_urlsafe(8)
    app_folder(folder, Path('unused'), 'live', token)
    page = json.loads((folder/'explorer.ipynb').read_text())
    page['cells'][0]['source'] = LIVE
    (folder/'explorer.ipynb').write_text(json.dumps(page))
    child = subprocess.Popen([sys.executable, '-m', 'voila', 'explorer.ipynb', f'--port={port}'], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        time.sleep(5)
        yield f'http://127.0.0.1:{port}/?token={token}'
    finally:
        child.terminate()
        child.wait()


def measured(browser, address, moves, rest):
    "Milliseconds of each move, the slider at 8 to begin with; `rest` between the picture and the next key."
    page = browser.new_page(viewport=dict(width=1000, height=1000))
    page.set_default_timeout(LONG)
    page.goto(address)
    handle(page, 'activation bits').wait_for()
    page.wait_for_function('() => [...document.querySelectorAll(".mebqat-panel .js-plotly-plot")].some(d => d.layout?.shapes?.length && d._fullLayout)')
    page.wait_for_timeout(3000)
    page.evaluate(WATCH)
    knob, keys = handle(page, 'activation bits'), ['ArrowLeft']*6 + ['ArrowRight']*6
    for i in range(moves):
        knob.press(keys[i % 12])
        page.wait_for_function('n => window.times.length > n', arg=i)
        page.wait_for_timeout(rest)
    times = page.evaluate('window.times')
    page.close()
    return times


def told(what, kind, times):
    times, n = sorted(times), len(times)
    row = {'bench': what, 'moves': n, 'median ms': round(median(times), 1), 'p90 ms': round(times[int(.9*n)], 1), 'worst ms': round(times[-1], 1),
                      'budget ms': BUDGET[kind], 'within': round(sum(t <= BUDGET[kind] for t in times)/n, 3), 'load': round(os.getloadavg()[0], 1)}
    print(json.dumps(row))
    return row


def main(out:str|None=None, moves:int=24):
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
    with TemporaryDirectory() as a, TemporaryDirectory() as b, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        with served(Path(a), 'explore', 'digits_exploration', '--no-open', '--port', free_port(None), ready=r'http://\S+') as (_, found):
            rows = [told(f'precomputed explorer, {what}', 'precomputed', measured(browser, found[0], moves, rest)) for what,rest in (('one move after another', 0), ('moves half a second apart', 500))]
        with live(Path(b)) as address: rows.append(told('live explorer, 540 digits, each pair for the first time', 'live', measured(browser, address, 6, 500)))
        browser.close()
    if out: Path(out).write_text(json.dumps({'about': ABOUT, 'rows': rows}, indent=1) + '\n')


if __name__ == '__main__': main(*sys.argv[1:2])
