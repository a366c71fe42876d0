"""A matrix of few-shot runs: every run trained, measured on the same episodes and collected into one results file.

A script names its runs (the first one is the float start, from whose weights the others may go on), where each is measured,
which runs are compared, and says what was done. Stopped runs are continued, finished ones kept.
"""
import argparse
import json
import time
from pathlib import Path

import torch

import mebqat
from mebqat.fewshot.evaluate import EpisodeScores
from mebqat.runs import open_run, train_run


class Matrix:
    "Runs by name with what is asked of them; a script says the rest."
    data = n_way = None      # Name of the data; ways of a test episode
    extra = ()               # Runs made from others: `make(name)` gives them
    compared = ()            # (ours, prefixes of the runs it is compared with)
    def __init__(self, a):
        self.a = a
        self.specs = dict(self.runs())

    def runs(self): raise NotImplementedError
    def pairs(self, name): raise NotImplementedError
    def make(self, name): raise NotImplementedError
    def about(self): raise NotImplementedError

    def spec(self, name): return self.specs[name if name in self.specs else self.extra[name]]  # a run's own, or its maker's

    def train(self, name):
        "Train, continue or keep a run."
        if name not in self.specs: return self.make(name)
        out = self.a.out/name
        if (out/'model.safetensors').exists(): return open_run(out)
        start = time.time()
        run = train_run(self.specs[name], out, resume=True, device=self.a.device, on_row=lambda h: print(name, {k: round(v, 4) for k,v in h.rows[-1].items()}, flush=True))
        print(f'{name}: {time.time() - start:.0f} s', flush=True)
        return run

    def measure(self, name):
        "Per-episode test accuracies, 1 and 5 shots for prototypes, measured once."
        files = {shot: self.a.out/name/f'{shot}-shot.safetensors' for shot in (1, 5)}
        if self.spec(name).options.inner_loop: del files[5]
        if all(f.exists() for f in files.values()): return
        run = self.train(name)
        for shot, file in files.items():
            if file.exists(): continue
            start = time.time()
            scores = run.sweep(self.pairs(name), run.episodes(n_way=self.n_way, k_shot=shot), self.a.episodes)
            file.parent.mkdir(parents=True, exist_ok=True)
            scores.save(file)
            print(f'{name}, {shot}-shot: {time.time() - start:.0f} s', {str(b): round(100*p.accuracy, 2) for b,p in scores.surface().points.items()}, flush=True)

    def collect(self):
        "All results with their protocol in one file."
        rows, paired, kept = [], [], {}
        for name in (*self.specs, *self.extra):
            for shot in (1, 5):
                if not (file := self.a.out/name/f'{shot}-shot.safetensors').exists(): continue
                kept[name, shot] = s = EpisodeScores.load(file)
                rows.append({'name': name, 'k_shot': shot, **self.effort(name), 'points': self.points(s), 'protocol': s.meta})
        for ours, others in self.compared:
            for (name, shot), s in kept.items():
                if name != ours and name.startswith(others) and (ours, shot) in kept and s.accuracy.keys() & kept[ours, shot].accuracy.keys():
                    paired += [{'ours': ours, 'other': name, 'k_shot': shot, **row} for row in kept[ours, shot].minus(s).reset_index().to_dict('records')]
        done = [n for n in (*self.specs, *self.extra) if any(n == k for k,_ in kept)]
        only = [] if len(done) == len(self.specs) + len(self.extra) else ['--only', *(n for n in done if n != next(iter(self.specs)))]
        about = {**self.about(), 'interval': 'normal 95 % over episodes (not over seeds)', 'seed': self.a.seed, 'mebqat': mebqat.__version__, 'torch': torch.__version__}
        about |= {'command': ' '.join([about['command'], *only]), 'runs': done}
        part = self.a.results.with_suffix('.part')
        part.write_text(json.dumps({'format': 'mebqat-results', 'version': 1, 'about': about, 'runs': rows, 'paired': paired}, indent=1) + '\n')
        part.replace(self.a.results)
        print(f'wrote {self.a.results}: {len(rows)} measurements')

    def effort(self, name):
        "What a run's training took."
        options, training = self.spec(name).options, self.spec(name).training
        passes = options.inner_steps + 1 if options.inner_loop else 1
        return {'method': options.name, 'training steps': training.steps, 'tasks a step': training.n_tasks, 'backward passes': training.steps*training.n_tasks*passes}

    def points(self, scores):
        return [{'bits': str(b), 'accuracy': p.accuracy, 'low': p.low, 'high': p.high, 'bytes': p.bytes, 'bitops': p.bitops} for b,p in scores.surface().points.items()]

    def main(self):
        "The start first, then what was asked for."
        mebqat.tune_cpu()
        if self.a.threads: torch.set_num_threads(self.a.threads)
        if self.a.collect: return self.collect()
        names = [*self.specs, *self.extra]
        if unknown := set(self.a.only or ()) - set(names): raise SystemExit(f'no run {", ".join(sorted(unknown))}; there are {", ".join(names)}')
        for name in names:
            if name == names[0] or self.a.only is None or name in self.a.only: self.measure(name)
        if self.a.only is None: self.collect()


def arguments(about, results):
    "Options that every matrix has."
    p = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder of the runs')
    p.add_argument('--episodes', type=int, default=600, help='test episodes')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--threads', type=int, default=0)
    p.add_argument('--device', default='cpu')
    p.add_argument('--only', nargs='+', help='train and measure just these runs')
    p.add_argument('--collect', action='store_true', help='only write the results file')
    p.add_argument('--results', type=Path, default=Path(results))
    return p
