"""Every published part equals the implementation that it comes from, and every typical mistake is seen.

The reference implementations are torch, transformers and diffusers; `parity.py` says how they are filled and run.
"""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

from pisces_jax.data.images import fit
from pisces_jax.models import layers
from pisces_jax.models.layers import apply
from pisces_jax.models.transformer import Transformer, empty_cache
from pisces_jax.weights import config_json, language_json
from pisces_jax.weights.architecture import read_architecture
from pisces_jax.weights.export import export_part
from pisces_jax.weights.folder import Folder, part_shapes, read_part

CASES = parity.tiny()
LLAMA = dict(
    vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16,
)  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.part)
def test_parts_equal_the_reference(case, tmp_path):
    """Within 1e-9 in float64; in float32 and bfloat16 at most twice the reference's own error."""
    model = case.write(tmp_path / "m")
    for result in parity.measure(case, tmp_path / "m", model):
        assert result.within, parity.row(result)


@pytest.mark.slow
def test_llama_at_six_thousand_positions(tmp_path):
    case = parity.llama("tiny", 6000, **LLAMA)
    model = case.write(tmp_path / "m", sharpen=3.0)
    expected = case.reference(model, "float64")
    with jax.enable_x64(True):
        settings, params = case.params(tmp_path / "m")
        run = jax.jit(lambda p, s: case.ours(s, p, case.inputs, jnp.float64), static_argnums=1)
        assert parity.relative(run(params, settings), expected) < 1e-9
        # These inputs would show it if 3.1's frequency scaling were missing.
        assert parity.relative(run(params, dataclasses.replace(settings, rope_scaling=None)), expected) > 0.1


def test_llama_step_by_step_equals_the_reference_with_its_cache(tmp_path):
    case = parity.llama("tiny", 40, **LLAMA)
    model = case.write(tmp_path / "m")
    tokens, prompt = case.inputs, 25
    with parity.lifted(), torch.no_grad():
        reference = case.make().eval()
        reference.load_state_dict(model.state_dict())
        cache = DynamicCache(config=reference.config)
        steps = [torch.as_tensor(tokens[:, :prompt]), *torch.as_tensor(tokens[:, prompt:]).split(1, dim=1)]
        expected = [reference(t, past_key_values=cache, use_cache=True).logits.numpy() for t in steps]
    with jax.enable_x64(True):
        settings, params = case.params(tmp_path / "m")
        ours = Transformer(settings, jnp.float64)

        @jax.jit
        def advance(cache, tokens, positions):
            x = apply(ours, params, tokens, method="embed")
            hidden, cache = apply(ours, params, x, positions, None, cache)
            return apply(ours, params, hidden, method="logits"), cache

        cache, at = empty_cache(settings, 1, 48, jnp.float64), 0
        for step, wanted in zip(steps, expected, strict=True):
            positions = at + jnp.arange(step.shape[1])[None]
            got, cache = advance(cache, jnp.asarray(step.numpy()), positions)
            assert parity.relative(got, wanted) < 1e-9
            at += step.shape[1]


def test_widening_layer_by_layer_is_what_a_float64_copy_gives(tmp_path):
    """How `make parity` runs the language model that would not fit twice."""
    case = parity.llama("tiny", 50, **LLAMA, tie_word_embeddings=True)
    model = case.write(tmp_path / "m")
    expected = case.reference(model, "float64")
    in_place = dataclasses.replace(case, in_place=True)
    assert parity.relative(in_place.reference(model, "float64"), expected) < 1e-12
    # And the model is as it was.
    assert all(p.dtype == torch.float32 for p in model.parameters())
    np.testing.assert_array_equal(in_place.reference(model, "float32"), case.reference(model, "float32"))


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_the_language_model_equal_torchs(tmp_path, tied):
    """Of the next-token cross-entropy, with respect to every parameter; ours go through the table of names."""
    case = parity.llama("tiny", 50, **LLAMA, tie_word_embeddings=tied)
    model = case.write(tmp_path / "m")
    logits, reference = case.reference(model, "float64", gradients=True)
    targets = torch.as_tensor(case.inputs[:, 1:])
    torch.nn.functional.cross_entropy(logits[0, :-1], targets[0]).backward()
    expected = {name: p.grad.numpy() for name, p in reference.named_parameters()}

    with jax.enable_x64(True):
        settings, params = case.params(tmp_path / "m", jnp.float64)

        @jax.jit
        @jax.grad
        def gradient(params):
            y = case.ours(settings, params, case.inputs, jnp.float64)[0, :-1]
            right = jnp.take_along_axis(y, jnp.asarray(case.inputs)[0, 1:, None], axis=-1)[:, 0]
            return jnp.mean(jax.nn.logsumexp(y, axis=-1) - right)

        gradients = jax.tree.map(np.asarray, gradient(params))
    export_part(tmp_path / "g", "gradients", settings, gradients, dtype="float64")
    got = load_file(tmp_path / "g/model.safetensors")
    assert set(got) == set(expected)
    for name, wanted in expected.items():
        assert parity.relative(got[name], wanted) < 1e-9, name


# --- mistakes


def case_of(part):
    return next(case for case in CASES if case.part.startswith(part))


def settings_changed(**changes):
    return lambda settings, params: (dataclasses.replace(settings, **changes), params)


def params_changed(change):
    """`change` works on flat arrays by name."""
    from flax.traverse_util import flatten_dict, unflatten_dict

    def mistake(settings, params):
        flat = {name: np.asarray(x) for name, x in flatten_dict(params, sep="/").items()}
        change(flat)
        return settings, unflatten_dict(flat, sep="/")

    return mistake


def changed(name, function):
    def change(flat):
        flat[name] = function(flat[name])

    return params_changed(change)


def interleaved(kernel):
    """Pairs (2i, 2i+1) turned in place of (i, i+H/2), in keys and queries alike."""
    half = kernel.shape[-1] // 2
    return kernel.reshape(*kernel.shape[:-1], half, 2).swapaxes(-1, -2).reshape(kernel.shape)


def interleave(flat):
    for name in ("query", "key"):
        flat[f"layers/attention/{name}/kernel"] = interleaved(flat[f"layers/attention/{name}/kernel"])


MISTAKES = {
    "frequency scaling left out": ("LLaMA", settings_changed(rope_scaling=None)),
    "rotary base": ("LLaMA", settings_changed(rope_theta=10_000.0)),
    "rotary halves interleaved": ("LLaMA", params_changed(interleave)),
    "epsilon of RMSNorm": ("LLaMA", settings_changed(eps=1e-6)),
    "query heads dealt out to key heads in turn": (
        "LLaMA", changed("layers/attention/query/kernel", lambda k: k[:, :, [0, 2, 1, 3]]),
    ),
    "gate and up exchanged": (
        "LLaMA", params_changed(lambda f: f.update({
            "layers/mlp/gate/kernel": f["layers/mlp/up/kernel"], "layers/mlp/up/kernel": f["layers/mlp/gate/kernel"],
        })),
    ),
    "epsilon of LayerNorm": ("SigLIP", settings_changed(eps=1e-5)),
    "exact GELU for the tanh form": ("SigLIP", settings_changed(activation="gelu")),
    "a bias left out": ("SigLIP", changed("layers/attention/value/bias", np.zeros_like)),
    "transposed projection": (
        "SigLIP",
        changed("layers/attention/out/kernel", lambda k: k.reshape(2, 48, 48).swapaxes(1, 2).reshape(k.shape)),
    ),
    "wrong mean": ("SigLIP", settings_changed(mean=parity.MEAN)),
    "final norm left out": ("SigLIP", settings_changed(final_norm=False)),
    "patches as channel, row, column": (
        "SigLIP",
        changed("patch_embedding/kernel", lambda k: k.reshape(4, 4, 3, -1).transpose(2, 0, 1, 3).reshape(k.shape)),
    ),
    "exact GELU for the quick form": ("CLIP", settings_changed(activation="gelu")),
    "norm of the embeddings left out": ("CLIP", settings_changed(embedding_norm=False)),
    "a final norm too many": ("CLIP", lambda s, p: (
        dataclasses.replace(s, final_norm=True), {**p, "final_norm": {"scale": np.ones(48), "bias": np.zeros(48)}}
    )),
    "tanh for exact GELU": ("EVA", settings_changed(activation="gelu_tanh")),
    "norms before the sublayers": ("EVA", settings_changed(norm="pre")),
    "a bias of the keys taken for the values'": ("EVA", changed("layers/attention/value/bias", np.zeros_like)),
    "class token's position given to the first patch": (
        "EVA", changed("position_embedding", lambda p: np.roll(p, -1, axis=0)),
    ),
    "scale of the latents": ("autoencoder, 4 channels, encode", settings_changed(scale=0.18215)),
    "shift of the latents": ("autoencoder, 16 channels, decode", settings_changed(shift=0.0)),
    "epsilon of GroupNorm": ("autoencoder, 4 channels, encode", settings_changed(eps=1e-5)),
    "groups of GroupNorm": ("autoencoder, 4 channels, decode", settings_changed(groups=4)),
}  # fmt: skip


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files and the exact output of each case, made once."""
    made = {}

    def get(case):
        if case.part not in made:
            folder = tmp_path_factory.mktemp("reference") / "m"
            made[case.part] = folder, case.reference(case.write(folder), "float64")
        return made[case.part]

    return get


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_seen(name, written):
    """Far above the bound of 1e-9, so none could pass for rounding."""
    part, mistake = MISTAKES[name]
    case = case_of(part)
    folder, expected = written(case)
    with jax.enable_x64(True):
        settings, params = mistake(*case.params(folder))
        got = jax.jit(lambda p: case.ours(settings, p, case.inputs, jnp.float64))(params)
    assert parity.relative(got, expected) > 1e-6


def test_asymmetric_padding_is_seen(written, monkeypatch):
    """The autoencoder's strided convolutions pad behind alone: one pixel before as well is another function."""
    from pisces_jax.models import autoencoder

    case = case_of("autoencoder, 4 channels, encode")
    folder, expected = written(case)
    real = autoencoder.Conv
    monkeypatch.setattr(autoencoder, "Conv", lambda *a, padding=None, **k: real(*a, **k))
    with jax.enable_x64(True):
        settings, params = case.params(folder)
        got = jax.jit(lambda p: case.ours(settings, p, case.inputs, jnp.float64))(params)
    assert got.shape == expected.shape and parity.relative(got, expected) > 1e-3


# --- EVA-CLIP against timm


def test_eva_clip_equals_timm(data_folder, tmp_path):
    """The tower of `eva02_enormous_patch14_clip_224`, small and randomly filled, as timm computed it in float32; the
    plain torch of `parity.py` too, which stands for it in float64.

    Two float32 results of different machines differ by the rounding of both. So, as for every part, ours in float32 may
    be twice as far from float64 as the reference's own.
    """
    path = data_folder / "reference/eva_clip_tiny.safetensors"
    stored = load_file(path)
    with safe_open(path, "np") as file:
        given = json.loads(file.metadata()["settings"])
    weights = {k.removeprefix("weights."): v for k, v in stored.items() if k.startswith("weights.")}
    save_file(weights, tmp_path / "model.safetensors")
    arguments = {k: given[k] for k in ("img_size", "embed_dim", "depth", "num_heads", "mlp_ratio")}
    config = dict(architecture="eva02_enormous_patch14_clip_224", model_args=arguments)
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder = Folder.open(f"{tmp_path}/")
    # Its pictures are normalised already, as floats: mean 0 and std 1/255 leave them as they are.
    settings = dataclasses.replace(folder.settings, mean=(0.0,) * 3, std=(1 / 255,) * 3)
    images, expected = stored["images"].transpose(0, 2, 3, 1), stored["block_outputs_last"][:, 1:]
    params = read_part(folder, part_shapes(settings))
    run = jax.jit(lambda p, x: parity.vectors(settings, p, x, jnp.float32), compiler_options=parity.OPTIMISED)
    got = run(params, images)

    s = folder.settings
    plain = parity.Eva(s.image_size, s.patch_size, s.width, s.heads, s.mlp_hidden, s.layers)
    plain.load_state_dict({k: torch.as_tensor(v) for k, v in weights.items()}, strict=False)
    with torch.no_grad():
        again = plain(torch.as_tensor(stored["images"])).numpy()
        exact = plain.double()(torch.as_tensor(stored["images"]).double()).numpy()
    own = parity.relative(expected, exact)
    assert own < 2e-6  # 1.3e-6 of the stored file, on any machine
    assert parity.relative(got, exact) <= 2 * own and parity.relative(again, exact) <= 2 * own
    with jax.enable_x64(True):
        got = jax.jit(lambda p, x: parity.vectors(settings, p, x, jnp.float64))(params, images.astype(np.float64))
    assert parity.relative(got, exact) < 1e-9


# --- config.json


@pytest.mark.parametrize(
    "family, kind",
    [
        ("llama", LlamaConfig), ("qwen2", Qwen2Config), ("siglip", SiglipVisionConfig), ("clip", CLIPVisionConfig),
        ("autoencoder", AutoencoderKL),
    ],
)  # fmt: skip
def test_what_files_leave_out_is_what_their_libraries_take(family, kind):
    theirs = AutoencoderKL().config if kind is AutoencoderKL else kind().to_dict()
    for key, value in config_json.DEFAULTS[family].items():
        assert theirs[key] == value, key
    if family == "llama":
        assert theirs["rope_parameters"] == {"rope_theta": 10_000.0, "rope_type": "default"}
    if family == "qwen2":
        text = Qwen2_5_VLConfig().get_text_config().to_dict()
        for key, value in {**config_json.DEFAULTS[family], **language_json.QWEN_VL}.items():
            assert text.get(key, value) == value, key


def test_the_original_length_of_llama3_scaling_is_found_as_in_transformers(tmp_path):
    scaling = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    inside = dict(scaling, original_max_position_embeddings=32)
    for rope, more in (
        (scaling, dict(max_position_embeddings=512)),
        (scaling, {}),
        (scaling, dict(original_max_position_embeddings=64)),
        (inside, dict(original_max_position_embeddings=64)),
        (inside, dict(max_position_embeddings=512)),
    ):
        values = dict(model_type="llama", rope_scaling=rope, rope_theta=5e5, **more)
        (tmp_path / "config.json").write_text(json.dumps(values))
        theirs = LlamaConfig.from_pretrained(tmp_path)
        theirs.standardize_rope_params()
        ours = read_architecture(tmp_path)[1].rope_scaling.original_max_position
        assert ours == theirs.rope_parameters["original_max_position_embeddings"]


# --- preprocessing


@pytest.mark.parametrize("size", [(37, 61), (640, 427), (427, 640), (500, 500), (384, 384), (33, 1201), (449, 448)])
def test_preprocessing_equals_the_reference_processors(size):
    """SigLIP at 384 and CLIP at 448: at most 1/255 in any pixel, before and after normalisation."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    width, height = size
    yy, xx = np.mgrid[:height, :width]
    image = np.random.default_rng(0).integers(0, 120, (height, width, 3)) + ((xx // 7 + yy // 5) % 2 * 120)[..., None]
    image = image.astype(np.uint8)
    siglip = SiglipImageProcessorPil(size={"height": 384, "width": 384}, resample=3)
    clip = CLIPImageProcessorPil(size={"shortest_edge": 448}, crop_size={"height": 448, "width": 448})
    for processor, pixels, stretch, mean, std in (
        (siglip, 384, True, (0.5,) * 3, (0.5,) * 3), (clip, 448, False, parity.MEAN, parity.STD)
    ):  # fmt: skip
        expected = processor(Image.fromarray(image), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
        ours = fit(image, pixels, stretch)
        got = np.asarray(layers.normalize_picture(jnp.asarray(ours)[None], mean, std, jnp.float32))[0]
        assert got.shape == expected.shape
        # An eighth of a step of 1/255, on the scale of the pixels.
        assert np.abs(got - expected).max() * min(std) < 1 / 255 / 8


# --- out again


def test_an_exported_model_writes_the_same_text_in_transformers(tmp_path):
    """The folder opens unchanged, and greedy generation gives the same tokens as ours, padding and all."""
    from test_weights import LLAMA as small
    from test_weights import filled

    settings = dataclasses.replace(small, vocab_size=59, vocab_multiple=32, layers=2)
    params = jax.tree.map(lambda x: x * 0.5, filled(settings))
    export_part(tmp_path / "out", "language_model", settings, params)
    reference, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    prompt = np.array([[3, 14, 15, 9, 2, 6]])
    expected = reference.generate(
        torch.as_tensor(prompt), max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    ).numpy()
    assert expected.shape == (1, 30) and len(set(expected[0])) > 8
    logits = jax.jit(lambda p, x: parity.logits(settings, p, x, jnp.float32))
    tokens = np.zeros((1, 30), int)
    tokens[:, :6] = prompt
    for t in range(6, 30):
        tokens[0, t] = int(np.argmax(logits(params, tokens)[0, t - 1]))
    np.testing.assert_array_equal(tokens, expected)


def test_exported_encoders_open_in_transformers(tmp_path):
    from test_weights import PARTS, filled
    from transformers import SiglipVisionModel

    settings = PARTS["siglip"]
    params = filled(settings)
    export_part(tmp_path / "s", "understanding_encoder", settings, params)
    reference, loading = SiglipVisionModel.from_pretrained(tmp_path / "s", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    images = parity.pictures(settings.image_size, 2)
    with torch.no_grad():
        pixels = parity.pixels(images, settings.mean, settings.std, torch.float32)
        expected = reference(pixels).last_hidden_state.numpy()
    got = jax.jit(lambda p, x: parity.vectors(settings, p, x, jnp.float32))(params, images)
    assert parity.relative(got, expected) < 1e-4
