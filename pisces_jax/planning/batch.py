"""The shapes of a config's batch, from the config alone: no data is opened."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from pisces_jax.sharding import batch_sharding
from pisces_jax.training.config import picture_size
from pisces_jax.training.programs import DecoderProgram, Program, TextProgram, UnifiedProgram


def batch_shapes(config: ConfigDict, program: Program) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shape and dtype of every array of the global batch, as the input pipeline makes them."""
    d, size = config.data, config.batch_size
    if not isinstance(program, TextProgram | UnifiedProgram):
        side = picture_size(config)
        pictures: dict[str, tuple[tuple[int, ...], Any]] = {"image": ((size, side, side, 3), jnp.uint8)}
        if d.features and isinstance(program, DecoderProgram):
            r = program.reconstruction
            dit = r.decoder.config
            if r.autoencoder is not None:
                pictures = {"latents": ((size, dit.size, dit.size, dit.channels), jnp.float32)}
            pictures["features"] = (size, dit.condition_vectors, dit.condition_width), jnp.float32
        return {
            **pictures,
            "tokens": ((size, d.text_length), jnp.int32),
            "text_mask": ((size, d.text_length), jnp.bool_),
            "id": ((size, 2), jnp.uint32),
            "valid": ((size,), jnp.bool_),
        }
    row = (size, d.rows, d.row_length)
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        name: (row, jnp.int32) for name in ("tokens", "segment_ids", "positions", "source")
    }
    shapes["loss_mask"] = (row, jnp.bool_)
    pools = {"read": (0, 0), "draw": (0, 0)}
    if isinstance(program, UnifiedProgram):
        c = program.model.config
        pools["read"] = d.read_slots, c.understanding_encoder.image_size
        pools["draw"] = d.draw_slots, c.generation_encoder.image_size
    for role, (slots, side) in pools.items():
        if role == "draw" and d.features and isinstance(program, UnifiedProgram):
            shapes["draw_features"] = (
                (size, slots, c.draw_vectors, c.generation_encoder.output_width), jnp.float32
            )  # fmt: skip
        else:
            shapes[f"{role}_images"] = ((size, slots, side, side, 3), jnp.uint8)
        for name in ("row", "start", "source"):
            shapes[f"{role}_{name}"] = ((size, slots), jnp.int32)
        shapes[f"{role}_valid"] = ((size, slots), jnp.bool_)
        shapes[f"{role}_id"] = ((size, slots, 2), jnp.uint32)
    return shapes


def abstract_batch(config: ConfigDict, program: Program, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """The batch without its numbers, as it lies on the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for name, (shape, dtype) in batch_shapes(config, program).items()
    }
