"""A diffusion transformer with the block of Lumina-Next (arXiv 2406.18583), as BLIP3-o (arXiv 2505.09568) uses it.

It decodes visual vectors to pictures: pixels, or latents of an autoencoder. Self-attention and cross-attention to the
condition share the normalised input and the output projection: `self + tanh(gate) · cross`, with a gate per head that
starts at zero. There is a norm before and after each sublayer. The time and the mean of the condition modulate the
blocks by scales and gates, without shifts.

Letters: B pictures, S side, ch channels, N patches, M condition vectors, C their width, D width, H head width, E heads.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pisces_jax.models.layers import (
    CosSin,
    LayerNorm,
    Linear,
    RMSNorm,
    SwiGLU,
    apply_rope,
    cos_sin,
    grid_angles,
    grid_centres,
    logical,
    patchify,
    scanned,
    time_embedding,
    unpatchify,
)
from pisces_jax.ops.attention import attention
from pisces_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Settings of the transformer.

    Attributes:
        size: side of what is generated, in pixels or latent cells.
        channels: of what is generated.
        condition_width, condition_vectors: shape of the condition.
        local_condition: for conditions that are a grid over the same picture. Linear maps of the condition vector that
            covers a patch, one for each place in its cell, are added to the embedding of the patch and to its output: a
            first estimate of the picture, which the blocks refine. The keys of the condition get a two-dimensional
            rotary embedding.
        published: the embeddings are those of BLIP3-o's generator (`LuminaNextDiT2DModel` of diffusers behind a
            projection), so that its weights fit: the condition passes a two-layer MLP in place of a norm and a linear
            map, and is zero before it where it is dropped; its mean is normalised; cross-attention has queries of its
            own; times have 256 frequencies and
            min(width, 1024) numbers. That network counts σ = 1 − t and gives noise − data; here both are turned round.
        remat, unroll: as in `layers.scanned`.

    Raises:
        ValueError: the sizes do not divide.
    """

    size: int
    patch_size: int
    channels: int
    width: int
    layers: int
    heads: int
    mlp_hidden: int
    condition_width: int
    condition_vectors: int
    local_condition: bool = False
    published: bool = False
    rope_theta: float = 10_000.0
    eps: float = 1e-5
    remat: str = "none"
    unroll: bool = False

    def __post_init__(self) -> None:
        if self.size % self.patch_size:
            raise ValueError(f"size {self.size} is not a multiple of patch_size {self.patch_size}")
        if self.width % self.heads or self.width // self.heads % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 times the {self.heads} heads")
        side = self.condition_side
        if self.local_condition and self.published:
            raise ValueError("local_condition has no place in the published form: choose one")
        if self.local_condition and (side**2 != self.condition_vectors or self.side % side):
            raise ValueError(f"{self.condition_vectors} condition vectors are not a grid over {self.side}² patches")

    @property
    def time_width(self) -> int:
        """Numbers that describe the time and the mean of the condition."""
        return min(self.width, 1024) if self.published else self.width

    @property
    def side(self) -> int:
        """Patches along one side."""
        return self.size // self.patch_size

    @property
    def condition_side(self) -> int:
        """Condition vectors along one side, if they are a grid."""
        return round(self.condition_vectors**0.5)


class JointAttention(nn.Module):
    """Self-attention plus gated cross-attention; queries and keys are normalised over the full width."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N D"], y: Float[Array, "B M D"], rope: CosSin, condition_rope: Any) -> Array:
        c = self.config
        heads = (c.heads, c.width // c.heads)

        def project(name: str, source: Array, norm: bool) -> Array:
            z = Linear((c.width,), ("embed",), ("mlp",), bias=False, dtype=self.dtype, name=name)(source)
            if norm:
                z = LayerNorm(1e-5 if c.published else 1e-6, dtype=self.dtype, name=f"{name}_norm")(z)
            return z.reshape(*z.shape[:-1], *heads)

        q = apply_rope(project("query", x, True), rope)
        k = apply_rope(project("key", x, True), rope)
        own = attention(q, k, project("value", x, False))
        yk = project("condition_key", y, True)
        if condition_rope is not None:
            yk = apply_rope(yk, condition_rope)
        if c.published:
            q = apply_rope(project("condition_query", x, True), rope)
        cross = attention(q, yk, project("condition_value", y, False))
        gate = self.param("gate", logical(nn.initializers.zeros, None), (c.heads,)).astype(self.dtype)
        z = own + jnp.tanh(gate)[:, None] * cross
        z = z.reshape(*z.shape[:-2], c.width)
        return Linear((c.width,), ("mlp",), ("embed",), bias=False, dtype=self.dtype, name="out")(z)


class DiTBlock(nn.Module):
    """Attention and feed-forward layer, modulated by the time embedding t."""

    config: DiTConfig
    dtype: Any

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B N D"],
        y: Float[Array, "B M D"],
        t: Float[Array, "B E"],
        rope: CosSin,
        condition_rope: Any,
    ) -> tuple[Float[Array, "B N D"], None]:
        c = self.config

        def norm(name: str) -> RMSNorm:
            return RMSNorm(c.eps, dtype=self.dtype, name=name)

        x = checkpoint_name(constrain(x, "batch", "length", "width"), "block_input")
        modulation = Linear(
            (4, c.width), ("embed",), (None, "modulation"), scale=0.0, dtype=self.dtype, name="modulation"
        )
        scale1, gate1, scale2, gate2 = jnp.moveaxis(modulation(jax.nn.silu(t))[:, None], 2, 0)
        z = norm("attention_norm")(x) * (1 + scale1)
        z = JointAttention(c, self.dtype, name="attention")(z, norm("condition_norm")(y), rope, condition_rope)
        x = x + jnp.tanh(gate1) * norm("attention_post_norm")(z)
        z = norm("mlp_norm")(x) * (1 + scale2)
        z = SwiGLU(c.mlp_hidden, dtype=self.dtype, name="mlp")(z)
        return x + jnp.tanh(gate2) * norm("mlp_post_norm")(z), None


class DiT(nn.Module):
    """The network of a flow. `losses.flow.FlowConfig` says whether its output is a velocity or data."""

    config: DiTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S S ch"], t: Float[Array, "B"], condition: Float[Array, "B M C"], keep: Array
    ) -> Float[Array, "B S S ch"]:
        """The output for each pixel, in at least float32.

        Args:
            x: noisy pictures.
            t: their times, from 0 (noise) to 1 (data).
            condition: visual vectors, not normalised.
            keep: bool [B]; where False, the condition is dropped: it is zero after its projection (for guidance).
        """
        c = self.config

        def linear(name: str, x: Array, in_axis: str, out_axis: str, width: int = c.width, scale: float = 1.0) -> Array:
            return Linear((width,), (in_axis,), (out_axis,), scale=scale, dtype=self.dtype, name=name)(x)

        if c.published:
            t = 1 - t
            condition = jnp.where(keep[:, None, None], condition, 0)
            h = linear("condition_up", condition, "features", "embed")
            y = linear("condition_down", jax.nn.gelu(h, approximate=True), "embed", "embed_out")
            pooled = LayerNorm(eps=1e-5, name="pooled_norm", dtype=self.dtype)(y.mean(1))
        else:
            normed = LayerNorm(name="condition_norm", dtype=self.dtype)(condition)
            y = linear("condition_embedding", normed, "features", "embed")
            y = jnp.where(keep[:, None, None], y, 0)
            pooled = y.mean(1)

        h = time_embedding(t, 256 if c.published else c.width).astype(self.dtype)
        h = linear("time_up", h, "embed", "embed_out", c.time_width)
        h = linear("time_down", jax.nn.silu(h), "embed", "embed_out", c.time_width)
        h = h + linear("pooled_embedding", pooled, "embed", "embed_out", c.time_width)

        # A grid of vectors says nearly everything about the picture. The embedding of the noisy picture starts small,
        # so that its noise does not hide them.
        small = 0.1 if c.local_condition else 1.0
        patches = patchify(x.astype(self.dtype), c.patch_size)
        z = linear("patch_embedding", patches, "patch", "embed", scale=small)
        head_width = c.width // c.heads
        ys, xs = grid_centres(c.side)
        if c.published:  # cross-attention rotates the queries alone, so where the count of places starts matters
            ys, xs = ys - 0.5, xs - 0.5
        rope = cos_sin(grid_angles(ys, xs, head_width, c.rope_theta), c.unroll)
        condition_rope = None
        estimate: Array | float = 0.0
        if c.local_condition:
            ratio = c.side // c.condition_side

            def spread(name: str, vectors: Array, width: int, axis: str) -> Float[Array, "B N W"]:
                """A vector for each patch from the condition vector that covers it."""
                cells = Linear((ratio, ratio, width), ("features",), (None, None, axis), dtype=self.dtype, name=name)
                local = jnp.where(keep[:, None, None, None, None], cells(vectors), 0)
                local = local.reshape(-1, c.condition_side, c.condition_side, ratio, ratio, width)
                return local.transpose(0, 1, 3, 2, 4, 5).reshape(-1, c.side**2, width)

            z = z + spread("local", normed, c.width, "embed")
            estimate = spread("estimate", condition, c.patch_size**2 * c.channels, "patch")
            centres = grid_centres(c.condition_side, ratio)
            condition_rope = cos_sin(grid_angles(*centres, head_width, c.rope_theta), c.unroll)

        inputs = (nn.broadcast,) * 4
        blocks = scanned(DiTBlock, c.layers, inputs, remat=c.remat, unroll=c.unroll)(c, self.dtype, name="layers")
        z, _ = blocks(z, y, h, rope, condition_rope)
        modulation = linear("final_modulation", jax.nn.silu(h), "embed", "modulation", scale=0.0)
        z = LayerNorm(affine=False, dtype=self.dtype)(z) * (1 + modulation[:, None])
        out = linear("output", z, "embed", "patch", c.patch_size**2 * c.channels, scale=0.0)
        out = -out if c.published else out + estimate
        return unpatchify(out, c.patch_size).astype(jnp.promote_types(self.dtype, jnp.float32))
