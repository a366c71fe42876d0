"""Many small images: how long the first and a later load take, and how much memory, as a folder and as a zip.

    python tests/bench/many_images.py --images 200000 --at /tmp/many        # makes them there, measures, removes them

Each load is a process of its own with one thread. Memory is the highest resident set less what the imports took; of it, `held` is what is
not a page of a file at the end, which the system cannot take back.
"""
import argparse, json, os, shutil, struct, subprocess, sys, zipfile, zlib
from pathlib import Path

LOAD = '''
import json, resource, sys, time, warnings
warnings.simplefilter('ignore')
from mebqat.data import load
def status(key): return next((int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith(key)), 0)
imported, anonymous, start = status('VmRSS'), status('RssAnon'), time.perf_counter()
began = time.process_time()
pool = load(sys.argv[1], sys.argv[2])
took, worked = time.perf_counter() - start, time.process_time() - began
pool.batch(slice(0, 64))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
print(json.dumps({'s': round(took, 2), 'cpu s': round(worked, 2), 'peak MB': round((peak - imported)/1e6), 'held MB': round((status('RssAnon') - anonymous)/1e6),
                  'images': len(pool), 'classes': len(pool.classes), 'shape': list(pool.images.shape[1:])}))
'''


def png(pixels):
    "A grey PNG; four times as fast as through an image library."
    def part(kind, data): return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    lines = b''.join(b'\0' + row.tobytes() for row in pixels)
    head = struct.pack('>IIBBBBB', pixels.shape[1], pixels.shape[0], 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + part(b'IHDR', head) + part(b'IDAT', zlib.compress(lines, 1)) + part(b'IEND', b'')


def make(at, n):
    "The same pictures as a folder and as a zip."
    import numpy as np
    draws = np.random.default_rng(0)
    for k in range(10): (at/'many'/f'c{k}').mkdir(parents=True)
    with zipfile.ZipFile(at/'many.zip', 'w') as archive:
        for i in range(n):
            data, name = png((draws.integers(0, 64, (28, 28)) + 19*(i % 10)).astype('uint8')), f'c{i % 10}/{i:06}.png'
            (at/'many'/name).write_bytes(data)
            archive.writestr(name, data)


def measured(path, split, cache):
    "One load in a process of its own."
    env = {**os.environ, 'MEBQAT_CACHE': str(cache), 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, '-c', LOAD, str(path), split], env=env, capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.splitlines()[-1]


if __name__ == '__main__':
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument('--images', type=int, default=200_000)
    options.add_argument('--at', type=Path, required=True, help='a folder to make, and to remove afterwards')
    options.add_argument('--keep', action='store_true', help='leave the images there, and take those that are there')
    a = options.parse_args()
    if not (a.keep and (a.at/'many.zip').exists()):
        a.at.mkdir(parents=True)
        make(a.at, a.images)
    for name in ('many', 'many.zip'):
        cache = a.at/'cache'
        shutil.rmtree(cache, ignore_errors=True)
        for when, split in (('first', 'train'), ('again', 'train'), ('again', 'all')):
            print(f'{name} {split} {when}:', measured(a.at/name, split, cache), flush=True)
    shutil.rmtree(cache if a.keep else a.at, ignore_errors=True)
