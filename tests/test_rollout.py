"""Rollouts with the cache against the slow, obvious way: the whole sequence again for every token and vector."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny
from flax import linen as nn

from pisces_jax.data.example import Text
from pisces_jax.inference.model import Model
from pisces_jax.inference.rollout import Pool, Prompts, Rollout
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.pisces import Pisces
from pisces_jax.training import config as settings

MOST, SLOTS = 5, 32
L = tiny.Letters


@pytest.fixture(scope="module")
def config():
    return tiny.config(
        program="unified", model=tiny.model_settings(), data=dict(row_length=64), compute_dtype="float32"
    )


@pytest.fixture(scope="module")
def model(config):
    return Pisces(settings.pisces_config(config, L.vocab_size))


@pytest.fixture(scope="module")
def params(model):
    inputs = jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 4), jnp.int32)
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), *inputs, method="init_all"))
    p = plain.randomised(nn.unbox(init)["params"], seed=2, sharpen=("query", "key"))
    p["language_model"]["head"] *= 4  # so that the greedy choice is far from a tie
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)


@pytest.fixture(scope="module")
def apply(model, params):
    @functools.cache
    def compiled(method):
        return jax.jit(lambda *args: model.apply({"params": params}, *args, method=method))

    return lambda *args, method: compiled(method)(*args)


PICTURES = np.random.default_rng(5).integers(0, 256, (4, 8, 8, 3)).astype(np.uint8)
ROWS = [  # (tokens, the picture that it reads, where)
    ([L.bos, 7, 8, 9], None, None),
    ([L.bos, L.image, L.image, L.image, L.image, 10, 11, 12, 13], 0, 1),
    ([L.bos, 14], None, None),
    ([L.bos, 15, 16, L.image, L.image, L.image, L.image, 17], 2, 3),
]


NONE = jnp.zeros(0, jnp.int32)
NO_PICTURES = Pool(jnp.zeros((0, 8, 8, 3), jnp.uint8), NONE, NONE, jnp.zeros(0, bool))


def prompts(rows, length=10):
    tokens = np.zeros((len(rows), length), np.int32)
    lengths, images, row, start, valid = [], [], [], [], []
    for b, (ids, picture, at) in enumerate(rows):
        tokens[b, : len(ids)] = ids
        lengths.append(len(ids))
        images.append(PICTURES[picture or 0])
        row.append(b)
        start.append(at or 0)
        valid.append(picture is not None)
    pool = Pool(*map(jnp.asarray, (np.stack(images), np.int32(row), np.int32(start), np.array(valid))))
    return Prompts(jnp.asarray(tokens), jnp.asarray(lengths), pool, NO_PICTURES)


def inputs_of(apply, row):
    """The language model's inputs for one prompt, [T, D]."""
    ids, picture, at = row
    x = np.array(apply(jnp.asarray([ids]), method="embed"))[0]
    if picture is not None:
        x[at : at + 4] = apply(PICTURES[picture : picture + 1], method="read")[0]
    return x


def last_state(apply, x):
    """The state after the sequence x, from nothing. Rows are filled up to one length: what is behind is not seen."""
    padded = np.zeros((1, SLOTS, x.shape[1]), np.float32)
    padded[0, : len(x)] = x
    return apply(padded, np.arange(SLOTS)[None], method="run")[0][:, len(x) - 1]


def slow_text(apply, row, allowed, stop, max_tokens=MOST):
    x, tokens = inputs_of(apply, row), []
    while len(tokens) < max_tokens:
        logits = np.array(apply(last_state(apply, x)[:, None], method="logits"))[0, 0]
        token = int(np.argmax(np.where(allowed, logits, -np.inf)))
        if token in stop:
            break
        tokens.append(token)
        x = np.concatenate([x, np.asarray(apply(jnp.asarray([[token]]), method="embed"))[0]])
    return x, tokens


def slow_vectors(apply, x, m=4):
    vectors = []
    x = np.concatenate([x, np.asarray(apply(jnp.asarray([[L.begin_image]]), method="embed"))[0]])
    for i in range(m):
        vectors.append(np.asarray(apply(last_state(apply, x), method="predict"))[0])
        x = np.concatenate([x, np.asarray(apply(jnp.asarray(vectors[-1][None]), jnp.asarray([i]), method="feed"))])
    return np.stack(vectors)


@pytest.fixture(scope="module")
def fast(model, params):
    """Text, then a picture: jitted once for each choice of settings."""
    rollout = Rollout(model)

    @functools.partial(jax.jit, static_argnames=("temperature", "stop", "max_tokens"))
    def run(prompts, keys, allowed, temperature=0.0, stop=(), max_tokens=MOST):
        rows = rollout.prefill(params, prompts, SLOTS)
        rows, tokens = rollout.sample_text(
            params, rows, keys, max_tokens=max_tokens, temperature=temperature, stop=stop, allowed=allowed
        )
        return tokens, rollout.draw_vectors(params, rows, L.begin_image, keys, FlowConfig())[1]

    def call(rows, allowed, seeds=None, **kwargs):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds or range(len(rows))))
        return jax.device_get(run(prompts(rows), keys, jnp.asarray(allowed), **kwargs))

    return call


def everything():
    return np.ones(L.vocab_size, bool)


def ends(row):
    """Tokens of a row without the -1 behind their end."""
    tokens = [int(t) for t in row if t >= 0]
    assert list(row) == tokens + [-1] * (len(row) - len(tokens))
    return tokens


def test_cached_rollout_equals_the_slow_one(apply, fast):
    """Rows of four lengths; each stops where it does, and draws from there."""
    free = [slow_text(apply, row, everything(), ())[1] for row in ROWS]
    # Two tokens that end some rows early, at different places, and others not at all.
    stop = (free[0][1], free[3][3])
    tokens, vectors = fast(ROWS, everything(), stop=stop)
    lengths = set()
    for b, row in enumerate(ROWS):
        x, expected = slow_text(apply, row, everything(), stop)
        assert ends(tokens[b]) == expected
        lengths.add(len(expected))
        np.testing.assert_allclose(vectors[b], slow_vectors(apply, x), rtol=2e-4, atol=2e-5)
    assert len(lengths) > 1
    # Rows differ, and vectors within a row do: the comparison can fail.
    assert np.abs(vectors[0] - vectors[2]).max() > 1e-2 and np.abs(np.diff(vectors, axis=1)).max() > 1e-2


def test_drawing_at_once_equals_the_slow_one(apply, fast):
    tokens, vectors = fast(ROWS, everything(), stop=tuple(range(L.vocab_size)))
    assert (tokens == -1).all()
    for b, row in enumerate(ROWS):
        np.testing.assert_allclose(vectors[b], slow_vectors(apply, inputs_of(apply, row)), rtol=2e-4, atol=2e-5)


def test_without_fed_vectors_a_rollout_gives_what_training_predicts(model):
    """Whatever true vectors a training row holds, the model predicts for it what its own rollout does."""
    queried = Pisces(dataclasses.replace(model.config, place_embedding=True, fed_vectors=False))
    inputs = jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 4), jnp.int32)
    init = jax.eval_shape(lambda: queried.init(jax.random.key(0), *inputs, method="init_all"))
    params = jax.tree.map(jnp.asarray, plain.randomised(nn.unbox(init)["params"], seed=4))
    ids = ROWS[0][0]
    row = np.array([*ids, L.begin_image, *[L.image] * 4, L.end_image], np.int32)
    features = np.random.default_rng(0).standard_normal((1, 1, 4, 16)).astype(np.float32)
    batch = dict(
        tokens=row[None, None],
        positions=np.arange(len(row))[None, None],
        segment_ids=np.ones((1, 1, len(row)), np.int32),
        read_images=np.zeros((1, 0, 8, 8, 3), np.uint8),
        read_row=np.zeros((1, 0), np.int32),
        read_start=np.zeros((1, 0), np.int32),
        read_valid=np.zeros((1, 0), bool),
        draw_features=features,
        draw_row=np.zeros((1, 1), np.int32),
        draw_start=np.full((1, 1), len(ids) + 1, np.int32),
        draw_valid=np.ones((1, 1), bool),
    )
    _, states, _ = queried.apply({"params": params}, batch)
    predicted = queried.apply({"params": params}, states, method="predict")
    rollout = Rollout(queried)
    rows = rollout.prefill(params, prompts([ROWS[0]]), SLOTS)
    _, vectors = rollout.draw_vectors(params, rows, L.begin_image, jax.random.split(jax.random.key(0), 1), FlowConfig())
    np.testing.assert_allclose(vectors[0], predicted[0, 0], rtol=2e-4, atol=2e-5)


def test_tokens_that_are_not_allowed_never_come(apply, fast):
    first = slow_text(apply, ROWS[0], everything(), (), 1)[1][0]
    allowed = everything()
    allowed[first] = False
    tokens, _ = fast(ROWS, allowed, stop=())
    assert first not in tokens
    assert ends(tokens[0]) == slow_text(apply, ROWS[0], allowed, ())[1]
    tokens, _ = fast(ROWS, allowed, temperature=5.0, stop=())
    assert first not in tokens and (tokens >= 0).all()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_beside_a_row_do_not_change_it(fast, temperature):
    """Row 1 with other rows around it, at another place, with its own key."""
    tokens, vectors = fast(ROWS, everything(), seeds=[0, 1, 2, 3], temperature=temperature, stop=(9,))
    others = [ROWS[1], ([L.bos, 20, 21, 22, 23, 24, 25], None, None), ROWS[0], ROWS[2]]
    moved = fast(others, everything(), seeds=[1, 77, 0, 5], temperature=temperature, stop=(9,))
    for here, there in ((1, 0), (0, 2)):
        np.testing.assert_array_equal(moved[0][there], tokens[here])
        np.testing.assert_allclose(moved[1][there], vectors[here], rtol=1e-5, atol=1e-6)
    if temperature:
        again = fast(ROWS, everything(), seeds=[9, 8, 7, 6], temperature=temperature, stop=(9,))
        assert (again[0] != tokens).any()


def test_sampling_follows_the_softmax(apply, fast):
    """The first token of 400 draws of one prompt, against the probabilities that the logits give."""
    rows, counts = [ROWS[0]] * 4, np.zeros(L.vocab_size)
    for i in range(100):
        tokens, _ = fast(rows, everything(), seeds=range(4 * i, 4 * i + 4), temperature=8.0, stop=(), max_tokens=1)
        np.add.at(counts, tokens[:, 0], 1)
    logits = np.asarray(apply(last_state(apply, inputs_of(apply, ROWS[0]))[:, None], method="logits"), np.float64)
    expected = np.exp(logits[0, 0] / 8.0) / np.exp(logits[0, 0] / 8.0).sum()
    sigma = np.sqrt(400 * expected * (1 - expected))
    assert (np.abs(counts - 400 * expected) < 5 * sigma + 1).all()
    assert expected.max() > 3 / L.vocab_size  # it is not flat


# --- the model as commands use it


@pytest.fixture(scope="module")
def ready(config, params):
    return lambda batch_size, params=params: Model(config, L(), params, None, None, None, batch_size=batch_size)


def questions(n):
    letters = "abcdefghijklmnopqrstuvwxyz"
    return [(Text(letters[i : i + 1 + i % 4]), *((tiny.picture("read", i),) if i % 2 else ())) for i in range(n)]


def test_answers_equal_the_slow_way_in_any_batches(apply, ready):
    asked = questions(5)
    plain_tokens = np.ones(L.vocab_size, bool)
    plain_tokens[[L.pad, L.bos, L.begin_image, L.end_image, L.image]] = False
    in_twos, in_eights = (ready(size).answer(asked, max_tokens=6) for size in (2, 8))
    for i, parts in enumerate(asked):
        ids, at = [L.bos, *L().encode(parts[0].text)], None
        x = np.array(apply(jnp.asarray([ids]), method="embed"))[0]
        if i % 2:
            at = apply(parts[1].array()[None], method="read")[0]
            x = np.concatenate([x, at])
        tokens = []
        while len(tokens) < 6:
            logits = np.array(apply(last_state(apply, x)[:, None], method="logits"))[0, 0]
            token = int(np.argmax(np.where(plain_tokens, logits, -np.inf)))
            if token == L.eos:
                break
            tokens.append(token)
            x = np.concatenate([x, np.asarray(apply(jnp.asarray([[token]]), method="embed"))[0]])
        assert in_twos[i] == in_eights[i] == L().decode(tokens)
    assert any(in_twos)


def test_description_ends_where_the_picture_begins(apply, ready, params, monkeypatch):
    """The model writes until it wants [IMG], which no answer may hold; then it draws from there."""
    head = np.array(params["language_model"]["head"])
    allowed = np.ones(L.vocab_size, bool)
    allowed[[L.pad, L.bos, L.eos, L.end_image, L.image]] = False
    # Give [IMG] the row of a token that would come third.
    _, free = slow_text(apply, ROWS[0], allowed & (np.arange(32) != L.begin_image), (), 6)
    assert len(set(free[:3])) == 3 or free[2] not in free[:2]
    head[L.begin_image] = head[free[2]] * 1.001
    changed = {**params, "language_model": {**params["language_model"], "head": jnp.asarray(head)}}
    model = ready(2, changed)
    monkeypatch.setattr(model, "decode", lambda vectors, **_: np.zeros((len(vectors), 16, 16, 3), np.uint8))
    prompt = [(Text(L().decode(ROWS[0][0])),)]
    (drawing,) = model.draw(prompt, describe=True, max_tokens=6, temperature=0.0)
    assert drawing.description == L().decode(free[:2])
    x = inputs_of(apply, (ROWS[0][0] + free[:2], None, None))
    np.testing.assert_allclose(drawing.vectors, slow_vectors(apply, x), rtol=2e-4, atol=2e-5)
    (at_once,) = model.draw(prompt, describe=False)
    assert at_once.description == ""
    expected = slow_vectors(apply, inputs_of(apply, ROWS[0]))
    np.testing.assert_allclose(at_once.vectors, expected, rtol=2e-4, atol=2e-5)
