"""The causal language model: LLaMA 3.1 (Dubey et al. 2024), with its key-value cache.

Letters: B rows, T positions, D width, N query heads, K key-value heads, H head width, V vocabulary, L layers.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pisces_jax.models.layers import CosSin, Linear, RMSNorm, SwiGLU, apply_rope, cos_sin, logical, scanned
from pisces_jax.ops.attention import BACKENDS, attention, cache_mask
from pisces_jax.ops.sharded import look_up
from pisces_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's stretching of the slow rotary frequencies (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """`vocab_size` counts the tokens that exist. The two vocabulary matrices have that many rows, rounded up to a
    multiple of `vocab_multiple` so that they shard evenly; the rows of padding are zeros and are never predicted.
    `attention` names a backend of `models/attention.py`, `remat` a policy of `layers.REMAT_POLICIES`.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_hidden: int
    rope_theta: float = 500_000.0
    rope_scaling: RopeScaling | None = None
    eps: float = 1e-5
    tied_embedding: bool = False
    attention: str = "auto"
    vocab_multiple: int = 1
    remat: str = "none"
    unroll: bool = False

    def __post_init__(self) -> None:
        if self.attention not in BACKENDS:
            raise ValueError(f"attention {self.attention!r} is none of {', '.join(BACKENDS)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are no multiple of {self.kv_heads} key-value heads")

    @property
    def vocab_rows(self) -> int:
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def rope_frequencies(config: TransformerConfig) -> Float[Array, "Half"]:
    """Radians a position, per pair of a head's dimensions; with 3.1's scaling, slow ones are divided by `factor`.

    A frequency whose wavelength is shorter than `original / high` stays, one longer than `original / low` is divided,
    and between them the two are blended linearly in original / wavelength.
    """
    exponents = jnp.arange(0, config.head_dim, 2) / config.head_dim
    frequencies = config.rope_theta**-exponents
    s = config.rope_scaling
    if s is None:
        return frequencies
    turns = s.original_max_position * frequencies / (2 * math.pi)
    blend = jnp.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
    return frequencies * (blend + (1 - blend) / s.factor)


@flax.struct.dataclass
class Cache:
    """Keys and values of the positions so far, left-aligned: row b's position p is slot p."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


def empty_cache(config: TransformerConfig, rows: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    return Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


class Attention(nn.Module):
    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, cache: Any, rope: CosSin, positions: Array, segment_ids: Any) -> tuple[Array, Any]:
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            y = Linear((heads, c.head_dim), ("embed",), (axis, "head_dim"), bias=False, dtype=self.dtype, name=name)(x)
            return constrain(y, "batch", "length", axis, None)

        q = apply_rope(project("query", c.heads, "heads"), rope)
        k = apply_rope(project("key", c.kv_heads, "kv_heads"), rope)
        v = project("value", c.kv_heads, "kv_heads")
        if cache is None:
            ids = None if segment_ids is None else (segment_ids, segment_ids)
            y = attention(q, k, v, causal=True, segment_ids=ids, backend=c.attention)
        else:
            rows = jnp.arange(x.shape[0])[:, None]
            k, v = (old.at[rows, positions].set(new.astype(old.dtype)) for old, new in zip(cache, (k, v), strict=True))
            cache = (k, v)
            y = attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=cache_mask(positions, k.shape[1]))
        y = Linear((c.width,), ("heads", "head_dim"), ("embed",), bias=False, dtype=self.dtype, name="out")(y)
        return y, cache


class Block(nn.Module):
    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Array, cache: Any, rope: CosSin, positions: Array, segment_ids: Any) -> tuple[Array, Any]:
        c = self.config
        x = checkpoint_name(constrain(x, "batch", "stream", "width"), "block_input")
        y = RMSNorm(c.eps, dtype=self.dtype, name="attention_norm")(x)
        y = constrain(y, "batch", "length", "width")
        y, cache = Attention(c, self.dtype, name="attention")(y, cache, rope, positions, segment_ids)
        x = x + constrain(y, "batch", "stream", "width")
        y = RMSNorm(c.eps, dtype=self.dtype, name="mlp_norm")(x)
        y = constrain(y, "batch", "length", "width")
        y = SwiGLU(c.mlp_hidden, dtype=self.dtype, name="mlp")(y)
        return x + constrain(y, "batch", "stream", "width"), cache


class Transformer(nn.Module):
    """Embeddings in, hidden states out; `embed` and `logits` are the two ends of a text model."""

    config: TransformerConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config

        def rows(key: Any, shape: Any, dtype: Any = jnp.float32) -> Array:
            real = jnp.arange(shape[0])[:, None] < c.vocab_size
            return jnp.where(real, nn.initializers.normal(0.02)(key, shape, dtype), 0)

        vocabulary = logical(rows, "vocab", "embed")
        self.embedding = self.param("embedding", vocabulary, (c.vocab_rows, c.width))
        inputs = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = scanned(Block, c.layers, inputs, remat=c.remat, unroll=c.unroll)(c, self.dtype)
        self.final_norm = RMSNorm(c.eps, dtype=self.dtype)
        if not c.tied_embedding:
            self.head = self.param("head", vocabulary, (c.vocab_rows, c.width))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return look_up(self.embedding, tokens, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with these positions written into it.

        Without a cache, x is whole rows: index order is causal order, `positions` only turn the rotary embedding, and
        `segment_ids` (0 is padding) keep packed examples apart. With a cache, `positions` are also the slots, and a
        position sees every slot up to its own.
        """
        rope = cos_sin(positions[..., None].astype(jnp.float32) * rope_frequencies(self.config), self.config.unroll)
        x, slots = self.layers(
            x.astype(self.dtype), None if cache is None else (cache.k, cache.v), rope, positions, segment_ids
        )
        return self.final_norm(x), None if cache is None else Cache(*slots)

    def output_matrix(self) -> Float[Array, "R D"]:
        """R ≥ V rows: those of padding, behind the vocabulary, are not to be predicted."""
        return self.embedding if self.config.tied_embedding else self.head

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """In at least float32, of the tokens that exist."""
        matrix = self.output_matrix().astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        y = jnp.einsum("BTD,VD->BTV", hidden, matrix, preferred_element_type=wide)
        return constrain(y, "batch", "length", "vocab")[..., : self.config.vocab_size]

    def init_all(self, tokens: Int[Array, "B T"]) -> jax.Array:
        """Touches every parameter: what `init` is called with."""
        hidden, _ = self(self.embed(tokens), jnp.zeros(tokens.shape, jnp.int32))
        return self.logits(hidden)
