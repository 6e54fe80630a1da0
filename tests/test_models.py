"""The models against the same mathematics in numpy and float64 (`plain.py`), and against other implementations."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import plain
import pytest

from pisces_jax.models import layers
from pisces_jax.models.dit import DiT, DiTConfig
from pisces_jax.models.transformer import RopeScaling, Transformer, TransformerConfig, empty_cache
from pisces_jax.models.vit import ContrastiveHead, TextTower, TextTowerConfig, ViT, ViTConfig, pooled_features

SCALING = (8.0, 1.0, 4.0, 64)
LLAMA = TransformerConfig(
    vocab_size=23, width=24, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_hidden=20, rope_theta=1000.0,
    rope_scaling=RopeScaling(*SCALING),
)  # fmt: skip
SIGLIP = ViTConfig(image_size=12, patch_size=4, width=16, layers=2, heads=2, mlp_hidden=24)
EVA = dataclasses.replace(
    SIGLIP, norm="post", class_token=True, final_norm=False, biases="qv", activation="gelu", layers=1
)
DIT = DiTConfig(
    size=8, patch_size=2, channels=3, width=16, layers=2, heads=2, mlp_hidden=20, condition_width=6,
    condition_vectors=4,
)  # fmt: skip


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


def rng(seed=0):
    return np.random.default_rng(seed)


def make(module, *inputs, method=None, seed=0, sharpen=()):
    """Random parameters of a module, so that none has a special initial value."""
    return plain.randomised(abstract(module, *inputs, method=method), seed, sharpen)


def abstract(module, *inputs, method=None):
    key = jax.random.key(0)
    return nn.unbox(jax.eval_shape(lambda *a: module.init(key, *a, method=method), *inputs))["params"]


def start(module, *inputs, method=None):
    """The initial parameters of a module."""
    init = jax.jit(lambda *a: nn.unbox(module.init(jax.random.key(0), *a, method=method)))
    return init(*inputs)["params"]


def apply(module, params, *inputs, method=None):
    return jax.jit(lambda p, *a: module.apply({"params": p}, *a, method=method))(params, *inputs)


def same(got, expected, tolerance=1e-9):
    expected = np.asarray(expected)
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance * np.abs(expected).max())


def count(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


# --- layers


def test_norms_and_feed_forward_layers(x64):
    x = 3 * rng().standard_normal((2, 5, 12)) + 1
    for module, expected in (
        (layers.RMSNorm(1e-5, jnp.float64), lambda p: plain.rms_norm(x, p, 1e-5)),
        (layers.LayerNorm(1e-3, dtype=jnp.float64), lambda p: plain.layer_norm(x, p, 1e-3)),
        (layers.SwiGLU(20, jnp.float64), lambda p: plain.swiglu(x, p)),
        (layers.MLP(20, "gelu", jnp.float64), lambda p: plain.mlp(x, p, plain.gelu)),
        (layers.MLP(20, "gelu_tanh", jnp.float64), lambda p: plain.mlp(x, p, plain.gelu_tanh)),
        (layers.Projector(7, 20, jnp.float64), lambda p: plain.mlp(x, p, plain.gelu)),
    ):
        p = make(module, x)
        same(apply(module, p, x), expected(p))
    bare = layers.LayerNorm(1e-3, affine=False, dtype=jnp.float64)
    assert "params" not in bare.init(jax.random.key(0), x)
    same(bare.apply({}, x), plain.layer_norm(x, eps=1e-3))


def test_norms_are_computed_in_float32_and_returned_in_the_compute_dtype():
    x = jnp.asarray(rng().standard_normal((4, 64)) + 30, jnp.bfloat16)  # with such a mean, bfloat16 loses precision
    for module, expected in (
        (layers.LayerNorm(dtype=jnp.bfloat16), plain.layer_norm(np.asarray(x, np.float64))),
        (layers.RMSNorm(dtype=jnp.bfloat16), plain.rms_norm(np.asarray(x, np.float64), {"scale": 1})),
    ):
        got = apply(module, start(module, x), x)
        assert got.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-2)


def test_pooling_equals_the_loops():
    x = rng().standard_normal((2, 36, 5)).astype(np.float32)
    for stride in (1, 2, 3, 6):
        same(layers.pool_2d(jnp.asarray(x), stride), plain.pool(x, stride), 1e-5)
    for shape, stride in (((1, 36, 5), 4), ((1, 35, 5), 1)):
        with pytest.raises(ValueError, match="not a square grid"):
            layers.pool_2d(jnp.zeros(shape), stride)


def test_patches():
    images = rng().standard_normal((2, 12, 12, 3)).astype(np.float32)
    patches = layers.patchify(jnp.asarray(images), 4)
    np.testing.assert_array_equal(patches, plain.patches(images, 4).astype(np.float32))
    np.testing.assert_array_equal(layers.unpatchify(patches, 4), images)


def test_pictures_are_normalised_like_the_encoders_expect():
    images = rng().integers(0, 256, (2, 3, 3, 3)).astype(np.uint8)
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    got = layers.normalize_picture(jnp.asarray(images), mean, std, jnp.float32)
    for c in range(3):
        np.testing.assert_allclose(got[..., c], (images[..., c] / 255 - mean[c]) / std[c], rtol=1e-5, atol=1e-5)


def test_time_embedding():
    t = np.array([0.0, 0.3, 1.0])
    got = np.asarray(layers.time_embedding(jnp.asarray(t), 8))
    for b in range(3):
        for i in range(4):
            angle = 1000 * t[b] / 10_000 ** (i / 4)
            np.testing.assert_allclose(got[b, [i, i + 4]], [np.cos(angle), np.sin(angle)], atol=1e-4)


# --- the causal transformer


def rows_of_segments():
    segments = np.array([[1] * 4 + [2] * 5 + [0] * 2, [1] * 11])
    positions = np.array([[*range(4), *range(5), 0, 0], [*range(40, 51)]])
    return segments, positions


@pytest.mark.parametrize("scaling", [SCALING, None])
def test_transformer_equals_numpy(x64, scaling):
    config = dataclasses.replace(LLAMA, rope_scaling=scaling and RopeScaling(*scaling))
    model = Transformer(config, jnp.float64)
    tokens = rng().integers(0, 23, (2, 11))
    segments, positions = rows_of_segments()
    p = make(model, jnp.asarray(tokens), method="init_all", sharpen=("query", "key"))
    frequencies = plain.llama3_frequencies(8, 1000.0, scaling)
    wrong = plain.llama3_frequencies(8, 1000.0, None if scaling else SCALING)

    def sees(b, t, s):
        return s <= t and segments[b, t] == segments[b, s]

    expected = plain.transformer(p, p["embedding"][tokens], positions, frequencies, sees)

    x = apply(model, p, tokens, method="embed")
    np.testing.assert_array_equal(x, p["embedding"][tokens])
    hidden, cache = apply(model, p, x, positions, segments)
    assert cache is None
    same(hidden, expected)
    same(apply(model, p, hidden, method="logits"), expected @ p["head"].T)
    # Another scaling of the frequencies would not be within the tolerance.
    other = plain.transformer(p, p["embedding"][tokens], positions, wrong, sees)
    assert np.abs(other - expected).max() > 1e-3 * np.abs(expected).max()


def test_tied_embedding():
    model = Transformer(dataclasses.replace(LLAMA, tied_embedding=True))
    tokens = jnp.zeros((1, 4), jnp.int32)
    p = make(model, tokens, method="init_all")
    assert "head" not in p
    hidden = rng().standard_normal((1, 4, 24)).astype(np.float32)
    same(apply(model, p, hidden, method="logits"), hidden @ p["embedding"].T, 1e-5)


def test_cache_step_by_step_equals_the_whole_sequence(x64):
    """Left-aligned rows of different lengths: first a prompt, then one position at a time."""
    model = Transformer(LLAMA, jnp.float64)
    x = rng().standard_normal((3, 12, 24))
    p = make(model, jnp.zeros((1, 4), jnp.int32), method="init_all", sharpen=("query", "key"))
    everywhere = np.tile(np.arange(12), (3, 1))
    whole, _ = apply(model, p, x, everywhere)

    prompts = np.array([2, 5, 4])
    padded = x[:, :5].copy()
    for b in range(3):
        padded[b, prompts[b] :] = 1e3  # what is after a prompt makes no difference
    cache = empty_cache(LLAMA, 3, 14, jnp.float64)
    hidden, cache = apply(model, p, padded, everywhere[:, :5], None, cache)
    for b in range(3):
        same(hidden[b, : prompts[b]], whole[b, : prompts[b]])
    step = jax.jit(lambda x, at, cache: model.apply({"params": p}, x, at, None, cache))
    lengths = prompts.copy()
    while (lengths < 12).any():
        at = np.minimum(lengths, 11)
        inputs = x[np.arange(3), at][:, None]
        hidden, cache = step(jnp.asarray(inputs), jnp.asarray(at)[:, None], cache)
        for b in range(3):
            same(hidden[b, 0], whole[b, at[b]])
        lengths = np.minimum(lengths + 1, 12)


def test_a_long_prompt_shows_the_rotary_embedding(x64):
    """At position 5000, the state with float32 angles is still that with exact angles."""
    model = Transformer(dataclasses.replace(LLAMA, layers=1), jnp.float64)
    p = make(model, jnp.zeros((1, 4), jnp.int32), method="init_all", sharpen=("query", "key"))
    x, positions = rng().standard_normal((1, 6, 24)), np.arange(5000, 5030, 5)[None]
    frequencies = plain.llama3_frequencies(8, 1000.0, SCALING)
    expected = plain.transformer(p, x, positions, frequencies, lambda b, t, s: s <= t)
    same(apply(model, p, x, positions)[0], expected)


# --- vision


@pytest.mark.parametrize(
    "config, expected",
    [
        (SIGLIP, dict(norm="pre", activation=plain.gelu_tanh)),
        (EVA, dict(norm="post", activation=plain.gelu)),
        (dataclasses.replace(EVA, output_dim=5, final_norm=True), dict(norm="post", activation=plain.gelu)),
        (dataclasses.replace(SIGLIP, stem=(5, 6), positions="sines"), dict(norm="pre", activation=plain.gelu_tanh)),
        (dataclasses.replace(SIGLIP, stem=(5,)), dict(norm="pre", activation=plain.gelu_tanh)),
    ],
    ids=["siglip", "eva", "ours", "stem", "a shorter one"],
)
def test_vision_transformer_equals_numpy(config, expected):
    model = ViT(config)
    images = rng().integers(0, 256, (2, 12, 12, 3)).astype(np.uint8)
    p = make(model, images, sharpen=("query", "key"))
    got = apply(model, p, images)
    assert got.shape == (2, 9, config.output_width) and config.vectors == 9
    same(got, plain.vit(p, images, patch=4, eps=config.eps, **expected), 2e-5)
    attention = p["layers"]["attention"]
    assert [name for name in ("query", "key", "value", "out") if "bias" in attention[name]] == (
        ["query", "key", "value", "out"] if config.biases == "qkv" else ["query", "value", "out"]
    )


def test_positions_that_start_as_sines():
    """Rows in the first half, columns in the second; neighbours are 2 radians apart at the highest frequency."""
    config = dataclasses.replace(SIGLIP, image_size=12, patch_size=4, width=24, positions="sines")
    start = nn.unbox(jax.jit(ViT(config).init)(jax.random.key(0), jnp.zeros((1, 12, 12, 3), jnp.uint8)))["params"]
    expected = np.zeros((9, 24))
    for n in range(9):
        for k in range(6):
            for axis, place in enumerate((n // 3 + 0.5, n % 3 + 0.5)):
                angle = 2 * place * 100 ** (-k / 6)
                expected[n, 12 * axis + k] = 0.3 * math.sin(angle)
                expected[n, 12 * axis + 6 + k] = 0.3 * math.cos(angle)
    np.testing.assert_allclose(start["position_embedding"], expected, atol=1e-6)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(stem=(5, 6, 7)), "patch_size 4 is not a multiple of 8"),
        (dict(positions="cosines"), "neither 'normal' nor 'sines'"),
        (dict(positions="sines", class_token=True), "no class token"),
        (dict(positions="sines", width=26), "a multiple of 4"),
    ],
)
def test_settings_of_the_vision_transformer_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SIGLIP, **changes)


def test_pixels_beyond_the_last_whole_patch_are_left_out():
    """As in SigLIP-so400m-patch14-384, which uses 27 × 14 of 384 pixels."""
    model, images = ViT(SIGLIP), rng().integers(0, 256, (1, 12, 12, 3)).astype(np.uint8)
    larger = ViT(dataclasses.replace(SIGLIP, image_size=14))
    p = make(model, images)
    padded = np.pad(images, ((0, 0), (0, 2), (0, 2), (0, 0)), constant_values=77)
    assert larger.config.vectors == 9
    np.testing.assert_array_equal(apply(larger, p, padded), apply(model, p, images))


def test_pooled_features_are_float32_and_raw():
    vectors = 5 + 3 * rng().standard_normal((1, 16, 4))
    got = pooled_features(jnp.asarray(vectors, jnp.bfloat16), 2)
    assert got.dtype == jnp.float32
    same(got, plain.pool(np.asarray(jnp.asarray(vectors, jnp.bfloat16), np.float64), 2), 1e-5)


def test_text_tower_equals_numpy_and_ignores_padding():
    tower = TextTower(TextTowerConfig(vocab_size=11, max_length=7, width=16, layers=1, heads=2, mlp_hidden=12))
    tokens, real = rng().integers(0, 11, (3, 7)), np.arange(7) < np.array([7, 3, 1])[:, None]
    p = make(tower, tokens, real, sharpen=("query", "key"))
    x = p["embedding"][tokens] + p["position_embedding"]
    w = plain.layer(p["layers"], 0)
    x = x + plain.encoder_attention(plain.layer_norm(x, w["norm1"]), w["attention"], lambda b, t, s: real[b, s])
    x = x + plain.mlp(plain.layer_norm(x, w["norm2"]), w["mlp"], plain.gelu)
    x = plain.layer_norm(x, p["final_norm"])
    expected = np.stack([x[b, real[b]].mean(axis=0) for b in range(3)])
    got = apply(tower, p, tokens, real)
    same(got, expected, 2e-5)
    other = np.where(real, tokens, (tokens + 5) % 11)
    np.testing.assert_array_equal(apply(tower, p, other, real), got)


def test_contrastive_vectors_have_length_one():
    head = ContrastiveHead(5)
    x = 4 * rng().standard_normal((3, 8)).astype(np.float32)
    p = make(head, x)
    y = x @ p["projection"]["kernel"]
    same(apply(head, p, x), y / np.linalg.norm(y, axis=-1, keepdims=True), 1e-5)


# --- the diffusion transformer


def dit_inputs(config=DIT, B=3):
    r = rng(1)
    return (
        r.standard_normal((B, config.size, config.size, config.channels)).astype(np.float32),
        np.linspace(0.1, 0.9, B).astype(np.float32),
        r.standard_normal((B, config.condition_vectors, config.condition_width)).astype(np.float32),
        np.array([True, False, True])[:B],
    )


def plain_dit(p, config, x, t, condition, keep):
    """The block of Lumina-Next as BLIP3-o uses it, in NumPy."""
    D, E, side, coarse = config.width, config.heads, config.side, config.condition_side
    H = D // E

    def linear(x, w):
        return x @ w["kernel"] + w.get("bias", 0.0)

    def rotary(z, side, scale):
        """Half of the pairs of each head rotate with y, half with x."""
        frequencies = np.array([config.rope_theta ** (-4 * i / H) for i in range(H // 4)])
        places = [((i + 0.5) * scale, (j + 0.5) * scale) for i in range(side) for j in range(side)]
        out = np.zeros(z.shape)
        for m, (y_, x_) in enumerate(places):
            angles = np.concatenate([y_ * frequencies, x_ * frequencies])
            turned = (z[:, m, :, : H // 2] + 1j * z[:, m, :, H // 2 :]) * np.exp(1j * angles)
            out[:, m] = np.concatenate([turned.real, turned.imag], axis=-1)
        return out

    raw = condition.astype(float)
    condition = plain.layer_norm(raw, p["condition_norm"])
    y = linear(condition, p["condition_embedding"]) * keep[:, None, None]
    angles = 1000 * t[:, None] * 10_000 ** (-np.arange(D // 2) / (D // 2))
    h = np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    h = linear(plain.silu(linear(h, p["time_up"])), p["time_down"]) + linear(y.mean(1), p["pooled_embedding"])
    z = linear(plain.patches(x, config.patch_size), p["patch_embedding"])
    if config.local_condition:
        ratio = side // coarse
        for m in range(side * side):
            i, j = divmod(m, side)
            covering = condition[:, i // ratio * coarse + j // ratio]
            kernel, bias = (p["local"][n][..., i % ratio, j % ratio, :] for n in ("kernel", "bias"))
            z[:, m] += (covering @ kernel + bias) * keep[:, None]

    def everything(b, t, s):
        return True

    for n in range(config.layers):
        w = plain.layer(p["layers"], n)
        scale1, gate1, scale2, gate2 = np.moveaxis(
            np.einsum("bd,dke->bke", plain.silu(h), w["modulation"]["kernel"]) + w["modulation"]["bias"], 1, 0
        )
        scale1, gate1, scale2, gate2 = (a[:, None] for a in (scale1, gate1, scale2, gate2))
        own = plain.rms_norm(z, w["attention_norm"]) * (1 + scale1)
        other = plain.rms_norm(y, w["condition_norm"])
        a = w["attention"]

        def heads(name, source, a=a):
            out = source @ a[name]["kernel"]
            if f"{name}_norm" in a:
                out = plain.layer_norm(out, a[f"{name}_norm"])
            return out.reshape(*out.shape[:2], E, H)

        q, k = (rotary(heads(name, own), side, 1.0) for name in ("query", "key"))
        yk = heads("condition_key", other)
        if config.local_condition:
            yk = rotary(yk, coarse, side // coarse)
        mixed = plain.attend(q, k, heads("value", own), everything)
        mixed = mixed + np.tanh(a["gate"])[:, None] * plain.attend(q, yk, heads("condition_value", other), everything)
        mixed = mixed.reshape(*mixed.shape[:2], D) @ a["out"]["kernel"]
        z = z + np.tanh(gate1) * plain.rms_norm(mixed, w["attention_post_norm"])
        inner = plain.swiglu(plain.rms_norm(z, w["mlp_norm"]) * (1 + scale2), w["mlp"])
        z = z + np.tanh(gate2) * plain.rms_norm(inner, w["mlp_post_norm"])
    z = plain.layer_norm(z) * (1 + linear(plain.silu(h), p["final_modulation"])[:, None])
    out = linear(z, p["output"])
    if config.local_condition:
        for m in range(side * side):
            i, j = divmod(m, side)
            kernel, bias = (p["estimate"][n][..., i % ratio, j % ratio, :] for n in ("kernel", "bias"))
            out[:, m] += (raw[:, i // ratio * coarse + j // ratio] @ kernel + bias) * keep[:, None]
    picture = np.zeros(x.shape)
    size = config.patch_size
    for m in range(side * side):
        i, j = divmod(m, side)
        square = out[:, m].reshape(-1, size, size, config.channels)
        picture[:, i * size : (i + 1) * size, j * size : (j + 1) * size] = square
    return picture


@pytest.mark.parametrize("local", [False, True])
def test_diffusion_transformer_equals_numpy(local):
    config = dataclasses.replace(DIT, local_condition=local)
    model, inputs = DiT(config), dit_inputs()
    p = make(model, *inputs, sharpen=("query_norm", "key_norm", "condition_key_norm"))
    same(apply(model, p, *inputs), plain_dit(p, config, *inputs), 1e-4)


@pytest.mark.parametrize("local", [False, True])
def test_dropped_condition_is_irrelevant(local):
    model = DiT(dataclasses.replace(DIT, local_condition=local))
    x, t, condition, keep = dit_inputs()
    p = make(model, x, t, condition, keep)
    before, after = (apply(model, p, x, t, c, keep) for c in (condition, condition[::-1] ** 2))
    np.testing.assert_array_equal(before[1], after[1])
    assert (np.abs(before[0] - after[0]) > 1e-3).any() and (np.abs(before[2] - after[2]) > 1e-3).any()


def test_diffusion_transformer_starts_at_zero_and_with_closed_gates():
    model, inputs = DiT(DIT), dit_inputs()
    p = start(model, *inputs)
    assert not np.asarray(apply(model, p, *inputs)).any()
    assert not np.asarray(p["layers"]["attention"]["gate"]).any()
    assert not np.asarray(p["layers"]["modulation"]["kernel"]).any()
    # With random parameters the output is not zero, so the test can fail.
    assert np.asarray(apply(model, make(model, *inputs), *inputs)).any()


def test_closed_gate_shuts_cross_attention_out():
    model, (x, t, condition, keep) = DiT(DIT), dit_inputs()
    p = make(model, x, t, condition, keep)
    p["pooled_embedding"]["kernel"] = np.zeros_like(p["pooled_embedding"]["kernel"])

    run = jax.jit(lambda p, c: model.apply({"params": p}, x, t, c, keep))

    def difference(gate):
        p["layers"]["attention"]["gate"] = np.full((DIT.layers, DIT.heads), gate)
        return np.abs(np.asarray(run(p, condition) - run(p, condition[::-1])))[[0, 2]].max()

    assert difference(0.0) == 0 and difference(0.5) > 1e-3


# --- sizes, scans, rematerialisation, dtypes


def test_parameter_counts():
    tokens = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    llama = TransformerConfig(
        vocab_size=128_256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp_hidden=14_336
    )
    got = count(abstract(Transformer(llama), tokens, method="init_all"))
    assert got == 8_030_261_248  # LLaMA-3.1-8B, as published

    def pictures(size):
        return jax.ShapeDtypeStruct((1, size, size, 3), jnp.uint8)

    # SigLIP-so400m-patch14-384 without its pooling head: 4 D² + 2 D F and biases per layer, F = 4304.
    D, F = 1152, 4304
    siglip = ViTConfig(image_size=384, patch_size=14, width=D, layers=27, heads=16, mlp_hidden=F)
    got = count(abstract(ViT(siglip), pictures(384)))
    a_layer = 4 * (D * D + D) + (D * F + F) + (F * D + D) + 4 * D
    assert siglip.vectors == 729
    assert got == 27 * a_layer + (14 * 14 * 3 * D + D) + 729 * D + 2 * D

    # EVA-CLIP-E-plus: no bias on keys, a class token, no final norm; "about 4.35 B".
    D, F = 1792, 15_360
    eva = ViTConfig(
        image_size=448, patch_size=14, width=D, layers=64, heads=16, mlp_hidden=F, norm="post", class_token=True,
        final_norm=False, biases="qv",
    )  # fmt: skip
    got = count(abstract(ViT(eva), pictures(448)))
    a_layer = 4 * D * D + 3 * D + (D * F + F) + (F * D + D) + 4 * D
    assert got == 64 * a_layer + (14 * 14 * 3 * D + D) + (1 + 1024) * D + D
    assert got == pytest.approx(4.35e9, rel=0.005)

    # BLIP3-o's feature transformer: 24 layers of width 1792, published as 1.365 B parameters.
    D, F, C, E = 1792, 4864, 1792, 28
    dit = DiTConfig(
        size=8, patch_size=1, channels=C, width=D, layers=24, heads=E, mlp_hidden=F, condition_width=4096,
        condition_vectors=64,
    )  # fmt: skip
    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((1, 8, 8, C), (1,), (1, 64, 4096))]
    got = count(abstract(DiT(dit), *inputs, jax.ShapeDtypeStruct((1,), bool)))
    a_layer = 6 * D * D + 3 * D * F + 4 * D * D + 4 * D + 5 * D + 6 * D + E
    ends = 2 * 4096 + (4096 * D + D) + 3 * (D * D + D) + (C * D + D) + (D * D + D) + (D * C + C)
    assert got == 24 * a_layer + ends
    assert got == pytest.approx(1.365e9, rel=0.05)


def gradients(module, params, inputs, method=None):
    def loss(p):
        out = module.apply({"params": p}, *inputs, method=method)
        out = out[0] if isinstance(out, tuple) else out
        return jnp.sum(jnp.sin(out))

    return jax.device_get(jax.jit(jax.value_and_grad(loss))(params))


def cases():
    x = jnp.asarray(rng().standard_normal((2, 6, 24)))
    tokens = jnp.broadcast_to(jnp.arange(6), (2, 6))
    images = jnp.asarray(rng().integers(0, 256, (2, 12, 12, 3)), jnp.uint8)
    return {
        "transformer": (Transformer, LLAMA, (x, tokens), (jnp.zeros((1, 4), jnp.int32),), "init_all"),
        "vit": (ViT, EVA, (images,), (images,), None),
        "dit": (DiT, DIT, tuple(map(jnp.asarray, dit_inputs())), dit_inputs(), None),
    }


@pytest.mark.parametrize("name", ["transformer", "vit", "dit"])
def test_unrolled_and_rematerialised_layers_give_the_same_gradients(x64, name):
    kind, config, inputs, first, method = cases()[name]
    config = dataclasses.replace(config, layers=2)
    p = make(kind(config, jnp.float64), *first, method=method)
    expected = gradients(kind(config, jnp.float64), p, inputs)
    largest = max(np.abs(g).max() for g in jax.tree.leaves(expected[1]["layers"]))
    assert 1e-2 < largest < 1e6
    for change in (
        dict(unroll=True), dict(remat="full"), dict(remat="dots"), dict(remat="full", unroll=True)
    ):  # fmt: skip
        got = gradients(kind(dataclasses.replace(config, **change), jnp.float64), p, inputs)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11 * largest)


def test_rematerialisation_computes_again():
    """The policies differ in how many matrix products the backward pass computes."""
    model, images = EVA, jnp.zeros((2, 12, 12, 3), jnp.uint8)

    def products(remat):
        module = ViT(dataclasses.replace(model, remat=remat, layers=2))
        p = abstract(module, images)
        loss = jax.grad(lambda p: module.apply({"params": p}, images).sum())
        return str(jax.make_jaxpr(loss)(p)).count("dot_general")

    assert products("none") <= products("dots") < products("full")
    with pytest.raises(ValueError, match="unknown rematerialisation policy 'some'; known: none, full, attention, dots"):
        products("some")


def test_parameters_are_float32_and_outputs_are_wide():
    """Only computation is in bfloat16; what a loss receives is float32."""
    inputs = dit_inputs()
    dit = DiT(DIT, jnp.bfloat16)
    p = abstract(dit, *inputs)
    assert {a.dtype for a in jax.tree.leaves(p)} == {np.dtype("float32")}
    assert jax.eval_shape(lambda p: dit.apply({"params": p}, *inputs), p).dtype == jnp.float32
    llama = Transformer(LLAMA, jnp.bfloat16)
    tokens, x = jnp.zeros((1, 4), jnp.int32), jnp.zeros((1, 4, 24))
    p = abstract(llama, tokens, method="init_all")
    assert {a.dtype for a in jax.tree.leaves(p)} == {np.dtype("float32")}
    hidden, _ = jax.eval_shape(lambda p: llama.apply({"params": p}, x, tokens), p)
    logits = jax.eval_shape(lambda p, h: llama.apply({"params": p}, h, method="logits"), p, hidden)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize(
    "make_config, message",
    [
        (lambda: dataclasses.replace(LLAMA, kv_heads=3), "4 query heads are not a multiple of 3"),
        (lambda: dataclasses.replace(SIGLIP, norm="middle"), "neither 'pre' nor 'post'"),
        (lambda: dataclasses.replace(SIGLIP, patch_size=13), "patch_size 13 is larger than image_size 12"),
        (lambda: dataclasses.replace(DIT, patch_size=3), "size 8 is not a multiple of patch_size 3"),
        (lambda: dataclasses.replace(DIT, heads=8), "width 16 must be a multiple of 4 times the 8 heads"),
        (lambda: dataclasses.replace(DIT, local_condition=True, condition_vectors=9), "not a grid over 4² patches"),
    ],
)
def test_settings_that_do_not_fit_are_refused(make_config, message):
    with pytest.raises(ValueError, match=message):
        make_config()
