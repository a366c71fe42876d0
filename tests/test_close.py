"What an explorer leaves behind when it is closed: nothing but plotly's script, which every other figure needs."
import sys

import plotly.graph_objects as go
import pytest

pytest.importorskip('anywidget', reason="anywidget is not installed; get it with: pip install 'mebqat[lab]'")
import ipywidgets as ipw
from ipywidgets.widgets.widget import _instances as alive

from conftest import ROOT
from mebqat.bits import FP, Bits, BitSpace, Policy
from mebqat.explore import BitsPicker, FewShotPlayground, FrontExplorer, Panel, PolicyPicker, QuantizerLab, SurfaceExplorer, TrainingMonitor
from mebqat.explore import panels
from mebqat.figures.predictions import load_explorations
from mebqat.files import shipped
from mebqat.mixed.front import Front
from mebqat.mixed.space import Scored
from mebqat.runs.answers import playing

DIGITS = load_explorations(shipped('digits_exploration.safetensors'))
COSTS = DIGITS['MEBQAT'].costs
LAYERS = [layer.name for layer in COSTS.layers if layer.quantized]


def scored(bits):
    policy = Policy.uniform(LAYERS, bits)
    cost = COSTS.at(policy)
    return Scored(policy, .9, cost.weight_bytes, cost.bitops, 'uniform')


def surface_explorer():
    e = SurfaceExplorer(DIGITS, Bits(4, 4))
    e.view.value = 'relief'  # the map is now held, and not shown
    return e


def monitor():
    m = TrainingMonitor()
    with m.watching():
        for step in range(3): m.on_step(step, 3, 1/(step + 1))
    m.draw()
    return m


def playground():
    p = FewShotPlayground(**playing(n_way=5, n_query=2))
    p.value = Bits(3, 3)
    return p


MAKERS = {'SurfaceExplorer': surface_explorer, 'QuantizerLab': lambda: QuantizerLab('normal(0, 1)'), 'FewShotPlayground': playground,
          'FrontExplorer': lambda: FrontExplorer(Front([scored(Bits(b, b)) for b in (2, 4)]), COSTS, measure=lambda policy: .5),
          'PolicyPicker': lambda: PolicyPicker(COSTS), 'BitsPicker': BitsPicker, 'TrainingMonitor': monitor}


@pytest.fixture(autouse=True)
def library(): panels.live(go.Figure()).close()  # plotly's script is there before anything is counted


@pytest.mark.parametrize('name', MAKERS)
def test_a_closed_explorer_leaves_no_widget(name):
    before = {*alive}
    explorer = MAKERS[name]()
    value, made = explorer.value, len({*alive} - before)
    assert made >= 10 and isinstance(explorer, Panel)
    explorer.close()
    assert [type(alive[i]).__name__ for i in {*alive} - before] == []
    explorer.close()
    assert explorer.value == value and not before - {*alive}


@pytest.mark.parametrize('name', MAKERS)
def test_a_closed_explorer_may_still_be_moved(name):
    "Somebody's loop may go on setting values; nothing comes back to life."
    explorer = MAKERS[name]()
    explorer.close()
    before = {*alive}
    explorer.value = explorer.value
    explorer.say('closed')
    if isinstance(explorer, TrainingMonitor):
        with explorer.watching(): explorer.on_step(0, 2, 1.)
        explorer.draw()
    assert {*alive} == before


def test_panels_inside_others_close_with_them():
    before = {*alive}
    outer = Panel(ipw.Accordion([ipw.VBox([BitsPicker(), QuantizerLab()])]), ipw.HTML('beside'))
    outer.spare = {'kept': [PolicyPicker(COSTS)]}
    outer.close()
    assert {*alive} == before


def test_closing_one_leaves_the_others(monkeypatch):
    one, two = BitsPicker(), QuantizerLab()
    figures = {i for i,w in alive.items() if isinstance(w, panels.LiveFigure)}
    one.close()
    assert two.comm is not None and figures <= {*alive} and panels._library().comm is not None
    two.knobs['bits'].value = 3
    assert two.value.bits == 3
    two.close()
    assert panels._library().comm is not None and panels.live(go.Figure())._library is panels._library()


def test_closing_ends_the_measuring_of_pairs():
    x, seen = DIGITS['MEBQAT'], []
    def answer(bits):
        seen.append(bits)
        if len(seen) == 3: explorer.close()
        return x.answers[bits], x.confidence[bits]
    explorer = SurfaceExplorer.live(answer, x.images, x.labels, x.classes, BitSpace(x.answers), COSTS, FP)
    explorer.measure_all()
    assert len(seen) == 3


@pytest.mark.parametrize('broken, words', [("sys.modules['ipywidgets'] = None", 'needs ipywidgets, not installed here'),
                                           ("m.version = lambda name: '5.24.1'", 'needs plotly 6 or newer, here is 5.24.1')])
@pytest.mark.parametrize('module', ['mebqat.explore', 'mebqat.explore.surface_explorer', 'mebqat.explore.pickers'])
def test_what_is_missing_is_said_in_one_line(module, broken, words):
    import subprocess
    code = f'import sys, importlib.metadata as m\n{broken}\ntry: import {module}\nexcept ImportError as e: print(type(e).__name__, e)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"ImportError mebqat.explore {words}; get it with: pip install 'mebqat[lab]'\n" and done.stderr == ''


def test_the_lab_asks_for_the_plotly_that_works():
    from configparser import ConfigParser
    from packaging.requirements import Requirement
    settings = ConfigParser()
    settings.read(ROOT/'settings.ini', encoding='utf-8')
    for extra in ('lab', 'dev'):
        wanted = {r.name: r.specifier for r in map(Requirement, settings['DEFAULT'][f'{extra}_requirements'].split())}
        assert '6.0.0' in wanted['plotly'] and '5.24.1' not in wanted['plotly'], extra
