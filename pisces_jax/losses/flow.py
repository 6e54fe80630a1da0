"""The path between noise and data, the time at which it is learned, guidance and integration.

Conditional flow matching with straight paths (Lipman et al. 2023; Liu et al. 2023): x_t = (1 − t)·noise + t·data with
t from 0 (noise) to 1 (data), so the velocity along a path is data − noise. BLIP3-o's σ is 1 − t.
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
    """How a flow is learned and sampled.

    Attributes:
        times: "uniform", or "logit_normal" (Esser et al. 2024: the logit of t is standard normal).
        zero_share: share of the samples at t = 0 exactly, where a few-step sampler starts.
        prediction: what the network gives, "velocity" or "data"; the loss is on the velocity in both cases.
        floor: least 1 − t, where data is turned into velocity and in the loss's weight.
        weight: of the squared velocity error: "none"; "inverse", 1 / max(1 − t, floor); or "data", max(1 − t, floor)²,
            which makes it the squared error of the data.
        drop: share of the samples whose condition is dropped, for guidance.
        steps: Euler steps of sampling.
        guidance: v = v_null + guidance·(v_cond − v_null) (Ho & Salimans 2022); 1 is none.
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
                raise ValueError(f"flow.{name} {getattr(self, name)!r} is none of {', '.join(known)}")


def interpolate(noise: Array, data: Array, t: Float[Array, "B"]) -> Array:
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data


def sample_time(key: jax.Array, config: FlowConfig) -> Float[Array, ""]:
    """One time in [0, 1)."""
    kind, value = jax.random.split(key)
    t = jax.random.uniform(value) if config.times == "uniform" else jax.nn.sigmoid(jax.random.normal(value))
    return jnp.where(jax.random.uniform(kind) < config.zero_share, 0.0, t)


def loss_weight(t: Float[Array, "B"], config: FlowConfig) -> Float[Array, "B"]:
    left = jnp.maximum(1 - t, config.floor)
    return {"none": jnp.ones_like(t), "inverse": 1 / left, "data": left**2}[config.weight]


def velocity(output: Array, x: Array, t: Float[Array, "B"], config: FlowConfig) -> Array:
    """The velocity at (x, t) that a network's output stands for: data = x + (1 − t)·velocity."""
    if config.prediction == "velocity":
        return output
    return (output - x) / jnp.maximum(1 - t, config.floor).reshape(-1, *[1] * (x.ndim - 1))


def integrate(field: Velocity, noise: Array, steps: int) -> Array:
    """Euler steps of equal length from t = 0 to 1; `field(x, t)` with t [B]."""

    def step(i: Any, x: Array) -> Array:
        t = jnp.full(x.shape[:1], i / steps, jnp.float32)
        return x + field(x, t) / steps

    return jax.lax.fori_loop(0, steps, step, noise)


def guided(network: Callable[..., Array], condition: Array, config: FlowConfig) -> Velocity:
    """The field to integrate: `network(x, t, condition, keep)` with classifier-free guidance, in one doubled batch."""

    def field(x: Array, t: Array) -> Array:
        keep = jnp.ones(x.shape[0], bool)
        if config.guidance == 1.0:
            return velocity(network(x, t, condition, keep), x, t, config)
        x2, t2, c2 = (jnp.concatenate([a, a]) for a in (x, t, condition))
        v = velocity(network(x2, t2, c2, jnp.concatenate([keep, ~keep])), x2, t2, config)
        conditional, null = jnp.split(v, 2)
        return null + config.guidance * (conditional - null)

    return field
