"What the campaign rests on: commands in children that can be killed or hindered, what a folder holds, and the table."
import ctypes, json, mmap, os, pickle, random, re, resource, shutil, signal, sys, time, traceback
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path

import torch

# ---- the table -----------------------------------------------------------------------------------------------------

OUTCOMES = 'right', 'refused', 'wrong'


@dataclass
class Row:
    "One line of the table: what was tried, and how it ended."
    what: str
    counts: dict = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    notes: list = field(default_factory=list)  # what was wrong, in words

    def add(self, outcome, note=''):
        "Count one try; `note` says what was wrong."
        self.counts[outcome] += 1
        if outcome == 'wrong': self.notes.append(note)

    @property
    def tried(self): return sum(self.counts.values())


def print_table(rows, examples=3):
    "Every row with its four counts, and the first few of what was wrong; whether nothing was."
    width = max(len(r.what) for r in rows)
    print(f'{"":{width}}  {"tried":>6} {"right":>6} {"refused in words":>17} {"wrong":>6}')
    total = {k: sum(r.counts[k] for r in rows) for k in OUTCOMES}
    for what, tried, n in (*((r.what, r.tried, r.counts) for r in rows), ('in all', sum(total.values()), total)):
        print(f'{what:{width}}  {tried:6} {n["right"]:6} {n["refused"]:17} {n["wrong"]:6}')
    for r in rows:
        for note in r.notes[:examples]: print(f'\nwrong, {r.what}: {note}')
        if len(r.notes) > examples: print(f'... and {len(r.notes) - examples} more')
    return total['wrong'] == 0


# ---- a command in a child ------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Done:
    "How a child ended."
    code: int | None  # Exit code, minus the signal that ended it, or None where it had to be ended after its time
    out: str          # What it printed
    err: str          # What it printed on stderr
    events: int       # Changes to its folder that it began: files opened for writing, renamed, removed, flushed
    seconds: float    # How long it took
    grown: int        # Bytes of memory that it took at most, beyond those of this process

    @property
    def lines(self): return [line for line in self.err.splitlines() if 'mebqat: ' in line]

    def refused(self):
        "Did it end with exit code 2 and one line of its own words?"
        return self.code == 2 and len(self.lines) == 1 and not self.crashed()

    def crashed(self): return 'Traceback' in self.err or 'unexpected' in self.err

    def __str__(self): return f'exit code {self.code}, {self.err.strip()[-300:]!r}'


_CHANGES = {'os.rename', 'os.remove', 'os.mkdir', 'os.rmdir', 'os.link', 'os.symlink', 'os.truncate'}


class Hook:
    "Counts the changes to a folder from inside a child, and acts at one of them."
    def __init__(self, folder, shared, at=None, act=None, lasting=False):
        self.folder, self.shared, self.at, self.act, self.lasting = f'{folder}{os.sep}', shared, at, act, lasting
        self.count = 0

    def install(self):
        "Listen to Python's own audit events, and to what flushes a file."
        sys.addaudithook(self)
        for name in ('fsync', 'fdatasync'):
            if not hasattr(os, name): continue
            def flush(fd, real=getattr(os, name)):
                self.change('fsync')
                return real(fd)
            setattr(os, name, flush)

    def __call__(self, event, args):
        if event == 'open':
            path, _, flags = args
            if not isinstance(flags, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        elif event in _CHANGES: path = args[0]
        else: return
        if isinstance(path, bytes): path = os.fsdecode(path)
        if isinstance(path, (str, Path)) and os.path.abspath(path).startswith(self.folder): self.change(event)

    def change(self, event):
        "One more change is about to happen."
        self.count += 1
        self.shared[:8] = self.count.to_bytes(8, 'little')
        if self.act and (self.count == self.at or self.lasting and self.count > self.at): self.act(event)


def kill_self(number): return lambda event: os.kill(os.getpid(), number)


def fail(code):
    "An error of the system at a change; taking files away still works, as on a full disk."
    def act(event):
        if event not in ('os.remove', 'os.rmdir'): raise OSError(code, os.strerror(code))
    return act


def virtual() -> int: return int(Path('/proc/self/statm').read_text().split()[0])*mmap.PAGESIZE


def resident() -> int: return int(Path('/proc/self/statm').read_text().split()[1])*mmap.PAGESIZE


def run(call, folder, *, hook=None, delay=None, number=None, env=None, memory=None, timeout=120) -> Done:
    "Run a command line (a tuple), or a function, in a child in a folder; `number` is a signal, after `delay` seconds."
    shared = mmap.mmap(-1, 16)
    out, err = os.memfd_create('out'), os.memfd_create('err')
    begun, pid = time.monotonic(), os.fork()
    if pid == 0: _child(call, folder, hook, shared, out, err, env or {}, memory)
    code, usage = _wait(pid, begun, delay, number, timeout)
    text = [_read(fd) for fd in (out, err)]
    events, before = (int.from_bytes(shared[i:i + 8], 'little') for i in (0, 8))
    return Done(code, *text, events, time.monotonic() - begun, usage.ru_maxrss*1024 - before)


def _read(fd):
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, 'rb') as f: return f.read().decode(errors='replace')


def _wait(pid, begun, delay, number, timeout):
    "Wait for a child, with a signal on the way; None as its code where it had to be killed."
    sent, late = delay is None, False
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done: break
        now = time.monotonic() - begun
        if not sent and now >= delay:
            os.kill(pid, number)
            sent = True
        if now > timeout and not late:
            os.kill(pid, signal.SIGKILL)
            late = True
        time.sleep(.002)
    return (None if late else os.waitstatus_to_exitcode(status)), usage


def _child(call, folder, hook, shared, out, err, env, memory):
    "The child: as a fresh process would be, but for the imports; never returns."
    code = 70
    try:
        for n in (signal.SIGTERM, signal.SIGHUP): signal.signal(n, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, to in ((os.open(os.devnull, os.O_RDONLY), 0), (out, 1), (err, 2)): os.dup2(fd, to)
        sys.stdout, sys.stderr = open(1, 'w', closefd=False), open(2, 'w', closefd=False)
        os.chdir(folder)
        os.environ.update(env)
        if memory: resource.setrlimit(resource.RLIMIT_AS, (virtual() + memory, virtual() + memory))
        shared[8:16] = resident().to_bytes(8, 'little')
        if hook is not None: Hook(folder, shared, **hook).install()
        code = _call(call)
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        traceback.print_exc()
    finally: os._exit(code)


def _call(call) -> int:
    "What the interpreter makes of a command, or of a function: an exit code."
    from mebqat.cli import main
    try:
        if callable(call):
            result = call()
            if result is not None: print(json.dumps(result))
            return 0
        sys.argv = ['mebqat', *map(str, call)]
        main()
        return 0
    except SystemExit as e: return e.code if isinstance(e.code, int) else int(e.code is not None)
    except KeyboardInterrupt:
        if not callable(call): traceback.print_exc()
        return 130
    except BaseException:
        traceback.print_exc()
        return 1


def apart(function, *args):
    "A function in a child of its own, its result returned: for what must not touch this process, such as a mount."
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(read)
            with open(write, 'wb') as f: pickle.dump(function(*args), f)
        except BaseException: traceback.print_exc()
        finally: os._exit(0)
    os.close(write)
    with open(read, 'rb') as f: data = f.read()
    os.waitpid(pid, 0)
    if not data: raise RuntimeError(f'{function.__name__} ended without a result')
    return pickle.loads(data)


# ---- small disks ---------------------------------------------------------------------------------------------------

def private_mounts() -> bool:
    "Give this process mounts that nobody else sees; False where it may not."
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.unshare(0x20000) == 0 and libc.mount(b'none', b'/', None, 0x4000 | 0x40000, None) == 0


@contextmanager
def small_disk(folder, size):
    "A disk of `size` bytes at a folder, as long as the block runs."
    _mount(folder, 0, f'size={size}')
    try: yield
    finally: ctypes.CDLL(None).umount2(str(folder).encode(), 2)


def read_only(folder, is_so=True):
    "Let nothing be written to a small disk, or let it again."
    _mount(folder, 0x20 | is_so, None)


def _mount(folder, flags, options):
    "Mount memory as a disk (OSError)."
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b'none', str(folder).encode(), b'tmpfs', flags, options and options.encode()):
        raise OSError(ctypes.get_errno(), f'mount at {folder}')


# ---- what a folder holds -------------------------------------------------------------------------------------------

# Files and folders on their way to their place.
LITTER = re.compile(r'\.(part|tmp|answer|link)(/|$)')
ANSWER = re.compile(r'((?:surfaces|searches)/[^/]+)\.\d+(?=/)')  # an answer given again lies beside the one before
# What differs between two runs that did the same: times, who wrote it when, and checksums over those.
CHANGING = {'seconds', 'created', 'written', 'date', 'time', 'host', 'pid', 'mtime',
            'checksum', 'digest', 'crc', 'crc32', 'sha256'}


def plain(x, depth=0):
    "Any result as nested tuples and texts that can be compared, without what changes from run to run."
    if depth > 12: return '...'
    if isinstance(x, torch.Tensor):
        flat = x.detach().cpu().contiguous().reshape(-1)
        return str(x.dtype), tuple(x.shape), flat.view(torch.uint8).numpy().tobytes() if x.numel() else b''
    if isinstance(x, Mapping):
        return tuple(sorted((str(k), plain(v, depth + 1)) for k,v in x.items() if str(k) not in CHANGING))
    if isinstance(x, (list, tuple)): return tuple(plain(v, depth + 1) for v in x)
    if isinstance(x, (set, frozenset)): return tuple(sorted(map(repr, x)))
    if x is None or isinstance(x, (bool, int, float, str, bytes)): return repr(x)
    if isinstance(x, Path): return x.name
    if callable(getattr(x, 'state_dict', None)): return plain(dict(x.state_dict()), depth + 1)
    if hasattr(x, 'to_json') and hasattr(x, 'columns'): return x.to_json()
    if callable(getattr(x, 'to_dict', None)) and is_dataclass(x): return plain(x.to_dict(), depth + 1)
    if hasattr(x, '__dict__'): return type(x).__name__, plain(vars(x), depth + 1)
    return type(x).__name__, repr(x)


def reader_of(name) -> Callable | None:
    "How the package itself reads a file of a name that it writes; None for what it only writes."
    from mebqat.figures.predictions import load_explorations
    from mebqat.files import load_whole
    from mebqat.fewshot.evaluate import EpisodeScores
    from mebqat.mixed.front import Front
    from mebqat.mixed.ledger import SearchResult
    from mebqat.runs import open_run
    from mebqat.runs.policies import load_policy
    from mebqat.runs.search import trajectory
    from mebqat.surface import Surface
    def any_json(path): return json.loads(Path(path).read_text(encoding='utf-8'))
    readers = {r'model\.safetensors': open_run, r'checkpoint\.safetensors': load_whole,
               r'exploration.*\.safetensors': load_explorations, r'episodes.*\.safetensors': EpisodeScores.load,
               r'surface.*\.json': Surface.load, r'front.*\.json': Front.load, r'policy.*\.json': load_policy,
               r'search-.*\.json': SearchResult.load, r'trajectory\.json': trajectory, r'.*\.json': any_json}
    return next((read for pattern, read in readers.items() if re.fullmatch(pattern, name)), None)


def contents(folder) -> dict:
    "Every file of a folder below its name, as its reader understands it; ('damaged', why) where it does not."
    found = {}
    for file in sorted(Path(folder).rglob('*')):
        path = file.relative_to(folder).as_posix()
        name, is_ours = ANSWER.sub(r'\1', path), file.is_file() and not LITTER.search(path) and file.name[0] != '.'
        if not is_ours or is_damaged(found.get(name)): continue
        try: found[name] = _content(file)
        except Exception as e: found[name] = 'damaged', f'{type(e).__name__}: {e}'
    return found


def _content(file):
    read = reader_of(file.name)
    if read: return plain(read(file))
    data = file.read_bytes()
    if file.suffix == '.html': return 'page' if data.rstrip().endswith(b'</html>') else ('damaged', 'cut short')
    if file.suffix == '.safetensors':  # the cache's own
        from safetensors import safe_open
        with safe_open(file, 'pt') as f: return plain({k: f.get_tensor(k) for k in f.keys()})
    return data


def is_damaged(content): return isinstance(content, tuple) and content[:1] == ('damaged',)


def damaged(found) -> list[str]: return [f'{name}: {c[1]}' for name,c in found.items() if is_damaged(c)]


def litter(folder) -> list[str]:
    "What killed writers left."
    return sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob('*') if LITTER.search(p.name))


def differing(found, wanted) -> str:
    "How what was found is not what it should be, in words; '' where it is."
    names = {'missing': wanted.keys() - found.keys(), 'too many': found.keys() - wanted.keys(),
             'other': {n for n in found.keys() & wanted.keys() if found[n] != wanted[n]}}
    return ', '.join(f'{what}: {" ".join(sorted(some)[:3])}' for what, some in names.items() if some)


FOREIGN = {'notes.txt': 'a thesis\n', 'runs/float/my_thesis.txt': 'another one\n', 'runs/mine.json': '{"mine": 1}\n'}


def plant(folder, names=FOREIGN):
    "Put files of somebody else around."
    for name in names:
        (Path(folder)/name).parent.mkdir(parents=True, exist_ok=True)
        (Path(folder)/name).write_text(FOREIGN.get(name, f'{name} of somebody\n'), encoding='utf-8')


def touched(folder, names=FOREIGN) -> list[str]:
    "Which of them are no longer as they were."
    def is_whole(name):
        file = Path(folder)/name
        return file.is_file() and file.read_text(encoding='utf-8') == FOREIGN.get(name, f'{name} of somebody\n')
    return [n for n in names if not is_whole(n)]


def fresh(base, folder):
    "A folder as another one was, and nothing else in it."
    shutil.rmtree(folder, ignore_errors=True)
    if base is None: Path(folder).mkdir(parents=True)
    else: shutil.copytree(base, folder, symlinks=True)
    return Path(folder)


# ---- mutations -----------------------------------------------------------------------------------------------------

JUNK = (None, True, -1, 0, 2**70, 1e308, float('nan'), float('inf'), '', 'x', 'W2A2', '\u0000', 'ä'*500,
        [], {}, [[]], {'a': 1}, [1, 'a'])


def mutated(data:bytes, rng:random.Random) -> tuple[bytes, str]:
    "A file with something changed, and what was."
    data, n = bytearray(data), len(data)
    kind, i = rng.choice(('bit', 'byte', 'cut', 'insert', 'delete', 'repeat', 'zeros')), rng.randrange(max(n, 1))
    length = rng.choice((1, 2, 7, 64, 512))
    if kind == 'bit': data[i] ^= 1 << rng.randrange(8)
    elif kind == 'byte': data[i] = rng.randrange(256)
    elif kind == 'cut': del data[i:]
    elif kind == 'insert': data[i:i] = rng.randbytes(length)
    elif kind == 'delete': del data[i:i + length]
    elif kind == 'repeat': data[i:i] = data[i:i + length]
    else: data[i:i + length] = bytes(len(data[i:i + length]))
    return bytes(data), f'{kind} at {i} of {n}'


def mutated_json(text:str, rng:random.Random) -> tuple[str, str]:
    "A document with one value of another type, or a deep one."
    document = json.loads(text)
    places = [(box, key) for box in _boxes(document) for key in (box if isinstance(box, dict) else range(len(box)))]
    box, key = rng.choice(places)
    what = rng.choice(('junk', 'junk', 'junk', 'away', 'deep', 'other'))
    if what == 'away': del box[key]
    elif what == 'other':
        other, at = rng.choice(places)
        box[key] = other[at]
    else: box[key] = rng.choice(JUNK) if what == 'junk' else 'DEEP'
    try: text = json.dumps(document)
    except (ValueError, RecursionError): text = '{}'
    return text.replace('"DEEP"', '['*100_000 + ']'*100_000), f'{what} at {key!r}'


def _boxes(document):
    "Every list and record of a document."
    ahead = [document]
    while ahead:
        box = ahead.pop()
        if not isinstance(box, (dict, list)): continue
        if box: yield box
        ahead += box.values() if isinstance(box, dict) else box


def mutated_file(file, rng) -> tuple[bytes, str]:
    "A change of bytes, or of what a JSON text or the header of a safetensors file says."
    data = Path(file).read_bytes()
    if rng.random() < .5: return mutated(data, rng)
    if Path(file).suffix == '.json':
        text, what = mutated_json(data.decode(), rng)
        return text.encode(), what
    if Path(file).suffix != '.safetensors': return mutated(data, rng)
    size = int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:8 + size])
    about = header.get('__metadata__', {})
    key = rng.choice(sorted(about)) if about else None
    if key and about[key][:1] in '{[' and rng.random() < .7: about[key], what = mutated_json(about[key], rng)
    else:
        text, what = mutated_json(json.dumps(header), rng)
        header = None
    new = (text if header is None else json.dumps(header)).encode()
    return len(new).to_bytes(8, 'little') + new + data[8 + size:], f'header, {what}'


class Late(BaseException):
    "Something took too long."


def judged(step, read, wanted, name='', seconds=20) -> tuple[str, str]:
    "Change a file and read it: its outcome, and what was wrong. A refusal is one line with a name; None takes anything."
    write, note = step
    def late(number, frame): raise Late
    signal.signal(signal.SIGALRM, late)
    write()
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        found = read()
        return ('right', '') if wanted is None or found == wanted else ('wrong', f'{note}: accepted, changed')
    except (ValueError, OSError) as e:
        text = str(e)
        in_words = text.strip() and '\n' not in text and len(text) < 1000 and name in text
        if in_words: return 'refused', ''
        return 'wrong', f'{note}: {type(e).__name__}, not in one line that names {name}: {text[:200]!r}'
    except Late: return 'wrong', f'{note}: not done in {seconds} s'
    except Exception as e: return 'wrong', f'{note}: {type(e).__name__}: {str(e)[:200]}'
    finally: signal.setitimer(signal.ITIMER_REAL, 0)


def judge_apart(row, make, count, memory, seed, name=''):
    """Judge `count` mutations in a child: `make(rng)` gives (write, note), the reader and what it should give.

    A child that dies is one wrong outcome, and another one goes on behind it."""
    done = 0
    while done < count:
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0: _judge_child(write, make, done, count, memory, seed, name)
        os.close(write)
        with open(read, 'rb') as f:
            try:
                while True:
                    outcome, note = pickle.load(f)
                    row.add(outcome, note)
                    done += 1
            except (EOFError, pickle.UnpicklingError): pass
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if done < count and code != 1:
            row.add('wrong', f'mutation {done} (seed {seed}) ended the process, exit code {code}')
            done += 1


def _judge_child(write, make, first, count, memory, seed, name):
    "The rest of some mutations, told to the parent one by one; ended from outside where Python does not answer."
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2): os.dup2(null, fd)
        import warnings
        warnings.simplefilter('ignore')
        limit = virtual() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        with open(write, 'wb', buffering=0) as f:
            for i in range(first, count):
                step, read, wanted = make(random.Random(f'{seed} {i}'))
                most = int(time.process_time()) + 60  # for a hang inside C, which no signal handler ends
                resource.setrlimit(resource.RLIMIT_CPU, (most, resource.RLIM_INFINITY))
                pickle.dump(judged(step, read, wanted, name), f)
        os._exit(0)
    except BaseException:
        note = traceback.format_exc()[-500:]
        with open(write, 'wb', buffering=0, closefd=False) as f: pickle.dump(('wrong', note), f)
        os._exit(1)
