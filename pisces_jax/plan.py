"""Says what a config's training step needs on a TPU slice, by compiling it here, without a TPU.

python -m pisces_jax.plan --config=configs/X.py[:stage] --topology=v5p:4x4x4 [--mesh=fsdp=16,tensor=4] [--json=F.json]
"""

import argparse
import json
import os
from pathlib import Path

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command
from pisces_jax.utils.files import write_atomic


def main() -> None:
    rest, overrides = cli.split_overrides(cli.arguments())
    parser = cli.Parser(
        "plan",
        "Compiles the config's real training step, with its optimizer and shardings, for a TPU slice or for fake CPU "
        "devices, and says what it needs: memory, collectives, FLOPs, and a predicted step time. Nothing is allocated "
        "and no TPU is needed (pip install 'jax[tpu]').",
        [
            "--config=configs/text_8b.py --topology=v5p:4x4x4",
            "--config=configs/text_8b.py --topology=v5e-256 --mesh=fsdp=64,tensor=4 --json=plan.json",
            "--config=configs/shapes.py:stage1 --topology=cpu:8",
            "--config=configs/text_8b.py --topology=v5p-128 --search",
        ],
    )
    parser.add_argument("--config", required=True, metavar="FILE[:STAGE]", help="a file like those in configs/")
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="like v5p:4x4x4, v5p-128, v4, v5e, v6e likewise, or cpu:8"
    )
    parser.add_argument("--slices", type=cli.whole_number(1), default=1, help="how many such slices (default 1)")
    parser.add_argument("--mesh", type=_mesh, default=None, metavar="fsdp=16,tensor=4", help="instead of the config's")
    parser.add_argument(
        "--vocab_size", type=cli.whole_number(1), default=0, help="tokens (default: the config's, or 128,260)"
    )
    parser.add_argument("--search", action="store_true", help="try meshes and rematerialisation")
    parser.add_argument("--json", type=Path, metavar="F.json", help="write the plan there as well")
    flags = parser.parse(rest)
    if flags.json is not None:
        cli.check_output(flags.json, "--json", folder=False)
    from pisces_jax.training.config_files import load_stages

    stages = load_stages(flags.config, overrides)
    if len(stages) > 1:
        raise UserError(f"--config={flags.config} has several stages: name one, as {flags.config}:{list(stages)[-1]}")
    (config,) = stages.values()
    if flags.search and flags.mesh is not None:
        raise UserError("--search tries meshes: leave --mesh out, or --search")
    if flags.mesh is not None:
        config.mesh.update({**dict(data=1, fsdp=-1, tensor=1), **flags.mesh})

    _only_cpus(flags.topology)
    from pisces_jax.planning import report, search
    from pisces_jax.planning.compiled import make_plan
    from pisces_jax.planning.slices import find_slice

    where = find_slice(flags.topology, flags.slices)
    if not flags.search:
        plan = make_plan(config, where, flags.vocab_size)
        cli.say(report.describe(plan))
        found = plan.to_json()
    else:
        plans = search.search(config, where, flags.vocab_size, cli.say)
        chosen = search.best(plans)
        cli.say("\n" + report.table(plans) + "\n")
        if chosen is not None:
            cli.say("best that fits:\n" + report.describe(chosen) + f"\nset: {report.settings(chosen)}")
        else:
            nearest = min(plans, key=lambda p: p.peak_bytes)
            cli.say("none of these fits; the one that lacks least:\n" + report.describe(nearest))
        smallest = None
        if where.chip is not None:
            smallest = search.smallest_slice(config, flags.topology, flags.vocab_size, cli.say)
            found_it = f"{smallest.topology}, set: {report.settings(smallest)}" if smallest else "none that was tried"
            cli.say(f"smallest slice that fits: {found_it}")
        found = {
            "best": chosen.to_json() if chosen else None,
            "smallest": smallest.to_json() if smallest else None,
            "tried": [plan.to_json() for plan in plans],
        }
    if flags.json is not None:
        write_atomic(flags.json, json.dumps(found, indent=1) + "\n")


def _mesh(text: str) -> dict[str, int]:
    try:
        sizes = {name: int(size) for name, size in (word.split("=") for word in text.split(","))}
    except ValueError:
        sizes = {"": 0}
    if not set(sizes) <= {"data", "fsdp", "tensor"}:
        raise argparse.ArgumentTypeError(f"{text!r}: write it like data=2,fsdp=16,tensor=4")
    return sizes


def _only_cpus(topology: str) -> None:
    """Before JAX starts: no accelerator of this machine is touched, and there are as many fake CPUs as asked for."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    kind, _, count = topology.partition(":")
    wanted = "--xla_force_host_platform_device_count"
    if kind == "cpu" and count.isdigit() and wanted not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {wanted}={count}".strip()


if __name__ == "__main__":
    run_command(main)
