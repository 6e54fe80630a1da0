"""Compiler flags for accelerators, in named groups, each with its reason. Only the scripts in `launch/` use them.

python -m pisces_jax.xla_flags tpu tpu_v6e      prints the value for LIBTPU_INIT_ARGS

Tests compile a step with every TPU group and start JAX with every GPU group, so that a flag which a release removes
makes a test fail.
"""

import argparse
import dataclasses

from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command


@dataclasses.dataclass(frozen=True)
class Group:
    """Flags that belong together, the environment variable that takes them, and the reason for them."""

    variable: str
    reason: str
    flags: dict[str, str]


GROUPS = {
    "tpu": Group(
        "LIBTPU_INIT_ARGS",
        "All-gathers of the next layer's weights run while this layer computes, split over several matrix products.",
        {
            "xla_tpu_enable_async_collective_fusion": "true",
            "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
            "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
            "xla_tpu_overlap_compute_collective_tc": "true",
            "xla_enable_async_all_gather": "true",
        },
    ),
    "tpu_data_parallel": Group(
        "LIBTPU_INIT_ARGS",
        "For a mesh with data > 1: all-reduces of gradients over slices overlap with the backward pass.",
        {
            "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
            "xla_tpu_data_parallel_opt_different_sized_ops": "true",
        },
    ),
    "tpu_v6e": Group(
        "LIBTPU_INIT_ARGS",
        "Trillium has twice the vector memory: larger tiles, less traffic to HBM.",
        {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    ),
    "gpu": Group(
        "XLA_FLAGS",
        "Collectives overlap with matrix products; small neighbouring ones are combined.",
        {
            "xla_gpu_enable_latency_hiding_scheduler": "true",
            "xla_gpu_all_gather_combine_threshold_bytes": "134217728",
            "xla_gpu_reduce_scatter_combine_threshold_bytes": "134217728",
        },
    ),
}


def arguments(names: list[str]) -> str:
    """The flags of several groups as one string, as the environment variable takes it.

    Raises:
        UserError: a group is unknown, or the groups are for different variables.
    """
    for name in names:
        if name not in GROUPS:
            raise UserError(f"flag group {name!r} does not exist: there are {', '.join(GROUPS)}")
    if len({GROUPS[name].variable for name in names}) > 1:
        raise UserError("these groups are for different variables: ask for TPU and GPU groups separately")
    return " ".join(f"--{flag}={value}" for name in names for flag, value in GROUPS[name].flags.items())


def main() -> None:
    parser = cli.Parser("xla_flags", "Prints the compiler flags of the named groups.", ["tpu", "tpu tpu_v6e", "gpu"])
    parser.add_argument("groups", nargs=argparse.ONE_OR_MORE, metavar="GROUP", help=", ".join(GROUPS))
    cli.say(arguments(parser.parse().groups))


if __name__ == "__main__":
    run_command(main)
