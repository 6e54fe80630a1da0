"""Flow matching on a Gaussian, where the exact velocity is known, and the settings of a flow.

Data ~ N(m, s²), noise ~ N(0, 1), x_t = (1-t)·noise + t·data. Data - noise and x_t are jointly normal, so

    E[data - noise | x_t] = m + (t s² - (1-t)) / ((1-t)² + t² s²) · (x_t - t m),

and integrating this field from noise z at t = 0 gives m + s z.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pisces_jax.inference import decode
from pisces_jax.losses.flow import FlowConfig, guided, integrate, interpolate, loss_weight, sample_time, velocity
from pisces_jax.losses.objectives import flow_matching
from pisces_jax.models.dit import DiT, DiTConfig

MEAN, STD = 1.5, 0.4


def exact(x, t):
    t = t.reshape(-1, *[1] * (x.ndim - 1))
    slope = (t * STD**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * STD**2)
    return MEAN + slope * (x - t * MEAN)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


def data(n, width=32):
    return jnp.asarray(MEAN + STD * np.random.default_rng(0).standard_normal((n, width)), jnp.float32)


def spied(network, values, condition, keys, config):
    """The losses, and the arguments of the network (x, t, condition, keep)."""

    @jax.jit
    def run(values, condition, keys):
        caught = []

        def spy(*given):
            caught.append(given)
            return network(*given)

        return flow_matching(spy, values, condition, keys, config), *caught

    return run(values, condition, keys)


def losses(field, config, n=4000):
    return spied(lambda x, t, condition, keep: field(x, t), data(n), jnp.zeros((n, 1)), keys(n), config)[0]


def within(values, expected, sigmas=4.0):
    """Asserts that the mean of independent `values` is `expected`, within `sigmas` standard errors."""
    values = np.asarray(values, np.float64)
    assert abs(values.mean() - expected) < sigmas * values.std() / math.sqrt(len(values))


def test_least_loss_is_the_variance_that_remains():
    """Var(data - noise | x_t) = s² / ((1-t)² + t² s²); over uniform t its integral is s π/2."""
    within(losses(exact, FlowConfig()), STD * math.pi / 2)
    # The loss of a wrong field is larger, so the test above can fail.
    wrong = np.asarray(losses(lambda x, t: MEAN - exact(x, t), FlowConfig()))
    assert wrong.mean() > 2 * STD * math.pi / 2


def test_exact_velocity_minimises_the_loss():
    """At the exact field, the slope of the loss in the directions 1, x, t and x·t is zero; elsewhere it is not."""
    n = 4000

    def each(coefficients, field):
        def changed(x, t):
            t_ = t[:, None]
            a, b, c, d = coefficients
            return field(x, t) + a + b * x + c * t_ + d * x * t_

        return losses(changed, FlowConfig(), n)

    slopes = jax.jacfwd(each)(jnp.zeros(4), exact)
    for direction in range(4):
        within(slopes[:, direction], 0.0)
    off = np.asarray(jax.jacfwd(each)(jnp.zeros(4), lambda x, t: exact(x, t) + 0.1))
    assert abs(off[:, 0].mean()) > 4 * off[:, 0].std() / math.sqrt(n)


def test_integration_carries_noise_to_the_data():
    noise = jax.random.normal(jax.random.key(1), (20_000,))
    ends = {steps: np.asarray(integrate(exact, noise, steps)) for steps in (100, 200, 1600)}
    truth = MEAN + STD * np.asarray(noise)
    errors = {steps: np.abs(end - truth).mean() for steps, end in ends.items()}
    assert errors[1600] < 2e-3
    assert errors[100] / errors[200] == pytest.approx(2, rel=0.1)  # Euler is of first order
    assert ends[1600].mean() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(20_000))
    assert ends[1600].std() == pytest.approx(STD, rel=0.02)


def test_temperature_scales_the_noise_that_a_picture_starts_from(monkeypatch):
    """Of data ~ N(0, s²), noise z becomes the picture s·τ·z."""
    network = DiT(DiTConfig(
        size=4, patch_size=1, channels=3, width=8, layers=1, heads=1, mlp_hidden=8, condition_width=2,
        condition_vectors=1,
    ))  # fmt: skip
    monkeypatch.setattr(
        decode, "apply", lambda module, params, x, t, *rest: exact(x + t.reshape(-1, 1, 1, 1) * MEAN, t) - MEAN
    )
    how = FlowConfig(steps=1600, temperature=0.5)
    got = decode.PictureDecoder(network, None).decode({"decoder": {}}, jnp.zeros((6, 1, 2)), keys(6), how)
    expected = 127.5 * (1 + STD * 0.5 * np.asarray(decode.noise_of(keys(6), network)))
    assert expected.std() > 20
    np.testing.assert_allclose(np.asarray(got, float), expected, atol=1)


def test_each_step_uses_the_velocity_at_its_start():
    times = []
    with jax.disable_jit():
        integrate(lambda x, t: times.append(float(t[0])) or jnp.ones_like(x), jnp.zeros((1, 2)), 4)
    assert times == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("weight", ["none", "inverse"])
def test_prediction_of_data_and_of_velocity_give_the_same_loss(weight):
    """One function in two forms: D(x, t) = x + (1-t) V(x, t)."""
    as_velocity = FlowConfig(prediction="velocity", weight=weight, floor=1e-4)
    as_data = FlowConfig(prediction="data", weight=weight, floor=1e-4)

    def denoised(x, t):
        return x + (1 - t[:, None]) * jnp.sin(x)

    a = losses(lambda x, t: jnp.sin(x), as_velocity, 500)
    np.testing.assert_allclose(losses(denoised, as_data, 500), a, rtol=2e-3)
    assert not np.allclose(losses(denoised, as_velocity, 500), a, rtol=0.1)


def test_a_preconditioned_output_is_karras_form():
    """D(x, t) = c_skip·x + c_out·F with Karras et al.'s equations for σ = (1-t)/t, data of variance 1, x/t as input."""
    rng = np.random.default_rng(0)
    x, f = rng.standard_normal((2, 5, 3))
    t = np.array([0.05, 0.3, 0.5, 0.8, 0.95])
    sigma = ((1 - t) / t)[:, None]
    skip, out = 1 / (sigma**2 + 1), sigma / np.sqrt(sigma**2 + 1)
    denoised = skip * (x / t[:, None]) + out * f
    expected = (denoised - x) / (1 - t)[:, None]
    config = FlowConfig(prediction="preconditioned")
    np.testing.assert_allclose(velocity(*map(jnp.asarray, (f, x, t)), config), expected, rtol=1e-5, atol=1e-5)


def test_a_preconditioned_zero_is_the_best_linear_guess():
    """For data of mean 0 and variance 1 an output of 0 is the exact velocity E[data - noise | x_t]."""
    x, t = jnp.linspace(-2, 2, 5)[:, None], jnp.array([0.0, 0.2, 0.5, 0.9, 1.0])
    best = ((2 * t - 1) / ((1 - t) ** 2 + t**2))[:, None] * x
    got = velocity(jnp.zeros_like(x), x, t, FlowConfig(prediction="preconditioned"))
    np.testing.assert_allclose(got, best, rtol=1e-6, atol=1e-6)


def test_floor_bounds_the_velocity_of_a_data_prediction():
    config = FlowConfig(prediction="data", floor=0.05)
    x, t = jnp.array([[1.0], [1.0]]), jnp.array([0.5, 0.99])
    got = velocity(jnp.array([[3.0], [3.0]]), x, t, config)
    np.testing.assert_allclose(got, [[2 / 0.5], [2 / 0.05]], rtol=1e-6)


def test_path_and_target():
    noise, picture = jnp.full((3, 2, 2, 1), 2.0), jnp.full((3, 2, 2, 1), 10.0)
    x = interpolate(noise, picture, jnp.array([0.0, 0.25, 1.0]))
    np.testing.assert_allclose(x[:, 0, 0, 0], [2, 4, 10])
    # From any point of the path, the target velocity leads to the data.
    values = data(50)
    loss, (x, t, *_) = spied(lambda x, *_: jnp.zeros_like(x), values, jnp.zeros((50, 1)), keys(50), FlowConfig())
    x, t = np.asarray(x, np.float64), np.asarray(t, np.float64)
    noise = (x - t[:, None] * values) / (1 - t[:, None])
    some = t < 0.9  # beyond, float32 is not precise enough to recover the noise from x
    np.testing.assert_allclose(loss[some], ((values - noise) ** 2).mean(1)[some], rtol=1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_times(share):
    n = 20_000

    def times(config):
        return np.asarray(jax.jit(jax.vmap(lambda k: sample_time(k, config)))(keys(n)), np.float64)

    t = times(FlowConfig(zero_share=share))
    zero = t == 0
    assert abs(zero.mean() - share) < 4 * math.sqrt(share * (1 - share) / n) + 1e-9
    assert (t >= 0).all() and (t < 1).all()
    rest = np.sort(t[~zero])
    uniform = (np.arange(len(rest)) + 0.5) / len(rest)
    assert np.abs(rest - uniform).max() < 1.95 / math.sqrt(len(rest))  # Kolmogorov

    t = times(FlowConfig(times="logit_normal"))
    logits = np.log(t / (1 - t))
    assert abs(logits.mean()) < 4 / math.sqrt(n) and logits.std() == pytest.approx(1, abs=0.03)
    assert (np.abs(logits) < 1).mean() == pytest.approx(0.6827, abs=0.015)


def test_weight():
    t = jnp.array([0.0, 0.5, 0.9, 0.99])
    inverse = FlowConfig(weight="inverse", floor=0.05)
    np.testing.assert_allclose(loss_weight(t, inverse), [1, 2, 10, 20], rtol=1e-5)
    assert loss_weight(t, FlowConfig()).tolist() == [1, 1, 1, 1]
    arguments = (lambda x, *_: x), data(200), jnp.zeros((200, 1)), keys(200)
    plain, (_, t, *_) = spied(*arguments, FlowConfig())
    weighted, _ = spied(*arguments, inverse)
    np.testing.assert_allclose(weighted / plain, 1 / np.maximum(1 - np.asarray(t), 0.05), rtol=1e-4)


def test_weight_that_makes_the_loss_that_of_the_data():
    """max(1 - t, floor)² |velocity error|² is |data error|² for a network that predicts data."""
    config = FlowConfig(prediction="data", weight="data", floor=0.05)
    values = data(200)
    loss, (x, *_) = spied(lambda x, *_: jnp.sin(x), values, jnp.zeros((200, 1)), keys(200), config)
    t = np.asarray(spied(lambda x, *_: x, values, jnp.zeros((200, 1)), keys(200), config)[1][1])
    some = t < 0.9
    np.testing.assert_allclose(loss[some], ((np.sin(x) - values) ** 2).mean(1)[some], rtol=1e-3)


def test_share_of_dropped_conditions():
    n = 20_000
    condition = jnp.arange(n, dtype=jnp.float32)[:, None]
    arguments = (lambda x, *_: x), jnp.zeros((n, 1)), condition, keys(n)
    _, (_, t, given, keep) = spied(*arguments, FlowConfig(drop=0.1))
    given, keep, t = map(np.asarray, (given, keep, t))
    np.testing.assert_array_equal(given, condition)
    assert abs((~keep).mean() - 0.1) < 4 * math.sqrt(0.09 / n)
    # Dropping does not depend on the time.
    assert abs(t[~keep].mean() - 0.5) < 4 * math.sqrt(1 / 12 / (~keep).sum())
    assert spied(*arguments, FlowConfig(drop=0.0))[1][3].all()


def test_noise_depends_on_each_examples_key_alone():
    n, values, order = 24, data(24), np.random.default_rng(0).permutation(24)
    config = FlowConfig(drop=0.5, zero_share=0.2, weight="inverse")

    def network(x, t, condition, keep):
        return jnp.where(keep[:, None], jnp.cos(x) * condition + t[:, None], x)

    def run(index):
        condition = jnp.linspace(0, 1, n)[:, None]
        return np.asarray(spied(network, values[index], condition[index], keys(n)[index], config)[0])

    whole = run(np.arange(n))
    np.testing.assert_array_equal(run(order), whole[order])
    np.testing.assert_allclose(run(np.arange(3, 9)), whole[3:9], rtol=1e-6)
    assert len(set(whole.tolist())) == n


@pytest.mark.parametrize("prediction", ["velocity", "data", "preconditioned"])
def test_guidance(prediction):
    def network(x, t, condition, keep):
        return jnp.where(keep[:, None], condition * jnp.sin(x), jnp.cos(x) + t[:, None])

    x, condition = jnp.linspace(-1, 2, 12).reshape(4, 3), jnp.arange(1.0, 5.0)[:, None]
    t = jnp.full(4, 0.3)

    def v(output):
        if prediction == "preconditioned":
            return -0.4 / 0.58 * x + output / math.sqrt(0.58)
        return output if prediction == "velocity" else (output - x) / 0.7

    with_condition, without = v(condition * jnp.sin(x)), v(jnp.cos(x) + 0.3)
    for scale in (0.0, 1.0, 3.0):
        field = guided(network, condition, FlowConfig(prediction=prediction, guidance=scale))
        expected = without + scale * (with_condition - without)
        np.testing.assert_allclose(field(x, t), expected, rtol=1e-5, atol=1e-5)


def test_guidance_of_one_costs_no_second_pass():
    sizes = []

    def network(x, t, condition, keep):
        sizes.append((len(x), bool(keep.all())))
        return x

    for scale in (1.0, 2.0):
        guided(network, jnp.zeros((4, 1)), FlowConfig(guidance=scale))(jnp.zeros((4, 3)), jnp.zeros(4))
    assert sizes == [(4, True), (8, False)]


def test_unknown_settings_are_refused():
    with pytest.raises(ValueError, match="flow.prediction 'noise' is not one of velocity, data, preconditioned"):
        FlowConfig(prediction="noise")
