"One description for every method: its options decide the help, the file and the refusals; files of earlier versions open."
import json, re, subprocess, sys
from dataclasses import dataclass

import pytest
import torch

from mebqat.console import options_by_panel
from mebqat.files import load_whole, save_whole
from mebqat.runs import RunSpec, open_run, spec_of, train_run
from mebqat.runs.run_folder import claim
from mebqat.runs.image_methods import FloatOptions
from mebqat.runs.method_table import METHODS, having, options_of, register
from mebqat.runs.options import default_text, flag, option
from mebqat.runs.specs import stored_spec
from test_cli import good, own_cache, refused  # noqa: F401 (own_cache is a fixture)

NEEDS = {'ptq': dict(init='float'), 'metaquantnet': dict(init='float'), 'qat': dict(bits='W4A4'), 'fracbits': dict(target_bytes=1e5),
         'pn-qat': dict(bits='W4A4'), 'fomaml-qat': dict(bits='W4A4')}  # what a method must be told
EVERY = list(dict.fromkeys(k for m in METHODS for k in options_of(m)))


def described(method, **options): return spec_of(method, **NEEDS.get(method, {}) | options)
def plain(text): return re.sub(r'[│\s]+', ' ', text)


# Written once

def test_help_has_every_option_of_every_method_with_its_sentence_and_default():
    shown = plain(good('train', '--help').stdout)
    rows = {name: text for panel in options_by_panel(*METHODS).values() for name,(_, text) in panel.items()}
    assert list(sorted(rows)) == sorted(EVERY) and all(panel in shown for panel in options_by_panel(*METHODS)) and all(m in shown for m in METHODS)
    for name,text in rows.items():
        assert re.search(rf'{flag(name)} .*{re.escape(text)}', shown), name
        sentence, default = re.fullmatch(r'(.*) \(default: (.*)\)', text).groups()
        fields = {m: options_of(m)[name] for m in having(name)}
        assert default.startswith(default_text(next(iter(fields.values())))), name
        for m,f in fields.items(): assert f.metadata['says'] in sentence and default_text(f) in default, (m, name)


def test_an_option_names_its_methods_where_few_have_it():
    rows = {name: text for panel in options_by_panel(*METHODS).values() for name,(_, text) in panel.items()}
    assert rows['hidden'] == "metaquantnet: Hidden units of a layer's generator; 0 shares the weights (default: 32)"
    assert rows['lr'] == 'Peak learning rate (default: 0.05; few-shot: 0.002)' and rows['learn_rates'].endswith('(default: no)')
    assert rows['start'] == 'adaqat: Pair to begin at; fracbits: A real width to begin at (default: W8A8; fracbits: half a bit above the target)'


@pytest.mark.parametrize('method', METHODS)
def test_a_description_is_its_options(method):
    spec = described(method, seed=3)
    assert set(spec.to_dict()) == {'method', *options_of(method)} and (spec.method, spec.training.seed) == (method, 3)
    assert spec == spec_of(**spec.to_dict()) == stored_spec(json.loads(json.dumps(spec.to_dict()))) == eval(repr(spec)) and hash(spec) == hash(described(method, seed=3))
    assert spec.changed(seed=0) == described(method) != spec and described(method).to_dict() == {'method': method} | {k: f.default for k,f in options_of(method).items()} | NEEDS.get(method, {})


@pytest.mark.parametrize('method', METHODS)
def test_what_a_method_does_not_have_is_refused_even_at_its_default(method):
    for name in EVERY:
        if name in options_of(method): continue
        usual = options_of(having(name)[0])[name].default
        with pytest.raises(ValueError, match=f'^{name}= is not an option of {method}(; use |; it is for ({"|".join(having(name))}))') as e: described(method, **{name: usual})
        assert '\n' not in str(e.value)
    with pytest.raises(ValueError, match=f'^magic= is not an option of {method}$'): described(method, magic=1)


def test_a_description_is_made_of_the_parts_of_its_method():
    image, few = spec_of('mebqat'), spec_of('mebqat-pn')
    with pytest.raises(TypeError, match='inputs of a mebqat run is a ImageInputs, not a EpisodeInputs'):
        RunSpec(few.inputs, image.network, image.quantization, image.training, image.options)
    with pytest.raises(TypeError, match='spec must be a RunSpec, from spec_of'): train_run(image.to_dict(), 'nowhere')
    with pytest.raises(ValueError, match="no method 'magic'; there are float, ptq"): spec_of('magic')


# A method of one's own

@pytest.fixture
def shine():
    @register('shine', 'a method of this test')
    @dataclass(frozen=True)
    class ShineOptions(FloatOptions):
        glow: float = option(.5, 'How much it shines')
    yield
    del METHODS['shine']


def test_a_method_registered_elsewhere_has_its_option_everywhere(shine, tmp_path):
    spec = spec_of('shine', glow=.7, width=4, epochs=.1, batch_size=64)
    assert list(METHODS).index('shine') == list(METHODS).index('pn') - 1 and spec.to_dict()['glow'] == spec.options.glow == .7 and stored_spec(spec.to_dict()) == spec
    with pytest.raises(ValueError, match='glow= is not an option of mebqat; it is for shine'): spec_of('mebqat', glow=.7)
    train_run(spec, tmp_path/'run')
    assert json.loads((tmp_path/'run'/'run.json').read_text())['spec']['glow'] == .7 and open_run(tmp_path/'run').spec == spec
    with pytest.raises(ValueError, match='glow=0.7 there, 0.6 here'): train_run(spec.changed(glow=.6), tmp_path/'run', resume=True)


PROGRAM = '''from dataclasses import dataclass
from mebqat.runs.image_methods import FloatOptions
from mebqat.runs.method_table import register
from mebqat.runs.options import option

@register('shine', 'a method of this test')
@dataclass(frozen=True)
class ShineOptions(FloatOptions):
    glow: float = option(.5, 'How much it shines')

from mebqat.cli import main
main()
'''


def test_the_command_has_the_option_of_a_method_registered_before_it(tmp_path):
    def run(*args): return subprocess.run([sys.executable, '-c', PROGRAM, *map(str, args)], cwd=tmp_path, capture_output=True, text=True)
    shown = plain(run('train', '--help').stdout)
    assert '--glow <float> shine: How much it shines (default: 0.5)' in shown and 'fracbits, shine; few-shot' in shown
    done = run('train', '--method', 'shine', '--glow', .7, '--width', 4, '--epochs', .1, '--out', 'run', '--json')
    assert done.returncode == 0 and json.loads(done.stdout)['spec']['glow'] == json.loads((tmp_path/'run'/'run.json').read_text())['spec']['glow'] == .7, done.stderr
    done = run('train', '--glow', .7, '--out', 'other')
    assert (done.returncode, done.stderr) == (2, 'mebqat: --glow is not an option of mebqat; it is for shine\n') and not (tmp_path/'other').exists()


# Files of earlier versions, which wrote down the options of every method

OLD = {
    'mebqat': dict(
        method='mebqat', data='digits', model='small_cnn', scheme='lsq', bits='W2A2 W8A8 FP', init='', epochs=.2, batch_size=64, lr=.05, optimizer='sgd',
        weight_decay=5e-4, n_tasks=4, guaranteed='', bn='reestimate', skip='ends', size=None, width=4, val=None, augment=False, seed=0, options=[], ends='',
        policy=[], lam=None, eta=None, start='', granularity='', hardware='', target_bytes=None, target_bitops=None, hidden=None),
    'mebqat-pn': dict(
        method='mebqat-pn', data='glyphs', split_file='', glyph_classes=20, scheme='lsq', bits='W2A2 FP', init='', n_way=3, k_shot=1, n_query=2, test_way=None,
        steps=1, n_tasks=2, design='inner', guaranteed='', lr=2e-3, optimizer='adam', weight_decay=0., turns=False, distill=False, inner_steps=5, inner_lr=.1,
        learn_rates=False, second_order=False, every_step=False, adapts='weights', center=False, temperature=1., calibrate=True, bn='batch', jitter=0.,
        size=None, width=4, seed=0, options=[])}
SMALL = {'mebqat': spec_of('mebqat', bits='W2A2 W8A8 FP', epochs=.2, width=4),
         'mebqat-pn': spec_of('mebqat-pn', bits='W2A2 FP', glyph_classes=20, n_way=3, n_query=2, steps=1, n_tasks=2, width=4)}


@pytest.mark.parametrize('method', OLD)
def test_an_old_run_is_this_run(method, tmp_path):
    run = train_run(SMALL[method], tmp_path/'new')
    tensors, about = load_whole(tmp_path/'new'/'model.safetensors')
    save_whole(tmp_path/'old'/'model.safetensors', tensors, about | {'spec': OLD[method]})
    save_whole(tmp_path/'old'/'checkpoint.safetensors', *load_whole(tmp_path/'new'/'checkpoint.safetensors'))
    (tmp_path/'old'/'run.json').write_text(json.dumps({'format': 'mebqat-run', 'version': 1, 'mebqat': '0.1.0', 'torch': torch.__version__, 'spec': OLD[method]}, indent=1))
    old, named = open_run(tmp_path/'old'), run.spec  # which names the batch size that the images decided, as an old file does
    assert old.spec == named == stored_spec(OLD[method]) and all(torch.equal(v, run.model.state_dict()[k]) for k,v in old.model.state_dict().items())
    claim(tmp_path/'old', named)
    with pytest.raises(ValueError, match='holds another run: seed=0 there, 1 here$'): claim(tmp_path/'old', named.changed(seed=1))
    again = train_run(SMALL[method], tmp_path/'old', resume=True)
    assert again.history.rows == run.history.rows
    assert json.loads(good('info', tmp_path/'old', '--json').stdout)['method'] == method


@pytest.mark.parametrize('method', ['float', 'pn'])
def test_old_options_of_other_methods_decided_nothing(method, tmp_path):
    "A float network was never quantized, however its description said it would be."
    old = OLD['mebqat' if method == 'float' else 'mebqat-pn'] | {'method': method}
    spec = stored_spec(old | {'skip': 'none', 'inner_steps': 7, 'guaranteed': 'W2A2', 'unheard_of': 1})
    assert spec == stored_spec(old) and not {'skip', 'inner_steps', 'guaranteed', 'bits'} & set(spec.to_dict())


def test_shipped_networks_open_with_what_they_were_trained_by():
    digits, pn, maml = (open_run(n).spec for n in ('digits_mebqat', 'omniglot_mebqat_pn', 'omniglot_mebqat_maml'))
    assert digits == spec_of('mebqat', epochs=60, batch_size=32, skip='none', width=8)
    assert pn.changed(init='', split_file='') == spec_of('mebqat-pn', data='omniglot', n_way=60, steps=2400, n_tasks=2, design='both', guaranteed='W2A2', lr=1e-3, turns=True, jitter=.75)
    assert (maml.options.adapts, maml.options.center, maml.options.inner_steps, maml.inputs.n_way) == ('head', True, 5, 20)


@pytest.mark.parametrize('method, pairs', [('pn-qat', {'bits': 'W4A4'}), ('mebqat-pn', {}), ('fomaml-qat', {'bits': 'W2A2'})])
def test_an_old_few_shot_run_without_calibration_keeps_the_rule_it_was_trained_by(method, pairs):
    old = spec_of(method, **pairs).to_dict() | {'calibrate': False}
    assert stored_spec(old).scheme().rule == 'published' and stored_spec(old | {'calibrate': True}).scheme().rule == 'relative'
    assert stored_spec(stored_spec(old).to_dict()) == stored_spec(old)
    assert stored_spec(old | {'options': [['rule', 'relative']]}).scheme().rule == 'relative'
    assert stored_spec(old | {'scheme': 'sat'}).scheme().name == 'sat'
