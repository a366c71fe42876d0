"What every test may rely on: the tree under test, one thread a process, and what this machine has."
import os, shutil, subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Two workers share two cores: one thread each, set before anything imports torch and passed on to child processes.
os.environ |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
# Child processes import this tree, wherever they run and whatever is installed.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


def git_files(*options):
    "What `git ls-files` prints, or None where there is no git or no checkout."
    if not (ROOT/'.git').exists() or not shutil.which('git'): return None
    done = subprocess.run(['git', '-c', f'safe.directory={ROOT}', 'ls-files', '-z', *options], cwd=ROOT, capture_output=True, text=True)
    return [Path(f) for f in done.stdout.split('\0') if f] if done.returncode == 0 else None


def source_files():
    "Files that belong to the repository, committed or not, relative to the root."
    files = git_files('--cached', '--others', '--exclude-standard')
    if files is None:
        rules = [line.strip('/') for line in (ROOT/'.gitignore').read_text(encoding='utf-8').split()] + ['.git']
        files = [f for p in ROOT.rglob('*') for f in [p.relative_to(ROOT)]
                 if not any(fnmatch(part, r) for r in rules for part in (*f.parts, *map(str, f.parents)))]
    return sorted(f for f in files if (ROOT/f).is_file())


def copy_source(folder):
    "A private copy of the repository's own files in `folder`."
    for f in source_files():
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, folder/f)
    return folder


@pytest.fixture(scope='session')
def data_root():
    "Folder with omniglot.zip, miniimagenet.zip, cifar10.zip."
    folder = Path(os.environ.get('MEBQAT_DATA') or ROOT.parent/'shared'/'data')
    if not folder.is_dir(): pytest.skip('no data sets here; set MEBQAT_DATA to the folder that holds omniglot.zip')
    return folder


@pytest.fixture(scope='session')
def chromium():
    "Path of a Chromium-like browser."
    found = os.environ.get('CHROMIUM') or next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    return found or pytest.skip('no chromium here; on Debian: apt-get install chromium, elsewhere set CHROMIUM to its path')


@pytest.fixture(scope='module')
def browser(chromium):
    "A headless browser, closed with the module: its event loop would be in the way of others."
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    with api.sync_playwright() as p:
        b = p.chromium.launch(executable_path=chromium, args=['--no-sandbox'])
        yield b
        b.close()


@pytest.fixture(scope='session')
def click_plot():
    "Click into a plotly figure."
    def click(figure, place, took, arg=None):
        """Press where the script `place` (figure, arg) -> [x, y] says, and once more while the condition `took` (arg) does not hold in the page.

        plotly hears a press only under a pointer that it has seen, and forgets the pointer with every redraw: a slow machine may redraw between the two.
        """
        from playwright.sync_api import TimeoutError
        page, handle, tries = figure.page, figure.element_handle(), 20
        for left in reversed(range(tries)):
            x, y = figure.evaluate(place, arg)
            page.mouse.move(x - 3, y)
            page.mouse.move(x, y)
            try:
                page.wait_for_function('d => d._hoverdata', arg=handle, timeout=3000)
                page.mouse.down()
                page.mouse.up()
                return page.wait_for_function(took, arg=arg, timeout=3000)
            except TimeoutError as e:
                if not left: raise AssertionError(f'no answer to {tries} clicks at {x:.0f}, {y:.0f}') from e
    return click
