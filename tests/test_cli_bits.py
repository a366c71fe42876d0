"Bits that are learned and bits that are searched, on the command line: found, kept, resumed, and refused where they make no sense."
import json

import pytest
import torch

from mebqat.files import load_whole, save_whole
from mebqat.runs import search as policies
from mebqat.bits import Bits, Policy
from mebqat.cli import LEARNED
from mebqat.cost import profile
from mebqat.evaluate import fitness, score
from mebqat.layers import bit_layers
from mebqat.mixed.metaquantnet import export_weights, generators
from mebqat.runs import open_run, spec_of, train_run
from mebqat.mixed.front import Front
from mebqat.mixed.ledger import SearchResult
from mebqat.runs.images import ImageRecipe
from mebqat.runs.method_table import METHODS, names
from mebqat.runs.options import flag, options_in
from mebqat.runs.policies import load_policy, save_policy, from_text
from mebqat.surface import Surface
from mebqat.train import Interrupted
from test_cli import cli, good, refused

SMALL = ['--width', '4', '--no-compile']
QUICK = ['--lam', '.02', '--eta', '1', '--epochs', '3', *SMALL]
RUNS = {'float': ['train', '--method', 'float', '--epochs', 4, *SMALL], 'qat': ['train', '--method', 'qat', '--bits', 'W4A4', '--epochs', .5, *SMALL],
        'mebqat': ['train', '--bits', 'W2A2 W2A4 W2A8 W4A2 W4A4 W4A8 W8A2 W8A4 W8A8 FP', '--epochs', 4, '--seed', 3, *SMALL],
        'adabits': ['train', '--method', 'adabits', '--bn', 'switchable', '--epochs', 2, *SMALL],
        'meta': ['train', '--method', 'metaquantnet', '--init', 'RUNS/float', '--bits', 'W2A2 W4A4 W8A8', '--hidden', 8, '--epochs', 2, *SMALL],
        'pair': ['adaqat', *QUICK], 'layers': ['adaqat', '--granularity', 'layer', '--hardware', 'bitops', *QUICK],
        'floor': ['adaqat', *QUICK, '--lam', '9'], 'frac': ['adaqat', '--method', 'fracbits', '--target-bytes', '1kB', '--eta', '1', '--epochs', 2, *SMALL]}
LAYERS = ('block2.conv', 'block3.conv', 'block4.conv')
BUDGET = ['--max-bytes', '1.2kB', '--max-bitops', '2.8M']  # of 0.72 to 1.47 kB and 2.5 to 3.5 MBitOPs


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "One small run of every kind; what each said is beside it."
    folder = tmp_path_factory.mktemp('bits')
    for name,(command, *rest) in RUNS.items():
        done = good(command, '--out', folder/name, *(str(r).replace('RUNS', str(folder)) for r in rest))
        (folder/f'{name}.out').write_text(done.stdout)
        (folder/f'{name}.err').write_text(done.stderr)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch): monkeypatch.setenv('MEBQAT_CACHE', str(tmp_path/'cache'))


def snapshot(folder): return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob('*')) if p.is_file()}


# Learned bits

@pytest.mark.parametrize('name', ['pair', 'layers', 'floor', 'frac'])
def test_learned_bits_are_told_kept_and_drawn(runs, name):
    run, out = open_run(runs/name), (runs/f'{name}.out').read_text()
    setting, steps = run.setting, policies.trajectory(runs/name)
    pairs = list(setting.values()) if isinstance(setting, Policy) else [setting]
    assert isinstance(setting, Policy) == (name in ('layers', 'frac'))
    if isinstance(setting, Policy):
        assert tuple(setting) == LAYERS
        assert all(line.split('│')[1:4] == [f' {n:<11} ', f'{b.w:>12} ', f'{b.a:>16} '] for (n, b), line in zip(setting.items(), [l for l in out.splitlines() if 'block' in l], strict=True))
    else: assert out.startswith(f'found: {setting}\n')
    row = run.history.rows[-1]
    assert steps.step.tolist() == list(range(1, row['step'] + 1))
    assert [row['weight bits'], row['activation bits']] == pytest.approx([sum(getattr(b, k) for b in pairs)/len(pairs) for k in 'wa'])
    assert f'{100*row["val found"]:.1f} %' in out
    assert [l.removeprefix('note: ') for l in (runs/f'{name}.err').read_text().splitlines() if l.startswith('note: ') and 'steps are few' not in l] == run.concerns
    page = (runs/name/'trajectory.html').read_text(encoding='utf-8')
    assert '<html' in page[:100] and 'Learned bits: small_cnn on digits' in page and all(w in page for w in run.concerns)
    facts = json.loads(good('info', runs/name, '--json').stdout)
    assert facts['method'] == RUNS[name][RUNS[name].index('--method') + 1 if '--method' in RUNS[name] else 0]
    assert facts['found'] == (', '.join(f'{n} {b}' for n,b in setting.items()) if isinstance(setting, Policy) else str(setting))
    assert facts.get('concerns') == ('; '.join(run.concerns) or None)


def test_a_price_too_high_is_warned_of(runs):
    run = open_run(runs/'floor')
    assert run.setting == Bits(2, 2) and 'lam=9 drove every width to the floor' in run.concerns[0]
    assert open_run(runs/'pair').setting > Bits(2, 2)


def test_first_and_last_layers_are_pinned_at_eight_bits(runs, tmp_path):
    run = open_run(runs/'pair')
    assert [m.pinned for m in bit_layers(run.model).values()] == [Bits(8, 8), None, None, None, Bits(8, 8)]
    said = json.loads(good('adaqat', '--out', tmp_path/'run', *QUICK, '--epochs', '.2', '--start', 'W5A7', '--json').stdout)
    found, weights = from_text(said['found']), {n: m.weight.numel() for n,m in bit_layers(run.model).items()}
    assert said['cost']['bytes'] == sum(w*(found.w if n in LAYERS else 8)/8 for n,w in weights.items())
    assert said['cost'] == {'bytes': (c := profile(run.model, (1, 1, 8, 8)).at(found)).weight_bytes, 'bitops': c.bitops}
    assert policies.trajectory(tmp_path/'run')[['n_w', 'n_a']].iloc[0].tolist() == [5, 7]
    assert spec_of(**said['spec']) == open_run(tmp_path/'run').spec


def test_fracbits_ends_within_its_target(runs, tmp_path):
    run = open_run(runs/'frac')
    assert profile(run.model, (1, 1, 8, 8)).at(run.setting).weight_bytes <= 1000
    said = json.loads(good('train', '--method', 'fracbits', '--target-bitops', '.9 MBitOPs', '--granularity', 'global', '--epochs', 1, '--out', tmp_path/'run', '--json', *SMALL).stdout)
    assert said['cost']['bitops'] <= 9e5 == said['spec']['target_bitops'] and from_text(said['found']) == open_run(tmp_path/'run').setting


def test_the_surface_of_learned_bits_is_where_they_ended(runs):
    run = open_run(runs/'pair')
    good('surface', runs/'pair')
    assert list(Surface.load(runs/'pair'/'surface.json')) == [run.setting]
    run = open_run(runs/'layers')
    shown, point = good('surface', runs/'layers').stdout, score(run.model, run.setting, run.pool('test'), run.pool('train'))
    saved = Surface.load(runs/'layers'/'surface.json')
    assert set(saved) == set(run.setting.values()) and saved.meta['accuracy at its policy'] == point.accuracy
    assert f'At its own policy: {100*point.accuracy:.1f} % ({100*point.low:.1f} to {100*point.high:.1f}).' in shown


def test_learning_starts_from_a_float_run(runs, tmp_path):
    losses = {}
    for name,more in {'scratch': [], 'float': ['--init', runs/'float']}.items():
        good('adaqat', '--out', tmp_path/name, *QUICK, '--epochs', 1, *more)
        losses[name] = open_run(tmp_path/name).history.rows[0]['loss']
    assert losses['float'] < .7*losses['scratch']


def test_an_interrupted_learning_resumes_to_the_same_bits(runs, tmp_path):
    spec, left = open_run(runs/'layers').spec, [20]
    def stop():
        left[0] -= 1
        return left[0] == 0
    with pytest.raises(Interrupted, match='--resume'): train_run(spec, tmp_path/'run', compile=False, stop=stop)
    assert json.loads(good('info', tmp_path/'run', '--json').stdout)['kind'] == 'unfinished run'
    refused('adaqat', '--out', tmp_path/'run', *RUNS['layers'][1:], '--lam', '.2', '--resume', names='--lam 0.02 there, 0.2 here')
    good('adaqat', '--out', tmp_path/'run', *RUNS['layers'][1:], '--resume')
    assert open_run(tmp_path/'run').setting == open_run(runs/'layers').setting
    assert (tmp_path/'run'/'trajectory.json').read_bytes() == (runs/'layers'/'trajectory.json').read_bytes()
    a, b = (load_whole(f/'model.safetensors')[0] for f in (tmp_path/'run', runs/'layers'))
    assert all(torch.equal(a[k], b[k]) for k in b)


@pytest.mark.parametrize('key, value', [('found', 'absent'), ('found', None), ('found', 7), ('found', 'W99A1'), ('found', 'W1A1'), ('found', {}), ('found', {'conv9': 'W2A2'}),
                                        ('found', {'block2.conv': 4}), ('concerns', 'absent'), ('concerns', None), ('concerns', [7])], ids=str)
def test_weights_that_misstate_what_was_found_are_refused(runs, tmp_path, key, value):
    tensors, about = load_whole(runs/'pair'/'model.safetensors')
    about.pop(key) if value == 'absent' else about.update({key: value})
    save_whole(tmp_path/'model.safetensors', tensors, about)
    refused('info', tmp_path, names='model.safetensors')


@pytest.mark.parametrize('options, names', {
    '--lam -1': '-1', '--lam nan': 'nan', '--eta 0': 'eta', '--start W99A1': '99', '--start 8': '8', '--start W1A1': 'W1A1', '--granularity row': 'row', '--hardware watts': 'watts',
    '--bn switchable': 'switchable', '--skip none --ends W8A8': 'spares none', '--ends W0A4': '0', '--method mebqat': 'mebqat train --method mebqat', '--method fracbits': 'needs --target-bytes or --target-bitops',
    '--method fracbits --target-bytes 10': 'out of reach', '--method fracbits --target-bitops 9T': 'out of reach', '--method fracbits --target-bytes much': '--target-bytes',
    '--method fracbits --target-bytes 1k --target-bitops 1M': 'one of them', '--method fracbits --lam .1 --target-bytes 1k': '--lam', '--target-bytes 1k': '--target-bytes',
    '--method fracbits --start W4A4 --target-bytes 1k': 'W4A4', '--init nowhere': 'nowhere', '--epochs 0': '0', '--n-way 3': None}.items())
def test_bad_settings_of_learning_are_refused_before_anything_is_written(tmp_path, options, names):
    args = ['adaqat', '--out', tmp_path/'run', *SMALL, *options.split()]
    if names is None: assert cli(*args).exit_code == 2
    else: refused(*args, names=names)
    assert not (tmp_path/'run').exists()


def test_only_methods_that_learn_bits_take_their_options(tmp_path):
    for method,option in (('qat', 'lam'), ('mebqat', 'granularity'), ('float', 'start')):
        bits = [] if method == 'float' else ['--bits', 'W4A4']
        refused('train', '--method', method, *bits, flag(option), 1, '--out', tmp_path/'run', names=f'{flag(option)} is not an option of {method}')
    refused('train', '--method', 'adaqat', '--bits', 'W4A4', '--out', tmp_path/'run', names='--bits is not an option of adaqat; use --start')
    refused('adaqat', '--out', tmp_path/'run', *SMALL, '--target-bytes', '1k', names='not an option of adaqat')
    assert not (tmp_path/'run').exists()


# Search

def searched(runs, folder, *more, run='mebqat'): return good('search', runs/run, '--out', folder, '--population', 6, '--generations', 3, *more)


@pytest.fixture(scope='module')
def found(runs):
    "A search in its run's folder: what it printed as JSON."
    return json.loads(searched(runs, runs/'mebqat', *BUDGET, '--seed', 5, '--json').stdout)


def test_a_search_keeps_policy_scores_front_and_page(runs, found):
    folder, run = runs/'mebqat', open_run(runs/'mebqat')
    policy, scores = load_policy(folder/'policy.json'), SearchResult.load(found['scores'])
    assert policy == from_text(found['policy']) == scores.best.policy and scores.finished and scores.config['seed'] == 5 and scores.budget.max_bytes == 1200
    cost = profile(run.model, (1, 1, 8, 8)).at(policy)
    assert cost.weight_bytes == found['rows'][0]['bytes'] <= 1200 and cost.bitops == found['rows'][0]['bitops'] <= 2.8e6
    front = Front.load(folder/'front.json')
    assert set(front.methods) == {'genetic', 'uniform'} and front.best(1200).fitness >= scores.best.fitness
    page = (folder/'search.html').read_text(encoding='utf-8')
    assert '<html' in page[:100] and str(scores.evaluations) + ' policies' in page and 'block3.conv' in page
    assert {k: v for k,v in json.loads((folder/'policy.json').read_text()).items() if k in found} == {k: v for k,v in found.items() if k not in ('policy', 'scores')}


def test_fitness_never_sees_a_test_image_and_the_test_set_answers_once(runs, found, monkeypatch, tmp_path):
    run = open_run(runs/'mebqat')
    train, val, test = (run.pool(s) for s in ('train', 'val', 'test'))
    assert found['fitness']['split'] == 'val' and found['fitness']['fingerprint'] == val.fingerprint()
    fit, policy = fitness(run.model, val, train), from_text(found['policy'])
    assert found['rows'][0]['validation'] == fit(policy) and found['rows'][0]['test'] == score(run.model, policy, test, train).accuracy
    pairs = [(fit(p), -b.w*b.a, b) for b in run.spec.space() if not b.is_full for p in [Policy.uniform(LAYERS, b)]
             if (c := profile(run.model, (1, 1, 8, 8)).at(p)).weight_bytes <= 1200 and c.bitops <= 2.8e6]
    assert found['rows'][1]['bits'] == f'uniform {max(pairs)[2]}' and found['rows'][1]['validation'] == max(pairs)[0]
    seen = []
    monkeypatch.setattr(policies, 'score', lambda model, p, data, bn: seen.append((p, data.split)) or score(model, p, data, bn))
    searched(runs, tmp_path, *BUDGET)
    assert [s for _,s in seen] == ['test']*2


@pytest.mark.parametrize('method', policies.SEARCHES)
def test_every_search_meets_the_budget_on_a_ladder(runs, tmp_path, method):
    if method == 'exact': pytest.importorskip('scipy', reason="scipy is not installed; get it with: pip install 'mebqat[search]'")
    done = searched(runs, tmp_path, '--max-bytes', '1.1kB', '--method', method, '--fitness-images', 60, run='adabits')
    policy, run = load_policy(tmp_path/'policy.json'), open_run(runs/'adabits')
    assert set(policy.values()) <= set(run.spec.space()) and profile(run.model, (1, 1, 8, 8)).at(policy).weight_bytes <= 1100
    assert f'{method} search' in done.stdout and 'uniform W' in done.stdout and all(n in done.stdout for n in LAYERS)
    assert json.loads((tmp_path/'policy.json').read_text())['fitness']['images'] == 60


def test_candidates_are_those_that_were_asked_for(runs, tmp_path):
    for more,pairs in ((['--widths', '2,8', '--act-widths', '4'], {Bits(2, 4), Bits(8, 4)}), (['--widths', '2 8', '--ladder'], {Bits(2, 2), Bits(8, 8)}), (['--widths', '2,8'], {Bits(w, a) for w in (2, 8) for a in (2, 8)})):
        said = json.loads(searched(runs, tmp_path, '--max-bytes', 1200, *more, '--json').stdout)
        assert {p for c in SearchResult.load(said['scores']).space.choices.values() for p in c} == pairs


def test_a_shipped_network_is_searched_by_name(tmp_path):
    good('search', 'digits_mebqat', '--max-bytes', '3k', '--method', 'uniform', '--widths', '2,8', '--fitness-images', 40, '--out', tmp_path)
    assert set(load_policy(tmp_path/'policy.json').values()) <= {Bits(w, a) for w in (2, 8) for a in (2, 8)}


def counted(monkeypatch, at, what):
    "Make the fitness do something at its n-th call."
    calls, real = [], policies.fitness
    def made(*args, **kwargs):
        fit = real(*args, **kwargs)
        def one(policy):
            calls.append(policy)
            return what() if len(calls) == at else fit(policy)
        return one
    monkeypatch.setattr(policies, 'fitness', made)
    return calls


def ctrl_c(): raise KeyboardInterrupt


def test_an_interrupted_search_loses_nothing_and_resumes_to_the_same(runs, found, tmp_path, monkeypatch):
    args = ['search', runs/'mebqat', '--out', tmp_path, '--population', 6, '--generations', 3, *BUDGET, '--seed', 5]
    with monkeypatch.context() as m:
        calls = counted(m, 9, ctrl_c)
        done = cli(*args)
    assert done.exit_code == 130 and done.stdout == '' and 'policies were scored and are in' in done.stderr.splitlines()[-1] and '--resume' in done.stderr.splitlines()[-1]
    assert not (tmp_path/'policy.json').exists()
    (file,) = tmp_path.glob('search-genetic-*.json')
    assert not SearchResult.load(file).finished
    refused(*args, names=file)
    with monkeypatch.context() as m:
        rest = counted(m, 0, None)
        again = json.loads(good(*args, '--resume', '--json').stdout)
    assert not set(calls[:8]) & set(rest)
    assert again['policy'] == found['policy'] and again['rows'] == found['rows'] and file.name == found['scores'].rsplit('/', 1)[1]
    refused(*args, names='--resume')


def test_another_budget_or_seed_is_another_search(runs, tmp_path):
    for more in (['--max-bytes', 1200], ['--max-bytes', 1201], ['--max-bytes', 1200, '--seed', 1]): searched(runs, tmp_path, *more, '--widths', '2,8')
    assert len([*tmp_path.glob('search-genetic-*.json')]) == 3 and len([*tmp_path.glob('search-uniform-*.json')]) == 2


def test_a_fitness_that_is_no_number_is_named_and_scores_are_kept(runs, tmp_path, monkeypatch):
    args = ['search', runs/'mebqat', '--out', tmp_path, '--population', 6, '--generations', 2, *BUDGET]
    with monkeypatch.context() as m:
        counted(m, 8, lambda: float('nan'))
        said = cli(*args)
    assert said.exit_code == 2 and 'finite number, but gave nan' in said.stderr.splitlines()[-1] and not (tmp_path/'policy.json').exists()
    assert sum(SearchResult.load(f).evaluations for f in tmp_path.glob('search-*.json')) == 7
    good(*args, '--resume')


def test_a_network_that_answers_nan_is_refused(runs, tmp_path):
    tensors, about = load_whole(runs/'mebqat'/'model.safetensors')
    tensors['fc.bias'][0] = float('nan')
    save_whole(tmp_path/'run'/'model.safetensors', tensors, about)
    refused('search', tmp_path/'run', *BUDGET, names='NaN')
    assert not (tmp_path/'run'/'policy.json').exists()


@pytest.mark.parametrize('command, names', {
    'mebqat': '--max-bytes, --max-bitops or both', 'mebqat --max-bytes 10': 'below what policies cost here: 716 B to 1.47 kB', 'mebqat --max-bytes 1G': 'above what policies cost here: 716 B to 1.47 kB',
    'mebqat --max-bitops 1': 'below', 'mebqat --max-bitops 9T': 'above', 'mebqat --max-bytes much': '--max-bytes', 'mebqat --max-bytes=-5': '-5', 'mebqat --max-bytes 0': '0',
    'mebqat BUDGET --widths ,': 'empty', 'mebqat BUDGET --widths 2,x': "'x'", 'mebqat BUDGET --widths 0,2': '0', 'mebqat BUDGET --widths 1,2': 'goes down to W2A2', 'mebqat BUDGET --widths 99': '99',
    'mebqat BUDGET --widths 4': 'nothing to search', 'mebqat BUDGET --act-widths ,': 'empty', 'mebqat BUDGET --ladder --act-widths 2': 'ladder', 'adabits --max-bytes 1k --widths 2,3 --ladder': 'no batch norm was kept for W3A3',
    'mebqat BUDGET --method magic': 'magic', 'mebqat BUDGET --population 0': '0', 'mebqat BUDGET --generations -1': '-1', 'mebqat BUDGET --fitness-images 0': '0', 'mebqat BUDGET --fitness-images 9999': '9999',
    'mebqat BUDGET --threads -1': '-1', 'mebqat BUDGET --data nowhere': 'nowhere', 'float BUDGET': 'float run', 'qat BUDGET': 'qat run', 'pair BUDGET': 'adaqat run', 'nowhere BUDGET': 'nowhere',
    'mebqat/run.json BUDGET': 'run.json'}.items())
def test_bad_searches_are_refused_and_change_nothing(runs, command, names):
    before, (run, *rest) = snapshot(runs), command.split()
    refused('search', runs/run, *(a for r in rest for a in (BUDGET if r == 'BUDGET' else [r])), names=names)
    assert snapshot(runs) == before


def test_a_few_shot_network_is_not_searched(tmp_path): refused('search', 'omniglot_mebqat_pn', '--max-bytes', '1k', '--out', tmp_path, names='mebqat-pn run')


def test_the_exact_search_says_what_it_needs(runs, monkeypatch):
    monkeypatch.setattr(policies, 'find_spec', lambda name: None)
    refused('search', runs/'mebqat', *BUDGET, '--method', 'exact', names="pip install 'mebqat[search]'")


def test_a_small_budget_gives_the_smallest_weights_and_keeps_the_activations(runs, tmp_path):
    said = json.loads(searched(runs, tmp_path, '--max-bytes', 740, '--widths', '2,8', '--json').stdout)
    assert set(said['policy'].values()) == {'W2A8'}


def test_a_policy_is_found_and_tuned_over_generated_weights(runs, tmp_path):
    "Search over a metaquantnet run, then train on from the weights its generators make at the policy."
    run = open_run(runs/'meta')
    assert (run.spec.options.hidden, set(generators(run.model))) == (8, set(LAYERS)) and run.history.rows[-1]['val W8A8'] > .5
    said = json.loads(good('search', runs/'meta', '--out', tmp_path/'found', *BUDGET, '--population', 8, '--generations', 2, '--json').stdout)
    policy = load_policy(tmp_path/'found'/'policy.json')
    assert from_text(said['policy']) == policy and {b.w for b in policy.values()} | {b.a for b in policy.values()} <= {2, 4, 8}
    good('train', '--method', 'qat', '--policy', tmp_path/'found'/'policy.json', '--init', runs/'meta', '--epochs', .1, '--out', tmp_path/'tuned', *SMALL)
    tuned = open_run(tmp_path/'tuned')
    start, there = ImageRecipe(tuned.spec).float_network(tuned.pool('train')).state_dict(), export_weights(run.model, policy).state_dict()
    assert tuned.setting == policy and all(torch.equal(v, there[k]) for k,v in start.items())


def test_a_search_by_likelihood_shows_accuracies(runs, tmp_path):
    said = json.loads(good('search', runs/'mebqat', '--out', tmp_path, *BUDGET, '--by', 'likelihood', '--population', 8, '--generations', 2, '--json').stdout)
    run, policy = open_run(runs/'mebqat'), from_text(said['policy'])
    val, train = (run.pool(s) for s in ('val', 'train'))
    scored = SearchResult.load(said['scores'])
    assert scored.best.policy == policy and scored.best.fitness == fitness(run.model, val, train, by='likelihood')(policy) and said['fitness']['by'] == 'likelihood'
    right = fitness(run.model, val, train)
    assert said['rows'][0]['validation'] == right(policy) and all(s.accuracy == right(s.policy) for s in Front.load(tmp_path/'front.json'))
    assert 'The fittest policies within the budget' in (tmp_path/'search.html').read_text(encoding='utf-8')


def test_shared_weights_are_the_control_without_generators(runs, tmp_path):
    good('train', '--method', 'metaquantnet', '--init', runs/'float', '--hidden', 0, '--epochs', .2, '--out', tmp_path/'run', *SMALL)
    run = open_run(tmp_path/'run')
    assert generators(run.model) == {} and len(run.spec.space()) == 25


def test_an_unknown_fitness_is_refused(runs, tmp_path):
    refused('search', runs/'mebqat', '--out', tmp_path/'new', *BUDGET, '--by', 'luck', names='luck')
    assert not (tmp_path/'new').exists()


@pytest.mark.parametrize('said, names', [([], '--init'), (['--init', 'RUNS/float', '--bits', 'FP'], 'weight widths: an empty set'), (['--init', 'RUNS/float', '--hidden', -1], '-1'),
                                         (['--init', 'RUNS/nothing'], 'nothing'), (['--init', 'RUNS/mebqat'], 'holds no float')], ids=str)
def test_generators_that_cannot_be_are_refused(runs, tmp_path, said, names):
    refused('train', '--method', 'metaquantnet', '--out', tmp_path/'run', *(str(w).replace('RUNS', str(runs)) for w in said), *SMALL, names=names)
    assert not (tmp_path/'run').exists()


# Training at a policy

def test_a_policy_that_was_found_is_trained_on(runs, found, tmp_path):
    file = runs/'mebqat'/'policy.json'
    good('train', '--method', 'qat', '--policy', file, '--init', runs/'mebqat', '--epochs', 1, '--out', tmp_path/'run', *SMALL)
    run = open_run(tmp_path/'run')
    assert run.setting == load_policy(file) and 'val policy' in run.history.rows[-1]
    start, ours = ImageRecipe(run.spec).float_network(run.pool('train')).state_dict(), open_run(runs/'mebqat').model.state_dict()
    assert all(torch.equal(v, ours[k]) for k,v in start.items()) and 'block2.conv.weight' in start
    shown = good('surface', tmp_path/'run').stdout
    assert f'At its own policy: {100*score(run.model, run.setting, run.pool("test"), run.pool("train")).accuracy:.1f} %' in shown
    assert json.loads(good('info', tmp_path/'run', '--json').stdout)['policy'] == ', '.join(f'{n} {b}' for n,b in run.setting.items())


@pytest.mark.parametrize('policy, names', [(Policy.uniform(('conv1', 'conv2'), Bits(2, 2)), 'conv1'), (Policy.uniform(LAYERS[:2], Bits(2, 2)), 'block4.conv'),
                                           (Policy.uniform(LAYERS, Bits(1, 1)), 'W1A1'), (Policy.uniform(('block1.conv', *LAYERS), Bits(2, 2)), 'block1.conv')], ids=str)
def test_a_policy_of_another_network_is_refused(tmp_path, policy, names):
    save_policy(tmp_path/'policy.json', policy)
    refused('train', '--method', 'qat', '--policy', tmp_path/'policy.json', '--out', tmp_path/'run', *SMALL, names=names)
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"format": "mebqat-policy", "version": 2}', '{"format": "mebqat-policy", "version": 1}', '{"format": "mebqat-policy", "version": 1, "layers": {"block2.conv": 3}}',
                                  '{"format": "mebqat-policy", "version": 1, "layers": "W2A2"}', '{"format": "mebqat-search"}'])
def test_damaged_policies_are_refused(tmp_path, text):
    (tmp_path/'policy.json').write_text(text)
    refused('train', '--method', 'qat', '--policy', tmp_path/'policy.json', '--out', tmp_path/'run', *SMALL, names=tmp_path/'policy.json')
    refused('train', '--policy', tmp_path/'nothing.json', '--method', 'qat', '--out', tmp_path/'run', *SMALL, names='nothing.json')
    assert not (tmp_path/'run').exists()


def test_a_policy_takes_the_place_of_bits(runs, found, tmp_path):
    file = runs/'mebqat'/'policy.json'
    refused('train', '--method', 'qat', '--policy', file, '--bits', 'W4A4', '--out', tmp_path/'run', *SMALL, names='instead of --bits')
    refused('train', '--policy', file, '--out', tmp_path/'run', *SMALL, names='--policy is not an option of mebqat')


# Files and help

@pytest.mark.parametrize('text, word', [
    ('', 'not JSON'), ('{}', 'holds no trajectory'), ('{"format": "mebqat-trajectory", "version": 3}', 'version 3'),
    ('{"format": "mebqat-trajectory", "version": 1}', "no 'columns'"), ('{"format": "mebqat-trajectory", "version": 1, "columns": ["a"], "rows": [[{}]]}', r'rows\[0\]'),
    ('{"format": "mebqat-trajectory", "version": 1, "columns": ["a"], "rows": [[1, 2]]}', 'damaged'), ('[]', 'not a JSON object'), ('['*100_000, 'not JSON')])
def test_damaged_trajectories_are_refused(tmp_path, text, word):
    (tmp_path/'trajectory.json').write_text(text)
    with pytest.raises(ValueError, match=f'trajectory.json: .*{word}'): policies.trajectory(tmp_path)


def test_a_folder_of_an_older_version_is_still_this_run(runs):
    file = runs/'qat'/'run.json'
    doc = json.loads(file.read_text())
    for k in ('ends', 'policy', 'optimizer'): doc['spec'].pop(k)
    doc.pop('checksum')
    file.write_text(json.dumps(doc | {'version': 1}))
    good(*RUNS['qat'], '--out', runs/'qat', '--resume')
    refused(*RUNS['qat'], '--seed', 1, '--out', runs/'qat', '--resume', names='--seed 0 there, 1 here')


def test_help_lists_the_commands_and_their_options():
    assert LEARNED == names(trains_at='learned') == ('adaqat', 'fracbits')
    shown = {c: ' '.join(good(c, '--help').stdout.replace('│', ' ').split()) for c in ('adaqat', 'search')}
    learning = {k for m in LEARNED for k in options_in(METHODS[m])}
    assert all(flag(k) in shown['adaqat'] for k in (*learning, 'init', 'skip', 'ends', 'data', 'model')) and '--n-way' not in shown['adaqat'] and '--guaranteed' not in shown['adaqat']
    assert all(f'--{k}' in shown['search'] for k in ('max-bytes', 'max-bitops', 'method', 'widths', 'act-widths', 'ladder', 'population', 'generations', 'seed', 'resume', 'fitness-images', 'json'))
    assert all(c in good('--help').stdout for c in ('adaqat', 'search'))
