"From a slider's move to the redrawn figure, measured in the browser: the shipped explorer, served by `mebqat explore`, in a headless chromium."
import json, os, shutil, sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from playwright.sync_api import sync_playwright

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_lab_browser import LONG, free_port, handle, served, shows
from mebqat.bits import FULL, Bits

BUDGET = 100  # ms, for a precomputed view
# Time from the key that moves the slider to plotly's word that the map is drawn with its frame at the new place, and one frame on screen.
WATCH = '''() => {
    const map = [...document.querySelectorAll('.mebqat-panel .js-plotly-plot')].find(d => d.data[0].type === 'heatmap' && d.layout.shapes?.length);
    window.times = [];
    let asked = 0, before = null;
    const place = () => JSON.stringify(map.layout.shapes);
    document.addEventListener('keydown', () => { asked = performance.now(); before = place(); }, true);
    map.on('plotly_afterplot', () => { if (asked && place() !== before) { const start = asked; asked = 0; requestAnimationFrame(() => window.times.push(performance.now() - start)); } });
}'''


def main(moves:int=24):
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))))
    with TemporaryDirectory() as folder, sync_playwright() as p, served(Path(folder), 'explore', 'digits_exploration', '--no-open', '--port', free_port(None), ready=r'http://\S+') as (_, found):
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        page = browser.new_page(viewport=dict(width=1000, height=1000))
        page.set_default_timeout(LONG)
        page.goto(found[0])
        shows(page, Bits(FULL, FULL))
        handle(page, 'weight bits').focus()
        page.keyboard.press('ArrowLeft')
        shows(page, Bits(8, 8))
        page.evaluate(WATCH)
        keys = ['ArrowLeft']*6 + ['ArrowRight']*6
        for i in range(moves):
            page.keyboard.press(keys[i % 12])
            page.wait_for_function('n => window.times.length > n', arg=i)
        times = sorted(page.evaluate('window.times'))
        browser.close()
    print(json.dumps({'bench': 'slider move to redrawn figure, precomputed explorer', 'moves': moves, 'median ms': round(median(times), 1), 'p90 ms': round(times[int(.9*moves)], 1),
                      'worst ms': round(times[-1], 1), 'budget ms': BUDGET, 'within': sum(t <= BUDGET for t in times)/moves, 'load': round(os.getloadavg()[0], 1)}))


if __name__ == '__main__': main()
