"Exercises of the lessons: unsolved as shipped, and solved by the solution printed under each."
import json, re

import pytest

from test_notebooks import NOTEBOOKS, read, run, source

SOLUTION = re.compile(r'<details>.*?```python\n(def (\w+)\(.*?)```', re.S)
LESSONS = [p for p in NOTEBOOKS if any(SOLUTION.search(source(c)) for c in read(p)['cells'] if c['cell_type'] == 'markdown')]
every_lesson = pytest.mark.parametrize('path', LESSONS, ids=lambda p: p.stem)


def solutions(nb): return {name: code for c in nb['cells'] if c['cell_type'] == 'markdown' for code,name in SOLUTION.findall(source(c))}
def attempt(cell, names): return next((n for n in names if cell['cell_type'] == 'code' and source(cell).startswith(f'def {n}(')), None)
def is_check(cell): return cell['cell_type'] == 'code' and re.search(r'^check\(', source(cell), re.M)


@every_lesson
def test_exercises_wait_for_the_reader(path):
    nb = read(path)
    names, cells = solutions(nb), nb['cells']
    assert 3 <= len(names) <= 5
    assert sorted(filter(None, (attempt(c, names) for c in cells))) == sorted(names)
    checks = [c for c in cells if is_check(c)]
    assert len(checks) == len(names)
    assert all('not attempted yet' in json.dumps(c['outputs']) for c in checks)


@every_lesson
def test_runs_as_shipped_and_solutions_pass_their_checks(path, tmp_path):
    "One run for both: the lesson as a reader gets it, then each solution with its check."
    nb = read(path)
    names, checks = solutions(nb), [c for c in nb['cells'] if is_check(c)]
    order = [n for c in nb['cells'] if (n := attempt(c, names))]
    extra = lambda i, text: dict(cell_type='code', id=f'solved{i}', metadata={}, execution_count=None, outputs=[], source=[text])
    for i,(name, c) in enumerate(zip(order, checks)):
        held = re.sub(r'^check\((.*)\)\s*$', r'_said = check(\1)\nassert _said.endswith(": right"), _said', source(c), flags=re.M | re.S)
        nb['cells'] += [extra(f'{i}a', names[name]), extra(f'{i}b', held)]
    solved = tmp_path/f'{path.stem}_solved.ipynb'
    solved.write_text(json.dumps(nb), encoding='utf-8')
    done = run(solved, tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert [p.name for p in (tmp_path/'lab').iterdir()] == [solved.name]
