"""The devices that a step is planned for, which need not be here.

The TPU compiler runs without a TPU (`pip install 'jax[tpu]'`): JAX describes the devices of a slice, and programs are
compiled for them as for real ones. `cpu:N` is N fake CPU devices.
"""

import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax

from pisces_jax.utils.chips import TPUS, Tpu
from pisces_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices to compile for. `name` is the user's; `chip` is None for CPUs."""

    name: str
    devices: tuple[Any, ...]
    chip: Tpu | None
    slices: int


def read_name(topology: str) -> tuple[str, str]:
    """`v5p:4x4x4`, or `v5p-128` as Google Cloud counts it, as (kind, shape); `cpu:8` as ("cpu", "8").

    Raises:
        UserError: neither; the message names the known chips.
    """
    kind, _, shape = topology.partition(":")
    if kind == "cpu" and shape.isdigit() and int(shape) > 0:
        return kind, shape
    if kind in TPUS and re.fullmatch(r"\d+(x\d+)*", shape) and len(shape.split("x")) == TPUS[kind].dimensions:
        return kind, shape
    kind, _, count = topology.partition("-")
    if kind in TPUS and count.isdigit():
        for known in TPUS[kind].shapes:
            if chips(known) * TPUS[kind].cores == int(count):
                return kind, known
    raise UserError(
        f"--topology={topology}: write it like v5p:4x4x4, v5p-128, v5e:16x16 or cpu:8 (known chips: {', '.join(TPUS)})"
    )


def chips(shape: str) -> int:
    """How many chips a slice of that shape has."""
    return math.prod(int(n) for n in shape.split("x"))


def find_slice(topology: str, slices: int = 1) -> Slice:
    """The devices of `slices` slices. Nothing is allocated on them, and none need exist.

    Raises:
        UserError: an unknown topology, too few CPU devices, or no libtpu to compile with.
    """
    kind, shape = read_name(topology)
    if kind == "cpu":
        if slices != 1:
            raise UserError("--slices is for TPU topologies: leave it out")
        count, here = int(shape), jax.devices("cpu")
        if len(here) < count:
            raise UserError(
                f"--topology={topology}: JAX has {len(here)} CPU devices here: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
            )
        return Slice(topology, tuple(here[:count]), None, 1)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs their compiler, which runs on any machine: pip install 'jax[tpu]'")
    # What a TPU machine would answer: libtpu asks for it, and logs at length when nobody does.
    answers = {
        "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5p-128", "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # its lock protects the chips, and none is opened
    }  # fmt: skip
    for key, value in answers.items():
        os.environ.setdefault(key, value)
    from jax.experimental import topologies

    arguments: dict[str, Any] = {"chip_config_name": "megacore"} if kind == "v4" else {}  # one device per chip
    if slices > 1:
        arguments["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=f"{kind}:{shape}", **arguments)
    except Exception as error:  # libtpu raises no class of its own
        words = " ".join(str(error).split())
        raise UserError(f"--topology={topology} is not a slice that exists: {words[:200]}") from error
    return Slice(topology, tuple(found.devices), TPUS[kind], slices)
