"""What accelerators can do, by their makers' data sheets: for MFU and for the planner."""

import dataclasses

from pisces_jax.utils.units import GIB


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator.

    Attributes:
        device_kinds: what `device_kind` of its JAX devices starts with.
        flops: peak bfloat16 FLOP/s, without sparsity.
    """

    name: str
    device_kinds: tuple[str, ...]
    flops: float


@dataclasses.dataclass(frozen=True)
class Tpu(Chip):
    """A TPU chip and the slices that it comes in.

    Attributes:
        hbm_bytes: what programs may use, as the compiler states it when one does not fit.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second of one inter-chip link in one direction.
        dcn_bandwidth: bytes per second of a chip's share of its host's network.
        cores: per chip, as counted in names like v4-128.
        dimensions: of the torus.
        wraps: the smallest size at which a dimension of a slice is closed to a ring; so are its multiples.
        shapes: slices on offer, by their number of chips.
    """

    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    cores: int
    dimensions: int
    wraps: int
    shapes: tuple[str, ...]


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")

# Google Cloud, "TPU versions" (cloud.google.com/tpu/docs/system-architecture-tpu-vm), a page each.
TPUS = {
    chip.name: chip
    for chip in (
        Tpu("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1228e9, 45e9, 6.25e9, 2, 3, 4, _CUBES),
        Tpu("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 45e9, 3.125e9, 1, 2, 16, _SQUARES),
        Tpu("v5p", ("TPU v5",), 459e12, int(95.74 * GIB), 2765e9, 90e9, 6.25e9, 2, 3, 4, (*_CUBES, "16x16x24")),
        Tpu("v6e", ("TPU v6",), 918e12, int(31.25 * GIB), 1640e9, 90e9, 12.5e9, 1, 2, 16, _SQUARES),
    )
}
# NVIDIA's data sheets of the A100, H100 and H200 Tensor Core GPUs (SXM).
GPUS = {
    chip.name: chip
    for chip in (
        Chip("A100", ("NVIDIA A100",), 312e12),
        Chip("H100", ("NVIDIA H100",), 989e12),
        Chip("H200", ("NVIDIA H200",), 989e12),
    )
}


def find_chip(device_kind: str) -> Chip | None:
    """The chip of a JAX device; None for one that is not known, as a CPU."""
    known = {kind: chip for chip in (*TPUS.values(), *GPUS.values()) for kind in chip.device_kinds}
    fits = [kind for kind in known if device_kind.startswith(kind)]
    return known[max(fits, key=len)] if fits else None
