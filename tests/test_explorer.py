"SurfaceExplorer and PolicyPicker without a browser: what a hand moves, what the figures then hold, and what goes wrong."
import asyncio, base64, io, re
from dataclasses import replace
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest
import torch
import traitlets
from PIL import Image

from mebqat.explore import panels
from mebqat.bits import FP, FULL, Bits, BitSpace, Policy
from mebqat.files import shipped
from mebqat.figures.predictions import load_explorations
from mebqat.explore.surface_explorer import SurfaceExplorer
from mebqat.explore.surface_figures import SurfaceMap, cell_frame, cell_outlines, confusion_cells, image_uri
from mebqat.figures.front import budget_steps
from mebqat.explore.panels import LiveFigure
from mebqat.explore.pickers import LayerRow, PolicyPicker
from mebqat.surface import Point, Surface, si



@pytest.fixture(scope='module')
def digits(): return load_explorations(shipped('digits_exploration.safetensors'))


@pytest.fixture
def explorer(digits): return SurfaceExplorer(digits, Bits(4, 4))


def cell(explorer, bits, layer=SurfaceMap.CELLS): return explorer.figure.data[layer].z[explorer.map.w.index(bits.w)][explorer.map.a.index(bits.a)]


def framed(explorer): return [s.to_plotly_json() for s in explorer.figure.layout.shapes]


def click(trace, x, y):
    "What plotly does when somebody clicks."
    for callback in trace._click_callbacks: callback(trace, SimpleNamespace(xs=[x], ys=[y], point_inds=[0]), None)


@pytest.mark.parametrize('bits', [Bits(2, 2), Bits(8, 3), FP], ids=str)
def test_every_part_follows_the_pair(explorer, digits, bits):
    explorer.value, x = bits, digits['MEBQAT']
    p = x.at(bits)
    assert (explorer.picker.w.value, explorer.picker.a.value) == (bits.w, bits.a)
    assert framed(explorer) == cell_frame(explorer.map.a.index(bits.a), explorer.map.w.index(bits.w))
    explorer.view.value = 'relief'
    assert explorer.map.relief.data[SurfaceMap.PIN].z == (p.accuracy,)
    explorer.value = Bits(4, 4)
    assert explorer.map.relief.data[SurfaceMap.PIN].z == (x.at(Bits(4, 4)).accuracy,)
    explorer.view.value, explorer.value = 'cells', bits
    assert f'{bits}: {100*p.accuracy:.1f} % ({100*p.low:.1f} to {100*p.high:.1f})' in explorer.readout.value
    want = confusion_cells(x.confusion(bits), [*x.classes])
    assert [list(r) for r in explorer.confusion.data[0].z] == want['z'] and [list(r) for r in explorer.confusion.data[0].text] == want['text']
    assert explorer.thumbs.value.count('<img') == min(24, len(x.changed(bits, FP)))


def test_cells_hold_the_library_values_and_gaps(explorer, digits):
    for name,x in digits.items():
        explorer.method = name
        assert all(cell(explorer, b) == x.at(b).accuracy for b in x.surface)
        assert explorer.map.relief.data[SurfaceMap.MESH].z[0][0] == x.at(Bits(2, 2)).accuracy
    assert cell(explorer, Bits(FULL, 2)) is None


def test_sliders_move_the_value(explorer):
    seen = []
    explorer.observe(lambda change: seen.append(change['new']), 'value')
    explorer.picker.w.value = 7
    explorer.picker.a.value = 2
    assert seen == [Bits(7, 4), Bits(7, 2)] and not explorer.message


def test_a_click_picks_the_cell_and_an_empty_one_its_neighbour(explorer):
    click(explorer.figure.data[SurfaceMap.CELLS], 3, 1)
    assert explorer.value == Bits(3, 5)
    click(explorer.map.relief.data[SurfaceMap.MESH], 0., 6.)
    assert explorer.value == Bits(8, 2)
    click(explorer.figure.data[SurfaceMap.CELLS], 0, 7)  # FP weights with 2-bit activations: never measured
    assert explorer.value == FP


def test_budgets_veil_mark_and_lead_to_the_best(explorer, digits):
    x = digits['MEBQAT'].surface
    explorer.budget.bytes.index, explorer.budget.bitops.index = 3, 12
    limits = dict(max_bytes=explorer.budget.bytes.value, max_bitops=explorer.budget.bitops.value)
    dear = {b for b in x if x.at(b).bytes > limits['max_bytes'] or x.at(b).bitops > limits['max_bitops']}
    assert dear and {b for b in x if cell(explorer, b, SurfaceMap.VEIL)} == dear
    assert explorer.best == x.best(**limits) and str(explorer.best) in explorer.budget.report.value
    explorer.budget.go.click()
    assert explorer.value == explorer.best
    explorer.budget.over.value = 'bitops'
    front = [b for b in x.pareto('bitops') if b not in dear]
    assert list(explorer.figure.data[SurfaceMap.FRONT].x) == cell_outlines(front, explorer.map.w, explorer.map.a, 0.12)['x']


def test_a_budget_that_nothing_fits_says_so(digits):
    one = Surface({Bits(4, 4): Point(.5, .4, .6, 10, 100., 5000.), Bits(2, 8): Point(.4, .3, .5, 10, 50., 9000.)})
    explorer = SurfaceExplorer(one)
    explorer.budget.bytes.index = explorer.budget.bitops.index = 0
    assert explorer.budget.go.disabled and 'no pair has bytes' in explorer.budget.report.value and explorer.figure.data[SurfaceMap.BEST].x == ()
    explorer.budget.bytes.index = 1
    assert explorer.best == Bits(4, 4) and not explorer.budget.go.disabled


def test_no_costs_no_budget():
    explorer = SurfaceExplorer(Surface({Bits(4, 4): Point(.5, .4, .6, 10), FP: Point(.6, .5, .7, 10)}))
    assert explorer.budget.bytes.disabled and explorer.budget.bitops.disabled and explorer.best == FP and not explorer.message


def test_difference_of_two_methods(explorer, digits):
    explorer.view.value, explorer.against.value = 'difference', 'Post-training quantization'
    ours, theirs = digits['MEBQAT'], digits['Post-training quantization']
    assert all(cell(explorer, b) == 100*(ours.at(b).accuracy - theirs.at(b).accuracy) for b in ours.surface)
    axis = explorer.figure.layout.coloraxis
    assert axis.cmin == -axis.cmax < 0 and not explorer.message
    explorer.view.value = 'cells'
    assert explorer.figure.layout.coloraxis.cmin == 0 and cell(explorer, FP) == ours.at(FP).accuracy


def test_stretched_colours_span_what_was_measured(explorer, digits):
    explorer.stretch.value = True
    seen = [p.accuracy for p in digits['MEBQAT'].surface.points.values()]
    assert (explorer.figure.layout.coloraxis.cmin, explorer.figure.layout.coloraxis.cmax) == (min(seen), max(seen))
    assert explorer.map.relief.layout.scene.zaxis.range == (min(seen), max(seen))


def test_the_relief_takes_the_place_of_the_map(explorer):
    explorer.view.value = 'relief'
    assert explorer.map.box.children == (explorer.map.relief,)
    explorer.view.value = 'cells'
    assert explorer.map.box.children == (explorer.figure,)


def surface(pairs, n=10, **meta): return Surface({b: Point(.5, .4, .6, n) for b in pairs}, meta=meta)


def test_difference_over_other_pairs_and_other_images_says_so():
    explorer = SurfaceExplorer({'a': surface([Bits(2, 2), Bits(4, 4)]), 'b': surface([Bits(2, 2), Bits(8, 8)], 20)}, Bits(2, 2))
    explorer.view.value = 'difference'
    assert 'different images' in explorer.message and 'the 1 pairs that both' in explorer.message
    assert cell(explorer, Bits(2, 2)) == 0 and cell(explorer, Bits(4, 4)) is None
    same = SurfaceExplorer({'a': surface([Bits(2, 2)], fingerprint='x'), 'b': surface([Bits(2, 2)], fingerprint='x')})
    same.view.value = 'difference'
    assert not same.message


def test_difference_without_shared_pairs_is_an_error_in_the_panel():
    explorer = SurfaceExplorer({'a': surface([Bits(2, 2)]), 'b': surface([Bits(8, 8)])})
    explorer.view.value = 'difference'
    assert 'share no pair' in explorer.message
    explorer.view.value = 'cells'
    assert not explorer.message


def test_a_pair_that_the_other_method_lacks_leads_to_its_nearest():
    explorer = SurfaceExplorer({'a': surface([Bits(2, 2), Bits(4, 4)]), 'b': surface([Bits(5, 4)])}, Bits(4, 4))
    explorer.method = 'b'
    assert explorer.value == Bits(5, 4) and 'b was not measured at W4A4; the nearest pair is W5A4' in explorer.message
    explorer.method = 'a'
    assert explorer.value == Bits(4, 4)


def test_a_plain_surface_says_what_is_missing(digits):
    explorer = SurfaceExplorer(digits['MEBQAT'].surface)
    assert explorer.box.layout.display == explorer.changes.layout.display == 'none' and explorer.absent.layout.display is None
    assert 'no answers of single images' in explorer.absent.value and 'answered otherwise' not in explorer.readout.value


@pytest.mark.parametrize('given, said', [({}, 'nothing to explore'), ({'x': 'surface.json'}, "'x' must be an Exploration or a Surface, got str"), (None, 'got NoneType')])
def test_refuses_what_cannot_be_explored(given, said):
    with pytest.raises(ValueError, match=said): SurfaceExplorer(given)


def test_refuses_values_that_were_not_measured(explorer):
    with pytest.raises(traitlets.TraitError, match='W9A9 was not measured; the nearest pair is'): explorer.value = Bits(9, 9)
    with pytest.raises(traitlets.TraitError, match="no network 'QAT'"): explorer.method = 'QAT'
    assert (explorer.value, explorer.method) == (Bits(4, 4), 'MEBQAT')


def test_an_error_in_a_move_is_shown_and_taken_away(explorer, monkeypatch):
    monkeypatch.setattr(type(explorer), '_show_answers', lambda self: {}['gone'])
    explorer.picker.w.value = 3
    assert 'KeyError' in explorer.message
    monkeypatch.undo()
    explorer.picker.w.value = 2
    assert not explorer.message


def test_captions_are_escaped_and_spoken(digits):
    x = digits['MEBQAT']
    explorer = SurfaceExplorer(replace(x, classes=tuple(f'<{c}>' for c in x.classes)), Bits(2, 2))
    assert re.search(r'alt="true &lt;\d&gt;: was &lt;\d&gt;, now &lt;\d&gt;"', explorer.thumbs.value) and '<3>' not in explorer.thumbs.value


def test_colour_images_become_pictures(digits):
    image = torch.arange(3*5*4, dtype=torch.uint8).view(3, 5, 4)
    read = Image.open(io.BytesIO(base64.b64decode(image_uri(image).split(',')[1])))
    assert read.size == (4, 5) and read.getpixel((1, 2)) == tuple(int(v) for v in image[:, 2, 1])


def visits(x, answer=None, **kw):
    asked = []
    def own(bits):
        asked.append(bits)
        return x.answers[bits], x.confidence[bits]
    return SurfaceExplorer.live(answer or own, x.images, x.labels, x.classes, BitSpace([Bits(2, 2), Bits(2, 4), Bits(4, 4), FP]), x.costs, **kw), asked


def test_live_measures_a_pair_once_and_fills_its_cell(digits):
    x = digits['MEBQAT']
    explorer, asked = visits(x, value=Bits(4, 4))
    assert asked == [Bits(4, 4), FP] and cell(explorer, Bits(2, 2)) is None and not explorer.picker.w.continuous_update
    explorer.value = Bits(2, 2)
    explorer.value = Bits(4, 4)
    assert asked == [Bits(4, 4), FP, Bits(2, 2)] and cell(explorer, Bits(2, 2)) == x.at(Bits(2, 2)).accuracy
    assert explorer.methods[explorer.method].at(Bits(2, 2)) == Point(**{**vars(x.at(Bits(2, 2))), 'loss': None})


def test_live_fills_the_rest_and_stops_when_told(digits):
    explorer, asked = visits(digits['MEBQAT'])
    explorer.measure_all()
    assert len(asked) == 4 == explorer.bar.value and '4 of 4 pairs measured' in explorer.progress.value and explorer.fill.disabled
    explorer, asked = visits(digits['MEBQAT'])
    async def stop():
        explorer.fill.click()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        label = explorer.fill.description
        explorer.fill.click()
        await explorer._task
        return label
    assert asyncio.run(stop()) == 'Stop' and len(asked) == 2 and explorer.fill.description == 'Measure all pairs'


def test_a_slow_network_is_named_as_slow(digits, monkeypatch):
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr('mebqat.explore.surface_explorer.perf_counter', lambda: next(clock))
    explorer, _ = visits(digits['MEBQAT'])
    explorer.value = Bits(2, 2)
    assert 'took 3 s' in explorer.progress.value and '"Measure all pairs" takes about 6 s more' in explorer.progress.value


def test_a_network_that_fails_says_why_in_the_panel(digits):
    x, broken = digits['MEBQAT'], [False]
    def answer(bits):
        if broken[0]: raise RuntimeError('out of memory')
        return x.answers[bits], x.confidence[bits]
    explorer, _ = visits(x, answer)
    broken[0] = True
    explorer.picker.w.value = 2
    assert explorer.message == 'RuntimeError: out of memory'
    explorer.measure_all()
    assert explorer.fill.description == 'Measure all pairs' and not explorer.fill.disabled
    broken[0] = False
    explorer.value = Bits(4, 4)
    assert not explorer.message


def test_live_refuses_networks_without_bits_and_wrong_answers(digits):
    x = digits['MEBQAT']
    bare = SimpleNamespace(layers=[SimpleNamespace(quantized=False)])
    with pytest.raises(ValueError, match='no quantized layers'):
        SurfaceExplorer.live(None, x.images, x.labels, x.classes, BitSpace([FP]), bare)
    with pytest.raises(ValueError, match='answers at .* must be one each'): visits(x, lambda bits: (x.answers[bits][:5], None))


def test_bake_is_a_page_on_its_own(explorer, tmp_path):
    text = explorer.bake(tmp_path/'explorer.html', 'Digits')
    assert (tmp_path/'explorer.html').read_text(encoding='utf-8') == text and '<title>Digits</title>' in text and 'explorer-data' in text


def test_without_anywidget_it_still_says_what_to_install(digits, monkeypatch):
    monkeypatch.setattr(panels, 'find_spec', lambda name: None)
    explorer = SurfaceExplorer(digits)
    explorer.value = Bits(2, 3)
    assert not isinstance(explorer.figure, LiveFigure) and isinstance(explorer.figure, go.Figure)
    assert "pip install 'mebqat[lab]'" in explorer.map.flat.value and framed(explorer) == cell_frame(1, 0)


def test_ladders_hold_costs_that_exist_and_end_without_a_limit():
    assert budget_steps([5, 3, 5], 'B') == [('3 B', 3), ('5 B', 5), ('no limit', float('inf'))]
    steps = [v for _,v in budget_steps([2**i + j for i in range(4, 20) for j in range(8)], 'B', 12)]
    assert len(steps) <= 13 and steps == sorted(steps) and steps[0] == 16 and steps[-2] == 2**19 + 7


def test_live_figures_share_one_script_and_open_with_all_their_data():
    one, two = panels.live(go.Figure(go.Bar(y=[1]))), panels.live(go.Figure())
    assert one._library is two._library and len(one._library.value) > 1_000_000 > 2000 > len(one._esm)
    one.data[0].y = [7]
    state = one.get_state()
    assert [t['y'] for t in state['_widget_data']] in ([[7]], [(7,)])
    assert state['_library'] == f'IPY_MODEL_{one._library.model_id}'


def test_a_browser_that_drew_too_early_hears_of_changes_once(monkeypatch):
    fig, sent = panels.live(go.Figure(go.Bar(y=[1]))), []
    fig.get_state()
    monkeypatch.setattr(LiveFigure, '_send_restyle_msg', lambda self, data, i: sent.append((data['y'], i)))
    fig._data[0]['y'] = [2]
    fig._js2py_traceDeltas = {'trace_deltas': [], 'trace_edit_id': 0}
    fig._js2py_traceDeltas = {'trace_deltas': [], 'trace_edit_id': 0}
    assert sent == [([[2]], [0])]


def test_policies_of_a_real_cost_table(digits):
    costs = digits['MEBQAT'].costs
    picker = PolicyPicker(costs, value=Bits(4, 4), max_bytes=costs.at(Bits(4, 4)).weight_bytes)
    assert picker.cost.weight_bytes == costs.at(Bits(4, 4)).weight_bytes and picker.within
    name = costs.quantized[0]
    picker.rows[name].w.value = 8
    want = costs.at(Policy({n: Bits(8 if n == name else 4, 4) for n in costs.quantized}))
    assert picker.cost == want and not picker.within and 'over the budget of' in picker.total.value and picker.every.w.value == LayerRow.MIXED
    shown = [l for l in want.layers if l.quantized]
    assert list(picker.figure.data[2].y) == [l.weight_bytes for l in shown] == list(picker.bake().data[2].y)
    baked = {f.name: f for f in picker.bake().frames}
    assert [*baked] == ['this policy', *(f'W{b}A{b}' for b in range(2, 9))]
    uniform = costs.at(Policy({n: Bits(3, 3) for n in costs.quantized}))
    assert list(baked['W3A3'].data[2].y) == [l.weight_bytes for l in uniform.layers if l.quantized] and si(uniform.bitops, 'BitOPs') in baked['W3A3'].layout.title.text
    picker.every.w.value = 2
    assert set(picker.value.values()) == {Bits(2, 4)} and picker.within


def test_a_width_the_network_refuses_is_said_and_taken_back(digits):
    picker = PolicyPicker(digits['MEBQAT'].costs, w=(1, 2, 4), a=(2, 4), value=Bits(4, 4))
    before = picker.value
    picker.every.w.value = 1
    assert 'goes down to W2A2' in picker.message and picker.value == before and picker.every.w.value == 4
    picker.every.w.value = 2
    assert not picker.message and set(picker.value.values()) == {Bits(2, 4)}
