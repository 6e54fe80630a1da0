"""Says what a config's training step needs on TPUs or GPUs, by compiling it here, without any of them.

python -m pisces_jax.plan --config=configs/X.py[:stage] --topology=v5p:4x4x4|h100:8 [--mesh=fsdp=16,tensor=4]
"""

import json
import os

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command
from pisces_jax.utils.files import write_atomic


def main() -> None:
    rest, overrides = cli.split_overrides(cli.arguments())
    parser = cli.Parser(
        "plan",
        "Compiles the config's training step, with its optimizer and shardings, for a TPU slice, for GPUs or for fake "
        "CPU devices, and says what it needs: memory, collectives, FLOPs, and for TPUs a predicted step time. Nothing "
        "is allocated and no accelerator is needed (pip install -e '.[plan]' for TPUs, '.[plan-gpu]' for GPUs).",
        [
            "--config=configs/shapes.py:stage1 --topology=cpu:2",
            "--config=configs/text_8b.py --topology=v5p:4x4x4",
            "--config=configs/text_8b.py --topology=v5e-256 --mesh=fsdp=64,tensor=4 --json=plan.json",
            "--config=configs/text_8b.py --topology=v5p-128 --search",
            "--config=configs/pisces_1b/stage1.py --topology=h100:1 --config.batch_size=16",
            "--config=configs/blip3o_8b/tune_released.py --topology=v5e-8 --inference --pictures=8",
        ],
    )
    parser.add_argument("--config", required=True, metavar="FILE[:STAGE]", help="a file like those in configs/")
    parser.add_argument(
        "--topology", required=True, metavar="NAME",
        help="like v5p:4x4x4 or v5p-128 (also v4, v5e, v6e), h100:8 or h100:2x8 (also a100, h200, rtx4090), or cpu:2",
    )  # fmt: skip
    parser.add_argument("--slices", type=cli.whole_number(1), default=1, help="how many such slices (default 1)")
    parser.add_argument("--mem_fraction", metavar="0.9", help="JAX's share of a GPU's memory (default: as JAX has it)")
    parser.add_argument(
        "--mesh", type=cli.mesh_sizes, default=None, metavar="fsdp=16,tensor=4", help="instead of the config's"
    )
    parser.add_argument(
        "--vocab_size", type=cli.whole_number(1), default=0, help="tokens (default: the config's, or 128,260)"
    )
    parser.add_argument("--inference", action="store_true", help="plan `generate` with the model, not its training")
    parser.add_argument("--pictures", type=cli.whole_number(1), default=1, help="of --inference, at once (default 1)")
    parser.add_argument("--search", action="store_true", help="try meshes, accumulation and rematerialisation")
    parser.add_argument("--json", type=cli.path, metavar="F.json", help="also write the plan to this file")
    flags = parser.parse(rest)
    if flags.search and (flags.mesh is not None or flags.inference):
        raise UserError(
            f"--search tries meshes: leave {'--inference' if flags.inference else '--mesh'} out, or --search"
        )
    if flags.json is not None:
        cli.check_output(flags.json, "--json", folder=False)

    _only_cpus(flags.topology)  # before the first import that brings JAX
    from pisces_jax.planning import inference, report, search
    from pisces_jax.planning.compiled import make_plan
    from pisces_jax.planning.slices import find_slice
    from pisces_jax.training.config_files import load_stages

    stages = load_stages(flags.config, overrides)
    if len(stages) > 1:
        raise UserError(f"--config={flags.config} has several stages: name one, as {flags.config}:{list(stages)[-1]}")
    (config,) = stages.values()
    if flags.mesh is not None:
        config.mesh.update({**dict(data=1, fsdp=-1, tensor=1), **flags.mesh})
    where = find_slice(flags.topology, flags.slices, flags.mem_fraction)
    if flags.inference:
        found = inference.plan_and_report(config, where, flags.vocab_size, flags.pictures, cli.say)
    elif flags.search:
        found = search.search_and_report(config, where, flags.vocab_size, cli.say)
    else:
        plan = make_plan(config, where, flags.vocab_size)
        cli.say(report.describe(plan))
        found = plan.to_json()
    if flags.json is not None:
        write_atomic(flags.json, json.dumps(found, indent=1) + "\n")


def _only_cpus(topology: str) -> None:
    """Keeps JAX from the accelerators of this machine, and gives it as many fake CPU devices as the topology has.

    JAX reads these variables when it is imported; the last one is for its GPU plugin.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    kind, _, count = topology.partition(":")
    flag, flags = "--xla_force_host_platform_device_count", os.environ.get("XLA_FLAGS", "")
    if kind == "cpu" and count.isdigit() and flag not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {flag}={count}".strip()


if __name__ == "__main__":
    run_command(main)
