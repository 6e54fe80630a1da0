"""What drawing needs: the two programs of `inference.model.Model`, compiled for devices that need not be here.

First the language model, its cache and the flow head make the vectors of a batch of prompts; then the decoder makes
pictures of them. Nothing is allocated.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from pisces_jax.inference.decode import Decoder, DiffusionDecoder
from pisces_jax.inference.loading import Places
from pisces_jax.inference.model import Model
from pisces_jax.inference.released import decoder_of_folder
from pisces_jax.inference.rollout import Pool, Prompts
from pisces_jax.inference.sampling import Choices
from pisces_jax.losses.diffusion import DiffusionConfig
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.transformer import empty_cache
from pisces_jax.models.unet import UNet
from pisces_jax.planning.compiled import memory_asked_for, planned_program
from pisces_jax.planning.memory import peak_and_host, tree_bytes
from pisces_jax.planning.slices import Slice
from pisces_jax.sharding import make_mesh, user_mesh
from pisces_jax.training import config as settings
from pisces_jax.training.programs import program_class
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.units import gib
from pisces_jax.weights.folder import boxed_shapes
from pisces_jax.weights.sizes import EMU2_UNET, SDXL_AUTOENCODER

PROMPT = 128  # tokens of a prompt, template and all, that are planned for


@dataclasses.dataclass(frozen=True)
class InferencePlan:
    """What drawing needs, in bytes per device.

    Attributes:
        parameters: by part, by formula.
        cache: of keys and values, by formula.
        peaks: of each phase, as the compiler says, with that phase's parameters; where it refused, what it asked for.
        resident: the highest with all parameters there all the time (`generate`).
        in_turn: the highest with each phase's parameters there alone (`generate --offload`).
    """

    config: str
    topology: str
    devices: int
    mesh: dict[str, int]
    pictures: int
    dtype: str
    size: int  # side of the pictures, in pixels
    parameters: dict[str, int]
    cache: int
    peaks: dict[str, int]
    resident: int
    in_turn: int
    usable_bytes: int | None
    usable_is: str
    compile_seconds: float

    @property
    def fits(self) -> bool:
        return self.usable_bytes is None or self.resident <= self.usable_bytes

    @property
    def fits_in_turn(self) -> bool:
        return self.usable_bytes is None or self.in_turn <= self.usable_bytes

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "fits": self.fits, "fits_in_turn": self.fits_in_turn}


def make_inference_plan(
    config: ConfigDict, where: Slice, vocab_size: int = 0, pictures: int = 1, dtype: str = "bfloat16"
) -> InferencePlan:
    """Compiles the drawing of `pictures` pictures at once with the model of a unified config.

    Raises:
        UserError: the config's model draws nothing, or no decoder is known for its vectors.
    """
    if not program_class(config).reads_and_draws(config):
        raise UserError(f"--inference: {config.name} is no model that draws: name the config of a unified run")
    config.compute_dtype = dtype
    program = planned_program(config, vocab_size)
    mesh = make_mesh(**config.mesh, devices=where.devices)
    decoder, how = _decoder(config)
    tokens = program.model.config.language_model.vocab_size  # type: ignore[attr-defined]
    # What `Model` asks of a tokenizer before there are prompts.
    special: Any = SimpleNamespace(vocab_size=tokens, eos=0, begin_image=1, special=frozenset())
    model = Model(config, special, None, decoder, None, how, pictures, mesh)

    places, kind = Places(mesh, dtype), jnp.dtype(dtype)
    boxed = dict(jax.eval_shape(program.init, jax.random.key(0)))
    boxed.pop("generation_encoder")  # drawing needs none
    for part, network in (("decoder", decoder.network), ("autoencoder", decoder.autoencoder)):
        boxed[part] = boxed_shapes(network.config)
    shardings = {part: places.of(tree) for part, tree in boxed.items()}
    params = {
        part: jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, kind, sharding=s), nn.unbox(tree), shardings[part]
        )
        for part, tree in boxed.items()
    }
    parameters = {part: tree_bytes(tree, shardings[part]) for part, tree in params.items()}
    c = program.model.config  # type: ignore[attr-defined]
    slots = PROMPT + c.draw_positions + 2
    cache = jax.eval_shape(lambda: empty_cache(c.language_model, pictures, slots, kind))
    cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    start = time.perf_counter()
    own = {part: params[part] for part in params if part not in decoder.parts}
    everywhere = NamedSharding(mesh, PartitionSpec())

    def given(shape: tuple[int, ...], dtype: Any) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere)

    keys = given((pictures,), jax.eval_shape(lambda: jax.random.key(0)).dtype)
    none = Pool(given((0, 8, 8, 3), jnp.uint8), *[given((0,), t) for t in (jnp.int32, jnp.int32, jnp.bool_)])
    prompts = Prompts(given((pictures, PROMPT), jnp.int32), given((pictures,), jnp.int32), none, none)
    wide = jnp.promote_types(kind, jnp.float32)
    vectors = given((pictures, c.draw_vectors, c.generation_encoder.output_width), wide)
    null = given((1, *vectors.shape[1:]), wide) if decoder.takes_null else None
    drawing, idle = {part: params[part] for part in decoder.parts}, Choices.of([None] * pictures)
    with jax.set_mesh(mesh):
        lowered = {
            "vectors": model.programs["vectors"].lower(own, prompts, keys, idle, 0, model.vector_flow),
            "pictures": model.programs["pictures"].lower(drawing, vectors, keys, how, null),
        }
        sizes = {
            "vectors": sum(parameters[part] for part in own), "pictures": sum(parameters[p] for p in decoder.parts)
        }  # fmt: skip
        peaks = {phase: _peak(program, sizes[phase]) for phase, program in lowered.items()}
    held = {"vectors": sizes["pictures"], "pictures": sizes["vectors"]}  # what waits there while a phase runs
    return InferencePlan(
        config=config.name, topology=where.name, devices=len(where.devices), mesh=user_mesh(mesh), pictures=pictures,
        dtype=dtype, size=decoder.size, parameters=parameters, cache=cache_bytes, peaks=peaks,
        resident=max(peaks[phase] + held[phase] for phase in peaks), in_turn=max(peaks.values()),
        usable_bytes=where.chip.usable_bytes if where.chip else None, usable_is=where.chip.limit if where.chip else "",
        compile_seconds=time.perf_counter() - start,
    )  # fmt: skip


def _peak(lowered: jax.stages.Lowered, parameters: int) -> int:
    """The peak of a phase whose `parameters` are all there; the compiler leaves out those that it does not use."""
    try:
        analysis: Any = lowered.compile().memory_analysis()
        return peak_and_host(analysis)[0] + max(0, parameters - analysis.argument_size_in_bytes)
    except jax.errors.JaxRuntimeError as error:
        if asked := memory_asked_for(str(error)):
            return asked
        raise


def _decoder(config: ConfigDict) -> tuple[Any, Any]:
    """The decoder of Emu2-Gen for the config's vectors: of the folder that it names, or where that is not here, the
    published one."""
    if config.decoder and Path(config.decoder, "unet").is_dir():
        return decoder_of_folder(config.decoder, config)
    width = settings.vit_config(config, "generation_encoder").output_width
    if width != EMU2_UNET.condition_width:
        raise UserError(
            f"--inference: the published decoder draws from vectors of {EMU2_UNET.condition_width} numbers and "
            f"{config.name}'s have {width}: name the folder of another in config key decoder"
        )
    dtype = jnp.dtype(config.compute_dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    decoder: Decoder = DiffusionDecoder(UNet(EMU2_UNET, dtype), Autoencoder(SDXL_AUTOENCODER, wide))
    return decoder, DiffusionConfig()


def plan_and_report(
    config: ConfigDict, where: Slice, vocab_size: int, pictures: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Plans, says it in words, and returns it as JSON."""
    plan = make_inference_plan(config, where, vocab_size, pictures)
    say(describe(plan))
    return plan.to_json()


def describe(plan: InferencePlan) -> str:
    """The plan for people."""
    mesh = ",".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"
    lines = [
        f"drawing {plan.pictures} picture{'s' * (plan.pictures > 1)} of {plan.size} pixels at once with {plan.config} "
        f"on {plan.topology}, mesh {mesh}, {plan.dtype}",
        "",
    ]
    for number, name, fits in (
        (plan.resident, "all parameters stay there", plan.fits),
        (plan.in_turn, "each phase's alone (generate --offload)", plan.fits_in_turn),
    ):
        words = f"peak {gib(number)} per device"
        if plan.usable_bytes is not None:
            words = f"{'fits' if fits else 'does NOT fit'}: {words} of {gib(plan.usable_bytes)}"
        lines.append(f"memory    {words}: {name}")
    if plan.usable_is:
        lines.append(f"          usable:     {plan.usable_is}")
    lines.append("          by phase:   " + ", ".join(f"{name} {gib(size)}" for name, size in plan.peaks.items()))
    lines.append("          parameters: " + ", ".join(f"{part} {gib(n)}" for part, n in plan.parameters.items()))
    lines.append(f"          cache:      {gib(plan.cache)} of all devices, for prompts of up to {PROMPT} tokens")
    return "\n".join([*lines, "", f"compiled in {plan.compile_seconds:.0f} s"])
