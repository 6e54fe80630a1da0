"""One run from start to end, written to be read from top to bottom: mesh, input, program, state, loop."""

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.sharding import batch_share, make_mesh
from pisces_jax.training import flops, input, optimizer
from pisces_jax.training.checkpoints import Checkpoints, check_run, finished_step, is_finished, load_part, open_run
from pisces_jax.training.config import part_settings
from pisces_jax.training.metrics import Clock, Writer, check_finite, merge
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.base import check_batch
from pisces_jax.training.step import State, Trainer, make_trainer
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.cli import say
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.processes import primary
from pisces_jax.weights.folder import Folder, read_part
from pisces_jax.weights.sources import is_folder

log = logging.getLogger(__name__)
MEASURED_BATCHES = 8  # that statistics of the data are measured on (`Program.measure`)
PROFILE_AFTER = 5  # steps before a trace begins: the first ones compile and fill caches
# (state, path) -> picture uint8 [H, W, 3]; also written to the path.
Sampler = Callable[[State, Path], np.ndarray]


def train(config: ConfigDict, workdir: Path, make_sampler: Callable[..., Sampler] | None = None) -> None:
    """Trains one run in WORKDIR/NAME, from its latest checkpoint if it has one; returns at once if it is finished.

    Args:
        make_sampler: makes the function that draws sample pictures (`inference/samples.py`), for `log.samples_every`.

    Raises:
        UserError: whatever the user can fix; what is in the folder stays as it was.
    """
    check_run(workdir, config)
    if is_finished(workdir / config.name):
        say(f"{config.name}: finished already ({config.steps} steps)")
        return
    mesh = make_mesh(**config.mesh)
    tokenizer = load_tokenizer(config, workdir)
    program = make_program(config, tokenizer.vocab_size)
    trainer = make_trainer(program, config, mesh)
    trained = set(trainer.shardings.trained)
    parts = starting_parts(config, workdir, trainer, tokenizer)
    for fallback in trainer.fallbacks:
        log.warning("%s", fallback)

    spec = program.batch_spec(config)
    share = batch_share(mesh, trainer.items)
    train_iterator = input.train_iterator(config, tokenizer, program, workdir, share)
    evaluate = _evaluation(config, tokenizer, program, trainer, workdir, share)
    sampler = None
    if config.log.samples_every and jax.process_count() > 1:
        log.warning("%s: no sample pictures in runs of several processes: draw from a checkpoint", config.name)
    elif config.log.samples_every:
        if make_sampler is None:
            raise ValueError("log.samples_every is set: pass make_sampler")
        sampler = make_sampler(config, workdir, tokenizer, program)
    run = open_run(workdir, config)
    if todo := [part for part in program.measured if part not in parts and not finished_step(run)]:
        log.info("%s: measuring %s", config.name, ", ".join(todo))
        batches = [trainer.put(next(train_iterator)) for _ in range(MEASURED_BATCHES)]
        parts |= program.measure(parts, batches)
        train_iterator.set_state({"next_batch": 0})
    state = trainer.init(jax.random.key(config.seed), parts)
    checkpoints = Checkpoints(run, config.log.keep, program.measured)
    if restored := checkpoints.restore(state):
        state, position = restored
        train_iterator.set_state(position)
    else:
        overview = parameter_overview.get_parameter_overview(
            optimizer.join(state.trained, state.frozen), include_stats=False
        )
        if primary():
            (run / "parameters.txt").write_text(overview + "\n")
    start = int(state.step)
    writer = Writer(run, start, tensorboard=config.log.tensorboard)
    step = trainer.train_step()
    peak = flops.peak_flops()

    pending: list[Any] = []
    clock = Clock()
    last_step, last_time = start, time.perf_counter()
    work = flops.step_flops(program, spec, trained)
    bar = tqdm(
        total=config.steps, initial=start, desc=config.name, unit="step", mininterval=1.0, dynamic_ncols=True,
        disable=not primary(),
    )  # fmt: skip
    # Whatever ends the loop, a checkpoint that is being written is finished first. Nothing is copied between host and
    # devices but what the loop names: a copy per step that nobody meant would be slow and silent.
    guard = jax.transfer_guard("disallow")
    with guard, _signals() as stop, bar, closing(checkpoints), closing(train_iterator), closing(writer):
        for number in range(start + 1, config.steps + 1):
            with clock("input"):
                batch = next(train_iterator)
            check_batch(spec, batch, share[1])
            if config.profile and number == start + 1 + min(PROFILE_AFTER, config.steps - start - 1):
                jax.profiler.start_trace(run / "profile")
            # The first call of this process waits for the compiler.
            compiling = clock("compilation") if number == start + 1 else nullcontext()
            with compiling, jax.profiler.StepTraceAnnotation("train", step_num=number):
                state, metrics = step(state, trainer.put(batch))
            if config.profile and number == min(start + PROFILE_AFTER + config.profile, config.steps):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            pending.append(metrics)
            bar.update()
            last = number == config.steps
            stopping = stop(number)
            if _due(number, config.log.every) or last or stopping:
                values = merge(pending)
                check_finite(values, last_step, number)
                seconds = (time.perf_counter() - last_time) / (number - last_step)
                values |= {
                    "seconds_per_step": seconds,
                    "examples_per_second": program.examples(batch) * share[1] / seconds,
                    "mfu": work / seconds / peak,
                    **clock.shares(),
                }
                writer.scalars(number, {f"train/{k}": v for k, v in values.items()})
                bar.set_postfix({k: f"{values[k]:.3g}" for k in program.weights if k in values}, refresh=False)
                pending = []
            if evaluate and (_due(number, config.log.evaluate_every) or last):
                with clock("evaluation"):
                    held_out = evaluate(state)
                check_finite(held_out, number, number)
                writer.scalars(number, {f"val/{k}": v for k, v in held_out.items()})
            if sampler and (_due(number, config.log.samples_every) or last):
                with clock("samples"), jax.transfer_guard("allow"):
                    writer.picture(number, "samples", sampler(state, run / "samples" / f"{number:07d}.png"))
            if _due(number, config.log.checkpoint_every) or last or stopping:
                check_finite(merge(pending), last_step, number)  # a saved state replaces a good one
                with clock("checkpoint"):
                    checkpoints.save(number, state, train_iterator.get_state())
            if not pending:
                last_step, last_time = number, time.perf_counter()
            if stopping and not last:
                break
    if train_iterator.broken:
        log.warning("%s: %s", config.name, train_iterator.report())
    if finished_step(run) < config.steps:
        raise KeyboardInterrupt


def starting_parts(config: ConfigDict, workdir: Path, trainer: Trainer, tokenizer: Tokenizer) -> dict[str, Any]:
    """The parts that start from other runs' weights (host arrays) or from published folders (already sharded).

    Raises:
        UserError: such a run or folder is missing, unfinished or of other shapes, or a frozen part has nothing to start
            from.
    """
    shapes = optimizer.join(trainer.abstract.trained, trainer.abstract.frozen)
    shardings = optimizer.join(trainer.shardings.trained, trainer.shardings.frozen)
    parts = {}
    for part, source in config.init_from.items():
        if part not in shapes:
            raise UserError(f"config key init_from.{part}: the model's parts are {', '.join(shapes)}")
        if is_folder(source):
            folder = Folder.open(source, part)
            folder.check(part_settings(config, part, tokenizer.vocab_size), f"model.{part}", tokenizer.own_size)
            parts[part] = read_part(
                folder, shapes[part], vocab_size=tokenizer.vocab_size, own_tokens=tokenizer.own_size,
                shardings=shardings[part], dtype=jax.tree.map(lambda x: x.dtype, shapes[part]), doing=f"reading {part}",
            )  # fmt: skip
            continue
        tree = load_part(workdir, source, part)
        wanted, got = optimizer.flatten(shapes[part]), optimizer.flatten(tree)
        wrong = [
            f"{part}/{k} {getattr(got.get(k), 'shape', 'missing')} for {getattr(wanted.get(k), 'shape', 'nothing')}"
            for k in sorted({*wanted, *got})
            if getattr(got.get(k), "shape", None) != getattr(wanted.get(k), "shape", None)
        ]
        if wrong:
            raise UserError(f"{workdir / source} does not fit model.{part}: {'; '.join(wrong)}")
        parts[part] = jax.tree.map(lambda x, a: np.asarray(x).astype(a.dtype, copy=False), tree, shapes[part])
    for part in trainer.abstract.frozen:
        if part not in {*config.init_from, *trainer.program.measured} and part not in trainer.abstract.trained:
            raise UserError(
                f"part {part} is frozen and starts from random numbers: name the run or folder that it comes from in "
                f"init_from.{part}"
            )
    return parts


def _evaluation(
    config: ConfigDict, tokenizer: Any, program: Any, trainer: Trainer, workdir: Path, share: tuple[int, int]
) -> Callable[[State], dict[str, float]] | None:
    """Losses on held-out data: the same batches every time."""
    if not config.data.evaluate:
        return None
    step = trainer.evaluate_step()
    iterator = input.evaluate_iterator(config, tokenizer, program, workdir, share)

    def evaluate(state: State) -> dict[str, float]:
        iterator.set_state({"next_batch": 0})
        values = merge([step(state, trainer.put(batch)) for batch in iterator])
        iterator.close()
        return values

    return evaluate


def _due(number: int, every: int) -> bool:
    return bool(every) and number % every == 0


@contextmanager
def _signals() -> Iterator[Callable[[int], bool]]:
    """Whether the run was asked to stop: it then saves and stops after the current step.

    With several processes any one may get the signal: JAX's own handler for SIGTERM makes them agree on a step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    previous = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda step: bool(asked)
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)
