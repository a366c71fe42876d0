"The wheel: what is in it, and that it works away from the repository."
import os, re, subprocess, sys, tarfile, zipfile
from configparser import ConfigParser

import pytest

from conftest import ROOT, copy_source, source_files

PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']


def run(*command, **kw):
    done = subprocess.run(command, capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "A wheel built from a copy of the repository's own files."
    folder = tmp_path_factory.mktemp('wheel')
    run(*PIP, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', folder, copy_source(folder/'tree'))
    return next(folder.glob('*.whl'))


@pytest.fixture(scope='module')
def installed(wheel):
    "Folder with nothing in it but what the wheel installs."
    run(*PIP, 'install', '--no-deps', '--target', wheel.parent/'site', wheel)
    return wheel.parent/'site'


@pytest.fixture
def elsewhere(installed, tmp_path):
    "Run Python in an empty folder where `mebqat` is the installed one."
    env = {**os.environ, 'PYTHONPATH': str(installed)}
    return lambda *args: run(sys.executable, *args, cwd=tmp_path, env=env)


def test_wheel_holds_modules_notebooks_and_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    place = {'mebqat': 'mebqat', 'nbs': 'mebqat/_nbs', 'data': 'mebqat/_data'}
    wanted = {'/'.join((place[f.parts[0]], *f.parts[1:])) for f in source_files() if f.parts[0] in place}
    assert {'mebqat/bits.py', 'mebqat/runs/images.py', 'mebqat/_nbs/00_bits.ipynb', 'mebqat/_nbs/course/00_tour.ipynb', 'mebqat/_data/digits.safetensors'} <= wanted
    assert {n for n in names if '.dist-info/' not in n} == wanted
    assert wheel.stat().st_size < 15e6


def test_wheel_says_what_settings_say(wheel):
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    cfg = cfg['DEFAULT']
    z = zipfile.ZipFile(wheel)
    read = lambda name: z.read(next(n for n in z.namelist() if n.endswith(f'.dist-info/{name}'))).decode()
    needs = re.findall(r'^Requires-Dist: ([^;\n]+?)\s*$', read('METADATA'), re.M)
    normal = lambda r: (re.match(r'[\w.-]+', r)[0].lower(), frozenset(re.sub(r'^[\w.-]+', '', r).replace(' ', '').split(',')))
    assert set(map(normal, needs)) == set(map(normal, cfg['requirements'].split()))
    assert f'Version: {cfg["version"]}\n' in read('METADATA') and f'Requires-Python: >={cfg["min_python"]}\n' in read('METADATA')
    assert 'Apache License' in read('licenses/LICENSE')
    assert 'mebqat = mebqat.start:start' in read('entry_points.txt')


def test_installed_package_finds_its_own_files(installed, elsewhere):
    out = elsewhere('-c', 'import mebqat.data as d; print(d.__file__, d.shipped("digits.safetensors"), sep="\\n")').split()
    assert out == [str(installed/'mebqat'/'data.py'), str(installed/'mebqat'/'_data'/'digits.safetensors')]


@pytest.mark.parametrize('command', ['info', 'demo'])
def test_installed_command_answers(elsewhere, command): assert 'Usage' in elsewhere('-m', 'mebqat.cli', command, '--help')


def test_source_archive_builds_the_same_wheel(wheel, tmp_path):
    run(sys.executable, '-m', 'build', '--sdist', '--no-isolation', '--outdir', tmp_path, copy_source(tmp_path/'tree'))
    tarfile.open(next(tmp_path.glob('*.tar.gz'))).extractall(tmp_path/'unpacked', filter='data')
    run(*PIP, 'wheel', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp_path, next((tmp_path/'unpacked').iterdir()))
    names = lambda path: sorted(zipfile.ZipFile(path).namelist())
    assert names(next(tmp_path.glob('*.whl'))) == names(wheel)
