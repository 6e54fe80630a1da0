"""Runs of several processes: the same losses as in one, and how the processes find each other."""

import http.server
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
from array_record.python import array_record_module

from pisces_jax.utils import processes
from pisces_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
DEVICES = 4


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(workdir, count, module, *arguments):
    """What the processes of a command print, `count` of them with four devices in all."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={DEVICES // count}", os.environ["XLA_FLAGS"])
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", f"pisces_jax.{module}", f"--workdir={workdir}", *arguments]
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
        codes = [p.wait(timeout=500) for p in started]
    finally:
        for p in started:
            p.kill()
    logs = [(workdir.parent / f"{workdir.name}-{i}.log").read_text() for i in range(count)]
    assert codes == [0] * count, "\n".join(log[-1500:] for log in logs)
    return logs


@pytest.mark.slow
def test_several_processes_equal_one(trained, tmp_path):
    """A mesh that spans them: with four, pairs share their half of the rows (tensor); with two, each holds a half."""
    flags = "--config=tests/tiny_config.py:unified", "--config.log.samples_every=0"
    mesh = "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
    wanted = "train/text", "train/vectors", "train/reconstruction", "train/norm/gradient", "val/text", "val/vectors"
    losses = {}
    counts = (1, 2, 4) if os.environ.get("PISCES_LONG_TESTS") else (1, 2)
    for count in counts:
        workdir = tmp_path / f"of{count}"
        shutil.copytree(trained / "run", workdir, ignore=shutil.ignore_patterns("unified"))
        run(workdir, count, "train", *flags, *mesh)
        entries = [json.loads(line) for line in (workdir / "unified/metrics.jsonl").read_text().splitlines()]
        losses[count] = [(e["step"], {k: v for k, v in e.items() if k in wanted}) for e in entries]
    assert [(step, len(values)) for step, values in losses[1]] == [(1, 4), (2, 4), (2, 2)]
    for count in counts[1:]:
        assert len(losses[count]) == 3  # written once, not by every process
        for (step, values), (same, truth) in zip(losses[count], losses[1], strict=True):
            assert step == same and values == pytest.approx(truth, rel=2e-5)


@pytest.mark.slow
def test_features_by_several_processes(trained, tmp_path):
    """Each writes shards of its own; the same features in the end, and one of them says so."""

    def bfloat16(path):
        records = b"".join(array_record_module.ArrayRecordReader(str(path)).read_all())
        return (np.frombuffer(records, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)

    files = []
    for name, count in ("one", 1), ("two", 2):
        shutil.copytree(trained / "run", tmp_path / name)
        flags = ("--config=tests/tiny_config.py:decoder", "--config.data.train.pair.num_examples=5000")
        first, *others = run(tmp_path / name, count, "cache", *flags)
        assert first.count("features of 5000 examples") == 1 and "to train on them" in first
        assert not any("examples" in other for other in others)
        folder = tmp_path / name / "features"
        files.append({p.relative_to(folder): bfloat16(p) for p in sorted(folder.rglob("*.array_record"))})
    assert list(files[0]) == list(files[1]) and len(files[0]) == 3
    for path, values in files[0].items():  # another number of pictures on each device may round another way
        np.testing.assert_allclose(files[1][path], values, rtol=2**-6, atol=1e-3)


def test_processes_that_pack_other_examples_stop(tmp_path):
    """Each of two processes reads a folder of its own, in one of which a text is missing.

    That those that agree go on, `test_several_processes_equal_one` shows.
    """
    program = (
        "import sys, pathlib\n"
        "from pisces_jax.training.config_files import load_stages\n"
        "from pisces_jax.utils import processes\n"
        "from pisces_jax.utils.errors import run_command\n"
        "def main():\n"
        "    port, process, workdir, folder = sys.argv[1:]\n"
        "    processes.start(f'127.0.0.1:{port}', 2, int(process))\n"
        "    from pisces_jax.data.tokenizers import open_tokenizer\n"
        "    from pisces_jax.training import input\n"
        "    from pisces_jax.training.programs import make_program\n"
        "    from pisces_jax.training.tokenizer import load_tokenizer\n"
        "    config = load_stages('tests/tiny_config.py:pretrain', {})['pretrain']\n"
        "    tokenizer = load_tokenizer(config, pathlib.Path(workdir))\n"
        "    config.data.train = dict(f=dict(kind='image_folder', path=folder, recipe='pair'))\n"
        "    input.train_iterator(config, tokenizer, make_program(config, 300), pathlib.Path(workdir))\n"
        "run_command(main)\n"
    )
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"number {i}"}) for i in range(9)]
    for name, held in ("whole", lines), ("holed", [*lines[:4], "{", *lines[5:]]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metadata.jsonl").write_text("\n".join(held))
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(port), str(i), str(tmp_path / "work"), str(tmp_path / folder)],
            cwd=ROOT, env={**os.environ, "JAX_PLATFORMS": "cpu"}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i, folder in enumerate(("whole", "holed"))
    ]  # fmt: skip
    try:
        said = [p.communicate(timeout=200)[0] for p in started]
    finally:
        for p in started:
            p.kill()
    for p, words in zip(started, said, strict=True):
        assert p.returncode == 1 and "find different examples" in words, words


def test_incomplete_arguments_are_refused():
    with pytest.raises(UserError, match="give all three, or none"):
        processes.start("127.0.0.1:1234", 2)
    with pytest.raises(UserError, match="--process=2 must be less than --processes=2"):
        processes.start("127.0.0.1:1234", 2, 2)


ENVIRONMENT = (
    *processes.OF_A_STEP,
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_NUM_SLICES",
    "TPU_SKIP_MDS_QUERY",
)


@pytest.fixture
def bare(monkeypatch):
    """An environment that says nothing, on a machine without TPUs, and no metadata server to wait for."""
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(processes, "_on_tpu_vm", lambda: False)
    monkeypatch.setattr(processes, "METADATA_SECONDS", 0.2)
    return monkeypatch


@pytest.fixture
def metadata(bare):
    """A TPU VM with a metadata server: what it holds (a number is an HTTP status), and which attributes were asked."""
    held, asked = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            folder, _, name = self.path.rpartition("/")
            asked.append(name)
            value = held.get(name, 404)
            right = folder == "/computeMetadata/v1/instance/attributes" and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(403 if not right else value if isinstance(value, int) else 200)
            self.end_headers()
            self.wfile.write(b"<html>no</html>" if isinstance(value, int) else value.encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        bare.setattr(processes, "_on_tpu_vm", lambda: True)
        bare.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        bare.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody listens: the server is asked directly
        yield types.SimpleNamespace(held=held, asked=asked)
        server.shutdown()


def test_whether_there_are_others(bare):
    bare.setattr(processes, "_metadata", lambda attribute: pytest.fail("no metadata server is here"))
    assert not processes._several()
    bare.setenv("MEGASCALE_NUM_SLICES", "2")
    assert processes._several()
    bare.delenv("MEGASCALE_NUM_SLICES")
    bare.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    assert not processes._several()
    bare.setenv("TPU_WORKER_HOSTNAMES", "t1v-0,t1v-1")
    assert processes._several()
    bare.delenv("TPU_WORKER_HOSTNAMES")
    bare.setenv("SLURM_NTASKS", "4")
    assert not processes._several()  # an allocation, outside srun
    bare.setenv("SLURM_PROCID", "0")
    with pytest.raises(UserError, match="SLURM_NTASKS=4 .* SLURM_JOB_ID is not set.* start it with srun, or unset"):
        processes._several()  # a batch script, outside srun
    for name in processes.OF_A_STEP:
        bare.setenv(name, "1")
    assert processes._several()
    for name in "SLURM_NTASKS", "MEGASCALE_NUM_SLICES":
        bare.setenv("SLURM_NTASKS", " ")
        assert not processes._several()
        bare.setenv(name, "two")
        with pytest.raises(UserError, match=f"{name} is 'two', not a number: unset it"):
            processes._several()


@pytest.mark.parametrize(
    "held, hosts",
    [
        ({}, 1),  # a Google Cloud VM without TPUs
        ({"worker-network-endpoints": ""}, 1),
        ({"worker-network-endpoints": "unknown:unknown:10.164.0.4"}, 1),
        ({"worker-network-endpoints": "a:0:10.164.0.4,b:1:10.164.0.5,c:2:10.164.0.6,d:3:10.164.0.7"}, 4),
        ({"worker-network-endpoints": "t1v-n-0.c.p.internal,t1v-n-1.c.p.internal"}, 2),
        ({"worker-network-endpoints": "10.0.0.4", "tpu-env": "ZONE: 'z'\nMEGASCALE_NUM_SLICES: '2'\n"}, 2),
        ({"worker-network-endpoints": "10.0.0.4,10.0.0.5", "tpu-env": "MEGASCALE_NUM_SLICES: 3"}, 6),
        ({"worker-network-endpoints": "10.0.0.4", "tpu-env": "ACCELERATOR_TYPE: 'v4-8'\nWORKER_ID: '0'"}, 1),
    ],
)
def test_hosts_of_a_tpu_vm(metadata, held, hosts):
    """The list of workers has two forms: name:id:address triples, and host names alone."""
    metadata.held.update(held)
    assert processes._tpu_hosts() == hosts
    assert processes._several() == (hosts > 1)
    assert set(metadata.asked) == {"worker-network-endpoints", "tpu-env"}


def test_a_metadata_server_that_does_not_answer(metadata, monkeypatch):
    """Going on alone would be wrong, and so would waiting: three attempts of a fifth of a second, and pauses."""
    metadata.held["tpu-env"] = 503
    with pytest.raises(UserError, match="503.*give --coordinator, --processes and --process, or set TPU_SKIP_MDS"):
        processes.start()
    assert metadata.asked == ["tpu-env"] * 3
    with socket.socket() as silent:  # it takes the connection and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        with pytest.raises(UserError, match="timed out"):
            processes.start()
    assert time.monotonic() - begin < 10


def test_which_machines_are_asked_for_metadata(monkeypatch, tmp_path):
    """Those with a Google device and libtpu."""
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY", raising=False)
    monkeypatch.setenv("TPU_LIBRARY_PATH", "/usr/lib/libtpu.so")
    monkeypatch.setattr(processes, "PCI_DEVICES", tmp_path)
    assert not processes._on_tpu_vm()
    for name, vendor in ("0000:00:01.0", "0x8086"), ("0000:00:05.0", "0x10de"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
    assert not processes._on_tpu_vm()
    (tmp_path / "0000:00:01.0/vendor").write_text("0x1ae0\n")
    assert processes._on_tpu_vm()
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert not processes._on_tpu_vm()
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    monkeypatch.delenv("TPU_LIBRARY_PATH")
    monkeypatch.setattr(processes.importlib.util, "find_spec", lambda name: None)
    assert not processes._on_tpu_vm()


def test_dry_run_tries_everything_and_leaves_nothing(tmp_path):
    """One of everything, on eight devices; then nothing is there that was not there before."""
    from pisces_jax.planning.preflight import preflight
    from pisces_jax.training.config_files import load_stages

    (config,) = load_stages(str(ROOT / "tests/tiny_config.py") + ":decoder", {}).values()
    said = []
    preflight(config, tmp_path / "new", said.append)
    assert said[-1] == "go" and not (tmp_path / "new").exists()
    text = "\n".join(said)
    for word in ("8 cpu on 1 process", "examples per second", "peak", "collective  fsdp (2)", "read back bit for bit"):
        assert word in text, text
