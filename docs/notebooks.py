"Notebooks as pages: no hidden cells, no directives, live figures in place of stored ones."
import re

import nbformat
import plotly.graph_objects as go

from mebqat.figures.html import figure

PLOTLY, WIDGET = 'application/vnd.plotly.v1+json', 'application/vnd.jupyter.widget-view+json'
NOTE = '<p class="kernel">Here is a widget with Python behind it. <code>make lab</code> opens this notebook; its still twin is under Explorers.</p>'


def drawn(doc, name):
    "A stored plotly figure as a live one, in the colours of the page."
    doc['layout'].pop('template', None)
    if not doc['layout'].get('title'): doc['layout'].setdefault('margin', dict(t=40, b=60))
    return figure(go.Figure({k: doc[k] for k in ('data', 'layout', 'frames') if doc.get(k)}), name)


def shown(outputs, name):
    "The outputs of a cell as the page shows them."
    for i,out in enumerate(outputs):
        data = out.get('data', {})
        if PLOTLY in data: out['data'] = {'text/html': drawn(data[PLOTLY], f'{name}-{i}')}
        elif WIDGET in data: out['data'] = {'text/html': NOTE}
    return outputs


def linked(text, pages):
    "Lead `lesson 04`, `notebook 03` and `notebook mixed/01` to their pages."
    def to(m):
        key = f'course/{m[2]}' if m[1].lower() == 'lesson' else m[2]
        return f'[{m[0]}]({pages[key]}.ipynb)' if key in pages else m[0]
    parts = re.split(r'(```.*?```|`[^`]*`|^#.*?$|\[[^\]]*\]\([^)]*\))', text, flags=re.S | re.M)
    return ''.join(p if i % 2 else re.sub(r'\b([Ll]esson|[Nn]otebook) ((?:\w+/)?\d\d)\b', to, p) for i,p in enumerate(parts))


def notebook_page(path, pages):
    "A notebook's JSON, ready for Sphinx; `pages` maps what a notebook is called to where it is, seen from this one."
    nb, kept = nbformat.read(path, 4), []
    for cell in nb.cells:
        if cell.cell_type == 'markdown': cell.source = linked(cell.source, pages)
        elif cell.cell_type == 'code':
            if re.search(r'^#\|\s*hide\s*$', cell.source, re.M): continue
            cell.source = re.sub(r'^#\|.*\n?', '', cell.source, flags=re.M).strip('\n')
            cell.outputs = shown(cell.outputs, f'fig-{len(kept)}')
            if not cell.source and not cell.outputs: continue
        kept.append(cell)
    nb.cells = kept
    nb.metadata.pop('widgets', None)  # a widget's state carries its whole library
    return nbformat.writes(nb)


def title(path):
    "The first heading of a notebook."
    texts = (c.source for c in nbformat.read(path, 4).cells if c.cell_type == 'markdown')
    return next(m[1] for t in texts if (m := re.search(r'^# (.+)$', t, re.M)))
