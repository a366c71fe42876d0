"Pictures of the explorers for pages that cannot move: python docs/pictures.py. Needs chromium (or CHROMIUM, its path) and playwright."
import os
import shutil
import sys
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import sync_playwright

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from bake import few_shot, quantizer_lab, surface  # noqa: E402

PICTURES = {'explorer': surface, 'quantizerlab': quantizer_lab, 'playground': few_shot}
WIDTH, COLORS = 1000, 128  # pixels; colours of the palette


def page_of(made): return made if isinstance(made, str) else made.to_html(include_plotlyjs=True, auto_play=False, config=dict(displayModeBar=False))


def small(shot, path):
    "A palette keeps a picture of a page at tens of kilobytes."
    Image.open(BytesIO(shot)).convert('RGB').quantize(COLORS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f'{path.name}: {path.stat().st_size/1000:.0f} kB')


def main():
    path = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None: sys.exit('no chromium here; on Debian: apt-get install chromium, elsewhere set CHROMIUM to its path')
    with TemporaryDirectory() as folder, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=['--no-sandbox'])
        page = browser.new_context(offline=True, color_scheme='light', viewport=dict(width=WIDTH, height=700)).new_page()
        for name, make in PICTURES.items():
            file = Path(folder)/f'{name}.html'
            file.write_text(page_of(make()), encoding='utf-8')
            page.goto(file.as_uri())
            page.wait_for_selector('.js-plotly-plot .main-svg')
            page.wait_for_timeout(2000)
            small(page.screenshot(full_page=True), HERE/f'{name}.png')
        browser.close()


if __name__ == '__main__': main()
