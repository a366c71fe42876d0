"The training monitor without a browser: what it shows is what happened, its button saves, and nothing it does costs a training."
import threading

import pytest
import torch

from mebqat.files import load_whole
from mebqat.explore.monitor import STEP_LOSS, TrainingMonitor, Trail
from mebqat.runs import spec_of, train_run
from mebqat.train import Interrupted

SPECS = {'ordinary': spec_of('mebqat', width=4, epochs=3, batch_size=256, bits='W2A2 W8A8 FP'),
         'few-shot': spec_of('mebqat-pn', glyph_classes=40, width=8, n_way=5, n_query=3, steps=12)}


def weights(folder): return load_whole(folder/'model.safetensors')[0]


def presses(monitor, step):
    "The monitor, with its button pressed once when `step` is done."
    hear = monitor.on_step
    def on_step(n, steps, loss):
        hear(n, steps, loss)
        if n == step: monitor.button.click()
    monitor.on_step = on_step
    return monitor


@pytest.mark.parametrize('kind', SPECS)
@pytest.mark.parametrize('background', [False, True])
def test_the_button_saves_and_the_run_resumes_to_the_same_bits(tmp_path, kind, background):
    spec = SPECS[kind]
    train_run(spec, tmp_path/'whole')
    monitor = presses(TrainingMonitor(seconds=0), 5)
    with pytest.raises(Interrupted, match='stopped after step 5 of 12'):
        if background:
            monitor.run(lambda on_row, stop: train_run(spec, tmp_path/'run', on_row=on_row, stop=stop))
            monitor.wait(120)
        else: train_run(spec, tmp_path/'run', on_row=monitor)
    assert (monitor.value, monitor.button.disabled) == ('stopped', True) and 'go on with resume' in monitor.message
    assert load_whole(tmp_path/'run'/'checkpoint.safetensors')[1]['step'] == 5 and not (tmp_path/'run'/'model.safetensors').exists()
    again = TrainingMonitor(seconds=0)
    again.run(lambda on_row, stop: train_run(spec, tmp_path/'run', resume=True, on_row=on_row, stop=stop))
    run = again.wait(120)
    assert again.value == 'done' and again.message == '' and [s for s, _ in again.trail.pairs] == list(range(6, 13))
    one, two = weights(tmp_path/'whole'), weights(tmp_path/'run')
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    shown = {t.name: (list(t.x), list(t.y)) for t in again.figure.data}
    assert shown['loss'] == ([r['step'] for r in run.history.rows], [r['loss'] for r in run.history.rows])
    assert shown[STEP_LOSS][0] == list(range(6, 13)) and {k for k in run.history.rows[0] if k.startswith('val ')} <= shown.keys()


def test_watching_changes_nothing(tmp_path):
    spec = SPECS['ordinary']
    train_run(spec, tmp_path/'alone')
    train_run(spec, tmp_path/'watched', on_row=TrainingMonitor(seconds=0))
    one, two = weights(tmp_path/'alone'), weights(tmp_path/'watched')
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize('error, said', [(ValueError('7 is odd'), '7 is odd'), (RuntimeError('no memory'), 'RuntimeError: no memory')])
def test_a_failure_stands_in_the_panel_and_the_thread_ends(error, said):
    monitor = TrainingMonitor()
    def train(on_row, stop): raise error
    monitor.run(train)
    with pytest.raises(type(error), match=str(error)): monitor.wait(60)
    assert (monitor.value, monitor.message, monitor.button.disabled) == ('failed', said, True)
    assert not [t for t in threading.enumerate() if t.name == 'mebqat-training']
    monitor.run(lambda on_row, stop: 5)
    assert monitor.wait(60) == 5 and (monitor.value, monitor.message) == ('done', '')


def test_a_refused_training_says_so_in_the_panel(tmp_path):
    monitor = TrainingMonitor()
    monitor.run(lambda on_row, stop: train_run(spec_of('mebqat', data='nowhere.zip'), tmp_path/'run', on_row=on_row, stop=stop))
    with pytest.raises((ValueError, OSError)): monitor.wait(60)
    assert monitor.value == 'failed' and 'nowhere.zip' in monitor.message and not (tmp_path/'run').exists()


def test_one_training_at_a_time():
    monitor, go = TrainingMonitor(), threading.Event()
    monitor.run(lambda on_row, stop: go.wait(60))
    with pytest.raises(ValueError, match='under way'): monitor.run(lambda on_row, stop: None)
    with pytest.raises(TimeoutError, match='still under way'): monitor.wait(.01)
    go.set()
    assert monitor.wait(60) is True


def test_a_figure_that_fails_costs_no_training(tmp_path, monkeypatch):
    def broken(self): raise KeyError('no such trace')
    monkeypatch.setattr(TrainingMonitor, 'draw', broken)
    monitor = TrainingMonitor(seconds=0)
    spec = SPECS['ordinary']
    train_run(spec, tmp_path/'run', on_row=monitor)
    assert monitor.value == 'done' and 'KeyError' in monitor.message and (tmp_path/'run'/'model.safetensors').exists()


def test_a_waiting_cell_is_told_how_to_stop():
    monitor, seen = TrainingMonitor(seconds=0), []
    with monitor.watching():
        monitor.on_step(1, 10, .5)
        seen.append(monitor.status.value)
    monitor.run(lambda on_row, stop: on_row.on_step(2, 10, .4) or seen.append(monitor.status.value))
    monitor.wait(60)
    assert ['interrupt the kernel' in s for s in seen] == [True, False]


@pytest.mark.parametrize('steps, most', [(10, 4), (4000, 100), (12_345, 2000)])
def test_a_trail_spans_everything(steps, most):
    trail = Trail(most)
    for i in range(1, steps + 1): trail.add(i, i/2)
    kept = [s for s, _ in trail.pairs]
    assert most/2 - 1 <= len(kept) <= most and kept[0] == trail.every and steps - kept[-1] < trail.every
    assert all(v == s/2 for s, v in trail.pairs) and kept == list(range(trail.every, steps + 1, trail.every))
