"What `pip install mebqat` gives without extras: every command works, or says in one line which extra it needs."
import subprocess, sys

import pytest

from test_structure import EXTRAS

BARE = f'''import sys
for name in {EXTRAS}: sys.modules[name] = None
from mebqat.cli import main
sys.argv = ['mebqat', *sys.argv[1:]]
main()'''


@pytest.fixture(scope='module')
def bare(tmp_path_factory):
    "Run a command where no extra is installed, in a folder that holds a small run and one with learned bits."
    folder = tmp_path_factory.mktemp('bare')
    call = lambda *args: subprocess.run([sys.executable, '-c', BARE, *map(str, args)], cwd=folder, capture_output=True, text=True)
    small = ('--data', 'digits', '--epochs', .2, '--width', 4)
    for method, more in (('mebqat', ()), ('float', ()), ('fracbits', ('--target-bytes', 900)), ('metaquantnet', ('--init', 'float run'))):
        made(call('train', '--method', method, '--out', f'{method} run', *small, *more))
    return call


def made(done):
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize('command', [('surface', 'mebqat run', '--bits', 'W2A2 FP'), ('surface', 'fracbits run'), ('info', 'mebqat run'),
                                     ('search', 'mebqat run', '--max-bytes', '1kB', '--method', 'greedy'), ('search', 'metaquantnet run', '--max-bytes', '1kB', '--method', 'genetic', '--population', 4, '--generations', 1),
                                     ('adaqat', '--data', 'digits', '--epochs', .2, '--width', 4, '--out', 'learned'), ('demo', '--help')], ids=lambda c: ' '.join(map(str, c)))
def test_commands_work_without_extras(bare, command):
    done = bare(*command)
    assert done.returncode == 0 and done.stdout.strip() and 'Traceback' not in done.stderr, done.stderr


@pytest.mark.parametrize('command, extra', [(('explore', 'digits_exploration'), 'lab'), (('lab', 'mine'), 'lab'), (('search', 'mebqat run', '--max-bytes', '1kB', '--method', 'exact'), 'search')], ids=str)
def test_others_name_the_extra_in_one_line(bare, command, extra):
    done = bare(*command)
    assert done.returncode == 2 and f"'mebqat[{extra}]'" in done.stderr and 'Traceback' not in done.stderr, done.stderr
