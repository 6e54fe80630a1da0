"""Sampling from a network that predicts the noise, as the U-Nets of latent diffusion do (`models.unet`).

Ho et al. 2020 (arXiv 2006.11239) add noise in steps: x_t = √ᾱ_t·data + √(1 − ᾱ_t)·noise. In y = x_t / √ᾱ_t = data +
σ·noise, σ = √((1 − ᾱ_t) / ᾱ_t), the way back is dy/dσ = ε (Karras et al. 2022, arXiv 2206.00364, eq. 1), which Euler's
method follows from the highest σ to 0. The network sees y / √(1 + σ²), which has the variance of x_t. This is
`EulerDiscreteScheduler` of diffusers, with SDXL's settings by default.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pisces_jax.losses.flow import guide

Noise = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class DiffusionConfig:
    """Noise levels and sampling.

    Attributes:
        levels: steps of noise that the network was trained on.
        beta_start, beta_end: of the first and the last step, β = 1 − ᾱ_t / ᾱ_{t−1}; √β is linear in between.
        offset: added to the steps that a sampler takes, which are multiples of levels / steps.
        steps: number of Euler steps.
        guidance: scale of classifier-free guidance; 1 is no guidance.

    Raises:
        ValueError: there are more steps than levels, or none.
    """

    levels: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    offset: int = 1
    steps: int = 50
    guidance: float = 3.0

    def __post_init__(self) -> None:
        if not 0 < self.steps <= self.levels:
            raise ValueError(
                f"a sampler takes 1 to {self.levels} steps, the network's levels of noise: not {self.steps}"
            )

    def schedule(self) -> tuple[np.ndarray, np.ndarray]:
        """The step t of the network at each Euler step, and σ there and at the end; float64 [steps], [steps + 1]."""
        betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.levels) ** 2
        kept = np.cumprod(1 - betas)
        times = (np.arange(self.steps) * (self.levels // self.steps))[::-1] + float(self.offset)
        sigmas = np.interp(times, np.arange(self.levels), np.sqrt((1 - kept) / kept))
        return times, np.append(sigmas, 0.0)


def denoise(field: Noise, noise: Float[Array, "B ..."], config: DiffusionConfig) -> Float[Array, "B ..."]:
    """Carries unit noise to data along `field(x, t)`, the predicted noise, t [B], in the dtype of `noise`."""
    times, sigmas = config.schedule()
    x = noise * float(np.sqrt(1 + sigmas[0] ** 2))

    def step(x: Array, now: Any) -> tuple[Array, None]:
        t, sigma, following = now
        predicted = field(x * jax.lax.rsqrt(1 + sigma**2), jnp.broadcast_to(t, x.shape[:1]))
        return x + (following - sigma) * predicted.astype(x.dtype), None

    return jax.lax.scan(step, x, tuple(jnp.asarray(a, noise.dtype) for a in (times, sigmas[:-1], sigmas[1:])))[0]


def guided_noise(
    network: Callable[..., Array], condition: Float[Array, "B ..."], null: Float[Array, "#B ..."], guidance: float
) -> Noise:
    """The predicted noise with classifier-free guidance (`flow.guide`).

    Args:
        network: `(x, t, condition) -> noise`.
        null: what stands for no condition. For Emu2 and BLIP3-o it is their own vectors for a prompt of one space.
    """

    def field(x: Array, t: Array) -> Array:
        if guidance == 1.0:
            return network(x, t, condition)
        return guide(network, x, t, (condition,), (jnp.broadcast_to(null, condition.shape),), guidance)

    return field
