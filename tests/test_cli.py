"The command line: every command does its work, and bad input gets one clear line, exit code 2 and no litter."
import io, json, os, pickle, re, signal, socket, subprocess, sys, time, urllib.request, zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from mebqat.bits import Bits, BitSpace
from mebqat.cli import app
from mebqat.files import load_whole, save_whole
from mebqat.runs import open_run, spec_of
from mebqat.surface import Surface
from mebqat.launch import START, TOUR, free_port, lab_command, copy_names

COMMON = ['--width', '4', '--batch-size', '256', '--no-compile']
METHODS = {'float': [], 'qat': ['--bits', 'W4A4'], 'adabits': ['--bits', 'W2A2 W8A8'], 'any-precision': ['--bits', 'W2A2,W8A8'], 'mebqat': [],
           'ptq': ['--init', 'RUNS/float']}


def cli(*args): return CliRunner().invoke(app, [str(a) for a in args])


def process(*args, **kw): return subprocess.run([sys.executable, '-m', 'mebqat.cli', *map(str, args)], capture_output=True, text=True, **kw)


def good(*args):
    done = cli(*args)
    assert done.exit_code == 0, done.stderr
    return done


@pytest.fixture(scope='session')
def runs(tmp_path_factory):
    "One small run of every method."
    folder = tmp_path_factory.mktemp('runs')
    for method,more in METHODS.items():
        done = good('train', '--out', folder/method, '--method', method, '--epochs', 1, *COMMON, *(m.replace('RUNS', str(folder)) for m in more))
        lines = done.stderr.splitlines()
        assert done.stdout == '' and lines[-1].startswith(f'{folder/method} holds the trained small_cnn')
        told = [l.split()[0] for l in lines if l.startswith(('digits: ', 'step ', ' 4/4 ', '4/4 '))]
        assert told == ([] if method == 'ptq' else ['digits:', 'step', '4/4'])
    return folder


@pytest.fixture(scope='session')
def pictures(tmp_path_factory):
    "Folder with trees and zips of image folders, sound and otherwise."
    root = tmp_path_factory.mktemp('pictures')
    rng = np.random.default_rng(0)
    def png():
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(out, 'png')
        return out.getvalue()
    files = {f'{c}/{i}.png': png() for c in ('cat', 'dog') for i in range(12)}
    def pack(name, files):
        with zipfile.ZipFile(root/name, 'w') as z:
            for n,data in files.items(): z.writestr(n, data)
    def unpack(name, files, *empty):
        for n,data in files.items():
            (root/name/n).parent.mkdir(parents=True, exist_ok=True)
            (root/name/n).write_bytes(data)
        for n in empty: (root/name/n).mkdir(parents=True)
    pack('sound.zip', files)
    unpack('sound', files)
    pack('truncated.zip', {**files, 'dog/7.png': files['dog/7.png'][:40]})
    pack('nothing.zip', {})
    pack('one_class.zip', {n: d for n,d in files.items() if n.startswith('cat')})
    (root/'no.zip').write_bytes(b'not a zip')
    unpack('empty_class', files, 'bird')
    unpack('flat', {n.replace('/', '_'): d for n,d in files.items()})
    unpack('uneven', {**files, 'cat/big.png': (lambda b: (Image.new('L', (9, 9)).save(b, 'png'), b.getvalue())[1])(io.BytesIO())})
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'cache'))


# Good input

@pytest.mark.parametrize('method', METHODS)
def test_a_trained_run_says_what_it_is(runs, method):
    facts = json.loads(good('info', runs/method, '--json').stdout)
    assert {'kind': 'run', 'method': method, 'data': 'digits', 'model': 'small_cnn', 'seed': 0, 'classes': 10, 'input': '1x8x8'}.items() <= facts.items()
    model = open_run(runs/method).model
    assert facts['parameters'] == sum(p.numel() for p in model.parameters()) and facts['file bytes'] == (runs/method/'model.safetensors').stat().st_size
    assert facts['torch'] == torch.__version__ and len(facts['training data']) == 16
    assert json.loads(good('info', runs/method/'model.safetensors', '--json').stdout) == facts
    shown = good('info', runs/method).stdout
    assert method in shown and facts['training data'] in shown


@pytest.mark.parametrize('method', [m for m in METHODS if m != 'float'])
def test_surface_prints_saves_and_draws(runs, method):
    space = ['--bits', 'W4A4,FP'] if method != 'qat' else []
    done = good('surface', runs/method, *space)
    saved = Surface.load(runs/method/'surface.json')
    assert set(saved) == ({Bits(4, 4)} if method == 'qat' else set(BitSpace.parse('W4A4 FP')))
    assert f'{100*saved.at(Bits(4, 4)).accuracy:.1f}' in done.stdout and 'accuracy, % (test)' in done.stdout
    assert done.stderr.strip() == f'wrote {runs/method/"surface.json"} and {runs/method/"surface.html"}'
    assert '<html' in (runs/method/'surface.html').read_text(encoding='utf-8')[:200]
    assert {'method': method, 'split': 'test', 'images': 540, 'bn': 'reestimate'}.items() <= saved.meta.items()
    printed = good('surface', runs/method, *space, '--json').stdout
    assert json.loads(printed) == json.loads((runs/method/'surface.json').read_text())
    facts = json.loads(good('info', runs/method/'surface.json', '--json').stdout)
    assert facts['kind'] == 'surface' and facts['pairs'] == len(saved)


def test_surface_covers_two_to_eight_bits_unless_told(runs):
    good('surface', runs/'mebqat', '--split', 'val')
    saved = Surface.load(runs/'mebqat'/'surface.json')
    assert set(saved) == set(BitSpace.grid(range(2, 9), range(2, 9), full=True)) and saved.meta['split'] == 'val' and saved.meta['images'] == 180


def test_a_switchable_run_is_measured_where_it_has_norms(tmp_path):
    good('train', '--out', tmp_path/'run', '--epochs', .5, '--bn', 'switchable', '--bits', 'W2A2 W4A4 FP', *COMMON)
    good('surface', tmp_path/'run')
    assert set(Surface.load(tmp_path/'run'/'surface.json')) == set(BitSpace.parse('W2A2 W4A4 FP'))


def test_train_prints_json_and_options_reach_the_run(tmp_path, pictures):
    done = good('train', '--out', tmp_path/'run', '--data', pictures/'sound.zip', '--size', 16, '--method', 'mebqat', '--scheme', 'dorefa',
                '--option', 'scale=none', '--option', 'act_clip=pact', '--bits', 'W1A1 W4A4', '--epochs', 2, '--batch-size', 5, '--width', 4,
                '--optimizer', 'adamw', '--lr', '.002', '--seed', 7, '--augment', '--skip', 'first', '--bn', 'batch', '--val', 3, '--threads', 1,
                '--no-compile', '--json')
    said = json.loads(done.stdout)
    assert said['run'] == str(tmp_path/'run') and len(said['history']) == 2 and said['history'][-1]['step'] == 6
    run = open_run(tmp_path/'run')
    assert run.spec == spec_of(**said['spec']) and run.spec.training.seed == 7 and run.about['classes'] == ['cat', 'dog']
    q = run.model.quantization
    assert (q.scheme.name, q.scheme.scale, q.scheme.act_clip, q.skip, q.bn) == ('dorefa', None, 'pact', 'first', 'batch')


def test_a_run_moves_with_its_data(tmp_path, pictures):
    (tmp_path/'here').symlink_to(pictures/'sound')
    good('train', '--out', tmp_path/'run', '--data', tmp_path/'here', '--method', 'qat', '--bits', 'W4A4', '--epochs', 1, '--width', 4,
         '--batch-size', 8, '--no-compile')
    good('surface', tmp_path/'run')
    first = (tmp_path/'run'/'surface.json').read_text()
    (tmp_path/'here').unlink()
    refused('surface', tmp_path/'run', names=tmp_path/'here')
    assert (tmp_path/'run'/'surface.json').read_text() == first
    good('surface', tmp_path/'run', '--data', pictures/'sound')


def test_a_finished_run_resumes_to_itself(runs, tmp_path):
    before = (runs/'qat'/'model.safetensors').read_bytes()
    again = ['train', '--out', runs/'qat', '--method', 'qat', '--bits', 'W4A4', '--epochs', 1, *COMMON]
    refused(*again, names='--resume')
    good(*again, '--resume')
    now, then = load_whole(runs/'qat'/'model.safetensors'), before
    (tmp_path/'then.safetensors').write_bytes(then)
    old = load_whole(tmp_path/'then.safetensors')
    assert old[1] == now[1] and all(torch.equal(old[0][k], now[0][k]) for k in old[0])


def test_names_with_brackets_and_colons_are_printed_as_they_are(tmp_path):
    out = tmp_path/'[bold]run[/red] :smile: 100%'
    done = good('train', '--out', out, '--method', 'float', '--epochs', .5, *COMMON)
    assert str(out) in done.stderr
    assert str(tmp_path) in refused('info', tmp_path/'[/x]', names='[/x]')


@pytest.mark.parametrize('typed', [['--data', './size=3/x.zip'], ['--data=size=3/x.zip']], ids=' '.join)
def test_a_path_that_looks_like_an_option_is_told_as_it_was_typed(typed, tmp_path):
    done = process('train', '--out', 'x', *typed, cwd=tmp_path)
    assert done.returncode == 2 and 'size=3/x.zip:' in done.stderr and '--size' not in done.stderr
    assert '--size must be' in process('train', '--out', 'x', '--size', 0, cwd=tmp_path).stderr


def test_lab_copies_the_notebooks_and_keeps_what_was_changed(tmp_path):
    done = good('lab', tmp_path/'mine', '--copy-only')
    names = sorted(copy_names())
    assert sorted(p.relative_to(tmp_path/'mine').as_posix() for p in (tmp_path/'mine').rglob('*.ipynb')) == sorted([*names, START]) and f'{len(names)} notebooks' in done.stderr
    assert names[0] == TOUR and {'sources/00_bits.ipynb', 'sources/mixed/01_adaqat.ipynb'} < {*names} and sum('/' not in n for n in names) == 12
    (tmp_path/'mine'/names[0]).write_text('mine')
    (tmp_path/'mine'/names[1]).unlink()
    assert '1 notebooks' in good('lab', tmp_path/'mine', '--copy-only').stderr
    assert (tmp_path/'mine'/names[0]).read_text() == 'mine' and (tmp_path/'mine'/names[1]).exists()


def refuse_to_have(*missing):
    from importlib.util import find_spec
    return lambda name: None if name in missing else find_spec(name)


def test_lab_opens_on_its_first_page_with_its_token(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr('os.execv', lambda program, args: ran.append(args))
    good('lab', tmp_path/'mine', '--port', free_port(None), '--collaborative', '--ServerApp.tornado_settings={}')
    (args,) = ran
    assert (tmp_path/'mine'/TOUR).exists() and args[1:3] == ['-m', 'jupyterlab'] and args[-2:] == ['--collaborative', '--ServerApp.tornado_settings={}']
    assert {f'--ServerApp.root_dir={tmp_path/"mine"}', '--ServerApp.ip=127.0.0.1', f'--LabApp.default_url=/lab/tree/{START}'} <= set(args)
    assert not [a for a in args if 'token' in a.lower() or 'password' in a.lower()]


def test_lab_without_the_tour_opens_the_folder(tmp_path): assert not [a for a in lab_command(tmp_path) if 'default_url' in a or 'port' in a]


@pytest.mark.parametrize('missing', ['jupyterlab', 'ipywidgets', 'anywidget'])
def test_lab_says_what_is_missing_and_copies_nothing(tmp_path, monkeypatch, missing):
    monkeypatch.setattr('mebqat.launch.find_spec', refuse_to_have(missing))
    monkeypatch.setattr('os.execv', lambda *args: pytest.fail('started'))
    assert "pip install 'mebqat[lab]'" in refused('lab', tmp_path/'mine', names=missing)
    assert not (tmp_path/'mine').exists()
    good('lab', tmp_path/'mine', '--copy-only')


def test_lab_refuses_what_it_cannot_mean(tmp_path):
    refused('lab', tmp_path/'mine', '--copy-only', '--prot', '9999', names='--prot')
    refused('lab', tmp_path/'mine', 'another', names='another')
    refused('lab', tmp_path/'mine', '--port', 70000, names=70000)
    assert not (tmp_path/'mine').exists()


def test_a_notebook_is_copied_whole_or_not_at_all(tmp_path, monkeypatch):
    write, later = type(tmp_path).write_bytes, next(n for n in copy_names() if n.startswith('02_'))
    def full(self, data):
        write(self, data[:100])
        if data == copy_names()[later].read_bytes(): raise OSError(28, 'No space left on device')
        return write(self, data)
    monkeypatch.setattr(type(tmp_path), 'write_bytes', full)
    refused('lab', tmp_path/'mine', '--copy-only', names='No space left')
    there = sorted(p.name for p in (tmp_path/'mine').glob('*.ipynb'))
    assert there == sorted(n for n in copy_names() if n.startswith(('00_', '01_')))
    assert all((tmp_path/'mine'/n).read_bytes() == copy_names()[n].read_bytes() for n in there)


def test_explore_needs_a_measured_run(runs, tmp_path, monkeypatch):
    monkeypatch.setattr('mebqat.cli.serve', lambda *args: pytest.fail('started'))
    (tmp_path/'new').mkdir()
    (tmp_path/'new'/'model.safetensors').write_bytes((runs/'qat'/'model.safetensors').read_bytes())
    for path in ('new', 'new/model.safetensors'):
        assert f'measure it first with: mebqat surface {tmp_path/"new"}' in refused('explore', tmp_path/path, names='not measured')
    refused('explore', tmp_path/'nowhere', names=f'mebqat train --out {tmp_path/"nowhere"}')
    refused('explore', 'nowhere', names='digits_exploration')
    refused('explore', tmp_path, names='no run at')
    (tmp_path/'new'/'exploration.safetensors').write_bytes(b'nothing')
    refused('explore', tmp_path/'new', names=tmp_path/'new'/'exploration.safetensors')


def test_explore_says_what_is_missing_and_which_port_is_taken(monkeypatch):
    monkeypatch.setattr('mebqat.cli.serve', lambda *args: pytest.fail('started'))
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        refused('explore', 'digits_exploration', '--port', s.getsockname()[1], names='choose another with --port')
    refused('explore', 'digits_exploration', '--port', 0, names='port must be 1 to 65535')
    monkeypatch.setattr('mebqat.launch.find_spec', refuse_to_have('voila'))
    assert "pip install 'mebqat[lab]'" in refused('explore', 'digits_exploration', names='voila')


def test_explore_finds_what_surface_kept(runs, monkeypatch):
    served = []
    monkeypatch.setattr('mebqat.cli.serve', lambda file, title, *rest: served.append(file))
    good('surface', runs/'adabits', '--bits', 'W2A2,FP')
    good('explore', runs/'adabits')
    good('explore', runs/'adabits'/'model.safetensors')
    good('explore', runs/'adabits'/'surface.json')
    good('explore', 'digits_exploration')
    assert served[:3] == [runs/'adabits'/'exploration.safetensors']*2 + [runs/'adabits'/'surface.json'] and served[3].name == 'digits_exploration.safetensors'


def test_a_server_that_fails_says_why_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
    (tmp_path/'voila.py').write_text('import sys\nsys.exit("no such thing")')
    monkeypatch.setenv('PYTHONPATH', str(tmp_path))
    refused('explore', 'digits_exploration', '--no-open', names='no such thing')
    assert [p.name for p in tmp_path.iterdir() if p.name != '__pycache__'] == ['voila.py']


def test_demo_makes_its_page(tmp_path):
    done = good('demo', '--out', tmp_path/'demo', '--epochs', 1)
    assert {'surface.html', 'surface.json'} <= {p.name for p in (tmp_path/'demo').iterdir()} and 'MEBQAT' in done.stdout
    assert len(Surface.load(tmp_path/'demo'/'surface.json')) == 50


def test_help_and_version(tmp_path):
    from mebqat import __version__
    assert good('--version').stdout.strip() == __version__
    for command in ('train', 'surface', 'info', 'demo', 'explore', 'lab'): assert command in good('--help').stdout and '--help' in good(command, '--help').stdout


# Bad input

def refused(*args, names, run=cli, code=2):
    "Assert exit code 2, one line on standard error that says `names`, nothing on standard output; give the line."
    done = run(*args)
    status = done.exit_code if hasattr(done, 'exit_code') else done.returncode
    assert status == code, (status, done.stdout, done.stderr)
    assert done.stdout == '' and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith('mebqat: ') and str(names) in done.stderr
    return done.stderr


BAD_SETTINGS = {
    '--bits W17A4': '17', '--bits W0A4': '0', '--bits W4': 'W4', '--bits W1A1': 'W1A1', '--bits W2A1,W4A4': 'W2A1',
    '--bits paper-lsx': 'lsx', '--bits ,': 'pair', '--method magic': 'magic', '--method qat': 'W4A4',
    '--method qat --bits W2A2,W4A4': 'W2A2,W4A4', '--method ptq': 'init', '--method adabits --bits W1A4': 'W1A4',
    '--method float --bits W4A4': '--bits is not an option of float', '--method ptq --init x --bits W99A4': '99', '--scheme sat --bits W1A1': 'W1A1', '--scheme fsq': 'fsq', '--model vgg': 'vgg',
    '--option steps=1': 'steps', '--option per_channel': 'per_channel', '--option per_channel=maybe': 'maybe',
    '--option init=zero': 'zero', '--option name=sat': 'sat', '--scheme sat --option alpha=-2': '-2',
    '--scheme dorefa --option scale=max': 'max', '--epochs 0': '0', '--epochs -1': '-1', '--epochs nan': 'nan', '--epochs inf': 'inf',
    '--batch-size 0': '0', '--batch-size 5000': '5000', '--lr 0': '0', '--lr nan': 'nan', '--lr inf': 'inf', '--optimizer lion': 'lion',
    '--weight-decay -1': '-1', '--n-tasks 0': '0', '--bn frozen': 'frozen', '--skip middle': 'middle', '--width 0': '0',
    '--width -3': '-3', '--size 0': '0', '--size 4': '4', '--val 0': '0', '--val 9999': '9999', '--threads -1': '-1',
    '--device nowhere': 'nowhere', '--guaranteed W99A1': '99', '--guaranteed W1A1': 'W1A1', '--data nowhere': 'nowhere',
    '--init nowhere': 'nowhere', '--model cnn8_svhn': 'width'}


@pytest.mark.parametrize('settings', BAD_SETTINGS)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, settings):
    refused('train', '--out', tmp_path/'run', *COMMON, *settings.split(), names=BAD_SETTINGS[settings])
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('data, names', [
    ('truncated.zip', 'dog/7.png'), ('empty_class', 'bird'), ('no.zip', 'no.zip'), ('nothing.zip', 'class folders'),
    ('one_class.zip', 'cat'), ('flat', 'class folders'), ('uneven', 'cat/big.png'), ('absent.zip', 'absent.zip'),
    ('sound/cat/0.png', '0.png')])
def test_bad_data_is_refused_by_name(tmp_path, pictures, data, names):
    refused('train', '--out', tmp_path/'run', '--data', pictures/data, '--width', 4, '--batch-size', 4, '--no-compile', names=names)
    assert not (tmp_path/'run').exists()


def test_a_full_length_truncated_picture_is_named_in_a_process_too(tmp_path, pictures):
    refused('train', '--out', tmp_path/'run', '--data', pictures/'truncated.zip', '--batch-size', 4, names='dog/7.png', run=process)
    refused('train', '--out', tmp_path/'run', '--bits', 'W17A4', names='17', run=process)
    assert not (tmp_path/'run').exists()


def snapshot(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


@pytest.mark.parametrize('command, names', [
    ('surface RUNS/float', 'float'), ('surface RUNS/nowhere', 'nowhere'), ('surface RUNS/qat --bits W1A1', 'W1A1'),
    ('surface RUNS/qat --bits W4', 'W4'), ('surface RUNS/qat --bits W99A1', '99'), ('surface RUNS/qat --split most', 'most'),
    ('surface RUNS/qat --data RUNS', 'RUNS'), ('surface RUNS/qat --threads -2', '-2'), ('surface RUNS/qat/run.json', 'run.json'),
    ('info RUNS/nowhere', 'nowhere'), ('info RUNS', 'RUNS'),
    ('info RUNS/nowhere.json', 'nowhere.json'), ('surface RUNS/qat/checkpoint.safetensors', 'unfinished'),
    ('train --method ptq --init RUNS/qat --out RUNS/new --width 4', 'RUNS/qat'),
    ('train --init RUNS/float --out RUNS/new --width 8', 'RUNS/float'),
    ('train --init RUNS/float --out RUNS/new --model resnet20 --width 4', 'RUNS/float'),
    ('train --method qat --bits W4A4 --out RUNS/mebqat --width 4 --batch-size 256 --epochs 1', "method='mebqat' there"),
    ('train --out RUNS/mebqat --width 8 --resume', '--width 4 there, 8 here'),
    ('train --out RUNS/qat/run.json --method float --batch-size 256 --width 4 --epochs .1', 'run.json'),
    ('demo --epochs 0 --out RUNS/new', '0'), ('demo --threads -1 --out RUNS/new', '-1'), ('lab RUNS/qat/run.json --copy-only', 'run.json')])
def test_bad_commands_are_refused_and_change_nothing(runs, command, names):
    before = snapshot(runs)
    refused(*command.replace('RUNS', str(runs)).split(), names=names.replace('RUNS', str(runs)))
    assert snapshot(runs) == before and not (runs/'new').exists()


@pytest.mark.parametrize('command', ['', 'fly', 'train', 'train --out', 'train --out x --epochs many', 'train --out x --no-such', 'surface', 'info',
                                     'train --out x --seed 1.5'])
def test_usage_errors_exit_with_two(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    done = cli(*command.split())
    assert done.exit_code == 2 and 'Traceback' not in done.output and not list(tmp_path.iterdir())


def damage(kind, whole):
    if kind == 'cut short': return whole[:-100]
    if kind == 'half': return whole[:len(whole)//2]
    if kind == 'empty': return b''
    if kind == 'a pickle': return pickle.dumps({'weight': 1})
    if kind == 'text': return b'hello '*100
    header = bytearray(whole)
    header[12:20] = b'\xff'*8
    return bytes(header)


@pytest.mark.parametrize('kind', ['cut short', 'half', 'empty', 'a pickle', 'text', 'header'])
def test_damaged_weights_are_refused(runs, tmp_path, kind):
    (tmp_path/'run').mkdir()
    file = tmp_path/'run'/'model.safetensors'
    file.write_bytes(damage(kind, (runs/'qat'/'model.safetensors').read_bytes()))
    before = snapshot(tmp_path)
    for args in (['surface', tmp_path/'run'], ['info', file], ['train', '--out', tmp_path/'new', '--init', tmp_path/'run', *COMMON]):
        refused(*args, names=file)
    assert snapshot(tmp_path) == before


DESCRIPTION = ['spec', 'classes', 'input', 'signed', 'history', 'fingerprint', 'mebqat', 'torch', 'format', 'version', 'data']


@pytest.mark.parametrize('value', ['absent', None, 7, 'text', [], {}], ids=repr)
@pytest.mark.parametrize('key', DESCRIPTION)
def test_weights_with_a_wrong_description_are_refused_or_harmless(runs, tmp_path, key, value):
    tensors, about = load_whole(runs/'qat'/'model.safetensors')
    assert sorted(about) == sorted(DESCRIPTION)
    about.pop(key) if value == 'absent' else about.update({key: value})
    save_whole(tmp_path/'model.safetensors', tensors, about)
    done = cli('info', tmp_path, '--json')
    if done.exit_code == 0: assert json.loads(done.stdout)['kind'] == 'run' and key in ('fingerprint', 'mebqat', 'torch', 'classes', 'history', 'data', 'version')
    else: refused('info', tmp_path, names='model.safetensors')


@pytest.mark.parametrize('change', [{'method': 'magic'}, {'model': 'vgg'}, {'width': 8}, {'scheme': 'sat'}, {'bn': 'x'}, {'bits': 'W99A1'}, {'skip': 'first'},
                                    {'options': [['per_channel', True]]}, {'options': 5}, {'epochs': 'many'}], ids=str)
def test_weights_that_are_not_the_described_network_are_refused(runs, tmp_path, change):
    tensors, about = load_whole(runs/'qat'/'model.safetensors')
    about['spec'].update(change)
    save_whole(tmp_path/'model.safetensors', tensors, about)
    refused('info', tmp_path, names='model.safetensors')


def test_a_newer_file_names_the_version_that_wrote_it(runs, tmp_path):
    tensors, about = load_whole(runs/'qat'/'model.safetensors')
    save_whole(tmp_path/'model.safetensors', tensors, {**about, 'version': 3, 'mebqat': '9.9'})
    refused('info', tmp_path, names='9.9')


def test_unreadable_and_unwritable_places_are_named(tmp_path, runs):
    if os.name != 'posix' or os.geteuid() == 0: pytest.skip('root may read and write everywhere')
    (tmp_path/'closed').mkdir(mode=0o500)
    refused('train', '--out', tmp_path/'closed'/'run', '--method', 'float', *COMMON, '--epochs', .1, names='closed')


def test_something_unforeseen_is_one_line_too(monkeypatch, tmp_path):
    import mebqat.runs.runs
    monkeypatch.setattr(mebqat.runs.runs, 'train_run', lambda *a, **k: 1/0)
    assert 'ZeroDivisionError' in refused('train', '--out', tmp_path/'run', names='MEBQAT_DEBUG', code=1)
    monkeypatch.setenv('MEBQAT_DEBUG', '1')
    assert isinstance(cli('train', '--out', tmp_path/'run').exception, ZeroDivisionError)


def test_ctrl_c_before_training_is_one_line(monkeypatch, tmp_path):
    import mebqat.runs.runs
    def stop(*a, **k): raise KeyboardInterrupt
    monkeypatch.setattr(mebqat.runs.runs, 'train_run', stop)
    done = cli('train', '--out', tmp_path/'run')
    assert (done.exit_code, done.stderr, done.stdout) == (130, 'interrupted\n', '')


def test_the_installed_command_is_this_one(tmp_path):
    done = process('--version', cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == ''


# However it ends, it ends in words

STOPS = [getattr(signal, n) for n in ('SIGINT', 'SIGTERM', 'SIGHUP') if hasattr(signal, n)]


@contextmanager
def begun(*args, module='mebqat.start', **kw):
    "A command under way in a process of its own, killed in the end."
    p = subprocess.Popen([sys.executable, '-m', module, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler), **kw)
    try: yield p
    finally:
        p.kill()
        p.communicate()


def ended(p, signum, times=1):
    "What a command says when it is asked to end, some times in a row, with its exit code and no traceback."
    for _ in range(times):
        if p.poll() is None: p.send_signal(signum)
        time.sleep(.02)
    out, err = p.communicate(timeout=120)
    assert p.returncode == 128 + signum and 'Traceback' not in err and 'Exception ignored' not in err, (p.returncode, err)
    return err


@pytest.mark.parametrize('seconds, times', [(.4, 1), (.7, 5), (1.2, 5), (2, 1)])
def test_ctrl_c_during_the_imports_is_one_line(tmp_path, seconds, times):
    with begun('train', '--out', tmp_path/'run', '--epochs', 400, '--no-compile', *COMMON) as p:
        time.sleep(seconds)
        err = ended(p, signal.SIGINT, times)
    assert len([line for line in err.splitlines() if not line.startswith('step ')]) == 1


@pytest.mark.parametrize('module, signum', list(zip(['mebqat.start', 'mebqat.cli', 'mebqat.start'], STOPS)), ids=str)
def test_a_demo_ends_in_one_line(tmp_path, module, signum):
    with begun('demo', '--out', tmp_path/'demo', module=module) as p:
        assert 'trained in' in p.stderr.readline()
        last = ended(p, signum, 3).splitlines()[-1]
    assert last == 'interrupted' or last.startswith(('stopped after step', 'interrupted; go on'))


@pytest.mark.parametrize('code, wanted', [
    ('import time\ntime.sleep(60)', 'interrupted\n'),
    ('import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: raise ImportError("half a module")', 'interrupted\n'),
    ('import time\nclass Kept(KeyboardInterrupt): pass\ntry: time.sleep(60)\nexcept KeyboardInterrupt: raise Kept("stopped: 3 policies kept")', 'stopped: 3 policies kept\n'),
    ('from importlib import import_module\nimport_module("slow")', 'interrupted\n'),
    ('import time\nclass Late:\n    def __del__(self): time.sleep(60)\nlate = Late()\ndel late', 'interrupted\n')],
    ids=['at work', 'an import cut in two', 'a command that keeps its work', 'a lazy import', 'where nobody can catch it'])
@pytest.mark.parametrize('signum', STOPS[::2], ids=lambda s: s.name)
def test_a_signal_in_a_command_is_one_line(tmp_path, code, wanted, signum):
    (tmp_path/'slow.py').write_text('import time\ntry: time.sleep(60)\nexcept BaseException: pass')
    body = code.replace('\n', '\n        ')
    program = f"""import sys, typer
from mebqat.console import clear_errors
from mebqat.process import run
app = typer.Typer()
@app.command()
def work():
    with clear_errors():
        print('ready', file=sys.stderr)
        {body}
run(app)"""
    p = subprocess.Popen([sys.executable, '-c', program], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                         preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert p.stderr.readline() == 'ready\n'
    time.sleep(.3)
    assert ended(p, signum, 5) == wanted


def test_a_log_that_nobody_reads_ends_no_training(tmp_path):
    train = [sys.executable, '-m', 'mebqat.cli', 'train', '--epochs', '3', '--method', 'float', *map(str, COMMON)]
    with open('/dev/full', 'w') as full:
        assert subprocess.run([*train, '--out', str(tmp_path/'full')], stderr=full).returncode == 0
    p = subprocess.Popen([*train, '--out', str(tmp_path/'pipe')], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    p.stderr.readline()
    p.stderr.close()  # as `| head -1` does
    p.stdout.close()
    assert p.wait(120) == 0
    for name in ('full', 'pipe'): assert len(open_run(tmp_path/name).history) == 3


@pytest.mark.parametrize('args', [('info', 'RUN', '--json'), ('info', 'RUN'), ('surface', 'RUN', '--bits', 'W4A4', '--out', 'OUT', '--json'), ('--help',), ('--version',)], ids=' '.join)
def test_a_result_that_cannot_be_written_is_one_line(runs, tmp_path, args):
    args = [str({'RUN': runs/'mebqat', 'OUT': tmp_path/'out'}.get(a, a)) for a in args]
    with open('/dev/full', 'w') as full:
        done = subprocess.run([sys.executable, '-m', 'mebqat.start', *args], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == 'mebqat: the result could not be written to standard output: No space left on device\n'
    p = subprocess.Popen([sys.executable, '-m', 'mebqat.start', *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p.stdout.close()
    assert p.stderr.read() == 'mebqat: the result could not be written to standard output: Broken pipe\n' and p.wait(60) == 2
    with open('/dev/full', 'w') as full: assert subprocess.run([sys.executable, '-m', 'mebqat.start', *args], stdout=full, stderr=full).returncode == 2


def test_a_warning_is_a_note_of_one_line_said_once(tmp_path, monkeypatch):
    import warnings
    def say(*args, **kw):
        for _ in range(3): warnings.warn('few images: take a smaller\n batch_size=16')
        return 7
    monkeypatch.setattr('mebqat.runs.train_run', say)
    done = cli('train', '--out', tmp_path/'run', *COMMON)
    assert done.stderr.splitlines()[0] == 'note: few images: take a smaller --batch-size 16' and done.stderr.count('note:') == 1


def test_train_longer_by_the_command(tmp_path):
    small = ('--method', 'float', '--out', tmp_path/'run', *COMMON)
    good('train', '--epochs', 1, *small)
    assert 'to make it longer, go on with --resume' in refused('train', '--epochs', 2, *small, names='--epochs 1')
    assert f'note: {tmp_path/"run"} goes on from step' in good('train', '--epochs', 2, *small, '--resume').stderr
    assert 'not shorter' in refused('train', '--epochs', 1, *small, '--resume', names='--epochs')
    assert 'note: ' in good('train', '--epochs', 1, *small[:3], tmp_path/'new', *COMMON, '--resume').stderr


def alive(pid):
    try: return not open(f'/proc/{pid}/stat').read().rpartition(')')[2].startswith(' Z')
    except OSError: return False


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='looks for processes in /proc')
@pytest.mark.parametrize('signum, code', [*((s, 128 + s) for s in STOPS[1:]), (getattr(signal, 'SIGKILL', 9), -9)], ids=str)
def test_explore_takes_its_server_with_it(tmp_path, signum, code):
    pytest.importorskip('voila', reason="voila is not installed; get it with: pip install 'mebqat[dev]'")
    with begun('explore', 'digits_exploration', '--no-open', env=os.environ | {'TMPDIR': str(tmp_path)}) as p:
        url = re.search(r'http://127.0.0.1:(\d+)/\S+', p.stderr.readline())
        with urllib.request.urlopen(url[0], timeout=120) as page: assert page.status == 200  # now there is a kernel, too
        children = [int(f.parent.name) for f in Path('/proc').glob('[0-9]*/environ')
                    if alive(f.parent.name) and f'TMPDIR={tmp_path}\0'.encode() in read(f)]
        assert len(children) >= 2 and p.pid in children
        p.send_signal(signum)
        assert p.wait(60) == code
        end = time.monotonic() + 60
        while any(map(alive, children)) and time.monotonic() < end: time.sleep(.1)
        assert not any(map(alive, children)) and not list(tmp_path.glob('mebqat-*'))
        assert 'Traceback' not in p.stderr.read()


def read(file):
    try: return file.read_bytes()
    except OSError: return b''
