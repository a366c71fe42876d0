"What the notebooks cannot check about themselves: the modules made from them, and the repository around them."
import ast, json, os, re, shutil, subprocess, sys
from configparser import ConfigParser

import pytest

from conftest import ROOT, copy_source, git_files, source_files

NOTEBOOKS = sorted(p for p in (ROOT/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
MODULES = sorted(p for p in (ROOT/'mebqat').rglob('*.py') if not p.name.startswith('_') or p.name == '__init__.py' and '__all__' in p.read_text(encoding='utf-8'))
TOP = {'settings.ini', 'setup.py', 'README.md', 'Makefile', 'LICENSE', 'CHANGELOG.md', '.gitignore', '.gitattributes', '.ci',
       'nbs', 'mebqat', 'tests', 'data', 'docs'}
# What a module must not lead to, directly or through others.
BARRED = {'data': {'bits', 'kernels', 'steps', 'quantizers', 'layers'}, 'models': {'bits', 'kernels', 'steps', 'quantizers', 'layers'}, 'train': {'methods', 'evaluate'}, 'episodes': {'bits', 'kernels', 'steps', 'quantizers', 'layers'},
          'mixed.front': {'layers', 'models', 'quantizers'}, 'mixed.searches': {'layers', 'models', 'quantizers'}, 'explore': {'layers', 'models', 'quantizers'}, 'figures.pages': {'layers', 'models', 'quantizers'},
          'figures.front': {'layers', 'models', 'quantizers', 'cost'}}
# The floor of each folder, from the ground up; '' is the core. Nobody above them imports the explorers.
FLOORS, LEAVES = {'': 1, 'fewshot': 2, 'mixed': 2, 'figures': 3, 'explore': 4, 'runs': 5, 'doors': 6}, {'explore'}
EXTRAS = ('ipywidgets', 'anywidget', 'voila', 'jupyterlab', 'nbformat', 'scipy', 'onnx', 'onnxruntime')


def name_of(path):
    "A file of the package as the module's name, without `mebqat.`."
    return '.'.join(path.relative_to(ROOT/'mebqat').with_suffix('').parts).removesuffix('.__init__')


by_name = name_of


def target(notebook):
    "The module that a notebook exports, or None for a lesson."
    sources = (''.join(c['source']) for c in json.loads(notebook.read_text(encoding='utf-8'))['cells'])
    return next((m[1].removesuffix('.__init__') for s in sources if (m := re.search(r'^#\|\s*default_exp\s+(\S+)', s, re.M))), None)


ORDER = {target(p): p.relative_to(ROOT/'nbs') for p in NOTEBOOKS if target(p)}


def folder_of(name):
    "Where the notebook of a module lies; the command line and what it launches are the doors."
    home = ORDER[name].parent.as_posix().replace('.', '')
    return 'doors' if not home and ORDER[name].name > '9' else home


def path_of(name):
    plain = ROOT/'mebqat'/(name.replace('.', '/') + '.py')
    return plain if plain.exists() else ROOT/'mebqat'/name.replace('.', '/')/'__init__.py'


def imports(name):
    "The mebqat modules that a module names in its imports, wherever they stand."
    found, path = set(), path_of(name)
    here = ('mebqat', *path.relative_to(ROOT/'mebqat').parent.parts)
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.ImportFrom):
            full = '.'.join([*here[:len(here) - n.level + 1]]*(n.level > 0) + [n.module]*bool(n.module))
            found |= {full, *(f'{full}.{a.name}' for a in n.names)}
        elif isinstance(n, ast.Import): found |= {a.name for a in n.names}
    return {f.removeprefix('mebqat.') for f in found} & ORDER.keys() - {name}


def reach(name, seen=()):
    "Everything that a module's imports lead to."
    new = imports(name) - set(seen)
    return new.union(*(reach(d, {*seen, *new}) for d in new))


def test_imports_finds_every_form(monkeypatch, tmp_path):
    (tmp_path/'mebqat'/'w').mkdir(parents=True)
    (tmp_path/'mebqat'/'w'/'x.py').write_text('from ..a import p\nfrom .. import b\ndef f():\n    from mebqat.c import q\n    from mebqat import d\n'
                                              '    import mebqat.e, os\nfrom torch import bits\nimport a\nfrom .y import z\nfrom . import v')
    monkeypatch.setitem(globals(), 'ROOT', tmp_path)
    monkeypatch.setitem(globals(), 'ORDER', dict.fromkeys([*'abcde', 'w.y', 'w.v', 'w.x', 'bits'], ''))
    assert imports('w.x') == {*'abcde', 'w.y', 'w.v'}


@pytest.mark.parametrize('module', MODULES, ids=by_name)
def test_every_module_has_its_notebook(module): assert name_of(module) in ORDER


def test_every_notebook_has_its_module_and_a_number():
    assert not ORDER.keys() - {name_of(m) for m in MODULES}
    assert all(re.match(r'\d\d_', p.name) for p in NOTEBOOKS)
    assert len(ORDER) == sum(target(p) is not None for p in NOTEBOOKS), 'two notebooks export the same module'
    assert len({(p.parent, p.name[:2]) for p in NOTEBOOKS}) == len(NOTEBOOKS), 'two notebooks of a folder share a number'
    assert {p.parent.name for p in NOTEBOOKS if target(p) is None} == {'course'} and not [p for p in NOTEBOOKS if p.parent.name == 'course' and target(p)]


def test_a_module_lies_where_its_notebook_does():
    assert not [n for n,nb in ORDER.items() if nb.parent.as_posix().replace('.', '') != (n if path_of(n).name == '__init__.py' else n.rpartition('.')[0])]


@pytest.mark.parametrize('module', MODULES, ids=by_name)
def test_imports_point_to_lower_floors_and_lower_numbers(module):
    name, here = name_of(module), folder_of(name_of(module))
    allowed = lambda d, there: ORDER[d].name < ORDER[name].name if there == here else FLOORS[there] < FLOORS[here] and there not in LEAVES
    assert not [d for d in imports(name) if not allowed(d, folder_of(d))]


def test_only_the_explorers_need_the_extras(tmp_path):
    "Each module in turn, in one interpreter that has none of them."
    names = [f'mebqat.{n}' for n in ORDER if folder_of(n) != 'explore']
    code = f'import sys, importlib\nfor n in {EXTRAS}: sys.modules[n] = None\nfor n in {names}: importlib.import_module(n)'
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize('name', sorted(BARRED.keys() & ORDER.keys()))
def test_layers_that_must_not_meet(name): assert not reach(name) & BARRED[name]


FRESH = '''
import importlib, os, sys, traceback
import ipywidgets, pandas, plotly.graph_objects, rich.console, torch, typer  # what takes the time, loaded once
assert not [m for m in sys.modules if m.split('.')[0] == 'mebqat']
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try: print(name, importlib.import_module('mebqat.' + name).__file__, flush=True)
        except BaseException: print(name, traceback.format_exc().splitlines()[-1], flush=True)
        os._exit(0)
    os.waitpid(child, 0)
'''


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_each_module_imports_first(tmp_path):
    "Alone, each in a process that has loaded no other module of the package."
    names = [name_of(m) for m in MODULES]
    done = subprocess.run([sys.executable, '-c', FRESH, *names], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f'{name} {m}' for name,m in zip(names, MODULES)], done.stderr


@pytest.mark.parametrize('module', MODULES, ids=by_name)
def test_runtime_needs_no_development_tools(module):
    tops = {a.name.split('.')[0] for n in ast.walk(ast.parse(module.read_text(encoding='utf-8'))) if isinstance(n, ast.Import) for a in n.names}
    tops |= {n.module.split('.')[0] for n in ast.walk(ast.parse(module.read_text(encoding='utf-8'))) if isinstance(n, ast.ImportFrom) and n.module and not n.level}
    assert not tops & {'nbdev', 'execnb', 'pytest'}


@pytest.mark.parametrize('module', MODULES, ids=by_name)
def test_module_is_finished(module):
    text = module.read_text(encoding='utf-8')
    assert not re.search(r'\b(TODO|FIXME|XXX|NotImplementedError)\b', text)
    assert not [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.ImportFrom) and any(a.name == '*' for a in n.names)]


def test_ruff_finds_no_undefined_or_unused_names():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--no-cache', '--select', 'F', 'mebqat'], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_modules_are_what_the_notebooks_export(tmp_path):
    source_tree = copy_source(tmp_path/'tree')
    env = {k: v for k,v in os.environ.items() if k not in ('IN_TEST', 'PYTHONPATH')}
    before = sorted(p.name for p in source_tree.iterdir())
    shutil.rmtree(source_tree/'mebqat')
    (source_tree/'mebqat').mkdir()
    shutil.copy(ROOT/'mebqat'/'__init__.py', source_tree/'mebqat')
    done = subprocess.run([sys.executable, '-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()'],
                          cwd=source_tree, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made, here = ({p.relative_to(t).as_posix(): p.read_text(encoding='utf-8') for p in (t/'mebqat').rglob('*.py')} for t in (source_tree, ROOT))
    assert sorted(made) == sorted(here), 'run: make export'
    assert not [f for f in made if made[f] != here[f]], 'run: make export'
    assert sorted(p.name for p in source_tree.iterdir()) == before, 'the export writes beside mebqat/'


def test_import_is_quick_and_leaves_torch_alone(tmp_path):
    code = ('import sys, time; t = time.perf_counter(); import mebqat; t = time.perf_counter() - t\n'
            'print(t, *sorted({"torch", "numpy", "pandas", "plotly"} & sys.modules.keys()))')
    runs = [subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert [r[1:] for r in runs] == [[]]*3
    assert min(float(r[0]) for r in runs) < .1


@pytest.mark.parametrize('command', [[], ['train'], ['search']], ids=' '.join)
def test_help_waits_for_nothing_heavy(command, tmp_path):
    code = (f'import sys; sys.argv = ["mebqat", *{command}, "--help"]\nfrom mebqat.cli import main\ntry: main()\nexcept SystemExit: pass\n'
            'print(*sorted({"torch", "numpy", "pandas", "plotly"} & sys.modules.keys()), file=sys.stderr)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert 'Usage' in done.stdout and done.stderr.split() == []


def test_requirements_and_version_stand_in_settings_alone():
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    version = re.search(r'^__version__ = "(.+)"$', (ROOT/'mebqat'/'__init__.py').read_text(encoding='utf-8'), re.M)[1]
    assert version == cfg['DEFAULT']['version']
    assert f'## [{version}]' in (ROOT/'CHANGELOG.md').read_text(encoding='utf-8')
    other = r'(.*requirements.*\.(txt|in)|pyproject\.toml|setup\.cfg|Pipfile.*|environment\.ya?ml|poetry\.lock|uv\.lock|tox\.ini)'
    assert not [str(f) for f in source_files() if re.fullmatch(other, f.name)]


def test_top_level_holds_what_the_layout_says():
    tracked = git_files()
    if tracked is None: pytest.skip('no git checkout here, so nothing says which files are tracked')
    assert {f.parts[0] for f in tracked} == TOP




CELLS = [(p, c) for p in NOTEBOOKS for c in json.loads(p.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
INDEXES = {'explore', 'runs', 'runs.method_table'}  # they give names of others a second address


def test_lines_of_code_are_short():
    "Written by hand in a notebook; what nbdev adds is its own."
    wide = [(p.name, c['id'], line) for p,c in CELLS for line in ''.join(c['source']).splitlines() if len(line) > 120]
    assert not wide, wide[:5]


def test_no_public_name_is_defined_twice():
    homes = {}
    for module in MODULES:
        name = name_of(module)
        text = module.read_text(encoding='utf-8')
        exported = re.search(r'^__all__ = (\[.*?\])', text, re.M | re.S)
        for k in {*ast.literal_eval(exported[1])} - {'main'} if exported and name not in INDEXES else (): homes.setdefault(k, []).append(name)
    assert homes and not {k: v for k,v in homes.items() if len(v) > 1}


@pytest.mark.parametrize('module', MODULES, ids=by_name)
def test_names_say_what_they_hold(module):
    words = {'said', 'seen', 'told', 'own', 'mine', 'theirs', 'asked'}
    def given(n):
        if isinstance(n, (ast.Name, ast.Attribute)) and isinstance(n.ctx, ast.Store): return getattr(n, 'id', None) or n.attr
        return getattr(n, 'arg', None) if isinstance(n, ast.arg) else getattr(n, 'name', None) if isinstance(n, (ast.FunctionDef, ast.ClassDef)) else None
    assert not [n.lineno for n in ast.walk(ast.parse(module.read_text(encoding='utf-8'))) if given(n) in words]


def test_only_registered_methods_have_names():
    "Nothing but their own classes, the demo that chooses some, and examples knows methods by name."
    names = {c.name for c in __import__('mebqat.runs.method_table', fromlist=['METHODS']).METHODS.values()} - {'float'}
    may = {'runs.image_methods', 'runs.few_shot_methods', 'methods', 'fewshot.methods', 'mixed.adaqat', 'mixed.fracbits', 'mixed.metaquantnet', 'mixed.double_rounding', 'demo'}
    def compared(n): return [c.value for c in [n.left, *n.comparators] if isinstance(c, ast.Constant)] if isinstance(n, ast.Compare) else []
    found = {name_of(m): [v for n in ast.walk(ast.parse(m.read_text(encoding='utf-8'))) for v in compared(n) if isinstance(v, str) and v in names] for m in MODULES}
    assert not {k: v for k,v in found.items() if v and k not in may}
