"""The causal language model: LLaMA 3.1 (Dubey et al. 2024, arXiv 2407.21783), with a key-value cache.

Letters: B rows, T positions, S slots of the cache, D width, K key-value heads, H head width, V vocabulary, R rows of a
vocabulary matrix, L layers.
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
from pisces_jax.models.lora import LoRA
from pisces_jax.ops.attention import BACKENDS, attention, cache_mask
from pisces_jax.ops.sharded import look_up
from pisces_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's scaling of low rotary frequencies (`rope_type: llama3` in its configs), see `rope_frequencies`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Settings of the language model.

    Attributes:
        vocab_size: number of tokens that exist.
        vocab_multiple: the vocabulary matrices have `vocab_size` rows, rounded up to a multiple of this, so that they
            shard evenly. The rows of padding are zeros and are never predicted.
        tied_embedding: whether the embedding is also the output matrix.
        qkv_bias: whether the projections to queries, keys and values have biases (Qwen2.5).
        attention: one of `attention.BACKENDS`.
        remat, unroll: as in `layers.scanned`.
        lora: adapters of the blocks' matrices, if there are any.

    Raises:
        ValueError: the backend is unknown, or the heads are not a multiple of the key-value heads.
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
    qkv_bias: bool = False
    attention: str = "auto"
    vocab_multiple: int = 1
    remat: str = "none"
    unroll: bool = False
    lora: LoRA | None = None

    def __post_init__(self) -> None:
        if self.attention not in BACKENDS:
            raise ValueError(f"attention {self.attention!r} is not one of {', '.join(BACKENDS)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"{self.heads} query heads are not a multiple of {self.kv_heads} key-value heads")

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary matrices."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


def rope_frequencies(config: TransformerConfig) -> Float[Array, "Half"]:
    """Radians per position, for each pair of a head's dimensions (Su et al. 2021, arXiv 2104.09864).

    With LLaMA 3.1's scaling, a frequency whose wavelength is shorter than `original / high` stays, one whose wavelength
    is longer than `original / low` is divided by `factor`, and between them the two are blended, linearly in
    `original / wavelength`.
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
    """Keys and values of the positions so far, left-aligned: position p of a row is in slot p."""

    k: Float[Array, "L B S K H"]
    v: Float[Array, "L B S K H"]


def empty_cache(config: TransformerConfig, rows: int, slots: int, dtype: Any = jnp.float32) -> Cache:
    """A cache of zeros for rows of at most `slots` positions."""
    shape = (config.layers, rows, slots, config.kv_heads, config.head_dim)
    zeros = constrain(jnp.zeros(shape, dtype), None, "batch", None, "kv_heads", None)
    return Cache(zeros, zeros)


class Attention(nn.Module):
    """Causal self-attention with grouped queries; `cache` is that of all layers, of which this one is `layer`, or
    None."""

    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Array, cache: Cache | None, layer: Any, rope: CosSin, positions: Array, segment_ids: Any
    ) -> tuple[Array, Cache | None]:
        c = self.config

        def project(name: str, heads: int, axis: str) -> Array:
            shape, axes = (heads, c.head_dim), (axis, "head_dim")
            y = Linear(shape, ("embed",), axes, bias=c.qkv_bias, dtype=self.dtype, lora=c.lora, name=name)(x)
            return constrain(y, "batch", "length", axis, None)

        q = apply_rope(project("query", c.heads, "heads"), rope)
        k = apply_rope(project("key", c.kv_heads, "kv_heads"), rope)
        v = project("value", c.kv_heads, "kv_heads")
        if cache is None:
            ids = None if segment_ids is None else (segment_ids, segment_ids)
            y = attention(q, k, v, causal=True, segment_ids=ids, backend=c.attention)
        else:
            # The loop over the layers carries the cache whole, so that XLA writes the new positions where they belong:
            # as an input and an output of each layer it would be copied at every token.
            at = layer, jnp.arange(x.shape[0])[:, None], positions
            cache = Cache(*(old.at[at].set(new.astype(old.dtype)) for old, new in ((cache.k, k), (cache.v, v))))
            k, v = cache.k[layer].astype(q.dtype), cache.v[layer].astype(q.dtype)
            y = attention(q, k, v, mask=cache_mask(positions, k.shape[1]))
        how: dict[str, Any] = dict(bias=False, dtype=self.dtype, lora=c.lora, name="out")
        return Linear((c.width,), ("heads", "head_dim"), ("embed",), **how)(y), cache


class Block(nn.Module):
    """Pre-norm attention and SwiGLU; maps the hidden states and the cache of all layers to new ones."""

    config: TransformerConfig
    dtype: Any

    @nn.compact
    def __call__(
        self, carried: tuple[Array, Cache | None], layer: Any, rope: CosSin, positions: Array, segment_ids: Any
    ) -> tuple[tuple[Array, Cache | None], None]:
        c, (x, cache) = self.config, carried
        x = checkpoint_name(constrain(x, "batch", "stream", "width"), "block_input")
        y = RMSNorm(c.eps, dtype=self.dtype, name="attention_norm")(x)
        y = constrain(y, "batch", "length", "width")
        y, cache = Attention(c, self.dtype, name="attention")(y, cache, layer, rope, positions, segment_ids)
        x = x + constrain(y, "batch", "stream", "width")
        y = RMSNorm(c.eps, dtype=self.dtype, name="mlp_norm")(x)
        y = constrain(y, "batch", "length", "width")
        y = SwiGLU(c.mlp_hidden, dtype=self.dtype, lora=c.lora, name="mlp")(y)
        return (x + constrain(y, "batch", "stream", "width"), cache), None


class Transformer(nn.Module):
    """Maps embeddings to hidden states; for text, `embed` comes before it and `logits` after it."""

    config: TransformerConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config

        def zeros_in_padding(key: Any, shape: Any, dtype: Any = jnp.float32) -> Array:
            real = jnp.arange(shape[0])[:, None] < c.vocab_size
            return jnp.where(real, nn.initializers.normal(0.02)(key, shape, dtype), 0)

        vocabulary = logical(zeros_in_padding, "vocab", "embed")
        self.embedding = self.param("embedding", vocabulary, (c.vocab_rows, c.width))
        inputs = (0, nn.broadcast, nn.broadcast, nn.broadcast)
        self.layers = scanned(Block, c.layers, inputs, remat=c.remat, unroll=c.unroll)(c, self.dtype)
        self.final_norm = RMSNorm(c.eps, dtype=self.dtype)
        if not c.tied_embedding:
            self.head = self.param("head", vocabulary, (c.vocab_rows, c.width))

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The embeddings of tokens, in the compute dtype."""
        return look_up(self.embedding, tokens, self.dtype)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Hidden states after the final norm, and the cache with these positions added (None without a cache).

        Without a cache, x holds whole rows: causal order is the order in the row, `positions` are only for the rotary
        embedding, and `segment_ids` (0 is padding) separate packed examples. With a cache, `positions` are also the
        slots, and a position sees every slot up to its own.
        """
        rope = cos_sin(positions[..., None].astype(jnp.float32) * rope_frequencies(self.config), self.config.unroll)
        layers = None if cache is None else jnp.arange(self.config.layers)
        (x, cache), _ = self.layers((x.astype(self.dtype), cache), layers, rope, positions, segment_ids)
        return self.final_norm(x), cache

    def output_matrix(self) -> Float[Array, "R D"]:
        """The matrix of `logits`, with R ≥ V rows: those after the vocabulary are padding."""
        return self.embedding if self.config.tied_embedding else self.head

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """The logits of the tokens that exist, in at least float32."""
        matrix = self.output_matrix().astype(self.dtype)
        wide = jnp.promote_types(self.dtype, jnp.float32)
        y = jnp.einsum("BTD,VD->BTV", hidden, matrix, preferred_element_type=wide)
        return constrain(y, "batch", "length", "vocab")[..., : self.config.vocab_size]

    def init_all(self, tokens: Int[Array, "B T"]) -> jax.Array:
        """Calls every part, so that `init` creates every parameter."""
        hidden, _ = self(self.embed(tokens), jnp.zeros(tokens.shape, jnp.int32))
        return self.logits(hidden)
