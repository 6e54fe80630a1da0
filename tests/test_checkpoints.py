"""Checkpoints that can be believed: every kind of damage is found, the step before is used, and nothing is deleted."""

import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from pisces_jax import checkpoint
from pisces_jax.training import checkpoints, inspection, run_folder, steps
from pisces_jax.training.checkpoints import Checkpoints
from pisces_jax.training.config import run_config
from pisces_jax.training.metrics import Writer, read_metrics
from pisces_jax.training.stages import seconds_of
from pisces_jax.training.step import State
from pisces_jax.utils import cli, locks, manifests
from pisces_jax.utils.errors import UserError

CONFIG = json.loads(run_config(name="run", steps=3, log=dict(keep=3)).to_json())


def state(step, scale=1.0):
    """A state of a few arrays that differ from step to step; one is large enough to be checked while it is read."""
    rng = np.random.default_rng(step)
    params = {"a": {"w": jnp.asarray(scale * rng.normal(size=(8, 6)), jnp.float32), "v": jnp.arange(4.0) + step},
              "b": {"table": jnp.asarray(rng.normal(size=(600, 512)), jnp.float32)}}  # fmt: skip
    average = jax.tree.map(lambda x: x / 2, params)
    return State(jnp.asarray(step, jnp.int32), params, average, (jax.tree.map(jnp.square, params),), {})


def position(step):
    return {"next_batch": step, "lengths": "0123"}


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and np.array_equal(x, y) for x, y in pairs)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three saved steps."""
    run = tmp_path_factory.mktemp("work") / "run"
    run.mkdir()
    (run / "config.json").write_text(json.dumps(CONFIG))
    writer = Checkpoints(run, 3)
    for step in (1, 2, 3):
        writer.save(step, state(step), position(step))
    writer.close()
    return run


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def restore(run):
    reader = Checkpoints(run, 3)
    try:
        return reader.restore(state(0))
    finally:
        reader.close()


def flip(path, bit):
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def damages(path):
    """Ten flipped bits one by one (the first, the last, others), then truncated, emptied, deleted."""
    whole = path.read_bytes()
    bits = 8 * len(whole)
    chosen = {0, bits - 1, *random.Random(path.name).sample(range(bits), min(8, bits))} if bits else set()
    for bit in sorted(chosen):
        flip(path, bit)
        yield f"bit {bit}"
        path.write_bytes(whole)
    for name, data in ("truncated", whole[:-1]), ("half", whole[: len(whole) // 2]), ("emptied", b""):
        if data != whole:
            path.write_bytes(data)
            yield name
            path.write_bytes(whole)
    path.unlink()
    yield "deleted"
    path.write_bytes(whole)


def test_every_damage_to_every_file_is_found(run):
    folder = run / "checkpoints/3"
    found = files(folder)
    assert len(found) > 10 and sum(path.stat().st_size > manifests.SMALL for path in found) > 0
    assert {path.name for path in found} > {"MANIFEST", "config.json", "metadata", "_METADATA", "manifest.ocdbt"}
    tried = 0
    for path in found:
        for damage in damages(path):
            tried += 1
            assert steps.flaw(folder, content=True), f"{path.relative_to(folder)}: {damage}"
            if damage in ("deleted", "emptied", "truncated"):  # seen without reading what is large
                assert steps.finished_step(run) == 2, f"{path.relative_to(folder)}: {damage}"
    assert tried > 12 * len(found)
    assert steps.flaw(folder, content=True) is None and steps.finished_step(run) == 3


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_the_step_before_is_restored_whatever_file_is_damaged(saved, tmp_path, caplog):
    """With its data position; the damaged one is said, and set aside as it is."""
    for number, name in enumerate(path.relative_to(saved / "checkpoints/3") for path in files(saved / "checkpoints/3")):
        run = tmp_path / str(number)
        shutil.copytree(saved, run)
        flip(run / "checkpoints/3" / name, 77)
        before = {p.relative_to(run / "checkpoints/3"): p.read_bytes() for p in files(run / "checkpoints/3")}
        caplog.clear()
        restored, where = restore(run)
        assert same(restored, state(2)) and where == position(2), name
        aside = run / "checkpoints/damaged-3"
        assert {p.relative_to(aside): p.read_bytes() for p in files(aside)} == before
        assert not (run / "checkpoints/3").exists()
        (said, then) = [record.getMessage() for record in caplog.records]
        assert name.name in said and "3 is damaged" in said and "set aside as damaged-3" in said and "\n" not in said
        assert then.endswith("goes on from step 2")


def test_only_reads_that_end_late_are_unsaid(monkeypatch):
    """After a read, exceptions that nobody can catch are said as before, but for the closed loop's; hooks do not pile
    up."""
    said = []
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    for _ in range(2):
        with steps.quietly():
            pass
    late, other = (types.SimpleNamespace(exc_value=RuntimeError(words)) for words in ("Event loop is closed", "other"))
    sys.unraisablehook(late)
    sys.unraisablehook(other)
    assert said == [other] and sys.unraisablehook._hook == said.append


@pytest.mark.parametrize("broken", ["empty folder", "all", "without manifest"])
def test_steps_that_are_not_there(run, broken, caplog):
    last = run / "checkpoints/3"
    if broken == "empty folder":  # of a later step
        (run / "checkpoints/60").mkdir()
        assert steps.finished_step(run) == 3
        restored, where = restore(run)
        assert same(restored, state(3)) and where == position(3)
        assert (run / "checkpoints/damaged-60").is_dir() and "the folder is empty" in caplog.text
    elif broken == "all":
        for step in (1, 2, 3):
            flip(max(files(run / f"checkpoints/{step}"), key=lambda p: p.stat().st_size), 10**6)
        assert restore(run) is None and "from the start: there is no other checkpoint" in caplog.text
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [f"damaged-{i}" for i in (1, 2, 3)]
    else:  # a copy that was broken off, from a run that has manifests
        (last / "MANIFEST").unlink()
        assert steps.finished_step(run) == 2
        assert restore(run)[1] == position(2)
        shutil.copytree(run / "checkpoints/damaged-3", last)  # and again: another name
        assert restore(run)[1] == position(2)
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2", "damaged-3", "damaged-3-2"]


def test_what_interrupted_saves_leave(run, caplog):
    """It is no step, is set aside, and goes when the next step is whole; damaged ones stay."""
    folder = run / "checkpoints"
    for name in ("4.saving", "4.saving.orbax-checkpoint-tmp", "5.orbax-checkpoint-tmp-123"):
        shutil.copytree(folder / "3", folder / name)
    shutil.copytree(folder / "3", folder / "damaged-9")
    assert steps.finished_step(run) == 3
    writer = Checkpoints(run, 2)
    names = {"interrupted-4", "interrupted-4-2", "interrupted-5"}
    assert {p.name for p in folder.iterdir()} == {"1", "2", "3", "damaged-9"} | names
    assert caplog.text.count("was left by an interrupted save") == 3
    writer.save(6, state(6), position(6))
    writer.close()
    assert {p.name for p in folder.iterdir()} == {"3", "6", "damaged-9"}
    assert same(restore(run)[0], state(6))


def test_a_save_that_fails_is_said_and_leaves_no_step(run, monkeypatch):
    writer = Checkpoints(run, 2)

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write_manifest", full)
        writer.save(4, state(4), position(4))
        with pytest.raises(OSError, match="No space left"):
            writer.wait()
    assert steps.finished_step(run) == 3 and steps.saved_steps(run) == [3, 2, 1]
    writer.save(4, state(4), position(4))  # the next save tries again
    writer.close()
    assert same(restore(run)[0], state(4))


def test_a_checkpoint_of_before_there_were_manifests_still_opens(run, caplog):
    for step in (1, 2, 3):
        for name in ("MANIFEST", "config.json"):
            (run / f"checkpoints/{step}/{name}").unlink()
    assert steps.finished_step(run) == 3 and run_folder.is_finished(run, content=True)
    restored, where = restore(run)
    assert same(restored, state(3)) and where == position(3)
    assert caplog.text.count("was saved before checkpoints had manifests: it is used unchecked") == 1
    assert not list((run / "checkpoints").glob("damaged*"))
    for path in files(run / "checkpoints/3/state"):
        os.truncate(path, path.stat().st_size // 2)
    assert restore(run)[1] == position(2) and "3 is damaged (it cannot be read" in caplog.text


def test_what_stays(tmp_path):
    """The last, every so many, the best: what one keeps, no other deletes."""
    run = tmp_path / "run"
    metrics = {2: 0.5, 4: 0.1, 6: 0.3, 8: float("nan"), 10: 0.2}
    for step in metrics:
        folder = run / "checkpoints" / str(step)
        (folder / "state").mkdir(parents=True)
        (folder / "state/x").write_text(str(step))
        manifests.write_manifest(folder)
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, "val/text": value}) + "\n" for step, value in metrics.items())
    )
    every = [10, 8, 6, 4, 2]
    assert steps.Keep().stay(run, every) == {10} == steps.Keep(0).stay(run, every)
    assert steps.Keep(2).stay(run, every) == {10, 8}
    assert steps.Keep(1, 6).stay(run, every) == {10, 6}
    assert steps.Keep(1, 0, "val/text").stay(run, every) == {10, 4}
    assert steps.Keep(1, 0, "val/other").stay(run, every) == {10}
    (run / "checkpoints/8/state/x").write_text("")  # damaged: it neither counts nor goes
    steps.delete_others(run, steps.Keep(2, 2 * 10, "val/text"))
    assert steps.saved_steps(run) == [10, 8, 6, 4]


# --- weights for later stages


@pytest.fixture
def devices():
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("x", "y"))


def test_damaged_weights_are_never_used_by_other_runs(run, caplog):
    data = max(files(run / "checkpoints/3"), key=lambda p: p.stat().st_size)
    part = checkpoints.load_part(run.parent, "run", "b")
    np.testing.assert_array_equal(part["table"], state(3).ema["b"]["table"])
    flip(data, 8 * 70_000)
    with pytest.raises(UserError, match=r"3 is damaged \(.* has other content\) and is set aside as damaged-3: train"):
        checkpoints.load_part(run.parent, "run", "b")
    with pytest.raises(UserError, match=r"run is not finished \(2 of 3 steps\): train it first"):
        checkpoints.load_part(run.parent, "run", "b")
    assert not run_folder.is_finished(run)


def test_a_finished_run_with_a_flipped_bit_is_not_finished(run):
    assert run_folder.is_finished(run, content=True)
    flip(max(files(run / "checkpoints/3"), key=lambda p: p.stat().st_size), 8 * 70_000)
    assert run_folder.is_finished(run) and not run_folder.is_finished(run, content=True)
    os.truncate(max(files(run / "checkpoints/3"), key=lambda p: p.stat().st_size), 5)
    assert not run_folder.is_finished(run)
    with pytest.raises(UserError, match=r"2 of 3 steps; checkpoint 3 is damaged: state/.* has 5 of .* bytes"):
        checkpoints.load_part(run.parent, "run", "b")


def test_parts_are_read_into_their_shards(run, devices):
    """In another dtype, some of them alone; other shapes are refused before anything is read."""

    def abstract(shape, dtype, *axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(devices, PartitionSpec(*axes)))

    like = {"w": abstract((8, 6), jnp.float32, "x", "y"), "v": abstract((4,), jnp.bfloat16, "y")}
    expected = state(3).ema["a"]
    got = checkpoints.load_part(run.parent, "run", "a", like)
    for name, each in like.items():
        assert got[name].sharding == each.sharding and got[name].dtype == each.dtype
        np.testing.assert_array_equal(got[name], expected[name].astype(each.dtype))
    assert set(checkpoints.load_part(run.parent, "run", "a", like, {"w"})) == {"w"}
    for changed, message in (
        (like | {"w": abstract((8, 5), jnp.float32)}, r"run does not fit model.a: a/w \(8, 6\) for \(8, 5\)"),
        (like | {"u": abstract((8,), jnp.float32)}, r"a/u missing for \(8,\)"),
        ({"w": like["w"]}, r"a/v \(4,\) for nothing"),
    ):
        with pytest.raises(UserError, match=message):
            checkpoints.load_part(run.parent, "run", "a", changed)


def test_restoring_takes_little_more_memory_than_the_state(tmp_path, devices):
    """192 MiB in 24 arrays, from one layout into another: the highest memory is at most 1.1 times the state's."""
    shapes = {f"w{i}": (1024, 2048) for i in range(24)}
    spread = NamedSharding(devices, PartitionSpec("x", "y"))
    rows = NamedSharding(devices, PartitionSpec(("x", "y")))
    values = {k: jax.device_put(np.full(s, i, np.float32), rows) for i, (k, s) in enumerate(shapes.items())}
    writer = Checkpoints(tmp_path, 1)
    writer.save(1, State(jnp.asarray(1), {"a": values}, {}, (), {}), position(1))
    writer.close()
    size = sum(x.nbytes for x in values.values())
    del values
    target = State(
        jax.ShapeDtypeStruct((), jnp.int32, sharding=NamedSharding(devices, PartitionSpec())),
        {"a": {k: jax.ShapeDtypeStruct(s, jnp.float32, sharding=spread) for k, s in shapes.items()}}, {}, (), {},
    )  # fmt: skip

    def memory(key):
        with open("/proc/self/status") as status:
            return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))

    reader = Checkpoints(tmp_path, 1)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the highest memory is counted from here
    before = memory("VmRSS")
    restored, _ = reader.restore(target)
    jax.block_until_ready(restored)
    assert memory("VmHWM") - before < 1.1 * size
    assert restored.trained["a"]["w7"].sharding == spread and float(restored.trained["a"]["w7"][3, 5]) == 7
    reader.close()


# --- the run's folder


def config(**changes):
    return ConfigDict({**CONFIG, **changes})


def test_a_config_that_was_cut_off_locks_nobody_out(saved, tmp_path, caplog):
    """Without checkpoints the run starts anew; with them, the config is taken from one."""
    for number, (left, text) in enumerate(
        [("nothing", None), ("empty", ""), ("half", json.dumps(CONFIG)[:20]), ("no object", "[1]"), ("zeros", "\0" * 9)]
    ):
        run = tmp_path / str(number) / "run"
        run.mkdir(parents=True)
        (run / ".config.json.abc12345").write_text("{")  # what the killed process left
        (run / "checkpoints").mkdir()
        (run / "checkpoints/1.saving.orbax-checkpoint-tmp").mkdir()
        if text is not None:
            (run / "config.json").write_text(text)
        run_folder.check_run(run.parent, config())
        assert run_folder.open_run(run.parent, config()) == run
        assert json.loads((run / "config.json").read_text()) == CONFIG, left
        assert not list(run.glob(".config*"))

        begun = tmp_path / f"begun{number}/run"
        shutil.copytree(saved, begun)
        (begun / "config.json").unlink()
        if text is not None:
            (begun / "config.json").write_text(text)
        caplog.clear()
        assert run_folder.read_config(begun).steps == 3 and "the copy in" in caplog.text
        with pytest.raises(UserError, match=r"another config \(steps\)"):
            run_folder.check_run(begun.parent, config(steps=4))
        run_folder.open_run(begun.parent, config(log=dict(keep=9)))
        assert json.loads((begun / "config.json").read_text()) == CONFIG
    for step in (1, 2, 3):  # checkpoints from before they held copies
        for name in ("MANIFEST", "config.json"):
            (begun / f"checkpoints/{step}/{name}").unlink()
    (begun / "config.json").write_text("{")
    with pytest.raises(UserError, match="has checkpoints and no config.json that can be read: write the run's config"):
        run_folder.check_run(begun.parent, config())


def test_odd_lines_of_what_a_run_measured_stop_nobody(tmp_path):
    good = [{"step": 1, "train/text": 0.5}, {"step": 2, "train/text": 0.25}]
    odd = ["", "null", "[1]", "3", '"x"', "{}", '{"step": "1"}', '{"step": 1, "a": "b"}', '{"step": 1, "a": null}',
           '{"step": 1', "\0\0", "[" * 100_000, '{"step": 1, "a": []}', '{"step": true}']  # fmt: skip
    (tmp_path / "metrics.jsonl").write_bytes(
        "\n".join([json.dumps(good[0]), *odd, json.dumps(good[1])]).encode() + b"\n\xff\xfe{"
    )
    assert read_metrics(tmp_path) == good
    Writer(tmp_path, 1, tensorboard=False)
    assert read_metrics(tmp_path) == good[:1]
    for text in ("", "null", "[]", "{}", "3", '{"seconds": null}', '{"seconds": "x"}', '{"seconds": NaN}', "[" * 9**6):
        (tmp_path / "seconds.json").write_text(text)
        assert seconds_of(tmp_path) == 0
    (tmp_path / "seconds.json").write_bytes(b"\xff")
    assert seconds_of(tmp_path) == 0


# --- one command at a time


def test_a_second_run_in_a_folder_is_refused_and_a_dead_one_blocks_nobody(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    hold = (
        "import pathlib, sys, time\n"
        "from pisces_jax.utils.locks import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", hold, str(folder)], stdout=subprocess.PIPE, text=True)
    assert owner.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"run is in use by process {owner.pid} on \S+: wait until it ends or stop it"):
        with locks.locked(folder):
            pass
    owner.kill()
    owner.wait()
    assert (folder / ".lock").exists()
    with locks.locked(folder):  # at once
        assert json.loads((folder / ".lock").read_text())["process"] == os.getpid()
        (folder / "something").write_text("")
    assert [path.name for path in folder.iterdir()] == ["something"]
    with locks.locked(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()  # nothing was written into it


def test_a_lock_of_another_host_is_taken_over_when_it_is_silent(tmp_path, monkeypatch):
    """On storage that does not share file locks."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "SILENT", 0.5)
    lock = tmp_path / ".lock"
    lock.write_text(json.dumps({"host": "elsewhere", "process": 5}))
    alive = threading.Event()

    def touch():
        while not alive.wait(0.05):
            os.utime(lock)

    thread = threading.Thread(target=touch)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process 5 on elsewhere"), locks.locked(tmp_path):
            pass
    finally:
        alive.set()
        thread.join()
    begin = time.monotonic()
    with locks.locked(tmp_path):
        assert time.monotonic() - begin >= 0.5
        before = lock.stat().st_mtime_ns
        time.sleep(0.4)
        assert lock.stat().st_mtime_ns > before  # it shows that it is alive
    lock.write_text("{")  # of nobody who can be known
    with locks.locked(tmp_path):
        pass


# --- the command


@pytest.fixture
def call(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["checkpoint", *map(str, arguments)])
        checkpoint.main()
        return capsys.readouterr().out.splitlines()

    monkeypatch.setattr(cli, "start", lambda: None)
    return call


def test_the_command_lists_and_verifies(run, call):
    for path, count in (run, 3), (run.parent, 3), (run / "checkpoints/2", 1):
        for command in "list", "verify":
            lines = call(command, path)
            assert len(lines) == count and all(line.endswith("  whole") for line in lines)
    flip(run / "checkpoints/2/iterator/metadata", 30)
    assert all(line.endswith("  whole") for line in call("list", run))
    with pytest.raises(UserError, match="1 of these checkpoints are damaged"):
        call("verify", run)
    (run / "checkpoints/1/iterator/metadata").unlink()
    assert call("list", run)[-1].endswith("  iterator/metadata is missing")
    for name in "MANIFEST", "config.json":
        (run / "checkpoints/3" / name).unlink()
    assert call("list", run)[0].endswith("  unchecked")
    for path, message in (run / "checkpoints/9", "is not a folder"), (run / "checkpoints/3/state/d", "holds no check"):
        with pytest.raises(UserError, match=message):
            call("list", path)


def test_the_command_shows_and_compares(run, call, monkeypatch):
    monkeypatch.setattr(inspection, "AT_ONCE", 3000)  # one large array at a time, or some small ones
    lines = call("show", run)
    norm = np.linalg.norm(np.asarray(state(3).trained["b"]["table"], np.float64))
    assert len(lines) == 10 and f"trained/b/table  [600, 512]  float32  norm {norm:.6g}" in lines
    assert f"average/a/v  [4]  float32  norm {np.linalg.norm(np.arange(4) / 2 + 1.5):.6g}" in lines
    assert call("compare", run, run / "checkpoints/3")[-1] == "equal"
    lines = call("compare", run / "checkpoints/1", run / "checkpoints/2")
    largest = np.abs(np.asarray(state(1).trained["a"]["w"], np.float64) - np.asarray(state(2).trained["a"]["w"])).max()
    assert len(lines) == 11 and lines[-1] == "10 arrays differ"
    assert "trained/a/v  1" in lines and f"trained/a/w  {largest:.6g}" in lines and "step  1" in lines
    flip(max(files(run / "checkpoints/3"), key=lambda p: p.stat().st_size), 8 * 70_000)
    with pytest.raises(UserError, match="3 is damaged: .* has other content"):
        call("show", run)
    with pytest.raises(UserError, match="OTHER is missing: give it"):
        call("compare", run)
    with pytest.raises(UserError, match="--out is given: leave it out"):
        call("show", run, "--out=x")


def test_the_command_copies_what_is_whole(run, call, tmp_path):
    out = tmp_path / "backup/run-3"
    out.parent.mkdir()
    assert call("copy", run, f"--out={out}")[0].endswith("checked byte by byte")
    assert steps.flaw(out, content=True) is None
    assert [p.relative_to(out) for p in files(out)] == [
        p.relative_to(run / "checkpoints/3") for p in files(run / "checkpoints/3")
    ]
    assert call("compare", run, out)[-1] == "equal"
    with pytest.raises(UserError, match="exists: give a new folder"):
        call("copy", run, f"--out={out}")
    flip(max(files(run / "checkpoints/3"), key=lambda p: p.stat().st_size), 8 * 70_000)
    with pytest.raises(UserError, match="3 is damaged"):
        call("copy", run, f"--out={tmp_path / 'other'}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["backup", "run"] and len(list(out.parent.iterdir())) == 1


TWO = """
import json, os, pathlib, sys
from pisces_jax.utils import processes
from pisces_jax.utils.errors import UserError
port, process, folder = sys.argv[1:]
run = pathlib.Path(folder) / "run"
processes.start(f"127.0.0.1:{port}", 2, int(process))
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pisces_jax.training import run_folder, steps
from pisces_jax.training.checkpoints import Checkpoints, load_part
from pisces_jax.training.step import State
split = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))

def state(step):
    whole = np.random.default_rng(step).normal(size=(1024, 600)).astype(np.float32)
    w = jax.make_array_from_callback(whole.shape, split, lambda index: whole[index])
    return State(np.asarray(step, np.int32), {"a": {"w": w}}, {}, (), {})

def same(a, b):
    return all(np.array_equal(x.data, y.data) for x, y in zip(a.addressable_shards, b.addressable_shards, strict=True))

with run_folder.locked(run):
    try:
        with run_folder.locked(run):
            pass
    except UserError as error:
        assert "in use by process" in str(error), error
    writer = Checkpoints(run, 3)
    for step in 1, 2, 3:
        writer.save(step, state(step), {"next_batch": step})
    writer.close()
    processes.barrier("saved")
    assert steps.finished_step(run) == 3
    processes.barrier("looked")
    if process == "0":  # a bit that one of them alone reads
        data = max((run / "checkpoints/3").rglob("*"), key=lambda path: path.stat().st_size)
        held = bytearray(data.read_bytes())
        held[len(held) // 2] ^= 1
        data.write_bytes(bytes(held))
    processes.barrier("damaged")
    assert not run_folder.is_finished(run, content=True)
    restored, position = Checkpoints(run, 3).restore(state(0))  # a reader need not be closed
    assert position == {"next_batch": 2} and same(restored.trained["a"]["w"], state(2).trained["a"]["w"])
    like = {"w": jax.ShapeDtypeStruct((1024, 600), np.float32, sharding=split)}
    if process == "0":
        (run / "config.json").write_text(json.dumps(json.loads((run / "config.json").read_text()) | {"steps": 2}))
    processes.barrier("shorter")
    assert same(load_part(run.parent, "run", "a", like)["w"], state(2).trained["a"]["w"])
print("as it should be", sorted(path.name for path in (run / "checkpoints").iterdir()))
"""


@pytest.mark.slow
def test_two_processes_save_find_damage_and_restore_together(tmp_path):
    """What one of them finds, both act upon; the first holds the lock for both."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps(CONFIG))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = re.sub(r"(device_count)=\d+", r"\1=2", os.environ["XLA_FLAGS"])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(port), str(i), str(tmp_path)], stdout=subprocess.PIPE, text=True,
            stderr=subprocess.STDOUT, env={**os.environ, "XLA_FLAGS": flags},
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=200)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, words in zip(started, said, strict=True):
        assert "as it should be ['1', '2', 'damaged-3']" in words, (process.returncode, words, said)
    assert "3 is damaged" in said[0] and "3 is damaged" not in said[1]  # the first one says it
