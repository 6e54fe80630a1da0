"""The best way to run a config on a slice, and the smallest slice that it fits on at all.

Candidates are ordered by formula (what they would hold and how long they would take); only the promising ones are
compiled, since each costs minutes.
"""

import math
from collections.abc import Callable, Iterator, Sequence

from ml_collections import ConfigDict

from pisces_jax.errors import UserError
from pisces_jax.planning.compiled import Plan, abstract_trainer, plan_trainer
from pisces_jax.planning.memory import memory_by_part
from pisces_jax.planning.slices import CHIPS, Slice, chips, find_slice, read_name
from pisces_jax.training.step import Trainer

TENSOR = (1, 2, 4, 8)
REMAT = ("projections", "context", "nothing")  # from fast to lean
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
                changed.optimizer.accumulate = accumulate
                if "language_model" in changed.model:
                    changed.model.language_model.remat = remat
                yield changed
                if "language_model" not in changed.model:
                    break


def estimate(trainer: Trainer) -> int:
    """Bytes a device by formula."""
    return sum(memory_by_part(trainer).values())


def _cost(config: ConfigDict) -> tuple[float, ...]:
    """An order of preference: little computed again, little tensor parallelism, few parts."""
    language = config.model.get("language_model", {})
    again = REMAT.index(language.get("remat", "nothing")) if language else 0
    return (config.mesh.tensor, config.optimizer.accumulate, again)


def search(
    config: ConfigDict, where: Slice, vocab_size: int, say: Callable[[str], None], most: int = 4
) -> list[Plan]:
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
            ranked.append((_cost(candidate), trainer))
    if not ranked:
        raise UserError(f"--search: no mesh of {where.name} holds this step{f': {reason}' if reason else ''}")
    ranked.sort(key=lambda item: item[0])
    plans: list[Plan] = []
    for number, (_, trainer) in enumerate(ranked[:most], 1):
        plan = plan_trainer(trainer, where)
        plans.append(plan)
        fits = "fits" if plan.fits else "does not fit"
        say(f"{number} of {min(most, len(ranked))}: {plan.mesh}, accumulate {trainer.config.optimizer.accumulate}, "
            f"remat {plan.remat}: {fits}")  # fmt: skip
    return sorted(plans, key=lambda p: (not p.fits, p.predicted_step_seconds or math.inf))


def smallest_slice(config: ConfigDict, topology: str, vocab_size: int, say: Callable[[str], None]) -> Plan | None:
    """The smallest slice of the same chip that the step fits on, as lean as it can be; None if not even the largest
    of `CHIPS`.

    Slices that the formulas rule out, or whose chips do not divide the batch, are not compiled.
    """
    kind, _ = read_name(topology)
    for shape in sorted(CHIPS[kind].shapes, key=chips):
        where = find_slice(f"{kind}:{shape}")
        devices = len(where.devices)
        lean = config.copy_and_resolve_references()
        lean.mesh = ConfigDict(dict(data=1, fsdp=devices, tensor=1))
        groups = config.batch_size // devices
        if config.batch_size % devices:
            continue
        # Contrast is over the whole batch.
        lean.optimizer.accumulate = 1 if config.program == "pretrain" else groups
        if "language_model" in lean.model:
            lean.model.language_model.remat = "nothing"
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
