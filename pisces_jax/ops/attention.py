"""Attention with grouped queries over packed rows, its masks, and the choice of who computes it.

`attention` has one meaning and three backends that agree on packed rows, gradients too:

- `xla`: the definition, written out; holds all T×S logits.
- `blockwise` (`models/blockwise.py`): plain JAX, O(T) memory: what GPUs run.
- `splash` (`models/splash.py`): the TPU kernel, O(T) memory.

Letters: B rows, T queries, S keys, N query heads, K key-value heads, G = N/K queries a group, H head width.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pisces_jax.ops.blockwise import blockwise_attention
from pisces_jax.ops.splash import splash_attention
from pisces_jax.sharding import platform

BACKENDS = ("auto", "xla", "blockwise", "splash")
# With fewer keys the logits are smaller than the inputs: nothing is gained by not holding them.
FEW_KEYS = 256


def segment_mask(queries: Int[Array, "B T"], keys: Int[Array, "B S"]) -> Bool[Array, "B T S"]:
    """True where query and key belong to one segment: examples packed in a row never see each other.

    Segments `[1, 1, 2, 0]` (0 is padding) give

        1 1 0 0
        1 1 0 0
        0 0 1 0
        0 0 0 1

    A padding position sees padding alone, so that no row of the softmax is empty.
    """
    return queries[:, :, None] == keys[:, None, :]


def causal_mask(queries: int, keys: int) -> Bool[Array, "1 T S"]:
    """True where the key's index is not after the query's."""
    return (jnp.arange(queries)[:, None] >= jnp.arange(keys)[None, :])[None]


def cache_mask(index: Int[Array, "B T"], slots: int) -> Bool[Array, "B T S"]:
    """True for the cache's slots up to each query's own: the cache is left-aligned, and what lies behind is stale."""
    return jnp.arange(slots)[None, None, :] <= index[:, :, None]


def choose_backend(backend: str, keys: int, masked: bool) -> str:
    """The backend that runs: "auto" by the platform in force; an explicit mask (of a cache) is only known to `xla`.

    Raises:
        ValueError: an unknown backend.
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
    """softmax(q kᵀ / √H) v, softmax in float32 (float64 where the inputs are).

    `causal`, `segment_ids` (of queries and keys) and `mask` (True: seen) hold together. The result is named
    "context" for rematerialisation (`layers.REMAT_POLICIES`).
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
    """`attention` by its definition."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    seen = None
    for part in (
        causal_mask(T, S) if causal else None,
        segment_mask(*segment_ids) if segment_ids is not None else None,
        mask,
    ):
        if part is not None:
            seen = part if seen is None else seen & part
    q = q.reshape(B, T, K, N // K, H) * jnp.asarray(H**-0.5, q.dtype)
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum("BTKGH,BSKH->BKTGS", q, k, preferred_element_type=wide)
    if seen is not None:
        logits = jnp.where(seen[:, None, :, None], logits, jnp.finfo(wide).min)
    # Normalised after the product with v: a division for every H, not for every S.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(axis=-1, keepdims=True)))
    y = jnp.einsum("BKTGS,BSKH->BKTGH", weights.astype(v.dtype), v, preferred_element_type=wide)
    y = y / weights.sum(axis=-1, keepdims=True)
    return y.astype(v.dtype).transpose(0, 2, 1, 3, 4).reshape(B, T, N, H)
