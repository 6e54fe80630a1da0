"""Kills and stops runs at random moments and compares their ends, bit for bit, with those of undisturbed ones.

python tests/torture.py [NUMBER] [--workdir=DIR] [--seed=N]     make torture ARGS=NUMBER

NUMBER is how often each part kills or stops a run: by default as often as `PARTS` says. The results are written to
DIR/torture.json, and printed as the table of docs/reliability.md. It is a config file, too: the run that is tortured.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
NO_SURVIVOR = 15.0  # seconds after which a process that is left over counts as a failure
# name -> processes, fake devices of each, mesh, signals, how often
ONE, TWO = dict(fsdp=-1), dict(data=2, fsdp=2, tensor=2)
PARTS = {
    "SIGKILL, one device": (1, 1, ONE, ("SIGKILL",), 50),
    "SIGKILL, mesh 2 × 2 × 2": (1, 8, TWO, ("SIGKILL",), 20),
    "SIGKILL of either of two processes": (2, 1, ONE, ("SIGKILL",), 20),
    "SIGTERM or SIGINT, one process": (1, 1, ONE, ("SIGTERM", "SIGINT"), 30),
    "SIGTERM or SIGINT to either of two processes": (2, 1, ONE, ("SIGTERM", "SIGINT"), 30),
}


def get_config():
    import tiny

    from pisces_jax.training.config import run_config

    def source(split):
        return dict(pair=dict(kind="shapes", task="pair", num_examples=64, split=split, size=16))

    return run_config(
        name="run", program="decoder", steps=60, batch_size=8, model=tiny.model_settings(), flow=dict(drop=0.3),
        data=dict(
            tokenizer_vocabulary=300, tokenizer_examples=64, text_length=160, train=source("train"),
            evaluate=source("val"),
        ),
        loss=dict(feature_noise=0.1), optimizer=dict(ema=0.9, warmup_steps=4),
        log=dict(every=5, evaluate_every=10, evaluate_batches=2, checkpoint_every=5, keep=2),
    )  # fmt: skip


def start(workdir, processes, devices, mesh):
    """The processes of a run that goes on; what they print is added to a log each."""
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache/jax"))
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": cache}
    command = [sys.executable, "-m", "pisces_jax.train", "--config=tests/torture.py", f"--workdir={workdir}"]
    command += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for i in range(processes):
        several = [f"--coordinator=127.0.0.1:{port}", f"--processes={processes}", f"--process={i}"]
        with open(f"{workdir}-{i}.log", "a") as log:
            started.append(
                subprocess.Popen(
                    command + (several if processes > 1 else []), cwd=ROOT, env=environment, stdout=log, stderr=log
                )
            )
    return started


def finish(started, seconds):
    """The exit statuses, and how long it took; None of a process that is left over, which is then killed."""
    begun, statuses = time.monotonic(), []
    for process in started:
        try:
            statuses.append(process.wait(max(0.1, seconds - (time.monotonic() - begun))))
        except subprocess.TimeoutExpired:
            statuses.append(None)
    took = time.monotonic() - begun
    for process in started:
        process.kill()
        process.wait()
    return statuses, took


def undisturbed(workdir, *how):
    begun = time.monotonic()
    statuses, _ = finish(start(workdir, *how), 1800)
    assert set(statuses) == {0}, f"{workdir}: an undisturbed run ended with {statuses}; see its logs"
    return time.monotonic() - begun


def differences(run, other):
    """What of two finished runs differs: their last checkpoints, and what was measured (but for clocks)."""
    import jax
    import numpy as np
    import orbax.checkpoint as ocp

    from pisces_jax.training.metrics import read_metrics
    from pisces_jax.training.steps import finished_step

    def arrays(folder):
        step = finished_step(folder)
        tree = ocp.PyTreeCheckpointer().restore((folder / "checkpoints" / str(step) / "state").absolute())
        leaves = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}
        return leaves | {"step": np.asarray(step)}

    def numbers(folder):
        clocks = ("_per_step", "_per_second", "/mfu", "goodput")
        return {
            (entry["step"], k): v
            for entry in read_metrics(folder)
            for k, v in entry.items()
            if not k.endswith(clocks) and "lost/" not in k
        }

    a, b = arrays(run), arrays(other)
    wrong = [k for k in sorted({*a, *b}) if k not in a or k not in b or a[k].tobytes() != b[k].tobytes()]
    # A run that was stopped has a line of the log more, where it stopped; the line after it is of fewer steps.
    a, b = numbers(run), numbers(other)
    held_out = [k for k in b if k[1].startswith("val/")]
    return wrong + [f"{k} at step {step}" for step, k in held_out if a.get((step, k)) != b[step, k]]


def torture(workdir, name, number, chance):
    processes, devices, mesh, signals, _ = PARTS[name]
    how = processes, devices, mesh
    whole = workdir / f"whole-{processes}-{devices}"
    if not (whole / "seconds").exists():
        undisturbed(whole, *how)  # compiles
        shutil.rmtree(whole)
        (workdir / "seconds").write_text(str(undisturbed(whole, *how)))
        (workdir / "seconds").rename(whole / "seconds")
    seconds = float((whole / "seconds").read_text())
    done, runs, slowest, statuses, faults = 0, 0, 0.0, {}, []
    run = workdir / "-".join([*signals, str(processes), str(devices)])
    while done < number:
        shutil.rmtree(run, ignore_errors=True)
        runs += 1
        while done < number:
            started = start(run, *how)
            time.sleep(chance.uniform(0, 1.1 * seconds))
            if all(process.poll() is not None for process in started):  # it came to its end
                finish(started, 1)
                break
            chosen, victim = getattr(signal, chance.choice(signals)), chance.choice(started)
            victim.send_signal(chosen)
            done += 1
            ended, took = finish(started, NO_SURVIVOR)
            slowest = max(slowest, took)
            for process, status in zip(started, ended, strict=True):
                of_victim = process is victim and chosen == signal.SIGKILL
                statuses[str(status)] = statuses.get(str(status), 0) + (not of_victim)
                if status is None:
                    faults.append(f"a survivor after {NO_SURVIVOR:.0f} s at number {done}")
                if chosen != signal.SIGKILL and status not in (0, 75):
                    faults.append(f"status {status} at number {done}")
        if {*finish(start(run, *how), 1800)[0]} != {0}:
            faults.append(f"run {runs} does not end")
            break
        faults += [f"run {runs}: {each}" for each in differences(run / "run", whole / "run")]
    traces = sum(path.read_text().count("Traceback") for path in run.parent.glob(f"{run.name}-*.log"))
    return dict(
        part=name, signals=done, runs=runs, slowest_end=round(slowest, 1), undisturbed=round(seconds, 1),
        statuses=statuses, tracebacks=traces, faults=faults,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("number", nargs="?", type=int, help="how often each part kills or stops a run")
    parser.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs/torture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="parts whose names contain this")
    flags = parser.parse_args()
    shutil.rmtree(flags.workdir, ignore_errors=True)
    flags.workdir.mkdir(parents=True)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    results = []
    for name, part in PARTS.items():
        if flags.only in name:
            chance = random.Random(f"{flags.seed} {name}")
            results.append(torture(flags.workdir.absolute(), name, flags.number or part[-1], chance))
            (flags.workdir / "torture.json").write_text(json.dumps(results, indent=1))
            print(json.dumps(results[-1]), flush=True)
    print("\n| part | signals | runs | slowest end | exit statuses of the others | tracebacks | ends that differ |")
    print("|---|---|---|---|---|---|---|")
    for r in results:
        codes = ", ".join(f"{n} × {code}" for code, n in sorted(r["statuses"].items()) if n)
        cells = r["part"], r["signals"], r["runs"], f"{r['slowest_end']} s", codes, r["tracebacks"], len(r["faults"])
        print("| " + " | ".join(map(str, cells)) + " |")
    sys.exit(any(r["faults"] for r in results))


if __name__ == "__main__":
    main()
