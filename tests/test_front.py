"FrontExplorer and its page: what a hand moves, what is then shown, what is refused, and that the page does the same without a kernel."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import traitlets
from plotly.basedatatypes import Undefined

from mebqat.explore import panels
from mebqat.bits import Bits, Policy
from mebqat.files import shipped
from mebqat.figures.predictions import load_explorations
from mebqat.explore.front_explorer import FrontExplorer
from mebqat.figures.front import BY_HAND, front_data, front_page, front_part, searched_layers, stairs, to_front
from mebqat.mixed.front import Front
from mebqat.mixed.searches import random_search
from mebqat.mixed.space import Budget, Scored, SearchSpace
from test_page import visit

INF = float('inf')


@pytest.fixture(scope='module')
def costs(): return load_explorations(shipped('digits_exploration.safetensors'))['MEBQAT'].costs


@pytest.fixture(scope='module')
def space(costs): return SearchSpace(costs, [Bits(w, a) for w in (2, 3, 4, 6) for a in (2, 3, 4, 6)])


def fitness(policy):
    "Made up: each layer loses by its bits, the first most."
    return .97 - sum((.5 if n == 'block1.conv' else .1)*(2.**-b.w + .7*2.**-b.a) for n,b in policy.items())


@pytest.fixture(scope='module')
def front(space):
    line = [space.scored(p := space.uniform(Bits(b, b)), fitness(p), 'uniform') for b in (2, 3, 4, 6)]
    found = random_search(space, fitness, Budget(max_bitops=2e6), 40, seed=1)
    good = Policy(dict(space.uniform(Bits(2, 2))) | {'block1.conv': Bits(6, 6)})
    return Front([*line, *found.points(), space.scored(good, fitness(good), 'greedy')], 'made up <b>&</b> </script>')


@pytest.fixture
def explorer(front, costs): return FrontExplorer(front, costs)


def click(explorer, point):
    "What plotly does when somebody clicks the mark of a point."
    at = next(i for i,p in enumerate(explorer.front) if p is point)
    trace, i = next((t, list(t.customdata).index(at)) for t in explorer.figure.data if t.customdata is not None and at in t.customdata)
    for callback in trace._click_callbacks: callback(trace, SimpleNamespace(xs=[0], ys=[0], point_inds=[i]), None)


def shown(explorer): return {t.name: t for t in explorer.figure.data if t.mode == 'lines+markers' or t.name in ('chosen', 'best allowed')}


def test_every_part_follows_the_point(explorer, front, costs):
    for p in (front.points[0], front.points[9], front.points[-1]):
        explorer.value = p
        cost, names = costs.at(p.policy), explorer.names
        assert (shown(explorer)['chosen'].x, shown(explorer)['chosen'].y) == ((p.bytes,), (p.fitness,))
        assert [list(t.y) for t in explorer.bars.data] == [[p.policy[n].w for n in names], [p.policy[n].a for n in names], [l.weight_bytes for l in cost.layers]]
        assert f'<b>{100*p.fitness:.2f} %</b>' in explorer.readout.value and f'{cost.compression:.2f}x smaller' in explorer.readout.value
        assert explorer.editor.picker.value == p.policy and not shown(explorer)['yours'].x


@pytest.mark.parametrize('x', ['bytes', 'bitops'])
def test_staircases_and_clouds_are_the_front(explorer, front, x):
    explorer.x.value = x
    for m,own in front.by_method().items():
        values = {(getattr(p, x), p.fitness) for p in own}
        line = sorted((c, f) for c,f in values if not any(d <= c and g >= f and (d, g) != (c, f) for d,g in values))
        assert list(zip(shown(explorer)[m].x, shown(explorer)[m].y)) == line
    seen = sorted(i for t in explorer.figure.data if t.customdata is not None for i in t.customdata)
    assert seen == [*range(len(front))]
    assert explorer.figure.layout.xaxis.title.text == {'bytes': 'bytes of weights', 'bitops': 'bit operations of one image'}[x]
    kind = 'log' if max(getattr(p, x) for p in front) > 5*min(getattr(p, x) for p in front) else 'linear'
    assert explorer.figure.layout.xaxis.type == kind and (explorer.figure.layout.xaxis.tickvals is None) == (kind == 'linear')


def test_no_message_to_the_browser_leaves_a_layer_out(explorer, monkeypatch):
    "A restyle of several traces in which one has nothing for a key resets that key there."
    sent = []
    for kind in ('restyle', 'update'): monkeypatch.setattr(explorer.figure, f'_send_{kind}_msg', lambda *args, **kw: sent.append(args[0] if args else kw['restyle_data']))
    explorer.x.value, explorer.walk.index, explorer.budget.bitops.index = 'bitops', 1, 3
    keys = [v for data in sent for v in data.values() if isinstance(v, list)]
    assert not explorer.message and len(sent) > 5 and keys and not [v for v in keys if any(one is Undefined for one in v)]


def test_going_back_to_an_axis_leaves_no_trace_of_the_other(explorer):
    before = explorer.figure.layout.xaxis.to_plotly_json()
    explorer.x.value = 'bitops'
    assert explorer.figure.layout.xaxis.to_plotly_json() != before
    explorer.x.value = 'bytes'
    assert explorer.figure.layout.xaxis.to_plotly_json() == before


def test_a_click_chooses_and_the_walk_says_where_it_stands(explorer, front):
    off = next(p for p in front if p not in explorer.steps)
    click(explorer, off)
    assert explorer.value is off and 'Not on the front' in explorer.readout.value
    assert explorer.steps[explorer.walk.index].bytes <= off.bytes
    click(explorer, explorer.steps[0])
    assert explorer.value is explorer.steps[0] and explorer.walk.index == 0 and 'Not on the front' not in explorer.readout.value


def test_the_walk_goes_along_the_undominated_points(explorer, front):
    for x in ('bytes', 'bitops'):
        explorer.x.value = x
        assert list(explorer.steps) == stairs(front, x) and len(explorer.steps) > 2
        for i in (0, len(explorer.steps) - 1, 1):
            explorer.walk.index = i
            assert explorer.value is explorer.steps[i]


def test_a_budget_pales_names_and_leads_to_the_best(explorer, front):
    for slider in (explorer.budget.bytes, explorer.budget.bitops): slider.index = len(slider.options)//2
    most, ops = explorer.limits
    want = front.best(most, ops)
    assert explorer.best == want and f'Best allowed: <b>{100*want.fitness:.2f} %' in explorer.budget.report.value
    assert shown(explorer)['best allowed'].x == (want.bytes,)
    for t in explorer.figure.data:
        if t.customdata is None: continue
        symbols = [t.marker.symbol]*len(t.customdata) if isinstance(t.marker.symbol, str) else t.marker.symbol
        for i,s in zip(t.customdata, symbols): assert s.endswith('-open') == (front.points[i].bytes > most or front.points[i].bitops > ops)
    assert all(p.bytes <= most and p.bitops <= ops for p in explorer.steps) and explorer.figure.layout.shapes[0].x0 == most
    explorer.budget.go.click()
    assert explorer.value == want and 'over the budget' not in explorer.readout.value
    explorer.value = max(front, key=lambda p: p.bytes)
    assert 'over the budget' in explorer.readout.value
    explorer.budget.bytes.value = explorer.budget.bitops.value = INF
    assert 'Best of all' in explorer.budget.report.value and not shown(explorer)['best allowed'].x and not explorer.figure.layout.shapes


def test_a_budget_to_begin_with_is_on_the_slider(front):
    e = FrontExplorer(front, max_bitops=1_234_567)
    assert e.limits == (INF, 1_234_567) and e.value == front.best(max_bitops=1_234_567) and ('1.23 MBitOPs', 1_234_567) in e.budget.bitops.options
    assert e.budget.bitops.options[-1] == ('no limit', INF) and e.editor is None and len(e.bars.data) == 2


def test_a_budget_that_nothing_meets_says_so(front):
    e = FrontExplorer(front, max_bytes=5)
    assert e.best is None and e.budget.go.disabled and 'no point costs at most 5 B' in e.budget.report.value and not e.message
    assert e.value == max(front, key=lambda p: p.fitness)


def test_words_compare_with_the_uniform_line(explorer, front):
    p = front.points[-1]
    explorer.value = p
    line = front.by_method()['uniform'].points
    below, above = max((u for u in line if u.bytes <= p.bytes and u.bitops <= p.bitops), key=lambda u: u.fitness), min((u for u in line if u.fitness >= p.fitness), key=lambda u: u.bytes)
    assert f'costs no more, W2A2, has {100*below.fitness:.2f} %: {100*(p.fitness - below.fitness):.2f} points less.' in explorer.readout.value
    assert f'takes {above.bytes/p.bytes:.2f}x the bytes and {above.bitops/p.bitops:.2f}x the bit operations.' in explorer.readout.value
    explorer.value = line[0]
    assert 'This policy is uniform: W2A2' in explorer.readout.value


def test_layers_that_were_fixed_do_not_hide_a_uniform_policy(costs):
    space = SearchSpace(costs, [Bits(2, 2), Bits(4, 4)], ends=Bits(8, 8))
    front = Front([space.scored(p, fitness(p), 'random') for p in (space.smallest, space.largest, Policy(dict(space.smallest) | {'block2.conv': Bits(4, 4)}))])
    assert searched_layers(front) == space.free == ('block2.conv', 'block3.conv', 'block4.conv') and searched_layers(Front(front.points[:1])) == space.names
    assert 'uniform: W4A4' in FrontExplorer(front, costs, front.points[1]).readout.value


def test_a_policy_by_hand_shows_its_cost_and_may_be_on_the_front(explorer, front, costs):
    explorer.value = front.points[0]
    explorer.editor.picker.rows['fc'].w.value = 7
    mine, cost = explorer.editor.picker.value, explorer.editor.picker.cost
    assert mine == Policy(dict(front.points[0].policy) | {'fc': Bits(7, 2)})
    assert 'unknown' in explorer.editor.report.value and shown(explorer)['yours'].x == (cost.weight_bytes,)*2
    explorer.x.value = 'bitops'
    assert shown(explorer)['yours'].x == (cost.bitops,)*2
    click(explorer, front.points[5])
    assert explorer.editor.picker.value == mine  # work of a hand is kept
    explorer.editor.picker.value = front.points[1].policy
    assert 'The front holds this policy' in explorer.editor.report.value and shown(explorer)['yours'].y == (front.points[1].fitness,)
    explorer.editor.start.click()
    assert explorer.editor.picker.value == front.points[5].policy and not shown(explorer)['yours'].x
    assert explorer.editor.go.layout.display == 'none'


def test_measuring_puts_the_policy_on_the_front(front, costs):
    e = FrontExplorer(front, costs, front.points[0], measure=fitness)
    assert e.editor.go.disabled
    e.editor.picker.rows['block1.conv'].w.value = 5
    policy, cost = e.editor.picker.value, e.editor.picker.cost
    e.editor.go.click()
    assert len(e.front) == len(front) + 1 and (e.value.policy, e.value.fitness, e.value.bytes, e.value.bitops, e.value.method) == (policy, fitness(policy), cost.weight_bytes, cost.bitops, BY_HAND)
    assert list(shown(e)[BY_HAND].y) == [fitness(policy)] and shown(e)[BY_HAND].showlegend and e.editor.go.disabled
    assert len(front.methods) == 3 and BY_HAND in e.bake()
    e.value = front.points[3]
    assert e.editor.picker.value == front.points[3].policy


@pytest.mark.parametrize('measure, said', [(lambda p: float('nan'), 'finite number'), (lambda p: 1/0, 'ZeroDivisionError'), (lambda p: 'good', "'good'")])
def test_a_measurement_that_fails_says_why(front, costs, measure, said):
    e = FrontExplorer(front, costs, measure=measure)
    e.editor.picker.rows['fc'].w.value = 7
    e.editor.go.click()
    assert said in e.message and '\n' not in e.message and len(e.front) == len(front) and not e.editor.go.disabled and e.editor.go.description == 'Measure this policy'


def test_refusals_name_what_is_wrong(front, costs, space):
    refused = {'at least one point': lambda: FrontExplorer([]), 'got int': lambda: FrontExplorer(3), "got 'a'": lambda: FrontExplorer('abc'), 'give costs=': lambda: FrontExplorer(front, measure=fitness),
               'max_bytes must be a positive number, got -1': lambda: FrontExplorer(front, max_bytes=-1)}
    stem = Scored(Policy({'stem': Bits(4, 4)}), .9, 10., 100)
    refused |= {'mixes networks': lambda: FrontExplorer([*front, stem]), "'block1.conv' is a layer of only one": lambda: FrontExplorer([stem], costs),
                'where the front has': lambda: FrontExplorer([replace(p, bitops=p.bitops + 1) for p in front], costs)}
    for said, make in refused.items():
        with pytest.raises(ValueError, match=said) as e: make()
        assert '\n' not in str(e.value)
    with pytest.raises(traitlets.TraitError, match='is no point of this front; choose one of its'): FrontExplorer(front, value=replace(front.points[0], fitness=.123))
    with pytest.raises(traitlets.TraitError, match='Scored'): FrontExplorer(front, value='best')
    assert to_front(random_search(space, fitness, Budget(max_bitops=2e6), 5)).methods == ('random',)


def test_without_anywidget_it_still_follows(front, costs, monkeypatch):
    monkeypatch.setattr(panels, 'find_spec', lambda name: None)
    e = FrontExplorer(front, costs)
    e.walk.index, e.x.value = 0, 'bitops'
    assert 'anywidget' in e.map.shown.value and not e.message and shown(e)['chosen'].x == (e.value.bitops,)


def test_the_data_of_the_page_are_those_of_the_front(front, costs):
    data = front_data(front, costs, front.points[2], 'bitops', (INF, 1e6))
    for i,p in enumerate(front):
        assert Policy({n: Bits(*data['pairs'][k]) for n,k in zip(data['names'], data['policy'][i])}) == p.policy
        assert (data['fitness'][i], data['bytes'][i], data['bitops'][i], data['methods'][data['method'][i]]['name']) == (p.fitness, p.bytes, p.bitops, p.method)
    assert data['start'] == {'point': 2, 'x': 'bitops', 'limits': [None, 1e6]} and ['1 MBitOPs', 1e6] in [*map(list, data['limits']['bitops'])]
    assert '</script>' not in front_part(front, costs).replace('</script>', '', 1)


# The page in a browser

@pytest.fixture(scope='module')
def page_file(front, costs, tmp_path_factory):
    path = tmp_path_factory.mktemp('front')/'front.html'
    FrontExplorer(front, costs, front.points[0]).bake(path, caption='A <b>caption</b>.')
    return path


def opened(browser, path, **how):
    page, wrong = visit(browser, path, **how)
    page.wait_for_function('() => document.querySelector("#front-bars .main-svg")')
    return page, wrong


def stands(page, p, names):
    "Does the page show this point, ring, bars and table?"
    x = page.locator('input[name="front-x"]:checked').get_attribute('value')
    ring = page.evaluate('() => { const t = document.querySelector("#front-picture").data.find(t => t.name === "chosen"); return [t.x[0], t.y[0]]; }')
    bars = page.evaluate('() => document.querySelector("#front-bars").data.map(t => t.y)')
    rows = page.evaluate('() => [...document.querySelectorAll("#front-table tbody tr")].map(r => [...r.cells].slice(0, 3).map(c => c.textContent))')
    assert ring == [getattr(p, x), p.fitness] and bars[:2] == [[p.policy[n].w for n in names], [p.policy[n].a for n in names]]
    assert rows == [[n, str(p.policy[n].w), str(p.policy[n].a)] for n in names] and f'{100*p.fitness:.2f} %' in page.locator('#front-readout').inner_text()


@pytest.mark.parametrize('scheme, width', [('light', 1000), ('dark', 600)])
def test_the_page_explores_without_a_kernel(browser, page_file, front, space, scheme, width, click_plot):
    page, wrong = opened(browser, page_file, color_scheme=scheme, viewport={'width': width, 'height': 900})
    stands(page, front.points[0], space.names)
    walk, bitops = page.locator('#front-step'), page.get_by_label('Operations at most')
    for x in ('bytes', 'bitops'):
        page.locator(f'input[name="front-x"][value="{x}"]').check(force=True)
        walk.focus()
        page.keyboard.press('Home')
        for p in stairs(front, x)[:3]:
            stands(page, p, space.names)
            page.keyboard.press('ArrowRight')
    bitops.focus()
    for _ in range(8): page.keyboard.press('ArrowLeft')
    limit = page.evaluate('() => { const data = JSON.parse(document.getElementById("front-data").textContent); return data.limits.bitops[document.getElementById("front-bitops").value][1]; }')
    page.get_by_role('button', name='Go to the best').click()
    stands(page, front.best(max_bitops=limit), space.names)
    dot = '''d => { d.scrollIntoView({block: "center"}); const dots = [...d.querySelectorAll(".scatterlayer .trace")].find(t => t.querySelectorAll("path.point").length > 5).querySelectorAll("path.point");
        const r = dots[3].getBoundingClientRect(); return [r.x + r.width/2, r.y + r.height/2]; }'''
    click_plot(page.locator('#front-picture'), dot, 'before => document.querySelector("#front-readout").innerText !== before', page.locator('#front-readout').inner_text())
    assert page.evaluate('document.documentElement.scrollWidth') <= width and page.locator('main > p').first.inner_text() == 'A <b>caption</b>.'
    assert page.evaluate('[...document.querySelectorAll("input[type=range]")].every(i => i.labels.length && i.getAttribute("aria-valuetext"))') and wrong == []


def test_many_layers_and_points_fit_the_page(browser, tmp_path):
    names = [f'stage{s}.{b}.conv{c}' for s in (1, 2, 3) for b in range(4) for c in (1, 2)][:22]
    space = SearchSpace([SimpleNamespace(name=n, macs=10**6*(i + 1), weights=1000*(i + 1), quantized=True) for i,n in enumerate(names)], [Bits(w, a) for w in range(2, 9) for a in range(2, 9)])
    points = [space.scored(p, fitness(p), m) for m,seed in (('random', 0), ('genetic', 1)) for p in space.random_policies(100, torch.Generator().manual_seed(seed))]
    path = tmp_path/'front.html'
    path.write_text(front_page(points, 'Many layers'), encoding='utf-8')
    page, wrong = opened(browser, path, viewport={'width': 1000, 'height': 900})
    labels = page.evaluate('() => [...document.querySelectorAll("#front-bars .xtick text")].map(t => [t.textContent, t.getBoundingClientRect().bottom])')
    assert sorted(t for t,_ in labels) == sorted(names)
    assert max(b for _,b in labels) <= page.evaluate('document.querySelector("#front-bars").getBoundingClientRect().bottom') and wrong == []
