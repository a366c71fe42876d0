"The command line with few-shot runs: train, surface, info, demo; bad input gets one clear line, exit code 2 and no litter."
import json, re, signal

import pytest
import torch

from mebqat.bits import FP, Bits, BitSpace
from mebqat.demo import NETWORKS
from mebqat.files import find_file, load_whole, save_whole, shipped
from mebqat.runs import open_run, spec_of
from mebqat.runs.episodes import EpisodeRecipe, fold_scales
from mebqat.runs.method_table import names as method_names
from mebqat.runs.surfaces import FEW_PAIRS, open_scores
from mebqat.surface import Surface
from test_cli import cli, good, own_cache, refused, snapshot  # noqa: F401 (own_cache is a fixture)

FEW_SHOT = method_names(trains_on='episodes')
TINY = ['--glyph-classes', 20, '--width', 4, '--n-query', 2, '--no-compile']
RUNS = {'pn': ['--n-way', 4, '--n-tasks', 1, '--steps', 2], 'mebqat-pn': ['--n-way', 4, '--steps', 2, '--distill', '--init', 'RUNS/pn'],
        'pn-qat': ['--n-way', 4, '--n-tasks', 1, '--steps', 1, '--bits', 'W3A8'],
        'mebqat-maml': ['--n-way', 3, '--steps', 2, '--inner-steps', 1, '--learn-rates', '--init', 'RUNS/pn']}


def arguments(method, folder): return [str(a).replace('RUNS', str(folder)) for a in ('--method', method, *RUNS[method], *TINY)]


@pytest.fixture(scope='session')
def few(tmp_path_factory):
    "One tiny run of four methods, an ordinary float run, a checkpoint of an unfinished one."
    folder = tmp_path_factory.mktemp('few')
    for method in RUNS:
        done = good('train', '--out', folder/method, *arguments(method, folder))
        assert done.stdout == '' and done.stderr.splitlines()[-1].startswith(f'{folder/method} holds the trained {method} network')
    good('train', '--method', 'float', '--epochs', .1, '--width', 4, '--batch-size', 256, '--out', folder/'digits')
    tensors, about = load_whole(folder/'mebqat-pn'/'checkpoint.safetensors')
    save_whole(folder/'unfinished'/'checkpoint.safetensors', tensors, about)
    return folder


# Options

def test_every_option_reaches_the_run(tmp_path):
    said = json.loads(good('train', '--out', tmp_path/'run', '--method', 'fomaml', '--data', 'glyphs', '--glyph-classes', 20, '--scheme', 'lsq', '--option', 'per_channel=true',
                           '--n-way', 3, '--k-shot', 2, '--n-query', 1, '--steps', 1, '--n-tasks', 1, '--lr', .01, '--optimizer', 'sgd', '--weight-decay', .001, '--inner-steps', 1,
                           '--inner-lr', .2, '--learn-rates', '--second-order', '--every-step', '--adapts', 'weights norms', '--temperature', .5, '--no-calibrate', '--bn', 'batch',
                           '--jitter', 1, '--size', 16, '--width', 4, '--seed', 3, '--no-compile', '--json').stdout)
    want = spec_of('fomaml', glyph_classes=20, options=(('per_channel', True),), n_way=3, k_shot=2, n_query=1, steps=1, n_tasks=1, lr=.01, optimizer='sgd', weight_decay=.001,
                   inner_steps=1, inner_lr=.2, learn_rates=True, second_order=True, every_step=True, adapts='weights norms', temperature=.5, calibrate=False, jitter=1, size=16, width=4, seed=3)
    assert said['run'] == str(tmp_path/'run') and len(said['history']) == 1 and open_run(tmp_path/'run').spec == want == spec_of(**said['spec'])


def test_a_run_starts_from_a_shipped_network(tmp_path):
    small = ('--method', 'mebqat-maml', '--data', 'glyphs', '--glyph-classes', 20, '--n-way', 3, '--k-shot', 1, '--n-query', 1, '--steps', 1, '--n-tasks', 2, '--lr', 1e-12, '--no-compile')
    good('train', '--out', tmp_path/'run', '--init', 'omniglot_mebqat_pn', *small)
    start = fold_scales(open_run('omniglot_mebqat_pn').model.state_dict())['block3.conv.weight']
    assert torch.allclose(open_run(tmp_path/'run').model.block3.conv.weight, start, atol=1e-9)
    assert 'omniglot_mebqat_pm' in refused('train', '--out', tmp_path/'other', '--init', 'omniglot_mebqat_pm', *small, names='no run at')


# Train, surface, info

@pytest.mark.parametrize('method', ['mebqat-pn', 'mebqat-maml'])
def test_train_surface_info_round_trip(few, method):
    n_way = 4 if method == 'mebqat-pn' else 3
    printed = json.loads(good('surface', few/method, '--episodes', 3, '--n-query', 2, '--json').stdout)
    assert printed == json.loads((few/method/'surface.json').read_text())
    saved, scores = Surface.load(few/method/'surface.json'), open_scores(few/method)
    assert set(saved) == set(scores.accuracy) == set(BitSpace.parse(FEW_PAIRS)) and scores.surface() == saved
    assert {'method': method, 'split': 'test', 'number of episodes': 3, 'episodes': f'{n_way}-way 1-shot, 2 queries a class, seed 0'}.items() <= saved.meta.items()
    assert all(v.shape == (3,) and v.dtype == torch.float64 for v in scores.accuracy.values())
    run = open_run(few/method)
    want = run.sweep(BitSpace.parse('W2A8 FP'), run.episodes(n_query=2), 3)
    for b in want.accuracy: assert torch.equal(want.accuracy[b], scores.accuracy[b])
    assert '<html' in (few/method/'surface.html').read_text(encoding='utf-8')[:200]
    facts = json.loads(good('info', few/method, '--json').stdout)
    assert {'kind': 'few-shot run', 'method': method, 'data': 'glyphs', 'n_way': n_way, 'input': '1x28x28'}.items() <= facts.items()
    assert facts['parameters'] == sum(p.numel() for p in run.model.parameters()) and json.loads(good('info', few/method/'model.safetensors', '--json').stdout) == facts


def test_the_table_has_half_widths_and_a_dedicated_run_its_own_pair(few, tmp_path):
    done = good('surface', few/'pn-qat'/'model.safetensors', '--out', tmp_path/'new'/'here', '--episodes', 3, '--n-way', 3, '--n-query', 2)
    saved = Surface.load(tmp_path/'new'/'here'/'surface.json')
    assert set(saved) == {*BitSpace.parse(FEW_PAIRS), Bits(3, 8)} and saved.meta['episodes'].startswith('3-way') and not (few/'pn-qat'/'surface.json').exists()
    p = saved.at(Bits(3, 8))
    assert f'{100*p.accuracy:.1f} ±{100*max(p.high - p.accuracy, p.accuracy - p.low):.1f}' in done.stdout


def test_options_of_surface_reach_the_episodes(few, tmp_path):
    said = json.loads(good('surface', few/'mebqat-maml', '--out', tmp_path, '--episodes', 2, '--k-shot', 2, '--n-query', 3, '--inner-steps', 0, '--episode-seed', 9,
                           '--split', 'val', '--bits', 'W4A4', '--json').stdout)
    assert {'episodes': '3-way 2-shot, 3 queries a class, seed 9', 'inner steps': 0, 'split': 'val'}.items() <= said['meta'].items()


def test_against_pairs_what_saw_the_same_episodes(few, tmp_path):
    same = ['--episodes', 4, '--n-query', 2, '--n-way', 3, '--bits', 'W2A2,FP']
    good('surface', few/'pn', '--out', tmp_path/'pn', *same)
    assert not (tmp_path/'pn'/'differences.json').exists()
    done = good('surface', few/'mebqat-pn', '--out', tmp_path/'mp', *same, '--against', tmp_path/'pn')
    said = json.loads((tmp_path/'mp'/'differences.json').read_text())
    gaps = open_scores(tmp_path/'mp').minus(open_scores(tmp_path/'pn'))
    assert [(r['bits'], r['difference'], r['low']) for r in said['differences']] == [(b, r.difference, r.low) for b,r in gaps.iterrows()] and said['against'] == str(tmp_path/'pn')
    assert f'{gaps.loc["W2A2", "difference"]:+.2f}' in done.stdout and 'same episodes' in done.stdout
    for more, names in ((['--split', 'val'], 'split'), (['--episode-seed', 1], 'seed'), (['--episodes', 3], 'number of episodes'), (['--bits', 'W3A3'], 'W2A2')):
        before = snapshot(tmp_path)
        refused('surface', few/'mebqat-pn', '--out', tmp_path/'mp', *same, '--against', tmp_path/'pn', *more, names=names)
        assert snapshot(tmp_path) == before
    good('surface', few/'mebqat-pn', '--out', tmp_path/'mp', *same)
    assert not (tmp_path/'mp'/'differences.json').exists()


def test_a_shipped_network_goes_by_its_name(few, tmp_path, monkeypatch):
    def shipped(name):
        if name != 'tiny_pn.safetensors': raise FileNotFoundError(name)
        return few/'mebqat-pn'/'model.safetensors'
    monkeypatch.setattr('mebqat.files.shipped', shipped)
    monkeypatch.chdir(tmp_path)
    before = snapshot(few)
    good('surface', 'tiny_pn', '--episodes', 1, '--n-query', 1, '--bits', 'FP')
    assert (tmp_path/'tiny_pn'/'episodes.safetensors').is_file() and snapshot(few) == before
    assert open_run(find_file(few/'mebqat-pn')).spec.trains_on == 'episodes'
    (tmp_path/'tiny_pn').rename(tmp_path/'gone')
    assert json.loads(good('info', 'tiny_pn', '--json').stdout)['method'] == 'mebqat-pn'
    refused('info', 'other', names='no run at other')


@pytest.mark.parametrize('method', ['mebqat-pn', 'mebqat-maml'])
def test_a_stopped_run_resumes_to_the_same_weights(few, tmp_path, monkeypatch, method):
    real = EpisodeRecipe.feed
    def stopping(*args):
        episodes = real(*args)
        def at(step):
            signal.raise_signal(signal.SIGINT)
            return episodes(step)
        return at
    with monkeypatch.context() as patch:
        patch.setattr(EpisodeRecipe, 'feed', stopping)
        done = cli('train', '--out', tmp_path/'run', *arguments(method, few))
    assert done.exit_code == 130 and done.stderr.splitlines()[-1].startswith('stopped after step 1 of 2; go on with resume (--resume)')
    refused('train', '--out', tmp_path/'run', *arguments(method, few), names='--resume')
    good('train', '--out', tmp_path/'run', *arguments(method, few), '--resume')
    now, whole = (load_whole(f/'model.safetensors')[0] for f in (tmp_path/'run', few/method))
    assert now.keys() == whole.keys() and all(torch.equal(now[k], whole[k]) for k in now)


# Bad input

BAD_SETTINGS = {
    'mebqat-pn --epochs 1': '--epochs is not an option of mebqat-pn; use --steps', 'mebqat-pn --model cnn4': '--model', 'mebqat-pn --augment': 'use --jitter',
    'qat --n-way 5': '--n-way is not an option of qat', 'mebqat --steps 5': 'use --epochs', 'pn --inner-lr .1': '--inner-lr is not an option of pn',
    'fomaml --test-way 5': '--test-way', 'mebqat-maml --design both': '--design', 'mebqat-pn --no-calibrate': '--calibrate', 'pm': 'pn-qat',
    'mebqat-pn --n-way 200': '--n-way 200', 'mebqat-pn --n-way 1': '--n-way', 'mebqat-pn --k-shot 0': '--k-shot', 'mebqat-pn --k-shot 19 --n-query 5': '24 images a class',
    'mebqat-pn --n-query 0': '--n-query', 'mebqat-pn --steps 0': '--steps', 'mebqat-pn --n-tasks 0': '--n-tasks', 'mebqat-pn --glyph-classes 0': '--glyph-classes',
    'mebqat-pn --glyph-classes 2': '2', 'mebqat-pn --test-way 1': '--test-way', 'mebqat-pn --test-way 0': '--test-way', 'mebqat-pn --bits W1A1': 'W1A1', 'mebqat-pn --bits W17A4': '17', 'pn --bits W2A2': '--bits is not an option of pn',
    'pn-qat': 'needs --bits', 'pn-qat --bits W2A2,W4A4': 'one pair', 'pn --guaranteed W2A2': '--guaranteed is not an option of pn', 'pn-qat --bits W2A2 --distill': '--distill is not an option of pn-qat', 'mebqat-pn --distill --bn running': "distill with --bn 'batch'", 'mebqat-pn --guaranteed W1A1': 'W1A1',
    'mebqat-pn --design outside': 'outside', 'mebqat-pn --jitter -1': '-1', 'mebqat-pn --bn reestimate': 'reestimate', 'mebqat-pn --split-file nowhere': 'nowhere',
    'mebqat-maml --adapts everything': 'everything', 'mebqat-maml --center': "centered features are for a classifier that adapts alone, 'head'", 'pn --center': '--center is not an option of pn', 'mebqat-maml --temperature 0': 'temperature must be positive, got 0', 'mebqat-maml --temperature nan': 'nan', 'mebqat-maml --inner-steps -1': '-1', 'mebqat-maml --inner-lr 0': '0', 'mebqat-maml --inner-lr nan': 'nan',
    'mebqat-pn --lr nan': 'nan', 'mebqat-pn --lr 0': '0', 'mebqat-pn --width 0': '0', 'mebqat-pn --size 4': '4', 'mebqat-pn --optimizer lion': 'lion',
    'mebqat-pn --option name=sat': 'sat', 'mebqat-pn --option step': 'step', 'mebqat-pn --scheme fsq': 'fsq', 'mebqat-pn --data nowhere': 'nowhere', 'mebqat-pn --init nowhere': 'nowhere',
    'mebqat-pn --threads -1': '-1', 'mebqat-pn --device nowhere': 'nowhere', 'mebqat --data omniglot.zip': 'omniglot is split over classes', 'float --data mini_imagenet': 'mini_imagenet'}


@pytest.mark.parametrize('settings', BAD_SETTINGS)
def test_bad_settings_are_refused_before_anything_is_written(tmp_path, settings):
    method = settings.split()[0]
    small = ['--width', 4, *(['--glyph-classes', 20, '--n-way', 3] if method in FEW_SHOT else [])]
    refused('train', '--out', tmp_path/'run', *small, '--method', *settings.split(), names=BAD_SETTINGS[settings])
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('command, names', [
    ('surface FEW/mebqat-maml --n-way 4', '--n-way 4'), ('surface FEW/mebqat-pn --n-way 40', '--n-way 40'), ('surface FEW/mebqat-pn --n-way 0', '--n-way'),
    ('surface FEW/mebqat-pn --episodes 0', '--episodes must be 1 or more, got 0'), ('surface FEW/mebqat-pn --k-shot 0', '--k-shot'), ('surface FEW/mebqat-pn --n-query 20', '21 images a class'),
    ('surface FEW/mebqat-pn --n-query 0', '--n-query'), ('surface FEW/mebqat-maml --inner-steps -1', '--inner-steps'), ('surface FEW/mebqat-pn --inner-steps 1', 'no inner loop'),
    ('surface FEW/mebqat-pn --bits W1A1', 'W1A1'), ('surface FEW/mebqat-pn --split most', 'most'), ('surface FEW/mebqat-pn --data FEW', 'FEW'), ('surface FEW/mebqat-pn --out FEW/pn/run.json', 'run.json'),
    ('surface FEW/mebqat-pn --against FEW/digits', 'no episodes.safetensors'), ('surface FEW/mebqat-pn --against FEW/pn/model.safetensors', 'holds no episodes'),
    ('surface FEW/digits --episodes 5', '--episodes is for few-shot runs'), ('surface FEW/unfinished', 'unfinished'),
    ('train --method pn --init FEW/digits --out FEW/new --width 4 --glyph-classes 20 --n-way 3', 'cannot start pn'),
    ('train --method mebqat-pn --init FEW/pn --out FEW/new --width 8 --glyph-classes 20 --n-way 3', 'cannot start mebqat-pn'),
    ('train --init FEW/pn --out FEW/new --width 4', 'FEW/pn'), ('train --method pn --out FEW/mebqat-pn --width 4 --glyph-classes 20 --n-way 3', "method='mebqat-pn' there"),
    ('demo --few-shot --epochs 3 --out FEW/new', '--steps'), ('demo --steps 3 --out FEW/new', '--epochs'), ('demo --few-shot --steps 0 --out FEW/new', '0')])
def test_bad_commands_are_refused_and_change_nothing(few, command, names):
    before = snapshot(few)
    refused(*command.replace('FEW', str(few)).split(), names=names.replace('FEW', str(few)))
    assert snapshot(few) == before and not (few/'new').exists()


def test_divergence_names_the_inner_step(few, tmp_path):
    done = cli('train', '--out', tmp_path/'run', '--method', 'mebqat-maml', '--n-way', 3, '--steps', 1, '--inner-lr', 1e30, *TINY)
    said = done.stderr.splitlines()[-1]
    assert done.exit_code == 2 and said.startswith('mebqat: the inner loop diverged') and re.search(r'step \d', said) and not list(tmp_path.rglob('*.safetensors'))


def test_the_demo_makes_its_page(tmp_path):
    done = good('demo', '--few-shot', '--steps', 1, '--out', tmp_path/'demo')
    page = (tmp_path/'demo'/'fewshot.html').read_text(encoding='utf-8')
    for name in NETWORKS.values(): assert name in page and name.split()[0].strip(',') in done.stdout
    assert done.stdout.count('±') == 20 and 'W8A8' in done.stdout and page.count('class="plot"') == 2
    backs = {m: open_run(tmp_path/'demo'/'runs'/m).spec for m in NETWORKS}
    passes = {m: b.training.steps*b.training.n_tasks for m,b in backs.items()}
    assert passes['mebqat-pn'] == passes['pn-qat']


@pytest.mark.parametrize('name', ('omniglot_mebqat_pn', 'omniglot_mebqat_maml'))
def test_the_shipped_networks_run_on_characters_that_need_no_download(name, tmp_path, monkeypatch):
    monkeypatch.setenv('MEBQAT_DATA', str(tmp_path))
    done = good('surface', name, '--data', 'glyphs', '--n-way', 20, '--episodes', 20, '--bits', 'W2A2 FP', '--out', tmp_path/'out')
    seen = Surface.load(tmp_path/'out'/'surface.json')
    assert seen.meta['data'] == 'glyphs' and seen.at(Bits.parse('W2A2')).accuracy > .9 and seen.at(FP).accuracy > .95, done.stderr


@pytest.mark.parametrize('name, shot, pairs', (('omniglot_mebqat_pn', 1, 'W2A2 W8A3'), ('omniglot_mebqat_pn', 5, 'W8A3'), ('omniglot_mebqat_maml', 1, 'W2A2 W3A8')))
def test_shipped_networks_agree_with_the_stored_results(name, shot, pairs, data_root, monkeypatch):
    "Twenty of the 600 episodes, so within four standard errors of the stored mean."
    if missing := [f for f in ('omniglot.zip', 'omniglot_vinyals_split.json') if not (data_root/f).is_file()]: pytest.skip(f'{data_root} has no {missing[0]}')
    monkeypatch.setenv('MEBQAT_DATA', str(data_root))
    run = open_run(shipped(f'{name}.safetensors'))
    stored = json.loads(shipped('results/omniglot_few_shot.json').read_text())
    points = {p['bits']: p['accuracy'] for r in stored['runs'] if (r['name'], r['k_shot']) == (name.removeprefix('omniglot_').replace('_', '-'), shot) for p in r['points']}
    scores = run.sweep(BitSpace.parse(pairs), run.episodes(n_way=20, k_shot=shot), 20)
    for b,v in scores.accuracy.items(): assert abs(float(v.mean()) - points[str(b)]) < 4*float(v.std())/20**.5, (b, float(v.mean()), points[str(b)])
    assert scores.meta['fingerprint'] == next(r['protocol']['fingerprint'] for r in stored['runs'] if r['name'] == 'mebqat-pn')
