"What a person sees: rows that fit, one line for whatever is wrong, the truth about small data, and names that cannot act on a terminal."
import json, os, re, subprocess, sys, time, warnings

import numpy as np
import pytest
import torch
from PIL import Image

from mebqat.bits import Bits, BitSpace, Policy
from mebqat.console import Plain, Rows, out_of_memory
from mebqat.files import printable, save_whole
from mebqat.fewshot.evaluate import EpisodeScores
from mebqat.footprint import sizes_of, training_bytes
from mebqat.mixed.front import Front
from mebqat.mixed.space import Budget, Scored
from mebqat.models import make
from mebqat.runs import open_run, spec_of, train_run
from mebqat.runs.facts import facts_of
from mebqat.runs.policies import save_policy
from mebqat.surface import Point, Surface, quantity
from test_cli import cli, good, own_cache, process, refused  # noqa: F401 (own_cache is a fixture)

QUICK = ['--method', 'float', '--width', 4, '--no-compile']


@pytest.fixture(scope='module')
def few_pictures(tmp_path_factory):
    "Forty pictures of noise in two classes, 32 to train on: nothing can be learned from them."
    root, rng = tmp_path_factory.mktemp('few')/'noise', np.random.default_rng(3)
    for c in ('left', 'right'):
        for part,n in {'train': 16, 'val': 2, 'test': 2}.items():
            (root/part/c).mkdir(parents=True)
            for i in range(n): Image.fromarray(rng.integers(0, 255, (12, 12), np.uint8)).save(root/part/c/f'{i}.png')
    return root


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    "A finished run, and what was printed."
    out = tmp_path_factory.mktemp('trained')/'run'
    done = good('train', '--out', out, *QUICK, '--batch-size', 512, '--epochs', 22)
    return out, done


def noted(*args):
    "What a good command did, and its warnings, wherever they went."
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter('always')
        done = good(*args)
    return done, done.stderr + ' '.join(str(w.message) for w in notes)


# Rows

def test_rows_are_aligned_fit_and_have_their_heading_again(trained):
    lines = trained[1].stderr.splitlines()
    heads = [i for i,l in enumerate(lines) if l.split()[:2] == ['step', 'loss']]
    rows = [l for l in lines if re.match(r' *\d+/44 ', l)]
    assert len(rows) == 22 and len(heads) == 2 and heads[1] - heads[0] == 21 and lines[heads[0]] == lines[heads[1]]
    table = [l for l in lines[1:-1] if not l.startswith('note: ')]  # notes are sentences, and break where the terminal does
    assert {len(l) for l in table} == {len(lines[heads[0]])} and len(table) == 24 and len(table[0]) <= 80
    assert lines[0] == 'digits: 1,077 images of 10 classes, 512 a step: 2 steps a pass, 44 in all'
    assert rows[-1].split()[0] == '44/44' and rows[-1].split()[-1] == '0:00'


@pytest.mark.parametrize('steps, seconds, extra', [(160, 9, 5), (7_810_000, 9e6, 12), (3, .1, 0)])
def test_rows_fit_whatever_is_validated(steps, seconds, extra, capsys):
    rows = Rows()
    rows.on_step(1, steps, 1.)
    class History: rows = [{'step': steps//2 or 1, 'loss': 12345.6, 'accuracy': .5, 'lr': .1, 'seconds': seconds,
                            'weight bits': 3.2, 'relaxed weight bits': 3.3, **{f'val W{i + 2}A{i + 2}': .5 for i in range(extra)}, 'clipped W2': .1}]
    rows(History)
    head, row = capsys.readouterr().err.splitlines()
    assert len(head) == len(row) <= 80 and 'relaxed' not in head and 'clipped' not in head and ('val W2A2' in head) == (extra > 0)


def test_few_shot_runs_have_rows_too(tmp_path):
    done, texts = noted('train', '--method', 'pn', '--out', tmp_path/'run', '--width', 4, '--n-way', 3, '--n-query', 2, '--glyph-classes', 20, '--steps', 3, '--no-compile')
    lines = done.stderr.splitlines()
    assert lines[0].startswith('glyphs: ') and '3 steps of 4 episodes (3-way 1-shot)' in lines[0]
    assert len([l for l in lines if re.match(r' *[123]/3 ', l)]) == 3 and '3 steps are few to learn from' in texts


def test_json_is_alone_on_standard_output(tmp_path):
    done = good('train', '--out', tmp_path/'run', *QUICK, '--epochs', 1, '--json')
    assert json.loads(done.stdout)['history'][-1]['step'] == 16


@pytest.mark.skipif(os.name != 'posix', reason='needs a pseudo terminal')
def test_in_a_terminal_of_80_columns_no_row_is_broken_by_the_bar(tmp_path):
    import fcntl, pty, struct, termios
    pid, fd = pty.fork()
    if pid == 0: os.execv(sys.executable, [sys.executable, '-m', 'mebqat.cli', 'train', '--out', str(tmp_path/'run'), *map(str, QUICK), '--epochs', '3'])
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack('HHHH', 30, 80, 0, 0))
    shown = b''
    while True:
        try: part = os.read(fd, 4096)
        except OSError: break
        if not part: break
        shown += part
    assert os.waitpid(pid, 0)[1] == 0
    pieces = [p for line in shown.decode().split('\n') for p in re.split(r'\r', line) if p.strip()]
    assert max(len(re.sub(r'\x1b\[[\d;]*\w', '', p)) for p in pieces if str(tmp_path) not in p and 'Warning' not in p and 'few' not in p and 'train_run' not in p) <= 80
    assert [p.split()[0] for p in pieces if re.match(r' *\d+/48 .*:\d\d$', p.rstrip())] == ['16/48', '32/48', '48/48'] and any('%|' in p for p in pieces)


# Small data

def test_a_batch_follows_the_data(few_pictures, tmp_path):
    done = good('train', '--out', tmp_path/'run', '--data', few_pictures, *QUICK, '--epochs', 2)
    assert '32 images of 2 classes, 4 a step: 8 steps a pass, 16 in all' in done.stderr
    assert open_run(tmp_path/'run').spec.training.batch_size == 4
    good('train', '--out', tmp_path/'run', '--data', few_pictures, *QUICK, '--epochs', 2, '--resume')
    good('train', '--out', tmp_path/'other', '--data', few_pictures, *QUICK, '--epochs', 2, '--batch-size', 16)
    assert open_run(tmp_path/'other').spec.training.batch_size == 16


def test_a_guess_is_no_success(few_pictures, tmp_path):
    done, texts = noted('train', '--out', tmp_path/'run', '--data', few_pictures, *QUICK, '--epochs', 2)
    assert re.search('16 steps are few to learn from: train longer, such as (epochs=|--epochs )25', texts) and 'guess' in texts
    assert done.stderr.splitlines()[-1] == f'{tmp_path/"run"} holds the trained small_cnn' and 'next:' not in done.stderr


def test_what_was_learned_is_said_to_be(trained):
    assert trained[1].stderr.splitlines()[-1].endswith(f'next: mebqat surface {trained[0]}') and 'guess' not in trained[1].stderr


def test_doubts_are_for_the_one_who_trains(few_pictures, tmp_path):
    with pytest.warns(UserWarning, match='guess'): run = train_run(spec_of('float', data=str(few_pictures), width=4, epochs=1), tmp_path/'run', compile=False)
    assert len(run.doubts) == 1 and open_run(tmp_path/'run').doubts == ()


# Resources

def test_more_threads_than_cores_are_refused_before_torch(tmp_path):
    code = ('import sys; sys.argv = ["mebqat", "train", "--out", "run", "--threads", "3000"]\nfrom mebqat.cli import main\n'
            'try: main()\nfinally: print("torch" in sys.modules)')
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == 'False\n' and not list(tmp_path.iterdir())
    assert done.stderr.startswith(f'mebqat: --threads must be at most {os.cpu_count()}') and '3000' in done.stderr and len(done.stderr.splitlines()) == 1
    for command in ('surface x', 'search x --max-bytes 1', 'demo', 'adaqat --out x'): assert 'the cores of this machine' in refused(*command.split(), '--threads', 10_000, names='10000')


@pytest.mark.parametrize('error', [MemoryError(), torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 20.00 GiB'), MemoryError('Unable to allocate 3 GiB'),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9000000 bytes.")], ids=type)
def test_memory_that_ran_out_is_one_line(error, monkeypatch, tmp_path):
    import mebqat.runs.runs
    def fail(*a, **k): raise error
    monkeypatch.setattr(mebqat.runs.runs, 'train_run', fail)
    assert '--batch-size' in refused('train', '--out', tmp_path/'run', names='out of memory')


@pytest.mark.parametrize('more, names', [(['--method', 'mebqat'], '--batch-size'), (['--method', 'mebqat-pn', '--glyph-classes', 40], '--n-way')], ids=['images', 'episodes'])
def test_memory_that_is_not_there_is_not_taken(more, names, monkeypatch, tmp_path):
    import mebqat.memory
    monkeypatch.setattr(mebqat.memory, 'available_memory', lambda: 40_000_000)
    assert 'would take' in refused('train', '--out', tmp_path/'run', *more, names=names)
    assert not (tmp_path/'run').exists()


def test_the_estimate_follows_size_batch_and_width():
    def of(size, batch, **more): return training_bytes(sizes_of(lambda: make('resnet20', n_classes=10, in_channels=3, image_size=size, **more), (3, size, size)), batch)
    assert of(64, 512) > 3*of(32, 512) and of(32, 1024) > 1.6*of(32, 512) and of(32, 512, width=32) > 1.6*of(32, 512, width=16)
    before = time.time()
    assert of(20_000, 64) > 1e12 and time.time() - before < 5


# Names that would act

EVIL = 'a\x1b]0;owned\x07b\x1b[2Jc\x9bd\u202ee\nf'


def harmless(text): return not re.search('[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]', text)


def test_nothing_in_a_file_reaches_the_terminal(tmp_path):
    surface = Surface({Bits(4, 4): Point(.5, .4, .6, 10)}, title=EVIL, meta={EVIL: EVIL, 'data': EVIL})
    surface.save(tmp_path/'surface.json')
    for args in (['info', tmp_path/'surface.json'], ['info', tmp_path/'surface.json', tmp_path/'surface.json']):
        shown = good(*args).stdout
        assert harmless(shown) and '\\x1b]0;owned' in shown.replace('\n', '')
    assert json.loads(good('info', tmp_path/'surface.json', '--json').stdout)['title'] == EVIL


def test_nothing_in_a_name_reaches_the_terminal(tmp_path, few_pictures):
    named = tmp_path/'x\x1b[31mred\u202e'
    named.symlink_to(few_pictures)
    done = good('train', '--out', tmp_path/'run\x1b[2J', '--data', named, *QUICK, '--epochs', 1)
    assert harmless(done.stderr) and '\\x1b[31mred\\u202e' in done.stderr
    for command in (['surface', EVIL], ['info', EVIL], ['train', '--out', tmp_path/'y', '--data', EVIL], ['explore', EVIL], ['fly\x1b[2J'], ['train', '--out', tmp_path/'y', '--no\x1b[2J', 'x']):
        assert harmless(refused(*command, names='\\x1b'))


def test_a_console_spells_in_tables_and_lines_alike():
    console = Plain(width=70)
    with console.capture() as shown:
        from rich.table import Table
        table = Table(EVIL, title=EVIL)
        table.add_row(EVIL)
        console.print(EVIL, table)
    assert harmless(shown.get()) and printable('plain ü 猫') == 'plain ü 猫' and printable('\udcff') == '\\udcff'


# What a file is

@pytest.fixture(scope='module')
def zoo(tmp_path_factory, trained):
    "A file of every kind."
    folder = tmp_path_factory.mktemp('zoo')
    policy = Policy({'block2': Bits(2, 4), 'block3': Bits(4, 4)})
    Surface({Bits(4, 4): Point(.5, .4, .6, 10)}, 'a title').save(folder/'surface.json')
    save_policy(folder/'policy.json', policy)
    Front([Scored(policy, .8, 100., 1000, 'genetic')], 'a front').save(folder/'front.json')
    EpisodeScores({Bits(2, 2): torch.tensor([.5, .75], dtype=torch.float64)}, 'pn', {}, {}).save(folder/'episodes.safetensors')
    (folder/'trajectory.json').write_text(json.dumps({'format': 'mebqat-trajectory', 'version': 1, 'columns': ['step', 'n_w'], 'rows': [[1, 8.]]}))
    (folder/'begun').mkdir()
    (folder/'begun'/'run.json').write_bytes((trained[0]/'run.json').read_bytes())
    (folder/'half').mkdir()
    for n in ('run.json', 'checkpoint.safetensors'): (folder/'half'/n).write_bytes((trained[0]/n).read_bytes())
    return folder


@pytest.mark.parametrize('name, kind, shown', [
    ('surface.json', 'surface', '50.0 %'), ('policy.json', 'policy', 'W2A4'), ('front.json', 'front', '0.8'), ('episodes.safetensors', 'episodes', '62.5 %'),
    ('trajectory.json', 'trajectory', '8.0'), ('begun', 'description of a run', 'small_cnn'), ('half', 'unfinished run', '44 of 44'), ('half/checkpoint.safetensors', 'unfinished run', '--resume')])
def test_info_knows_every_kind(zoo, name, kind, shown):
    assert json.loads(good('info', zoo/name, '--json').stdout)['kind'] == kind and shown in good('info', zoo/name).stdout


def test_info_of_shipped_data_never_advises_to_write_over_it(trained):
    shown = good('info', 'digits_exploration').stdout
    facts = facts_of('digits_exploration')
    assert facts['kind'] == 'exploration' and facts['next'] == 'mebqat explore digits_exploration' and facts['images'] == 540 and '95.6 %' in shown
    for done in (shown, refused('surface', 'digits_exploration', names='mebqat explore'), refused('search', 'digits_exploration', '--max-bytes', 1, names='mebqat-exploration')):
        assert '--resume' not in done and '--out' not in done
    assert facts_of(trained[0]/'checkpoint.safetensors')['kind'] == 'checkpoint of a finished run'


def test_info_compares(trained, zoo):
    lines = [l.split('│') for l in good('info', trained[0], zoo/'half').stdout.splitlines() if '│' in l]
    rows = {c[1].strip(): c for c in lines}
    assert lines.index(rows['kind']) < lines.index(rows['model']) and rows['model'][2].strip() == rows['model'][3].strip() == 'small_cnn'
    assert [f['kind'] for f in json.loads(good('info', trained[0], zoo/'half', '--json').stdout)] == ['run', 'unfinished run']
    refused('info', trained[0], 'nowhere', names='nowhere')


def test_info_refuses_what_is_nobodys(tmp_path):
    (tmp_path/'x.json').write_text('[1, 2]')
    (tmp_path/'deep.json').write_text('['*100_000)
    save_whole(tmp_path/'c.safetensors', {}, {'step': 1, 'config': 'x', 'history': 3})
    for name in ('x.json', 'deep.json', 'c.safetensors'): refused('info', tmp_path/name, names=name)


# Words that were typed

@pytest.mark.parametrize('args', [['train', '--out', ''], ['train', '--out', 'x', '--data', ''], ['train', '--out', 'x', '--init', ''], ['surface', ''], ['surface', 'digits_mebqat', '--data', ' '],
                                  ['search', 'digits_mebqat', '--max-bytes', '1kB', '--out', ''], ['info', ''], ['demo', '--out', ''], ['explore', ''], ['lab', '']], ids=' '.join)
def test_an_empty_value_is_refused(args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*args, names='empty')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('args, names', [(['fly'], 'fly'), (['train', '--out', 'x', '--no-such'], '--no-such'), (['train'], '--out'), (['train', '--out', 'x', '--seed', '1.5'], '--seed'),
                                         (['info', 'a\0b'], 'zero byte'), (['demo', 'x'], 'x')], ids=repr)
def test_wrong_use_is_one_line(args, names): assert '--help' in refused(*args, names=names)


def test_errors_speak_of_flags(tmp_path, few_pictures, trained):
    out = ['--out', tmp_path/'r']
    for args, flag, word in ((['--method', 'ptq'], '--init', 'init='), (['--batch-size', 5000, *QUICK], '--batch-size must', 'batch_size'), (['--data', 'cifar10', *QUICK], '(--download)', 'download='),
                             (['--data', 'omniglot', '--method', 'mebqat-pn'], '--download', 'download=')):
        assert word not in refused('train', *out, *args, names=flag)
    text = refused('train', '--out', trained[0], *QUICK, '--batch-size', 512, '--epochs', 22, names='--resume')
    assert 'resume (' not in text


def test_download_reaches_the_data(monkeypatch, tmp_path):
    import mebqat.runs.episodes, mebqat.runs.images
    asked_for = []
    def load(name, split, download=False, **more):
        asked_for.append((name, download))
        raise FileNotFoundError(f'{name} could not be fetched')
    for module in (mebqat.runs.images, mebqat.runs.episodes): monkeypatch.setattr(module, 'load', load)
    for method, data in (('float', 'svhn'), ('mebqat-pn', 'omniglot')): refused('train', '--out', tmp_path/'r', '--method', method, '--data', data, '--download', names='could not be fetched')
    refused('adaqat', '--out', tmp_path/'r', '--data', 'cifar10', '--download', names='cifar10')
    for command in (['surface', 'digits_mebqat', '--data', 'svhn'], ['search', 'digits_mebqat', '--max-bytes', '30kB', '--data', 'svhn']): refused(*command, '--download', names='svhn')
    assert asked_for == [('svhn', True), ('omniglot', True), ('cifar10', True), ('svhn', True), ('svhn', True)]


def test_amounts_are_read_as_people_write_them():
    assert [quantity(t, 'B') for t in ('5kb', '5KB', '5 k', '1mb', '2G')] == [5e3, 5e3, 5e3, 1e6, 2e9]
    points = {b: Point(.5 + b.w/100, 0, 1, 9, bytes=1000*b.w, bitops=1e6*b.w) for b in BitSpace.parse('W2A2 W4A4 W8A8')}
    assert Surface(points).best(max_bytes='5kb') == Bits(4, 4) == Surface(points).best(max_bytes=5000) == Surface(points).best(max_bitops='7 M')
    assert Budget('5kB', '0.4G') == Budget(5e3, 4e8) and Budget('5kB').allows(5000, 1)
    with pytest.raises(ValueError, match='write an amount'): Surface(points).best(max_bytes='plenty')


def test_no_open_starts_a_server_and_no_browser(tmp_path, monkeypatch):
    ran, served = [], []
    monkeypatch.setattr('os.execv', lambda program, args: ran.append(args))
    monkeypatch.setattr('mebqat.cli.serve', lambda file, title, port, open_, say: served.append(open_))
    good('lab', tmp_path/'mine', '--no-open')
    good('lab', tmp_path/'mine')
    good('lab', tmp_path/'mine', '--copy-only')
    good('explore', 'digits_exploration', '--no-open')
    good('explore', 'digits_exploration')
    assert ['--no-browser' in r for r in ran] == [True, False] and served == [False, True]


def test_no_home_and_no_name_is_no_error(tmp_path):
    code = ('import os, pwd, sys\n'
            'def none(*a): raise KeyError("uid not found")\n'
            'pwd.getpwuid = pwd.getpwnam = none\n'
            'for k in ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "MEBQAT_CACHE"): os.environ.pop(k, None)\n'
            'from mebqat.cli import main\nmain()')
    def run(*args): return subprocess.run([sys.executable, '-c', code, *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
    for args in (['info', 'digits_mebqat'], ['train', '--out', 'r', *QUICK, '--epochs', 1], ['lab', 'mine', '--copy-only'], ['surface', 'digits_mebqat', '--bits', 'W4A4', '--out', 's']):
        done = run(*args)
        assert done.returncode == 0, done.stderr
    for args in (['train', '--data', '~/x', '--out', 'q'], ['train', '--data', 'cifar10', '--out', 'q']):
        done = run(*args)
        assert done.returncode == 2 and 'unexpected' not in done.stderr, done.stderr
