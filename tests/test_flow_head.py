"""The flow head (BLIP3-o): its queries in packed rows, its drawings, its settings. `parity.py` has its generator."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from flax import linen as nn
from test_pisces import GivenVectors, forward, given_batch, make, pictures

from pisces_jax.data.example import Example, Text
from pisces_jax.data.packing.layout import lay_out
from pisces_jax.inference.rollout import Pool, Prompts, Rollout
from pisces_jax.losses.flow import FlowConfig, guided, integrate
from pisces_jax.losses.objectives import cosine_error
from pisces_jax.models.denoiser import DenoiserConfig
from pisces_jax.models.dit import DiT, DiTConfig
from pisces_jax.models.layers import apply
from pisces_jax.models.pisces import Pisces
from pisces_jax.sharding import make_mesh
from pisces_jax.training import config as settings
from pisces_jax.training.checkpoints import Checkpoints
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.unified import UnifiedProgram
from pisces_jax.training.step import make_trainer
from pisces_jax.utils.errors import UserError

L, m = tiny.Letters, 4
GENERATOR = DiTConfig(
    size=2, patch_size=1, channels=16, width=16, layers=1, heads=2, mlp_hidden=24, condition_width=32,
    condition_vectors=m,
)  # fmt: skip
FLOW = dataclasses.replace(
    tiny.PISCES, generator=GENERATOR, vector_head_hidden=0, place_embedding=False, fed_vectors=False
)


def flow_config(**changes):
    model = tiny.model_settings()
    model["hidden"] = dict(projector=24)
    model["generator"] = dict(width=16, layers=1, heads=2, mlp_hidden=24)
    model |= dict(fed_vectors=False) | changes.pop("model", {})
    return tiny.config(program="unified", model=model, data=dict(row_length=64), **changes)


# --- the generator of the released models


def test_the_published_generator_has_its_size():
    config = DiTConfig(
        size=8, patch_size=1, channels=1792, width=1792, layers=24, heads=28, mlp_hidden=4864, condition_width=3584,
        condition_vectors=64, published=True,
    )  # fmt: skip
    inputs = jnp.zeros((1, 8, 8, 1792)), jnp.zeros(1), jnp.zeros((1, 64, 3584)), jnp.ones(1, bool)
    shapes = jax.eval_shape(lambda: nn.unbox(DiT(config).init(jax.random.key(0), *inputs)))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 1_365_010_336


def test_sampling_equals_the_published_scheduler():
    """Thirty Euler steps with σ from 1 to 1/30, as BLIP3-o samples, of a field that is neither linear nor constant."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 30, 30))
    noise = np.random.default_rng(0).standard_normal((2, 5)).astype(np.float32)
    x = torch.as_tensor(noise)
    for time in scheduler.timesteps:
        x = scheduler.step(torch.sin(3 * x) + time / 1000, time, x, return_dict=False)[0]
    got = integrate(lambda x, t: -(jnp.sin(3 * x) + (1 - t)[:, None]), jnp.asarray(noise), 30)
    np.testing.assert_allclose(got, x.numpy(), rtol=1e-5, atol=1e-5)


# --- what the head is for


def test_two_modes_are_drawn_where_regression_gives_their_mean():
    """Vectors that are +a or −a with equal odds, whatever the text. The best regression is 0, which is neither; the
    flow with the exact velocity, E[data − noise | x_t] = (tanh(a·t·x / (1 − t)²)·a − x) / (1 − t), ends at the modes,
    half at each."""
    a, n = 1.5, 2000
    modes = a * np.random.default_rng(0).choice([-1.0, 1.0], n)
    best = min(np.linspace(-2, 2, 81), key=lambda guess: np.mean((guess - modes) ** 2))
    assert abs(best) < 0.1

    def field(x, t):
        left = (1 - t)[:, None]
        return (a * jnp.tanh(a * (1 - left) * x / left**2) - x) / left

    drawn = np.asarray(integrate(field, jax.random.normal(jax.random.key(0), (n, 1)), 100))[:, 0]
    assert np.abs(np.abs(drawn) - a).max() < 0.02
    assert abs((drawn > 0).mean() - 0.5) < 4 * 0.5 / n**0.5


def test_guidance_within_an_interval():
    """Guided inside [from, to), the condition's own velocity outside."""
    config = FlowConfig(guidance=3.0, guidance_from=0.25, guidance_to=0.75)
    field = guided(lambda x, t, c, keep: jnp.where(keep[:, None], 5.0, 1.0) + 0 * x, jnp.zeros((4, 1)), config)
    got = field(jnp.zeros((4, 1)), jnp.array([0.0, 0.25, 0.5, 0.75]))
    np.testing.assert_allclose(got[:, 0], [5.0, 13.0, 13.0, 5.0])


def test_cosine_error():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 3, 5))
    expected = [1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y) for x, y in zip(a, b, strict=True)]
    np.testing.assert_allclose(cosine_error(jnp.asarray(a), jnp.asarray(b)), expected, rtol=1e-5)
    assert np.isfinite(jax.grad(lambda x: cosine_error(x, jnp.asarray(b)).sum())(jnp.zeros((3, 5)))).all()


# --- in packed rows


@pytest.fixture(scope="module")
def params():
    return make(Pisces(FLOW))


def test_queries_see_their_own_example_and_no_vectors(params):
    """States at the queries: the same whatever the true vectors are; changed by a token before them in their example,
    and by nothing of another."""
    model, batch = GivenVectors(FLOW), given_batch()
    run = jax.jit(lambda b: model.apply({"params": params}, b)[:2])
    hidden, states = jax.device_get(run(batch))
    other = dict(batch, draw_images=batch["draw_images"][::-1] + 1)
    np.testing.assert_array_equal(run(other)[0], hidden)
    shape = batch["tokens"].shape
    by_row = hidden.reshape(*shape, -1)
    for role, g, slot, row, start in pictures(batch):
        if role == "draw":
            np.testing.assert_array_equal(states[g, slot], by_row[g, row, start : start + m])
            tokens = batch["tokens"].copy()
            tokens[g, row, start - 1] = 7  # [IMG]
            changed = run(dict(batch, tokens=tokens))[1]
            assert (changed[g, slot] != states[g, slot]).any(axis=-1).all()
            elsewhere = batch["tokens"].copy()
            mine = np.zeros(shape, bool)
            mine[g, row] = batch["segment_ids"][g, row] == batch["segment_ids"][g, row, start]
            changed = run(dict(batch, tokens=np.where(mine, elsewhere, (elsewhere + 3) % 32)))[1]
            np.testing.assert_array_equal(changed[g, slot], states[g, slot])


def test_fed_vectors_follow_the_queries():
    """With `fed_vectors` what comes after a picture sees its vectors, and its own queries do not."""
    config = dataclasses.replace(FLOW, fed_vectors=True)
    layout = dataclasses.replace(tiny.LAYOUT, draw_vectors=config.draw_positions, read_slots=0)
    assert config.draw_positions == 2 * m
    batch = tiny.batch(tiny.pack([[tiny.TWO]], layout))
    params, model = make(Pisces(config)), GivenVectors(config)
    batch["draw_images"] = np.random.default_rng(0).standard_normal((1, 3, m, 16)).astype(np.float32)
    run = jax.jit(lambda b: model.apply({"params": params}, b)[:2])
    hidden, states = jax.device_get(run(batch))
    changed = dict(batch, draw_images=batch["draw_images"].copy())
    changed["draw_images"][0, 0] += 1
    new_hidden, new_states = jax.device_get(run(changed))
    first = batch["draw_start"][0, 0] + m
    different = (new_hidden != hidden).any(-1)[0]
    length = (batch["segment_ids"][0, 0] > 0).sum()
    np.testing.assert_array_equal(
        different, (np.arange(tiny.LAYOUT.length) >= first) & (np.arange(len(different)) < length)
    )
    np.testing.assert_array_equal(new_states[0, 0], states[0, 0])
    assert (new_states[0, 1] != states[0, 1]).any(-1).all()


def test_the_loss_is_flow_matching_of_the_standardised_map(params):
    """From states and features to the loss in numpy, with the noise and times that were drawn; packed or alone."""
    config = dataclasses.replace(FLOW, standardise=True)
    rng = np.random.default_rng(0)
    mean, std = rng.standard_normal(16), rng.uniform(0.5, 2.0, 16)
    every = {**params, "feature_statistics": {"mean": jnp.float32(mean), "std": jnp.float32(std)}}
    model, batch = (
        Pisces(config),
        tiny.batch(*(tiny.pack(rows, idle=5) for rows in [[[tiny.EDIT, tiny.DRAW]], [[tiny.TWO]]])),
    )
    batch["draw_id"] = rng.integers(0, 2**32, batch["draw_id"].shape, np.uint64).astype(np.uint32)
    caught = []

    class Spy(Pisces):
        def generate(self, x, t, states, keep):
            caught.append((x, t, states, keep))
            return super().generate(x, t, states, keep)

    program = UnifiedProgram(
        Spy(config), {"text": 0.0, "vectors": 1.0}, 0, ("a",), flow=FlowConfig(drop=0.3), flow_samples=3
    )
    losses, _ = program.losses(every, batch, jax.random.key(0))
    ((x, t, given, keep),) = jax.device_get(caught)
    _, states, target = jax.device_get(model.apply({"params": every}, batch))
    data = np.repeat(((target.reshape(-1, m, 16) - mean) / std).reshape(-1, 2, 2, 16), 3, 0)
    np.testing.assert_array_equal(given, np.repeat(states.reshape(-1, m, 32), 3, 0))
    left = 1 - np.asarray(t)[:, None, None, None]
    noise = (np.asarray(x) - (1 - left) * data) / left
    assert 0.8 < noise.std() < 1.2 and len(np.unique(t)) == len(t)
    out = model.apply({"params": every}, x, t, given, keep, method="generate")
    errors = np.mean((np.asarray(out) - (data - noise)) ** 2, axis=(1, 2, 3)).reshape(-1, 3).mean(1)
    valid = batch["draw_valid"].reshape(-1)
    assert float(losses["vectors"].count) == valid.sum() == program.counts(batch)["vectors"] == 4
    assert float(losses["vectors"].compute()) == pytest.approx(errors[valid].mean(), rel=1e-4)

    one = UnifiedProgram(model, {"text": 1.0, "vectors": 1.0}, 0, ("a",))
    together = tiny.batch(tiny.pack([[tiny.EDIT, tiny.DRAW]], idle=2))
    alone = [tiny.batch(tiny.pack([[e]])) for e in (tiny.EDIT, tiny.DRAW)]
    run = jax.jit(lambda b: one.losses(every, b, jax.random.key(0))[0]["vectors"].total)
    assert float(run(together)) == pytest.approx(sum(float(run(b)) for b in alone), rel=1e-5)


# --- drawing


def prompts(rows, width=6):
    tokens = np.zeros((len(rows), width), np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    none = np.zeros(0, np.int32)
    pool = Pool(jnp.zeros((0, 8, 8, 3), jnp.uint8), none, none, np.zeros(0, bool))
    return Prompts(jnp.asarray(tokens), jnp.asarray([len(r) for r in rows]), pool, pool)


@pytest.mark.parametrize("fed", [False, True])
def test_a_rollout_conditions_on_the_states_of_training(fed):
    """The vectors of each row are those of its own prompt and key: from the states of a whole row in training, whatever
    rows are beside it; another key, another picture."""
    config = dataclasses.replace(FLOW, fed_vectors=fed, standardise=True)
    model = Pisces(config)
    params = make(model)
    flow = FlowConfig(steps=3, guidance=2.0)
    rollout = Rollout(model)

    @jax.jit
    def draw(given, keys):
        rows, vectors = rollout.draw_vectors(params, rollout.prefill(params, given, 24), L.begin_image, keys, flow)
        return rows.length, rows.hidden, vectors

    rows = [[L.bos, 7, 8, 9], [L.bos, 14]]
    keys = jax.vmap(jax.random.key)(jnp.arange(2))
    length, hidden, vectors = draw(prompts(rows), keys)
    assert list(length) == [len(r) + 1 + config.draw_positions for r in rows]
    layout = dataclasses.replace(tiny.LAYOUT, draw_vectors=config.draw_positions)
    for b, row in enumerate(rows):
        batch = tiny.batch(tiny.pack([[]], dataclasses.replace(layout, rows=1, draw_slots=1, read_slots=0)))
        whole = [*row, L.begin_image, *[L.image] * config.draw_positions]
        batch["tokens"][0, 0, : len(whole)], batch["segment_ids"][0, 0, : len(whole)] = whole, 1
        batch["positions"][0, 0] = np.arange(layout.length)
        batch["draw_start"][0, 0], batch["draw_valid"][0, 0] = len(row) + 1, True
        batch["draw_features"] = np.asarray(vectors)[b][None, None]
        states = model.apply({"params": params}, batch)[1][0]
        noise = jax.random.normal(keys[b], (2, 2, 16))[None]
        field = guided(lambda *a: model.apply({"params": params}, *a, method="generate"), states, flow)
        made = model.apply({"params": params}, integrate(field, noise, 3), method="from_data")
        np.testing.assert_allclose(vectors[b], made[0], rtol=2e-4, atol=2e-4)
        last = model.apply({"params": params}, batch)[0][0, len(whole) - 1]
        np.testing.assert_allclose(hidden[b], last, rtol=2e-4, atol=2e-4)
    other = draw(prompts([rows[1], [L.bos, 3, 3, 3, 3]]), keys[::-1])[2]
    np.testing.assert_allclose(other[0], vectors[1], rtol=1e-5, atol=1e-6)
    again = draw(prompts(rows), jax.vmap(jax.random.key)(jnp.array([0, 5])))[2]
    np.testing.assert_array_equal(again[0], vectors[0])
    assert np.abs(again[1] - vectors[1]).max() > 1e-2


DENOISER = DenoiserConfig(channels=16, condition_width=32, width=16, layers=2)
DENOISED = dataclasses.replace(tiny.PISCES, denoiser=DENOISER, vector_head_hidden=0, standardise=True)
PISCES = {"regression": tiny.PISCES, "flow": FLOW, "denoiser": DENOISED}


@pytest.mark.parametrize("fed", [False, True])
@pytest.mark.parametrize("head", PISCES)
def test_a_picture_drawn_before_stands_in_a_prompt_as_in_training(head, fed):
    """Two drawn pictures and one read in one conversation: its state after prefill is that of the packed row."""
    config = dataclasses.replace(PISCES[head], fed_vectors=fed)
    model = Pisces(config)
    params = make(model)
    parts = (*tiny.EDIT.parts, Text("n"), tiny.picture("draw", 5), Text("op"))
    layout = dataclasses.replace(tiny.LAYOUT, draw_vectors=config.draw_positions, length=40)
    laid = lay_out(Example(parts, "chat"), L(), layout, prompt=True)
    assert [p.role for p in laid.pictures] == ["read", "draw", "draw"]

    def pool(role):
        own = [p for p in laid.pictures if p.role == role]
        images = np.stack([p.picture.array() for p in own])
        n, start = len(own), np.array([p.start for p in own], np.int32)
        return Pool(*map(jnp.asarray, (images, np.full(n, 1, np.int32), start, np.ones(n, bool))))

    tokens = np.zeros((2, 40), np.int32)
    tokens[0, :3], tokens[1, : len(laid.tokens)] = [L.bos, 7, 8], laid.tokens
    given = Prompts(jnp.asarray(tokens), jnp.asarray([3, len(laid.tokens)]), pool("read"), pool("draw"))
    rows = jax.jit(lambda p, g: Rollout(model).prefill(p, g, 48))(params, given)
    packed = tiny.batch(tiny.pack([[Example(parts, "chat")]], layout))
    hidden = jax.jit(lambda p, b: model.apply({"params": p}, b)[0])(params, packed)
    np.testing.assert_allclose(rows.hidden[1], hidden[0, len(laid.tokens) - 1], rtol=1e-4, atol=1e-5)
    other = dataclasses.replace(given.drawn, images=255 - given.drawn.images)
    changed = jax.jit(lambda p, g: Rollout(model).prefill(p, g, 48))(params, given.replace(drawn=other))
    assert np.allclose(changed.hidden[1], rows.hidden[1], rtol=1e-4, atol=1e-5) != fed


# --- training orders


def test_sequential_training_leaves_the_language_model_as_it_is(tmp_path):
    """Frozen language model: queries and generator train, and every frozen number is the same bit for bit."""
    frozen = ("(language_model|understanding_.*|generation_encoder)/.*", 0.0, 0.0)
    config = flow_config(
        model=dict(standardise=True), loss=dict(text=0.0), steps=10, batch_size=2,
        optimizer=dict(param_groups=(frozen, (".*", 1.0, 0.0)), learning_rate=1e-2),
    )  # fmt: skip
    config.data.update(row_length=32, rows_per_pool=2, read_slots=3, draw_slots=3)
    program = make_program(config, L.vocab_size)
    trainer = make_trainer(program, config, make_mesh(devices=jax.devices()[:1]))
    assert set(trainer.abstract.trained) == {"queries", "generator"}
    assert set(trainer.abstract.frozen) >= {"language_model", "feature_statistics"}
    state = trainer.init(jax.random.key(0))
    before = jax.device_get((state.trained, state.frozen))
    batch = tiny.batch(tiny.pack([[tiny.EDIT, tiny.DRAW], [tiny.CHAT, tiny.CAPTION]]))
    measured = program.measure(state.frozen, [batch])["feature_statistics"]
    features = apply(program.model, state.frozen, batch["draw_images"][0][batch["draw_valid"][0]], method="features")
    np.testing.assert_allclose(measured["mean"], np.asarray(features).mean((0, 1)), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(measured["std"], np.asarray(features).std((0, 1)), rtol=1e-4)
    step = trainer.train_step()
    for _ in range(5):  # the generator starts as zero: what it is conditioned on matters after some steps
        state, metrics = step(state, trainer.put(batch))
    jax.tree.map(np.testing.assert_array_equal, before[1], jax.device_get(state.frozen))
    for part, tree in jax.device_get(state.trained).items():
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (tree, before[0][part])), strict=True)), part
    assert metrics["vectors"].compute() > 0

    # What the run measured is saved with what it trains, and comes back.
    measured = {part: jax.tree.map(lambda x: x + 1.5, state.frozen[part]) for part in program.measured}
    checkpoints = Checkpoints(tmp_path, 1, program.measured)
    checkpoints.save(5, dataclasses.replace(state, frozen={**state.frozen, **measured}), {"next_batch": 3})
    checkpoints.close()
    restored, position = Checkpoints(tmp_path, 1, program.measured).restore(trainer.init(jax.random.key(0)))
    assert position == {"next_batch": 3}
    jax.tree.map(np.testing.assert_array_equal, restored.frozen["feature_statistics"], measured["feature_statistics"])
    jax.tree.map(np.testing.assert_array_equal, restored.frozen["language_model"], before[1]["language_model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(vector_flow=dict(guidance=3.0, drop=0.0)), "train with .*drop > 0"),
        (
            dict(model=dict(generator=dict(width=16, layers=1, heads=2, mlp_hidden=24, size=4))),
            "generator.size follows",
        ),
        (dict(model=dict(hidden=dict(projector=24, vector_head=24))), "hidden.vector_head is of regression"),
        (dict(loss=dict(vector_error="l1")), "vector_error: 'l1' is none of mse, cosine"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        make_program(flow_config(**changes), L.vocab_size)


def test_a_map_that_is_no_square_is_refused():
    config = flow_config()
    config.model.pool = 1
    config.model.generation_encoder.update(image_size=16, patch_size=4)
    settings.pisces_config(config, 32)
    config.model.generation_encoder.image_size = 12  # nine vectors of a picture: three by three
    assert settings.pisces_config(config, 32).generator.size == 3
    config.model.pool = 2
    with pytest.raises(UserError):
        make_program(config, L.vocab_size)


def test_a_model_may_draw_and_read_no_pictures():
    """BLIP3-o's generation alone: the losses are those of a model that could read, on rows with nothing to read."""
    layout = dataclasses.replace(tiny.LAYOUT, read_slots=0)
    batch = tiny.batch(tiny.pack([[tiny.DRAW, tiny.TWO]], layout))
    reads, draws = flow_config(), flow_config()
    del draws.model.understanding_encoder, draws.model.hidden
    both, alone = (make_program(c, L.vocab_size) for c in (reads, draws))
    assert set(both.parts(reads)) - set(alone.parts(draws)) == {"understanding_encoder", "understanding_projector"}
    params = nn.unbox(jax.jit(both.init)(jax.random.key(0)))
    losses = []
    for program, config in ((both, reads), (alone, draws)):
        run = jax.jit(lambda p, b, program=program: program.losses(p, b, jax.random.key(0))[0])
        found = run({name: params[name] for name in program.parts(config)}, batch)
        losses.append({name: float(loss.compute()) for name, loss in found.items()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and losses[0]["vectors"] > 0
    assert set(nn.unbox(jax.eval_shape(alone.init, jax.random.key(0)))) == set(alone.parts(draws))
    spec = alone.batch_spec(draws)
    assert spec["read_images"].shape[1:3] == (0, 0)
    jax.eval_shape(alone.losses, {n: params[n] for n in alone.parts(draws)}, spec, jax.random.key(0))
    assert "understanding_encoder" not in alone.forward_flops(spec)


def test_forward_is_the_same_with_regression(params):
    """The heads differ in what is put at the drawn positions and in what is read there, and in nothing before them."""
    batch = given_batch()
    regression = GivenVectors(tiny.PISCES)
    ours = make(Pisces(tiny.PISCES))
    shared = {k: params[k] for k in ("language_model", "understanding_projector", "understanding_encoder")}
    hidden, _, _ = forward(regression, {**ours, **shared}, batch)
    flow, _, _ = GivenVectors(FLOW).apply({"params": params}, batch)
    shape = batch["tokens"].shape
    hidden, flow = (np.asarray(x).reshape(*shape, -1) for x in (hidden, flow))
    drawn = np.zeros(shape, bool)  # from a segment's first drawn picture on
    for role, g, _, row, start in pictures(batch):
        if role == "draw":
            segment = batch["segment_ids"][g, row]
            drawn[g, row] |= (segment == segment[start]) & (np.arange(shape[-1]) >= start)
    np.testing.assert_array_equal(flow[~drawn], hidden[~drawn])
    assert (flow[drawn] != hidden[drawn]).any(-1).all()
