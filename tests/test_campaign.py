"The short form of the campaign (campaign.py): signals, bad disks, writers at once, damaged files, hostile data. Nothing may come out wrong."
import subprocess, sys

import pytest

from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith('linux'), reason='the campaign needs fork, memory files and limits as Linux has them')

# Sections that share what they prepare, about equally long: each is a process of its own, as forks want no threads around.
PARTS = ['kills together', 'disk', 'mutations', 'images hostile']


@pytest.mark.parametrize('part', PARTS)
def test_nothing_comes_out_wrong(part, tmp_path):
    done = subprocess.run([sys.executable, ROOT/'tests'/'campaign.py', '--short', '--only', *part.split()], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith('in all')][0].split()[2:] != ['0']*4
    assert list(tmp_path.iterdir()) == []


def test_the_parts_are_all_there():
    sys.path.insert(0, str(ROOT/'tests'))
    from campaign import SECTIONS
    assert sorted(' '.join(PARTS).split()) == sorted(SECTIONS)


@pytest.mark.parametrize('call, wrong', [('lambda: None', 'nothing'), ('lambda: 1/0', 'ZeroDivisionError')])
def test_a_judge_that_never_condemns_would_be_worthless(call, wrong, tmp_path):
    "The harness itself: what a child raises, takes and leaves is seen."
    code = f'''import sys; sys.path.insert(0, {str(ROOT/"tests")!r})
from _campaign import *
import _campaign
row, file = Row('x'), Path('f')
def make(rng): return (lambda: file.write_bytes(b'x'), 'a change'), {call}, 'as it was'
judge_apart(row, make, 3, 64 << 20, 1)
assert row.counts == dict(right=0, refused=0, wrong=3), row.counts
def hang(rng): return (lambda: None, 'a hang'), lambda: bytes(1 << 33), 'as it was'
judge_apart(row, hang, 1, 64 << 20, 1)
assert row.counts['wrong'] == 4 and 'MemoryError' in row.notes[-1], row.notes
def die(rng): return (lambda: None, 'a crash'), lambda: os.kill(os.getpid(), signal.SIGSEGV), 'as it was'
judge_apart(row, die, 2, 64 << 20, 1)
assert row.counts['wrong'] == 6 and '-11' in row.notes[-1], row.notes
def refuse(words):
    def read(): raise ValueError(words)
    return lambda rng: ((lambda: None, 'a change'), read, 'as it was')
for words in ('f is damaged; make it again', 'two\\nlines about f', 'no name', ''): judge_apart(row, refuse(words), 1, 64 << 20, 1, 'f')
assert row.counts == dict(right=0, refused=1, wrong=9), (row.counts, row.notes)
Path('t.part').write_text('x')
assert litter('.') == ['t.part']
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
