"""The losses against loops in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pisces_jax.losses import objectives
from pisces_jax.ops.cross_entropy import text_cross_entropy
from pisces_jax.sharding import make_mesh
from pisces_jax.training.metrics import merge


def cross_entropy_loop(hidden, matrix, targets):
    out = np.zeros(targets.shape)
    for b in range(out.shape[0]):
        for t in range(out.shape[1]):
            logits = [sum(h * m for h, m in zip(hidden[b, t], row, strict=True)) for row in matrix]
            out[b, t] = math.log(sum(math.exp(z) for z in logits)) - logits[targets[b, t]]
    return out


@pytest.fixture
def text():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 12, 5)), rng.standard_normal((17, 5)), rng.integers(0, 17, (2, 12))


@pytest.mark.parametrize("chunk", [0, 1, 3, 17])
def test_cross_entropy_equals_the_loop(text, chunk):
    expected = cross_entropy_loop(*text)
    got = text_cross_entropy(*map(jnp.asarray, text), chunk=chunk)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
    with jax.enable_x64(True):
        got = text_cross_entropy(*map(jnp.asarray, text), chunk=chunk)
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_cross_entropy_in_chunks_has_the_same_gradients(text):
    hidden, matrix, targets = text
    weights = np.random.default_rng(1).standard_normal(targets.shape)

    def gradients(chunk):
        def loss(h, m):
            return (weights * text_cross_entropy(h, m, jnp.asarray(targets), chunk=chunk)).sum()

        return jax.jit(jax.grad(loss, argnums=(0, 1)))(jnp.asarray(hidden), jnp.asarray(matrix))

    with jax.enable_x64(True):
        whole = gradients(0)
        for chunk in (1, 4, 17):
            for a, b in zip(gradients(chunk), whole, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)
        # d/dlogit = softmax - one-hot, summed into the matrix.
        logits = np.einsum("btd,vd->btv", hidden, matrix)
        softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        by_hand = np.einsum("bt,btv,btd->vd", weights, softmax - np.eye(17)[targets], hidden)
        np.testing.assert_allclose(whole[1], by_hand, rtol=1e-10, atol=1e-12)


def test_cross_entropy_holds_no_more_logits_than_a_chunk():
    """Temporaries of the compiled gradient for 64 positions: 4096 logits each, or 256 each."""

    def temporaries(chunk):
        def loss(h, m):
            return text_cross_entropy(h, m, jnp.zeros((1, 64), jnp.int32), chunk=chunk).sum()

        shapes = jax.ShapeDtypeStruct((1, 64, 8), jnp.float32), jax.ShapeDtypeStruct((4096, 8), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    assert temporaries(0) > 64 * 4096 * 4
    assert temporaries(256) < 64 * 4096 * 4 / 2


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=4), dict(data=2, fsdp=2, tensor=2)])
def test_cross_entropy_with_a_sharded_matrix(sizes):
    """Rows over the batch axes, vocabulary over tensor: loss and gradients as in NumPy; 2 of the rows are padding."""
    rng = np.random.default_rng(2)
    hidden, matrix = rng.standard_normal((8, 6, 16)), rng.standard_normal((32, 16))
    targets, weights = rng.integers(0, 30, (8, 6)), rng.standard_normal((8, 6))
    logits = np.einsum("btd,vd->btv", hidden, matrix[:30])
    softmax = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    errors = weights[..., None] * (softmax - np.eye(30)[targets])

    def loss(h, m):
        each = text_cross_entropy(h, m, jnp.asarray(targets), chunk=4, vocab_size=30)
        return (weights * each).sum(), each

    with jax.enable_x64(True), jax.set_mesh(make_mesh(**sizes)):
        gradient = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        (dh, dm), each = gradient(jnp.asarray(hidden), jnp.asarray(matrix))
        np.testing.assert_allclose(each, -np.log(np.take_along_axis(softmax, targets[..., None], 2))[..., 0], 1e-10)
        np.testing.assert_allclose(dh, errors @ matrix[:30], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(dm[:30], np.einsum("btv,btd->vd", errors, hidden), rtol=1e-9, atol=1e-12)
        np.testing.assert_array_equal(dm[30:], 0)


def test_targets_of_a_packed_row():
    """The target of each position is the next token of its own segment, if it is in the loss mask."""
    tokens = [[1, 7, 8, 2, 1, 9, 6, 2, 0, 0], [1, 5, 5, 5, 5, 5, 5, 5, 5, 2]]
    # The first tokens of segments are in the mask, but nothing may predict them.
    learn = [[0, 0, 1, 1, 1, 0, 1, 0, 1, 1], [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]]
    segments = [[1, 1, 1, 1, 2, 2, 2, 2, 0, 0], [1] * 10]
    counted = [[0, 1, 1, 0, 0, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 1, 0]]
    targets, counts = objectives.next_token_targets(jnp.array(tokens), jnp.array(learn, bool), jnp.array(segments))
    assert counts.astype(int).tolist() == counted
    assert targets[:, :-1].tolist() == [row[1:] for row in tokens]


def test_packed_text_loss_against_the_loop():
    """Everything together: the mean over the masked tokens of all rows, each predicted within its segment."""
    rng = np.random.default_rng(3)
    B, T, D, V = 3, 14, 4, 11
    hidden, matrix = rng.standard_normal((B, T, D)), rng.standard_normal((V, D))
    tokens, learn = rng.integers(0, V, (B, T)), rng.random((B, T)) < 0.5
    segments = np.array([[1] * 5 + [2] * 6 + [0] * 3, [1] * 14, [1] * 2 + [2] * 4 + [3] * 8])
    total, count = 0.0, 0
    for b in range(B):
        for t in range(1, T):
            if learn[b, t] and segments[b, t] == segments[b, t - 1] and segments[b, t] > 0:
                logits = matrix @ hidden[b, t - 1]
                total += math.log(np.exp(logits).sum()) - logits[tokens[b, t]]
                count += 1
    targets, counts = objectives.next_token_targets(*map(jnp.asarray, (tokens, learn, segments)))
    losses = text_cross_entropy(jnp.asarray(hidden), jnp.asarray(matrix), targets)
    average = objectives.masked_average(losses, counts)
    assert float(average.count) == count
    np.testing.assert_allclose(float(average.compute()), total / count, rtol=1e-6)


def test_vector_error_is_the_mean_over_dimensions():
    rng = np.random.default_rng(0)
    predicted, target = rng.standard_normal((2, 3, 5)), rng.standard_normal((2, 3, 5))
    got = objectives.vector_error(jnp.asarray(predicted), jnp.asarray(target))
    for i in range(2):
        for j in range(3):
            expected = sum((predicted[i, j, c] - target[i, j, c]) ** 2 for c in range(5)) / 5
            np.testing.assert_allclose(got[i, j], expected, rtol=1e-5)
    # In float32 for any input: in bfloat16 this difference would be 0.
    one = jnp.ones((1, 4), jnp.bfloat16)
    assert float(objectives.vector_error(one, jnp.full((1, 4), 1 + 1e-3))[0]) == pytest.approx(1e-6, rel=1e-3)


def test_sigmoid_contrastive_equals_the_double_loop():
    rng = np.random.default_rng(0)
    B, E, log_scale, bias = 6, 4, 1.2, -1.5
    pictures, texts = rng.standard_normal((B, E)), rng.standard_normal((B, E))
    valid = np.array([1, 1, 0, 1, 0, 1], bool)
    names = ["cat", "dog", "cat", "cat", "ship", "truck"]
    same = np.array([[a == b for b in names] for a in names])
    expected = np.zeros(B)
    for i in range(B):
        for j in range(B):
            if valid[i] and valid[j]:
                z = 1 if names[i] == names[j] else -1
                logit = math.exp(log_scale) * float(pictures[i] @ texts[j]) + bias
                expected[i] -= math.log(1 / (1 + math.exp(-z * logit)))
    arguments = [jnp.asarray(a) for a in (pictures, texts, log_scale, bias)]
    got = objectives.sigmoid_contrastive(*arguments, jnp.asarray(valid), jnp.asarray(same))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    # The content of pairs that do not count makes no difference.
    pictures[2], texts[4] = 1e3, -1e3
    changed = jnp.asarray(pictures), jnp.asarray(texts), *arguments[2:]
    again = objectives.sigmoid_contrastive(*changed, jnp.asarray(valid), jnp.asarray(same))
    np.testing.assert_array_equal(again, got)
    everyone = objectives.sigmoid_contrastive(*arguments, jnp.ones(B, bool), jnp.asarray(same))
    assert (np.abs(np.asarray(everyone) - expected) > 1e-2).all()


def test_softmax_contrastive_equals_the_double_loop():
    rng = np.random.default_rng(0)
    B, E, log_scale = 6, 4, 0.7
    pictures, texts = rng.standard_normal((B, E)), rng.standard_normal((B, E))
    valid = np.array([1, 1, 0, 1, 0, 1], bool)
    names = ["cat", "dog", "cat", "cat", "ship", "truck"]
    same = np.array([[a == b for b in names] for a in names])
    expected = np.zeros(B)
    taking_part = np.flatnonzero(valid)
    for i in taking_part:
        right = [j for j in taking_part if names[i] == names[j]]
        for one, others in ((pictures[i], texts), (texts[i], pictures)):
            weight = {j: math.exp(math.exp(log_scale) * float(one @ others[j])) for j in taking_part}
            for j in right:
                expected[i] -= math.log(weight[j] / sum(weight.values())) / len(right) / 2
    arguments = [jnp.asarray(a) for a in (pictures, texts, log_scale)]
    got = objectives.softmax_contrastive(*arguments, jnp.asarray(valid), jnp.asarray(same))
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    pictures[2], texts[4] = 1e3, -1e3
    changed = jnp.asarray(pictures), jnp.asarray(texts), arguments[2]
    np.testing.assert_array_equal(objectives.softmax_contrastive(*changed, jnp.asarray(valid), jnp.asarray(same)), got)


def test_words_of_pictures_equals_the_loops():
    """For each picture, the sum goes over the tokens that any text of the batch contains."""
    rng = np.random.default_rng(0)
    B, N, V = 4, 3, 9
    scores = 2 * rng.standard_normal((B, N, V))
    tokens = np.array([[1, 3, 3, 2], [1, 4, 2, 0], [1, 5, 6, 2], [1, 3, 7, 2]])
    real = np.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]], bool)
    valid = np.array([1, 1, 0, 1], bool)
    texts = [{1, 2, 3}, {1, 2, 4}, set(), {1, 2, 3, 7}]  # the third does not count; 0 is padding
    expected = np.zeros(B)
    for i in range(B):
        for word in set().union(*texts):
            score = math.log(sum(math.exp(scores[i, n, word]) for n in range(N)) / N)
            there = 1 / (1 + math.exp(-score))
            expected[i] -= math.log(there if word in texts[i] else 1 - there)
    taking_part = np.flatnonzero(valid)
    arguments = [jnp.asarray(a) for a in (scores, tokens, real, valid)]
    got = objectives.words_of_pictures(*arguments)
    np.testing.assert_allclose(got[taking_part], expected[taking_part], rtol=1e-5)
    tokens[2], tokens[1, 3] = 8, 8
    changed = jnp.asarray(scores), jnp.asarray(tokens), *arguments[2:]
    np.testing.assert_array_equal(objectives.words_of_pictures(*changed)[taking_part], got[taking_part])


def test_masked_averages_are_normalised_over_everything():
    values, mask = np.arange(12.0), np.array([1] * 5 + [0] * 3 + [1] + [0] * 3, bool)
    parts = [{"loss": objectives.masked_average(*map(jnp.asarray, half))} for half in
             ((values[:6], mask[:6]), (values[6:], mask[6:]))]  # fmt: skip
    expected = (0 + 1 + 2 + 3 + 4 + 8) / 6  # the mean of the means of the parts would be (2 + 8) / 2
    assert merge(parts)["loss"] == pytest.approx(expected)


def test_masked_values_may_be_anything():
    values, mask = jnp.array([1.0, jnp.nan, jnp.inf, 3.0]), jnp.array([True, False, False, True])
    assert float(objectives.masked_average(values, mask).compute()) == 2.0
    gradient = jax.grad(lambda v: objectives.masked_average(v, mask).compute())(values)
    assert gradient.tolist() == [0.5, 0.0, 0.0, 0.5]


def test_averages_of_nothing_are_left_out():
    nothing = objectives.masked_average(jnp.ones(3), jnp.zeros(3, bool))
    assert float(nothing.count) == 0 and merge([{"a": nothing}]) == {}


def test_cross_entropy_leaves_out_the_rows_of_padding(text):
    """Equal to the loop over the real vocabulary, and padding gets no gradient."""
    hidden, matrix, targets = text
    padded = jnp.asarray(np.concatenate([matrix, 9.0 * np.ones((3, 5))]))

    def loss(matrix):
        return text_cross_entropy(jnp.asarray(hidden), matrix, jnp.asarray(targets), chunk=3, vocab_size=17)

    np.testing.assert_allclose(loss(padded), cross_entropy_loop(*text), rtol=2e-6, atol=2e-6)
    gradient = jax.grad(lambda m: loss(m).sum())(padded)
    assert not gradient[17:].any() and gradient[:17].all()
