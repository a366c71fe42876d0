"Build the site: python docs/make.py [--out FOLDER] [--strict]. The pages are in FOLDER/html."
import argparse
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault('OMP_NUM_THREADS', '1')
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

from plotly.offline import get_plotlyjs  # noqa: E402
from sphinx.cmd.build import main as sphinx  # noqa: E402

import bake  # noqa: E402
import reference  # noqa: E402
import results  # noqa: E402
from mebqat.figures.html import CONFIG, KEYS, theme  # noqa: E402
from notebooks import linked, notebook_page, title  # noqa: E402

GROUPS = {'Lessons': 'course', 'Notebooks: core': '', 'Notebooks: few-shot learning': 'fewshot', 'Notebooks: bits that differ by layer': 'mixed',
          'Notebooks: figures': 'figures', 'Notebooks: explorers': 'explore', 'Notebooks: runs': 'runs', 'Notebooks: command line': 'doors'}


def contents(notebooks):
    "Notebooks grouped by their folder, lessons first."
    out = []
    folder = lambda name: 'doors' if name[0] == '9' else name.rpartition('/')[0]
    for group, home in GROUPS.items():
        lines = [f'{p.stem[:2]} · {title(p)} <nbs/{name}>' for name,p in notebooks.items() if folder(name) == home]
        if lines: out += ['```{toctree}', f':caption: "{group}"', ':hidden:', '', *lines, '```', '']
    return '\n'.join(out)


def lay_out(source):
    "Write every page and script that Sphinx is to read; the names written."
    files = [*sorted((ROOT/'nbs'/'course').glob('[0-9]*.ipynb')), *reference.in_order(ROOT/'nbs')]
    notebooks, static, written = {p.relative_to(ROOT/'nbs').as_posix().removesuffix('.ipynb'): p for p in files}, source/'_static', set()
    def put(name, text):
        (source/name).parent.mkdir(parents=True, exist_ok=True)
        written.add(name)
        if not (source/name).exists() or (source/name).read_text(encoding='utf-8') != text: (source/name).write_text(text, encoding='utf-8')
    static.mkdir(parents=True, exist_ok=True)
    put('_static/plotly.min.js', get_plotlyjs())
    colors = {'light': theme('plotly_white', '#ffffff', '#d8dee4'), 'dark': theme('plotly_dark', '#131416', '#39414a')}
    put('_static/themes.js', f'const themes = {json.dumps(colors)};\n{CONFIG}{KEYS}')
    for f in (HERE/'_static').iterdir(): put(f'_static/{f.name}', f.read_text(encoding='utf-8'))
    raw = {k: f'```{{raw}} html\n{v}\n```' for k,v in results.parts().items()}
    baked = bake.sections(static)
    fill = raw | {'contents': contents(notebooks), 'first explorer': re.sub(r'height:\d+px', 'height:790px', next(iter(baked.values()))),
                  'explorers': '\n'.join(f'## {name}\n\n{text}' for name,text in baked.items())}
    numbers = {reference.number(name): f'nbs/{name}' for name in notebooks}
    for page in sorted(HERE.glob('*.md')):
        put(page.name, re.sub(r'^\{\{(.+?)\}\}$', lambda m: fill[m[1]], linked(page.read_text(encoding='utf-8'), numbers), flags=re.M))
    for picture in HERE.glob('*.png'):
        shutil.copy(picture, source)
        written.add(picture.name)
    for name, text in reference.pages(ROOT).items(): put(f'reference/{name}', text)
    for name,p in notebooks.items():
        around = {k: os.path.relpath(v, f'nbs/{name}/..').replace(os.sep, '/') for k,v in numbers.items() if v != f'nbs/{name}'}
        put(f'nbs/{name}.ipynb', notebook_page(p, around))
    for old in source.rglob('*'):
        if old.is_file() and (name := old.relative_to(source).as_posix()) not in written and not name.startswith('_static/baked/'): old.unlink()


def main():
    cli = argparse.ArgumentParser(description='Build the site, without a network and for use without one.')
    cli.add_argument('--out', type=Path, default=HERE/'_build', help='folder for source, cache and html')
    cli.add_argument('--strict', action='store_true', help='a warning is an error')
    cli.add_argument('--jobs', type=int, default=2, help='processes')
    said, start = cli.parse_args(), time.perf_counter()
    source, html = said.out/'source', said.out/'html'
    lay_out(source)
    code = sphinx(['-q', '-j', str(said.jobs), '-c', str(HERE), '-d', str(said.out/'cache'), '-D', f'html_static_path={source/"_static"}',
                   *(['-W', '--keep-going'] if said.strict else []), str(source), str(html)])
    if code == 0: print(f'{html/"index.html"} is ready ({time.perf_counter() - start:.0f} s); it needs no network')
    sys.exit(code)


if __name__ == '__main__': main()
