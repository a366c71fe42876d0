"The quantizer lab: every control, every scheme, what it refuses, and the baked twin in a browser."
import math

import pytest
import torch
import traitlets

from mebqat.kernels import dorefa_act, dorefa_weight, lsq, pact, sat_weight
from mebqat.figures.html import page
from mebqat.explore.quantizer_lab import TYPED, QuantizerLab
from mebqat.figures.quantizer_curves import (MOST_VALUES, SCHEME_NAMES, Ordered, Setting, best_size, completed, count_levels,
                                             quantized, response, sample)

WEIGHTS = torch.randn(40, 30, 3, 3, generator=torch.Generator().manual_seed(0))*.1
ACTS = torch.randn(9, 700, generator=torch.Generator().manual_seed(1)).relu()*2


def by_kernel(x, s):
    return {'lsq': lambda: lsq(x, torch.tensor(s.step), s.bits, s.signed, s.extra), 'pact': lambda: pact(x, torch.tensor(s.clip), s.bits, s.signed), 'sat weight': lambda: sat_weight(x, s.bits),
            'dorefa weight': lambda: dorefa_weight(x, s.bits), 'dorefa activation': lambda: dorefa_act(x, s.bits, s.signed)}[s.scheme]()


def agrees(lab):
    "All that the panel shows is what the kernels give for its setting."
    s, x = lab.value, lab.tensors[lab.value.source] if lab.value.source in lab.tensors else sample(lab.value.source)
    y = by_kernel(x, s)
    if s.fit: y = y*((x.double()*y).sum()/(y.double()**2).sum()).float()
    mse = ((x.double() - y.double())**2).mean().item()
    traces, r = lab.figure.data, lab.result
    assert torch.allclose(r.tensor, y, rtol=1e-5, atol=1e-7) and r.tensor.shape == x.shape
    assert r.mse == pytest.approx(mse, rel=1e-3, abs=1e-12) and f'error {r.mse:.4g}' in lab.report.value
    assert r.sqnr == pytest.approx(10*math.log10((x.double()**2).mean().item()/mse), abs=.02)
    levels, counts = y.unique(return_counts=True)
    pins = sorted([*zip(traces[4].x, traces[4].y), *zip(traces[5].x, traces[5].y)])
    used = [(level, share) for level, share in pins if share > 0]
    assert [v for v, _ in used] == pytest.approx(levels.tolist(), rel=1e-4, abs=1e-6)
    assert [v for _, v in used] == pytest.approx((counts/counts.sum()).tolist(), abs=2e-4)
    assert len(r.levels) == 2**s.bits + s.extra
    at = torch.tensor(traces[1].x)
    if not s.weights:
        at.requires_grad_()
        out = by_kernel(at, s)
        slope, = torch.autograd.grad(out.sum(), at)
        assert torch.equal(torch.tensor(traces[1].y), out.detach()) and torch.equal(torch.tensor(traces[6].y), slope)
    bits, curve = list(traces[7].x), list(traces[7].y)
    assert list(traces[9].x) == [s.bits] and traces[9].y[0] == curve[bits.index(s.bits)] == pytest.approx(r.sqnr, abs=1e-6)
    assert bits == [*range(s.lowest, 9)]
    assert lab.message == ''


@pytest.fixture
def lab(): return QuantizerLab({'weights': WEIGHTS, 'activations': ACTS})


@pytest.mark.parametrize('source', ['weights', 'activations'])
@pytest.mark.parametrize('scheme', SCHEME_NAMES)
def test_every_scheme_and_width_shows_what_the_kernel_gives(lab, source, scheme):
    lab.knobs['source'].value = source
    lab.knobs['scheme'].value = scheme
    assert (lab.value.source, lab.value.scheme) == (source, scheme)
    for bits in range(lab.value.lowest, 9):
        lab.knobs['bits'].value = bits
        assert lab.value.bits == bits
        agrees(lab)


def test_every_other_control(lab):
    k, drawn = lab.knobs, lambda: [torch.tensor(lab.figure.data[1].y), lab.figure.data[9].y]
    assert lab.value.signed and k['follow'].value and k['extra'].layout.display == 'none'
    def moves(act):
        before = drawn()
        act()
        after = drawn()
        assert not torch.equal(before[0], after[0]) or before[1] != after[1]
        agrees(lab)
    best = lab.value.step
    moves(lambda: setattr(k['step'], 'value', best*3))
    assert lab.value.step == pytest.approx(best*3) and not k['follow'].value
    moves(lambda: k['start'].click())
    assert lab.value.step == pytest.approx(2*WEIGHTS.abs().mean().item()/7**.5)
    moves(lambda: k['best'].click())
    assert lab.value.step == best and not k['follow'].value
    k['bits'].value = 6
    assert lab.value.step == best
    moves(lambda: setattr(k['follow'], 'value', True))
    assert lab.value.step < best
    moves(lambda: setattr(k['signed'], 'value', False))
    assert k['extra'].layout.display is None and len(lab.figure.data[5].x) == 0
    k['bits'].value = 2
    moves(lambda: setattr(k['extra'], 'value', True))
    assert len(lab.figure.data[5].x) == 1 and len(lab.result.levels) == 5 and 'has no code' in lab.report.value
    moves(lambda: setattr(k['signed'], 'value', True))
    assert not lab.value.extra
    k['scheme'].value = 'pact'
    moves(lambda: setattr(k['clip'], 'value', lab.value.clip/2))
    k['scheme'].value = 'sat weight'
    assert k['clip'].layout.display == k['signed'].layout.display == 'none' and lab.value.clip is None
    moves(lambda: setattr(k['fit'], 'value', True))
    k['source'].value = TYPED
    moves(lambda: setattr(k['text'], 'value', 'laplace(1, 0.2)'))
    assert lab.value.source == 'laplace(1, 0.2)'


def test_value_moves_the_controls_and_is_completed(lab):
    lab.value = Setting('pact', 3, source='activations')
    assert (lab.knobs['scheme'].value, lab.knobs['bits'].value, lab.knobs['source'].value, lab.knobs['signed'].value) == ('pact', 3, 'activations', False)
    assert lab.value.clip == best_size(Ordered(ACTS), lab.value) and lab.value.step is None
    agrees(lab)
    lab.value = Setting('lsq', 3, step=1e-9, signed=True)
    assert lab.value.source == 'activations' and lab.value.step == 1e-9
    lab.value = Setting('dorefa weight', 1, source='normal(0, 2)')
    assert lab.knobs['source'].value == TYPED and lab.knobs['text'].value == 'normal(0, 2)'
    agrees(lab)


def test_one_bit_with_sign_is_moved_and_said(lab):
    k = lab.knobs
    k['scheme'].value = 'dorefa weight'
    k['bits'].value = 1
    k['scheme'].value = 'pact'
    assert lab.value.bits == 2 and 'no grid of 1 bit' in lab.message
    k['bits'].value = 3
    assert lab.message == ''


@pytest.mark.parametrize('text', ['', 'normal', 'normal(0, 1', 'cauchy(0, 1)', 'normal(0, 1, 2)', 'normal(0; 1)', 'normal(inf, 1)', 'normal(0, 0)', 'uniform(2, 1)', 'relu(relu)', 'exit()', 'relu(uniform(-2, -1))'])
def test_text_that_cannot_be_shown_is_said_and_changes_nothing(text):
    lab = QuantizerLab('normal(0, 1)')
    before = lab.value
    lab.knobs['text'].value = text
    assert lab.message and lab.value == before
    lab.knobs['bits'].value = 5
    assert lab.message == '' and lab.value.bits == 5


@pytest.mark.parametrize('bad, said', [(torch.zeros(0), 'is empty'), (torch.tensor([1., math.nan, math.inf]), 'has 2 values that are NaN or infinite'), (torch.zeros(4), 'reaches 0'), ([1., 2.], 'is a list'),
                                       (torch.ones(3, dtype=torch.cfloat), 'is complex'), (torch.tensor([1e35]), 'reaches 1e')])
def test_tensors_that_have_no_picture(bad, said):
    with pytest.raises(ValueError, match=f'conv1 {said}'): QuantizerLab({'fine': ACTS, 'conv1': bad})


def test_other_refusals():
    with pytest.raises(ValueError, match='no tensors'): QuantizerLab({})
    with pytest.raises(ValueError, match='cannot read'): Ordered(sample('nothing'))
    with pytest.raises(traitlets.TraitError, match='cannot read'): QuantizerLab(ACTS, Setting(source='layer'))
    with pytest.raises(traitlets.TraitError, match='2 to 8 bits'): QuantizerLab(WEIGHTS, Setting('lsq', 1))


ODD = {'constant': torch.full((5,), 3.), 'one': torch.tensor([-2.]), 'tiny': torch.tensor([0., 1e-20]), 'huge': torch.tensor([1e20, -1.]), 'whole numbers': torch.arange(-4, 5),
       'half': WEIGHTS[0, 0].flatten().half(), 'booleans': torch.tensor([True, False]), 'transposed, with a gradient': WEIGHTS[:6, :7, 0, 0].t().requires_grad_()}


@pytest.mark.parametrize('x', ODD.values(), ids=ODD)
def test_odd_tensors_have_a_picture(x):
    lab = QuantizerLab(x)
    for scheme in SCHEME_NAMES:
        lab.knobs['scheme'].value = scheme
        for bits in (2, 8): lab.knobs['bits'].value = bits
        assert lab.message == '' and lab.result.tensor.shape == x.shape and lab.result.tensor.isfinite().all()
        assert torch.isfinite(torch.tensor(lab.figure.data[1].y)).all()


@pytest.mark.parametrize('scheme, hidden', [('lsq', 'clip'), ('pact', 'step'), ('sat weight', 'clip')])
def test_a_knob_out_of_sightreport_nothing(scheme, hidden):
    lab = QuantizerLab(ACTS, Setting(scheme, 4))
    before = lab.value
    lab.knobs[hidden].value *= 1.1  # a browser puts a slider on its next notch
    assert lab.message == '' and lab.value == before


def test_ties_fall_as_in_the_kernel():
    x = torch.arange(-16, 17)/4.
    for s in (Setting('lsq', 3, step=.5, signed=True), Setting('pact', 3, clip=2., signed=True), Setting('dorefa weight', 1), Setting('sat weight', 2)):
        s, data = completed(s, Ordered(x)), Ordered(x)
        m, counts = count_levels(data, s), quantized(x, s).unique(return_counts=True)[1]
        assert m.counts[m.counts > 0].tolist() == counts.tolist()


def test_large_tensors_are_sampled_and_say_so():
    x = torch.randn(MOST_VALUES + 5, generator=torch.Generator().manual_seed(3))
    x[7] = 8.
    lab = QuantizerLab(x)
    assert f'{MOST_VALUES:,} values drawn at random from {MOST_VALUES + 5:,}' in lab.report.value and lab.data().top == 8
    assert lab.result.mse == pytest.approx(((x - lab.result.tensor)**2).mean().item(), rel=.01) and lab.result.tensor.shape == x.shape


def test_slopes_of_weights_are_autograd_of_the_whole_tensor():
    inner = WEIGHTS.flatten().sort().values[5:-5]
    x = torch.cat([inner, torch.tensor([-.5, .5])]).requires_grad_()
    for scheme in ('dorefa weight', 'sat weight'):
        for bits in range(2, 9):
            s = Setting(scheme, bits, signed=True)
            slope, = torch.autograd.grad(quantized(x, s)[:50].sum(), x)
            drawn = response(inner[:50], s, .5, x.detach().abs().mean().item())[1]
            assert torch.allclose(drawn, slope[:50], rtol=1e-3, atol=1e-5)


def test_best_is_no_worse_than_anything_near():
    for source in (WEIGHTS, ACTS, sample('laplace(0, 1)'), sample('uniform(0, 1)')):
        data = Ordered(source)
        for scheme in ('lsq', 'pact'):
            for bits in (2, 4, 8):
                s = completed(Setting(scheme, bits), data)
                size = s.step or s.clip
                error = lambda f: count_levels(data, s, torch.tensor([[size*f]])).mse.item()
                assert error(1) <= min(error(f) for f in (.5, .8, .95, .99, 1.01, 1.05, 1.2, 2))*(1 + 1e-6)


def test_without_anywidget_the_panelreport_so(monkeypatch):
    monkeypatch.setattr('mebqat.explore.panels.find_spec', lambda name: None)
    lab = QuantizerLab(ACTS)
    lab.knobs['bits'].value = 3
    assert "pip install 'mebqat[lab]'" in ''.join(getattr(c, 'value', '') for c in lab.children if isinstance(getattr(c, 'value', ''), str))
    assert list(lab.figure.data[9].x) == [3] and lab.bake().frames


@pytest.fixture(scope='module')
def baked(tmp_path_factory):
    lab = QuantizerLab({'acts': ACTS}, Setting('lsq', 2, extra=True))
    path = tmp_path_factory.mktemp('lab')/'lab.html'
    path.write_text(page('Lab', [lab.bake()]), encoding='utf-8')
    return lab, path


def test_baked_slider_and_buttons_change_the_picture_offline(baked, browser):
    lab, path = baked
    expected = {(b, name): by_kernel(ACTS, completed(Setting(name, b, signed=None, extra=name == 'lsq'), lab.data())).unique() for b in range(2, 9) for name in ('lsq', 'pact')}
    wrong = []
    view = browser.new_context(offline=True, viewport={'width': 1000, 'height': 1100}).new_page()
    view.on('console', lambda m: wrong.append(m.text) if m.type == 'error' else None)
    view.on('pageerror', lambda e: wrong.append(str(e)))
    view.on('requestfailed', lambda r: wrong.append(r.url))
    view.goto(path.as_uri())
    view.wait_for_selector('.plot .slider-group')
    levels = lambda group=0: sorted(view.evaluate(f'[4, 5].flatMap(i => [...document.querySelector(".plot")._fullData[{group*10} + i].x])'))
    drawn = lambda: view.evaluate('document.querySelector(".plot .scatterlayer .trace:nth-child(2) path.js-line").getAttribute("d")')
    bits = lambda: view.evaluate('document.querySelector(".plot").layout.sliders[0].active') + 1
    def shows(b, name='lsq', group=0):
        view.wait_for_function(f'() => document.querySelector(".plot")._fullData[{group*10 + 9}].x[0] === {b}')
        view.wait_for_function(f'() => document.querySelector(".plot").layout.sliders[0].active === {b - 1}')
        got = levels(group)
        assert [v for v in expected[b, name].tolist() if min(abs(v - g) for g in got) > 1e-3*expected[b, name].max()] == []
    shows(2)
    before = drawn()
    view.locator('.plot').focus()
    view.keyboard.press('ArrowRight')
    shows(3)
    assert drawn() != before
    view.keyboard.press('End')
    shows(8)
    view.keyboard.press('ArrowRight')
    assert bits() == 8 and view.locator('.plot').get_attribute('aria-valuetext') == '8'
    track = view.locator('.slider-rail-touch-rect').bounding_box()
    view.mouse.click(track['x'] + track['width']*3/7, track['y'] + track['height']/2)
    shows(4)
    view.get_by_text('PACT', exact=True).click()
    view.wait_for_function('() => document.querySelector(".plot")._fullData[40].visible === true && document.querySelector(".plot")._fullData[0].visible === false')
    shows(4, 'pact', 4)
    assert view.evaluate('document.documentElement.scrollWidth') <= 1000 and wrong == []


def test_baked_file_is_small_and_whole(baked):
    fig = baked[0].bake()
    assert len(fig.to_json()) < 500_000
    assert [t.visible for t in fig.data] == [True]*10 + [False]*40
    for frame in fig.frames: assert len(frame.data) == len(frame.traces) == len(set(frame.traces))
    signed = QuantizerLab(WEIGHTS, Setting('sat weight', 3)).bake()
    assert 'begins at 2 bits' in signed.frames[0].data[-1].text and len(signed.to_json()) < 500_000
