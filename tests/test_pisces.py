"""The unified model over packed rows: no leak, the shift of the vector loss, packing, detached targets."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
import tiny

from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.losses import objectives
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.dit import DiT, DiTConfig
from pisces_jax.models.pisces import Pisces
from pisces_jax.models.vit import ViT
from pisces_jax.ops.cross_entropy import text_cross_entropy
from pisces_jax.training.metrics import merge
from pisces_jax.training.programs.reconstruction import Reconstruction
from pisces_jax.training.programs.unified import UnifiedProgram, text_targets

LAYOUT, n, m, T = tiny.LAYOUT, tiny.LAYOUT.read_vectors, tiny.LAYOUT.draw_vectors, tiny.LAYOUT.length
ROWS = [[[tiny.EDIT, tiny.DRAW], [tiny.CHAT, tiny.CAPTION]], [[tiny.TWO], [tiny.CAPTION, tiny.CHAT]]]


class GivenVectors(Pisces):
    """The same model with its encoders passed by: the pools hold the vectors themselves, not pictures."""

    def read(self, images):
        return self.understanding_projector(images)

    def features(self, images):
        return images


def forward(model, params, batch):
    """Hidden states, predicted vectors and true ones."""
    hidden, states, target = model.apply({"params": params}, batch)
    return hidden, model.apply({"params": params}, states, method="predict"), target


def make(model=None, seed=0):
    model = model or Pisces(tiny.PISCES)
    shapes = (jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 4), jnp.int32))
    init = jax.eval_shape(lambda: model.init(jax.random.key(0), *shapes, method="init_all"))
    p = plain.randomised(nn.unbox(init)["params"], seed)
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)


@pytest.fixture(scope="module")
def params():
    return make()


def given_batch():
    """The packed batch with random vectors in place of pictures, idle slots and pointers filled with noise too."""
    rng = np.random.default_rng(0)
    batch = tiny.batch(*(tiny.pack(rows, idle=7 + i) for i, rows in enumerate(ROWS)))
    for role, count, width in (("read", n, 16), ("draw", m, 16)):
        shape = (*batch[f"{role}_valid"].shape, count, width)
        batch[f"{role}_images"] = rng.standard_normal(shape).astype(np.float32)
    assert not batch["read_valid"].all() and not batch["draw_valid"].all()
    return batch


@pytest.fixture(scope="module")
def outputs(params):
    """Batch to hidden [B, G, T, D], text loss of each position [B, G, T] and vector errors [B, P, m]."""
    model = GivenVectors(tiny.PISCES)

    @jax.jit
    def run(batch):
        hidden, predicted, target = forward(model, params, batch)
        targets, learned = text_targets(batch)
        text = text_cross_entropy(hidden, params["language_model"]["head"], targets)
        text = jnp.where(learned, text, 0)
        shape = batch["tokens"].shape
        return hidden.reshape(*shape, -1), text.reshape(shape), objectives.vector_error(predicted, target)

    return lambda batch: jax.device_get(run(batch))


def pictures(batch):
    """(role, group, slot, row, start) of every picture in use."""
    for role in ("read", "draw"):
        for g, slot in zip(*np.nonzero(batch[f"{role}_valid"]), strict=True):
            yield role, g, slot, batch[f"{role}_row"][g, slot], batch[f"{role}_start"][g, slot]


def all_but_the_past(batch, g, r, p, seed):
    """`batch` with everything changed that position p of row r of group g must not see, and nothing else.

    Changed: tokens and vectors after p in its segment, all of every other segment, row and group, padding, and what
    idle slots hold and point to.
    """
    rng = np.random.default_rng(seed)
    changed = {name: value.copy() for name, value in batch.items()}
    past = np.zeros(batch["tokens"].shape, bool)
    segment = batch["segment_ids"][g, r]
    past[g, r] = (segment == segment[p]) & (np.arange(T) <= p)
    changed["tokens"] = np.where(past, batch["tokens"], (batch["tokens"] + rng.integers(1, 32, past.shape)) % 32)
    for role, count in (("read", n), ("draw", m)):
        noise = 10 * rng.standard_normal(batch[f"{role}_images"].shape).astype(np.float32)
        changed[f"{role}_images"] = noise
        idle = ~batch[f"{role}_valid"]
        changed[f"{role}_row"][idle] = rng.integers(0, 2, idle.sum())
        changed[f"{role}_start"][idle] = rng.integers(0, T - 4, idle.sum())
        for other, group, slot, row, start in pictures(batch):
            for k in range(count):
                if other == role and past[group, row, start + k]:
                    changed[f"{role}_images"][group, slot, k] = batch[f"{role}_images"][group, slot, k]
    return changed, past


def test_nothing_later_and_no_other_segment_is_seen(outputs):
    """For every position: with all that it must not see changed, its state and the losses so far stay, bit for bit."""
    batch = given_batch()
    hidden, text, errors = outputs(batch)
    checked = 0
    for g in range(2):
        for r in range(2):
            for p in np.flatnonzero(batch["segment_ids"][g, r]):
                changed, past = all_but_the_past(batch, g, r, p, seed=1000 * g + 100 * r + p)
                new_hidden, new_text, new_errors = outputs(changed)
                np.testing.assert_array_equal(new_hidden[past], hidden[past])
                # The loss at a position is also a matter of its target, one further.
                known = past & np.roll(past, -1, axis=-1)
                np.testing.assert_array_equal(new_text[known], text[known])
                for role, group, slot, row, start in pictures(batch):
                    for k in range(m):
                        if role == "draw" and past[group, row, start + k]:
                            assert new_errors[group, slot, k] == errors[group, slot, k]
                            checked += 1
                # The change was one: the states after it are others.
                later = (batch["segment_ids"] > 0) & ~past
                assert (new_hidden[later] != hidden[later]).any(axis=-1).all()
    assert checked > 50


def test_everything_earlier_is_seen(outputs):
    """Changing one token or vector changes its own state and all after it in its segment, and nothing besides."""
    batch = given_batch()
    hidden, _, _ = outputs(batch)
    holder = {
        (group, row, start + k): (role, slot, k) for role, group, slot, row, start in pictures(batch) for k in range(n)
    }
    for g, r in ((0, 0), (1, 0)):
        for p in np.flatnonzero(batch["segment_ids"][g, r]):
            changed = {name: value.copy() for name, value in batch.items()}
            if (g, r, p) in holder:
                role, slot, k = holder[g, r, p]
                changed[f"{role}_images"][g, slot, k] += 1
                # What lies under a vector is not seen at all.
                under = {**batch, "tokens": batch["tokens"].copy()}
                under["tokens"][g, r, p] += 1
                np.testing.assert_array_equal(outputs(under)[0], hidden)
            else:
                changed["tokens"][g, r, p] = (changed["tokens"][g, r, p] + 1) % 32
            different = (outputs(changed)[0] != hidden).any(axis=-1)
            segment = batch["segment_ids"][g, r]
            expected = np.zeros_like(different)
            expected[g, r] = (segment == segment[p]) & (np.arange(T) >= p)
            np.testing.assert_array_equal(different, expected)


def test_whole_pictures_do_not_leak(params):
    """The same with real pictures through the encoders: other pictures, and what idle slots hold, change nothing."""
    model = Pisces(tiny.PISCES)
    run = jax.jit(lambda b: model.apply({"params": params}, b))
    batch = tiny.batch(*(tiny.pack(rows) for rows in ROWS))
    hidden = jax.device_get(run(batch)[0]).reshape(*batch["tokens"].shape, -1)
    with_noise = tiny.batch(*(tiny.pack(rows, idle=9 + i) for i, rows in enumerate(ROWS)))
    again = jax.device_get(run(with_noise)[0]).reshape(hidden.shape)
    np.testing.assert_array_equal(again, hidden)
    for role, group, slot, row, start in pictures(batch):
        changed = {name: value.copy() for name, value in batch.items()}
        changed[f"{role}_images"][group, slot] = 255 - changed[f"{role}_images"][group, slot]
        different = (jax.device_get(run(changed)[0]).reshape(hidden.shape) != hidden).any(axis=-1)
        segment = batch["segment_ids"][group, row]
        expected = np.zeros_like(different)
        expected[group, row] = (segment == segment[start]) & (np.arange(T) >= start)
        np.testing.assert_array_equal(different, expected)


def test_vector_loss_is_shifted_by_one(params):
    """From hidden states to the loss in numpy: the state at [IMG] predicts vector 0, that at vector k vector k+1."""
    model = Pisces(tiny.PISCES)
    batch = tiny.batch(*(tiny.pack(rows, idle=5) for rows in ROWS))
    program = UnifiedProgram(model, {"text": 1.0, "vectors": 1.0}, 0, ("a",))
    hidden, predicted, target = jax.device_get(jax.jit(lambda b: forward(model, params, b))(batch))
    losses, _ = jax.jit(lambda b: program.losses(params, b, jax.random.key(0)))(batch)
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = hidden.reshape(2, 2, T, -1).astype(np.float64)
    errors, unshifted, drawn = [], [], 0
    for role, g, slot, row, start in pictures(batch):
        if role != "draw":
            continue
        drawn += 1
        assert batch["tokens"][g, row, start - 1] == tiny.Letters.begin_image
        assert batch["tokens"][g, row, start + m] == tiny.Letters.end_image
        image = batch["draw_images"][g, slot]
        vectors = plain.vit(p["generation_encoder"], image[None], patch=4, norm="post", activation=plain.gelu)
        truth = plain.pool(vectors, 2)[0]
        np.testing.assert_allclose(target[g, slot], truth, rtol=1e-4, atol=1e-4)
        for k in range(m):
            guess = plain.mlp(hidden[g, row, start - 1 + k], p["vector_head"], plain.gelu)
            np.testing.assert_allclose(predicted[g, slot, k], guess, rtol=1e-4, atol=1e-4)
            errors.append(((guess - truth[k]) ** 2).mean())
            late = plain.mlp(hidden[g, row, start + k], p["vector_head"], plain.gelu)
            unshifted.append(((late - truth[k]) ** 2).mean())
    assert drawn == 4 and float(losses["vectors"].count) == drawn * m
    assert float(losses["vectors"].compute()) == pytest.approx(np.mean(errors), rel=1e-5)
    assert abs(np.mean(unshifted) / np.mean(errors) - 1) > 1e-3


@pytest.mark.parametrize("true_vectors", [0.0, 1.0])
def test_the_decoder_learns_on_from_predicted_vectors(params, true_vectors):
    """Its error is that of the decoder's own program, given these vectors; nothing flows back to what made them."""
    c = tiny.PISCES
    dit = DiTConfig(
        size=16, patch_size=4, channels=3, width=16, layers=1, heads=2, mlp_hidden=24, condition_width=16,
        condition_vectors=m,
    )  # fmt: skip
    r = Reconstruction(ViT(c.generation_encoder), DiT(dit), c.pool, FlowConfig(zero_share=0.5), 0.0)
    fresh = nn.unbox(r.init(jax.random.key(1)))["decoder"]
    leaves, tree = jax.tree.flatten(fresh)
    noise = [jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    every = {**params, "decoder": jax.tree.unflatten(tree, [x + 0.1 * n for x, n in zip(leaves, noise, strict=True)])}
    program = UnifiedProgram(
        Pisces(c), {"text": 1.0, "vectors": 1.0, "reconstruction": 1.0}, 0, ("a",), r, true_vectors
    )  # fmt: skip
    batch = tiny.batch(*(tiny.pack(rows, idle=5) for rows in ROWS))
    batch["draw_id"] = np.random.default_rng(0).integers(0, 2**32, batch["draw_id"].shape, np.uint64).astype(np.uint32)
    key = jax.random.key(3)

    def loss(p):
        losses, _ = program.losses(p, batch, key)
        return losses["reconstruction"].compute(), losses["reconstruction"].count

    (got, count), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(every)
    _, predicted, target = jax.jit(lambda b: forward(Pisces(c), params, b))(batch)
    valid = np.flatnonzero(batch["draw_valid"])
    vectors = (target if true_vectors else predicted).reshape(-1, m, 16)[valid]
    images, ids = batch["draw_images"].reshape(-1, 16, 16, 3), batch["draw_id"].reshape(-1, 2)
    expected = r.errors(every, vectors, r.signal(every, images[valid]), ids[valid], key)
    assert count == len(valid) == program.counts(batch)["reconstruction"]
    assert float(got) == pytest.approx(float(expected.mean()), rel=1e-5)
    for part, tree in gradient.items():
        assert any(np.asarray(x).any() for x in jax.tree.leaves(tree)) == (part == "decoder"), part


def test_without_fed_vectors_predictions_are_of_the_text_alone():
    """Other true vectors change no state and no prediction; with them they do."""
    batch = given_batch()
    other = dict(batch, draw_images=batch["draw_images"][::-1])
    for fed in (False, True):
        model = GivenVectors(dataclasses.replace(tiny.PISCES, place_embedding=True, fed_vectors=fed))
        params = make(Pisces(model.config))
        hidden, predicted, _ = forward(model, params, batch)
        changed = forward(model, params, other)
        same = np.array_equal(hidden, changed[0]) and np.array_equal(predicted, changed[1])
        assert same != fed
        # Queries tell the places of a picture apart.
        assert (np.abs(np.diff(predicted, axis=2)).max(axis=(1, 2, 3)) > 1e-3).all()


def test_text_loss_of_packed_rows(params):
    model = Pisces(tiny.PISCES)
    batch = tiny.batch(*(tiny.pack(rows, idle=5) for rows in ROWS))
    hidden, _, _ = jax.device_get(jax.jit(lambda b: model.apply({"params": params}, b))(batch))
    hidden, head = hidden.reshape(2, 2, T, -1), np.asarray(params["language_model"]["head"], np.float64)
    total, count = 0.0, 0
    for g in range(2):
        for r in range(2):
            for t in np.flatnonzero(batch["loss_mask"][g, r]):
                logits = head @ hidden[g, r, t - 1].astype(np.float64)
                total += math.log(np.exp(logits).sum()) - logits[batch["tokens"][g, r, t]]
                count += 1
    # Letters of learned texts, and the [IMG] or eos that follows each at once; every turn of a chat has its eos.
    captions, edit, chats, two = 2 * (5 + 1), 2 + 1, 2 * (3 + 1 + 3 + 1), 2 + 1 + 1 + 1
    assert count == captions + edit + chats + two
    for chunk in (0, 8):
        program = UnifiedProgram(model, {"text": 1.0, "vectors": 1.0}, chunk, ("a",))
        losses, _ = jax.jit(lambda b, program=program: program.losses(params, b, jax.random.key(0)))(batch)
        assert float(losses["text"].count) == count
        assert float(losses["text"].compute()) == pytest.approx(total / count, rel=1e-5)
        counts = program.counts(batch)
        assert {k: float(v) for k, v in counts.items()} == {k: float(v.count) for k, v in losses.items()}


def test_packed_examples_have_the_losses_they_have_alone(params):
    """Also when one sits in the second row, behind another, in a group full of noise."""
    program = UnifiedProgram(Pisces(tiny.PISCES), {"text": 1.0, "vectors": 1.0}, 0, ("a", "b", "c", "d", "e"))
    run = jax.jit(lambda b: program.losses(params, b, jax.random.key(0)))
    examples = [tiny.EDIT, tiny.DRAW, tiny.CHAT, tiny.CAPTION, tiny.TWO]
    layout = dataclasses.replace(LAYOUT, rows=3, draw_slots=5)
    packed = tiny.pack([[tiny.EDIT, tiny.DRAW], [tiny.CHAT, tiny.CAPTION], [tiny.TWO]], layout, idle=3)
    # The averages by source tell the examples apart: each is a source of its own.
    order = {(0, 1): 0, (0, 2): 1, (1, 1): 2, (1, 2): 3, (2, 1): 4}
    for (row, segment), number in order.items():
        packed["source"][row][packed["segment_ids"][row] == segment] = number
    for slot in range(5):
        row, start = packed["draw_row"][slot], packed["draw_start"][slot]
        packed["draw_source"][slot] = packed["source"][row, start]
    together = merge([run(tiny.batch(packed))[1]])
    for number, example in enumerate(examples):
        alone = merge([run(tiny.batch(tiny.pack([[example]], layout)))[0]])
        names = {f"{kind}/{'abcde'[number]}" for kind in alone}
        assert names == {name for name in together if name.endswith("abcde"[number])}
        for kind, value in alone.items():
            assert together[f"{kind}/{'abcde'[number]}"] == pytest.approx(value, rel=1e-5)


def test_rows_of_the_data_layer_give_the_same_losses(params):
    """What `PackedGroups` makes of examples means to the model what packing by hand does."""
    examples = [tiny.EDIT, tiny.DRAW, tiny.CHAT, tiny.CAPTION, tiny.TWO, tiny.DRAW]
    groups = PackedGroups([Entry("a", 1.0, tiny.Listed(examples))], tiny.Letters(), LAYOUT, seed=0)
    program = UnifiedProgram(Pisces(tiny.PISCES), {"text": 1.0, "vectors": 1.0}, 0, ("a",))
    run = jax.jit(lambda b: program.losses(params, b, jax.random.key(0))[0])
    packed = merge([run(tiny.batch(groups[i])) for i in range(groups.per_epoch)])
    alone = merge([run(tiny.batch(tiny.pack([[example]]))) for example in examples])
    assert packed == pytest.approx(alone, rel=1e-5)


def test_no_gradient_reaches_the_generation_encoder(params):
    """Its features are targets and inputs, both detached; the test sees it where they are not."""

    class Attached(Pisces):
        def features(self, images):
            from pisces_jax.models.vit import pooled_features

            return pooled_features(self.generation_encoder(images), self.config.pool)

    batch = tiny.batch(tiny.pack(ROWS[0]))

    def gradient(kind):
        program = UnifiedProgram(kind(tiny.PISCES), {"text": 1.0, "vectors": 1.0}, 0, ("a",))

        def loss(p, batch):
            losses, _ = program.losses(p, batch, jax.random.key(0))
            return sum(average.compute() for average in losses.values())

        return jax.device_get(jax.jit(jax.grad(loss))(params, batch))

    detached, attached = gradient(Pisces), gradient(Attached)
    assert not any(np.any(g) for g in jax.tree.leaves(detached["generation_encoder"]))
    assert any(np.any(g) for g in jax.tree.leaves(attached["generation_encoder"]))
    # All else learns: no other part is cut off.
    for part in set(params) - {"generation_encoder"}:
        assert any(np.any(g) for g in jax.tree.leaves(detached[part])), part


def test_batches_without_pictures(params):
    """A mixture that only reads has no slots to draw, and one that only draws none to read."""
    whole = UnifiedProgram(Pisces(tiny.PISCES), {"text": 1.0, "vectors": 1.0}, 0, ("a",))
    run = jax.jit(lambda b: whole.losses(params, b, jax.random.key(0))[0])
    for examples, slots in (
        ([[tiny.CAPTION, tiny.CHAT]], dict(draw_slots=0)),
        ([[tiny.DRAW, tiny.CHAT]], dict(read_slots=0)),
        ([[tiny.CHAT]], dict(read_slots=0, draw_slots=0)),
    ):
        got = merge([run(tiny.batch(tiny.pack(examples, dataclasses.replace(LAYOUT, **slots))))])
        assert got == pytest.approx(merge([run(tiny.batch(tiny.pack(examples)))]), rel=1e-5)
