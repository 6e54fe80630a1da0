"""The machines that a step is planned for: what a chip can do, and a slice's devices without having them.

The TPU compiler runs without a TPU (the extra `plan`): JAX gives descriptions of a slice's devices, and programs are
compiled for them as for real ones. `cpu:N` is N fake CPU devices.
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

import jax

from pisces_jax.utils.errors import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU chip, by its maker's data sheet (Google Cloud's "TPU versions" pages) except `hbm_bytes`.

    Attributes:
        flops: bfloat16, a second.
        hbm_bytes: what programs may use, by the compiler's own words when one does not fit.
        hbm_bandwidth: bytes a second.
        link_bandwidth: bytes a second of one inter-chip link in one direction.
        dcn_bandwidth: bytes a second of a chip's share of its host's network.
        dimensions: of the torus.
        wraps: the smallest size at which a dimension of a slice is closed to a ring; sizes are multiples of it.
        shapes: slices that can be had, by their number of chips.
        cores: a chip, as counted in names like v4-128.
    """

    name: str
    flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    dcn_bandwidth: float
    dimensions: int
    wraps: int
    shapes: tuple[str, ...]
    cores: int


_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SQUARES = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
CHIPS = {
    "v4": Chip("v4", 275e12, int(30.75 * GIB), 1228e9, 45e9, 6.25e9, 3, 4, _CUBES, 2),
    "v5e": Chip("v5e", 197e12, int(15.75 * GIB), 819e9, 45e9, 3.125e9, 2, 16, _SQUARES, 1),
    "v5p": Chip("v5p", 459e12, int(95.74 * GIB), 2765e9, 90e9, 6.25e9, 3, 4, (*_CUBES, "16x16x24"), 2),
    "v6e": Chip("v6e", 918e12, int(31.25 * GIB), 1640e9, 90e9, 12.5e9, 2, 16, _SQUARES, 1),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for; `chip` is None for CPUs. `name` is how the user calls it."""

    name: str
    devices: tuple[Any, ...]
    chip: Chip | None
    slices: int


def read_name(topology: str) -> tuple[str, str]:
    """`v5p:4x4x4`, or `v5p-128` as Google Cloud counts it, as (kind, shape); `cpu:8` as ("cpu", "8").

    Raises:
        UserError: neither; the message names what there is.
    """
    kind, colon, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        return kind, shape
    if kind in CHIPS and re.fullmatch(r"\d+(x\d+)*", shape) and len(shape.split("x")) == CHIPS[kind].dimensions:
        return kind, shape
    kind, dash, count = topology.partition("-")
    if kind in CHIPS and count.isdigit():
        chip = CHIPS[kind]
        for known in chip.shapes:
            if chips(known) * chip.cores == int(count):
                return kind, known
    raise UserError(
        f"--topology={topology}: write it like v5p:4x4x4, v5p-128, v5e:16x16 or cpu:8 (known chips: {', '.join(CHIPS)})"
    )


def chips(shape: str) -> int:
    return math.prod(int(n) for n in shape.split("x"))


def find_slice(topology: str, slices: int = 1) -> Slice:
    """The devices of `slices` slices. Nothing is allocated on them, and none need exist.

    Raises:
        UserError: an unknown topology, or no libtpu to compile with.
    """
    kind, shape = read_name(topology)
    if kind == "cpu":
        if slices != 1:
            raise UserError("--slices is for TPU topologies: leave it out")
        return Slice(topology, tuple(_cpu_devices(int(shape))), None, 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs their compiler, which runs anywhere: pip install 'jax[tpu]'")
    # What a TPU machine would answer: libtpu asks for it and logs at length when nobody does.
    answers = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock is for the chips, and none is opened
    }  # fmt: skip
    for key, value in answers.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    arguments: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}  # one device a chip
    if slices > 1:
        arguments["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **arguments)
    except Exception as error:  # libtpu's own words are all there is
        words = " ".join(str(error).split())
        raise UserError(f"--topology={topology} is no slice that can be had: {words[:200]}") from error
    return Slice(topology, tuple(found.devices), CHIPS[kind], slices)


def _cpu_devices(count: int) -> Sequence[Any]:
    if jax.device_count("cpu") < count:
        raise UserError(
            f"--topology=cpu:{count}: JAX has {jax.device_count('cpu')} CPU devices here: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return jax.devices("cpu")[:count]
