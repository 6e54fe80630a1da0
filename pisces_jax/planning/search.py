"""The fastest way to run a config on a slice, and the smallest slice that it fits on.

Candidates that formulas rule out are dropped, and the others are ordered by the time that they should take, by formula
too. Only the first are compiled, since each takes minutes.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.planning import report
from pisces_jax.planning.compiled import Plan, abstract_trainer, plan_trainer, planned_program
from pisces_jax.planning.memory import main_part, memory_by_part
from pisces_jax.planning.roofline import AGAIN, axis_bandwidth, count, work
from pisces_jax.planning.slices import Slice, of_shape
from pisces_jax.sharding import batch_shards
from pisces_jax.training.step import Trainer
from pisces_jax.utils.chips import count_chips
from pisces_jax.utils.errors import UserError

TENSOR = (1, 2, 4, 8)
ACCUMULATE = (1, 2, 4)
REMAT = ("dots", "attention", "full")  # from fast to lean
# Share of the memory that the formulas may count too much, as they are rough: a candidate is dropped uncompiled only
# where it exceeds the chip's memory by more.
MARGIN = 0.15


def candidates(config: ConfigDict, devices: int, slices: int = 1) -> Iterator[ConfigDict]:
    """The same step on other meshes, with other accumulation and rematerialisation.

    The global batch stays what it is; slices are data-parallel.
    """
    for tensor in TENSOR:
        if devices % (slices * tensor):
            continue
        for accumulate in ACCUMULATE:
            for remat in REMAT:
                mesh = dict(data=slices, fsdp=devices // slices // tensor, tensor=tensor)
                yield _changed(config, mesh, accumulate, remat)


def _changed(config: ConfigDict, mesh: dict[str, int], accumulate: int, remat: str) -> ConfigDict:
    changed = config.copy_and_resolve_references()
    changed.mesh = ConfigDict(mesh)
    changed.optimizer.grad_accum_steps = accumulate
    changed.model[main_part(changed)].remat = remat
    return changed


def may_fit(trainer: Trainer, usable: float) -> bool:
    """Whether the formulas do not rule it out."""
    return sum(memory_by_part(trainer).values()) * (1 - MARGIN) <= usable


def cost(trainer: Trainer, where: Slice) -> tuple[float, ...]:
    """An order of preference, the best first.

    First come the seconds that products (with what is computed again) or the interconnect need, the greater of both, to
    two figures; then little tensor parallelism and few accumulation steps. Where no chip is known products count alone.
    """
    _, seconds = work(trainer)
    if where.chip is not None:
        traffic = sum(
            size / axis_bandwidth(where.chip, trainer.mesh, axis) for axis, size in wire_by_formula(trainer).items()
        )
        seconds = max(seconds / where.chip.flops, traffic)
    return float(f"{seconds:.1e}"), trainer.mesh.shape["tensor"], trainer.config.optimizer.grad_accum_steps


def wire_by_formula(trainer: Trainer) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axes.

    - fsdp: in each accumulation step a trained weight is gathered twice and its gradient scattered, and a frozen one
      that runs is gathered once;
    - tensor: a block of the language model gathers and scatters its positions, four times in each pass;
    - data: what fsdp has scattered is summed.
    """
    config, mesh = trainer.config, trainer.mesh
    tensor, sharded = mesh.shape["tensor"], mesh.shape["fsdp"] * mesh.shape["fsdp_inner"]
    item = jnp.dtype(config.compute_dtype).itemsize
    by_part, _ = work(trainer)
    # An encoder whose features are cached does not run.
    frozen = {part: tree for part, tree in trainer.abstract.frozen.items() if by_part.get(part)}
    steps, trained = config.optimizer.grad_accum_steps, count(trainer.abstract.trained)
    weights = 3 * trained + count(frozen)
    wire = {
        "fsdp+fsdp_inner": steps * weights * item * (1 - 1 / sharded) / tensor,
        "tensor": 0.0,
        "data": 2 * steps * trained * item * (1 - 1 / mesh.shape["data"]) / sharded / tensor,
    }
    if (part := main_part(config)) == "language_model":
        language = config.model[part]
        positions = config.batch_size * config.data.row_length / batch_shards(mesh)
        passes = 2 + 3 * AGAIN[language.get("remat", "none")]  # forward, backward, and forward again
        wire["tensor"] = 4 * passes * language.layers * positions * language.width * item * (1 - 1 / tensor)
    return wire


def search(config: ConfigDict, where: Slice, vocab_size: int, say: Callable[[str], None], most: int = 4) -> list[Plan]:
    """Compiles the `most` candidates that are the fastest by formula. The plans that fit come first, by their time.

    Raises:
        UserError: no candidate fits by formula, or none divides the batch.
    """
    usable = where.chip.usable_bytes if where.chip else math.inf
    ranked: list[tuple[tuple[float, ...], Trainer]] = []
    reason = ""
    for candidate in candidates(config, len(where.devices), where.slices):
        try:
            trainer = abstract_trainer(candidate, where, vocab_size)
        except UserError as error:
            reason = f": {error}"
            continue
        if may_fit(trainer, usable):
            ranked.append((cost(trainer, where), trainer))
    if not ranked:
        raise UserError(f"--search: no mesh of {where.name} holds this step{reason}")
    ranked.sort(key=lambda item: item[0])
    plans: list[Plan] = []
    for number, (_, trainer) in enumerate(ranked[:most], 1):
        plan = plan_trainer(trainer, where)
        plans.append(plan)
        say(
            f"{number} of {min(most, len(ranked))}: {plan.mesh}, {plan.grad_accum_steps} accumulation steps, "
            f"remat {plan.remat}: {'fits' if plan.fits else 'does not fit'}"
        )
    return sorted(plans, key=lambda p: (not p.fits, p.bound_seconds or math.inf))


def smallest_slice(config: ConfigDict, near: Slice, vocab_size: int, say: Callable[[str], None]) -> Plan | None:
    """The smallest slice of the same chip as `near`'s on which the step fits, with as little memory as it can use.

    Slices that the formulas rule out, or whose chips do not divide the batch, are not compiled. None: it does not fit
    on the largest slice either.
    """
    if near.chip is None:
        return None
    program = planned_program(config, vocab_size)
    items = program.batch_items(config)
    for shape in near.chip.shapes:
        devices = count_chips(shape)
        if items % devices:
            continue
        where = of_shape(near, shape)
        steps = items // devices if program.divisible else 1
        lean = _changed(config, dict(data=1, fsdp=devices, tensor=1), steps, "full")
        trainer = abstract_trainer(lean, where, vocab_size)
        if not may_fit(trainer, near.chip.usable_bytes):
            continue
        plan = plan_trainer(trainer, where)
        say(f"{where.name}: {'fits' if plan.fits else 'does not fit'}")
        if plan.fits:
            return plan
    return None


def search_and_report(config: ConfigDict, where: Slice, vocab_size: int, say: Callable[[str], None]) -> dict[str, Any]:
    """What `plan --search` says, and the plans behind it: the best that fits, the smallest slice's and all tried.

    Raises:
        UserError: as `search`.
    """
    plans = search(config, where, vocab_size, say)
    chosen = next((p for p in plans if p.fits), None)
    say("\n" + report.table(plans) + "\n")
    if chosen is not None:
        say(f"best that fits:\n{report.describe(chosen)}\nset: {report.settings(chosen)}")
    else:
        nearest = min(plans, key=lambda p: p.peak_bytes)
        say(f"none of these fits; the nearest:\n{report.describe(nearest)}")
    smallest = None
    if where.chip is not None:
        smallest = smallest_slice(config, where, vocab_size, say)
        say(
            "smallest that fits: "
            + (f"{smallest.topology}, set: {report.settings(smallest)}" if smallest else "none that was tried")
        )
    return {
        "best": chosen.to_json() if chosen else None,
        "smallest": smallest.to_json() if smallest else None,
        "tried": [plan.to_json() for plan in plans],
    }
