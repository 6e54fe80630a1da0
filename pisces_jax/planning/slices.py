"""The devices that a step is planned for, which need not be here: TPUs, GPUs, and as `cpu:N` N fake CPU devices."""

import dataclasses
import re
from typing import Any

import jax

from pisces_jax.planning import compilers
from pisces_jax.utils.chips import CHIPS, Chip, Gpu, Tpu, pool_share
from pisces_jax.utils.errors import UserError, cut


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for: a slice of TPUs, the GPUs of some hosts, or CPUs.

    `name` is the user's; `chip` is None for CPUs.
    """

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    slices: int


def read_name(topology: str) -> tuple[str, str]:
    """`v5p:4x4x4`, `v5p-128` as Google Cloud counts it, or `h100:2x8`, as (kind, shape); `cpu:8` as ("cpu", "8").

    Raises:
        UserError: none of them; the message names the known chips.
    """
    kind = re.split("[:-]", topology, maxsplit=1)[0]
    text = topology.removeprefix(kind)
    if kind == "cpu" and re.fullmatch(r":0*[1-9]\d*", text):
        return kind, text[1:]
    if kind in CHIPS and (shape := CHIPS[kind].read_shape(text)):
        return kind, shape
    raise UserError(
        f"--topology={cut(topology)}: write it like v5p:4x4x4, v5p-128, v5e:16x16, h100:8, h100:2x8 (two hosts of 8 "
        f"GPUs, the most that a host has) or cpu:8 (known chips: {', '.join(CHIPS)})"
    )


def find_slice(topology: str, slices: int = 1, mem_fraction: str | None = None) -> Slice:
    """The devices of `slices` slices. Nothing is allocated on them, and none need exist.

    Args:
        mem_fraction: the share of a GPU's memory that JAX's pool takes; None: by the environment (`chips.pool_share`).

    Raises:
        UserError: an unknown topology, too few CPU devices, no compiler, or an argument for chips of another kind.
    """
    kind, shape = read_name(topology)
    chip = CHIPS.get(kind)
    if slices != 1 and not isinstance(chip, Tpu):
        raise UserError("--slices is for TPU topologies: leave it out (hosts of GPUs are written as h100:2x8)")
    if isinstance(chip, Gpu):
        chip = dataclasses.replace(chip, pool=pool_share(mem_fraction))
    elif mem_fraction is not None:
        raise UserError("--mem_fraction is for GPU topologies: leave it out")
    if chip is not None:
        return Slice(topology, compilers.devices(chip, shape, slices), chip, slices)
    count, here = int(shape), jax.devices("cpu")
    if len(here) < count:
        raise UserError(
            f"--topology={topology}: JAX has {len(here)} CPU devices here: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return Slice(topology, tuple(here[:count]), None, 1)


def of_shape(where: Slice, shape: str) -> Slice:
    """The same chip in another of its shapes."""
    if where.chip is None:
        raise ValueError("CPUs have no shapes")
    return Slice(f"{where.chip.name.lower()}:{shape}", compilers.devices(where.chip, shape, 1), where.chip, 1)
