"""Visual vectors to pixels: the flow of the decoder, integrated from noise."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pisces_jax.flow import FlowConfig, guided, integrate
from pisces_jax.models.dit import DiT
from pisces_jax.models.layers import apply
from pisces_jax.training.programs import to_pixels


def decode(
    decoder: DiT, params: Any, vectors: Float[Array, "B m C"], keys: Array, flow: FlowConfig
) -> UInt8[Array, "B S S 3"]:
    """One picture a row of vectors; its noise comes from its own key. To be called under jit."""
    c = decoder.config
    noise = jax.vmap(lambda k: jax.random.normal(k, (c.size, c.size, c.channels), jnp.float32))(keys)

    def network(*args: Array) -> Array:
        return apply(decoder, params, *args)

    return to_pixels(integrate(guided(network, vectors, flow), noise, flow.steps))
