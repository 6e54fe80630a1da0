"""Visual vectors to pixels: two kinds of picture decoder behind one interface.

`PictureDecoder` integrates the flow of this project's own decoder from noise. `DiffusionDecoder` removes noise as
Emu2-Gen and BLIP3-o do.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pisces_jax.losses.diffusion import DiffusionConfig, denoise, guided_noise
from pisces_jax.losses.flow import FlowConfig, guided, integrate
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT
from pisces_jax.models.layers import apply
from pisces_jax.models.unet import UNet, whole_pictures
from pisces_jax.training.programs.reconstruction import to_pixels


class Decoder(Protocol):
    """What turns visual vectors into pictures; its parameters are in the parts `parts`."""

    @property
    def parts(self) -> tuple[str, ...]: ...

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        ...

    @property
    def takes_null(self) -> bool:
        """Whether guidance needs the vectors of an empty prompt (`null`)."""
        ...

    def decode(
        self,
        params: Mapping[str, Any],
        vectors: Float[Array, "B m C"],
        keys: Array,
        how: Any,
        null: Float[Array, "#B m C"] | None = None,
    ) -> UInt8[Array, "B S S 3"]:
        """One picture per row of vectors; each picture's noise comes from its own key. Call it under jit.

        Args:
            params: by part.
            how: how it samples: `FlowConfig` or `DiffusionConfig`.
            null: the model's own vectors for an empty prompt, of a decoder that takes them.
        """
        ...


def noise_of(keys: Array, network: DiT | UNet) -> Float[Array, "B Z Z ch"]:
    """Unit noise for a network, of each key its own; in at least float32."""
    shape = (network.config.size, network.config.size, network.config.channels)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
    return noise.astype(jnp.promote_types(network.dtype, jnp.float32))


@dataclasses.dataclass(frozen=True)
class PictureDecoder:
    """The flow-matching decoder, with the autoencoder whose latents it makes; None where it makes pixels."""

    flow_network: DiT
    autoencoder: Autoencoder | None

    takes_null = False

    @property
    def parts(self) -> tuple[str, ...]:
        return ("decoder", "autoencoder") if self.autoencoder is not None else ("decoder",)

    @property
    def size(self) -> int:
        cells = self.flow_network.config.size
        return cells * self.autoencoder.config.downscale if self.autoencoder is not None else cells

    def decode(
        self,
        params: Mapping[str, Any],
        vectors: Float[Array, "B m C"],
        keys: Array,
        how: FlowConfig,
        null: Float[Array, "#B m C"] | None = None,
    ) -> UInt8[Array, "B S S 3"]:

        def network(*args: Array) -> Array:
            return apply(self.flow_network, params["decoder"], *args)

        noise = how.temperature * noise_of(keys, self.flow_network)
        made = integrate(guided(network, vectors, how), noise, how.steps, how.solver, how.shift)
        if self.autoencoder is not None:
            made = apply(self.autoencoder, params["autoencoder"], made, method="decode")
        return to_pixels(made)


@dataclasses.dataclass(frozen=True)
class DiffusionDecoder:
    """The decoder of Emu2-Gen and BLIP3-o: SDXL's U-Net with visual vectors, and SDXL's autoencoder."""

    network: UNet
    autoencoder: Autoencoder

    parts = ("decoder", "autoencoder")
    takes_null = True

    @property
    def size(self) -> int:
        return self.network.config.size * self.autoencoder.config.downscale

    def decode(
        self,
        params: Mapping[str, Any],
        vectors: Float[Array, "B m C"],
        keys: Array,
        how: DiffusionConfig,
        null: Float[Array, "#B m C"] | None = None,
    ) -> UInt8[Array, "B S S 3"]:
        return to_pixels(self.draw(params, vectors, null, noise_of(keys, self.network), how))

    def draw(
        self,
        params: Mapping[str, Any],
        vectors: Float[Array, "B m C"],
        null: Float[Array, "#B m C"] | None,
        noise: Float[Array, "B Z Z ch"],
        how: DiffusionConfig,
    ) -> Float[Array, "B S S 3"]:
        """As `decode`, from unit noise to pictures in −1..1, not clipped."""

        def predicted(x: Array, t: Array, condition: Array) -> Array:
            sizes = whole_pictures(x.shape[0], self.size)
            return apply(self.network, params["decoder"], x, t, condition, sizes)

        null = jnp.zeros_like(vectors[:1]) if null is None else null
        made = denoise(guided_noise(predicted, vectors, null, how.guidance), noise, how)
        return apply(self.autoencoder, params["autoencoder"], made, method="decode")
