"""Attention in blocks of queries and keys, in plain JAX: O(T) memory on any platform (Dao 2023, FlashAttention-2).

The softmax is accumulated block by block with a running maximum and sum. The backward pass recomputes the weights of
each block from the saved log-sum-exp. Blocks that are completely above the diagonal are skipped.

Letters as in `ops/attention.py`; R blocks of q queries, C blocks of s keys.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

BLOCK = 512


class _Blocks(NamedTuple):
    """Scaled queries [R, B, q, K, G, H], keys and values [C, B, s, K, H], segments [R, B, q] and [C, B, s]."""

    q: Array
    k: Array
    v: Array
    q_ids: Array
    k_ids: Array


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B T N H"]:
    """`attention.attention` in blocks of `BLOCK` positions; zeros for a query that sees no key."""
    if segment_ids is None:
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(k.shape[:2], jnp.int32)
    return _attention(q, k, v, *segment_ids, causal, BLOCK)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q: Array, k: Array, v: Array, q_ids: Array, k_ids: Array, causal: bool, block: int) -> Array:
    return _forward(q, k, v, q_ids, k_ids, causal, block)[0]


def _forward(q: Array, k: Array, v: Array, q_ids: Array, k_ids: Array, causal: bool, block: int) -> tuple[Array, Any]:
    b = _split(q, k, v, q_ids, k_ids, block)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    least = jnp.finfo(wide).min

    def row(i: Array) -> tuple[Array, Array]:
        q_i = b.q[i]

        def column(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, context = carry
            logits, seen = _logits(b, i, j, causal, wide)
            new = jnp.maximum(top, jnp.max(jnp.where(seen, logits, least), axis=-1))
            weights = jnp.where(seen, jnp.exp(logits - new[..., None]), 0)
            shrink = jnp.exp(top - new)
            value = jnp.einsum("BKGTS,BSKH->BKGTH", weights.astype(v.dtype), b.v[j], preferred_element_type=wide)
            return new, total * shrink + weights.sum(-1), context * shrink[..., None] + value

        shape = (q_i.shape[0], *q_i.shape[2:4], q_i.shape[1])
        start = jnp.full(shape, least, wide), jnp.zeros(shape, wide), jnp.zeros((*shape, q_i.shape[-1]), wide)
        top, total, context = jax.lax.fori_loop(0, _last_column(b, i, causal), column, start)
        safe = jnp.where(total > 0, total, 1)
        return (context / safe[..., None]).astype(q.dtype), top + jnp.log(safe)

    context, lse = jax.lax.map(row, jnp.arange(b.q.shape[0]))
    out = jnp.moveaxis(context, 4, 2)  # [R, B, q, K, G, H]
    out = checkpoint_name(_join(out, q.shape), "context")
    return out, (q, k, v, q_ids, k_ids, out, checkpoint_name(lse, "context"))


def _backward(causal: bool, block: int, saved: Any, d_out: Array) -> tuple[Array, Array, Array, None, None]:
    q, k, v, q_ids, k_ids, out, lse = saved
    b = _split(q, k, v, q_ids, k_ids, block)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    rows, columns = b.q.shape[0], b.k.shape[0]
    d_blocks = _cut(_grouped(d_out, k), block)
    # D of the paper: Σ_s p_ts · dp_ts per query, which is the product of the output and its gradient.
    mean = _cut(_grouped(d_out.astype(wide) * out.astype(wide), k).sum(-1), block)

    def weights_of(i: Array, j: Array) -> tuple[Array, Array]:
        """The weights p of a block and the gradients of its logits, [B, K, G, q, s]."""
        logits, seen = _logits(b, i, j, causal, wide)
        weights = jnp.where(seen, jnp.exp(logits - lse[i][..., None]), 0)
        d_weights = jnp.einsum("BTKGH,BSKH->BKGTS", d_blocks[i], b.v[j], preferred_element_type=wide)
        centred = d_weights - jnp.moveaxis(mean[i], 1, 3)[..., None]
        return weights, weights * centred

    def query_row(i: Array) -> Array:
        def column(j: Array, dq: Array) -> Array:
            _, d_logits = weights_of(i, j)
            return dq + jnp.einsum("BKGTS,BSKH->BTKGH", d_logits.astype(k.dtype), b.k[j], preferred_element_type=wide)

        return jax.lax.fori_loop(0, _last_column(b, i, causal), column, jnp.zeros(b.q.shape[1:], wide))

    def key_column(j: Array) -> tuple[Array, Array]:
        def row(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            dk, dv = carry
            weights, d_logits = weights_of(i, j)
            dv += jnp.einsum("BKGTS,BTKGH->BSKH", weights.astype(v.dtype), d_blocks[i], preferred_element_type=wide)
            dk += jnp.einsum("BKGTS,BTKGH->BSKH", d_logits.astype(q.dtype), b.q[i], preferred_element_type=wide)
            return dk, dv

        first = j * b.k.shape[2] // b.q.shape[2] if causal else 0
        zeros = jnp.zeros(b.k.shape[1:], wide)
        return jax.lax.fori_loop(first, rows, row, (zeros, zeros))

    dq = jax.lax.map(query_row, jnp.arange(rows)) * q.shape[-1] ** -0.5
    dk, dv = jax.lax.map(key_column, jnp.arange(columns))
    return (
        _join(dq, q.shape).astype(q.dtype), _join(dk, k.shape).astype(k.dtype), _join(dv, v.shape).astype(v.dtype),
        None, None,
    )  # fmt: skip


_attention.defvjp(_forward, _backward)


def _split(q: Array, k: Array, v: Array, q_ids: Array, k_ids: Array, block: int) -> _Blocks:
    """The inputs in blocks. Padding is segment -1 (queries) or -2 (keys), so that it sees nothing and is not seen."""
    q = _grouped(q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype), k)
    return _Blocks(
        _cut(q, block), _cut(k, block), _cut(v, block), _cut(q_ids, block, -1), _cut(k_ids, block, -2)
    )  # fmt: skip


def _grouped(q: Array, k: Array) -> Array:
    """[B, T, N, H] as [B, T, K, G, H]."""
    return q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[-1])


def _cut(x: Array, block: int, fill: int = 0) -> Array:
    """[B, T, ...] as blocks [R, B, q, ...], padded at the end with `fill`."""
    size = min(block, x.shape[1])
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)
    return jnp.moveaxis(x.reshape(x.shape[0], -1, size, *x.shape[2:]), 1, 0)


def _join(x: Array, shape: tuple[int, ...]) -> Array:
    """Blocks [R, B, q, ...] as an array of `shape`, without the padding."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *shape[2:])[:, : shape[1]]


def _logits(b: _Blocks, i: Array, j: Array, causal: bool, wide: Any) -> tuple[Array, Array]:
    """The logits of block (i, j), [B, K, G, q, s], and a mask of those that are seen."""
    logits = jnp.einsum("BTKGH,BSKH->BKGTS", b.q[i], b.k[j], preferred_element_type=wide)
    seen = b.q_ids[i][:, :, None] == b.k_ids[j][:, None, :]
    if causal:
        queries = i * b.q.shape[2] + jnp.arange(b.q.shape[2])
        keys = j * b.k.shape[2] + jnp.arange(b.k.shape[2])
        seen &= queries[:, None] >= keys[None, :]
    return logits, jnp.broadcast_to(seen[:, None, None], logits.shape)


def _last_column(b: _Blocks, i: Array, causal: bool) -> Array | int:
    """Number of key blocks that the queries of block i may see."""
    columns, size = b.k.shape[0], b.k.shape[2]
    if not causal:
        return columns
    return jnp.minimum(((i + 1) * b.q.shape[2] - 1) // size + 1, columns)
