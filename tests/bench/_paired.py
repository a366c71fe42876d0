"Paired timing: the candidates take turns, so a machine that changes speed changes all of them alike."
import statistics
import time


def paired(candidates, rounds=10, warmup=2):
    "Median seconds of each candidate, and the median of its ratio to the first, round by round."
    times = {name: [] for name in candidates}
    for i in range(warmup + rounds):
        for name,run in candidates.items():
            start = time.perf_counter()
            run()
            if i >= warmup: times[name].append(time.perf_counter() - start)
    base = times[next(iter(times))]
    return {name: {'median_ms': round(1e3*statistics.median(t), 3), 'min_ms': round(1e3*min(t), 3),
                   'ratio': round(statistics.median(a/b for a,b in zip(t, base)), 3)} for name,t in times.items()}


def report(title, results, note):
    "Print one block of results."
    print(f'\n{title}\n  {note}')
    for name,r in results.items(): print(f'  {name:28} median {r["median_ms"]:10.2f} ms   min {r["min_ms"]:10.2f} ms   ratio {r["ratio"]:6.2f}')
