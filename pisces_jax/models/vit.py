"""The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929), and the text tower of contrastive pretraining.

SigLIP, CLIP and EVA-CLIP are settings of one module.

Letters: B pictures or texts, S pixels per side, N patches, T positions (patches and a class token), L tokens, D width,
C output width.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from pisces_jax.models.layers import (
    MLP,
    LayerNorm,
    Linear,
    grid_centres,
    lecun,
    logical,
    normalize_picture,
    patchify,
    pool_2d,
    scanned,
)
from pisces_jax.ops.attention import BACKENDS, attention
from pisces_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """Settings of the encoder.

    Attributes:
        image_size: side of the pictures in pixels; pixels beyond the last whole patch are ignored.
        norm: "pre" is the block of SigLIP and CLIP, `x + f(norm(x))`; "post" is that of EVA-CLIP-E, `x + norm(f(x))`.
        patch_bias: whether the patch embedding has a bias; CLIP's has none.
        embedding_norm: whether there is a LayerNorm between the embeddings and the first block, as in CLIP.
        biases: the first letters of those of the query, key and value projections that have a bias.
        output_dim: if not 0, each patch vector is projected to this width and bounded by tanh, as in the small encoders
            that are trained here. Each place has its own matrix, so that pooled vectors still tell places apart.
        post_scale: initial scale of the norms in post-norm blocks. With a small one, blocks start near the identity,
            and an encoder from scratch learns sooner.
        stem: channels of convolutions between the pixels and the patch embedding (Xiao et al. 2021, arXiv 2106.14881).
            Without them, patches hardly learn to tell shapes apart in the few hundred steps of a small run
            (docs/small_runs.md).
        positions: initial position embedding: "normal" (small random numbers) or "sines" of row and column.
        mean, std: of the pixels, scaled to 0..1, per channel.
        attention: one of `attention.BACKENDS`.
        remat, unroll: as in `layers.scanned`.

    Raises:
        ValueError: a setting is unknown, or the sizes do not fit.
    """

    image_size: int
    patch_size: int
    width: int
    layers: int
    heads: int
    mlp_hidden: int
    norm: str = "pre"
    class_token: bool = False
    patch_bias: bool = True
    embedding_norm: bool = False
    final_norm: bool = True
    biases: str = "qkv"
    activation: str = "gelu_tanh"
    eps: float = 1e-6
    output_dim: int = 0
    post_scale: float = 1.0
    stem: tuple[int, ...] = ()
    positions: str = "normal"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    attention: str = "auto"
    remat: str = "none"
    unroll: bool = False

    def __post_init__(self) -> None:
        if self.attention not in BACKENDS:
            raise ValueError(f"attention {self.attention!r} is not one of {', '.join(BACKENDS)}")
        if self.norm not in ("pre", "post"):
            raise ValueError(f"norm {self.norm!r} is neither 'pre' nor 'post'")
        if self.image_size < self.patch_size:
            raise ValueError(f"patch_size {self.patch_size} is larger than image_size {self.image_size}")
        if self.patch_size % 2 ** len(self.stem):
            raise ValueError(f"patch_size {self.patch_size} is not a multiple of {2 ** len(self.stem)} (stem)")
        if self.positions not in ("normal", "sines"):
            raise ValueError(f"positions {self.positions!r} is neither 'normal' nor 'sines'")
        if self.positions == "sines" and (self.class_token or self.width % 4):
            raise ValueError("positions 'sines' need a width that is a multiple of 4, and no class token")

    @property
    def vectors(self) -> int:
        """Number of vectors per picture."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def output_width(self) -> int:
        """Width of the vectors."""
        return self.output_dim or self.width


class EncoderAttention(nn.Module):
    """Full attention with as many key-value heads as query heads; `mask` [B, T, T] is False on padding, or None."""

    heads: int
    biases: str
    dtype: Any
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Any) -> Float[Array, "B T D"]:
        D = x.shape[-1]
        H = D // self.heads

        def project(name: str) -> Array:
            bias = name[0] in self.biases
            return Linear((self.heads, H), ("embed",), ("heads", "head_dim"), bias=bias, dtype=self.dtype, name=name)(x)

        y = attention(project("query"), project("key"), project("value"), mask=mask, backend=self.backend)
        return Linear((D,), ("heads", "head_dim"), ("embed",), dtype=self.dtype, name="out")(y)


class EncoderBlock(nn.Module):
    """One block of a transformer encoder, pre- or post-norm (see `ViTConfig`)."""

    heads: int
    mlp_hidden: int
    norm: str
    biases: str
    activation: str
    eps: float
    dtype: Any
    post_scale: float = 1.0
    backend: str = "auto"

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], mask: Any) -> tuple[Float[Array, "B T D"], None]:
        attend = EncoderAttention(self.heads, self.biases, self.dtype, self.backend, name="attention")
        mlp = MLP(self.mlp_hidden, self.activation, dtype=self.dtype, name="mlp")
        start = 1.0 if self.norm == "pre" else self.post_scale
        norm1 = LayerNorm(self.eps, start=start, dtype=self.dtype, name="norm1")
        norm2 = LayerNorm(self.eps, start=start, dtype=self.dtype, name="norm2")
        x = checkpoint_name(constrain(x, "batch", "length", "width"), "block_input")
        if self.norm == "pre":
            x = x + attend(norm1(x), mask)
            return x + mlp(norm2(x)), None
        x = x + norm1(attend(x, mask))
        return x + norm2(mlp(x)), None


class Convolution(nn.Module):
    """One layer of the stem: 3×3 with stride 2 (half the side, rounded up), a norm over the picture, and GELU."""

    channels: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S S C"]) -> Float[Array, "B H H D"]:
        init = logical(lecun(9 * x.shape[-1]), None, None, None, None)
        kernel = self.param("kernel", init, (3, 3, x.shape[-1], self.channels)).astype(self.dtype)
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
        scale, bias = (
            self.param(name, logical(start, None), (self.channels,)).astype(self.dtype)
            for name, start in (("scale", nn.initializers.ones), ("bias", nn.initializers.zeros))
        )
        wide = x.astype(jnp.promote_types(self.dtype, jnp.float32))
        each = (1, 2, 3)
        wide = (wide - wide.mean(each, keepdims=True)) * jax.lax.rsqrt(wide.var(each, keepdims=True) + self.eps)
        return jax.nn.gelu(wide.astype(self.dtype) * scale + bias)


def sines(side: int, width: int) -> Float[Array, "N D"]:
    """Sines and cosines of the row, then of the column, of each cell in raster order (Vaswani et al. 2017).

    The amplitude is 0.3; wavelengths are from about three patches to three hundred.
    """
    frequencies = 2.0 * 100.0 ** (-jnp.arange(width // 4) / (width // 4))
    angles = [place[:, None] * frequencies for place in grid_centres(side)]
    return 0.3 * jnp.concatenate([f(a) for a in angles for f in (jnp.sin, jnp.cos)], axis=-1)


class ViT(nn.Module):
    """Maps pictures to patch vectors in raster order; a class token is used inside and not returned."""

    config: ViTConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Int[Array, "B S S 3"]) -> Float[Array, "B N D"]:
        """The vectors of uint8 pictures, in the compute dtype."""
        c = self.config
        seen = c.image_size // c.patch_size * c.patch_size
        x = normalize_picture(images[:, :seen, :seen], c.mean, c.std, self.dtype)
        for i, channels in enumerate(c.stem):
            x = Convolution(channels, c.eps, self.dtype, name=f"stem_{i}")(x)
        x = patchify(x, c.patch_size // 2 ** len(c.stem))
        x = Linear(
            (c.width,), ("patch",), ("embed",), bias=c.patch_bias, dtype=self.dtype, name="patch_embedding"
        )(x)  # fmt: skip
        if c.class_token:
            token = self.param("class_token", logical(nn.initializers.normal(0.02), "embed"), (c.width,))
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, c.width)), x], axis=1)
        start: Any = nn.initializers.normal(0.02)
        if c.positions == "sines":
            start = lambda key, shape, dtype=jnp.float32: sines(round(shape[0] ** 0.5), shape[1]).astype(dtype)  # noqa: E731
        init = logical(start, "position", "embed")
        x = x + self.param("position_embedding", init, (x.shape[1], c.width)).astype(x.dtype)
        if c.embedding_norm:
            x = LayerNorm(c.eps, dtype=self.dtype, name="embedding_norm")(x)
        blocks = scanned(EncoderBlock, c.layers, (nn.broadcast,), remat=c.remat, unroll=c.unroll)(
            c.heads, c.mlp_hidden, c.norm, c.biases, c.activation, c.eps, self.dtype, c.post_scale, c.attention,
            name="layers",
        )  # fmt: skip
        x, _ = blocks(x, None)
        if c.final_norm:
            x = LayerNorm(c.eps, dtype=self.dtype, name="final_norm")(x)
        if c.class_token:
            x = x[:, 1:]
        if c.output_dim:
            # 0.3 is in the linear range of tanh, so that training starts with a linear code of the patches.
            init = logical(lecun(c.width, 0.3), "position", "embed", "features")
            kernel = self.param("output", init, (c.vectors, c.width, c.output_dim))
            x = jnp.einsum("BND,NDC->BNC", x, kernel.astype(self.dtype))
            x = jnp.tanh(x)
        return x


def pooled_features(vectors: Float[Array, "B N D"], stride: int) -> Float[Array, "B M D"]:
    """Pisces' features of a picture: the generation encoder's vectors, average-pooled, not normalised, in float32."""
    return pool_2d(vectors.astype(jnp.float32), stride)


@dataclasses.dataclass(frozen=True)
class TextTowerConfig:
    """The text side of contrastive pretraining."""

    vocab_size: int
    max_length: int
    width: int
    layers: int
    heads: int
    mlp_hidden: int
    unroll: bool = False


class TextTower(nn.Module):
    """Maps a text to one vector: a pre-norm encoder without causal mask, averaged over the real tokens."""

    config: TextTowerConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "B L"], real: Array) -> Float[Array, "B D"]:
        """The vectors of texts; `real` [B, L] is False on padding."""
        c = self.config
        init = nn.initializers.normal(0.02)
        embedding = self.param("embedding", logical(init, "vocab", "embed"), (c.vocab_size, c.width))
        positions = self.param("position_embedding", logical(init, "position", "embed"), (c.max_length, c.width))
        x = embedding.astype(self.dtype)[tokens] + positions.astype(self.dtype)[: tokens.shape[1]]
        blocks = scanned(EncoderBlock, c.layers, (nn.broadcast,), remat="none", unroll=c.unroll)(
            c.heads, c.mlp_hidden, "pre", "qkv", "gelu", 1e-6, self.dtype, name="layers"
        )
        x, _ = blocks(x, jnp.broadcast_to(real[:, None, :], (*real.shape, real.shape[1])))
        x = LayerNorm(dtype=self.dtype, name="final_norm")(x)
        weight = real[..., None].astype(x.dtype)
        return (x * weight).sum(1) / jnp.maximum(weight.sum(1), 1)


class ContrastiveHead(nn.Module):
    """Projects the vector of a picture (the mean of its patches) or text to a unit vector, for contrastive losses."""

    dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B E"]:
        x = Linear((self.dim,), ("features",), (None,), bias=False, dtype=self.dtype, name="projection")(x)
        x = x.astype(jnp.float32)
        return x * (jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12) ** -0.5
