"""One run from start to end, written to be read from top to bottom: mesh, input, program, state, loop."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict
from tqdm import tqdm

from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.sharding import batch_share, make_mesh
from pisces_jax.training import flops, input, optimizer
from pisces_jax.training.checkpoints import Checkpoints, load_part
from pisces_jax.training.config import part_settings
from pisces_jax.training.find_nan import first_not_finite
from pisces_jax.training.health import Events, Health, not_finite, skipped
from pisces_jax.training.metrics import Clock, Writer, check_finite, merge
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.base import check_batch
from pisces_jax.training.run_folder import check_run, is_finished, locked, open_run
from pisces_jax.training.saving import Saver, reported
from pisces_jax.training.step import State, Trainer, make_trainer
from pisces_jax.training.steps import Keep, finished_step, of_first_process, saved_steps
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.cli import say
from pisces_jax.utils.errors import Preempted, UserError
from pisces_jax.utils.files import write_atomic
from pisces_jax.utils.processes import barrier, primary
from pisces_jax.utils.stopping import Stop, listening
from pisces_jax.weights.folder import Folder, read_part
from pisces_jax.weights.sources import is_folder

log = logging.getLogger(__name__)
MEASURED_BATCHES = 8  # that statistics of the data are measured on (`Program.measure`)
PROFILE_AFTER = 5  # steps before a trace begins: the first ones compile and fill caches
# (state, path) -> picture uint8 [H, W, 3]; also written to the path.
Sampler = Callable[[State, Path], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user says beside the config, for this time.

    Attributes:
        allow_changes: config keys that may differ from those that the run was started with; they replace them.
        fallback: a folder on other storage, which takes the state where the run's own storage fails for good.
        debug_nans: look at every step, and name the first layer whose output is not finite.
    """

    allow_changes: tuple[str, ...] = ()
    fallback: Path | None = None
    debug_nans: bool = False


NOTHING_ELSE = Options()


def train(
    config: ConfigDict, workdir: Path, make_sampler: Callable[..., Sampler] | None = None,
    options: Options = NOTHING_ELSE,
) -> None:  # fmt: skip
    """Trains one run in WORKDIR/NAME, from its latest checkpoint if it has one; returns at once if it is finished.

    Args:
        make_sampler: makes the function that draws sample pictures (`inference/samples.py`), for `log.samples_every`.

    Raises:
        UserError: whatever the user can fix; what is in the folder stays as it was.
        Preempted: the run was asked to stop, and has saved.
    """
    changed = check_run(workdir, config, options.allow_changes)
    if is_finished(workdir / config.name, content=True) and not _owed(workdir / config.name):
        say(f"{config.name}: finished already ({config.steps} steps)")
        return
    with listening() as stop:
        if stop.asked:
            raise Preempted
        with locked(workdir / config.name):
            _train(config, workdir, make_sampler, options, changed, stop)


def _train(
    config: ConfigDict, workdir: Path, make_sampler: Callable[..., Sampler] | None, options: Options,
    changed: Mapping[str, tuple[Any, Any]], stop: Stop,
) -> None:  # fmt: skip
    mesh = make_mesh(**config.mesh)
    tokenizer = load_tokenizer(config, workdir)
    program = make_program(config, tokenizer.vocab_size)
    trainer = make_trainer(program, config, mesh)
    trained = set(trainer.shardings.trained)
    # A checkpoint is looked for first: what it holds is not read from elsewhere. Without one, nothing is written yet.
    checkpoints, restored = None, None
    if of_first_process(len(saved_steps(workdir / config.name))):
        run = open_run(workdir, config, options.allow_changes)
        checkpoints = open_checkpoints(run, config, program)
        restored = checkpoints.restore(trainer.on_mesh())
    parts = starting_parts(config, workdir, trainer, tokenizer, frozen_alone=restored is not None)
    for fallback in trainer.fallbacks:
        log.warning("%s", fallback)

    spec = program.batch_spec(config)
    share = batch_share(mesh, trainer.items)
    train_iterator = input.train_iterator(config, tokenizer, program, workdir, share)
    held_out = None
    if config.data.evaluate:
        held_out = HeldOut(trainer, input.evaluate_iterator(config, tokenizer, program, workdir, share))
    sampler = None
    if config.log.samples_every and jax.process_count() > 1:
        log.warning("%s: no sample pictures in runs of several processes: draw from a checkpoint", config.name)
    elif config.log.samples_every:
        if make_sampler is None:
            raise ValueError("log.samples_every is set: pass make_sampler")
        sampler = make_sampler(config, workdir, tokenizer, program)
    run = open_run(workdir, config, options.allow_changes)
    checkpoints = checkpoints or open_checkpoints(run, config, program)
    key = jax.random.key(config.seed)
    start, in_a_row = 0, 0
    if restored is not None:
        state, position = restored
        measured = {part: state.frozen[part] for part in program.measured}
        state = dataclasses.replace(state, frozen=trainer.frozen(key, {**parts, **measured}))
        train_iterator.set_state(position)
        # Every step takes a batch, and those that change the state are counted in it.
        start, in_a_row = int(position["next_batch"]), int(position.get("skipped_in_a_row", 0))
    else:
        if todo := [part for part in program.measured if part not in parts]:
            log.info("%s: measuring %s", config.name, ", ".join(todo))
            batches = [trainer.put(next(train_iterator)) for _ in range(MEASURED_BATCHES)]
            parts |= program.measure(parts, batches)
            train_iterator.set_state({"next_batch": 0})
        state = trainer.init(key, parts)
        overview = parameter_overview.get_parameter_overview(
            optimizer.join(state.trained, state.frozen), include_stats=False
        )
        if primary():
            (run / "parameters.txt").write_text(overview + "\n")
    events = Events(run, start)
    for name, (before, now) in changed.items():
        events(start, Events.BY_USER, key=name, before=before, now=now)
    writer = Writer(run, start, tensorboard=config.log.tensorboard)
    health = Health(config.limits, program.weights, events, lambda n: train_iterator.describe(n - 1), in_a_row)
    saver = Saver(checkpoints, config, run, options.fallback)
    step = trainer.train_step()
    peak = flops.peak_flops()

    pending: list[tuple[int, Any]] = []
    clock = Clock()
    number = last_step = start
    last_time = time.perf_counter()
    save_is_due = False
    gone_back_to = -1
    work = flops.step_flops(program, spec, trained)
    bar = tqdm(
        total=config.steps, initial=start, desc=config.name, unit="step", mininterval=1.0, dynamic_ncols=True,
        disable=not primary(),
    )  # fmt: skip

    def look_aside(number: int, always: bool) -> bool:
        """Evaluates and draws samples, if they are due after this step; False if the run is to stop meanwhile."""
        if held_out and (_due(number, config.log.evaluate_every) or always):
            with clock("evaluation"):
                values = held_out(state, number, events, stop)
            if values is None:
                return False
            writer.scalars(number, {f"val/{k}": v for k, v in values.items()})
        if sampler and (_due(number, config.log.samples_every) or always):
            path = run / "samples" / f"{number:07d}.png"
            with clock("samples"), jax.transfer_guard("allow"), reported(config.name, f"samples of step {number}"):
                writer.picture(number, "samples", sampler(state, path))
        return True

    # Whatever ends the loop, a checkpoint that is being written is finished first. Nothing is copied between host and
    # devices but what the loop names: a copy per step that nobody meant would be slow and silent.
    guard = jax.transfer_guard("disallow")
    with (
        guard, stop.working(config.limits.step_seconds), bar, closing(saver), closing(train_iterator), closing(writer)
    ):  # fmt: skip
        stopping = False
        if start and _owed(run) == start:
            stopping = not look_aside(start, start == config.steps)
        _owe(run, None if not stopping else start)
        while number < config.steps and not stopping:
            number += 1
            with clock("input"):
                batch = next(train_iterator)
            check_batch(spec, batch, share[1])
            if config.profile and number == start + 1 + min(PROFILE_AFTER, config.steps - start - 1):
                jax.profiler.start_trace(run / "profile")
            if number not in config.data.leave_out:
                # The first call of this process waits for the compiler.
                compiling = clock("compilation") if number == start + 1 else nullcontext()
                with compiling, jax.profiler.StepTraceAnnotation("train", step_num=number):
                    state, metrics = step(state, trainer.put(batch))
                pending.append((number, metrics))
                if options.debug_nans and any(v.total for v in skipped(jax.device_get(metrics)).values()):
                    with jax.transfer_guard("allow"):
                        log.warning("step %d: %s", number, first_not_finite(trainer, state, trainer.put(batch)))
            stop.begun()
            if config.profile and number == min(start + PROFILE_AFTER + config.profile, config.steps):
                jax.block_until_ready(state)
                jax.profiler.stop_trace()
            bar.update()
            saver.look()
            last = number == config.steps
            stopping = stop.reached()
            logs = _due(number, config.log.every) or last or stopping
            aside = last or any(_due(number, e) for e in (config.log.evaluate_every, config.log.samples_every))
            save_is_due |= _due(number, config.log.checkpoint_every) or last or stopping
            if not (logs or aside or save_is_due):
                continue
            bad = health.look(pending)
            pending = []
            if bad is not None:
                if stopping:  # the same command takes these steps again, and decides the same
                    break
                saver.settle()
                with jax.transfer_guard("allow"):
                    restored = checkpoints.restore(state)
                if restored is None or restored[1]["next_batch"] == gone_back_to:
                    raise health.report(bad, restored is not None)
                state, gone_back_to = restored[0], restored[1]["next_batch"]
                number = last_step = bad
                last_time = time.perf_counter()
                train_iterator.set_state({"next_batch": bad})
                health.went_back(bad, gone_back_to)
                bar.n = bad
                continue
            if logs:
                window, counts = health.window()
                values = merge(window)
                check_finite(values, last_step, number)
                seconds = (time.perf_counter() - last_time) / (number - last_step)
                values |= counts | {
                    "seconds_per_step": seconds,
                    "examples_per_second": program.examples(batch) * share[1] / seconds,
                    "mfu": work / seconds / peak,
                    **clock.shares(),
                }
                writer.scalars(number, {f"train/{k}": v for k, v in values.items()})
                bar.set_postfix({k: f"{values[k]:.3g}" for k in program.weights if k in values}, refresh=False)
            owed = False
            if aside and not stopping:
                stopping = owed = not look_aside(number, last)
            elif aside:
                owed = True
            save_is_due |= stopping
            # In the midst of bad steps the checkpoint from before them stays, unless the run ends here.
            if save_is_due and (not health.in_a_row or last or stopping):
                check_finite(health.since(), last_step, number)  # a saved state replaces a good one
                position = train_iterator.get_state()
                if health.in_a_row:
                    position["skipped_in_a_row"] = health.in_a_row
                if owed:
                    _owe(run, number)
                with clock("checkpoint"):
                    saver.save(number, state, position, last=last or stopping)
                save_is_due = False
            if logs:
                last_step, last_time = number, time.perf_counter()
    if train_iterator.broken:
        log.warning("%s: %s", config.name, train_iterator.report())
    barrier("saved")  # the first process finishes checkpoints for all
    if trouble := saver.summary():
        log.warning("%s: %s", config.name, trouble)
    if finished_step(run) < config.steps or _owed(run):
        raise Preempted


def open_checkpoints(run: Path, config: ConfigDict, program: Any) -> Checkpoints:
    """The checkpoints of a run, kept as its config says."""
    return Checkpoints(run, Keep(config.log.keep, config.log.keep_every, config.log.keep_best), program.measured)


def starting_parts(
    config: ConfigDict, workdir: Path, trainer: Trainer, tokenizer: Tokenizer, frozen_alone: bool = False
) -> dict[str, Any]:
    """The parts that start from other runs' weights or from published folders, each shard where it belongs.

    Args:
        frozen_alone: of these parts, the frozen parameters alone: a checkpoint has the others.

    Raises:
        UserError: such a run or folder is missing, unfinished or of other shapes, or a frozen part has nothing to start
            from.
    """
    on_mesh = trainer.on_mesh()
    like, frozen = optimizer.join(on_mesh.trained, on_mesh.frozen), on_mesh.frozen
    parts = {}
    for part, source in config.init_from.items():
        if part not in like:
            raise UserError(f"config key init_from.{part}: the model's parts are {', '.join(like)}")
        only = None
        if frozen_alone:
            if part not in frozen or part in trainer.program.measured:
                continue
            only = set(optimizer.flatten(frozen[part]))
        if is_folder(source):
            folder = Folder.open(source, part)
            folder.check(part_settings(config, part, tokenizer.vocab_size), f"model.{part}", tokenizer.own_size)
            parts[part] = read_part(
                folder, like[part], vocab_size=tokenizer.vocab_size, own_tokens=tokenizer.own_size, only=only,
                shardings=jax.tree.map(lambda x: x.sharding, like[part]),
                dtype=jax.tree.map(lambda x: x.dtype, like[part]), doing=f"reading {part}",
            )  # fmt: skip
        else:
            parts[part] = load_part(workdir, source, part, like[part], only)
    for part in trainer.abstract.frozen:
        if part not in {*config.init_from, *trainer.program.measured} and part not in trainer.abstract.trained:
            raise UserError(
                f"part {part} is frozen and starts from random numbers: name the run or folder that it comes from in "
                f"init_from.{part}"
            )
    return parts


class HeldOut:
    """Losses on held-out data: the same batches every time."""

    def __init__(self, trainer: Trainer, iterator: Any) -> None:
        self._trainer, self._iterator, self._step = trainer, iterator, trainer.evaluate_step()

    def __call__(self, state: State, number: int, events: Events, stop: Stop) -> dict[str, float] | None:
        """The losses after step `number`, without batches whose losses are not finite: those are reported, and counted
        as `skipped`. None if the run is to stop before they are known."""
        self._iterator.set_state({"next_batch": 0})
        measured = []
        with closing(self._iterator):
            for batch in self._iterator:
                measured.append(self._step(state, self._trainer.put(batch)))
                if stop.reached():
                    return None
        measured = jax.device_get(measured)
        bad = {b: found for b, m in enumerate(measured) if (found := not_finite(m))}
        for b, found in bad.items():
            examples = functools.partial(self._iterator.describe, b)
            events.report(number, "held_out", f"held-out batch {b + 1}", found, examples)
        values = merge([m for b, m in enumerate(measured) if b not in bad])
        return values | ({"skipped": float(len(bad))} if bad else {})


def _due(number: int, every: int) -> bool:
    return bool(every) and number % every == 0


# A run that was stopped in the midst of an evaluation has saved the step, and owes the evaluation.
def _owed(run: Path) -> int:
    try:
        return int((run / "owed").read_text())
    except (OSError, ValueError):
        return 0


def _owe(run: Path, step: int | None) -> None:
    if primary():
        with reported(run.name, "the note of an evaluation that is to be made up"):
            if step is None:
                (run / "owed").unlink(missing_ok=True)
            else:
                write_atomic(run / "owed", str(step))
