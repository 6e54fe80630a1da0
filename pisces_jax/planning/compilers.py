"""JAX's devices to compile for, which need not be here: the compilers of TPUs and of NVIDIA GPUs run on any machine.

JAX describes the devices of a topology, and programs are compiled for them as for real ones. Nothing is allocated, and
no chip or driver is opened.
"""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import shutil
from collections.abc import Iterable
from typing import Any

import jax
from jax.experimental import topologies

from pisces_jax.utils.chips import Chip, Gpu, Tpu
from pisces_jax.utils.errors import UserError, cut

# JAX takes a GPU plugin of its own release alone, and the plugin an assembler: one of these, or CUDA's own.
GPU_PLUGINS = ("jax-cuda12-plugin", "jax-cuda13-plugin")
ASSEMBLERS = ("nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvcc")
INSTALL_GPU = "pip install -e '.[plan-gpu]'"


@functools.singledispatch
def devices(chip: Chip, shape: str, slices: int) -> tuple[Any, ...]:
    """The devices of `slices` topologies of that shape.

    Raises:
        UserError: the compiler is not installed, is of another release than JAX, or knows no such topology.
    """
    raise NotImplementedError(f"no compiler for {chip.name}")


@devices.register
def _(chip: Tpu, shape: str, slices: int) -> tuple[Any, ...]:
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
    arguments: dict[str, Any] = {"chip_config_name": "megacore"} if chip.name == "v4" else {}  # one device per chip
    if slices > 1:
        arguments["num_slices"] = slices
    return _described(chip, shape, platform="tpu", topology_name=f"{chip.name}:{shape}", **arguments)


@devices.register
def _(chip: Gpu, shape: str, slices: int) -> tuple[Any, ...]:
    check_gpu_plugin()
    hosts, _, gpus = shape.rpartition("x")
    # The first number counts groups of hosts that NVLink connects, of which one is planned for.
    return _described(
        chip, shape, platform="cuda", target_config=target_config(chip), topology=f"1x{hosts or 1}x{gpus}"
    )


def _described(chip: Chip, shape: str, **arguments: Any) -> tuple[Any, ...]:
    try:
        return tuple(topologies.get_topology_desc(**arguments).devices)
    except Exception as error:  # the compilers raise no classes of their own
        words = cut(" ".join(str(error).split()), 200)
        raise UserError(f"--topology={chip.name.lower()}:{shape} is not known to the compiler: {words}") from error


def check_gpu_plugin() -> None:
    """Checks that the compiler for GPUs is installed with its assembler and of JAX's own release.

    Raises:
        UserError: it is not; the sentence says what to install.
    """
    found = _installed(GPU_PLUGINS)
    if not found:
        raise UserError(f"compiling for NVIDIA GPUs needs their compiler, which runs on any machine: {INSTALL_GPU}")
    if jax.__version__ not in found.values():
        name, version = next(iter(found.items()))
        raise UserError(
            f"the compiler for NVIDIA GPUs ({name}) is of release {version} and JAX of {jax.__version__}, which takes "
            f"none but its own: {INSTALL_GPU}"
        )
    if not _installed(ASSEMBLERS) and not any(shutil.which("ptxas", path=p) for p in (None, "/usr/local/cuda/bin")):
        raise UserError(f"compiling for NVIDIA GPUs needs their assembler, ptxas, which is not here: {INSTALL_GPU}")


def _installed(names: Iterable[str]) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def target_config(chip: Gpu) -> str:
    """What a driver would report of the chip, as text of XLA's GpuTargetConfigProto.

    It has only fields that every release since jax 0.10 knows; an unknown field is an error.
    """
    major, minor = chip.capability
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: {chip.threads}
  shared_memory_per_block: 49152  shared_memory_per_core: {chip.shared_bytes}
  shared_memory_per_block_optin: {chip.shared_bytes - 1024}
  core_count: {chip.multiprocessors}  fpus_per_core: {chip.lanes}
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  memory_bandwidth: {chip.hbm_bandwidth:.0f}  l2_cache_size: {chip.l2_bytes}  clock_rate_ghz: {chip.clock}
  device_memory_size: {chip.hbm_bytes}
  cuda_compute_capability {{ major: {major}  minor: {minor} }}
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 12 }}
runtime_version {{ major: 13  minor: 0  patch: 0 }}
device_description_str: "{chip.description}"
"""
