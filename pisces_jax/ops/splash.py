"""Attention by JAX's splash kernel for TPUs: O(T) memory, blocks above the diagonal are skipped.

The kernel needs lengths that are multiples of 128. Other lengths (SigLIP's 729) are padded, and the padding is a
segment of its own, so that nothing sees it. The compiler cannot partition a kernel, so it runs inside `shard_map`:
rows over the batch axes, heads over `tensor`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from pisces_jax.sharding import mesh_in_force, partition_spec, platform, spec_axes

LANES = 128
BLOCKS = (512, 384, 256, 128)  # the largest that divides the padded length


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool = False,
    segment_ids: tuple[Int[Array, "B T"], Int[Array, "B S"]] | None = None,
) -> Float[Array, "B T N H"]:
    """`attention.attention` by the kernel, which is interpreted (slow, for tests) on other platforms than TPUs.

    Raises:
        ValueError: the attention is causal and T differs from S.
    """
    T, S = q.shape[1], k.shape[1]
    if causal and T != S:
        raise ValueError(f"causal attention of {T} queries over {S} keys: splash needs equal lengths")
    if segment_ids is None and (T % LANES or S % LANES):
        segment_ids = jnp.zeros(q.shape[:2], jnp.int32), jnp.zeros(k.shape[:2], jnp.int32)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    interpret = platform() != "tpu"
    local = functools.partial(_local, causal=causal, interpret=interpret)

    mesh = mesh_in_force()
    if mesh is None:
        return local(q, k, v, segment_ids)
    heads = partition_spec(("batch", None, "heads", None), q.shape, mesh)
    kv_heads = partition_spec(("batch", None, "kv_heads", None), k.shape, mesh)
    if spec_axes(kv_heads, 2) != spec_axes(heads, 2):  # fewer key-value heads than tensor devices: a copy per query
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
        kv_heads = heads
    rows = PartitionSpec(spec_axes(heads, 0) or None, None)
    ids = None if segment_ids is None else (rows, rows)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(heads, kv_heads, kv_heads, ids), out_specs=heads, check_vma=False
    )(q, k, v, segment_ids)  # fmt: skip


def _local(q: Array, k: Array, v: Array, segment_ids: Any, *, causal: bool, interpret: bool) -> Array:
    """The attention of one device's rows and heads."""
    T = q.shape[1]
    q, k, v = (_pad(x, 0).swapaxes(1, 2) for x in (q, k, v))
    kernel = _kernel(q.shape[1], q.shape[2], k.shape[2], causal, interpret)
    if segment_ids is None:
        out = jax.vmap(kernel)(q, k, v)
    else:
        ids = splash.SegmentIds(*(_pad(x, -1) for x in segment_ids))
        out = jax.vmap(kernel)(q, k, v, ids)
    return out.swapaxes(1, 2)[:, :T]


def _pad(x: Array, fill: int) -> Array:
    """[B, T, ...] padded with `fill` to a multiple of 128 positions."""
    return jnp.pad(x, [(0, 0), (0, -x.shape[1] % LANES), *[(0, 0)] * (x.ndim - 2)], constant_values=fill)


def _kernel(heads: int, queries: int, keys: int, causal: bool, interpret: bool) -> Any:
    mask = splash.CausalMask((queries, keys)) if causal else splash.FullMask((queries, keys))
    block_q, block_kv = (next(b for b in BLOCKS if length % b == 0) for length in (queries, keys))
    sizes = splash.BlockSizes(
        block_q=block_q, block_kv=block_kv, block_kv_compute=block_kv,
        block_q_dkv=block_q, block_kv_dkv=block_kv, block_kv_dkv_compute=block_kv,
        block_q_dq=block_q, block_kv_dq=block_kv,
    )  # fmt: skip
    return splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        residual_checkpoint_name="context", interpret=interpret,
    )  # fmt: skip
