"""What a run survives: bad numbers, storage that fails, signals, companions that die."""

import json
import math
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import toy

from pisces_jax.training import checkpoints, loop
from pisces_jax.training.health import read_events
from pisces_jax.training.loop import Options
from pisces_jax.training.metrics import read_metrics
from pisces_jax.training.steps import finished_step
from pisces_jax.utils import companions, errors, stopping
from pisces_jax.utils.errors import Preempted, UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def the_toy():
    with toy.installed(jax.devices()[:1]):
        yield


def train(workdir, options=loop.NOTHING_ELSE, **changes):
    loop.train(toy.config(**changes), workdir, options=options)
    return workdir / "toy"


def arrays(run):
    """All arrays of the latest checkpoint."""
    path = run / "checkpoints" / str(finished_step(run)) / "state"
    tree = ocp.PyTreeCheckpointer().restore(path.absolute())
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


def assert_same(one, other):
    assert finished_step(one) == finished_step(other)
    a, b = arrays(one), arrays(other)
    assert a.keys() == b.keys() and len(a) > 5
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def numbers(run):
    """What was measured, without what a clock says."""
    clocks = ("_per_step", "_per_second", "mfu", "goodput")
    return [
        {k: v for k, v in entry.items() if not k.endswith(clocks) and "lost/" not in k} for entry in read_metrics(run)
    ]


# --- bad numbers


def test_a_poisoned_batch_is_as_if_it_had_been_left_out(tmp_path, caplog):
    """One NaN in example 37 of source `numbers`: batch 4, so step 5. The step counter counts it, the state does not."""
    poisoned = dict(train=dict(numbers=dict(poisoned=(37,))))
    run = train(tmp_path / "poisoned", data=poisoned)
    told = train(tmp_path / "told", data=dict(poisoned, leave_out=(5,)))
    assert_same(run, told)
    assert int(arrays(run)["['step']"]) == 11
    assert all(np.isfinite(value).all() for value in arrays(run).values())
    (event,) = read_events(run)
    assert event["event"] == "skipped" and event["step"] == 5 and set(event["not_finite"]) == {"fit", "norm/gradient"}
    assert event["examples"] == [f"numbers[{i}] key{i}" for i in range(32, 40)]
    assert "step 5: its batch is left out" in caplog.text and "numbers[32] key32" in caplog.text
    lines = [e for e in read_metrics(run) if "train/seconds_per_step" in e]
    assert [e["step"] for e in lines if e.get("train/skipped")] == [5] and "train/fit" not in lines[4]
    assert "train/skipped" not in lines[3] and all(math.isfinite(v) for e in lines for v in e.values())
    # Later steps are those of a run in which nothing happened but this: the losses are the same.
    assert [e["train/fit"] for e in lines[5:]] == [e["train/fit"] for e in read_metrics(told) if "train/fit" in e][4:]


def test_what_is_not_finite_in_held_out_data_is_reported_and_left_out(tmp_path, caplog):
    run = train(tmp_path / "bad", data=dict(evaluate=dict(numbers=dict(poisoned=(3,)))))
    whole = train(tmp_path / "whole")
    assert_same(run, whole)
    held_out = [e for e in read_metrics(run) if "val/fit" in e]
    assert [(e["step"], e["val/skipped"]) for e in held_out] == [(6, 1.0), (12, 1.0)]
    assert all(math.isfinite(e["val/fit"]) for e in held_out)
    assert {(e["event"], e["step"]) for e in read_events(run)} == {("held_out", 6), ("held_out", 12)}
    assert "held-out batch 1 is left out" in caplog.text and "key3" in caplog.text


def test_after_bad_steps_in_a_row_the_run_goes_back_and_passes_over_them(tmp_path):
    """Steps 5 to 7 are bad, three in a row are too many: from step 8 on, the state of step 3 learns on. The same
    whatever the log's intervals, and as in a run that is told so."""
    bad = dict(data=dict(train=dict(numbers=dict(poisoned=(32, 40, 48)))), limits=dict(bad_steps=3))
    run = train(tmp_path / "often", **bad)
    assert {"step": 7, "event": "went_back", "to": 3} in read_events(run)
    seldom = dict(every=5, evaluate_every=0, checkpoint_every=3)
    assert_same(run, train(tmp_path / "seldom", log=seldom, **bad))
    told = train(tmp_path / "told", data=dict(bad["data"], leave_out=(4, 5, 6, 7)), limits=bad["limits"])
    assert_same(run, told)
    assert int(arrays(run)["['step']"]) == 8


def test_a_run_that_stays_bad_stops_with_a_report(tmp_path):
    bad = dict(data=dict(train=dict(numbers=dict(poisoned=tuple(range(32, 64))))), limits=dict(bad_steps=2))
    with pytest.raises(UserError, match=r"the 2 steps up to 8 all gave infinite .* also after the run went back"):
        train(tmp_path, **bad)
    assert finished_step(tmp_path / "toy") == 3
    for value in arrays(tmp_path / "toy").values():
        assert np.isfinite(value).all()
    # What the user may change then is changed, and noted.
    with pytest.raises(UserError, match=r"another config .data.leave_out.*allow_changes=data.leave_out"):
        train(tmp_path, data=dict(bad["data"], leave_out=(5, 6, 7, 8)), limits=bad["limits"])
    allow = Options(allow_changes=("data.leave_out", "optimizer"))
    changes = dict(data=dict(bad["data"], leave_out=(5, 6, 7, 8)), optimizer=dict(learning_rate=0.01))
    run = train(tmp_path, allow, **changes)
    assert finished_step(run) == 12
    noted = [(e["key"], e["before"], e["now"]) for e in read_events(run) if e["event"] == "changed"]
    assert ("optimizer.learning_rate", 0.05, 0.01) in noted and ("data.leave_out", [], [5, 6, 7, 8]) in noted
    assert json.loads((run / "config.json").read_text())["optimizer"]["learning_rate"] == 0.01
    with pytest.raises(UserError, match="another config .seed"):
        train(tmp_path, Options(allow_changes=("seed",)), seed=1, **changes)


def test_spikes_are_recorded(tmp_path):
    """A thousandfold example in step 9; the log has one line for all twelve steps."""
    large = dict(data=dict(train=dict(numbers=dict(large=(64,)))), log=dict(every=12, evaluate_every=0))
    run = train(tmp_path, limits=dict(spike=20.0), **large)
    assert [(e["event"], e["step"]) for e in read_events(run)] == [("spike", 9)]
    assert [e["train/spikes"] for e in read_metrics(run) if "train/fit" in e] == [1.0]


def test_the_first_layer_with_nan_is_named():
    """NaN in one weight of the second of two layers of a scan, in a real model."""
    import tiny

    from pisces_jax.sharding import make_mesh
    from pisces_jax.training.find_nan import first_not_finite
    from pisces_jax.training.programs import make_program
    from pisces_jax.training.step import make_trainer

    model = dict(language_model=dict(tiny.model_settings()["language_model"], layers=2))
    config = tiny.config(batch_size=1, model=model, data=dict(train={"a": {}}, row_length=16))
    trainer = make_trainer(make_program(config, 32), config, make_mesh(devices=jax.devices()[:1]))
    state = trainer.init(jax.random.key(0))
    batch = {k: np.ones(s.shape, s.dtype) for k, s in trainer.abstract_batch().items()}
    batch = trainer.put({**batch, "source": 0 * batch["source"]})
    layers = state.trained["language_model"]["layers"]
    layers["mlp"] = jax.tree.map(lambda x: x.at[1].set(np.nan), layers["mlp"])
    words = first_not_finite(trainer, state, batch)
    assert words.startswith("the first module whose output is not finite is language_model/layers/mlp/"), words
    assert words.endswith("in its call 2 of 2"), words


# --- signals, in this process


def test_a_run_that_is_stopped_in_an_evaluation_makes_it_up(tmp_path, monkeypatch):
    """After the first of two held-out batches, at step 6 and again in the last step."""
    whole = train(tmp_path / "whole")
    put = toy_put = loop.Trainer.put
    for step in 6, 12:
        seen = []

        def stop(self, batch, step=step, seen=seen):
            seen.append(1)
            if len(seen) == {6: 7, 12: 9}[step]:  # 6 steps, or what is left of 12 and one evaluation's batches
                signal.raise_signal(signal.SIGINT)
            return toy_put(self, batch)

        monkeypatch.setattr(loop.Trainer, "put", stop)
        with pytest.raises(Preempted):
            train(tmp_path / "stopped")
        run = tmp_path / "stopped" / "toy"
        assert finished_step(run) == step and (run / "owed").read_text() == str(step)
        assert not [e for e in read_metrics(run) if "val/fit" in e and e["step"] == step]
    monkeypatch.setattr(loop.Trainer, "put", put)
    run = train(tmp_path / "stopped")
    assert_same(run, whole)
    assert numbers(run) == numbers(whole) and not (run / "owed").exists()


# --- storage that fails


def refuse(monkeypatch, steps, error=None):
    """Saves of these steps fail in the background."""
    finish = checkpoints.Checkpoints._finish

    def fail(self, orbax, step, saving):
        if step in steps:
            orbax.wait_until_finished()
            self._failure = error or OSError(28, "No space left on device", str(saving))
            return
        finish(self, orbax, step, saving)

    monkeypatch.setattr(checkpoints.Checkpoints, "_finish", fail)


def test_a_save_that_fails_is_said_and_the_next_one_tries_again(tmp_path, monkeypatch, caplog):
    whole = train(tmp_path / "whole")
    refuse(monkeypatch, {3, 9})
    run = train(tmp_path / "refused")
    assert_same(run, whole)
    assert numbers(run) == numbers(whole)
    assert "the checkpoint of step 3 could not be saved: " in caplog.text and "No space left on device" in caplog.text
    assert "2 saves failed and the run went on, the last one: step 9" in caplog.text and "Traceback" not in caplog.text


def test_after_too_many_failures_the_state_goes_elsewhere(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    refuse(monkeypatch, {6, 9})
    with monkeypatch.context() as patch:
        save = checkpoints.Checkpoints.save

        def read_only(self, step, *args):
            if step == 12 and self._run.parent.name == "here":
                raise OSError(30, "Read-only file system")
            save(self, step, *args)

        patch.setattr(checkpoints.Checkpoints, "save", read_only)

        with pytest.raises(UserError, match=r"step 12 of toy is not saved .*Read-only.* and is in (\S+) instead"):
            train(tmp_path / "here", Options(fallback=tmp_path / "there"))
    run = tmp_path / "here" / "toy"
    assert finished_step(run) == 3  # the older one is as it was
    shutil.move(tmp_path / "there/toy/checkpoints/12", run / "checkpoints/12")
    train(tmp_path / "here")
    assert_same(run, whole)


def test_a_save_that_never_returns_is_left_behind(tmp_path, monkeypatch):
    free = threading.Event()
    monkeypatch.setattr(checkpoints.Checkpoints, "_finish", lambda self, *given: free.wait(60))
    try:
        with pytest.raises(UserError, match="step 12 of toy is not saved .step 3: it has not ended .*give --fallback"):
            train(tmp_path, limits=dict(save_seconds=0.2))
    finally:
        free.set()
        monkeypatch.setattr(errors, "hanging", False)


def test_metrics_wait_for_a_disk_that_is_full(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole")
    from pisces_jax.training.metrics import Writer

    write, calls = Writer._write, []

    def full(self):
        calls.append(1)
        if 3 <= len(calls) <= 5:
            self._path.rename(self._path.with_suffix(".away"))
            self._path.mkdir()  # which nobody can write to
            write(self)
            self._path.rmdir()
            self._path.with_suffix(".away").rename(self._path)
        else:
            write(self)

    monkeypatch.setattr(Writer, "_write", full)
    assert numbers(train(tmp_path / "full")) == numbers(whole)


# --- signals and companions, in processes of their own


@pytest.fixture
def processes(tmp_path):
    """Starts the toy as a command, in so many processes; `wait(n)` until it has so many lines of metrics; `end` gives
    exit statuses, seconds and what was said."""
    started = []

    def start(count, *flags):
        environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1", "JAX_PLATFORMS": "cpu"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            several = [f"--coordinator=127.0.0.1:{free.getsockname()[1]}", f"--processes={count}"]
        for i in range(count):
            own = [*several, f"--process={i}"] if count > 1 else []
            command = [sys.executable, "tests/toy.py", "--config=tests/toy.py", f"--workdir={tmp_path}", *own, *flags]
            log = (tmp_path / f"{i}.log").open("w")
            started.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log))
        return started

    def wait(lines):
        path, end = tmp_path / "toy/metrics.jsonl", time.monotonic() + 200
        while not path.exists() or len(path.read_text().splitlines()) < lines:
            assert time.monotonic() < end and all(p.poll() is None for p in started), said()
            time.sleep(0.05)

    def said():
        return [(tmp_path / f"{i}.log").read_text() for i in range(len(started))]

    def end():
        begun = time.monotonic()
        statuses = [p.wait(timeout=100) for p in started]
        return statuses, time.monotonic() - begun, said()

    yield types.SimpleNamespace(start=start, wait=wait, end=end, run=tmp_path / "toy")
    for p in started:
        p.kill()


LONG = "--config.steps=2000", "--config.data.train.numbers.seconds=0.005", "--config.log.checkpoint_every=1000"


@pytest.mark.slow
def test_a_signal_to_a_process_alone(processes):
    """It saves the step it is at, and says with its status that the same command continues."""
    (process,) = processes.start(1, *LONG)
    processes.wait(3)
    process.send_signal(signal.SIGTERM)
    statuses, seconds, (said,) = processes.end()
    assert statuses == [errors.PREEMPTED] and seconds < 15 and finished_step(processes.run) >= 3, said
    assert said.endswith("interrupted: run the same command again to continue\n") and "Traceback" not in said


@pytest.mark.slow
def test_two_signals_at_once(processes):
    (process,) = processes.start(1, *LONG, "--config.log.every=1")
    processes.wait(3)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    statuses, seconds, (said,) = processes.end()
    assert statuses == [errors.PREEMPTED] and seconds < 5 and "Traceback" not in said, said
    assert "stopped at once by SIG" in said or "interrupted: " in said  # the first may have been answered already


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes(processes):
    """Ctrl-C in the second one: both save the same step."""
    _, second = processes.start(2, *LONG)
    processes.wait(3)
    second.send_signal(signal.SIGINT)
    statuses, seconds, said = processes.end()
    assert statuses == [errors.PREEMPTED] * 2 and seconds < 15, said
    assert finished_step(processes.run) >= 3 and not any("Traceback" in words for words in said)


@pytest.mark.slow
def test_a_companion_that_dies(processes):
    """The second one is killed: the first ends with one sentence, and what was saved is whole."""
    _, second = processes.start(2, *LONG)
    processes.wait(3)
    second.kill()
    statuses, seconds, (said, _) = processes.end()
    assert statuses == [errors.LOST, -signal.SIGKILL] and seconds < 15, said
    assert "is gone" in said or "not heard of" in said
    assert "Traceback" not in said and "stack trace" not in said


@pytest.mark.slow
def test_a_companion_that_never_comes(processes):
    first, second = processes.start(2, "--meet_seconds=3")
    second.kill()
    statuses, _, (said, _) = processes.end()
    assert statuses[0] == errors.LOST and "did not find each other in 3 s" in said and "stack trace" not in said


def test_what_is_stuck_says_where(capfd, monkeypatch):
    """A step that takes longer than it may."""
    ended = []
    monkeypatch.setattr(errors, "leave", lambda status, words: ended.append((status, words)))
    with stopping.listening() as stop, stop.working(0.2):
        end = time.monotonic() + 20
        while not ended and time.monotonic() < end:
            time.sleep(0.01)
    status, words = ended[0]
    assert status == errors.STUCK and "stuck: no step has ended" in words
    assert "test_what_is_stuck_says_where" in capfd.readouterr().err


def test_processes_agree_on_where_they_stop(monkeypatch):
    """Three of them, of which the second asks; each is somewhere else, and all stop at the same call."""
    monkeypatch.setattr(companions, "POLL", 0.01)
    store, lock = {}, threading.Lock()

    class Client:
        def key_value_set(self, key, value, allow_overwrite):
            with lock:
                store[key] = value

        def key_value_dir_get(self, folder):
            with lock:
                return [(k, v) for k, v in store.items() if k.startswith(folder)]

    several = [companions.Companions(Client(), i, 3, 60.0) for i in range(3)]
    stopped = {}

    def run(i):
        for call in range(10**6):
            if several[i].reached():
                stopped[i] = call
                return
            if i == 1 and call == 5:
                several[1].ask()
            time.sleep(0.001 * (i + 1))

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    for one in several:
        one._leaving = True
    assert len(stopped) == 3 and len(set(stopped.values())) == 1
