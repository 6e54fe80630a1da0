"""Visual vectors to pixels: integrates the decoder's flow from noise."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pisces_jax.losses.flow import FlowConfig, guided, integrate
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT
from pisces_jax.models.layers import apply
from pisces_jax.training.programs.reconstruction import to_pixels


@dataclasses.dataclass(frozen=True)
class PictureDecoder:
    """The picture decoder, with the autoencoder whose latents it makes; None where it makes pixels."""

    flow_network: DiT
    autoencoder: Autoencoder | None

    @property
    def size(self) -> int:
        """Side of the pictures, in pixels."""
        cells = self.flow_network.config.size
        return cells * self.autoencoder.config.downscale if self.autoencoder is not None else cells

    def decode(
        self, params: Mapping[str, Any], vectors: Float[Array, "B m C"], keys: Array, flow: FlowConfig
    ) -> UInt8[Array, "B S S 3"]:
        """One picture per row of vectors; each picture's noise comes from its own key. Call it under jit.

        Args:
            params: by part, `decoder` and where there is one `autoencoder`.
        """
        c = self.flow_network.config
        noise = jax.vmap(lambda k: jax.random.normal(k, (c.size, c.size, c.channels), jnp.float32))(keys)

        def network(*args: Array) -> Array:
            return apply(self.flow_network, params["decoder"], *args)

        made = integrate(guided(network, vectors, flow), noise, flow.steps)
        if self.autoencoder is not None:
            made = apply(self.autoencoder, params["autoencoder"], made, method="decode")
        return to_pixels(made)
