"Explorers without a kernel: what each `.bake()` gives, from shipped data. To add one, write its function and name it in BAKED."
import json
from dataclasses import dataclass
from collections.abc import Callable
from pathlib import Path

import plotly.graph_objects as go

from mebqat.files import shipped, write_text
from mebqat.runs.answers import playing
from mebqat.bits import Bits
from mebqat.figures.predictions import load_explorations
from mebqat.figures.front import front_page
from mebqat.layers import bit_layers
from mebqat.explore.monitor import TrainingMonitor
from mebqat.figures.pages import explorer_page
from mebqat.explore.playground import FewShotPlayground
from mebqat.figures.html import figure
from mebqat.explore.quantizer_lab import QuantizerLab
from mebqat.runs import open_run
from mebqat.surface import Point, Surface
from results import load, policy_front


@dataclass(frozen=True)
class Baked:
    name: str                        # File name and anchor
    title: str                       # Heading
    text: str                        # What to do and see, and where the data are from
    make: Callable[[], go.Figure|str] # A figure with sliders or buttons, or one self-contained HTML file
    height: int = 900                # Pixels of an HTML file's frame


def surface():
    "Three networks on the shipped digits, at every pair, with every answer."
    return explorer_page(load_explorations(shipped('digits_exploration.safetensors')), 'Digits at any bits')


def quantizer_lab():
    "The weights of the largest layer of the shipped network for digits."
    weights = {name: layer.weight.detach() for name,layer in bit_layers(open_run(shipped('digits_mebqat.safetensors')).model).items()}
    name = max(weights, key=lambda n: weights[n].numel())
    return QuantizerLab({name: weights[name]}).bake('Weights of a trained layer')


def few_shot():
    "An episode of drawn characters, classified by the shipped Omniglot network."
    return FewShotPlayground(**playing(n_way=20), number=3).bake()


def training():
    "The stored history of the shipped network for digits."
    monitor = TrainingMonitor('How the network for digits was trained')
    monitor(open_run(shipped('digits_mebqat.safetensors')).history)
    return monitor.bake()


def cifar10():
    "The stored surface of one MEBQAT network on CIFAR-10, as map and relief."
    run = next(r for r in json.loads(shipped('results/cifar10_resnet20.json').read_text(encoding='utf-8'))['runs'] if r['name'] == 'lsq-mebqat')
    points = {Bits.parse(p['bits']): Point(**{k: v for k,v in p.items() if k != 'bits'}) for p in run['surface']['points']}
    return Surface(points, 'One ResNet-20 on CIFAR-10').plot('both', caption='Two-bit weights are the first row; the buttons switch between map and relief.')


def policies():
    "Every stored ResNet-20 with bits of its own, on one front."
    return front_page(policy_front(load('cifar10_policies')), 'ResNet-20 under a budget')


BAKED = [
    Baked('surface', 'Accuracy over bits', """Three small networks and 540 test digits. Drag the bits, or click a cell of the map: accuracy with its interval, size and BitOPs,
confusions, and the digits whose answer changes. A budget marks the best pair that it allows.""", surface, 1470),
    Baked('lab', 'One tensor through every quantizer', """The weights of a trained layer. Choose a scheme, drag the bits: staircase, gradient, where the values fall,
and the error.""", quantizer_lab),
    Baked('few-shot', 'Twenty new characters, one image each', """A network that has never seen these characters, at the bits of the slider: which images it reads right, and where they lie
among the prototypes. The network is the shipped MEBQAT-PN, trained on Omniglot; the characters
are drawn by a program, and the episode is one of the few in which two bits change several answers.""", few_shot),
    Baked('training', 'A training', 'Loss, accuracy at several pairs and learning rate of the network for digits, as its monitor shows them.', training),
    Baked('front', 'Bits for each layer, under a budget', """Networks on CIFAR-10 with one pair for all layers, with bits that were learned, and with policies that were searched: accuracy against
bit operations or bytes. Move the budget, or click a point, and its bits are drawn layer by layer; [Results](results.md) has the protocol.""", policies, 1200),
    Baked('cifar10', 'A real data set', 'Stored accuracies of one MEBQAT network on CIFAR-10 at 18 pairs of bits; [Results](results.md) has the protocol.', cifar10),
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
