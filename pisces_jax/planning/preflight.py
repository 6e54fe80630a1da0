"""Tries everything once on the real machine before a long run: `train --dry_run`."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from pisces_jax.planning.memory import by_kind, memory_by_part, peak_and_host
from pisces_jax.sharding import batch_share, make_mesh, user_mesh
from pisces_jax.training import input
from pisces_jax.training.checkpoints import Checkpoints
from pisces_jax.training.health import skipped
from pisces_jax.training.metrics import check_finite, merge
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import State, Trainer, make_trainer
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.processes import primary
from pisces_jax.utils.units import gib

BATCHES, STEPS = 3, 3
MESSAGE = 2**24  # bytes per device of a timed collective


def preflight(config: ConfigDict, workdir: Path, say: Callable[[str], None]) -> None:
    """Tries input, step, collectives and checkpoint with random weights. Nothing is left in `workdir`.

    Raises:
        UserError: the first problem that would have stopped the run.
    """
    hosts, devices = jax.process_count(), jax.devices()
    say(f"devices     {len(devices)} {devices[0].device_kind} on {hosts} process{'es' if hosts > 1 else ''}")
    scratch = workdir / ".dry_run"
    existed = workdir.exists()
    _clear(scratch)
    try:
        _try_all(config, workdir, scratch, say)
    finally:
        _clear(scratch)
        if primary() and not existed and workdir.is_dir() and not any(workdir.iterdir()):
            workdir.rmdir()
    say("go")


def _try_all(config: ConfigDict, workdir: Path, scratch: Path, say: Callable[[str], None]) -> None:
    mesh = make_mesh(**config.mesh)
    home = workdir if (workdir / config.data.tokenizer).exists() else scratch
    tokenizer = load_tokenizer(config, home)
    program = make_program(config, tokenizer.vocab_size)
    trainer = make_trainer(program, config, mesh)
    sizes = ", ".join(f"{axis} {size}" for axis, size in user_mesh(mesh).items())
    say(f"mesh        {sizes}; {len(trainer.fallbacks)} dimensions do not divide")

    share = batch_share(mesh, trainer.items)
    iterator = input.train_iterator(config, tokenizer, program, workdir, share, folder=home / "lengths")
    try:
        batch = next(iterator)
        start = time.perf_counter()
        for _ in range(BATCHES):
            batch = next(iterator)
        rate = BATCHES * program.examples(batch) / (time.perf_counter() - start)
    finally:
        iterator.close()
    say(f"input       {rate:.1f} examples per second in this process")

    state = trainer.init(jax.random.key(config.seed))
    on_mesh = trainer.put(batch)
    start = time.perf_counter()
    compiled = trainer.train_step().lower(state, on_mesh).compile()
    analysis: Any = compiled.memory_analysis()
    peak, host = peak_and_host(analysis)
    beside = f"; {gib(host)} in the host's memory" if host else ""
    say(f"compiled    in {time.perf_counter() - start:.0f} s; peak {gib(peak)} per device{beside}")
    say("            by formula: " + ", ".join(f"{k} {gib(v)}" for k, v in by_kind(memory_by_part(trainer)).items()))
    metrics = []
    for number in range(STEPS + 1):
        if number == 1:  # the first step fills caches
            jax.block_until_ready(state)
            start = time.perf_counter()
        state, measured = compiled(state, on_mesh)
        metrics.append(measured)
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - start) / STEPS
    values = merge(metrics)
    check_finite({k: math.nan for m in metrics for k, flag in skipped(jax.device_get(m)).items() if flag.total}, 0, 1)
    check_finite(values, 0, STEPS + 1)
    needed = program.examples(batch) / seconds
    verdict = "input keeps up" if rate >= needed else f"input is {needed / rate:.1f} times too slow for the step"
    say(f"step        {seconds:.3f} s, {needed:.1f} examples per second in this process: {verdict}")
    used = (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    if used:
        say(f"memory      peak {gib(used)} so far on this process's first device")

    for axis, size in mesh.shape.items():
        if size > 1:
            say(f"collective  {axis} ({size}): {time_all_reduce(trainer, axis) / 1e9:.2f} GB/s per device")
    _try_checkpoint(trainer, state, scratch, say)


def time_all_reduce(trainer: Trainer, axis: str) -> float:
    """Bytes per second that each device sends in an all-reduce over one mesh axis."""
    mesh = trainer.mesh
    n = mesh.shape[axis]
    run = jax.jit(
        jax.shard_map(
            lambda x: jax.lax.psum(x, axis) / n, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(),
            check_vma=False,
        )
    )  # fmt: skip
    x = jax.jit(lambda: jnp.ones(MESSAGE // 4), out_shardings=jax.NamedSharding(mesh, PartitionSpec()))()
    run(x).block_until_ready()
    start = time.perf_counter()
    run(run(x)).block_until_ready()
    return 2 * 2 * MESSAGE * (n - 1) / n / (time.perf_counter() - start)


def _try_checkpoint(trainer: Trainer, state: State, scratch: Path, say: Callable[[str], None]) -> None:
    start = time.perf_counter()
    checkpoints = Checkpoints(scratch / "run", 1)
    checkpoints.save(1, state, {"next_batch": 1})
    checkpoints.close()
    seconds = time.perf_counter() - start
    checkpoints = Checkpoints(scratch / "run", 1)
    restored = checkpoints.restore(state)
    checkpoints.close()
    if restored is None or not _same(restored[0], state) or restored[1] != {"next_batch": 1}:
        raise UserError(f"a checkpoint written to {scratch.parent} is not read back unchanged: use another disk")
    size = sum(x.nbytes for x in jax.tree.leaves((state.trained, state.ema, state.optimizer)))
    say(f"checkpoint  {gib(size)} written in {seconds:.1f} s, read back bit for bit")


def _same(a: Any, b: Any) -> bool:
    """Whether two trees with the same shardings are equal, compared shard by shard."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        np.array_equal(np.asarray(x.data), np.asarray(y.data))
        for p, q in pairs
        for x, y in zip(p.addressable_shards, q.addressable_shards, strict=True)
    )


def _clear(scratch: Path) -> None:
    if primary():
        shutil.rmtree(scratch, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("dry_run")
