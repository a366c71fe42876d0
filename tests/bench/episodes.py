"""Drawing a 5-way 1-shot episode with 15 queries, one thread. Budget: 50x faster than learn2learn's task set on the same images.
Its own Omniglot set opens, shrinks and converts 80 PNG files for a task; the same is done here with 4,000 files of that size.
The second ratio is to a learn2learn task set whose images are floats in memory already, which its user must arrange."""
import os
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image
from _paired import paired, report

sys.modules['gym_notices'] = None
import learn2learn
from learn2learn.data.transforms import ConsecutiveLabels, FusedNWaysKShots, LoadData, RemapLabels
from torchvision import datasets, transforms

from mebqat.data import load
from mebqat.episodes import Episodes

torch.set_num_threads(1)
N_WAY, K_SHOT, N_QUERY = 5, 1, 15


def write_files(folder):
    "200 characters, 20 drawings of each, black on white in 105 x 105 pixels and one bit, as Omniglot's are."
    pool = load('glyphs', 'all', n_classes=200)
    for i,(image, label) in enumerate(zip(pool.images, pool.labels)):
        file = folder/pool.classes[label]/f'{i}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - image[0].numpy()).resize((105, 105)).convert('1').save(file)


def taskset(images):
    "A task set that draws anew each time."
    dataset = learn2learn.data.MetaDataset(images)
    choose = FusedNWaysKShots(dataset, n=N_WAY, k=K_SHOT + N_QUERY)
    return learn2learn.data.Taskset(dataset, [choose, LoadData(dataset), RemapLabels(dataset), ConsecutiveLabels(dataset)])


with tempfile.TemporaryDirectory() as home:
    os.environ['MEBQAT_CACHE'] = f'{home}/cache'
    root = Path(home)/'characters'
    write_files(root)
    pool = load(root, 'all', size=28)
    shrink = transforms.Compose([transforms.Resize(28, transforms.InterpolationMode.LANCZOS), transforms.ToTensor()])
    files = datasets.ImageFolder(root, shrink, loader=lambda f: Image.open(f).convert('L'))
    episodes, numbers = Episodes(pool, N_WAY, K_SHOT, N_QUERY), iter(range(10**9))
    ten = lambda draw: lambda: [draw() for _ in range(10)]
    memory = torch.utils.data.TensorDataset(*pool.batch(slice(None)))
    results = paired({'Episodes': ten(lambda: episodes[next(numbers)]), 'learn2learn, from files': ten(taskset(files).sample),
                      'learn2learn, from memory': ten(taskset(memory).sample)}, rounds=20)
    report(f'Ten times {N_WAY}-way {K_SHOT}-shot, {N_QUERY} queries a class', results, f'ratio to Episodes, of {pool}')
