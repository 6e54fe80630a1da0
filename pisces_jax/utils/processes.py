"""One run over several processes: how they find each other, and what only one of them does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from pisces_jax.utils.errors import UserError


def start(coordinator: str = "", processes: int = 0, process: int = -1) -> None:
    """Joins this process with the others of its run; to be called before anything else touches JAX.

    With no arguments the TPU's metadata or SLURM's environment say who the others are, where there are any: a
    machine that is neither is a run of one process.

    Args:
        coordinator: host:port of process 0.

    Raises:
        UserError: arguments that are incomplete, or processes that do not find each other.
    """
    import jax

    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process belong together: give all three, or none")
    try:
        if all(given):
            if process >= processes:
                raise UserError(f"--process={process} must be less than --processes={processes}")
            jax.distributed.initialize(coordinator, processes, process)
        elif _several():
            jax.distributed.initialize()
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"the processes of this run did not find each other: {words}") from error


def _several() -> bool:
    """Whether the environment says that this process is one of several: SLURM, TPU slices (JAX asks the machine's
    metadata; GKE says it in variables), or several slices."""
    if int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        return True
    if int(os.environ.get("MEGASCALE_NUM_SLICES") or "1") > 1:
        return True
    if len([h for h in os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",") if h]) > 1:
        return True
    return _tpu_hosts() > 1


def _tpu_hosts() -> int:
    """How many hosts the slice of this Cloud TPU VM has, as its metadata says; 1 anywhere else."""
    from jax._src.clusters.cloud_tpu_cluster import GceTpuCluster

    return len(GceTpuCluster._get_worker_list_in_slice()) if GceTpuCluster.is_env_present() else 1


def primary() -> bool:
    """Whether this process writes what is written once: logs, configs, pictures."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has come here."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(digest: str) -> bool:
    """Whether all processes come with the same digest (hexadecimal, as long in all of them)."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    return bool((multihost_utils.process_allgather(mine) == mine).all())


@contextmanager
def primary_first(name: str) -> Iterator[None]:
    """The first process goes through the block alone, then all others: for files that one makes and all read."""
    if not primary():
        barrier(name)
    try:
        yield
    finally:
        if primary():
            barrier(name)
