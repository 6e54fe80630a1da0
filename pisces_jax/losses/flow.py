"""Flow matching: the path from noise to data, times for training, guidance and sampling.

Conditional flow matching with straight paths (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003):
x_t = (1 − t)·noise + t·data, with t from 0 (noise) to 1 (data), so the velocity along a path is data − noise. BLIP3-o's
σ is 1 − t. The loss is `objectives.flow_matching`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Velocity = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Settings of training and sampling.

    Attributes:
        times: distribution of t: "uniform", or "logit_normal", where the logit of t is standard normal (Esser et al.
            2024, arXiv 2403.03206).
        zero_share: fraction of the samples with t = 0 exactly, where a sampler of few steps starts.
        prediction: what the network predicts: "velocity" or "data". The loss compares velocities in both cases.
        floor: lower bound of 1 − t, in the conversion of data to velocity and in `weight`.
        weight: factor of the squared velocity error: "none" (1), "inverse" (1 / max(1 − t, floor)) or "data"
            (max(1 − t, floor)², which makes it the squared error of the data).
        drop: fraction of the samples whose condition is dropped, for guidance.
        steps: number of Euler steps of a sampler.
        guidance: scale of classifier-free guidance, see `guided`; 1 is no guidance.
    """

    times: str = "uniform"
    zero_share: float = 0.0
    prediction: str = "velocity"
    floor: float = 0.05
    weight: str = "none"
    drop: float = 0.1
    steps: int = 20
    guidance: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (
            ("times", ("uniform", "logit_normal")),
            ("prediction", ("velocity", "data")),
            ("weight", ("none", "inverse", "data")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"flow.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")


def interpolate(noise: Float[Array, "B ..."], data: Float[Array, "B ..."], t: Float[Array, "B"]) -> Array:
    """The point x_t of the path."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data


def sample_time(key: jax.Array, config: FlowConfig) -> Float[Array, ""]:
    """A random time in [0, 1)."""
    kind, value = jax.random.split(key)
    t = jax.random.uniform(value) if config.times == "uniform" else jax.nn.sigmoid(jax.random.normal(value))
    return jnp.where(jax.random.uniform(kind) < config.zero_share, 0.0, t)


def loss_weight(t: Float[Array, "B"], config: FlowConfig) -> Float[Array, "B"]:
    """The factor of the squared velocity error at time t."""
    left = jnp.maximum(1 - t, config.floor)
    return {"none": jnp.ones_like(t), "inverse": 1 / left, "data": left**2}[config.weight]


def velocity(
    output: Float[Array, "B ..."], x: Float[Array, "B ..."], t: Float[Array, "B"], config: FlowConfig
) -> Float[Array, "B ..."]:
    """A network's output at (x, t) as a velocity: data = x + (1 − t)·velocity."""
    if config.prediction == "velocity":
        return output
    return (output - x) / jnp.maximum(1 - t, config.floor).reshape(-1, *[1] * (x.ndim - 1))


def integrate(field: Velocity, noise: Float[Array, "B ..."], steps: int) -> Float[Array, "B ..."]:
    """Carries noise to data along `field(x, t)`, t [B], by Euler's method with equal steps from t = 0 to 1."""

    def step(i: Any, x: Array) -> Array:
        t = jnp.full(x.shape[:1], i / steps, jnp.float32)
        return x + field(x, t) / steps

    return jax.lax.fori_loop(0, steps, step, noise)


def guided(network: Callable[..., Array], condition: Float[Array, "B ..."], config: FlowConfig) -> Velocity:
    """The velocity field of a network with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598).

    v = v_null + guidance·(v_cond − v_null), where v_null is without the condition. Both are computed in one batch of
    twice the size; a guidance of 1 needs only v_cond.

    Args:
        network: `(x, t, condition, keep) -> output`; where keep [B] is False, the condition is dropped.
    """

    def field(x: Array, t: Array) -> Array:
        keep = jnp.ones(x.shape[0], bool)
        if config.guidance == 1.0:
            return velocity(network(x, t, condition, keep), x, t, config)
        x2, t2, c2 = (jnp.concatenate([a, a]) for a in (x, t, condition))
        v = velocity(network(x2, t2, c2, jnp.concatenate([keep, ~keep])), x2, t2, config)
        conditional, null = jnp.split(v, 2)
        return null + config.guidance * (conditional - null)

    return field
