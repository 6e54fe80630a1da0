"""Runs of several processes: how the processes find each other, and what only one of them does."""

import importlib.util
import os
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pisces_jax.utils import companions, errors
from pisces_jax.utils.errors import UserError

PCI_DEVICES = Path("/sys/bus/pci/devices")
GOOGLE = "0x1ae0"  # PCI vendor
METADATA_SERVER = "169.254.169.254"  # the same for all Google Cloud VMs; asking by number needs no DNS
OF_A_STEP = "SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_LOCALID"  # what srun sets, and JAX needs
METADATA_ATTEMPTS = 3
METADATA_SECONDS = 2.0  # per attempt


def start(
    coordinator: str = "", processes: int = 0, process: int = -1, meet_seconds: int = 300, silent_seconds: int = 10
) -> None:
    """Connects this process to the others of its run. Call it before anything else uses JAX.

    Without arguments, SLURM, GKE or a Cloud TPU VM's metadata say whether there are others, and JAX finds them. On any
    other machine the run has one process.

    Args:
        coordinator: host:port of process 0.
        processes: number of processes.
        process: index of this one, from 0.
        meet_seconds: how long the processes wait for each other at the start.
        silent_seconds: a process that has not been heard of for so long counts as gone, and the others end.

    Raises:
        UserError: the arguments are incomplete, or the processes do not find each other.
    """
    import jax
    from jax.experimental import multihost_utils

    given = (bool(coordinator), processes > 0, process >= 0)
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process belong together: give all three, or none")
    # Signals are ours (`stopping`). JAX's own limits stay behind ours, which can say what happened in a sentence.
    jax.config.update("jax_enable_preemption_service", False)
    words = f"the processes of this run did not find each other in {meet_seconds} s: see whether all of them run"
    alone = threading.Timer(meet_seconds, errors.leave, (errors.LOST, f"error: {words}, or raise --meet_seconds"))
    alone.daemon = True
    limits: dict[str, Any] = dict(
        initialization_timeout=meet_seconds + 60, heartbeat_timeout_seconds=max(30, 3 * silent_seconds),
        shutdown_timeout_seconds=companions.SHUTDOWN,
    )  # fmt: skip
    try:
        if all(given):
            if process >= processes:
                raise UserError(f"--process={process} must be less than --processes={processes}")
            alone.start()
            jax.distributed.initialize(coordinator, processes, process, **limits)
        elif _several():
            alone.start()
            jax.distributed.initialize(**limits)
    except (RuntimeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        raise UserError(f"the processes of this run did not find each other: {words}") from error
    finally:
        alone.cancel()
    # JAX has no public name for its client of the coordination service.
    state: Any = multihost_utils.distributed.global_state
    if jax.distributed.is_initialized():
        companions.join(state.client, state.process_id, state.num_processes, silent_seconds)


def _several() -> bool:
    """Whether this is one of several processes, according to SLURM, GKE (variables) or a Cloud TPU VM (metadata).

    `jax.distributed.initialize()` finds the others, but fails where there are none, so this is asked first.
    """
    if (tasks := _number("SLURM_NTASKS")) > 1 and os.environ.get("SLURM_PROCID"):
        if missing := [name for name in OF_A_STEP if not os.environ.get(name)]:
            raise UserError(
                f"SLURM_NTASKS={tasks} asks for {tasks} processes and {missing[0]} is not set, so srun did not start "
                "this one: start it with srun, or unset SLURM_NTASKS to use this process alone"
            )
        return True
    if _number("MEGASCALE_NUM_SLICES") > 1:
        return True
    if hosts := os.environ.get("TPU_WORKER_HOSTNAMES"):
        return _count(hosts) > 1
    return _on_tpu_vm() and _tpu_hosts() > 1


def _number(variable: str) -> int:
    """A count in the environment; 1 where it is not set, or empty.

    Raises:
        UserError: it is no whole number.
    """
    text = os.environ.get(variable, "").strip() or "1"
    if not text.isdecimal():
        raise UserError(f"the environment variable {variable} is {text[:40]!r}, not a number: unset it or correct it")
    return int(text)


def _count(names: str) -> int:
    return len([name for name in names.split(",") if name.strip()])


def _on_tpu_vm() -> bool:
    """Whether this machine may be a Cloud TPU VM: it has a Google PCI device and libtpu.

    Elsewhere nobody is asked, so laptops, CI and on-premise clusters never wait for a metadata server. A Google Cloud
    VM without TPUs may pass (its network card is a Google device): its metadata server answers at once. Setting
    TPU_SKIP_MDS_QUERY, libtpu's own switch, avoids the question.
    """
    if "TPU_SKIP_MDS_QUERY" in os.environ:
        return False
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        return False
    return any(path.read_text().strip() == GOOGLE for path in PCI_DEVICES.glob("*/vendor"))


def _tpu_hosts() -> int:
    """Number of hosts of all slices that this Cloud TPU VM works with, from its metadata; 1 if that names none."""
    slices = re.search(r"^MEGASCALE_NUM_SLICES: *'?(\d+)", _metadata("tpu-env"), re.MULTILINE)
    hosts = _count(_metadata("worker-network-endpoints"))
    return max(hosts, 1) * (int(slices[1]) if slices else 1)


def _metadata(attribute: str) -> str:
    """The value of an attribute of this Google Cloud VM; empty if the VM does not have the attribute.

    Raises:
        UserError: the metadata server does not answer within a few seconds.
    """
    server = os.environ.get("GCE_METADATA_IP", METADATA_SERVER)
    request = urllib.request.Request(
        f"http://{server}/computeMetadata/v1/instance/attributes/{attribute}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is never behind a proxy
    for attempt in range(METADATA_ATTEMPTS):
        time.sleep(0.5 * attempt)
        try:
            with opener.open(request, timeout=METADATA_SECONDS) as response:
                return response.read().decode()
        except urllib.error.HTTPError as error:
            if error.code < 500:
                return ""
            reason = str(error)
        except OSError as error:
            reason = str(error)
    # To go on alone would be wrong: each host of a slice would train its own model into the same folder.
    raise UserError(
        f"this machine has a TPU, and its metadata server {server} does not say how many hosts there are ({reason}): "
        "give --coordinator, --processes and --process, or set TPU_SKIP_MDS_QUERY=1 to use this host alone"
    )


def primary() -> bool:
    """Whether this process writes what is written once: logs, configs, pictures."""
    import jax

    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has reached the barrier of this name."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def all_agree(digest: str) -> bool:
    """Whether all processes have the same digest (hexadecimal, of the same length everywhere)."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return True
    mine = np.frombuffer(bytes.fromhex(digest), np.uint8)
    return bool((multihost_utils.process_allgather(mine) == mine).all())


@contextmanager
def primary_first(name: str) -> Iterator[None]:
    """Process 0 runs the block alone, then all others run it: for files that one process makes and all read."""
    if not primary():
        barrier(name)
    try:
        yield
    finally:
        if primary():
            barrier(name)
