"""The U-Net of SDXL (Podell et al. 2023, arXiv 2307.01952) with visual vectors for a text: the image decoder of Emu2.

It predicts the noise in latents (ε, Ho et al. 2020, arXiv 2006.11239). Emu2-Gen (Sun et al. 2023, arXiv 2312.13286) and
BLIP3-o draw with it: cross-attention takes 64 vectors of 1,792, and their mean stands where SDXL has its pooled text.
`losses.diffusion` has the noise levels and the sampler.

Letters: B pictures, H and W latent cells, ch latent channels, I and C channels, N = H·W, M condition vectors, V their
width, E numbers that describe time and size.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pisces_jax.models.autoencoder import Conv, GroupNorm, ResidualBlock
from pisces_jax.models.layers import LayerNorm, Linear, scanned, sinusoids
from pisces_jax.ops.attention import attention
from pisces_jax.sharding import constrain

SIZES = 6  # the numbers of SDXL's size conditioning


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Settings of the U-Net; the defaults are SDXL's.

    Attributes:
        size: side of the latents that it was trained with, in cells.
        channels: of the latents.
        condition_width: of the visual vectors.
        widths: channels of each level, from the resolution of the latents down; each level but the last halves it.
        depths: transformer layers after each residual block of a level; the middle has as many as the last level.
        heads: attention heads of each level.
        blocks: residual blocks per level on the way down; on the way up there is one more.
        size_numbers: sines and cosines for each number of the size conditioning.
        groups, eps: of the group norms in and after residual blocks.
        remat, unroll: of the transformer layers, as in `layers.scanned`.

    Raises:
        ValueError: the sizes do not fit each other.
    """

    size: int
    channels: int
    condition_width: int
    widths: tuple[int, ...] = (320, 640, 1280)
    depths: tuple[int, ...] = (0, 2, 10)
    heads: tuple[int, ...] = (5, 10, 20)
    blocks: int = 2
    size_numbers: int = 256
    groups: int = 32
    eps: float = 1e-5
    remat: str = "none"
    unroll: bool = False

    def __post_init__(self) -> None:
        levels = len(self.widths)
        if not levels == len(self.depths) == len(self.heads):
            raise ValueError(f"widths {self.widths}, depths {self.depths} and heads {self.heads} are not as many")
        if not self.depths[-1]:
            raise ValueError(f"depths {self.depths}: the last level must have transformer layers, as the middle has")
        if any(w % self.groups for w in self.widths):
            raise ValueError(f"widths {self.widths} must be multiples of the {self.groups} groups of the norms")
        if any(d and w % h for w, d, h in zip(self.widths, self.depths, self.heads, strict=True)):
            raise ValueError(f"widths {self.widths} must be multiples of the heads {self.heads}")
        if self.size % 2 ** (levels - 1):
            raise ValueError(f"size {self.size} must be a multiple of {2 ** (levels - 1)}, for {levels} levels")

    @property
    def time_width(self) -> int:
        """Numbers that describe time and size."""
        return 4 * self.widths[0]


class Attention(nn.Module):
    """Attention of x to the vectors of `source`; of its four projections only the last has a bias."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"], source: Float[Array, "B M V"]) -> Float[Array, "B N C"]:
        width = x.shape[-1]

        def project(name: str, vectors: Array) -> Array:
            shape, axes = (self.heads, width // self.heads), ("heads", "head_dim")
            return Linear(shape, ("embed",), axes, bias=False, dtype=self.dtype, name=name)(vectors)

        y = attention(project("query", x), project("key", source), project("value", source))
        return Linear((width,), ("heads", "head_dim"), ("embed",), dtype=self.dtype, name="out")(y)


class GEGLU(nn.Module):
    """down(up(x) · gelu(gate(x))) with biases (Shazeer 2020, arXiv 2002.05202); four times as wide inside."""

    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B N C"]) -> Float[Array, "B N C"]:
        width = x.shape[-1]

        def project(name: str) -> Array:
            return Linear((4 * width,), ("embed",), ("mlp",), dtype=self.dtype, name=name)(x)

        h = project("up") * jax.nn.gelu(project("gate"), approximate=False)
        return Linear((width,), ("mlp",), ("embed",), dtype=self.dtype, name="down")(h)


class TransformerLayer(nn.Module):
    """Self-attention, cross-attention to the condition and a feed-forward layer, each after a norm."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B N C"], condition: Float[Array, "B M V"]
    ) -> tuple[Float[Array, "B N C"], None]:
        def norm(i: int, x: Array) -> Array:
            return LayerNorm(1e-5, dtype=self.dtype, name=f"norm{i}")(x)

        x = checkpoint_name(constrain(x, "batch", "length", "width"), "block_input")
        z = norm(1, x)
        x = x + Attention(self.heads, self.dtype, name="self_attention")(z, z)
        x = x + Attention(self.heads, self.dtype, name="cross_attention")(norm(2, x), condition)
        return x + GEGLU(self.dtype, name="mlp")(norm(3, x)), None


class PixelTransformer(nn.Module):
    """Transformer layers over all cells, between two linear maps; added to the input."""

    config: UNetConfig
    depth: int
    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], condition: Float[Array, "B M V"]) -> Float[Array, "B H W C"]:
        c = self.config
        B, H, W, C = x.shape

        def linear(name: str, z: Array) -> Array:
            return Linear((C,), ("embed",), ("embed_out",), dtype=self.dtype, name=name)(z)

        z = GroupNorm(c.groups, 1e-6, self.dtype, name="norm")(x).reshape(B, H * W, C)
        layers = scanned(TransformerLayer, self.depth, (nn.broadcast,), remat=c.remat, unroll=c.unroll)
        z, _ = layers(self.heads, self.dtype, name="layers")(linear("project_in", z), condition)
        return x + linear("project_out", z).reshape(x.shape)


def whole_pictures(number: int, size: int) -> Float[Array, "B 6"]:
    """The `sizes` of square pictures of `size` pixels that are wanted as they are, not cropped."""
    return jnp.broadcast_to(jnp.array([size, size, 0, 0, size, size], jnp.float32), (number, SIZES))


class UNet(nn.Module):
    """Predicts the noise in latents."""

    config: UNetConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W ch"],
        t: Float[Array, "B"],
        condition: Float[Array, "B M V"],
        sizes: Float[Array, "B 6"],
    ) -> Float[Array, "B H W ch"]:
        """The noise in each cell, in at least float32.

        Args:
            x: noisy latents of variance about 1; H and W are multiples of 2 for each level but the last.
            t: the steps of the noise schedule that they are at, from 0.
            condition: visual vectors, not normalised.
            sizes: of the picture, in pixels: original height and width, top and left of the crop, height and width
                that are wanted.
        """
        c, dtype = self.config, self.dtype
        last = len(c.widths) - 1
        condition = condition.astype(dtype)

        def embedding(name: str, h: Array) -> Float[Array, "B E"]:
            for layer in ("up", "down"):
                linear = Linear((c.time_width,), ("embed",), ("embed_out",), dtype=dtype, name=f"{name}_{layer}")
                h = linear(h if layer == "up" else jax.nn.silu(h))
            return h

        numbers = sinusoids(sizes.astype(t.dtype), c.size_numbers).reshape(x.shape[0], -1).astype(dtype)
        e = embedding("time", sinusoids(t, c.widths[0]))
        e = e + embedding("size", jnp.concatenate([condition.mean(axis=1), numbers], axis=-1))
        e = jax.nn.silu(e)

        def block(name: str, i: int, level: int, x: Array) -> Float[Array, "B H W C"]:
            """A residual block, and the transformer of its level if it has one."""
            x = ResidualBlock(c, c.widths[level], dtype, name=f"{name}_block_{i}")(x, e)
            if depth := c.depths[level]:
                x = PixelTransformer(c, depth, c.heads[level], dtype, name=f"{name}_attention_{i}")(x, condition)
            return x

        x = Conv(c.widths[0], dtype=dtype, name="conv_in")(x)
        passed = [x]
        for level, width in enumerate(c.widths):
            for i in range(c.blocks):
                x = block(f"down_{level}", i, level, x)
                passed.append(x)
            if level < last:
                x = Conv(width, stride=2, dtype=dtype, name=f"down_{level}_resample")(x)
                passed.append(x)
        x = block("middle", 0, last, x)
        x = ResidualBlock(c, c.widths[last], dtype, name="middle_block_1")(x, e)
        for level in reversed(range(last + 1)):
            for i in range(c.blocks + 1):
                x = block(f"up_{level}", i, level, jnp.concatenate([x, passed.pop()], axis=-1))
            if level:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                x = Conv(c.widths[level], dtype=dtype, name=f"up_{level}_resample")(x)
        x = jax.nn.silu(GroupNorm(c.groups, c.eps, dtype, name="norm_out")(x))
        return Conv(c.channels, dtype=dtype, name="conv_out")(x).astype(jnp.promote_types(dtype, jnp.float32))
