"""BLIP3-o's released folder: opened, imported, drawn from, tuned; the whole way against its references.

`blip3o_folder.py` writes a tiny one. The pipeline here is put together of transformers' Qwen2.5-VL and diffusers'
`LuminaNextDiT2DModel`, `UNet2DConditionModel`, `AutoencoderKL` and schedulers, as BLIP3-o's own code runs them.
"""

import contextlib
import dataclasses
import json
import pickle
import shutil
from unittest import mock

import blip3o_folder
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.numpy import load_file, save_file

from pisces_jax.data.example import Example, Picture, Text
from pisces_jax.data.instructions import BLIP3O_INSTRUCTION, draw_instruction
from pisces_jax.data.packing.layout import lay_out
from pisces_jax.data.qwen import QwenTokenizer
from pisces_jax.data.tokenizers import open_tokenizer
from pisces_jax.inference import model as models
from pisces_jax.inference.decode import noise_of
from pisces_jax.inference.model import NULL_SEED, load_model
from pisces_jax.utils.errors import UserError

PROMPT = "a red circle left of a blue square"
FLOW_STEPS, STEPS = 6, 4  # of thirty and fifty: `test_flow_head.py` and `test_unet.py` have the whole schedules
torch.set_num_threads(1)


@contextlib.contextmanager
def lifted():
    """As `parity.lifted`, for schedulers, which compute in NumPy too."""
    with parity.lifted(), mock.patch.object(np, "float32", np.float64):
        yield


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """(the folder, the references that it is made of)."""
    folder = tmp_path_factory.mktemp("blip3o") / "BLIP3o-Tiny"
    return folder, blip3o_folder.write(folder)


@pytest.fixture(scope="module")
def drawn(released):
    """(the model in float64, its drawings of two prompts)."""
    with jax.enable_x64(True):
        model = load_model(released[0], batch_size=2, dtype="float64")
        assert (model.vector_flow.steps, model.vector_flow.guidance, model.flow.steps, model.flow.guidance) == (
            30,
            3,
            50,
            3,
        )
        model.vector_flow = dataclasses.replace(model.vector_flow, steps=FLOW_STEPS)
        model.flow = dataclasses.replace(model.flow, steps=STEPS)
        asked = [(Text(draw_instruction(words, BLIP3O_INSTRUCTION)),) for words in (PROMPT, "two dogs")]
        return model, model.draw(asked, describe=False, seed=5)


# --- the pipeline of the references


def noise(seed, number, network):
    """The noise of picture `number` of a seed, [C, s, s]."""
    with jax.enable_x64(True):
        key = jax.random.fold_in(jax.random.key(seed), number)
        return np.asarray(noise_of(key[None], network)[0]).transpose(2, 0, 1).astype(np.float64)


def vectors_noise(model, seed, number):
    with jax.enable_x64(True):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), number), models.NOISE)
        c = model.pisces.config.generator
        shape = (c.size, c.size, c.channels)
        return np.asarray(jax.random.normal(key, shape, jnp.float32)).transpose(2, 0, 1).astype(np.float64)


def states_of(made, ids, wrong):
    """States after the final norm at the queries."""
    language = made["language"].model.language_model
    queries = made["generator"].model.latent_queries
    if "queries reversed" in wrong:
        queries = queries.flip(1)
    x = torch.cat([language.embed_tokens(torch.tensor([ids])), queries], dim=1)
    hidden = language(inputs_embeds=x, use_cache=False).last_hidden_state
    end = -1 if "states one position early" in wrong else None
    return hidden[:, -blip3o_folder.VECTORS + (end or 0) : end]


def vectors_of(made, states, first, wrong=(), steps=FLOW_STEPS, guidance=3.0):
    """Euler steps of the generator from noise, in the order [zeros, condition]."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps))
    both = torch.cat([torch.zeros_like(states), states])
    if "guidance on the wrong side" in wrong:
        both = both.flip(0)
    x = torch.as_tensor(first)[None]
    for t in scheduler.timesteps:
        # Cut to whole numbers, as in float32, where 200 and 100 are not just below themselves as they are here.
        time = t if "times not cut" in wrong else (t + 1e-6).long().double()
        null, conditional = made["generator"](x.repeat(2, 1, 1, 1), time.expand(2), both).chunk(2)
        x = scheduler.step(null + guidance * (conditional - null), t, x).prev_sample
    if "rows and columns exchanged" in wrong:
        x = x.transpose(2, 3)
    return x.reshape(1, x.shape[1], -1).permute(0, 2, 1)


def picture_of(made, vectors, null, first, wrong=(), steps=STEPS, guidance=3.0):
    """Steps of the U-Net in the order [condition, unconditional], and the autoencoder."""
    scheduler = EulerDiscreteScheduler(**blip3o_folder.SCHEDULER)
    scheduler.set_timesteps(steps)
    if "null of zeros" in wrong:
        null = torch.zeros_like(null)
    both = torch.cat([vectors, null])
    pooled = both.flatten(1)[:, : both.shape[2]] if "first vector for the mean" in wrong else both.mean(1)
    size = made["unet"].config.sample_size * 2
    sizes = [size, size, 0, 0, size, size]
    if "sizes swapped" in wrong:
        sizes = [0, 0, size, size, size, size]
    added = {"text_embeds": pooled, "time_ids": torch.tensor([sizes, sizes]).double()}
    x = torch.as_tensor(first)[None]
    if "initial sigma left out" not in wrong:
        x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(torch.cat([x] * 2), t)
        if "input not scaled" in wrong:
            scaled = torch.cat([x] * 2)
        out = made["unet"](scaled, t, both, added_cond_kwargs=added).sample
        conditional, unconditional = out.chunk(2)
        x = scheduler.step(unconditional + guidance * (conditional - unconditional), t, x).prev_sample
    scale = 1.0 if "scaling factor left out" in wrong else made["vae"].config.scaling_factor
    return made["vae"].decode(x / scale).sample.permute(0, 2, 3, 1)


def ids_of(folder, prompt, wrong=()):
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    ended = "" if "stray end of turn left out" in wrong else "<|im_end|>\n"
    text = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\nPlease generate image based on the following caption: {prompt}<|im_end|>\n"
        f"<|im_start|>assistant\n{ended}"
    )
    return library.encode(text).ids + [library.token_to_id("[IMG]")], library


@pytest.fixture(scope="module")
def pipeline(released, drawn):
    """A function of (stage, mistakes) that gives the vectors or the picture of the first prompt, in float64."""
    folder, made = released
    model = drawn[0]
    copies = {}
    with lifted(), torch.no_grad():
        vocabulary = made["language"].model.language_model.embed_tokens.num_embeddings
        copies = blip3o_folder.references(vocabulary)
        for name, module in copies.items():
            module.load_state_dict(made[name].state_dict())
            module.double()

    def states(prompt, wrong=()):
        changed = copies
        if "biases of q, k and v left out" in wrong:
            changed = {**copies, "language": blip3o_folder.references(vocabulary)["language"].double()}
            changed["language"].load_state_dict(copies["language"].state_dict())
            for name, p in changed["language"].named_parameters():
                if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                    p.data.zero_()
        ids, library = ids_of(folder, prompt, wrong)
        return states_of(changed, ids, wrong), library

    def run(stage, wrong=(), vectors=None, null=None):
        with lifted(), torch.no_grad():
            if stage == "vectors":
                given, _ = states(PROMPT, wrong)
                return vectors_of(copies, given, vectors_noise(model, 5, 0), wrong).numpy()
            if stage == "null":
                _, library = states(PROMPT)
                ids = [*library.encode(" ").ids, library.token_to_id("[IMG]")]
                return vectors_of(copies, states_of(copies, ids, ()), vectors_noise(model, NULL_SEED, 0)).numpy()
            first = noise(5 + models.DECODING, 0, model._decoder.network)
            return picture_of(copies, torch.tensor(vectors), torch.tensor(null), first, wrong).numpy()

    return run


def test_the_whole_way_equals_the_references(drawn, pipeline):
    """The same noise in, the same picture out: vectors within 1e-9, the picture's numbers too, its bytes exactly."""
    model, drawings = drawn
    expected = pipeline("vectors")[0]
    assert parity.relative(drawings[0].vectors, expected) < 1e-9
    (null,) = model._nulls.values()
    assert parity.relative(null, pipeline("null")) < 1e-9
    signal = pipeline("picture", vectors=expected[None], null=np.asarray(null))[0]
    bytes_ = np.round((np.clip(signal, -1, 1) + 1) * 127.5).astype(np.uint8)
    np.testing.assert_array_equal(drawings[0].image, bytes_)
    with jax.enable_x64(True):
        first = noise(5 + models.DECODING, 0, model._decoder.network).transpose(1, 2, 0)[None]
        draw = jax.jit(model._decoder.draw, static_argnums=4)
        got = draw(model.decoder_params, expected[None], np.asarray(null), first, model.flow)
    assert parity.relative(got[0], signal) < 1e-9


WRONG_VECTORS = (
    "biases of q, k and v left out", "guidance on the wrong side", "times not cut", "rows and columns exchanged",
    "stray end of turn left out", "queries reversed", "states one position early",
)  # fmt: skip
WRONG_PICTURES = (
    "null of zeros", "first vector for the mean", "sizes swapped", "initial sigma left out", "input not scaled",
    "scaling factor left out",
)  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG_VECTORS)
def test_mistakes_on_the_way_to_the_vectors_are_seen(wrong, drawn, pipeline):
    assert parity.relative(drawn[1][0].vectors, pipeline("vectors", (wrong,))[0]) > 1e-6


@pytest.mark.parametrize("wrong", WRONG_PICTURES)
def test_mistakes_on_the_way_to_the_picture_are_seen(wrong, drawn, pipeline):
    model, drawings = drawn
    (null,) = model._nulls.values()
    signal = pipeline("picture", (wrong,), drawings[0].vectors[None], np.asarray(null))[0]
    bytes_ = np.round((np.clip(signal, -1, 1) + 1) * 127.5)
    assert np.abs(drawings[0].image - bytes_).max() >= 1


# --- drawing


def test_a_seed_is_a_picture_in_any_batch(drawn):
    model, drawings = drawn
    asked = (Text(draw_instruction(PROMPT, BLIP3O_INSTRUCTION)),)
    with jax.enable_x64(True):
        alone = model.draw([asked], describe=False, seed=5)
        seeded = model.draw([(Text("two dogs"),), asked, asked], describe=False, seeds=[1, 5, 7])
    np.testing.assert_allclose(alone[0].vectors, drawings[0].vectors, rtol=1e-9)
    np.testing.assert_array_equal(alone[0].image, drawings[0].image)
    np.testing.assert_array_equal(seeded[1].image, alone[0].image)
    assert np.abs(seeded[2].vectors - seeded[1].vectors).max() > 1e-3


def test_reading_pictures_is_refused(drawn):
    model, _ = drawn
    picture = np.zeros((8, 8, 3), np.uint8)
    with jax.enable_x64(True):
        with pytest.raises(UserError, match="reads no pictures here: its vision tower .* is not part of this project"):
            model.answer([(Picture(picture, "read"), Text("what is it?"))])
        with pytest.raises(UserError, match="without its generation encoder"):
            model.draw([(Text("a"), Picture(picture, "draw"), Text("b"))], describe=False)
