"""Attention with grouped queries (Ainslie et al. 2023) over packed rows, its masks, and the choice of a backend.

`attention` has one definition and three backends that agree on packed rows, gradients included:

- `xla`: the definition, written out; holds all T×S logits.
- `blockwise` (`ops/blockwise.py`): plain JAX with O(T) memory; used on GPUs.
- `splash` (`ops/splash.py`): the TPU kernel, O(T) memory.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K queries per group, H head width.
"""

import functools
import operator

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pisces_jax.ops.blockwise import blockwise_attention
from pisces_jax.ops.splash import splash_attention
from pisces_jax.sharding import platform

BACKENDS = ("auto", "xla", "blockwise", "splash")
# With so few keys the logits are small, and holding all of them costs nothing.
FEW_KEYS = 256


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """True where query and key are in the same segment, so that examples packed in a row do not see each other.

    Segments `[1, 1, 2, 0]` (0 is padding) give

        1 1 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 1

    Padding sees only padding, so that no row of the softmax is empty.
    """
    return queries[:, :, None] == keys[:, None, :]


def causal_mask(queries: int, keys: int) -> Bool[Array, "1 T S"]:
    """True where the key's index is not after the query's."""
    return (jnp.arange(queries)[:, None] >= jnp.arange(keys)[None, :])[None]


def cache_mask(index: Int[Array, "B T"], slots: int) -> Bool[Array, "B T S"]:
    """True for the slots up to the query's own `index`: the cache is left-aligned, and later slots are stale."""
    return jnp.arange(slots)[None, None, :] <= index[:, :, None]


def choose_backend(backend: str, keys: int, masked: bool) -> str:
    """The backend that runs: "auto" chooses by the platform. Explicit masks (of a cache) are computed by `xla` only.

    Raises:
        ValueError: `backend` is not one of `BACKENDS`.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown attention backend {backend!r}; known: {', '.join(BACKENDS)}")
    if masked:
        return "xla"
    if backend != "auto":
        return backend
    if keys <= FEW_KEYS:
        return "xla"
    return {"tpu": "splash", "gpu": "blockwise"}.get(platform(), "xla")


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    backend: str = "auto",
) -> Float[Array, "B T N H"]:
    """softmax(q kᵀ / √H) v (Vaswani et al. 2017, equation 1), in the dtype of v; the softmax in at least float32.

    Args:
        causal: a query sees the keys up to its own index.
        segment_ids: of queries and keys; a query sees the keys of its own segment.
        mask: True where a query sees a key. All three restrictions hold together.
        backend: one of `BACKENDS`.

    The result is named "context" for rematerialisation (`layers.REMAT_POLICIES`).
    """
    chosen = choose_backend(backend, k.shape[1], mask is not None)
    if chosen == "splash":
        return splash_attention(q, k, v, causal=causal, segment_ids=segment_ids)
    if chosen == "blockwise":
        return blockwise_attention(q, k, v, causal=causal, segment_ids=segment_ids)
    return checkpoint_name(xla_attention(q, k, v, causal=causal, segment_ids=segment_ids, mask=mask), "context")


def xla_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
) -> Float[Array, "B T N H"]:
    """`attention`, computed as it is defined."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    masks = [causal_mask(T, S)] if causal else []
    masks += [segment_mask(*segment_ids)] if segment_ids is not None else []
    masks += [mask] if mask is not None else []
    seen = functools.reduce(operator.and_, masks) if masks else None
    q = q.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q.dtype)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("BTKGH,BSKH->BKTGS", q, k, preferred_element_type=wide)
    if seen is not None:
        logits = jnp.where(seen[:, None, :, None], logits, jnp.finfo(wide).min)
    # Normalised after the product with v: H divisions per query and head, not S.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    y = jnp.einsum("BKTGS,BSKH->BKTGH", weights.astype(v.dtype), v, preferred_element_type=wide)
    y = y / weights.sum(axis=-1, keepdims=True)
    return y.astype(v.dtype).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
