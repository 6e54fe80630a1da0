"""A config's training step, compiled for devices that need not exist, and what the compiled program says.

The step is that of `training/step.py`, with its optimizer, shardings and donated state. Memory and collectives are read
from the compiled program; nothing is allocated.
"""

import dataclasses
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from pisces_jax.planning import hlo
from pisces_jax.planning.advice import advise
from pisces_jax.planning.memory import main_part, memory_by_part, peak_and_host
from pisces_jax.planning.roofline import hbm_traffic, roofline, work
from pisces_jax.planning.slices import Slice
from pisces_jax.sharding import make_mesh, user_mesh
from pisces_jax.training.programs import Program, make_program
from pisces_jax.training.step import Trainer, make_trainer

# LLaMA 3's tokens and the four of Pisces (docs/architecture.md), for configs whose tokenizer is a file that need not be
# here.
VOCABULARY = 128_260


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs. Bytes, FLOPs and seconds are per device and step unless a name says otherwise."""

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
    peak_bytes: int  # of the device's memory
    host_bytes: int  # what the step keeps in the host's memory for each device
    hbm_bytes: int | None  # the chip's; None: CPUs
    usable_bytes: int | None  # what of them a step may use
    usable_is: str  # in words, where it is not all of them
    spare_bytes: int | None  # of those usable
    compiler: dict[str, int]  # the compiler's figures; empty where it refused
    memory: dict[str, int]  # by formula
    collectives: list[dict[str, Any]]
    wire_bytes_per_step: float
    model_flops_per_step: float
    model_flops_per_step_trained: float  # without frozen parts
    model_flops_by_part: dict[str, float]
    roofline_seconds: dict[str, float] | None
    predicted_step_seconds: float | None  # None: nothing calibrates a prediction for the chip
    predicted_mfu: float | None
    mfu_bound: float | None
    compile_seconds: float
    fallbacks: list[str]
    advice: list[str]

    @property
    def bound_seconds(self) -> float | None:
        """The roofline's greatest bound."""
        return max(self.roofline_seconds.values()) if self.roofline_seconds else None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_plan(config: ConfigDict, where: Slice, vocab_size: int = 0) -> Plan:
    """Compiles the step of one run.

    Raises:
        UserError: a mesh, batch size or model that does not fit together.
    """
    return plan_trainer(abstract_trainer(config, where, vocab_size), where)


def planned_program(config: ConfigDict, vocab_size: int = 0) -> Program:
    """The config's program with `vocab_size` tokens; 0: as many as the config trains, or `VOCABULARY`."""
    return make_program(config, vocab_size or config.data.tokenizer_vocabulary or VOCABULARY)


def abstract_trainer(config: ConfigDict, where: Slice, vocab_size: int = 0) -> Trainer:
    """The run's trainer on a mesh of the slice: shapes and shardings alone."""
    program = planned_program(config, vocab_size)
    return make_trainer(program, config, make_mesh(**config.mesh, devices=where.devices))


def compile_step(trainer: Trainer) -> jax.stages.Compiled:
    """The compiled training step of a trainer whose devices need not exist.

    Raises:
        jax.errors.JaxRuntimeError: the compiler's, for a step that does not fit into memory.
    """
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), trainer.abstract, trainer.shardings
    )
    return trainer.train_step().lower(state, trainer.abstract_batch()).compile()


def plan_trainer(trainer: Trainer, where: Slice) -> Plan:
    """Compiles the step of a trainer on the devices of `where`."""
    config, mesh, chip = trainer.config, trainer.mesh, where.chip
    found: list[hlo.Collective] = []
    figures: dict[str, int] = {}
    host = 0
    start = time.perf_counter()
    try:
        compiled = compile_step(trainer)
    except jax.errors.JaxRuntimeError as error:
        peak = memory_asked_for(str(error))
        if not peak:
            raise
        fits = False
    else:
        analysis: Any = compiled.memory_analysis()
        peak, host = peak_and_host(analysis)
        figures = {
            "arguments": analysis.argument_size_in_bytes,
            "outputs": analysis.output_size_in_bytes,
            "aliased": analysis.alias_size_in_bytes,
            "temporaries": analysis.temp_size_in_bytes,
            "host": host,
            "peak": analysis.peak_memory_in_bytes,
        }
        found = hlo.collectives(str(compiled.as_text()), dict(mesh.shape))
        fits = chip is None or peak <= chip.usable_bytes
    seconds = time.perf_counter() - start

    memory = memory_by_part(trainer)
    by_part, executed = work(trainer)
    flops = sum(by_part.values())
    bounds = roofline(chip, executed, hbm_traffic(trainer, memory), found, mesh) if chip and fits else None
    predicted = bounds.predicted if bounds and chip and chip.calibrated else None
    advice = [] if fits or not chip else chip.more_memory(peak) + advise(trainer, memory, peak, chip.usable_bytes)
    return Plan(
        config=config.name,
        topology=where.name,
        slices=where.slices,
        devices=len(where.devices),
        mesh=user_mesh(mesh),
        batch_size=config.batch_size,
        rows_per_device=config.batch_size / len(where.devices),
        grad_accum_steps=config.optimizer.grad_accum_steps,
        remat=config.model.get(main_part(config), {}).get("remat", "none"),
        fits=fits,
        peak_bytes=peak,
        host_bytes=host,
        hbm_bytes=chip.hbm_bytes if chip else None,
        usable_bytes=chip.usable_bytes if chip else None,
        usable_is=chip.limit if chip else "",
        spare_bytes=chip.usable_bytes - peak if chip else None,
        compiler=figures,
        memory=memory,
        collectives=[dataclasses.asdict(c) for c in sorted(found, key=lambda c: -c.bytes * c.executions)],
        wire_bytes_per_step=hlo.wire_bytes(found),
        model_flops_per_step=flops,
        model_flops_per_step_trained=sum(v for part, v in by_part.items() if part in trainer.shardings.trained),
        model_flops_by_part=by_part,
        roofline_seconds=dataclasses.asdict(bounds) if bounds else None,
        predicted_step_seconds=predicted,
        predicted_mfu=flops / chip.flops / predicted if predicted and chip else None,
        mfu_bound=flops / chip.flops / bounds.bound if bounds and chip else None,
        compile_seconds=seconds,
        fallbacks=[str(f) for f in trainer.fallbacks],
        advice=advice,
    )


def memory_asked_for(error: str) -> int:
    """Bytes that a program would take, from the compiler's refusal; 0 if it refused for another reason."""
    sentences = (
        r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm",
        r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM",
    )
    found = next((match for pattern in sentences if (match := re.search(pattern, error))), None)
    return 0 if found is None else int(float(found.group(1)) * 2 ** (10 * (1 + "KMGT".index(found.group(2)))))
