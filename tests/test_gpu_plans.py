"""Plans for NVIDIA GPUs that are not here, against golden ones, from the shell as a user makes them.

`make test` installs the compiler into a folder of its own, `VENV/gpu-compiler`, and makes the first plan; `make
test-long` makes all. Golden plans are renewed by `python tests/test_gpu_plans.py NAME`; what changed is then read line
by line.
"""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
from collections import Counter

import pytest

from pisces_jax.planning.compilers import GPU_PLUGINS

ROOT = pathlib.Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests/golden/plans"
COMPILER = pathlib.Path(sys.prefix) / "gpu-compiler"
installed = COMPILER.is_dir() or any(importlib.util.find_spec(name.replace("-", "_")) for name in GPU_PLUGINS)
EXACT = ("mesh", "devices", "fits", "hbm_bytes", "usable_bytes", "memory", "model_flops_by_part")
PLANS = {
    "pisces_1b-stage1-h100-1": ["--config=configs/pisces_1b/stage1.py", "--topology=h100:1", "--config.batch_size=16"],
    "pisces_8b-stage1-h100-8": ["--config=configs/pisces_8b/stage1.py", "--topology=h100:8", "--config.batch_size=64"],
}


def make(name, out):
    """The plan, made in a process of its own: the compiler reads its flags once, and the tests set some for CPUs."""
    kept = ("XLA_FLAGS", "JAX_PLATFORMS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
    environment = {key: value for key, value in os.environ.items() if key not in kept}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(COMPILER), os.environ.get("PYTHONPATH")]))
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    command = [sys.executable, "-m", "pisces_jax.plan", *PLANS[name], f"--json={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    plan = json.loads(out.read_text())
    sent = Counter()
    for c in plan["collectives"]:
        sent[f"{c['kind']} over {c['axis']}"] += c["bytes"] * c["executions"]
    kept = {key: plan[key] for key in (*EXACT, "peak_bytes", "wire_bytes_per_step", "predicted_step_seconds")}
    return {**kept, "arguments": plan["compiler"]["arguments"], "sent": sent}, done


@pytest.mark.skipif(
    not installed,
    reason="the compiler for NVIDIA GPUs is not here: make test installs it (for Linux on x86-64), and so does "
    "make setup; then run this again",
)
@pytest.mark.slow
@pytest.mark.parametrize("name", PLANS if os.environ.get("PISCES_LONG_TESTS") else [*PLANS][:1])
def test_golden_plans(name, tmp_path):
    """State, batch and FLOPs exactly; temporaries nearly, as each release of the compiler lays them out as it likes."""
    made, done = make(name, tmp_path / "plan.json")
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    exact = (*EXACT, "arguments", "predicted_step_seconds")
    assert {key: made[key] for key in exact} == {key: golden[key] for key in exact}
    for key in ("peak_bytes", "wire_bytes_per_step", "sent"):
        assert made[key] == pytest.approx(golden[key], rel=0.05)
    assert "predicted nothing" in done.stdout and "Traceback" not in done.stderr


if __name__ == "__main__":
    for name in sys.argv[1:] or PLANS:
        path = GOLDEN / f"{name}.json"
        path.write_text(json.dumps(make(name, path)[0], indent=1) + "\n")
