"""The flow of each vector: its network against plain arithmetic, its loss in packed rows, its rollout, its settings."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny
from test_flow_head import PISCES, flow_config, prompts
from test_pisces import make

from pisces_jax.inference.rollout import Rollout
from pisces_jax.losses.flow import FlowConfig, guided, integrate
from pisces_jax.models.denoiser import Denoiser, DenoiserConfig
from pisces_jax.models.pisces import Pisces
from pisces_jax.training import flops
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.unified import UnifiedProgram
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.folder import part_shapes

L, m, C, D = tiny.Letters, 4, 16, 32
CONFIG = PISCES["denoiser"]


@pytest.fixture(scope="module")
def params():
    return make(Pisces(CONFIG))


def test_the_network_in_plain_arithmetic():
    """Li et al. 2024, section 3.3: norm, modulation, two linear maps with SiLU between; a dropped state is zero."""
    config = DenoiserConfig(channels=5, condition_width=6, width=8, layers=2)
    rng = np.random.default_rng(0)
    x, state, t, keep = rng.standard_normal((3, 5)), rng.standard_normal((3, 6)), np.array([0.1, 0.5, 0.9]), [1, 0, 1]

    def linear(p, x):
        return x @ p["kernel"].reshape(len(p["kernel"]), -1) + p["bias"].reshape(-1)

    def norm(x):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)

    def silu(x):
        return x / (1 + np.exp(-x))

    with jax.enable_x64(True):
        init = jax.eval_shape(
            lambda: Denoiser(config, jnp.float64).init(jax.random.key(0), x, t, state, np.bool_(keep))
        )
        p = jax.tree.map(lambda a: np.asarray(a, np.float64), plain.randomised(nn.unbox(init)["params"], 1))
        got = np.asarray(Denoiser(config, jnp.float64).apply({"params": p}, x, t, state, np.bool_(keep)))
    state = state * np.array(keep)[:, None]
    angles = 1000 * t[:, None] * 10_000.0 ** (-np.arange(4) / 4)
    time = linear(p["time_down"], silu(linear(p["time_up"], np.concatenate([np.cos(angles), np.sin(angles)], 1))))
    modulation = silu(time + linear(p["state_modulation"], state))
    z = linear(p["input"], x) + linear(p["state"], state)
    for i in range(2):
        block = jax.tree.map(lambda a, i=i: a[i], p["layers"])
        shift, scale, gate = np.split(linear(block["modulation"], modulation), 3, axis=1)
        h = linear(block["down"], silu(linear(block["up"], norm(z) * (1 + scale) + shift)))
        z = z + (1 + gate) * h
    out = norm(z) * p["norm"]["scale"] + p["norm"]["bias"]
    expected = linear(p["output"], out) + linear(p["estimate"], state)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)  # sines of large angles are float32 in parts
    # Products with weights, twice: what `plan` and MFU count; the time is counted as one of the vector's own.
    matrices = sum(a.size for a in jax.tree.leaves(p) if a.ndim > 1 and a.shape[-2:] != (3, 8) or a.ndim == 4)
    biases = 2 * 2 * 8  # of the blocks' two linear maps, which have an axis of layers
    assert flops.denoiser(config) == 2 * (matrices - biases)


def test_its_shapes_alone_are_those_within_the_model(params):
    """What a run's checkpoint is opened with."""
    alone, within = part_shapes(CONFIG.denoiser), params["denoiser"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), alone) == jax.tree.map(lambda a: (a.shape, a.dtype), within)


def test_the_loss_is_flow_matching_of_each_vector(params):
    """From states and features to the loss in numpy, with the noise and times that were drawn, of each vector its own.
    Noise on what is fed in has the size of the setting, and the target has none."""
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal(C), rng.uniform(0.5, 2.0, C)
    every = {**params, "feature_statistics": {"mean": jnp.float32(mean), "std": jnp.float32(std)}}
    model = Pisces(CONFIG)
    batch = tiny.batch(*(tiny.pack(rows, idle=5) for rows in [[[tiny.EDIT, tiny.DRAW]], [[tiny.TWO]]]))
    batch["draw_id"] = rng.integers(0, 2**32, batch["draw_id"].shape, np.uint64).astype(np.uint32)

    class Spy(Pisces):
        def generate(self, x, t, states, keep):
            caught.append((x, t, states, keep))
            return super().generate(x, t, states, keep)

        def feed(self, features, place):
            fed.append(features)
            return super().feed(features, place)

    @jax.jit
    def run(params, batch):
        caught.clear(), fed.clear()
        losses, _ = program.losses(params, batch, jax.random.key(0))
        return losses["vectors"].compute(), losses["vectors"].count, caught[0], fed[0]

    caught, fed = [], []
    program = UnifiedProgram(
        Spy(CONFIG), {"text": 0.0, "vectors": 1.0}, 0, ("a",), flow=FlowConfig(drop=0.3), flow_samples=3, fed_noise=0.5
    )
    loss, count, (x, t, given, keep), noisy = jax.device_get(run(every, batch))
    true = jax.jit(lambda p, b: model.apply({"params": p}, b)[2])(every, batch)
    fed_noise = noisy - true
    assert fed_noise.std() == pytest.approx(0.5, rel=0.1) and abs(fed_noise.mean()) < 0.05
    assert len(np.unique(fed_noise)) > 0.99 * fed_noise.size
    _, states, target = jax.device_get(
        jax.jit(lambda p, b, n: model.apply({"params": p}, b, n))(every, batch, fed_noise)
    )
    np.testing.assert_array_equal(target, true)
    data = np.repeat((target.reshape(-1, C) - mean) / std, 3, 0)
    np.testing.assert_allclose(given, np.repeat(states.reshape(-1, D), 3, 0), rtol=1e-4, atol=1e-5)
    left = 1 - t[:, None]
    noise = (x - (1 - left) * data) / left
    assert 0.8 < noise.std() < 1.2 and len(np.unique(t)) == len(t)
    out = model.apply({"params": every}, x, t, given, keep, method="generate")
    errors = np.mean((np.asarray(out) - (data - noise)) ** 2, axis=1).reshape(-1, m, 3).mean(-1)
    valid = batch["draw_valid"].reshape(-1)
    assert float(count) == valid.sum() * m == program.counts(batch)["vectors"]
    assert float(loss) == pytest.approx(errors[valid].mean(), rel=1e-4)


def test_a_rollout_draws_each_vector_from_the_state_of_training(params):
    """Vector k comes from noise of its own and the state that training has there, given the vectors before it."""
    model, flow = Pisces(CONFIG), FlowConfig(steps=3, guidance=2.0, temperature=0.7)
    rollout = Rollout(model)

    @jax.jit
    def draw(given, keys):
        rows, vectors = rollout.draw_vectors(params, rollout.prefill(params, given, 24), L.begin_image, keys, flow)
        return rows.length, rows.hidden, vectors

    rows = [[L.bos, 7, 8, 9], [L.bos, 14]]
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    length, hidden, vectors = draw(prompts(rows), keys)
    assert list(length) == [len(r) + 1 + m for r in rows]
    layout = dataclasses.replace(tiny.LAYOUT, rows=1, draw_slots=1, read_slots=0)
    teach = jax.jit(lambda p, b: model.apply({"params": p}, b))
    for b, row in enumerate(rows):
        batch = tiny.batch(tiny.pack([[]], layout))
        whole = [*row, L.begin_image, *[L.image] * m]
        batch["tokens"][0, 0, : len(whole)], batch["segment_ids"][0, 0, : len(whole)] = whole, 1
        batch["positions"][0, 0] = np.arange(layout.length)
        batch["draw_start"][0, 0], batch["draw_valid"][0, 0] = len(row) + 1, True
        batch["draw_features"] = np.asarray(vectors)[b][None, None]
        last, states, _ = teach(params, batch)
        noise = jnp.stack([jax.random.normal(jax.random.fold_in(keys[b], k), (C,)) for k in range(m)])
        field = guided(lambda *a: model.apply({"params": params}, *a, method="generate"), states[0, 0], flow)
        made = model.apply({"params": params}, integrate(field, 0.7 * noise, 3), method="from_data")
        np.testing.assert_allclose(vectors[b], made, rtol=2e-4, atol=2e-4)
        np.testing.assert_allclose(hidden[b], last[0, len(whole) - 1], rtol=2e-4, atol=2e-4)
    other = draw(prompts([rows[1], [L.bos, 3, 3, 3, 3]]), keys[::-1])[2]
    np.testing.assert_allclose(other[0], vectors[1], rtol=1e-5, atol=1e-6)
    again = draw(prompts(rows), jax.vmap(jax.random.key)(jnp.array([0, 5])))[2]
    np.testing.assert_array_equal(again[0], vectors[0])
    assert np.abs(again[1] - vectors[1]).max() > 1e-2


def settings(**model):
    config = flow_config(model=dict(denoiser=dict(width=16, layers=1), fed_vectors=True) | model)
    del config.model["generator"]
    return config


def test_its_parts_and_what_is_refused():
    program = make_program(settings(standardise=True), L.vocab_size)
    assert {"denoiser", "feature_statistics", "generation_projector"} <= set(program.model.config.parts)
    assert not {"generator", "queries", "vector_head"} & set(program.model.config.parts)
    assert program.measured == ("feature_statistics",)
    with pytest.raises(UserError, match=r"denoiser\.channels follows"):
        make_program(settings(denoiser=dict(width=16, layers=1, channels=3)), L.vocab_size)
    with pytest.raises(UserError, match=r"hidden\.vector_head is of regression"):
        make_program(settings(hidden=dict(projector=24, vector_head=24)), L.vocab_size)
    fed = settings(place_embedding=True, fed_vectors=False)
    fed.loss.fed_noise = 0.1
    with pytest.raises(UserError, match=r"loss\.fed_noise .* set it to 0"):
        make_program(fed, L.vocab_size)
    with pytest.raises(UserError, match="two vector heads"):
        make_program(flow_config(model=dict(denoiser=dict(width=16, layers=1))), L.vocab_size)
