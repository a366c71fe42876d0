"""Breaks what the package does to files, data and signals, and counts how that ends: `make campaign`, or for a part

    python tests/campaign.py --only kills --kills 20 --seed 1

Nothing outside a temporary folder is touched. Each line of the table says what was tried, how often, and how it ended:
as it should, refused in words, or wrong. It exits with 1 where anything is wrong. The same seed tries the same things;
where a signal comes after a time and not at a change of a file, what it meets may differ."""
import argparse, errno, importlib, io, json, os, random, shutil, signal, subprocess, sys, tempfile, threading, time
import zipfile, zlib
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

os.environ |= {'OMP_NUM_THREADS': '1', 'MKL_NUM_THREADS': '1'}  # children are forked: no threads before that
import torch
from PIL import Image

from _campaign import (Row, apart, contents, damaged, differing, fail, fresh, judge_apart, kill_self, litter, mutated,
                       mutated_file, plain, plant, print_table, private_mounts, read_only, reader_of, run, small_disk, touched)

torch.set_num_threads(1)
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT
MB = 1 << 20
ROOM = 256*MB  # address space that a reader may take beside what the file justifies: threads and libraries
HOME = Path(tempfile.gettempdir())  # replaced by main


# ---- the commands that write ---------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Job:
    "A command that writes, and how to go on with it."
    name: str
    call: tuple | object        # Arguments of `mebqat`, or a function
    after: tuple = ()           # Jobs whose results it needs
    weight: float = 1           # How often it is tried, beside the others
    real: bool = False          # Is it cheap enough for the command in a process of its own?
    short: bool = True          # Is it part of the short form?

    @property
    def trains(self): return isinstance(self.call, tuple) and self.call[0] in ('train', 'adaqat')


def cache_of(folder): return {'MEBQAT_CACHE': str(folder/'cache'), 'HOME': str(folder), 'COLUMNS': '200'}


def fill_cache():
    "Load pictures, with a cache in the working folder."
    from mebqat.data import load
    load(str(HOME/'pictures'), 'train')


def copy_lab():
    "What `mebqat lab` copies before it starts JupyterLab."
    from mebqat.launch import copy_notebooks
    copy_notebooks(Path('mine'))


@cache
def jobs():
    "Every command that writes, on tiny data."
    images = ('--data', str(HOME/'pictures'), '--width', 4, '--epochs', 5, '--batch-size', 16, '--lr', .01)
    few = ('--data', 'glyphs', '--glyph-classes', 40, '--size', 16, '--width', 4, '--n-way', 3, '--n-query', 2, '--steps', 4)
    genetic = ('--max-bytes', '1kB', '--method', 'genetic', '--population', 4, '--generations', 2)
    def train(method, *more, **how):
        return Job(f'train {method}', ('train', '--method', method, '--out', 'runs/r', *more), **how)
    base = (train('mebqat', *images),)
    return [
        train('mebqat', *images, weight=2, real=True), train('float', *images, short=False),
        train('qat', '--bits', 'W4A4', *images, short=False), train('adabits', *images, short=False),
        train('fracbits', '--target-bytes', 900, *images, short=False),
        train('mebqat-pn', *few, weight=.7), train('mebqat-maml', *few, weight=.3, short=False),
        Job('adaqat', ('adaqat', '--out', 'runs/r', *images)),
        Job('surface', ('surface', 'runs/r', '--bits', 'W2A2 W4A4 FP'), base, 2),
        Job('search', ('search', 'runs/r', *genetic), base, 2),
        Job('demo', ('demo', '--epochs', 1, '--out', 'shown'), weight=.15, short=False),
        Job('lab copies', copy_lab), Job('data cache', fill_cache)]


def pictures(folder, size=8, each=16, classes=('circle', 'cross', 'dot')):
    "A small data set of ours: grey pictures that differ by class and by noise."
    noise = torch.Generator().manual_seed(7)
    for i,name in enumerate(classes):
        (folder/name).mkdir(parents=True)
        for k in range(each):
            image = (torch.rand(size, size, generator=noise)*80 + 60*i + torch.arange(size)*4).byte()
            Image.fromarray(image.numpy()).save(folder/name/f'{k:02d}.png')
    return folder


def base_of(job) -> Path | None:
    "A folder in which the jobs that another one needs have been done; made once."
    if not job.after: return None
    folder = HOME/'bases'/'+'.join(j.name.replace(' ', '_') for j in job.after)
    if not folder.exists():
        fresh(None, folder)
        for j in job.after:
            done = run(j.call, folder, env=cache_of(folder))
            if done.code != 0: raise RuntimeError(f'{j.name} failed: {done}')
        shutil.rmtree(folder/'cache', ignore_errors=True)
    return folder


@cache
def reference(name):
    "What a job gives undisturbed: contents, seconds, changes; and the bytes it takes."
    job = next(j for j in jobs() if j.name == name)
    folder = fresh(base_of(job), HOME/'undisturbed'/'here')
    done = run(job.call, folder, hook={}, env=cache_of(folder))
    found = contents(folder)
    if done.code != 0 or damaged(found): raise RuntimeError(f'{name} failed undisturbed: {done} {damaged(found)}')
    size = sum(p.stat().st_size for p in folder.rglob('*') if p.is_file())
    return found, done, size


def go_on(job, folder):
    "Run a job again, as its own words tell: with --resume where it says so."
    done = run(job.call, folder, env=cache_of(folder))
    if done.code == 2 and '--resume' in done.err: done = run((*job.call, '--resume'), folder, env=cache_of(folder))
    return done


def finished(job, folder, foreign) -> str:
    "What is wrong with a folder after a disturbed job was run again, in words; '' when it is as if nothing had happened."
    done = go_on(job, folder)
    if done.code != 0: return f'again: {done}'
    found, wanted = contents(folder), reference(job.name)[0]
    ours = {n: c for n,c in found.items() if n not in foreign}
    if differing(ours, wanted): return f'again: not as undisturbed: {differing(ours, wanted)}'
    if litter(folder): return f'litter is left: {", ".join(litter(folder)[:4])}'
    return f"somebody's files were touched: {', '.join(touched(folder, foreign))}" if touched(folder, foreign) else ''


# ---- kills ---------------------------------------------------------------------------------------------------------

def chosen_jobs(is_short, names):
    "The commands to try."
    return [j for j in jobs() if (j.short or not is_short) and (not names or j.name in names)]


def spread(names, weights, count, rng):
    "How often each is tried, `count` in all, each at least once where there are enough."
    out = dict.fromkeys(names, 1 if count >= len(names) else 0)
    for name in rng.choices(names, weights, k=count - sum(out.values())): out[name] += 1
    return out


def kills(count, rng, is_short, only_jobs=None):
    "Signals at random moments of every command that writes; then the same command again must end as if there had been none."
    chosen = chosen_jobs(is_short, only_jobs)
    counts = spread([j.name for j in chosen], [j.weight for j in chosen], count, rng)
    for job in chosen:
        row = Row(f'kill: {job.name}')
        for _ in range(counts[job.name]): killed(job, row, rng)
        yield row
    if not is_short: yield real_kills(max(4, count//25), rng)


def killed(job, row, rng):
    "One signal, at a change of a file or after a time; then the command again."
    _, done, _ = reference(job.name)
    number, folder = rng.choice(SIGNALS), fresh(base_of(job), HOME/'work'/'here')
    foreign = ['notes.txt', 'runs/float/my_thesis.txt'] + ['runs/r/somebody.txt']*bool(job.after)
    plant(folder, foreign)
    at, delay = rng.randint(1, done.events), rng.uniform(0, done.seconds)
    how, moment = dict(hook=dict(at=at, act=kill_self(number))), f'change {at} of {done.events}'
    if rng.random() < .4: how, moment = dict(delay=delay, number=number), f'{delay:.2f} of {done.seconds:.2f} s'
    ended = run(job.call, folder, env=cache_of(folder), **how)
    row.add(*judge_kill(job, folder, ended, number, foreign, f'{signal.Signals(number).name} at {moment}'))


def judge_kill(job, folder, ended, number, foreign, moment):
    "Is everything whole, was the end a clean one, and does the command end well the second time?"
    if ended.crashed(): return 'wrong', f'{moment}: {ended}'
    if ended.code not in (0, -number, 128 + number): return 'wrong', f'{moment}: {ended}'
    if damaged(contents(folder)): return 'wrong', f'{moment}: {damaged(contents(folder))[0]}'
    if job.trains: plant(folder, ['runs/mine.json'])
    foreign = foreign + ['runs/mine.json']*job.trains
    words = finished(job, folder, foreign)
    return ('wrong', f'{moment}, exit code {ended.code}; {words}') if words else ('right', '')


def real_kills(count, rng):
    "The command itself, in a process that also imports."
    row, job = Row('kill: the real command'), next(j for j in jobs() if j.real)
    reference(job.name)
    for _ in range(count):
        number, folder = rng.choice(SIGNALS), fresh(None, HOME/'work'/'here')
        plant(folder, ['notes.txt'])
        with open(HOME/'err', 'w') as err:
            child = subprocess.Popen(
                [sys.executable, '-m', 'mebqat.cli', *map(str, job.call)], cwd=folder, env=os.environ | cache_of(folder),
                stdout=subprocess.DEVNULL, stderr=err, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
            delay = rng.uniform(0, 8)
            try: child.wait(delay)
            except subprocess.TimeoutExpired: child.send_signal(number)
            code = child.wait(60)
        words = (HOME/'err').read_text(errors='replace')
        note = f'{signal.Signals(number).name} after {delay:.2f} s: exit code {code}, {words[-300:]!r}'
        if 'Traceback' in words or code not in (0, -number, 128 + number): row.add('wrong', note)
        elif again := finished(job, folder, ['notes.txt']): row.add('wrong', f'{note}; {again}')
        else: row.add('right')
    return row


# ---- disks that are full, broken or closed -------------------------------------------------------------------------

def disk(count, rng, is_short, only_jobs=None):
    "Disks that are full, fail or may not be written: one line, exit code 2, old files whole, and all well when mended."
    left_out = ('demo', *('train mebqat-pn', 'adaqat')*is_short)  # the last two write as the others do
    chosen = [j for j in chosen_jobs(is_short, only_jobs) if j.name not in left_out]
    each = max(1, count//(3*len(chosen)))
    for name, try_ in (('fault', faulty), ('full disk', full), ('read-only', closed)):
        for job in chosen:
            row = Row(f'{name}: {job.name}')
            reference(job.name)
            seeds = [rng.random() for _ in range(1 if try_ is closed else each)]
            try: outcomes = apart(several, try_, job, seeds)
            except PermissionError: continue  # nobody may mount here
            for outcome in outcomes: row.add(*outcome)
            yield row


def several(try_, job, seeds):
    "Some tries in a process that may mount disks."
    if try_ is not faulty and not private_mounts(): raise PermissionError('no mounts here')
    return [try_(job, random.Random(seed)) for seed in seeds]


def judge_disk(job, folder, before, done, note, mend=lambda: None):
    "Was a hindered command refused in words, with everything as it was; and does it end well when nothing hinders it?"
    may_fail = not isinstance(job.call, tuple)  # a function: its error is not put into words by a command
    if not (done.code == 0 or may_fail and done.code == 1 or done.refused()): return 'wrong', f'{note}: {done}'
    found = contents(folder)
    if damaged(found): return 'wrong', f'{note}: {damaged(found)[0]}'
    changed = [n for n in before if n in found and found[n] != before[n] and found[n] != reference(job.name)[0].get(n)]
    gone = [n for n in before if n not in found]
    if changed or gone: return 'wrong', f'{note}: {changed + gone} changed or gone'
    if litter(folder): return 'wrong', f'{note}: litter is left: {litter(folder)[:3]}'
    mend()
    words = finished(job, folder, ['notes.txt'])
    if words: return 'wrong', f'{note}, exit code {done.code}; {words}'
    return ('right' if done.code == 0 else 'refused'), ''


def faulty(job, rng):
    "An error of the system at one change, or from one change on."
    folder = fresh(base_of(job), HOME/'work'/'here')
    plant(folder, ['notes.txt'])
    before, code = contents(folder), rng.choice((errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT))
    at, lasting = rng.randint(1, reference(job.name)[1].events), code != errno.EIO
    done = run(job.call, folder, hook=dict(at=at, act=fail(code), lasting=lasting), env=cache_of(folder))
    return judge_disk(job, folder, before, done, f'{errno.errorcode[code]} at change {at}{" and after" if lasting else ""}')


def on_disk(job, size, note, hinder, mend):
    "A job on a small disk."
    with small_disk(fresh(None, HOME/'work'/'disk'), size) as _:
        folder = HOME/'work'/'disk'/'here'
        if base_of(job): shutil.copytree(base_of(job), folder)
        else: folder.mkdir()
        plant(folder, ['notes.txt'])
        before = contents(folder)
        hinder()
        done = run(job.call, folder, env=cache_of(folder))
        return judge_disk(job, folder, before, done, note, mend)


def full(job, rng):
    "A disk that holds a part of what is to be written, or what was there before."
    found, _, size = reference(job.name)
    base = base_of(job)
    there = sum(p.stat().st_size + 4096 for p in base.rglob('*')) if base else 16_384
    share = rng.random()
    ballast = HOME/'work'/'disk'/'ballast'
    whole = 2*size + there + 200*MB  # a cache is only kept where there is room to spare
    left = int(share*max(4096, size - there))
    def fill():
        with open(ballast, 'wb') as f: os.posix_fallocate(f.fileno(), 0, shutil.disk_usage(ballast.parent).free - left)
    return on_disk(job, whole, f'{left} bytes left for {size - there}', fill, ballast.unlink)


def closed(job, rng):
    "A disk that may not be written."
    return on_disk(job, 200*MB, 'read-only', partial(read_only, HOME/'work'/'disk'), partial(read_only, HOME/'work'/'disk', False))


# ---- several at once -----------------------------------------------------------------------------------------------

def at_once(calls, folder):
    "Children that run side by side; how each ended."
    done = [None]*len(calls)
    def one(i): done[i] = apart(run_there, calls[i], folder)
    # each child has a process of its own that waits for it, and a thread that waits for that one
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(calls))]
    for t in threads: t.start()
    for t in threads: t.join()
    return done


def run_there(call, folder): return run(call, folder, env=cache_of(folder))


def together(count, rng, is_short, only_jobs=None):
    "Several that write the same at once, and one that reads what another one writes."
    for name, n, number in (('train mebqat', 2, count), ('surface', 2, count), ('search', 2, count), ('data cache', 4, count)):
        job, row = next(j for j in jobs() if j.name == name), Row(f'{n} at once: {name}')
        reference(name)
        for _ in range(number): row.add(*side_by_side(job, n))
        yield row
    yield read_while_written('tensors', count*100)
    yield read_while_written('text', count*100)


def side_by_side(job, n):
    "The same command several times at once: each ends well or says why not, and the result is that of one."
    folder = fresh(base_of(job), HOME/'work'/'here')
    plant(folder, ['notes.txt'])
    all_done = at_once([job.call]*n, folder)
    bad = [d for d in all_done if d.code != 0 and not d.refused()]
    if bad: return 'wrong', str(bad[0])
    if all(d.code for d in all_done): return 'wrong', f'nobody finished: {all_done[0]}'
    if damaged(contents(folder)): return 'wrong', damaged(contents(folder))[0]
    words = finished(job, folder, ['notes.txt'])
    return ('wrong', words) if words else ('right', '')


def read_while_written(kind, count):
    "A reader never sees half of one file and half of another."
    row, folder = Row(f'read while written: {kind}'), fresh(None, HOME/'work'/'here')
    file = folder/('f.safetensors' if kind == 'tensors' else 'surface.json')
    write, read = _two_versions(file, kind)
    write(0)
    pid = os.fork()
    if pid == 0:
        i = 0
        while True:
            i += 1
            write(i % 2)
    try:
        for _ in range(count):
            try: row.add(*(('right', '') if read() else ('wrong', 'description and contents of two files')))
            except Exception as e: row.add('wrong', f'{type(e).__name__}: {e}')
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return row


def _two_versions(file, kind):
    "Functions that write one of two contents, and that read whether what is there is one of them."
    from mebqat.bits import Bits
    from mebqat.files import load_whole, save_whole
    from mebqat.surface import Point, Surface
    if kind == 'tensors':
        def write(i): save_whole(file, {'x': torch.full((50_000,), float(i))}, {'i': i, 'more': 'x'*1000*i})
        def read():
            tensors, about = load_whole(file)
            return bool((tensors['x'] == about['i']).all())
        return write, read
    def write(i): Surface({Bits(b, b): Point(.5, .4, .6, 10 + i) for b in range(2, 9)}, str(i)).save(file)
    def read():
        s = Surface.load(file)
        return {p.n for p in s.points.values()} == {10 + int(s.title)}
    return write, read


# ---- mutations -----------------------------------------------------------------------------------------------------

def samples() -> dict:
    "A folder with a file of every kind, by its kind."
    folder = HOME/'samples'
    out = dict(
        model='m/model.safetensors', checkpoint='m/checkpoint.safetensors', exploration='m/exploration.safetensors',
        episodes='p/episodes.safetensors', surface='m/surface.json', front='m/front.json', policy='m/policy.json',
        search='m/search-.json', trajectory='a/trajectory.json', run='m/run.json', split='split.json')
    if not folder.exists():
        fresh(None, folder)
        named = {j.name: j.call for j in jobs()}
        few_surface = ('surface', 'runs/p', '--bits', 'W2A2 FP', '--episodes', 4)
        calls = [*map(named.get, ('train mebqat', 'surface', 'search', 'adaqat', 'train mebqat-pn')), few_surface]
        for call, run_folder in zip(calls, 'mmmapp'):
            done = run(tuple(f'runs/{run_folder}' if a == 'runs/r' else a for a in call), folder, env=cache_of(folder))
            if done.code != 0: raise RuntimeError(f'{call} failed: {done}')
        (folder/'runs/split.json').write_text(json.dumps(dict(train=['circle'], val=['cross'], test=['dot'])))
    found = {}
    for kind, name in out.items():
        stem, _, suffix = name.rpartition('.')
        file = folder/'runs'/name
        if not file.exists():  # answers are kept under their question; the newest is what it is about
            files = sorted((folder/'runs').glob(f'{stem}*.{suffix}'))
            file = files[0] if files else None
        found[kind] = file
    return found


def reading(kind, file):
    "How a kind of file is read by what a user calls."
    from mebqat.pools import read_split
    if kind == 'split': return lambda: plain(read_split(file, ['circle', 'cross', 'dot']))
    if kind == 'run': return partial(claimed, file)
    read = reader_of(file.name)
    return lambda: plain(read(file))


def claimed(file):
    "Is a run folder still that of its run? Read as `train` does it, before it trains."
    from mebqat.runs.run_folder import claim
    from mebqat.runs import open_run
    claim(file.parent, open_run(file.parent).spec)
    return 'claimed'


def mutations(count, rng, is_short, only_jobs=None):
    "Files with something changed: read as they were, or refused in one line, at no more than twice their memory."
    for kind, file in samples().items():
        if file is None:
            yield missing(kind)
            continue
        yield mutated_kind(kind, file, count, rng.random())
    yield mutated_cache(count, rng.random())


def missing(kind):
    row = Row(f'mutated: {kind}')
    row.add('wrong', 'no command wrote such a file')
    return row


def mutated_kind(kind, file, count, seed):
    "One kind of file, changed again and again."
    row, folder = Row(f'mutated: {kind}'), HOME/'work'/'mutated'
    fresh(file.parent, folder)
    target = folder/file.name
    good, wanted = file.read_bytes(), reading(kind, target)()
    if kind == 'split': wanted = None  # a user's own, without checksum: another split that makes sense is one
    def make(rng):
        data, what = mutated_file(file, rng)
        while data == good: data, what = mutated_file(file, rng)
        return (partial(target.write_bytes, data), what), reading(kind, target), wanted
    judge_apart(row, make, count, 2*len(good) + ROOM, seed, file.name)
    return row


def mutated_cache(count, seed):
    "A damaged cache is made again, without a word."
    row, folder = Row('mutated: image cache'), fresh(None, HOME/'work'/'cached')
    os.environ['MEBQAT_CACHE'] = str(folder/'cache')
    from mebqat.data import load
    def read():
        pool = load(str(HOME/'pictures'), 'train')
        return plain((pool.images.clone(), pool.labels.clone(), list(pool.classes)))
    wanted = read()
    keep = fresh(folder/'cache', HOME/'work'/'kept')
    files = [p.relative_to(keep) for p in sorted(keep.rglob('*')) if p.is_file()]
    def make(rng):
        name = rng.choice(files)
        data, what = mutated_file(keep/name, rng)
        def write():
            fresh(keep, folder/'cache')
            (folder/'cache'/name).write_bytes(data)
        return (write, f'{name.suffix} {what}'), read, wanted
    judge_apart(row, make, count, ROOM, seed)
    return row


# ---- images, zips and folders --------------------------------------------------------------------------------------

FORMATS = {'png': {}, 'jpg': {}, 'gif': {}, 'bmp': {}, 'tif': {}, 'webp': {}, 'ppm': {}, 'pgm': {}}


def images(count, rng, is_short, only_jobs=None):
    """Pictures and archives with something changed.

    Pixels may differ, as most formats have no checksum, but nothing crashes, hangs or fills the memory."""
    for suffix in FORMATS: yield mutated_image(suffix, count, rng.random())
    yield mutated_zip(count, rng.random())


def _few(folder, suffix):
    "Two classes of two pictures each."
    for i,name in enumerate('ab'):
        (folder/name).mkdir(parents=True)
        for k in range(3):
            picture = (torch.arange(24*24).reshape(24, 24)*(3 + i + k) % 200).byte().numpy()
            Image.fromarray(picture).convert('L' if suffix == 'pgm' else 'RGB').save(folder/name/f'{k}.{suffix}')
    return folder


def _pixels(folder):
    "Load a folder or zip without a cache, as a list of shapes: what is in it may have changed."
    os.environ['MEBQAT_CACHE'] = '/dev/null/none'
    from mebqat.data import load
    return list(load(str(folder), 'train').images.shape)


def mutated_image(suffix, count, seed):
    "One format of pictures."
    row, folder = Row(f'mutated picture: {suffix}'), _few(fresh(None, HOME/'work'/'pictures'), suffix)
    return _mutate(row, folder/'a'/f'1.{suffix}', folder, count, seed)


def _mutate(row, target, data, count, seed):
    "Damage a file of some data again and again, and load them."
    good = target.read_bytes()
    def make(rng):
        contents, what = mutated(good, rng)
        return (partial(target.write_bytes, contents), what), partial(_pixels, data), None
    judge_apart(row, make, count, ROOM, seed)
    return row


def zipped(file, members, **how):
    "A zip of names and contents."
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_DEFLATED, **how) as z:
        for name, data in members: z.writestr(name, data)
    return file


def mutated_zip(count, seed):
    "An archive of pictures."
    row, folder = Row('mutated zip'), _few(fresh(None, HOME/'work'/'pictures'), 'png')
    files = sorted(folder.rglob('*.png'))
    target = zipped(folder.parent/'pictures.zip', [(p.relative_to(folder).as_posix(), p.read_bytes()) for p in files])
    return _mutate(row, target, target, count, seed)


# ---- hostile pictures, zips and folders ----------------------------------------------------------------------------

def hostile(count, rng, is_short, only_jobs=None):
    "What somebody could put into a data set, by malice or by mistake."
    for what, make, right in HOSTILE:
        row, folder = Row(f'hostile: {what}'), fresh(None, HOME/'work'/'here')
        data = make(folder)
        env = cache_of(folder) | {'PATH': f'{folder/"bin"}{os.pathsep}{os.environ["PATH"]}'}
        done = run(partial(loaded, data), folder, env=env, memory=3000*MB, timeout=25)
        outcome = right(folder, done)
        if done.grown > 500*MB: outcome = 'wrong', f'took {done.grown/MB:.0f} MB'
        if done.code is None: outcome = 'wrong', 'not done in 25 s'
        row.add(*((outcome, '') if isinstance(outcome, str) else outcome))
        yield row


def loaded(data):
    "What the pools of some data hold: images, classes, distinct values, and the warnings on the way; or why not."
    import warnings
    from mebqat.data import load
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('always')
        try: pools = [load(str(data), s) for s in ('train', 'val', 'test')]
        except (ValueError, OSError) as e: return {'refused': str(e)}
    every = torch.cat([p.images.flatten(1) for p in pools])
    return {'images': len(every), 'classes': sorted({c for p in pools for c in p.classes}),
            'values': len(every.unique()), 'distinct': len(every.unique(dim=0)), 'top': int(every.max()),
            'shape': list(pools[0].images.shape[1:]), 'heard': [str(w.message) for w in heard]}


def _answer(done): return json.loads(done.out) if done.code == 0 and done.out.startswith('{') else {}


def refused_only(folder, done):
    "Only a refusal of one short line will do."
    words = _answer(done).get('refused', '')
    return 'refused' if words and '\n' not in words and len(words) < 600 else ('wrong', f'{done.out[:200]!r} {done}')


def either(folder, done):
    "A refusal in words, or the pictures that are sound."
    answer = _answer(done)
    if 'refused' in answer: return refused_only(folder, done)
    return 'right' if answer.get('images', 0) >= 12 else ('wrong', f'{done.out[:200]!r} {done}')


def holds(**wanted):
    "The data must be taken, and hold this; a function says whether a value will do."
    def right(folder, done):
        answer = _answer(done)
        bad = [k for k,v in wanted.items() if k not in answer or not (v(answer[k]) if callable(v) else answer[k] == v)]
        return ('wrong', f'{bad}: {done.out[:300]!r} {done}') if bad else 'right'
    return right


def shown_or_refused(**wanted):
    "As `holds`, but a refusal in words will do as well."
    taken = holds(**wanted)
    return lambda folder, done: (refused_only if 'refused' in _answer(done) else taken)(folder, done)


def told(word, **wanted):
    "As `holds`, with a note that names something."
    return lambda folder, done: holds(heard=lambda texts: any(word in t for t in texts), **wanted)(folder, done)


def outside(folder, done):
    "Nothing may lie outside of the data, and the sound pictures are there or the archive is refused."
    escaped = [str(p) for p in (*folder.rglob('evil*'), *HOME.glob('evil*'), *folder.parent.glob('evil*'))]
    return ('wrong', f'written: {escaped}') if escaped else either(folder, done)


def no_ghostscript(folder, done):
    "No program may have been started."
    return ('wrong', 'gs was started') if (folder/'gs_was_called').exists() else refused_only(folder, done)


def _png(image, **how):
    "A picture as bytes."
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, how.pop('format', 'PNG'), **how)
    return file.getvalue()


def _gray(seed, size=12):
    "Noise, another one for each seed."
    return (torch.rand(size, size, generator=torch.Generator().manual_seed(seed))*255).byte().numpy()


def alike(folder):
    "The same black picture sixteen times."
    return tree(folder, [(f'{c}/{k}.png', _png(_gray(1)*0)) for c in 'ab' for k in range(8)])


def jfif(folder):
    "Two pictures more, with a suffix that some programs write."
    return tree(folder, sound(folder) + [(f'{c}/x.jfif', _png(_gray(7), format='JPEG')) for c in 'ab'])


def sound(folder, per_class=8, classes='ab'):
    "Sound pictures, as names and bytes."
    return [(f'{c}/{k:02d}.png', _png(_gray(100*i + k))) for i,c in enumerate(classes) for k in range(per_class)]


def tree(folder, members):
    "A folder of names and contents."
    for name, data in members:
        (folder/'data'/name).parent.mkdir(parents=True, exist_ok=True)
        (folder/'data'/name).write_bytes(data)
    return folder/'data'


def with_ghostscript(folder, members):
    "A program named gs that leaves a trace, and pictures beside an EPS with the suffix of a picture."
    (folder/'bin').mkdir()
    (folder/'bin'/'gs').write_text(f'#!/bin/sh\ntouch {folder}/gs_was_called\n')
    (folder/'bin'/'gs').chmod(0o755)
    eps = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 12 12\n%%EndComments\nshowpage\n'
    return members + [('a/evil.png', eps)]


def drawn(mode, kind):
    "Pictures of a mode in which the drawing is easily lost."
    def make(folder):
        members = []
        for i,c in enumerate('ab'):
            for k in range(8):
                ink = torch.zeros(12, 12)
                ink[2 + i:8 + i, k:k + 2] = 1
                members.append((f'{c}/{k}.{kind}', _in_mode(ink, mode)))
        return tree(folder, members)
    return make


def _in_mode(ink, mode):
    "A drawing of ones and zeros as a picture file."
    import numpy as np
    if mode == 'alpha': return _png(np.dstack([np.zeros((12, 12, 3), np.uint8), (ink*255).byte().numpy()]))
    if mode == 'float': return _png(Image.fromarray(ink.numpy().astype(np.float32)), format='TIFF')
    if mode == 'int32': return _png(Image.fromarray((ink*200).int().numpy()), format='TIFF')
    if mode == 'int32 wide': return _png(Image.fromarray((ink*900_000).int().numpy()), format='TIFF')
    if mode == '12 bits': return _png(Image.fromarray((ink*4095).numpy().astype(np.uint16)))
    if mode == 'turned':
        exif = Image.Exif()
        exif[0x112] = 6
        return _png(Image.fromarray((ink*255).byte().numpy()).resize((16, 12)), format='JPEG', exif=exif)
    raise ValueError(mode)


def special(folder, name, make):
    "Sound pictures and one thing beside them that is no file, or no file of that kind."
    data = tree(folder, sound(folder))
    make(data/'a'/name)
    return data


def looped(folder):
    "Two links to the folder itself: 2^40 paths."
    data = tree(folder, sound(folder))
    for name in ('up', 'again'): (data/'a'/name).symlink_to(data)
    return data


def bomb(folder):
    "A picture with 400 MB of zeros behind it, packed."
    members = sound(folder)
    with zipfile.ZipFile(folder/'d.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        for name, data in members: z.writestr(name, data)
        with z.open('a/long.png', 'w', force_zip64=True) as f:
            f.write(members[0][1])
            for _ in range(400): f.write(bytes(MB))
    return folder/'d.zip'


def huge_png(side):
    "A picture of a size that its header says only: nearly no bytes behind it."
    def chunk(kind, data):
        return len(data).to_bytes(4, 'big') + kind + data + zlib.crc32(kind + data).to_bytes(4, 'big')
    head = side.to_bytes(4, 'big')*2 + bytes([1, 0, 0, 0, 0])
    rows = zlib.compressobj(9)
    body = b''.join(rows.compress(bytes(1 + side//8 + 1)) for _ in range(min(side, 13_000))) + rows.flush()
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', head) + chunk(b'IDAT', body) + chunk(b'IEND', b'')


def zip_of(*extra): return lambda folder: zipped(folder/'d.zip', sound(folder) + list(extra))


def encrypted(folder):
    "A zip whose entries say that they are encrypted."
    file = zipped(folder/'d.zip', sound(folder))
    data = bytearray(file.read_bytes())
    for mark, at in ((b'PK\x03\x04', 6), (b'PK\x01\x02', 8)):
        i = data.find(mark)
        while i >= 0:
            data[i + at] |= 1
            i = data.find(mark, i + 4)
    file.write_bytes(data)
    return file


def lying(folder):
    "A zip whose entries declare far more than they hold."
    file = zipped(folder/'d.zip', sound(folder))
    data = bytearray(file.read_bytes())
    i = data.find(b'PK\x01\x02')
    data[i + 24:i + 28] = (2**31 - 1).to_bytes(4, 'little')
    file.write_bytes(data)
    return file


def cut_zip(folder):
    file = zipped(folder/'d.zip', sound(folder))
    file.write_bytes(file.read_bytes()[:-200])
    return file


def linked_entry(folder):
    "A zip with an entry that is a symbolic link to /etc/passwd."
    info = zipfile.ZipInfo('a/evil.png')
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(zipped(folder/'d.zip', sound(folder)), 'a') as z: z.writestr(info, '/etc/passwd')
    return folder/'d.zip'


def unicode_classes(folder):
    "One class under two spellings of its accent."
    more = [(f'caf\u00e9/x{k}.png', _png(_gray(900 + k))) for k in range(4)]
    return tree(folder, sound(folder, classes=('tea', 'cafe\u0301')) + more)


def within(folder):
    "A zip that holds nothing but a zip."
    return zipped(folder/'d.zip', [('d.zip', zip_of()(folder).read_bytes())])


RED = _png(_gray(5))
HOSTILE = [
    ('EPS named .png, folder', lambda f: tree(f, with_ghostscript(f, sound(f))), no_ghostscript),
    ('EPS named .png, zip', lambda f: zipped(f/'d.zip', with_ghostscript(f, sound(f))), no_ghostscript),
    ('FIFO named .png', lambda f: special(f, 'x.png', os.mkfifo), either),
    ('link to /dev/zero', lambda f: special(f, 'x.png', lambda p: p.symlink_to('/dev/zero')), either),
    ('link to nothing', lambda f: special(f, 'x.png', lambda p: p.symlink_to('/nowhere')), either),
    ('folder named .png', lambda f: special(f, 'x.png', lambda p: p.mkdir()), either),
    ('loops of links', looped, either),
    ('one link to its own folder', lambda f: special(f, 'up', lambda p: p.symlink_to(p.parent.parent)), either),
    ('HTML named .jpg', lambda f: tree(f, sound(f) + [('a/x.jpg', b'<html>no picture</html>')]), refused_only),
    ('empty file named .png', lambda f: tree(f, sound(f) + [('a/x.png', b'')]), refused_only),
    ('zeros behind a picture', bomb, either),
    ('picture of 13,000 x 13,000', zip_of(('a/big.png', huge_png(13_000))), refused_only),
    ('picture of 60,000 x 60,000', zip_of(('a/big.png', huge_png(60_000))), refused_only),
    ('zip: ../', zip_of(('../evil.png', RED)), outside),
    ('zip: absolute', lambda f: zip_of((str(HOME/'evil.png'), RED))(f), outside),
    ('zip: backslashes', lambda f: zipped(f/'d.zip', [(n.replace('/', '\\'), d) for n,d in sound(f)]), either),
    ('zip: link', linked_entry, outside),
    ('zip: encrypted', encrypted, refused_only),
    ('zip: cut', cut_zip, refused_only),
    ('zip: declares too much', lying, either),
    ('zip: within a zip', within, refused_only),
    ('zip: empty', lambda f: zipped(f/'d.zip', []), refused_only),
    ('zip: a name twice', zip_of(('a/00.png', RED)), either),
    ('drawing in the alpha channel', drawn('alpha', 'png'), shown_or_refused(values=lambda v: v > 1, distinct=16)),
    ('float TIFF, 0 to 1', drawn('float', 'tif'), shown_or_refused(values=lambda v: v > 1, top=255)),
    ('32-bit TIFF, 0 to 200', drawn('int32', 'tif'), shown_or_refused(values=lambda v: v > 1, top=lambda v: v > 150)),
    ('32-bit TIFF, to 900,000', drawn('int32 wide', 'tif'), shown_or_refused(values=2)),
    ('12 bits in a 16-bit PNG', drawn('12 bits', 'png'), shown_or_refused(top=lambda v: v > 200)),
    ('JPEG turned by EXIF', drawn('turned', 'jpg'), holds(shape=lambda s: s[-2:] == [16, 12])),
    ('.jfif is a picture', jfif, holds(images=18)),
    ('.heic beside pictures', lambda f: tree(f, sound(f) + [('a/x.heic', b'x'*99)]), told('heic', images=16)),
    ('accents in two spellings', unicode_classes, holds(classes=lambda c: len(c) == 2)),
    ('one picture for all', alike, shown_or_refused(heard=lambda texts: texts != [])),
]


# ---- the whole -----------------------------------------------------------------------------------------------------

# What there is, with how often it is tried in the long form and in the short one.
SECTIONS = {'kills': (kills, 200, 10), 'disk': (disk, 200, 6), 'together': (together, 8, 1),
            'mutations': (mutations, 1000, 25), 'images': (images, 1000, 25), 'hostile': (hostile, 1, 1)}
# Imported once, for every child that is forked.
MODULES = ('mebqat.cli', 'mebqat.demo', 'mebqat.figures.pages', 'mebqat.mixed.searches', 'mebqat.runs.search',
           'mebqat.runs.surfaces', 'torch._dynamo')


def main():
    global HOME
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs='*', choices=SECTIONS, default=[*SECTIONS], help='sections; all by default')
    parser.add_argument('--jobs', nargs='*', help='commands for kills and disk, such as "train mebqat"; all by default')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--short', action='store_true', help='the form that the tests use')
    for name, (_, most, few) in SECTIONS.items():
        parser.add_argument(f'--{name}', type=int, help=f'how many (default: {most}, short {few})')
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix='mebqat-campaign-') as folder:
        HOME = Path(folder).resolve()
        pictures(HOME/'pictures')
        (HOME/'work').mkdir()
        for name in MODULES: importlib.import_module(name)
        rows = []
        for name in options.only:
            section, most, few = SECTIONS[name]
            count, begun = getattr(options, name) or (few if options.short else most), time.monotonic()
            for row in section(count, random.Random(f'{options.seed} {name}'), options.short, options.jobs):
                seconds = f'{time.monotonic() - begun:.0f} s'
                print(f'{name}: {row.what}: {row.counts["wrong"]} of {row.tried} wrong, {seconds}', file=sys.stderr)
                rows.append(row)
        sys.exit(not print_table(rows))


if __name__ == '__main__': main()
