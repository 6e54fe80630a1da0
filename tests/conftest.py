"""What every test starts from: eight fake CPU devices, kept compilations, the folder with real data, the tiny demo."""

import fcntl
import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parent.parent

# JAX reads these once, when it is first imported; what the user has set stays.
assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could choose its devices"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised code is there in half the time, without the fusion emitters in a
# third. The second flag is of jaxlib 0.10; another version may not know it, and stops at flags that it does not know.
FAST = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FAST += " --xla_cpu_use_fusion_emitters=false"
for flag in ("--xla_force_host_platform_device_count=8", *FAST.split()):
    if flag.split("=")[0] not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="session")
def data_folder() -> pathlib.Path:
    """The folder with real data: `PISCES_DATA`, or `../shared/data` beside the repository."""
    folder = pathlib.Path(os.environ.get("PISCES_DATA") or ROOT / "../shared/data").resolve()
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}: set PISCES_DATA to the folder with the real data")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory, worker_id):
    """Folders that take long to make: the first worker makes them, and each has a copy of its own."""
    own = tmp_path_factory.getbasetemp()
    common = own if worker_id == "master" else own.parent

    def get(name, make):
        made, copy = common / f"made-{name}", own / f"copy-{name}"
        if not copy.exists():
            with (common / f"{name}.lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not made.exists():
                    half = common / f"half-{name}"
                    shutil.rmtree(half, ignore_errors=True)
                    half.mkdir()
                    make(half)
                    half.rename(made)
            shutil.copytree(made, copy)
        return copy

    return get


# As little as makes a demo.
FEW = ("--per_task=1", "--images=2", "--per_kind=2", "--held_out=1", "--pictures=3")


@pytest.fixture(scope="session")
def trained(made_once) -> pathlib.Path:
    """A work directory that the demo itself has made, with everything at its smallest, and a picture."""

    def make(folder):
        command = [sys.executable, "-m", "pisces_jax.demo", f"--config={ROOT}/tests/tiny_config.py"]
        # One device, as on a laptop.
        environment = {**os.environ, "XLA_FLAGS": FAST}
        command += [f"--workdir={folder}/run", *FEW]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-3000:]
        (folder / "run/printed.txt").write_text(done.stdout)
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8)).save(folder / "picture.png")

    return made_once("demo", make)


_opened: dict = {}


@pytest.fixture
def models_opened_once(monkeypatch):
    """Commands that open the same run get the same model, with the programs that it has compiled."""
    from pisces_jax.inference import model

    load = model.load_model

    def load_once(workdir, run="", batch_size=64, **how):
        key = pathlib.Path(workdir), run, batch_size, *sorted(how.items(), key=str)
        if key not in _opened:
            _opened[key] = load(workdir, run, batch_size, **how)
        return _opened[key]

    monkeypatch.setattr(model, "load_model", load_once)
