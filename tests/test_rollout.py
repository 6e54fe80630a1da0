"""Rollouts with the cache against the slow, obvious way: the whole sequence again for every token and vector."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny
from flax import linen as nn

from pisces_jax.data.example import Text
from pisces_jax.inference.model import Model
from pisces_jax.inference.rollout import Pool, Prompts, Rollout, Rows
from pisces_jax.inference.sampling import Choices, TextSampling
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
    return tiny.random_params(model)


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

    @functools.partial(jax.jit, static_argnames=("stop", "steps"))
    def run(prompts, keys, allowed, how, stop, steps):
        rows = rollout.prefill(params, prompts, SLOTS)
        rows, tokens = rollout.sample_text(params, rows, keys, how, steps=steps, stop=stop, allowed=allowed)
        return tokens, rollout.draw_vectors(params, rows, L.begin_image, keys, FlowConfig())[1]

    def call(rows, allowed, seeds=None, stop=(), max_tokens=MOST, **how):
        keys = jax.vmap(jax.random.key)(jnp.asarray(seeds or range(len(rows))))
        how = Choices.of([TextSampling(max_tokens, **how)] * len(rows))
        return jax.device_get(run(prompts(rows), keys, jnp.asarray(allowed), how, stop, max_tokens))

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


# --- many rows, each for itself


def start(model, params, rows, slots=SLOTS, **how):
    return jax.jit(lambda given: Rollout(model).prefill(params, given, slots, **how))(prompts(rows))


def writer(model, params, steps, stop=()):
    rollout, allowed = Rollout(model), jnp.ones(L.vocab_size, bool)

    @functools.partial(jax.jit, donate_argnums=0)
    def write(rows, keys, how):
        return rollout.sample_text(params, rows, keys, how, steps=steps, stop=stop, allowed=allowed)

    return write


DIFFERENT = [
    TextSampling(9, t, top_k=k, repetition_penalty=p) for t, k, p in ((0, 0, 2), (1, 3, 1), (2, 0, 1), (0, 0, 1))
]
KEYS = jax.random.split(jax.random.key(3), 4)


def test_prompts_in_chunks_equal_whole_ones(model, params):
    rows = [([L.bos, *range(7, 7 + n)], None, None) for n in (3, 9, 14, 15)] + [ROWS[1]]
    whole, parts = (
        jax.jit(lambda given, chunk=chunk: Rollout(model).prefill(params, given, SLOTS, chunk))(prompts(rows, 16))
        for chunk in (16, 4)
    )
    np.testing.assert_allclose(parts.hidden, whole.hidden, rtol=1e-5, atol=1e-5)
    for b, length in enumerate(whole.length):
        np.testing.assert_allclose(parts.cache.k[:, b, :length], whole.cache.k[:, b, :length], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(parts.seen, whole.seen)


def test_a_text_in_pieces_is_the_text_at_once(model, params):
    how = Choices.of(DIFFERENT)
    _, whole = writer(model, params, 12)(start(model, params, ROWS), KEYS, how)
    rows, pieces, write = start(model, params, ROWS), [], writer(model, params, 4)
    for _ in range(3):
        rows, tokens = write(rows, KEYS, how)
        pieces.append(tokens)
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)
    assert (np.asarray(whole)[:, :9] >= 0).all() and (np.asarray(whole)[:, 9:] == -1).all() and not rows.going.any()


def test_a_row_that_joins_a_running_batch_gets_what_it_gets_alone(model, params):
    """It takes the place of a row that has ended, while others are in the middle of theirs."""
    how = [DIFFERENT[0], None, DIFFERENT[2], None]
    write = writer(model, params, 3)
    rows, first = write(start(model, params, ROWS), KEYS, Choices.of(how))
    how[1] = DIFFERENT[1]
    rows = jax.jit(Rows.put, donate_argnums=0)(rows, jnp.int32(1), start(model, params, [ROWS[3]]))
    keys, pieces = KEYS.at[1].set(jax.random.key(8)), []
    for _ in range(3):
        rows, tokens = write(rows, keys, Choices.of(how))
        pieces.append(np.asarray(tokens))
    joined = np.concatenate(pieces, axis=1)[1]
    _, alone = writer(model, params, 9)(
        start(model, params, [ROWS[3]]), jnp.stack([jax.random.key(8)]), Choices.of([DIFFERENT[1]])
    )
    np.testing.assert_array_equal(joined, alone[0])
    _, others = writer(model, params, 9)(start(model, params, ROWS), KEYS, Choices.of(DIFFERENT))
    for b in (0, 2):
        np.testing.assert_array_equal(np.concatenate([first[b], *[p[b] for p in pieces]])[:9], others[b])


def test_writing_ends_with_the_last_row(model, params):
    """`steps` bounds it; what it costs are the steps of the longest text."""
    steps = []

    class Counting(Rollout):
        def advance(self, *args):
            jax.debug.callback(lambda: steps.append(1))
            return super().advance(*args)

    how = Choices.of([TextSampling(n) if n else None for n in (2, 5, 0, 3)])
    everything = jnp.ones(L.vocab_size, bool)
    run = jax.jit(
        lambda rows: Counting(model).sample_text(params, rows, KEYS, how, steps=1000, stop=(), allowed=everything)
    )
    rows, tokens = run(start(model, params, ROWS))
    jax.effects_barrier()
    assert len(steps) == 5
    np.testing.assert_array_equal((np.asarray(tokens) >= 0).sum(axis=1), [2, 5, 0, 3])
    np.testing.assert_array_equal(rows.written, [2, 5, 0, 3])


@pytest.mark.parametrize("unroll", [False, True])
def test_the_cache_is_updated_in_place(model, unroll):
    """The compiled program writes into the memory that it is given, and no instruction makes a second cache."""
    c = model.config
    deep = Pisces(dataclasses.replace(c, language_model=dataclasses.replace(c.language_model, layers=4, unroll=unroll)))
    inputs = jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(lambda: nn.unbox(deep.init(jax.random.key(0), *inputs, method="init_all"))["params"])
    rows = jax.eval_shape(lambda p, given: Rollout(deep).prefill(p, given, 4096), shapes, prompts(ROWS))

    def write(params, rows, keys, how):
        return Rollout(deep).sample_text(params, rows, keys, how, steps=8, stop=(), allowed=jnp.ones(32, bool))

    compiled = jax.jit(write, donate_argnums=1).lower(shapes, rows, KEYS, Choices.of(DIFFERENT)).compile()
    memory, cache = compiled.memory_analysis(), 2 * rows.cache.k.size * 4
    assert memory.alias_size_in_bytes >= cache
    assert memory.temp_size_in_bytes < cache / 2  # some of one layer's keys and values, not those of all four
    shape = "f32[{}]".format(",".join(map(str, rows.cache.k.shape)))
    whole = [line for line in compiled.as_text().splitlines() if f"= {shape}" in line]
    assert whole and not [line for line in whole if re.search(r" copy(-start)?\(", line)]


def test_answers_stop_at_texts_and_have_seeds_of_their_own(ready):
    asked = questions(3)
    free = ready(2).answer(asked, max_tokens=70)
    stop = free[0][3:5]
    stopped = ready(2).answer(asked, max_tokens=70, stop=(stop,))
    assert stopped == [text.partition(stop)[0] for text in free] and stopped[0] != free[0]
    drawn = ready(2).answer(asked, max_tokens=8, temperature=3.0, seeds=[5, 6, 7])
    assert ready(8).answer(asked[1:], max_tokens=8, temperature=3.0, seeds=[6, 7]) == drawn[1:]
    assert ready(2).answer(asked, max_tokens=8, temperature=3.0, seeds=[8, 6, 7])[0] != drawn[0]
    assert ready(2).answer(asked, max_tokens=8, temperature=3.0, top_k=1) == ready(2).answer(asked, max_tokens=8)
