"A result belongs to the data it claims: runs know their data, and answers lie under their questions."
import json, os, shutil, warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner
from mebqat.cli import app
from mebqat.data import load
from mebqat.runs import open_run, spec_of, train_run
from mebqat.runs.specs import stored_spec
from mebqat.surface import Surface


def pictures(folder, classes='abc', n=30, seed=0):
    "Classes that a small network can tell apart: each its own brightness."
    rng = np.random.default_rng(seed)
    for k,c in enumerate(classes):
        (folder/c).mkdir(parents=True)
        for i in range(n): Image.fromarray(rng.integers(240*k//len(classes), 240*k//len(classes) + 16, (8, 8), dtype=np.uint8)).save(folder/c/f'{i:02}.png')
    return folder


@pytest.fixture(scope='module')
def home(tmp_path_factory):
    place = tmp_path_factory.mktemp('changed')
    pictures(place/'data')
    pictures(place/'many', 'abcdefghijklmnop', 6)
    before, os.environ['MEBQAT_CACHE'] = os.environ.get('MEBQAT_CACHE'), str(place/'cache')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        train_run(spec_of('adabits', data=str(place/'data'), width=4, epochs=1., bits='W2A2 W4A4 FP'), place/'run', compile=False)
        train_run(spec_of('pn-qat', data=str(place/'many'), size=16, bits='W4A4', n_way=2, n_query=2, width=4, steps=3, n_tasks=1), place/'few', compile=False)
    yield place
    if before is None: os.environ.pop('MEBQAT_CACHE')
    else: os.environ['MEBQAT_CACHE'] = before


def cli(*args): return CliRunner().invoke(app, [*map(str, args)])


def refused(*args, words):
    done = cli(*args)
    assert done.exit_code == 2 and done.stderr.startswith('mebqat: ') and len(done.stderr.splitlines()) <= 2, (done.exit_code, done.stdout, done.stderr)
    for w in words: assert w in done.stderr


def one_more(data): shutil.copy(data/'a'/'00.png', data/'b'/'copied.png')
def renamed(data): (data/'c').rename(data/'z')
def redrawn(data): Image.fromarray(np.full((8, 8), 17, np.uint8)).save(data/'b'/'07.png')
def another_class(data): pictures(data, 'q', 12, 5)


@pytest.mark.parametrize('change', [one_more, renamed, redrawn, another_class])
def test_data_that_changed_are_noticed_by_every_command(home, tmp_path, change):
    data = shutil.copytree(home/'data', tmp_path/'data')
    change(data)
    refused('surface', home/'run', '--bits', 'W2A2', '--data', data, '--out', tmp_path/'o', words=['the data are not those', '--changed-data'])
    refused('search', home/'run', '--max-bytes', '600', '--method', 'uniform', '--data', data, '--out', tmp_path/'o', words=['the data are not those'])
    assert not (tmp_path/'o'/'surface.json').exists()


def test_a_few_shot_run_knows_its_data(home, tmp_path):
    data = pictures(tmp_path/'data', 'abcdefghijklmnop', 6, seed=9)
    refused('surface', home/'few', '--episodes', 3, '--n-query', 2, '--split', 'train', '--data', data, '--out', tmp_path/'o', words=['the data are not those'])


def test_the_same_data_elsewhere_are_the_same(home, tmp_path):
    for place in (shutil.copytree(home/'data', tmp_path/'moved'), Path(shutil.make_archive(str(tmp_path/'zipped'), 'zip', home/'data'))):
        done = cli('surface', home/'run', '--bits', 'W2A2', '--data', place, '--out', tmp_path/place.stem/'..'/f'o{place.stem}')
        assert done.exit_code == 0, done.stderr


def test_changed_data_go_on_when_asked(home, tmp_path):
    data = shutil.copytree(home/'data', tmp_path/'data')
    redrawn(data)
    done = cli('surface', home/'run', '--bits', 'W2A2', '--data', data, '--changed-data', '--out', tmp_path/'o')
    assert done.exit_code == 0 and 'note: ' in done.stderr and (tmp_path/'o'/'surface.json').exists(), done.stderr


def test_pairs_are_added_and_other_questions_stay(home, tmp_path):
    out, run = tmp_path/'o', home/'run'
    pairs = lambda: [str(b) for b in Surface.load(out/'surface.json')]
    for args in (['--bits', 'W2A2 FP'], ['--bits', 'W4A4']): assert cli('surface', run, *args, '--out', out).exit_code == 0
    assert pairs() == ['W2A2', 'FP', 'W4A4']
    assert cli('surface', run, '--bits', 'W2A2', '--split', 'val', '--out', out).exit_code == 0
    assert pairs() == ['W2A2'] and Surface.load(out/'surface.json').meta['split'] == 'val'
    kept = [p for p in (out/'surfaces').glob('test-*') if p.is_dir()]
    assert len(kept) == 1 and len(Surface.load(kept[0]/'surface.json')) == 3
    question = json.loads((kept[0]/'question.json').read_text())['question']
    assert question['split'] == 'test' and question['fingerprint'] and question['weights']


def test_two_searches_are_two_answers(home, tmp_path):
    for budget in ('600', '700'):
        done = cli('search', home/'run', '--max-bytes', budget, '--method', 'uniform', '--widths', '2,4', '--ladder', '--out', tmp_path/'o')
        assert done.exit_code == 0, done.stderr
    answers = sorted(p for p in (tmp_path/'o'/'searches').glob('uniform-*') if not p.is_symlink())
    assert len(answers) == 2 and all({'policy.json', 'front.json', 'search.html'} <= {f.name for f in a.iterdir()} for a in answers)


def test_a_run_says_how_its_pictures_were_divided(home):
    run = open_run(home/'run')
    assert run.pool('test').drawn == 'content' and run.about['data']['source'] == run.pool('val').data
    old = {k: v for k,v in run.spec.to_dict().items() if k != 'drawn'}
    assert stored_spec(old).inputs.drawn == 'seed' and stored_spec(old | {'data': 'digits'}).inputs.drawn == ''
    by_seed = load(home/'data', 'test', drawn='seed')
    assert not torch.equal(by_seed.images, run.pool('test').images)


def test_explore_says_when_a_run_was_trained_on(home, tmp_path):
    from mebqat.launch import explorable
    run = shutil.copytree(home/'run', tmp_path/'run')
    assert cli('surface', run, '--bits', 'W2A2').exit_code == 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert explorable(run) == run/'exploration.safetensors'
    with pytest.warns(UserWarning): train_run(open_run(run).spec.changed(epochs=2.), run, resume=True, compile=False)
    with pytest.warns(UserWarning, match='other weights'): explorable(run)


def test_more_pictures_go_on_at_the_batch_size_of_before_when_asked(tmp_path, monkeypatch):
    monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'cache'))
    data, args = pictures(tmp_path/'data', n=20), ['--method', 'qat', '--bits', 'W4A4', '--width', '4', '--no-compile']
    train = lambda *more: cli('train', '--data', data, '--out', tmp_path/'run', '--epochs', 1, *args, *more)
    assert train().exit_code == 0
    batch = open_run(tmp_path/'run').spec.training.batch_size
    for k,c in enumerate('abc'):
        for i in range(40): Image.fromarray(np.full((8, 8), 80*k + i, np.uint8)).save(data/c/f'more{i}.png')
    refused('train', '--data', data, '--out', tmp_path/'run', '--epochs', 1, *args, '--resume', words=['the data are not those', '--changed-data'])
    done = train('--resume', '--changed-data')
    run = open_run(tmp_path/'run')
    assert done.exit_code == 0 and run.spec.training.batch_size == batch and len(run.about['changed data']) == 1, done.stderr


def test_a_checkpoint_that_does_not_know_its_data_is_not_made_shorter(tmp_path):
    from torch import nn
    from mebqat.train import TrainConfig, fit
    from mebqat.methods import float_training
    net = lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    batch = lambda step: (torch.ones(6, 1, 2, 2), torch.tensor([0, 1]*3))
    fit(net(), float_training(), batch, TrainConfig(4, .01), tmp_path)
    with pytest.raises(ValueError, match='4 steps, and 2 are fewer'):
        fit(net(), float_training(), batch, TrainConfig(2, .01), tmp_path, True, facts={'data': {'fingerprint': 'ab'}})
