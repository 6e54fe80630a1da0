"""What every test starts from: eight fake CPU devices, kept compilations, and the folder with real data."""

import os
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# JAX reads these once, when it is first imported; what the user has set stays.
assert "jax" not in sys.modules, "jax was imported before tests/conftest.py could choose its devices"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Tests compile much and compute little: unoptimised code is there in half the time.
for flag in ("--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"):
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
