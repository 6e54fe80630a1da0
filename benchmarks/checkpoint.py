"""Measures checkpoints, beside plain Orbax in the same run: what a save delays, hashing against the disk, a restore.

    python benchmarks/checkpoint.py [--parameters=500000000] [--folder=DIR] [--every=500]

The state is Adam's: 12 bytes per parameter, of random numbers. It needs four times that on the disk, and about three
times in memory. docs/reliability.md has results.
"""

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from pisces_jax.training.checkpoints import Checkpoints
from pisces_jax.training.step import State
from pisces_jax.utils.files import sha256
from pisces_jax.utils.manifests import THREADS

LAYERS = 24  # arrays of the parameters
WORK = 1024  # side of the matrices whose product stands for a step


def make_state(parameters: int) -> State:
    """A training state with so many parameters, in `LAYERS` arrays."""
    shape = parameters // LAYERS // 1024, 1024
    keys = jax.random.split(jax.random.key(0), LAYERS)
    draw = jax.jit(functools.partial(jax.random.normal, shape=shape))
    trained, mu, nu = ({"lm": {f"w{i}": draw(jax.random.fold_in(k, n)) for i, k in enumerate(keys)}} for n in range(3))
    return State(jnp.zeros((), jnp.int32), trained, {}, (mu, nu), {})


def timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - begin


def memory(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most so far."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return 1024 * int(line.split()[1])
    raise ValueError(key)


def drop(folder: Path) -> list[Path]:
    """The files of a folder, which are then no longer in the system's memory."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)
    return paths


def read(path: Path) -> None:
    block = memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def over(paths: list[Path], work: Callable[[Path], Any], threads: int) -> float:
    """Bytes per second."""
    size = sum(path.stat().st_size for path in paths)
    with ThreadPoolExecutor(threads) as pool:
        return size / timed(lambda: list(pool.map(work, paths)))


def save(name: str, step: Callable[[], Any], usual: float, start: Callable[[], Any], wait: Callable[[], Any],
         saving: Callable[[], bool], every: int) -> float:  # fmt: skip
    """Saves once while steps go on; prints what that delayed, and returns the seconds until the save was there."""
    begin = time.perf_counter()
    start()
    blocked = time.perf_counter() - begin
    extra = 0.0
    while saving():
        extra += timed(step) - usual
    wait()
    whole = time.perf_counter() - begin
    share = (blocked + max(extra, 0)) / (every * usual)
    print(
        f"{name}: {whole:.1f} s until the checkpoint is there; the loop is blocked for {blocked:.2f} s, and the steps "
        f"meanwhile take {extra:+.2f} s more: {share:.2%} of {every} steps of {usual:.2f} s", flush=True,
    )  # fmt: skip
    return whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parameters", type=int, default=500_000_000)
    parser.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    parser.add_argument("--every", type=int, default=500, help="steps between two checkpoints")
    parser.add_argument("--step_seconds", type=float, default=1.0, help="roughly how long a step takes")
    parser.add_argument("--restore", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.restore:
        restore(Path(flags.folder), flags.restore, flags.parameters)
        return
    folder = Path(tempfile.mkdtemp(dir=flags.folder))
    try:
        measure(folder, flags)
    finally:
        shutil.rmtree(folder)


def measure(folder: Path, flags: argparse.Namespace) -> None:
    state = jax.block_until_ready(make_state(flags.parameters))
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    matrix = jnp.ones((WORK, WORK)) / WORK
    multiply = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, y: y @ x, x))
    timed(lambda: multiply(matrix, 1))
    products = max(1, round(10 * flags.step_seconds / timed(lambda: multiply(matrix, 10))))

    def step() -> Any:
        return multiply(matrix, products)

    usual = min(timed(step) for _ in range(5))
    print(
        f"a state of {flags.parameters / 1e6:.0f} M parameters: {size / 1e9:.2f} GB; {os.cpu_count()} cores", flush=True
    )

    ours = Checkpoints(folder / "ours", 1)
    plain = ocp.CheckpointManager(folder / "plain", options=ocp.CheckpointManagerOptions(max_to_keep=1))
    tree = as_saved(state)
    took: dict[str, list[float]] = {"ours": [], "plain Orbax": []}
    for number in (1, 2):  # in turn; the first time, buffers are new
        ways = {
            "ours": (functools.partial(ours.save, number, state, {}), ours.wait, ours.saving),
            "plain Orbax": (
                functools.partial(plain.save, number, args=ocp.args.PyTreeSave(tree)), plain.wait_until_finished,
                plain.is_saving_in_progress,
            ),
        }  # fmt: skip
        for name, (start, wait, saving) in ways.items():
            took[name].append(save(name, step, usual, start, wait, saving, flags.every))
    print(f"a save takes {min(took['ours']) / min(took['plain Orbax']):.2f} of plain Orbax's time")
    ours.close()
    plain.close()

    paths = [path for path in drop(folder / "ours/checkpoints/2") if path.stat().st_size > 2**20]
    disk, cached = over(paths, read, THREADS), over(paths, read, THREADS)
    one, many = (over(paths, sha256, threads) for threads in (1, THREADS))
    print(
        f"reading: {disk / 1e9:.2f} GB/s from the disk, {cached / 1e9:.2f} from memory; SHA-256: {one / 1e9:.2f} GB/s "
        f"with one thread, {many / 1e9:.2f} with {THREADS} ({len(paths)} files)", flush=True,
    )  # fmt: skip
    for name in took:  # each in a process of its own, whose memory is counted
        drop(folder)
        words = [f"--parameters={flags.parameters}", f"--folder={folder}", f"--restore={name}"]
        subprocess.run([sys.executable, __file__, *words], check=True)


def as_saved(state: State) -> dict[str, Any]:
    return {"step": state.step, "trained": state.trained, "average": {}, "optimizer": state.optimizer}


def restore(folder: Path, name: str, parameters: int) -> None:
    """Prints how long one restore takes, and how much memory."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.eval_shape(functools.partial(make_state, parameters))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(target))
    before, begin = memory("VmRSS"), time.perf_counter()
    got: Any
    if name == "ours":
        got = Checkpoints(folder / "ours", 1).restore(target)
    else:
        tree = as_saved(target)
        args = ocp.args.PyTreeRestore(tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
        got = ocp.CheckpointManager(folder / "plain").restore(2, args=args)
    jax.block_until_ready(got)
    seconds, peak = time.perf_counter() - begin, (memory("VmHWM") - before) / size
    print(f"restoring, {name}: {seconds:.1f} s, with at most {peak:.2f} times the state's memory", flush=True)


if __name__ == "__main__":
    main()
