"""What fills a device's memory, by formula from shapes and shardings.

It stands beside the compiler's figures and is not adjusted to agree with them.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.sharding import batch_shards
from pisces_jax.training.step import Trainer


def main_part(config: ConfigDict) -> str:
    """The part that holds most of a step's activations."""
    return "language_model" if "language_model" in config.model else "decoder"


def shard_bytes(shape: tuple[int, ...], dtype: Any, sharding: Any) -> int:
    """Bytes of an array on one device."""
    return math.prod(sharding.shard_shape(shape)) * jnp.dtype(dtype).itemsize


def tree_bytes(tree: Any, shardings: Any) -> int:
    """Bytes of a tree of arrays on one device."""
    return sum(
        shard_bytes(leaf.shape, leaf.dtype, sharding)
        for leaf, sharding in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True)
    )


def peak_and_host(analysis: Any) -> tuple[int, int]:
    """The peak of a device's own memory and what a program keeps in the host's, in bytes, from a
    `jax.stages.Compiled`'s `memory_analysis()`.

    The compiler's peak has both in it (`remat="offload"`). What is offloaded is all there at the peak, between the
    forward and the backward pass. Arguments and new outputs lie on the device in any case.
    """
    a = analysis
    host = (
        a.host_temp_size_in_bytes + a.host_argument_size_in_bytes
        + a.host_output_size_in_bytes - a.host_alias_size_in_bytes
    )  # fmt: skip
    held = a.argument_size_in_bytes + a.output_size_in_bytes - a.alias_size_in_bytes
    return max(a.peak_memory_in_bytes - host, held) if host else a.peak_memory_in_bytes, host


def memory_by_part(trainer: Trainer) -> dict[str, int]:
    """Bytes per device of the parameters of each part, averaged weights, optimizer, gradients, batch and of the
    activations that each part saves."""
    abstract, shardings = trainer.abstract, trainer.shardings
    found: Counter[str] = Counter()
    for tree, where in ((abstract.trained, shardings.trained), (abstract.frozen, shardings.frozen)):
        for part in tree:
            found[f"parameters/{part}"] += tree_bytes(tree[part], where[part])
    if abstract.ema:
        found["ema"] = tree_bytes(abstract.ema, shardings.ema)
    found["optimizer"] = tree_bytes(abstract.optimizer, shardings.optimizer)
    dtype = trainer.config.optimizer.grad_dtype
    gradients = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype), abstract.trained)
    found["gradients"] = tree_bytes(gradients, shardings.trained)
    found["batch"] = sum(shard_bytes(x.shape, x.dtype, x.sharding) for x in trainer.abstract_batch().values())
    return found | {f"activations/{part}": size for part, size in saved_activations(trainer).items()}


def saved_activations(trainer: Trainer) -> dict[str, int]:
    """Bytes per device that the blocks of each part save for the backward pass, by their rematerialisation policy.

    All but "offload", which saves to the host, keep a block's input. "attention" adds attention's result and one
    float32 per head for the softmax, "dots" the outputs of all projections too. "none" counts as "dots" and the hidden
    layer's activations once more: what the compiler keeps there is its own choice.
    """
    config = trainer.config
    item = jnp.dtype(config.compute_dtype).itemsize
    tensor = trainer.mesh.shape["tensor"]
    shards = batch_shards(trainer.mesh) * config.optimizer.grad_accum_steps
    found = {}
    for part, (settings, positions) in trainer.program.block_positions(config).items():
        if part in trainer.abstract.trained or part == "language_model":
            per_position = _transformer if isinstance(settings, TransformerConfig) else _vit
            found[part] = int(settings.layers * (positions // shards) * per_position(settings, tensor, item))
    return found


def _transformer(c: TransformerConfig, tensor: int, item: int) -> float:
    """Bytes per position and layer."""
    heads, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    context = (heads * item + 4 * c.heads) / tensor
    projections = ((heads + 2 * kv + 2 * c.mlp_hidden) / tensor + 2 * c.width) * item
    return _saved(c.remat, c.width * item / tensor, context, projections, 2 * c.mlp_hidden * item / tensor)


def _vit(c: ViTConfig, tensor: int, item: int) -> float:
    """Bytes per position and layer."""
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
    """The same with the parameters of all parts, and the activations of all parts, added up."""
    kinds: Counter[str] = Counter()
    for name, size in parts.items():
        kinds[name.partition("/")[0]] += size
    return dict(kinds)
