"""Cross-entropy over a vocabulary that never holds all logits, also where the vocabulary is sharded.

Letters: B rows, T positions, D width, R rows of the output matrix, V tokens in a block of the vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pisces_jax.ops.sharded import batch_axes, reduce_scatter, rows_divide
from pisces_jax.sharding import gathered, mesh_in_force, partition_spec, spec_axes


def text_cross_entropy(
    hidden: Float[Array, "B T D"],
    matrix: Float[Array, "R D"],
    targets: Int[Array, "B T"],
    *,
    chunk: int = 0,
    vocab_size: int = 0,
) -> Float[Array, "B T"]:
    """−log softmax(hidden · matrixᵀ)[target] per position, in at least float32.

    The log-sum-exp is accumulated over blocks of the vocabulary, and the backward pass recomputes the logits of each
    block, so an array [B, T, R] never exists. The matrix is gathered over fsdp once, in the dtype of `hidden`, and kept
    for the backward pass. Over `tensor` it stays sharded: each device computes its own part of the vocabulary.

    Args:
        chunk: most tokens in a block; 0 is one block.
        vocab_size: the rows of `matrix` from here on are padding, without loss and gradient; 0 means no padding.
    """
    mesh = mesh_in_force()
    if mesh is not None and not rows_divide(hidden, mesh):
        mesh = None  # then the compiler chooses how the rows are sharded
    return _cross_entropy(hidden, matrix, targets, chunk, vocab_size or matrix.shape[0], mesh)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _cross_entropy(h: Array, matrix: Array, targets: Array, chunk: int, vocab_size: int, mesh: Any) -> Array:
    return _cross_entropy_forward(h, matrix, targets, chunk, vocab_size, mesh)[0]


def _cross_entropy_forward(
    h: Array, matrix: Array, targets: Array, chunk: int, vocab_size: int, mesh: Any
) -> tuple[Array, Any]:
    whole = gathered(matrix.astype(h.dtype), "vocab", "embed")

    def local(h: Array, w: Array, targets: Array, parts: tuple[str, ...]) -> tuple[Array, Array]:
        """The losses and log-sum-exps; `parts` are the mesh axes over which the vocabulary is sharded."""
        first, size, blocks = _blocks(w, chunk, parts)
        wide = jnp.promote_types(h.dtype, jnp.float32)
        least = jnp.finfo(wide).min

        def block(carry: tuple[Array, Array, Array], i: Array) -> tuple[Any, None]:
            top, total, right = carry
            logits, entries = _block_logits(h, w, first, size, i, vocab_size)
            new = jnp.maximum(top, logits.max(-1))
            total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None]).sum(-1)
            return (new, total, right + jnp.where(entries == targets[..., None], logits, 0).sum(-1)), None

        zeros = jnp.zeros(targets.shape, wide)
        (top, total, right), _ = jax.lax.scan(block, (jnp.full_like(zeros, least), zeros, zeros), jnp.arange(blocks))
        if parts:
            best = jax.lax.pmax(top, parts)
            total, top = jax.lax.psum(total * jnp.exp(top - best), parts), best
            right = jax.lax.psum(right, parts)
        lse = top + jnp.log(total)
        return lse - right, lse

    if mesh is None:
        loss, lse = local(h, whole, targets, ())
    else:
        _, states, vocabulary, positions, parts = _layout(matrix, mesh)
        loss, lse = jax.shard_map(
            functools.partial(local, parts=parts), mesh=mesh, in_specs=(states, vocabulary, positions),
            out_specs=(positions, positions), check_vma=False,
        )(h, whole, targets)  # fmt: skip
    return loss, (h, matrix, whole, targets, lse)


def _cross_entropy_backward(chunk: int, vocab_size: int, mesh: Any, saved: Any, d_loss: Array) -> tuple[Any, ...]:
    h, matrix, whole, targets, lse = saved

    def local(
        h: Array, w: Array, targets: Array, lse: Array, d_loss: Array, parts: tuple[str, ...], reduce: Any
    ) -> tuple[Array, Array]:
        first, size, blocks = _blocks(w, chunk, parts)
        wide = lse.dtype

        def block(dh: Array, i: Array) -> tuple[Array, Array]:
            logits, entries = _block_logits(h, w, first, size, i, vocab_size)
            d_logits = jnp.exp(logits - lse[..., None]) - (entries == targets[..., None])
            d_logits = (d_logits * d_loss[..., None]).astype(h.dtype)
            rows = jax.lax.dynamic_slice_in_dim(w, i * size, size)
            dh = dh + jnp.einsum("BTV,VD->BTD", d_logits, rows, preferred_element_type=wide)
            return dh, reduce(jnp.einsum("BTV,BTD->VD", d_logits, h, preferred_element_type=wide).astype(h.dtype))

        dh, dw = jax.lax.scan(block, jnp.zeros(h.shape, wide), jnp.arange(blocks))
        if parts:
            dh = jax.lax.psum(dh.astype(h.dtype), parts)
        return dh.astype(h.dtype), dw.reshape(w.shape[0], -1)

    if mesh is None:
        dh, dw = local(h, whole, targets, lse, d_loss, (), lambda x: x)
    else:
        stored, states, vocabulary, positions, parts = _layout(matrix, mesh)
        reduce = reduce_scatter(stored, mesh, 2)
        dh, dw = jax.shard_map(
            functools.partial(local, parts=parts, reduce=reduce), mesh=mesh,
            in_specs=(states, vocabulary, positions, positions, positions), out_specs=(states, stored),
            check_vma=False,
        )(h, whole, targets, lse, d_loss)  # fmt: skip
    return dh, dw.astype(matrix.dtype), None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _layout(matrix: Array, mesh: Any) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec, PartitionSpec, Any]:
    """The specs of stored matrix, hidden states, gathered matrix and positions, and the axes of the vocabulary."""
    stored = partition_spec(("vocab", "embed"), matrix.shape, mesh)
    rows, parts = batch_axes(mesh) or None, spec_axes(stored, 0)
    return stored, PartitionSpec(rows, None, None), PartitionSpec(parts or None, None), PartitionSpec(rows, None), parts


def _blocks(w: Array, chunk: int, parts: tuple[str, ...]) -> tuple[Array, int, int]:
    """The first token of this device's part of the vocabulary, the size of a block, and the number of blocks.

    All blocks are of one size, the largest of at most `chunk` tokens that divides the part.
    """
    entries = w.shape[0]
    least = -(-entries // chunk) if chunk else 1
    blocks = next(n for n in range(least, entries + 1) if entries % n == 0)
    first = jax.lax.axis_index(parts) * entries if parts else jnp.zeros((), jnp.int32)
    return first, entries // blocks, blocks


def _block_logits(h: Array, w: Array, first: Array, size: int, i: Array, vocab_size: int) -> tuple[Array, Array]:
    """The logits [B, T, size] of block i, and their tokens [size]."""
    wide = jnp.promote_types(h.dtype, jnp.float32)
    rows = jax.lax.dynamic_slice_in_dim(w, i * size, size)
    logits = jnp.einsum("BTD,VD->BTV", h, rows, preferred_element_type=wide)
    entries = first + i * size + jnp.arange(size)
    return jnp.where(entries < vocab_size, logits, jnp.finfo(wide).min), entries
