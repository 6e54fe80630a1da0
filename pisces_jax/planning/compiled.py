"""A config's real training step, compiled for machines that need not exist, and what the result says.

`plan` compiles the step of `training/step.py`, with its optimizer, shardings and donated state, and reads memory and
collectives from the compiled program; nothing is allocated.
"""

import dataclasses
import math
import re
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from pisces_jax.planning import hlo, roofline
from pisces_jax.planning.memory import memory_by_part
from pisces_jax.planning.slices import Slice
from pisces_jax.sharding import MESH_AXES, batch_shards, make_mesh, user_mesh
from pisces_jax.training import flops
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import Trainer, make_trainer

# LLaMA 3's tokens and the four of Pisces (docs/architecture.md): what a config is planned with where its tokenizer is
# a file that need not be here.
VOCABULARY = 128_260


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs; bytes, FLOPs and seconds are of one device and one step unless a name says otherwise."""

    config: str
    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    batch_size: int
    rows_per_device: float
    grad_accum_steps: int
    remat: str
    fits: bool
    peak_bytes: int
    hbm_bytes: int | None  # None: CPUs
    spare_bytes: int | None
    compiler: dict[str, int]  # the compiler's figures
    memory: dict[str, int]  # by formula
    collectives: list[dict[str, Any]]
    wire_bytes_per_step: float
    model_flops_per_step: float
    model_flops_per_step_trained: float  # without frozen parts
    model_flops_by_part: dict[str, float]
    roofline_seconds: dict[str, float] | None
    predicted_step_seconds: float | None
    predicted_mfu: float | None
    mfu_bound: float | None
    compile_seconds: float
    fallbacks: list[str]
    advice: list[str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_plan(config: ConfigDict, where: Slice, vocab_size: int = 0) -> Plan:
    """Compiles the step of one run.

    Raises:
        UserError: a mesh, batch size or model that does not fit together.
    """
    trainer = abstract_trainer(config, where, vocab_size)
    return plan_trainer(trainer, where)


def abstract_trainer(config: ConfigDict, where: Slice, vocab_size: int = 0) -> Trainer:
    """The run's trainer on a mesh of the slice; shapes and shardings alone."""
    program = make_program(config, vocab_size or config.data.tokenizer_vocabulary or VOCABULARY)
    mesh = make_mesh(**config.mesh, devices=where.devices)
    return make_trainer(program, config, mesh)


def compile_step(trainer: Trainer, options: Mapping[str, str] | None = None) -> Any:
    """The compiled training step of a trainer whose devices need not exist.

    Raises:
        jax.errors.JaxRuntimeError: the compiler's, for one that does not fit the memory.
    """
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), trainer.abstract, trainer.shardings
    )
    lowered = trainer.train_step().lower(state, trainer.abstract_batch())
    return lowered.compile(compiler_options=dict(options or {}))


def plan_trainer(trainer: Trainer, where: Slice, options: Mapping[str, str] | None = None) -> Plan:
    config, mesh = trainer.config, trainer.mesh
    start = time.perf_counter()
    found: list[hlo.Collective] = []
    figures: dict[str, int] = {}
    chip = where.chip
    try:
        compiled = compile_step(trainer, options)
    except jax.errors.JaxRuntimeError as error:
        peak = memory_asked_for(str(error))
        if not peak:
            raise
        fits = False
    else:
        analysis = compiled.memory_analysis()
        peak = analysis.peak_memory_in_bytes
        figures = {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "aliased": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "peak": peak,
        }
        found = hlo.collectives(compiled.as_text(), dict(mesh.shape))
        fits = chip is None or peak <= chip.hbm_bytes
    seconds = time.perf_counter() - start

    memory = memory_by_part(trainer)
    trained = set(trainer.shardings.trained)
    n = len(where.devices)
    by_part, executed = work(trainer)
    total = sum(by_part.values())
    bounds = None
    if chip is not None and fits:
        bounds = roofline.roofline(chip, executed, _traffic(trainer, memory), found, mesh.devices, MESH_AXES)
    return Plan(
        config=config.name,
        topology=where.name,
        slices=where.slices,
        devices=n,
        mesh=user_mesh(mesh),
        batch_size=config.batch_size,
        rows_per_device=config.batch_size / n,
        grad_accum_steps=config.optimizer.grad_accum_steps,
        remat=config.model.get(main_part(config), {}).get("remat", "none"),
        fits=fits,
        peak_bytes=peak,
        hbm_bytes=chip.hbm_bytes if chip else None,
        spare_bytes=chip.hbm_bytes - peak if chip else None,
        compiler=figures,
        memory=memory,
        collectives=[dataclasses.asdict(c) for c in sorted(found, key=lambda c: -c.bytes * c.executions)],
        wire_bytes_per_step=hlo.wire_bytes(found),
        model_flops_per_step=total,
        model_flops_per_step_trained=sum(v for k, v in by_part.items() if k in trained),
        model_flops_by_part=by_part,
        roofline_seconds=dataclasses.asdict(bounds) if bounds else None,
        predicted_step_seconds=bounds.predicted if bounds else None,
        predicted_mfu=total / chip.flops / bounds.predicted if bounds and chip else None,
        mfu_bound=total / chip.flops / bounds.bound if bounds and chip else None,
        compile_seconds=seconds,
        fallbacks=[str(f) for f in trainer.fallbacks],
        advice=[] if fits else advise(trainer, memory, peak, chip.hbm_bytes if chip else 0),
    )


def memory_asked_for(error: str) -> int:
    """Bytes that a program would take, from the compiler's refusal; 0 if it refused for something else."""
    words = r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM"
    found = next((match for pattern in words if (match := re.search(pattern, error))), None)
    return 0 if found is None else int(float(found.group(1)) * 2 ** (10 * (1 + "KMGT".index(found.group(2)))))


def main_part(config: ConfigDict) -> str:
    """The part that holds most of a step's activations."""
    return "language_model" if "language_model" in config.model else "decoder"


def work(trainer: Trainer) -> tuple[dict[str, float], float]:
    """Model FLOPs by part, and in all what is executed: rematerialisation computes some again; of one device."""
    trained, n = set(trainer.shardings.trained), trainer.mesh.devices.size
    spec = trainer.program.batch_spec(trainer.config)
    by_part = {
        k: v / n
        for k, v in flops.step_flops_by_part(
            trainer.program, spec, trained
        ).items()
    }
    settings = {k: c for k, c in trainer.config.model.items() if isinstance(c, ConfigDict) and k in trained}
    return by_part, roofline.executed_flops(by_part, {k: c.get("remat", "none") for k, c in settings.items()})


def _traffic(trainer: Trainer, memory: Mapping[str, int]) -> float:
    item = jnp.dtype(trainer.config.compute_dtype).itemsize
    tensor = trainer.mesh.shape["tensor"]
    total = 0.0
    for tree, passes in ((trainer.abstract.trained, 4), (trainer.abstract.frozen, 1)):
        total += passes * roofline.count(tree) / tensor * item
    return roofline.hbm_traffic(memory, total)


def advise(trainer: Trainer, memory: Mapping[str, int], peak: int, hbm: int) -> list[str]:
    """What to change so that the step fits, with what each saves by formula, the least costly first."""
    config = trainer.config
    too_much = peak - hbm
    activations = sum(v for k, v in memory.items() if k.startswith("activations/"))
    groups = trainer.items // batch_shards(trainer.mesh)
    found = []
    part = main_part(config)
    if config.model.get(part, {}).get("remat", "none") not in ("full", "offload"):
        known = f"most of {_gib(activations)}" if activations else "most"
        found.append(
            f"config.model.{part}.remat=full: saves {known} of activations, costs up to a third more computation"
        )
    # Contrast is over the whole batch, in one part.
    if groups > config.optimizer.grad_accum_steps and trainer.program.divisible:
        parts = next(n for n in range(config.optimizer.grad_accum_steps + 1, groups + 1) if groups % n == 0)
        saved = activations * (1 - config.optimizer.grad_accum_steps / parts)
        known = f"about {_gib(saved)}" if saved else "a share"
        found.append(f"config.optimizer.grad_accum_steps={parts}: saves {known} of activations, the same batch")
    sharded = trainer.mesh.shape["fsdp"] * trainer.mesh.shape["fsdp_inner"]
    if trainer.mesh.shape["data"] > 1:
        state = sum(v for k, v in memory.items() if k.partition("/")[0] in ("parameters", "optimizer", "ema"))
        data = trainer.mesh.shape["data"]
        found.append(
            f"--mesh=data=1,fsdp={sharded * data},tensor={trainer.mesh.shape['tensor']}: saves "
            f"{_gib(state * (1 - 1 / data))} of parameters and optimizer state"
        )
    if config.optimizer.mu_dtype == "float32":
        found.append(f"config.optimizer.mu_dtype=bfloat16: saves {_gib(memory['optimizer'] / 4)} of first moments")
    wide = [p for p in trainer.abstract.frozen if config.param_dtype.get(p, "float32") == "float32"]
    if wide:
        saved = sum(memory[f"parameters/{p}"] for p in wide) / 2
        found.append(f"config.param_dtype.{wide[0]}=bfloat16 (and {len(wide) - 1} more): saves {_gib(saved)}")
    devices = math.ceil(np.ceil(peak / max(hbm, 1)))
    found.append(f"a slice of {devices} times as many chips or more (it lacks {_gib(too_much)} a device)")
    return found


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
