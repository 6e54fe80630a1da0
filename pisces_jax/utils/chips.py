"""What accelerators can do, by their makers' data sheets: for MFU and for the planner. One table holds them all.

A kind of accelerator is a class. It says how its topologies are written, what of its memory a step may use, and how
fast its devices exchange data, so that whoever plans need not know the kind.
"""

import abc
import dataclasses
import math
import os
import re
from collections import Counter
from collections.abc import Collection
from typing import Any, ClassVar

from pisces_jax.utils.errors import UserError, cut
from pisces_jax.utils.units import GIB, gib

# The share of a GPU's memory that JAX's pool takes, where neither environment variable nor flag says otherwise.
POOL = 0.75
# The share that advice goes up to: the driver's context, NCCL and cuDNN need the rest.
LARGEST_POOL = 0.9
# Of the pool, what a plan leaves free: workspaces that are chosen on the device, and fragmentation.
SPARE = 4 * GIB


@dataclasses.dataclass(frozen=True)
class Chip(abc.ABC):
    """An accelerator.

    Attributes:
        name: topologies begin with it, in lower case.
        device_kinds: what `device_kind` of its JAX devices starts with.
        flops: peak bfloat16 FLOP/s, without sparsity.
        hbm_bytes: of its memory.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second in one direction, to neighbours.
        dcn_bandwidth: bytes per second of its share of its host's network, in one direction.
        shapes: in which it is on offer, by their number of chips.
        calibrated: whether seconds are predicted (`planning/roofline.py`), because published runs on this kind say
            what share of the bound a step reaches.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    shapes: tuple[str, ...]

    calibrated: ClassVar[bool] = False

    @abc.abstractmethod
    def read_shape(self, text: str) -> str | None:
        """The shape that stands behind the name in a topology (`:4x4x4`, `-128`); None: it is none of this kind."""

    @abc.abstractmethod
    def bandwidth(self, group: Collection[Any], everywhere: Collection[Any]) -> float:
        """Bytes per second that each JAX device of `group` can send in a ring, as one of the devices `everywhere`."""

    @property
    def usable_bytes(self) -> int:
        """What of `hbm_bytes` a step may use."""
        return self.hbm_bytes

    @property
    def limit(self) -> str:
        """What `usable_bytes` is, where it is not all of the memory."""
        return ""

    def more_memory(self, peak: int) -> list[str]:
        """Advice: settings of this kind of chip that let a step of `peak` bytes run."""
        return []


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU chip and the slices that it comes in.

    `hbm_bytes` is what programs may use, as the compiler states it when one does not fit; `link_bandwidth` is of one
    inter-chip link.

    Attributes:
        cores: per chip, as counted in names like v4-128.
        dimensions: of the torus.
        wraps: the smallest size at which a dimension of a slice is closed to a ring; so are its multiples.
    """

    cores: int
    dimensions: int
    wraps: int

    calibrated: ClassVar[bool] = True

    def read_shape(self, text: str) -> str | None:
        if re.fullmatch(r":\d+(x\d+)*", text) and text.count("x") + 1 == self.dimensions:
            return text[1:]
        return next((shape for shape in self.shapes if text == f"-{count_chips(shape) * self.cores}"), None)

    def bandwidth(self, group: Collection[Any], everywhere: Collection[Any]) -> float:
        """Each dimension of the torus that the group spans gives a ring: both directions where the slice is closed in
        that dimension, one where it is not. A group over several slices has the speed of the network between them."""
        if len({getattr(d, "slice_index", 0) for d in group}) > 1:
            return self.dcn_bandwidth
        total = 0.0
        for dimension in range(self.dimensions):
            if len({d.coords[dimension] for d in group}) > 1:
                size = max(d.coords[dimension] for d in everywhere) + 1
                total += self.link_bandwidth * (2 if size % self.wraps == 0 else 1)
        return total or self.link_bandwidth


@dataclasses.dataclass(frozen=True)
class Gpu(Chip):
    """An NVIDIA GPU on hosts of up to eight, connected by NVSwitch, with a network adapter each.

    `hbm_bytes` is what the driver reports; `link_bandwidth` is of all NVLinks together, or of PCI Express.

    Attributes:
        description: the device's full name.
        capability: the CUDA compute capability.
        multiprocessors: streaming multiprocessors that are switched on.
        lanes: float32 units of a multiprocessor.
        shared_bytes: shared memory of a multiprocessor.
        l2_bytes: of the L2 cache.
        clock: boost, in GHz.
        pool: the share of the memory that JAX's pool takes.
        threads: the most that a multiprocessor holds.
    """

    description: str
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int
    shared_bytes: int
    l2_bytes: int
    clock: float
    pool: float = POOL
    threads: int = 2048

    per_host: ClassVar[int] = 8

    def read_shape(self, text: str) -> str | None:
        """`:8` on one host, `:2x8` on two."""
        match = re.fullmatch(r":(?:([1-9]\d*)x)?([1-9]\d*)", text)
        return text[1:] if match and int(match[2]) <= self.per_host else None

    def bandwidth(self, group: Collection[Any], everywhere: Collection[Any]) -> float:
        """NVLink inside a host. Over several hosts the adapters of the group's GPUs work side by side, and the host
        with the fewest of them limits the ring."""
        on_host = Counter(d.process_index for d in group)
        if len(on_host) == 1:
            return self.link_bandwidth
        return min(self.link_bandwidth, min(on_host.values()) * self.dcn_bandwidth)

    @property
    def usable_bytes(self) -> int:
        return max(int(self.hbm_bytes * self.pool) - SPARE, 0)

    @property
    def limit(self) -> str:
        return f"JAX's pool, {self.pool:.0%} of {gib(self.hbm_bytes)}, less {gib(SPARE)} kept spare"

    def more_memory(self, peak: int) -> list[str]:
        larger = dataclasses.replace(self, pool=LARGEST_POOL)
        if self.pool >= LARGEST_POOL or peak > larger.usable_bytes:
            return []
        more = gib(larger.usable_bytes - self.usable_bytes)
        return [f"XLA_PYTHON_CLIENT_MEM_FRACTION={LARGEST_POOL} when it runs: JAX's pool is {more} larger"]


def count_chips(shape: str) -> int:
    """How many chips a shape has: the product of its sizes."""
    return math.prod(int(size) for size in shape.split("x"))


def pool_share(flag: str | None = None) -> float:
    """The share of a GPU's memory that JAX's pool takes: `flag`, or by the environment variables that JAX reads.

    Raises:
        UserError: it is not a number above 0 and at most 1.
    """
    variables = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    for name, text in (("--mem_fraction", flag), *((name, os.environ.get(name)) for name in variables)):
        if text:
            try:
                if 0 < (share := float(text)) <= 1:
                    return share
            except ValueError:
                pass
            raise UserError(f"{name}={cut(text)}: write a share of the memory, above 0 and at most 1")
    return POOL


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_HOSTS = ("1", "2", "4", "8", "2x8", "4x8", "8x8", "16x8", "32x8")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

CHIPS: dict[str, Chip] = {
    chip.name.lower(): chip
    for chip in (
        # Google Cloud, "TPU versions" (cloud.google.com/tpu/docs/system-architecture-tpu-vm), a page each.
        Tpu("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1228e9, 45e9, 6.25e9, _CUBES, 2, 3, 4),
        Tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 45e9, 3.125e9, _SQUARES, 1, 2, 16),
        Tpu("v5p", ("TPU v5",), 459e12, int(95.74 * GIB), 2765e9, 90e9, 6.25e9, (*_CUBES, "16x16x24"), 2, 3, 4),
        Tpu("v6e", ("TPU v6",), 918e12, int(31.25 * GIB), 1640e9, 90e9, 12.5e9, _SQUARES, 1, 2, 16),
        # NVIDIA's data sheets of the A100 (80 GB), H100 and H200 Tensor Core GPUs (SXM): FLOP/s, memory bandwidth,
        # NVLink (half of what they give for both directions); of the DGX systems: a 200 or 400 Gb/s adapter for each
        # GPU; of the architectures (whitepapers): multiprocessors, caches, clocks. The bytes are the driver's.
        Gpu(
            "A100", ("NVIDIA A100",), 312e12, 85_100_068_864, 2039e9, 300e9, 25e9, _HOSTS,
            "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 164 * 1024, 40 * 2**20, 1.41,
        ),
        Gpu(
            "H100", ("NVIDIA H100",), 989e12, 84_929_347_584, 3350e9, 450e9, 50e9, _HOSTS,
            "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 228 * 1024, 50 * 2**20, 1.98,
        ),
        Gpu(
            "H200", ("NVIDIA H200",), 989e12, 151_397_597_184, 4800e9, 450e9, 50e9, _HOSTS,
            "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 228 * 1024, 50 * 2**20, 1.98,
        ),
        # NVIDIA's whitepaper of the Ada architecture: a card of 24 GB without NVLink (PCI Express 4.0 ×16), here on a
        # host with a network of 10 Gb/s.
        Gpu(
            "RTX4090", ("NVIDIA GeForce RTX 4090",), 165.2e12, 25_757_220_864, 1008e9, 32e9, 1.25e9, ("1", "2", "4"),
            "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 100 * 1024, 72 * 2**20, 2.52, threads=1536,
        ),
        # The same architecture with 48 GB, of which PyTorch reports 47.5 GiB; the network is taken as above.
        Gpu(
            "RTX6000ADA", ("NVIDIA RTX 6000 Ada",), 364.2e12, 51_000_000_000, 960e9, 32e9, 1.25e9, ("1", "2", "4"),
            "NVIDIA RTX 6000 Ada Generation", (8, 9), 142, 128, 100 * 1024, 96 * 2**20, 2.505, threads=1536,
        ),
    )
}  # fmt: skip


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device; None for one that is not known, as a CPU."""
    known = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}
    fits = [kind for kind in known if device_kind.startswith(kind)]
    return known[max(fits, key=len)] if fits else None
