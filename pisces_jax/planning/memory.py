"""What holds a device's memory, by formula from shapes and shardings: beside the compiler's figures, never forced to
agree with them.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.sharding import batch_shards
from pisces_jax.training.step import Trainer


def shard_bytes(shape: tuple[int, ...], dtype: Any, sharding: Any) -> int:
    """Bytes of an array on one device."""
    return math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize


def tree_bytes(tree: Any, shardings: Any) -> int:
    return sum(
        shard_bytes(leaf.shape, leaf.dtype, sharding)
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def memory_by_part(trainer: Trainer) -> dict[str, int]:
    """Bytes a device: parameters of each part, averaged weights, optimizer, gradients, batch, saved activations."""
    abstract, shardings = trainer.abstract, trainer.shardings
    parts: dict[str, int] = {}
    for tree, where in ((abstract.trained, shardings.trained), (abstract.frozen, shardings.frozen)):
        for part in tree:
            name = f"parameters/{part}"
            parts[name] = parts.get(name, 0) + tree_bytes(tree[part], where[part])
    if abstract.ema:
        parts["ema"] = tree_bytes(abstract.ema, shardings.ema)
    parts["optimizer"] = tree_bytes(abstract.optimizer, shardings.optimizer)
    gradients = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, trainer.config.optimizer.grad_dtype or x.dtype), abstract.trained
    )
    parts["gradients"] = tree_bytes(gradients, shardings.trained)
    batch = trainer.abstract_batch()
    parts["batch"] = sum(shard_bytes(x.shape, x.dtype, x.sharding) for x in batch.values())
    return parts | {f"activations/{k}": v for k, v in saved_activations(trainer).items()}


def saved_activations(trainer: Trainer) -> dict[str, int]:
    """What the blocks save for the backward pass by their rematerialisation policy, in bytes a device.

    A block always has its input; "attention" adds attention's result and one float32 a head for the softmax,
    "dots" the outputs of all projections too. "offload" saves to the host, "none" is counted like
    "dots" with the hidden layer's activation twice more: what the compiler keeps there is its own choice.
    """
    config = trainer.config
    item = jnp.dtype(config.compute_dtype).itemsize
    tensor = trainer.mesh.shape["tensor"]
    shards = batch_shards(trainer.mesh) * config.optimizer.grad_accum_steps
    found = {}
    for part, (settings, positions) in trainer.program.block_positions(config).items():
        if part in trainer.abstract.trained or part == "language_model":
            per_position = _llama if isinstance(settings, TransformerConfig) else _vit
            found[part] = int(settings.layers * (positions // shards) * per_position(settings, tensor, item))
    return found


def _llama(c: TransformerConfig, tensor: int, item: int) -> float:
    """Bytes a position and layer."""
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    context = (heads * item + 4 * c.heads) / tensor
    projections = ((heads + 2 * kv + 2 * c.mlp_hidden) / tensor + 2 * c.width) * item
    return _saved(c.remat, c.width * item / tensor, context, projections, 2 * c.mlp_hidden * item / tensor)


def _vit(c: ViTConfig, tensor: int, item: int) -> float:
    context = (c.width * item + 4 * c.heads) / tensor
    projections = ((3 * c.width + c.mlp_hidden) / tensor + 2 * c.width) * item
    return _saved(c.remat, c.width * item, context, projections, c.mlp_hidden * item / tensor)


def _saved(remat: str, block_input: float, context: float, projections: float, hidden: float) -> float:
    return {
        "full": block_input,
        "attention": block_input + context,
        "dots": block_input + context + projections,
        "offload": 0.0,
        "none": block_input + context + projections + hidden,
    }[remat]


def by_kind(parts: Mapping[str, int]) -> dict[str, int]:
    """The same, parameters of all parts and activations of all parts together."""
    kinds: dict[str, int] = {}
    for name, size in parts.items():
        kind = name.partition("/")[0]
        kinds[kind] = kinds.get(kind, 0) + size
    return kinds
