"What every test may rely on: the tree under test, one thread a process, and what this machine has."
import os, shutil, subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Two workers share two cores: one thread each, set before anything imports torch and passed on to child processes.
os.environ |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1', 'OPENBLAS_NUM_THREADS': '1'}
# Child processes import this tree, wherever they run and whatever is installed.
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))


def source_files():
    "Files that git tracks or would track, relative to the root."
    done = subprocess.run(['git', '-c', f'safe.directory={ROOT}', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                          cwd=ROOT, capture_output=True, text=True) if shutil.which('git') else None
    if done is None or done.returncode or not (ROOT/'.git').exists(): pytest.skip('needs git and a git checkout to know which files belong')
    return sorted(f for f in map(Path, filter(None, done.stdout.split('\0'))) if (ROOT/f).is_file())


@pytest.fixture(scope='session')
def root():
    "The repository."
    return ROOT


@pytest.fixture
def source_tree(tmp_path):
    "A private copy of the repository's own files."
    for f in source_files():
        (tmp_path/'tree'/f).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/f, tmp_path/'tree'/f)
    return tmp_path/'tree'


@pytest.fixture(scope='session')
def data_root():
    "Folder with omniglot.zip, miniimagenet.zip, cifar10.zip."
    folder = Path(os.environ.get('MEBQAT_DATA') or ROOT.parent/'shared'/'data')
    if not folder.is_dir(): pytest.skip('no data sets here; set MEBQAT_DATA to the folder that holds omniglot.zip')
    return folder


@pytest.fixture(scope='session')
def chromium():
    "Path of a Chromium-like browser."
    found = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    return found or pytest.skip('no chromium here; on Debian: apt-get install chromium')
