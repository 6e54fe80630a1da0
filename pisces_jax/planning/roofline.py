"""How long a step must take at least, and how long it is predicted to take.

There are three lower bounds: matrix products at the chip's peak, HBM traffic at its bandwidth, and collectives at the
bandwidth of the links that they use. The greatest is the time of a step in which everything overlaps. The prediction
divides it by `EFFICIENCY`, which is calibrated on published runs on TPUs (docs/scale.md). It is not a measurement, and
for chips of other kinds there is none.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pisces_jax.planning.hlo import Collective
from pisces_jax.planning.memory import by_kind
from pisces_jax.training import flops
from pisces_jax.training.step import Trainer
from pisces_jax.utils.chips import Chip

# What is computed again, as a share of a trained part's model FLOPs, of which its forward pass is a third. "dots" and
# "none" compute no product with weights again.
AGAIN = {"full": 1 / 3, "attention": 1 / 3, "offload": 1 / 3, "dots": 0.0, "none": 0.0}


class Published(NamedTuple):
    """A published run: its MFU, and its rematerialisation in our words.

    At their shapes all of them are bound by products, not by the interconnect (docs/scale.md).
    """

    name: str
    remat: str
    mfu: float

    @property
    def share(self) -> float:
        """Executed FLOPs over time and peak: the share of the roofline."""
        return self.mfu * (1 + AGAIN[self.remat])


PUBLISHED = (
    Published("v5e-256, MaxText 16B", "full", 0.611),
    Published("v5e-256, MaxText 32B", "full", 0.669),
    Published("v4-384 x 2, MaxText 52B", "full", 0.589),
    Published("v5p-128, MaxText 32B", "dots", 0.715),
    Published("v6e-256, MaxText Llama-3.1-8B", "full", 0.455),
)
EFFICIENCY = statistics.median(run.share for run in PUBLISHED)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds per step, each bound as if it were alone."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def predicted(self) -> float:
        return self.bound / EFFICIENCY


def roofline(chip: Chip, executed_flops: float, hbm_bytes: float, found: Sequence[Collective], mesh: Mesh) -> Roofline:
    """The bounds of a step.

    Args:
        executed_flops: per device, with what rematerialisation computes again.
        hbm_bytes: that one device reads and writes.
        found: the step's collectives.
    """
    wire = sum(c.bytes * c.executions / axis_bandwidth(chip, mesh, c.axis) for c in found)
    return Roofline(executed_flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, wire)


def axis_bandwidth(chip: Chip, mesh: Mesh, axis: str) -> float:
    """Bytes per second that one device can send in a collective along these mesh axes (joined by "+")."""
    chosen = axis.split("+")
    group = mesh.devices[tuple(slice(None) if name in chosen else 0 for name in mesh.shape)].reshape(-1)
    return chip.bandwidth(group, mesh.devices.reshape(-1))


def work(trainer: Trainer) -> tuple[dict[str, float], float]:
    """Per device and step: model FLOPs by part, and all that is executed, with what rematerialisation repeats."""
    config, trained, devices = trainer.config, set(trainer.shardings.trained), trainer.mesh.devices.size
    whole = flops.step_flops_by_part(trainer.program, trainer.program.batch_spec(config), trained)
    by_part = {part: value / devices for part, value in whole.items()}
    remat = {k: c.get("remat", "none") for k, c in config.model.items() if isinstance(c, ConfigDict) and k in trained}
    return by_part, executed_flops(by_part, remat)


def executed_flops(by_part: Mapping[str, float], remat: Mapping[str, str]) -> float:
    """Model FLOPs and what rematerialisation computes again of trained parts (`remat` has their policies)."""
    return sum(flops * (1 + AGAIN[remat.get(part, "none")]) for part, flops in by_part.items())


def hbm_traffic(trainer: Trainer, memory: Mapping[str, int]) -> float:
    """Bytes that a device reads and writes at least.

    State, gradients and saved activations are read and written once; gathered weights are read in each pass, four
    times where they are trained.
    """
    kinds = by_kind(memory)
    kept = sum(kinds.get(kind, 0) for kind in ("parameters", "optimizer", "ema", "gradients", "activations"))
    item = jnp.dtype(trainer.config.compute_dtype).itemsize
    tensor = trainer.mesh.shape["tensor"]
    weights = 4 * count(trainer.abstract.trained) / tensor * item + count(trainer.abstract.frozen) / tensor * item
    return 2 * kept + weights


def count(tree: Any) -> int:
    """Parameters of a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
