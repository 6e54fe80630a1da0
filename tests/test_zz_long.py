"""One run over several local processes: the same losses as in one."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from pisces_jax import processes
from pisces_jax.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 4


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def train(workdir, count, mesh):
    """Losses by step of the encoders' pretraining in `count` processes with four devices in all."""
    flags = "--xla_backend_optimization_level=0 --xla_force_host_platform_device_count"
    environment = {**os.environ, "XLA_FLAGS": f"{flags}={DEVICES // count}", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable, "-m", "pisces_jax.train", "--config=tests/tiny_config.py:pretrain", f"--workdir={workdir}",
        "--config.log.samples_every=0", *(f"--config.mesh.{axis}={size}" for axis, size in mesh.items()),
    ]  # fmt: skip
    port = free_port()
    started = []
    for process in range(count):
        several = [f"--coordinator=127.0.0.1:{port}", f"--processes={count}", f"--process={process}"]
        log = (workdir.parent / f"{workdir.name}-{process}.log").open("w")
        started.append(
            subprocess.Popen(
                command + (several if count > 1 else []), cwd=ROOT, env=environment, stdout=log, stderr=log
            )
        )
    try:
        codes = [p.wait(timeout=3000) for p in started]
    finally:
        for p in started:
            p.kill()
    logs = "\n".join((workdir.parent / f"{workdir.name}-{i}.log").read_text()[-1500:] for i in range(count))
    assert codes == [0] * count, logs
    entries = [json.loads(line) for line in (workdir / "pretrain/metrics.jsonl").read_text().splitlines()]
    wanted = ("train/contrastive_understanding", "train/reconstruction", "train/norm/gradient", "val/reconstruction")
    return [(e["step"], {k: v for k, v in e.items() if k in wanted}) for e in entries]


@pytest.mark.slow
def test_several_processes_equal_one(tmp_path):
    """A mesh that spans them: with two, each holds a half of the rows; with four, pairs share theirs (tensor)."""
    mesh = dict(fsdp=2, tensor=2)
    expected = train(tmp_path / "one", 1, mesh)
    assert [step for step, _ in expected] == [1, 2, 2] and all(values for _, values in expected)
    for count in (2,):
        got = train(tmp_path / f"of{count}", count, mesh)
        assert len(got) == len(expected)  # written once, not by every process
        for (step, values), (same, truth) in zip(got, expected, strict=True):
            assert step == same and values == pytest.approx(truth, rel=2e-5)


def test_incomplete_arguments_are_refused():
    with pytest.raises(UserError, match="give all three, or none"):
        processes.start("127.0.0.1:1234", 2)
    with pytest.raises(UserError, match="--process=2 must be less than --processes=2"):
        processes.start("127.0.0.1:1234", 2, 2)


def test_whether_there_are_others(monkeypatch):
    for name in ("SLURM_NTASKS", "SLURM_PROCID", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    assert not processes._several()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert not processes._several()
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "t1v-0,t1v-1")
    assert processes._several()
    monkeypatch.delenv("TPU_WORKER_HOSTNAMES")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes._several()


def test_dry_run_tries_everything_and_leaves_nothing(tmp_path):
    """One of everything, on eight devices; then nothing is there that was not there before."""
    from pisces_jax import cli
    from pisces_jax.planning.preflight import preflight

    (config,) = cli.load_stages(str(ROOT / "tests/tiny_config.py") + ":pretrain", {}).values()
    said = []
    preflight(config, tmp_path / "new", said.append)
    assert said[-1] == "go" and not (tmp_path / "new").exists()
    text = "\n".join(said)
    for word in ("8 cpu on 1 process", "examples a second", "peak", "collective  fsdp (2)", "read back bit for bit"):
        assert word in text, text
