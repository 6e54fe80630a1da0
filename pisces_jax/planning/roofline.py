"""How long a step must take at least, and how long it is predicted to take.

Three bounds: products at the chip's peak, HBM traffic at its bandwidth, collectives at the bandwidth of the links
they use. The greatest is the bound of a step in which everything overlaps. The prediction divides it by `EFFICIENCY`,
which is calibrated on published runs (docs/scale.md); it is a prediction, not a measurement.
"""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from pisces_jax.planning.hlo import Collective
from pisces_jax.planning.slices import Chip

# What is computed again, as a share of a trained part's model FLOPs: a forward pass is a third of them. "dots"
# and "none" compute no product with weights again.
AGAIN = {"full": 1 / 3, "attention": 1 / 3, "offload": 1 / 3, "dots": 0.0, "none": 0.0}


class Published(NamedTuple):
    """A published run: its MFU, and what its rematerialisation saved, in our words. At their shapes all five are
    bound by products, and not by the interconnect (docs/scale.md).
    """

    name: str
    remat: str
    mfu: float

    @property
    def share(self) -> float:
        """Of the roofline: executed FLOPs over time and peak."""
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
    """Seconds a step, each if it were alone."""

    compute: float
    hbm: float
    interconnect: float

    @property
    def bound(self) -> float:
        return max(self.compute, self.hbm, self.interconnect)

    @property
    def predicted(self) -> float:
        return self.bound / EFFICIENCY


def roofline(
    chip: Chip,
    executed_flops: float,
    hbm_bytes: float,
    found: Sequence[Collective],
    devices: np.ndarray,
    axes: Sequence[str],
) -> Roofline:
    """The bounds of a step.

    Args:
        executed_flops: of one device, what is computed again included.
        hbm_bytes: read and written by one device.
        found: the step's collectives.
        devices: the mesh's devices, for where each axis lies on the torus.
    """
    bandwidth = {axis: axis_bandwidth(chip, devices, axes, axis) for axis in {c.axis for c in found}}
    wire = sum(c.bytes * c.executions / bandwidth[c.axis] for c in found)
    return Roofline(executed_flops / chip.flops, hbm_bytes / chip.hbm_bandwidth, wire)


def axis_bandwidth(chip: Chip, devices: np.ndarray, axes: Sequence[str], axis: str) -> float:
    """Bytes a second that one device can send in a collective along these mesh axes (joined by "+").

    Each dimension of the torus that the group spans gives a ring: both directions where the slice is closed in that
    dimension, one where it is not. A group over several slices goes at the speed of the network between them.
    """
    chosen = axis.split("+")
    group = devices[tuple(slice(None) if name in chosen else 0 for name in axes)].reshape(-1)
    if len({getattr(d, "slice_index", 0) for d in group}) > 1:
        return chip.dcn_bandwidth
    coords = np.array([d.coords for d in group])
    everywhere = np.array([d.coords for d in devices.reshape(-1)])
    total = 0.0
    for dimension in range(chip.dimensions):
        if len(set(coords[:, dimension])) > 1:
            size = int(everywhere[:, dimension].max()) + 1
            total += chip.link_bandwidth * (2 if size % chip.wraps == 0 else 1)
    return total or chip.link_bandwidth


def executed_flops(by_part: Mapping[str, float], remat: Mapping[str, str]) -> float:
    """Model FLOPs, and what rematerialisation computes again of trained parts (`remat` has their policies)."""
    return sum(flops * (1 + AGAIN[remat.get(part, "none")]) for part, flops in by_part.items())


def hbm_traffic(memory: Mapping[str, int], weights: float) -> float:
    """Bytes that a device reads and writes at least: optimizer and masters once each way, `weights` bytes of gathered
    weights over all passes, gradients and saved activations written and read.
    """
    state = sum(v for k, v in memory.items() if k.partition("/")[0] in ("parameters", "optimizer", "ema"))
    activations = sum(v for k, v in memory.items() if k.startswith("activations/"))
    return 2 * (state + memory.get("gradients", 0) + activations) + weights


def count(tree: Any) -> int:
    """Parameters of a tree of arrays or shapes."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(tree))
