"What a notebook may hold, and that each one runs from top to bottom where a learner would open it."
import ast, json, os, re, shutil, subprocess, sys

import pytest

from conftest import ROOT

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
every_notebook = pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(ROOT/'nbs').as_posix().removesuffix('.ipynb'))
MACHINE = re.compile(r'/(home|root|Users|tmp|work)/')


def read(path): return json.loads(path.read_text(encoding='utf-8'))
def source(cell): return ''.join(cell['source'])
def directive(cell, name): return re.search(rf'^#\|\s*{name}\b', source(cell), re.M)


def only_imports(cell):
    "Nothing but imports and comments? Magics and shell lines are not Python, so they count as code."
    try: return all(isinstance(n, (ast.Import, ast.ImportFrom)) for n in ast.parse(source(cell)).body)
    except SyntaxError: return False


def longest_run(cells):
    "What each cell begins with in the longest run of code cells without prose."
    best, run = [], []
    for c in cells:
        if c['cell_type'] == 'markdown': run = []
        elif not directive(c, 'hide') and not only_imports(c): run = [*run, re.sub(r'^#\|.*\n', '', source(c), flags=re.M)[:60]]
        best = max(best, run, key=len)
    return best


@every_notebook
def test_begins_with_title_and_subtitle(path):
    first = read(path)['cells'][0]
    assert first['cell_type'] == 'markdown' and re.match(r'# \S.*\n+> \S', source(first))


@every_notebook
def test_outputs_are_small_sound_and_anonymous(path):
    nb = read(path)
    outputs = [o for c in nb['cells'] for o in c.get('outputs', [])]
    assert len(text := json.dumps(outputs)) < 200_000
    assert not [o['evalue'] for o in outputs if o['output_type'] == 'error']
    assert 'Traceback (most recent call last)' not in text
    assert 'widget-view+json' not in text and 'widgets' not in nb['metadata']
    assert not MACHINE.findall(text)


@every_notebook
def test_sources_name_no_machine_and_hold_no_conflict(path):
    text = '\n'.join(map(source, read(path)['cells']))
    assert not MACHINE.findall(text)
    assert not re.findall(r'^`?(?:<{7}|={7}|>{7})(?![<=>]).*$', text, re.M)


@every_notebook
def test_is_clean(path):
    nb = read(path)
    ids = [c.get('id') for c in nb['cells']]
    assert all(ids) and len(ids) == len(set(ids)), 'cell ids are missing or repeated'
    assert nb['nbformat'] == 4 and nb['metadata'].keys() <= {'kernelspec'}, 'run: make export'
    assert not [c['id'] for c in nb['cells'] if c['metadata'] or c.get('execution_count')], 'run: make export'
    assert not [c['id'] for c in nb['cells'] if not source(c).strip()], 'empty cells'


@every_notebook
def test_cells_are_short(path):
    code = [source(c) for c in read(path)['cells'] if c['cell_type'] == 'code']
    lines = lambda text: len([line for line in text.splitlines() if line.strip() and not line.startswith('#|')])
    exported = lambda text: re.match(r'#\|\s*export', text)
    assert not [(n, text[:80]) for text in code if (n := lines(text)) > (45 if exported(text) else 60)]


@every_notebook
def test_prose_comes_between(path): assert len(run := longest_run(read(path)['cells'])) <= 3, run


RUN = '''
import sys
from pathlib import Path
import nbdev.test as machinery

shown = []


class Shell(machinery.CaptureShell):
    "Notes what nbdev lets pass: a figure or widget that fails while it is displayed."
    def _showtraceback(self, kind, value, stb):
        shown.append(f'{kind.__name__}: {value}')
        super()._showtraceback(kind, value, stb)


machinery.CaptureShell = Shell
passed, seconds = machinery.test_nb(Path(sys.argv[1]), skip_flags=['slow'])
sys.exit(0 if passed and not shown else '; '.join(shown) or 'failed')
'''


def run(path, folder, timeout=300):
    "Run a copy of a notebook in `folder`, with an empty cache and without data sets."
    env = {k: v for k,v in os.environ.items() if k != 'MEBQAT_DATA'} | {'MEBQAT_CACHE': str(folder/'cache')}
    (folder/'lab').mkdir()
    copy = shutil.copy(path, folder/'lab')
    return subprocess.run([sys.executable, '-c', RUN, copy], cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)


def has_exercises(path): return '<details>' in path.read_text(encoding='utf-8') and path.parent.name == 'course'


@pytest.mark.parametrize('path', [p for p in NOTEBOOKS if not has_exercises(p)], ids=lambda p: p.relative_to(ROOT/'nbs').with_suffix('').as_posix())
def test_runs_anywhere_and_leaves_nothing_behind(path, tmp_path):
    "Lessons with exercises run in test_lessons, once, with their solutions."
    done = run(path, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert [p.name for p in (tmp_path/'lab').iterdir()] == [path.name]


BROKEN = {'exception': '1/0', 'display': 'class A:\n    def _repr_html_(self): 1/0\nA()'}


@pytest.mark.parametrize('code', BROKEN.values(), ids=BROKEN)
def test_a_broken_notebook_is_noticed(code, tmp_path):
    cells = [dict(cell_type='code', id='a', metadata={}, execution_count=None, outputs=[], source=[code])]
    (tmp_path/'broken.ipynb').write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    done = run(tmp_path/'broken.ipynb', tmp_path)
    assert done.returncode == 1 and 'ZeroDivisionError' in done.stderr
