"""Attention, its masks and the rotary embedding against loops and complex numbers in float64."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from pisces_jax.models.layers import apply_rope, cos_sin, grid_angles, grid_centres
from pisces_jax.models.transformer import RopeScaling, TransformerConfig, rope_frequencies
from pisces_jax.ops import blockwise
from pisces_jax.ops.attention import (
    attention,
    cache_mask,
    causal_mask,
    choose_backend,
    segment_mask,
    xla_attention,
)
from pisces_jax.sharding import make_mesh

B, T, H = 2, 9, 6
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 2, 3, 3, 3, 3, 3, 3]])


def inputs(heads, kv_heads, keys=T):
    rng = np.random.default_rng(heads)
    shapes = (B, T, heads, H), (B, keys, kv_heads, H), (B, keys, kv_heads, H)
    return [rng.standard_normal(shape) for shape in shapes]


CASES = {
    "full": ({}, lambda b, t, s: True),
    "causal": ({"causal": True}, lambda b, t, s: s <= t),
    "segments": (
        {"segment_ids": (SEGMENTS, SEGMENTS)},
        lambda b, t, s: SEGMENTS[b, t] == SEGMENTS[b, s],
    ),
    "packed": (
        {"causal": True, "segment_ids": (SEGMENTS, SEGMENTS)},
        lambda b, t, s: s <= t and SEGMENTS[b, t] == SEGMENTS[b, s],
    ),
}


@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2), (4, 1)])
@pytest.mark.parametrize("case", CASES)
def test_attention_equals_the_loops(case, heads, kv_heads):
    arguments, sees = CASES[case]
    q, k, v = inputs(heads, kv_heads)
    expected = plain.attend(q, k, v, sees)
    with jax.enable_x64(True):
        got = attention(*map(jnp.asarray, (q, k, v)), **jax.tree.map(jnp.asarray, arguments))
        np.testing.assert_allclose(got, expected, rtol=1e-11, atol=1e-12)
    got = attention(*map(jnp.asarray, (q, k, v)), **jax.tree.map(jnp.asarray, arguments))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def packed_rows(length):
    """Rows of several examples of uneven lengths, with padding at the end of one of them."""
    ids = np.zeros((2, length), np.int32)
    for row, ends in enumerate([(3, 60, 131, 170), (90, 91, length)]):
        for number, (start, end) in enumerate(zip((0, *ends), ends, strict=False), 1):
            ids[row, start:end] = number
    return ids


def loss_and_gradients(function, q, k, v, weights, **arguments):
    def loss(q, k, v):
        out = function(q, k, v, **arguments)
        return (out * weights).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return out, *gradients


@pytest.mark.parametrize(
    "backend, causal, sizes",
    [
        ("blockwise", True, None),
        ("blockwise", False, None),
        ("splash", True, None),
        ("splash", False, None),
        pytest.param("blockwise", True, dict(data=2, fsdp=2, tensor=2), marks=pytest.mark.slow),
        pytest.param("blockwise", True, dict(fsdp=2, tensor=4), marks=pytest.mark.slow),
        pytest.param("splash", True, dict(fsdp=2, tensor=4), marks=pytest.mark.slow),
    ],
)
def test_backends_equal_the_reference_on_packed_rows(monkeypatch, backend, causal, sizes):
    """200 positions, not a multiple of any block; grouped queries; also two key-value heads on four tensor devices."""
    rng = np.random.default_rng(0)
    rows = 2 if sizes is None else 4
    q, k, v, weights = (jnp.asarray(rng.standard_normal((rows, 200, n, 32)), jnp.float32) for n in (4, 2, 2, 4))
    ids = jnp.asarray(np.tile(packed_rows(200), (rows // 2, 1)))
    arguments = dict(causal=causal, segment_ids=(ids, ids))
    monkeypatch.setattr(blockwise, "BLOCK", 64)
    expected = loss_and_gradients(xla_attention, q, k, v, weights, **arguments)
    with jax.set_mesh(make_mesh(**sizes)) if sizes else contextlib.nullcontext():
        got = loss_and_gradients(attention, q, k, v, weights, backend=backend, **arguments)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("backend", ["blockwise", "splash"])
def test_backends_pad_what_does_not_divide(backend):
    """SigLIP's 729 vectors and heads of width 72, without masks: nothing sees the padding."""
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 729, 2, 72)), jnp.float32) for _ in range(3))
    np.testing.assert_allclose(attention(q, k, v, backend=backend), xla_attention(q, k, v), rtol=2e-5, atol=2e-5)


def test_which_backend_runs():
    """The platform of the mesh in force decides, because a program may be compiled for devices that are not here."""
    assert choose_backend("auto", 2048, masked=False) == "xla"
    assert choose_backend("splash", 2048, masked=False) == "splash"
    assert choose_backend("splash", 2048, masked=True) == "xla"
    with pytest.raises(ValueError, match="unknown attention backend 'flash'; known: auto, xla, blockwise, splash"):
        choose_backend("flash", 2048, masked=False)
    for platform, chosen in (("tpu", "splash"), ("cuda", "blockwise"), ("cpu", "xla")):
        device = AbstractDevice(device_kind="any", num_cores=1, platform=platform)
        mesh = AbstractMesh((1,), ("data",), axis_types=(AxisType.Auto,), abstract_device=device)
        with jax.sharding.use_abstract_mesh(mesh):
            assert choose_backend("auto", 2048, masked=False) == chosen
            assert choose_backend("auto", 64, masked=False) == "xla"


def test_blockwise_attention_holds_no_square():
    """At 4,096 positions, the temporaries of a gradient are smaller than the logits of one head."""

    def temporaries(backend):
        def loss(q, k, v):
            return attention(q, k, v, causal=True, backend=backend).sum()

        shape = jax.ShapeDtypeStruct((1, 4096, 4, 8), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(shape, shape, shape).compile().memory_analysis().temp_size_in_bytes

    assert temporaries("xla") > 4 * 4096**2 * 4
    assert temporaries("blockwise") < 4096**2 * 4


def test_attention_over_a_cache_with_rows_of_different_lengths():
    """The queries of each row have slots of their own, and see these and the earlier ones."""
    q, k, v = inputs(4, 2, keys=12)
    q = q[:, :3]
    index = np.array([[0, 1, 2], [6, 7, 8]])
    mask = cache_mask(jnp.asarray(index), 12)
    expected = plain.attend(q, k, v, lambda b, t, s: s <= index[b, t])
    np.testing.assert_allclose(attention(*map(jnp.asarray, (q, k, v)), mask=mask), expected, rtol=1e-5, atol=1e-5)
    # Later slots make no difference at all.
    before = attention(*map(jnp.asarray, (q, k, v)), mask=mask)
    k[0, 3:], v[0, 3:], k[1, 9:], v[1, 9:] = 1e4, -1e4, 1e4, -1e4
    np.testing.assert_array_equal(attention(*map(jnp.asarray, (q, k, v)), mask=mask), before)


def test_masks_hold_together():
    q, k, v = inputs(2, 2)
    mask = np.random.default_rng(0).random((B, T, T)) < 0.5
    mask |= np.eye(T, dtype=bool)
    got = attention(*map(jnp.asarray, (q, k, v)), causal=True, mask=jnp.asarray(mask))
    expected = plain.attend(q, k, v, lambda b, t, s: s <= t and mask[b, t, s])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_masks():
    ids = jnp.array([[1, 1, 2, 0]])
    expected = [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert segment_mask(ids, ids)[0].astype(int).tolist() == expected
    assert causal_mask(3, 3)[0].astype(int).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert cache_mask(jnp.array([[1], [3]]), 4)[:, 0].astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_bfloat16_inputs_have_their_softmax_in_float32():
    """A sum of 4096 equal weights of 2^-12: in bfloat16, a sum of ones would stop growing at 256."""
    q = jnp.zeros((1, 1, 1, 8), jnp.bfloat16)
    k, v = jnp.zeros((1, 4096, 1, 8), jnp.bfloat16), jnp.ones((1, 4096, 1, 8), jnp.bfloat16)
    got = attention(q, k, v)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), 1.0, rtol=1e-2)


def test_rotary_is_complex_multiplication():
    rng = np.random.default_rng(0)
    x, positions = rng.standard_normal((2, 7, 3, 8)), rng.integers(0, 5000, (2, 7))
    frequencies = plain.llama3_frequencies(8, 10_000.0)
    expected = plain.turn(x, positions, frequencies)
    with jax.enable_x64(True):
        got = apply_rope(jnp.asarray(x), cos_sin(jnp.asarray(positions[..., None] * frequencies)))
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)
        # Only distances matter: products of rotated queries and keys stay the same when both move by 1000.
        moved = apply_rope(jnp.asarray(x), cos_sin(jnp.asarray((positions[..., None] + 1000) * frequencies)))
        products, others = (np.einsum("btnh,bsnh->bnts", a, a) for a in (got, moved))
        np.testing.assert_allclose(products, others, rtol=1e-8, atol=1e-9)


def llama(head_dim=128, scaling=None, base=500_000.0):
    return TransformerConfig(
        vocab_size=8, width=8, layers=1, heads=1, kv_heads=1, head_dim=head_dim, mlp_hidden=8, rope_theta=base,
        rope_scaling=scaling,
    )  # fmt: skip


PUBLISHED = (8.0, 1.0, 4.0, 8192)  # factor, low, high, original: LLaMA 3.1's


def test_llama3_frequencies_equal_the_published_formula():
    expected = plain.llama3_frequencies(128, 500_000.0, PUBLISHED)
    unscaled = plain.llama3_frequencies(128, 500_000.0)
    # All three cases occur.
    assert (expected == unscaled).any() and (expected == unscaled / 8).any()
    assert ((expected < unscaled) & (expected > unscaled / 8)).sum() > 3
    with jax.enable_x64(True):
        got = rope_frequencies(llama(scaling=RopeScaling(*PUBLISHED)))
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        np.testing.assert_allclose(rope_frequencies(llama()), unscaled, rtol=1e-12)
    np.testing.assert_allclose(rope_frequencies(llama(scaling=RopeScaling(*PUBLISHED))), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "wrong", [None, (8.0, 4.0, 1.0, 8192), (8.0, 1.0, 4.0, 4096), (4.0, 1.0, 4.0, 8192)],
    ids=["none", "swapped", "context", "factor"],
)  # fmt: skip
def test_another_scaling_would_be_seen(wrong):
    got = np.asarray(rope_frequencies(llama(scaling=RopeScaling(*PUBLISHED))))
    other = plain.llama3_frequencies(128, 500_000.0, wrong)
    assert (np.abs(got / other - 1) > 0.2).any()


def test_frequencies_by_hand():
    """Four dimensions, base 100: 1 and 0.1 radians per position; wavelengths 6.28 and 62.8."""
    np.testing.assert_allclose(rope_frequencies(llama(4, base=100.0)), [1, 0.1], rtol=1e-6)
    # original/high = 20, original/low = 80: the long wavelength is between them, original/wavelength = 1.2732.
    scaling = RopeScaling(factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=80)
    smooth = (80 / (2 * np.pi / 0.1) - 1) / 3
    expected = [1, (1 - smooth) * 0.1 / 4 + smooth * 0.1]
    np.testing.assert_allclose(rope_frequencies(llama(4, scaling, 100.0)), expected, rtol=1e-6)


def test_rotary_over_a_grid_sees_both_axes():
    """Products of rotated queries and keys depend on (dy, dx) only."""
    side, H = 4, 8
    ys, xs = grid_centres(side)
    assert ys[:5].tolist() == [0.5] * 4 + [1.5] and xs[:5].tolist() == [0.5, 1.5, 2.5, 3.5, 0.5]
    angles = grid_angles(ys, xs, H, 100.0)
    assert angles.shape == (1, 16, H // 2)
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, H))
    by = cos_sin(angles)
    turned = [np.asarray(apply_rope(jnp.tile(jnp.asarray(z, jnp.float32), (1, 16, 1, 1)), by))[0, :, 0] for z in (q, k)]
    products = turned[0] @ turned[1].T
    by_offset = {}
    for i in range(16):
        for j in range(16):
            offset = (i // 4 - j // 4, i % 4 - j % 4)
            by_offset.setdefault(offset, []).append(products[i, j])
    assert len(by_offset) == 49
    for values in by_offset.values():
        np.testing.assert_allclose(values, values[0], atol=1e-5)
    assert len({round(float(v[0]), 4) for v in by_offset.values()}) == 49
    # A coarse grid over the same square, with its centres in units of the fine grid.
    np.testing.assert_allclose(grid_centres(2, 2.0)[1][:2], [1, 3])
