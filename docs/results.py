"Tables and figures of the results page, read from data/results when the site is built."
import json
from html import escape
from pathlib import Path

import pandas as pd

from mebqat.bits import Bits, Policy
from mebqat.figures.plots import by_pair, compare, diagonal
from mebqat.figures.html import part
from mebqat.mixed.front import Front
from mebqat.mixed.space import Scored
from mebqat.runs.policies import from_text
from mebqat.surface import Point, Surface

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {'ptq': 'post-training', 'adabits': 'AdaBits', 'any-precision': 'Any-Precision', 'mebqat': 'MEBQAT', 'mebqat-W2A2': 'MEBQAT, W2A2 guaranteed'}
EQUAL = [Bits(2, 2), Bits(4, 4), Bits(8, 8)]


def load(name): return json.loads((ROOT/'data'/'results'/f'{name}.json').read_text(encoding='utf-8'))


def protocol(about, *names):
    "What must be read before any number."
    said = lambda v: ', '.join(map(str, v)) if isinstance(v, list) else str(v)
    return '<dl class="protocol">' + ''.join(f'<dt>{escape(k)}</dt><dd>{escape(said(about[k]))}</dd>' for k in names if k in about) + '</dl>'


def points(rows, **more): return {Bits.parse(r['bits']): Point(**{k: v for k,v in (r | more).items() if k != 'bits'}) for r in rows}


def percent(p): return f'{100*p.accuracy:.2f} ({100*p.low:.1f} to {100*p.high:.1f})'


def cifar10():
    "Parts about CIFAR-10 by name."
    doc = load('cifar10_resnet20')
    found = {r['name']: Surface(points(r['surface']['points']), r['name']) for r in doc['runs']}
    def one(scheme): return {title: found[f'{scheme}-{k}'] for k,title in COLUMNS.items() if f'{scheme}-{k}' in found}
    def dedicated(scheme): return {f'dedicated {b}': found[f'{scheme}-qat-{b}'] for b in EQUAL if f'{scheme}-qat-{b}' in found}
    def table(scheme):
        own = {b: found[f'{scheme}-qat-{b}'] for b in EQUAL if f'{scheme}-qat-{b}' in found}
        rows = {'dedicated, a network for each': {str(b): percent(s.at(b)) for b,s in own.items()}}
        rows |= {t: {str(b): percent(s.at(b)) for b in EQUAL if b in s} for t,s in one(scheme).items()}
        return pd.DataFrame(rows).T.fillna('not run').rename_axis(columns='accuracy, % (interval)')
    def lines(scheme, low):
        said = 'Lines are single networks, markers networks trained for that pair alone.'
        return diagonal(one(scheme), dedicated(scheme), f'Test accuracy at equal bits (axis from {100*low:.0f} %)', said).update_yaxes(range=[low, 0.86])
    maps = {k.upper().replace('DOREFA', 'DoReFa'): found[f'{k}-mebqat'] for k in ('lsq', 'dorefa')}
    return {'cifar10 protocol': protocol(doc['about'], 'data', 'network', 'protocol', 'lists', 'interval', 'seed', 'command'),
            'cifar10 lsq': table('lsq'), 'cifar10 dorefa': table('dorefa'), 'cifar10 lines': lines('lsq', 0.6), 'cifar10 dorefa lines': lines('dorefa', 0.3),
            'cifar10 maps': compare(maps, caption='One MEBQAT network for each scheme, on the same colours: two-bit weights are the first row.')}


FEW_SHOT = {'pn-handicap': 'PN, rounded as the reference does', 'pn': 'PN, rounded afterwards', 'pn-qat': 'PN+QAT, a network each', 'mebqat-pn-inner': 'MEBQAT-PN, one episode at four pairs', 'mebqat-pn': 'MEBQAT-PN, one network', 'mebqat-pn-taught': 'MEBQAT-PN taught by full precision',
            'maml': 'MAML, rounded afterwards', 'maml-qat': 'MAML+QAT, a network each', 'untrained-maml': 'MEBQAT-MAML, untrained', 'mebqat-maml': 'MEBQAT-MAML, one network'}


def few_shot_runs(doc, shot, maml=False):
    "Surfaces by title, those of one pair each together."
    runs = {r['name']: points(r['points'], n=600) for r in doc['runs'] if r['k_shot'] == shot}
    out = {}
    for name,title in FEW_SHOT.items():
        found = {b: p for n,of in runs.items() if n == name or name.endswith('-qat') and n.startswith(f'{name}-') for b,p in of.items()}
        if found and ('maml' in name) == maml: out[title] = Surface(found, title)
    return out


FEW_SHOT_ABOUT = ('data', 'protocol', 'evaluation', 'interval', 'seed', 'command', 'runs')


def paired(doc, titles):
    "Differences on the same episodes, a row for each comparison with a title."
    rows = {}
    for p in doc['paired']:
        other = p['other'].removesuffix(f'-{p["bits"]}')
        if other in titles and other != 'pn-handicap': rows.setdefault((titles[p['ours']].partition(',')[0], titles[other], p['k_shot']), {})[p['bits']] = f'{p["difference"]:+.2f} ({p["low"]:+.2f} to {p["high"]:+.2f})'
    columns = [str(b) for b in sorted({Bits.parse(b) for r in rows.values() for b in r})]
    return pd.DataFrame([{'network': a, 'minus': b, 'shots': k, **{c: r.get(c, '') for c in columns}} for (a,b,k),r in rows.items()])


def omniglot():
    "Parts about Omniglot by name."
    doc, out = load('omniglot_few_shot'), {}
    caption = 'Accuracy on characters never seen in training, with intervals over 600 episodes; batch norm on the statistics of the batch.'
    for key,shot,maml,low in (('omniglot', 1, False, 0.7), ('omniglot', 5, False, 0.9), ('omniglot maml', 1, True, 0.7)):
        runs = few_shot_runs(doc, shot, maml)
        out[f'{key} {shot}'] = by_pair({k: s for k,s in runs.items() if k != FEW_SHOT['pn-handicap']}, f'Omniglot, 20-way {shot}-shot', caption).update_yaxes(range=[low, 1])
        out[f'{key} table {shot}'] = pd.DataFrame({k: {b: percent(s.at(b)) for b in s} for k,s in runs.items()}).sort_index().rename(str).fillna('').rename_axis(columns='accuracy, % (interval)')
    return out | {'omniglot paired': paired(doc, FEW_SHOT), 'omniglot protocol': protocol(doc['about'], *FEW_SHOT_ABOUT)}


def one_query():
    "Parts about smaller batches of queries by name."
    doc, rows = load('omniglot_one_query'), {}
    names = {'omniglot_mebqat_pn': 'MEBQAT-PN', 'omniglot_mebqat_maml': 'MEBQAT-MAML'}
    for r in doc['rows']:
        less = f' ({r["minus together"]["mean"]:+.1f}: {r["minus together"]["low"]:+.1f} to {r["minus together"]["high"]:+.1f})' if 'minus together' in r else ''
        rows.setdefault((names[r['network']], r['queries']), {})[r['bits']] = f'{r["accuracy"]["mean"]:.1f}{less}'
    table = pd.DataFrame([{'network': a, 'queries in a batch': q, **of} for (a,q),of in rows.items()])
    return {'one query table': table, 'one query protocol': protocol(doc['about'], 'networks', 'episodes', 'together', 'one query', 'one class', 'beside the support', 'interval', 'command')}


DESIGNS = {'single': 'one episode at one pair', 'both': 'four episodes at a pair each', 'single-as-many-steps': 'one episode at one pair, as many steps', 'inner': 'MEBQAT-PN, one episode at four pairs', 'pn-qat': 'PN+QAT, a network each', 'pn': 'PN, rounded afterwards'}


def miniimagenet():
    "Parts about miniImageNet by name."
    doc, rows = load('miniimagenet_few_shot'), {}
    for r in doc['runs']:
        for b,p in points(r['points'], n=600).items():
            if (title := DESIGNS.get(r['name'].removesuffix(f'-{b}'))) is not None: rows.setdefault(title, {})[f'{r["k_shot"]}-shot {b}'] = percent(p)
    table = pd.DataFrame({t: rows[t] for t in DESIGNS.values() if t in rows}).T.fillna('').rename_axis(columns='accuracy, % (interval)')
    return {'miniimagenet table': table, 'miniimagenet paired': paired(doc, DESIGNS), 'miniimagenet protocol': protocol(doc['about'], *FEW_SHOT_ABOUT)}


GROUPS = {'QAT, one pair': ('qat-',), 'AdaQAT': ('adaqat-0',), 'FracBits': ('fracbits',), 'QAT at a policy that was found': ('policy-', 'found-'), 'one network, searched': ('meta-', 'shared-', 'mebqat-')}


def policy_front(doc):
    "Every ResNet-20 that was measured at a setting of its own, by kind, as a Front over all layers."
    ends, names = {'conv': Bits(8, 8), 'fc': Bits(8, 8)}, [*next(r['bits'] for r in doc['runs'] if r['name'].startswith('meta-') and isinstance(r['bits'], dict))]
    def full(bits):
        at = from_text(bits)
        return Policy({n: ends[n] if n in ends else at[n] if isinstance(at, Policy) else at for n in names})
    return Front([Scored(full(r['bits']), r['accuracy'], r['bytes'], r['bitops'], g) for r in doc['runs'] for g,starts in GROUPS.items() if r['name'].startswith(starts)], 'ResNet-20 on CIFAR-10, test accuracy')


def mixed(bits):
    "A setting in a table: its pair, or mean widths of the layers that are free."
    if not isinstance(bits, dict): return bits
    free = [Bits.parse(b) for n,b in bits.items() if n not in ('conv', 'fc')]
    if len({*free}) == 1: return str(free[0])
    return f'{sum(b.w for b in free)/len(free):.1f} / {sum(b.a for b in free)/len(free):.1f} on average'


def policies():
    "Parts about bits under a budget by name."
    doc = load('cifar10_policies')
    def table(rows, **more): return pd.DataFrame({r['name']: {'bits': mixed(r['bits']), 'accuracy, % (interval)': percent(Point(r['accuracy'], r['low'], r['high'], r['n'], r['bytes'], r['bitops'])), 'drop, points': f'{r["drop"]:+.2f}',
                                                               'KB': f'{r["bytes"]/1e3:.1f}', 'GBitOPs': f'{r["bitops"]/1e9:.3f}', **{k: f(r) for k,f in more.items()}} for r in rows}).T
    searched, alone = [r for r in doc['runs'] if 'search' in r], [r for r in doc['runs'] if 'search' not in r]
    front = policy_front(doc)
    return {'policies protocol': protocol(doc['about'], 'data', 'network', 'protocol', 'selection', 'AdaQAT', 'FracBits', 'searches', 'reconstruction', 'interval', 'drop', 'seed', 'command', 'rows by accuracy'),
            'policies alone': table(alone, **{'passes over the data': lambda r: f'{r["passes over the training images"]:g}'}),
            'policies searched': table(searched, **{'scored by': lambda r: r['by'], 'scores': lambda r: str(r['evaluations'] + r.get('evaluations shared by all budgets', 0))}),
            'policies bitops': front.plot('bitops', 'Test accuracy against bit operations; each line joins what nothing cheaper of its kind matches.'),
            'policies bytes': front.plot('bytes', 'The same networks by bytes of weights.')}


def steps():
    "Parts about quantizer steps by name."
    doc = load('digits_steps')
    def table(what, cell):
        rows = [{'training': name, 'steps': when, **{k: cell(v) for k,v in found[what].items()}}
                for name in doc['before'] for when,found in (('before', doc['before'][name]), ('relative', doc['after'][name]))]
        return pd.DataFrame(rows)
    interval = lambda v: f'{v["mean"]:.1f} ± {doc["about"]["t"]*v["standard error"]:.1f}'
    return {'steps protocol': protocol(doc['about'], 'data', 'network', 'scheme', 'bits', 'training', 'seeds', 'before', 'interval', 'command'),
            'steps error': table('error over best', lambda v: f'{v["median"]:.3g} ({v["largest"]:.3g})'),
            'steps inputs': table('inputs, error over best', lambda v: f'{v["median"]:.3g} ({v["largest"]:.3g})'),
            'steps clipped': table('clipped', lambda v: f'{100*v["median"]:.1f} ({100*v["largest"]:.0f})'),
            'steps accuracy': table('accuracy', interval)}


def parts():
    "HTML by name."
    made = cifar10() | policies() | omniglot() | one_query() | miniimagenet() | steps()
    return {k: v if isinstance(v, str) else part(v, k.replace(' ', '-')) for k,v in made.items()}
