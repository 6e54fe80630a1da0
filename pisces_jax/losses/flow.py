"""Flow matching: the path from noise to data, times for training, guidance and sampling.

Conditional flow matching with straight paths (Lipman et al. 2023, arXiv 2210.02747; Liu et al. 2023, arXiv 2209.03003):
x_t = (1 − t)·noise + t·data, with t from 0 (noise) to 1 (data), so the velocity along a path is data − noise. BLIP3-o's
σ is 1 − t. The loss is `objectives.flow_matching`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Velocity = Callable[[Array, Array], Array]


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """Settings of training and sampling.

    Attributes:
        times: distribution of t: "uniform", or "logit_normal", where the logit of t is standard normal (Esser et al.
            2024, arXiv 2403.03206).
        grid: t is one of 0, 1/grid, …, (grid − 1)/grid, as in training on a scheduler's steps; a sampler's network is
            told the next of them, as BLIP3-o's is. 0: any number.
        zero_share: fraction of the samples with t = 0 exactly, where a sampler of few steps starts.
        prediction: what the network predicts: "velocity", "data", or "preconditioned": what is left of the data after
            the best linear guess from x_t, scaled to variance 1 (Karras et al. 2022, arXiv 2206.00364, eq. 7, for data
            of variance 1). The loss compares velocities in all cases.
        floor: lower bound of 1 − t, in the conversion of data to velocity and in `weight`.
        weight: factor of the squared velocity error: "none" (1), "inverse" (1 / max(1 − t, floor)) or "data"
            (max(1 − t, floor)², which makes it the squared error of the data).
        drop: fraction of the samples whose condition is dropped, for guidance.
        steps: number of steps of a sampler.
        solver: of a sampler, one of `SOLVERS`.
        shift: more than 1 moves a sampler's steps towards the noise: 1 − t becomes shift·(1 − t) / (1 + (shift − 1)·
            (1 − t)) (Esser et al. 2024, arXiv 2403.03206, eq. 23).
        temperature: standard deviation of the noise that a sampler starts from; less than 1 gives likelier samples that
            differ less (as in Li et al. 2024, arXiv 2406.11838, section 3.2, for diffusion).
        guidance: scale of classifier-free guidance, see `guided`; 1 is no guidance.
        guidance_from, guidance_to: the times t between which there is guidance (Kynkäänniemi et al. 2024, arXiv
            2404.07724).

    Raises:
        ValueError: an unknown name, or guidance of a network that is trained without dropped conditions.
    """

    times: str = "uniform"
    grid: int = 0
    zero_share: float = 0.0
    prediction: str = "velocity"
    floor: float = 0.05
    weight: str = "none"
    drop: float = 0.1
    steps: int = 20
    solver: str = "euler"
    shift: float = 1.0
    temperature: float = 1.0
    guidance: float = 1.0
    guidance_from: float = 0.0
    guidance_to: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (
            ("times", ("uniform", "logit_normal")),
            ("prediction", ("velocity", "data", "preconditioned")),
            ("weight", ("none", "inverse", "data")),
            ("solver", tuple(SOLVERS)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"flow.{name} {getattr(self, name)!r} is not one of {', '.join(known)}")
        if self.steps < 1 or not 0 < self.shift < float("inf"):
            raise ValueError(f"steps {self.steps} and shift {self.shift:g} must be at least 1 and above 0")
        if self.temperature < 0:
            raise ValueError(f"flow.temperature {self.temperature:g} must be at least 0")
        if self.guidance != 1.0 and not self.drop:
            raise ValueError(
                f"guidance {self.guidance:g} needs a network that has seen dropped conditions: train with drop > 0, or "
                "set guidance to 1"
            )


def interpolate(noise: Float[Array, "B ..."], data: Float[Array, "B ..."], t: Float[Array, "B"]) -> Array:
    """The point x_t of the path."""
    t = t.reshape(-1, *[1] * (data.ndim - 1))
    return (1 - t) * noise + t * data


def sample_time(key: jax.Array, config: FlowConfig) -> Float[Array, ""]:
    """A random time in [0, 1)."""
    kind, value = jax.random.split(key)
    t = jax.random.uniform(value) if config.times == "uniform" else jax.nn.sigmoid(jax.random.normal(value))
    if config.grid:
        t = jnp.floor(t * config.grid) / config.grid
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
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    if config.prediction == "data":
        return (output - x) / jnp.maximum(1 - t, config.floor)
    # data = c_skip·x + c_out·output, c_skip = t / variance, c_out = (1 − t) / √variance; 1 − t is divided out.
    variance = t**2 + (1 - t) ** 2
    return (2 * t - 1) / variance * x + output / jnp.sqrt(variance)


def sampling_times(steps: int, shift: float) -> Float[np.ndarray, "N"]:
    """The times from 0 to 1 between which a sampler steps (`FlowConfig.shift`), N = steps + 1; float64."""
    left = 1 - np.arange(steps + 1) / steps
    return 1 - shift * left / (1 + (shift - 1) * left)


def integrate(
    field: Velocity, noise: Float[Array, "B ..."], steps: int, solver: str = "euler", shift: float = 1.0
) -> Float[Array, "B ..."]:
    """Carries noise to data along `field(x, t)`, t [B], from t = 0 to 1 (`SOLVERS`)."""
    wide = jnp.promote_types(noise.dtype, jnp.float32)

    def at(x: Array, t: Array) -> Array:
        return field(x, jnp.broadcast_to(t.astype(wide), x.shape[:1]))

    return SOLVERS[solver](at, noise, sampling_times(steps, shift))


def _euler(field: Velocity, x: Array, times: np.ndarray) -> Array:
    def step(x: Array, now: Array) -> tuple[Array, None]:
        return x + now[1] * field(x, now[0]), None

    return jax.lax.scan(step, x, _columns(x, times[:-1], np.diff(times)))[0]


def _heun(field: Velocity, x: Array, times: np.ndarray) -> Array:
    """Karras et al. 2022, algorithm 1: two evaluations a step. The last step is Euler's, since a network never sees
    t = 1."""

    def step(x: Array, now: Array) -> tuple[Array, None]:
        t, dt = now
        first = field(x, t)
        return x + dt * (first + field(x + dt * first, t + dt)) / 2, None

    x = jax.lax.scan(step, x, _columns(x, times[:-2], np.diff(times)[:-1]))[0]
    return _euler(field, x, times[-2:])


def _dpm(field: Velocity, x: Array, times: np.ndarray) -> Array:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2) with α = t and σ = 1 − t: one evaluation a step.
    It extrapolates the data that the network predicts, in the half log of the signal-to-noise ratio, λ = log(α/σ). At
    t = 0 and 1, where λ is infinite, a step is Euler's. Near them steps are long in λ, so that the error falls somewhat
    more slowly than with the second order that it has in between.
    """
    t, following = times[:-1], times[1:]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.diff(np.log(times) - np.log1p(-times))
        share = np.append(0.0, steps[1:] / steps[:-1] / 2)  # 1 / (2r) of the paper
    share[-1] = 0.0

    def step(carried: tuple[Array, Array], now: Array) -> tuple[tuple[Array, Array], None]:
        (x, before), (t, move, share) = carried, now
        data = x + (1 - t) * field(x, t)
        ahead = data + share * (data - before)
        return (x + move * (ahead - x), data), None

    moves = (following - t) / (1 - t)  # α(e^−h − 1) of the paper, which is finite everywhere
    return jax.lax.scan(step, (x, jnp.zeros_like(x)), _columns(x, t, moves, share))[0][0]


def _columns(x: Array, *columns: np.ndarray) -> Array:
    return jnp.asarray(np.stack(columns, axis=-1), jnp.promote_types(x.dtype, jnp.float32))


SOLVERS: dict[str, Callable[[Velocity, Array, np.ndarray], Array]] = {"euler": _euler, "heun": _heun, "dpm++": _dpm}
"""Name -> a solver of (field, noise, times); `field` takes a single time."""


def guide(
    network: Callable[..., Array],
    x: Float[Array, "B ..."],
    t: Float[Array, "B"],
    condition: Sequence[Array],
    null: Sequence[Array],
    scale: Float[Array, "B ..."] | float,
) -> Float[Array, "B ..."]:
    """Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598): v_null + scale·(v_cond − v_null).

    Both are computed in one batch of twice the size.

    Args:
        network: `(x, t, *condition) -> v`.
    """
    pairs = [jnp.concatenate(pair) for pair in zip((x, t, *condition), (x, t, *null), strict=True)]
    conditional, unconditional = jnp.split(network(*pairs), 2)
    return unconditional + scale * (conditional - unconditional)


def told_time(t: Float[Array, "B"], config: FlowConfig) -> Float[Array, "B"]:
    """What a sampler's network is told of t: 1 − t rounded down to the grid of training, t itself without one."""
    if not config.grid:
        return t
    return 1 - jnp.floor((1 - t) * config.grid + 1e-3) / config.grid  # more than float32 may be short of a whole number


def guided(network: Callable[..., Array], condition: Float[Array, "B ..."], config: FlowConfig) -> Velocity:
    """The velocity field of a network with guidance; a guidance of 1 needs only v_cond.

    Args:
        network: `(x, t, condition, keep) -> output`; where keep [B] is False, the condition is dropped.
    """

    def network_velocity(x: Array, t: Array, condition: Array, keep: Array) -> Array:
        return velocity(network(x, told_time(t, config), condition, keep), x, t, config)

    def field(x: Array, t: Array) -> Array:
        keep = jnp.ones(x.shape[0], bool)
        if config.guidance == 1.0:
            return network_velocity(x, t, condition, keep)
        inside = (t >= config.guidance_from) & (t < config.guidance_to)
        scale = jnp.where(inside, config.guidance, 1.0).reshape(-1, *[1] * (x.ndim - 1))
        return guide(network_velocity, x, t, (condition, keep), (condition, ~keep), scale)

    return field
