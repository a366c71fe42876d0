"Explorers without a kernel: what each `.bake()` gives, from shipped data. To add one, write its function and name it in BAKED."
import json
from dataclasses import dataclass
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from mebqat.bits import Bits
from mebqat.data import shipped
from mebqat.plots import figure
from mebqat.surface import Point, Surface, write_text


@dataclass(frozen=True)
class Baked:
    name: str                        # File name and anchor
    title: str                       # Heading
    text: str                        # What to do and see, and where the data are from
    make: Callable[[], go.Figure|str] # A figure with sliders or buttons, or one self-contained HTML file
    height: int = 900                # Pixels of an HTML file's frame


def cifar10():
    "The stored surface of one MEBQAT network on CIFAR-10, as map and relief."
    run = next(r for r in json.loads(shipped('results/cifar10_resnet20.json').read_text(encoding='utf-8'))['runs'] if r['name'] == 'lsq-mebqat')
    points = {Bits.parse(p['bits']): Point(**{k: v for k,v in p.items() if k != 'bits'}) for p in run['surface']['points']}
    return Surface(points, 'One ResNet-20 on CIFAR-10').plot('both', caption='Two-bit weights are the first row; the buttons switch between map and relief.')


BAKED = [
    Baked('cifar10', 'A surface, two ways', 'Stored accuracies of one MEBQAT network at 18 pairs of bits, with interval, size and BitOPs under the pointer.', cifar10),
]


def sections(static):
    "Name to Markdown of each explorer; those that are files of their own are written to `static`/baked."
    out = {}
    for b in BAKED:
        made = b.make()
        if isinstance(made, str):
            (Path(static)/'baked').mkdir(exist_ok=True)
            write_text(Path(static)/'baked'/f'{b.name}.html', made)
            made = f'<iframe src="_static/baked/{b.name}.html" title="{b.title}" loading="lazy" style="height:{b.height}px"></iframe>'
        else: made = figure(made, b.name)
        out[b.title] = f'{b.text}\n\n```{{raw}} html\n{made}\n```\n'
    return out
