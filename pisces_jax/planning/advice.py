"""What to change in a config whose step does not fit."""

import math
from collections.abc import Mapping

from pisces_jax.planning.memory import by_kind, main_part
from pisces_jax.sharding import batch_shards
from pisces_jax.training.step import Trainer
from pisces_jax.utils.units import gib


def advise(trainer: Trainer, memory: Mapping[str, int], peak: int, usable: int) -> list[str]:
    """What to change so that the step fits, with what each change saves by formula, the cheapest first.

    Args:
        memory: bytes per device (`memory.memory_by_part`).
        peak: bytes per device that the compiler asked for.
        usable: bytes that a step may use on a device.
    """
    config, mesh, part = trainer.config, trainer.mesh.shape, main_part(trainer.config)
    kinds = by_kind(memory)
    activations, steps = kinds.get("activations", 0), config.optimizer.grad_accum_steps
    found = []
    if config.model.get(part, {}).get("remat", "none") not in ("full", "offload"):
        saved = f"most of {gib(activations)}" if activations else "most"
        found.append(
            f"config.model.{part}.remat=full: saves {saved} of activations, costs up to a third more computation"
        )
    items = trainer.items // batch_shards(trainer.mesh)
    if items > steps and trainer.program.divisible:
        more = next(n for n in range(steps + 1, items + 1) if items % n == 0)
        saved = f"about {gib(activations * (1 - steps / more))}" if activations else "a share"
        found.append(f"config.optimizer.grad_accum_steps={more}: saves {saved} of activations, the same batch")
    if (data := mesh["data"]) > 1:
        state = sum(kinds.get(kind, 0) for kind in ("parameters", "optimizer", "ema"))
        found.append(
            f"--mesh=data=1,fsdp={mesh['fsdp'] * mesh['fsdp_inner'] * data},tensor={mesh['tensor']}: saves "
            f"{gib(state * (1 - 1 / data))} of parameters and optimizer state"
        )
    if config.optimizer.mu_dtype == "float32":
        found.append(f"config.optimizer.mu_dtype=bfloat16: saves {gib(memory['optimizer'] / 4)} of first moments")
    wide = [p for p in trainer.abstract.frozen if config.param_dtype.get(p, "float32") == "float32"]
    if wide:
        saved = gib(sum(memory[f"parameters/{p}"] for p in wide) / 2)
        found.append(f"config.param_dtype.{wide[0]}=bfloat16 (and {len(wide) - 1} more): saves {saved}")
    chips = math.ceil(peak / max(usable, 1))
    found.append(f"at least {chips} times as many chips: {gib(peak - usable)} per device are missing")
    return found
