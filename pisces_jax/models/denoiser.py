"""The network of a flow over single vectors: one visual vector from noise, given the state that predicts it.

The "denoising MLP" of Li et al. 2024 (arXiv 2406.11838, section 3.3): residual blocks of norm, linear, SiLU, linear,
modulated by the sum of the embedded time and state. As in `models.dit` with `local_condition`, a linear map of the
state is added to the input and to the output: a first estimate, which the blocks refine.

Letters: N vectors, C their width, D width of the states, W width of the network.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisces_jax.models.layers import LayerNorm, Linear, scanned, time_embedding


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Settings of the network.

    Attributes:
        channels: C, width of the vectors.
        condition_width: D, width of the states.
        unroll: as in `layers.scanned`.
    """

    channels: int
    condition_width: int
    width: int
    layers: int
    unroll: bool = False


class DenoiserBlock(nn.Module):
    """x + (1 + gate)·linear(silu(linear(norm(x)·(1 + scale) + shift)))."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "N W"], c: Float[Array, "N W"]) -> tuple[Float[Array, "N W"], None]:
        modulation = Linear(
            (3, self.width), ("embed",), (None, "modulation"), scale=0.1, dtype=self.dtype, name="modulation"
        )
        shift, scale, gate = jnp.moveaxis(modulation(c), 1, 0)
        h = LayerNorm(affine=False, dtype=self.dtype)(x) * (1 + scale) + shift
        h = Linear((self.width,), ("embed",), ("mlp",), dtype=self.dtype, name="up")(h)
        h = Linear((self.width,), ("mlp",), ("embed",), dtype=self.dtype, name="down")(jax.nn.silu(h))
        return x + (1 + gate) * h, None


class Denoiser(nn.Module):
    """The network of a flow. `losses.flow.FlowConfig` says what its output is."""

    config: DenoiserConfig
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "N C"], t: Float[Array, "N"], condition: Float[Array, "N D"], keep: Array
    ) -> Float[Array, "N C"]:
        """The output for each vector, in at least float32.

        Args:
            x: noisy vectors.
            t: their times, from 0 (noise) to 1 (data).
            condition: the states.
            keep: bool [N]; where False, the state is zero (for guidance).
        """
        c = self.config

        def linear(name: str, x: Array, in_axis: str, out_axis: str, width: int = c.width, scale: float = 1.0) -> Array:
            return Linear((width,), (in_axis,), (out_axis,), scale=scale, dtype=self.dtype, name=name)(x)

        state = jnp.where(keep[:, None], condition, 0)
        time = linear("time_up", time_embedding(t, c.width).astype(self.dtype), "embed", "embed_out")
        modulation = linear("time_down", jax.nn.silu(time), "embed", "embed_out")
        modulation = jax.nn.silu(modulation + linear("state_modulation", state, "embed", "embed_out"))
        z = linear("input", x.astype(self.dtype), "features", "embed") + linear("state", state, "embed", "embed_out")
        blocks = scanned(DenoiserBlock, c.layers, (nn.broadcast,), remat="none", unroll=c.unroll)(
            c.width, self.dtype, name="layers"
        )
        z, _ = blocks(z, modulation)
        out = linear("output", LayerNorm(dtype=self.dtype, name="norm")(z), "embed", "features", c.channels, 0.0)
        out = out + linear("estimate", state, "embed", "features", c.channels, 0.1)
        return out.astype(jnp.promote_types(self.dtype, jnp.float32))
