"""The best way to run a config on a slice, and the smallest slice that it fits on at all.

Candidates that formulas rule out are dropped and the others ordered by how long they should take, by formula too; only
the first are compiled, since each costs minutes.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.planning.compiled import VOCABULARY, Plan, abstract_trainer, main_part, plan_trainer, work
from pisces_jax.planning.memory import memory_by_part
from pisces_jax.planning.roofline import AGAIN, axis_bandwidth, count
from pisces_jax.planning.slices import CHIPS, Slice, chips, find_slice, read_name
from pisces_jax.sharding import MESH_AXES, batch_shards
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import Trainer
from pisces_jax.utils.errors import UserError

TENSOR = (1, 2, 4, 8)
REMAT = ("dots", "attention", "full")  # from fast to lean
# Beside what the formulas count, a step holds gathered weights, logits and what the compiler keeps: as a share of the
# memory, and what may be missing from the formulas before a candidate is given up uncompiled.
MARGIN = 0.15


def candidates(config: ConfigDict, devices: int, slices: int = 1) -> Iterator[ConfigDict]:
    """The same step on other meshes and with other rematerialisation: the global batch stays what it is, and slices
    are data-parallel."""
    for tensor in TENSOR:
        if devices % (slices * tensor):
            continue
        for accumulate in (1, 2, 4):
            for remat in REMAT:
                changed = config.copy_and_resolve_references()
                changed.mesh = ConfigDict(dict(data=slices, fsdp=devices // slices // tensor, tensor=tensor))
                changed.optimizer.grad_accum_steps = accumulate
                changed.model[main_part(changed)].remat = remat
                yield changed


def estimate(trainer: Trainer) -> int:
    """Bytes a device by formula."""
    return sum(memory_by_part(trainer).values())


def cost(trainer: Trainer, where: Slice) -> tuple[float, ...]:
    """An order of preference: the seconds that products (with what is computed again) or the interconnect need, the
    greater, to two figures; then little tensor parallelism, few parts. Where no chip is known, by products alone.
    """
    _, seconds = work(trainer)
    if where.chip is not None:
        devices, wire = trainer.mesh.devices, wire_by_formula(trainer)
        traffic = sum(size / axis_bandwidth(where.chip, devices, MESH_AXES, axis) for axis, size in wire.items())
        seconds = max(seconds / where.chip.flops, traffic)
    return float(f"{seconds:.1e}"), trainer.mesh.shape["tensor"], trainer.config.optimizer.grad_accum_steps


def wire_by_formula(trainer: Trainer) -> dict[str, float]:
    """Bytes that a device sends in a step, by mesh axes. Over fsdp a trained weight is gathered twice and its gradient
    scattered, a frozen one that runs gathered once, in each part of an accumulated batch; over tensor a block of the
    language model gathers and scatters its positions, four times in each pass; over data what fsdp has scattered is
    summed.
    """
    config, mesh = trainer.config, trainer.mesh
    tensor, sharded = mesh.shape["tensor"], mesh.shape["fsdp"] * mesh.shape["fsdp_inner"]
    item = jnp.dtype(config.compute_dtype).itemsize
    by_part, _ = work(trainer)
    # An encoder whose features are cached does not run.
    frozen = {part: tree for part, tree in trainer.abstract.frozen.items() if by_part.get(part)}
    parts, trained = config.optimizer.grad_accum_steps, count(trainer.abstract.trained)
    weights = 3 * trained + count(frozen)
    wire = {
        "fsdp+fsdp_inner": parts * weights * item * (1 - 1 / sharded) / tensor,
        "tensor": 0.0,
        "data": 2 * parts * trained * item * (1 - 1 / mesh.shape["data"]) / sharded / tensor,
    }
    if (part := main_part(config)) == "language_model":
        language = config.model[part]
        positions = config.batch_size * config.data.row_length / batch_shards(mesh)
        passes = 2 + 3 * AGAIN[language.get("remat", "none")]  # forward, backward, and forward again
        wire["tensor"] = 4 * passes * language.layers * positions * language.width * item * (1 - 1 / tensor)
    return wire


def search(config: ConfigDict, where: Slice, vocab_size: int, say: Callable[[str], None], most: int = 4) -> list[Plan]:
    """Compiles the likeliest candidates, the fastest by formula first, until `most` are done; the best that fits first.

    Raises:
        UserError: none of them divides the batch.
    """
    hbm = where.chip.hbm_bytes if where.chip else math.inf
    ranked: list[tuple[tuple[float, ...], Trainer]] = []
    reason = ""
    for candidate in candidates(config, len(where.devices), where.slices):
        try:
            trainer = abstract_trainer(candidate, where, vocab_size)
        except UserError as error:
            reason = str(error)
            continue
        if estimate(trainer) * (1 - MARGIN) <= hbm:
            ranked.append((cost(trainer, where), trainer))
    if not ranked:
        raise UserError(f"--search: no mesh of {where.name} holds this step{f': {reason}' if reason else ''}")
    ranked.sort(key=lambda item: item[0])
    plans: list[Plan] = []
    for number, (_, trainer) in enumerate(ranked[:most], 1):
        plan = plan_trainer(trainer, where)
        plans.append(plan)
        fits = "fits" if plan.fits else "does not fit"
        say(f"{number} of {min(most, len(ranked))}: {plan.mesh}, "
            f"{trainer.config.optimizer.grad_accum_steps} accumulation steps, "
            f"remat {plan.remat}: {fits}")  # fmt: skip
    return sorted(plans, key=lambda p: (not p.fits, p.predicted_step_seconds or math.inf))


def smallest_slice(config: ConfigDict, topology: str, vocab_size: int, say: Callable[[str], None]) -> Plan | None:
    """The smallest slice of the same chip that the step fits on, as lean as it can be; None if not even the largest
    of `CHIPS`.

    Slices that the formulas rule out, or whose chips do not divide the batch, are not compiled.
    """
    kind, _ = read_name(topology)
    program = make_program(config, vocab_size or config.data.tokenizer_vocabulary or VOCABULARY)
    items = program.batch_items(config)
    for shape in sorted(CHIPS[kind].shapes, key=chips):
        where = find_slice(f"{kind}:{shape}")
        devices = len(where.devices)
        lean = config.copy_and_resolve_references()
        lean.mesh = ConfigDict(dict(data=1, fsdp=devices, tensor=1))
        if items % devices:
            continue
        lean.optimizer.grad_accum_steps = items // devices if program.divisible else 1
        lean.model[main_part(lean)].remat = "full"
        trainer = abstract_trainer(lean, where, vocab_size)
        if estimate(trainer) * (1 - MARGIN) > CHIPS[kind].hbm_bytes:
            continue
        plan = plan_trainer(trainer, where)
        say(f"{where.name}: {'fits' if plan.fits else 'does not fit'}")
        if plan.fits:
            return plan
    return None


def best(plans: Sequence[Plan]) -> Plan | None:
    return next((p for p in plans if p.fits), None)
