"""The KL autoencoder of latent diffusion (Rombach et al. 2022, arXiv 2112.10752): pictures to latents and back.

The latent is the mean of the posterior; nothing is sampled. The published autoencoders are settings of this module:
SDXL has 4 latent channels, which are scaled; SD3 and FLUX have 16, which are shifted and scaled.

Letters: B pictures, S pixels per side, Z latent cells per side, c latent channels, I and C channels in and out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisces_jax.models.layers import Linear, lecun, logical
from pisces_jax.ops.attention import attention
from pisces_jax.sharding import constrain, gathered


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Settings of the autoencoder.

    Attributes:
        channels: of each level, from the resolution of the picture down; each level but the last halves it.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        groups, eps: of the group norms.
        quant_conv: whether there are 1×1 convolutions before and after the latent (SDXL has them, SD3 and FLUX not).
        scale, shift: latents are (mean − shift) · scale, so that they have about unit variance.

    Raises:
        ValueError: `channels` are not multiples of `groups`.
    """

    latent_channels: int
    channels: tuple[int, ...] = (128, 256, 512, 512)
    blocks: int = 2
    groups: int = 32
    eps: float = 1e-6
    quant_conv: bool = True
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self) -> None:
        if any(c % self.groups for c in self.channels):
            raise ValueError(f"channels {self.channels} must be multiples of the {self.groups} groups of the norms")

    @property
    def downscale(self) -> int:
        """Pixels per latent cell, along one side."""
        return 2 ** (len(self.channels) - 1)


class Conv(nn.Module):
    """A square convolution with bias. `padding` is (before, after) of height and width; the default keeps the size.

    Pictures lie over the batch axes and kernels are gathered, as in `ops.sharded`: left to itself, the compiler spreads
    the channels instead, and exchanges them for every norm.
    """

    out: int
    size: int = 3
    stride: int = 1
    padding: Sequence[tuple[int, int]] | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"]) -> Float[Array, "B h w O"]:
        shape = (self.size, self.size, x.shape[-1], self.out)
        init = logical(lecun(self.size**2 * x.shape[-1]), None, None, None, "embed")
        kernel = gathered(self.param("kernel", init, shape).astype(self.dtype), None, None, None, "embed")
        bias = self.param("bias", logical(nn.initializers.zeros, "embed"), (self.out,)).astype(self.dtype)
        padding = self.padding or [(self.size // 2, self.size // 2)] * 2
        x = constrain(x.astype(self.dtype), "batch", None, None, None)
        y = jax.lax.conv_general_dilated(
            x, kernel, (self.stride,) * 2, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return constrain(y + gathered(bias, "embed"), "batch", None, None, None)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018, arXiv 1803.08494), computed in at least float32."""

    groups: int
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(B, H, W, self.groups, C // self.groups)
        wide = wide - jnp.mean(wide, axis=(1, 2, 4), keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=(1, 2, 4), keepdims=True) + self.eps)
        scale = self.param("scale", logical(nn.initializers.ones, "norm"), (C,))
        bias = self.param("bias", logical(nn.initializers.zeros, "norm"), (C,))
        return (wide.reshape(x.shape) * scale + bias).astype(self.dtype)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + linear(e)))); where the channels change, x passes a 1×1 convolution.

    An autoencoder has no embedding e of a time; a U-Net has one. `config` says `groups` and `eps` of the norms.
    """

    config: Any
    channels: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W I"], e: Float[Array, "B E"] | None = None) -> Float[Array, "B H W C"]:
        c = self.config
        h = jax.nn.silu(GroupNorm(c.groups, c.eps, self.dtype, name="norm1")(x))
        h = Conv(self.channels, dtype=self.dtype, name="conv1")(h)
        if e is not None:
            time = Linear((self.channels,), ("embed",), ("embed_out",), dtype=self.dtype, name="time")
            h = h + time(e)[:, None, None]
        h = jax.nn.silu(GroupNorm(c.groups, c.eps, self.dtype, name="norm2")(h))
        h = Conv(self.channels, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class PixelAttention(nn.Module):
    """Full attention over all pixels with a single head, added to the input."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        B, H, W, C = x.shape
        z = GroupNorm(self.config.groups, self.config.eps, self.dtype, name="norm")(x).reshape(B, H * W, C)

        def project(name: str) -> Array:
            return Linear((C,), ("embed",), (None,), dtype=self.dtype, name=name)(z)[:, :, None]

        y = attention(project("query"), project("key"), project("value"))[:, :, 0]
        return x + Linear((C,), (None,), ("embed",), dtype=self.dtype, name="out")(y).reshape(x.shape)


class Middle(nn.Module):
    """The blocks at the lowest resolution."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        x = ResidualBlock(self.config, x.shape[-1], self.dtype, name="block_0")(x)
        x = PixelAttention(self.config, self.dtype, name="attention")(x)
        return ResidualBlock(self.config, x.shape[-1], self.dtype, name="block_1")(x)


class Encoder(nn.Module):
    """Pictures to the mean and log variance of their latents, along the last axis; 2c channels."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B S S 3"]) -> Float[Array, "B Z Z 2*c"]:
        c = self.config
        x = Conv(c.channels[0], dtype=self.dtype, name="conv_in")(x)
        for level, channels in enumerate(c.channels):
            for i in range(c.blocks):
                x = ResidualBlock(c, channels, self.dtype, name=f"level_{level}_block_{i}")(x)
            if level < len(c.channels) - 1:
                # The published weights pad below and to the right only.
                down = Conv(channels, stride=2, padding=[(0, 1)] * 2, dtype=self.dtype, name=f"level_{level}_down")
                x = down(x)
        x = Middle(c, self.dtype, name="middle")(x)
        x = jax.nn.silu(GroupNorm(c.groups, c.eps, self.dtype, name="norm_out")(x))
        return Conv(2 * c.latent_channels, dtype=self.dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents, neither shifted nor scaled, to pictures."""

    config: AutoencoderConfig
    dtype: Any

    @nn.compact
    def __call__(self, z: Float[Array, "B Z Z c"]) -> Float[Array, "B S S 3"]:
        c = self.config
        x = Conv(c.channels[-1], dtype=self.dtype, name="conv_in")(z)
        x = Middle(c, self.dtype, name="middle")(x)
        for level, channels in enumerate(reversed(c.channels)):
            for i in range(c.blocks + 1):
                x = ResidualBlock(c, channels, self.dtype, name=f"level_{level}_block_{i}")(x)
            if level < len(c.channels) - 1:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                x = Conv(channels, dtype=self.dtype, name=f"level_{level}_up")(x)
        x = jax.nn.silu(GroupNorm(c.groups, c.eps, self.dtype, name="norm_out")(x))
        return Conv(3, dtype=self.dtype, name="conv_out")(x)


class Autoencoder(nn.Module):
    """Entry points are `encode` and `decode`. Pictures are in −1..1; latents have about unit variance."""

    config: AutoencoderConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        self.encoder = Encoder(c, self.dtype)
        self.decoder = Decoder(c, self.dtype)
        if c.quant_conv:
            self.quant = Conv(2 * c.latent_channels, size=1, dtype=self.dtype)
            self.post_quant = Conv(c.latent_channels, size=1, dtype=self.dtype)

    def encode(self, pictures: Float[Array, "B S S 3"]) -> Float[Array, "B Z Z c"]:
        """Latents of pictures, in at least float32."""
        c = self.config
        moments = self.encoder(pictures)
        if c.quant_conv:
            moments = self.quant(moments)
        mean = moments[..., : c.latent_channels].astype(jnp.promote_types(self.dtype, jnp.float32))
        return (mean - c.shift) * c.scale

    def decode(self, latents: Float[Array, "B Z Z c"]) -> Float[Array, "B S S 3"]:
        """Pictures of latents, in at least float32, not clipped to −1..1."""
        c = self.config
        z = latents / c.scale + c.shift
        if c.quant_conv:
            z = self.post_quant(z)
        return self.decoder(z).astype(jnp.promote_types(self.dtype, jnp.float32))

    def __call__(self, pictures: Float[Array, "B S S 3"]) -> Float[Array, "B S S 3"]:
        """Encodes and decodes, so that `init` creates every parameter."""
        return self.decode(self.encode(pictures))
