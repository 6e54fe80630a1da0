"""The choice of tokens against transformers' processors, and the solvers of flows against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pisces_jax.inference.sampling import Choices, TextSampling, choose, likeliest, penalise
from pisces_jax.losses.flow import SOLVERS, integrate, sampling_times
from pisces_jax.utils.errors import UserError

V = 40
LOGITS = (3 * np.random.default_rng(0).standard_normal((4, V))).astype(np.float32)
PROMPTS = [[1, 5, 5, 9], [0, 2, 3, 4], [39, 7, 7, 7], [10, 11, 12, 13]]
SEEN = np.zeros((4, V), bool)
for row, ids in enumerate(PROMPTS):
    SEEN[row, ids] = True
# Each row has its own; the last two are those that a row meets alone and together.
SETTINGS = [
    TextSampling(temperature=0.7, top_k=5),
    TextSampling(temperature=1.3, top_p=0.8, repetition_penalty=1.7),
    TextSampling(temperature=2.0, top_k=12, top_p=0.6, repetition_penalty=0.8),
    TextSampling(temperature=0.0, repetition_penalty=1.5),
]


def published(row, how):
    """The scores of one row after transformers' processors, in its order."""
    import torch
    from transformers.generation import logits_process

    scores, ids = torch.tensor(LOGITS[row : row + 1]), torch.tensor([PROMPTS[row]])
    chain = [logits_process.RepetitionPenaltyLogitsProcessor(how.repetition_penalty)]
    chain += [logits_process.TemperatureLogitsWarper(how.temperature)] if how.temperature else []
    chain += [logits_process.TopKLogitsWarper(how.top_k)] if how.top_k else []
    chain += [logits_process.TopPLogitsWarper(how.top_p)] if how.top_p < 1 else []
    for process in chain:
        scores = process(ids, scores)
    return scores[0].numpy()


def test_scores_equal_those_of_transformers():
    how = Choices.of(SETTINGS)
    scores = penalise(jnp.asarray(LOGITS), jnp.asarray(SEEN), how.penalty)
    scores = likeliest(scores / np.where(how.temperature > 0, how.temperature, 1)[:, None], how.top_k, how.top_p)
    for row, settings in enumerate(SETTINGS):
        expected = published(row, settings)
        np.testing.assert_allclose(scores[row], expected, rtol=1e-5)
        assert 1 < np.isfinite(expected).sum() <= V


def test_tokens_come_as_often_as_the_scores_say():
    n, how = 4000, Choices.of(SETTINGS)
    keys = jax.vmap(lambda i: jax.random.split(jax.random.key(i), 4))(jnp.arange(n))
    drawn = jax.jit(jax.vmap(lambda k: choose(jnp.asarray(LOGITS), k, jnp.asarray(SEEN), how)))(keys)
    for row, settings in enumerate(SETTINGS):
        counts = np.bincount(np.asarray(drawn)[:, row], minlength=V)
        scores = published(row, settings).astype(np.float64)
        if not settings.temperature:
            assert counts[scores.argmax()] == n
            continue
        expected = n * np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        assert (counts[expected == 0] == 0).all()
        assert (np.abs(counts - expected) < 5 * np.sqrt(expected) + 1).all()


def test_a_row_does_not_depend_on_the_settings_of_the_others():
    keys = jax.random.split(jax.random.key(1), 4)
    together = choose(jnp.asarray(LOGITS), keys, jnp.asarray(SEEN), Choices.of(SETTINGS))
    for row in range(4):
        alone = Choices.of([SETTINGS[row]])
        one = slice(row, row + 1)
        assert choose(jnp.asarray(LOGITS[one]), keys[one], jnp.asarray(SEEN[one]), alone)[0] == together[row]


@pytest.mark.parametrize(
    "wrong, words",
    [
        (dict(max_tokens=0), "max_tokens 0 is not at least 1"),
        (dict(temperature=float("nan")), "temperature nan is not 0 or more"),
        (dict(top_k=-1), "top_k -1 is not 0 or more"),
        (dict(top_p=0.0), "top_p 0.0 is not above 0 and at most 1"),
        (dict(repetition_penalty=0.0), "repetition_penalty 0.0 is not above 0"),
        (dict(stop=("",)), "a stop text is empty"),
    ],
)
def test_settings_out_of_range_are_refused(wrong, words):
    with pytest.raises(UserError, match=words):
        TextSampling(**wrong)


def test_a_text_ends_before_the_first_stop():
    how = TextSampling(stop=("red", "b"))
    assert how.cut("a red b") == ("a ", True)
    assert how.cut("a bred") == ("a ", True)
    assert how.cut("a green") == ("a green", False)


# Solvers


def gaussian(x, t):
    """The velocity of x_t = 1.5 t + √((1 − t)² + 0.16 t²) z, from N(0, 1) to N(1.5, 0.4²)."""
    slope = (t * 0.16 - (1 - t)) / ((1 - t) ** 2 + t**2 * 0.16)
    return 1.5 + slope * (x - t * 1.5)


def swinging(x, t):
    return 3 * jnp.cos(3 * t) * x


FLOWS = {  # the velocity, and where noise z is at time t
    "gaussian": (gaussian, lambda z, t: 1.5 * t + np.sqrt((1 - t) ** 2 + 0.16 * t**2) * z),
    "swinging": (swinging, lambda z, t: z * np.exp(np.sin(3 * t))),
}
NOISE = np.random.default_rng(0).standard_normal((16, 1))


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpm++", 2)])
def test_solvers_converge_at_their_order(solver, order, flow):
    field, at = FLOWS[flow]
    errors = []
    with jax.enable_x64(True):
        for steps in (80, 320):
            times = np.linspace(0.05, 0.8, steps + 1)
            end = SOLVERS[solver](field, jnp.asarray(at(NOISE, 0.05)), times)
            errors.append(np.abs(end - at(NOISE, 0.8)).max())
    assert np.log(errors[0] / errors[1]) / np.log(4) == pytest.approx(order, abs=0.15)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("solver, least", [("euler", 0.9), ("heun", 1.75), ("dpm++", 1.3)])
def test_solvers_converge_over_the_whole_way(solver, least, flow, shift):
    """From noise to data, where the half log of signal to noise, in which "dpm++" extrapolates, is infinite."""
    field, at = FLOWS[flow]

    def error(steps):
        end = integrate(lambda x, t: field(x, t[:, None]), jnp.asarray(NOISE), steps, solver, shift)
        return np.abs(end - at(NOISE, 1.0)).max()

    with jax.enable_x64(True):
        assert np.log(error(80) / error(320)) / np.log(4) > least


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_few_steps_of_a_straight_flow_are_exact(solver, steps):
    """Data that does not depend on the point: x moves along a straight line."""
    data, noise = jnp.full((2, 3), 7.0), jax.random.normal(jax.random.key(0), (2, 3))
    end = integrate(lambda x, t: (data - x) / (1 - t)[:, None], noise, steps, solver)
    np.testing.assert_allclose(end, data, rtol=1e-5)


def test_evaluations_of_a_solver():
    for solver, each in (("euler", 1), ("heun", 2), ("dpm++", 1)):
        times = []
        with jax.disable_jit():
            integrate(lambda x, t, times=times: times.append(float(t[0])) or x, jnp.ones((1, 1)), 4, solver)
        assert len(times) == 4 * each - (solver == "heun") and max(times) < 1


def test_the_shift_moves_steps_to_the_noise():
    np.testing.assert_allclose(sampling_times(4, 1.0), [0, 0.25, 0.5, 0.75, 1])
    left = np.array([1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(sampling_times(4, 3.0), 1 - 3 * left / (1 + 2 * left))
    assert (np.diff(sampling_times(10, 3.0)) > 0).all() and sampling_times(10, 3.0)[5] < 0.5


def test_the_multistep_solver_is_that_of_diffusers():
    """On the times of its own grid, away from t = 0, where it cannot start."""
    import diffusers
    import torch

    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, final_sigmas_type="zero",
        lower_order_final=True, flow_shift=2.0,
    )  # fmt: skip
    scheduler.set_timesteps(12)
    x = noise = torch.randn(3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for i, timestep in enumerate(scheduler.timesteps):
        t = jnp.full(3, 1 - float(scheduler.sigmas[i]))
        towards_noise = -torch.tensor(np.asarray(swinging(jnp.asarray(x.numpy()), t[:, None])))
        x = scheduler.step(towards_noise, timestep, x, return_dict=False)[0]
    times = 1 - scheduler.sigmas.numpy().astype(np.float64)
    got = SOLVERS["dpm++"](swinging, jnp.asarray(noise.numpy()), times)
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-4)
