"""BLIP3-o's released folder: opened, imported, drawn from, tuned; the whole way against its references.

`blip3o_folder.py` writes a tiny one. The pipeline here is put together of transformers' Qwen2.5-VL and diffusers'
`LuminaNextDiT2DModel`, `UNet2DConditionModel`, `AutoencoderKL` and schedulers, as BLIP3-o's own code runs them.
"""

import contextlib
import dataclasses
import functools
import json
import os
import pickle
import shutil
from pathlib import Path
from unittest import mock

import blip3o_folder
import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from safetensors.numpy import load_file, save_file
from test_weights import filled
from transformers import AutoTokenizer

from pisces_jax import convert
from pisces_jax.data.example import Example, Picture, Text
from pisces_jax.data.instructions import BLIP3O_INSTRUCTION, draw_instruction
from pisces_jax.data.packing.layout import lay_out
from pisces_jax.data.qwen import QwenTokenizer
from pisces_jax.data.tokenizers import open_tokenizer
from pisces_jax.inference import model as models
from pisces_jax.inference.decode import noise_of
from pisces_jax.inference.loading import make_decoder
from pisces_jax.inference.model import NULL_SEED, load_model
from pisces_jax.inference.released import decoder_of_folder, is_released, released_config
from pisces_jax.losses.flow import FlowConfig, told_time
from pisces_jax.models.vit import ViTConfig
from pisces_jax.sharding import make_mesh
from pisces_jax.training.config import build
from pisces_jax.training.loop import starting_parts
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import make_trainer
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.blip3o import PARTS
from pisces_jax.weights.diffusion_decoder import decoder_sources
from pisces_jax.weights.export import export_part, import_folder
from pisces_jax.weights.folder import Folder, flatten, part_shapes, read_part

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
    x = torch.as_tensor(first)[None].to(states.dtype)
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
    x = torch.as_tensor(first)[None].to(vectors.dtype)
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
    return made["vae"].decode(x.to(made["vae"].dtype) / scale).sample.permute(0, 2, 3, 1)


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
    """A function of (stage, mistakes) that gives the vectors or the picture of the first prompt, in float64 or `dtype`.

    As it is run, the autoencoder is never in bfloat16.
    """
    folder, made = released
    model = drawn[0]
    vocabulary = made["language"].model.language_model.embed_tokens.num_embeddings

    def in_force(dtype):
        return lifted() if dtype == "float64" else contextlib.nullcontext()

    @functools.cache
    def copies_in(dtype):
        with in_force(dtype):
            copies = blip3o_folder.references(vocabulary)
            for name, module in copies.items():
                module.load_state_dict(made[name].state_dict())
                if (name, dtype) != ("vae", "bfloat16"):
                    module.to(parity.DTYPES[dtype])
        return copies

    def states(copies, prompt, wrong=()):
        changed = copies
        if "biases of q, k and v left out" in wrong:
            changed = {**copies, "language": blip3o_folder.references(vocabulary)["language"].double()}
            changed["language"].load_state_dict(copies["language"].state_dict())
            for name, p in changed["language"].named_parameters():
                if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias")):
                    p.data.zero_()
        ids, library = ids_of(folder, prompt, wrong)
        return states_of(changed, ids, wrong), library

    def run(stage, wrong=(), vectors=None, null=None, dtype="float64"):
        copies = copies_in(dtype)
        with in_force(dtype), torch.no_grad():
            if stage == "vectors":
                given, _ = states(copies, PROMPT, wrong)
                return vectors_of(copies, given, vectors_noise(model, 5, 0), wrong).double().numpy()
            if stage == "null":
                _, library = states(copies, PROMPT)
                ids = [*library.encode(" ").ids, library.token_to_id("[IMG]")]
                first = vectors_noise(model, NULL_SEED, 0)
                return vectors_of(copies, states_of(copies, ids, ()), first).double().numpy()
            first = noise(5 + models.DECODING, 0, model._decoder.network)
            given = (torch.tensor(x).to(parity.DTYPES[dtype]) for x in (vectors, null))
            return picture_of(copies, *given, first, wrong).double().numpy()

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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"] if os.environ.get("PISCES_LONG_TESTS") else ["float32"])
def test_the_whole_way_errs_at_most_twice_as_much_as_the_references(dtype, released, drawn, pipeline):
    """Each from its own vectors, against float64, as users run it: with optimised code. The vectors of no prompt, made
    in the same way, are given."""
    in_64, drawings = drawn
    (null,) = in_64._nulls.values()
    model = load_model(released[0], batch_size=2, dtype=dtype)
    model._nulls[in_64.vector_flow] = null
    model.vector_flow, model.flow = in_64.vector_flow, in_64.flow
    model._draw = jax.jit(model._draw.__wrapped__, static_argnums=(4, 5), compiler_options=parity.OPTIMISED)
    model.decode = lambda vectors, **_: vectors
    asked = [(Text(draw_instruction(words, BLIP3O_INSTRUCTION)),) for words in (PROMPT, "two dogs")]
    vectors = model.draw(asked, describe=False, seed=5)[0].vectors[None]
    first = noise(5 + models.DECODING, 0, model._decoder.network).transpose(1, 2, 0)[None].astype(np.float32)
    draw = jax.jit(model._decoder.draw, static_argnums=4, compiler_options=parity.OPTIMISED)
    ours = np.asarray(draw(model.decoder_params, vectors, null, first, model.flow))

    exact = drawings[0].vectors[None], pipeline("picture", (), drawings[0].vectors[None], null)
    own = pipeline("vectors", dtype=dtype)
    theirs = own, pipeline("picture", (), own, null, dtype)
    for got, reference, right in zip((vectors, ours), theirs, exact, strict=True):
        assert parity.relative(got, right) <= 2 * parity.relative(reference, right)


def test_the_generator_is_told_whole_times():
    """Those of the published scheduler, in the float32 in which it counts, cut to whole numbers."""
    for steps in (30, 50, 7):
        scheduler = FlowMatchEulerDiscreteScheduler()
        scheduler.set_timesteps(steps, sigmas=np.linspace(1.0, 1 / steps, steps))
        told = 1000 * (1 - told_time(jnp.arange(steps, dtype=jnp.float32) / steps, FlowConfig(grid=1000)))
        np.testing.assert_allclose(told, scheduler.timesteps.long().numpy(), atol=1e-3)


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
        with pytest.raises(UserError, match="reads no pictures .the vision tower of BLIP3-o, .* is not part of this"):
            model.answer([(Picture(picture, "read"), Text("what is it?"))])
        with pytest.raises(UserError, match="without its generation encoder"):
            model.draw([(Text("a"), Picture(picture, "draw"), Text("b"))], describe=False)


# --- the folder: names, tokenizer, import


def parts_of(folder):
    """Every parameter of the three parts, read from a folder in either layout."""
    found = {}
    for part in PARTS:
        opened = Folder.open(f"{folder}/", part)
        shapes = part_shapes(opened.settings) if opened.settings else {"embedding": np.zeros((4, 24))}
        tokens = getattr(opened.settings, "vocab_size", None)
        found |= {(part, k): v for k, v in flatten(read_part(opened, shapes, vocab_size=tokens)).items()}
    return found


@pytest.mark.parametrize("new_names", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_names_of_both_versions_of_transformers(new_names, tied, released, tmp_path):
    """The same settings and numbers under the names of transformers 4 and 5; a tied head is not in the files."""
    blip3o_folder.write(tmp_path / "m", tied=tied, new_names=new_names, shards=1)
    settings = Folder.open(f"{tmp_path}/m/", "language_model").settings
    assert settings == dataclasses.replace(Folder.open(f"{released[0]}/").settings, tied_embedding=tied)
    found, expected = parts_of(tmp_path / "m"), parts_of(released[0])
    assert set(expected) - set(found) == ({("language_model", "head")} if tied else set())
    if not tied:
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_import_writes_every_part_and_draws_the_same(released, tmp_path, capsys, monkeypatch):
    """`convert import`: bit for bit, tokenizer, decoder and scheduler with it; what it writes opens as the model."""
    monkeypatch.setattr("sys.argv", ["convert", "import", f"--from={released[0]}", f"--out={tmp_path}/out"])
    convert.main()
    assert f"{tmp_path}/out" in capsys.readouterr().out
    found, expected = parts_of(tmp_path / "out"), parts_of(released[0])
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    theirs, ours = released_config(released[0]), released_config(tmp_path / "out")
    assert theirs.model == ours.model and is_released(tmp_path / "out")
    tokenizers_ = [open_tokenizer(Path(c.data.tokenizer)) for c in (theirs, ours)]
    assert tokenizers_[0].encode("a red fox") == tokenizers_[1].encode("a red fox")
    decoders = [decoder_of_folder(c.decoder, c) for c in (theirs, ours)]
    assert decoders[0] == decoders[1]
    for part, source in decoder_sources(ours.decoder).items():
        before = Folder.open(decoder_sources(theirs.decoder)[part])
        shapes = part_shapes(before.settings)
        got, wanted = (read_part(folder, shapes) for folder in (Folder.open(source), before))
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def broken(folder, change):
    """A checkpoint without its decoder, changed."""
    shutil.rmtree(folder / "diffusion-decoder")
    change(folder)


def renamed(old, new):
    def change(folder):
        index = folder / "model.safetensors.index.json"
        values = json.loads(index.read_text())
        file = folder / values["weight_map"].pop(old)
        tensors = load_file(file)
        tensors[new] = tensors.pop(old)
        save_file(tensors, file)
        values["weight_map"][new] = file.name
        index.write_text(json.dumps(values))

    return change


def settings_changed(**values):
    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return change


def only_pickles(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({}))


BIAS, DIT = "model.layers.1.self_attn.k_proj.bias", "model.dit.model.layers.1.attn2.norm_k.weight"


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: (f / "model-00002-of-00002.safetensors").unlink(), "lacks model-00002-of-00002.safetensors"),
        (only_pickles, "has only pickles"),
        (settings_changed(model_type="mistral"), "describes 'mistral', which is not supported"),
        (settings_changed(use_sliding_window=True), "use_sliding_window True"),
        (settings_changed(rope_scaling=dict(type="yarn")), "rope_type yarn"),
        (renamed(BIAS, f"{BIAS}es"), r"missing model.layers.1.self_attn.k_proj.bias \(12,\); surplus .*biases"),
        (renamed(DIT, "model.dit.model.extra.weight"), r"missing layers.1.attn2.norm_k.weight \(16,\); surplus extra"),
        (renamed(BIAS, "model.down_projector.weight"), "surplus model.down_projector.weight"),
        (renamed("model.latent_queries", "model.queries"), "model.latent_queries is missing"),
        (settings_changed(hidden_size=32), "must be"),
    ],
    ids=["shard", "pickle", "family", "window", "rope", "bias", "generator", "projector", "queries", "width"],
)
def test_what_is_refused_leaves_nothing_behind(change, said, released, tmp_path):
    """One sentence, and no folder."""
    shutil.copytree(released[0], tmp_path / "m")
    broken(tmp_path / "m", change)
    with pytest.raises(UserError, match=said) as error:
        import_folder(f"{tmp_path}/m", tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_other_folders_are_not_taken_for_the_model(released, tmp_path):
    shutil.copytree(released[0], tmp_path / "m")
    broken(
        tmp_path / "m", lambda folder: [renamed(n, f"visual.{i}")(folder) for i, n in enumerate(all_drawing(folder))]
    )
    with pytest.raises(UserError, match="holds a language model alone: take the queries from a checkpoint of BLIP3-o"):
        released_config(tmp_path / "m")


def all_drawing(folder):
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return [name for name in names if name.startswith(("model.dit.", "model.latent_queries"))]


@pytest.mark.parametrize(
    "file, values, said",
    [
        (
            "scheduler/scheduler_config.json",
            dict(prediction_type="v_prediction"),
            "says prediction_type 'v_prediction'",
        ),
        ("scheduler/scheduler_config.json", dict(_class_name="DDIMScheduler"), "says _class_name 'DDIMScheduler'"),
        ("unet/config.json", dict(cross_attention_dim=24, projection_class_embeddings_input_dim=72), "24 numbers and"),
    ],
)
def test_another_decoder_is_refused(file, values, said, released, tmp_path):
    source = tmp_path / "diffusion-decoder"
    shutil.copytree(released[0] / "diffusion-decoder", source)
    (source / file).write_text(json.dumps({**json.loads((source / file).read_text()), **values}))
    with pytest.raises(UserError, match=said):
        decoder_of_folder(f"{source}", released_config(released[0]))


def test_the_tokenizer_is_qwens(tmp_path):
    """The ids of the library with Qwen2's template, from one file and from those of the slow tokenizer; the three
    tokens of pictures are appended where a file lacks them."""
    library = blip3o_folder.tokenizer(tmp_path / "fast", pictures=False)
    blip3o_folder.tokenizer(tmp_path / "slow", slow=True, pictures=False)
    ours, slow = open_tokenizer(tmp_path / "fast"), open_tokenizer(tmp_path / "slow")
    assert isinstance(ours, QwenTokenizer) and isinstance(slow, QwenTokenizer)
    text = "It's a red fox's 1 23 DEN,  two\n\nlines — Größe 大きさ 🙂"
    assert ours.encode(text) == slow.encode(text) == library.encode(text).ids and ours.decode(ours.encode(text)) == text
    size = library.get_vocab_size()
    assert (ours.begin_image, ours.end_image, ours.image, ours.vocab_size) == (size, size + 1, size + 2, size + 3)
    assert not set(ours.encode("<|im_end|>[IMG]<image>")) & ours.special
    layout = dataclasses.replace(tiny.LAYOUT, length=128)
    shown = lay_out(Example((Text("a fox"), tiny.picture("draw", 0)), "draw"), ours, layout)
    before = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\na fox<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    end = library.token_to_id("<|im_end|>")
    picture = [ours.begin_image, *[ours.image] * 4, ours.end_image, end]
    assert shown.tokens.tolist() == [*library.encode(f"{before}<|im_end|>\n").ids, *picture]
    asked = lay_out(Example((Text("a fox"),), "ask"), ours, layout, prompt=True)
    assert asked.tokens.tolist() == library.encode(before).ids and not asked.loss_mask.any()
    said = lay_out(Example((Text("a fox"), Text("no", learn=True)), "said"), ours, layout)
    assert said.tokens.tolist() == [*library.encode(f"{before}no").ids, end]
    assert said.loss_mask.sum() == len(ours.encode("no")) + 1
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [dict(role="user", content="a fox")]
    made = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert made == before and theirs(made, add_special_tokens=False).input_ids == asked.tokens.tolist()


# --- on several devices, and from one memory to another


@pytest.mark.slow
def test_on_a_mesh_with_parameters_in_turn_the_same_is_drawn(released, drawn):
    """Sharded over fsdp by the rules of all models, each phase's parameters there alone."""
    model, drawings = drawn
    with jax.enable_x64(True):
        mesh = make_mesh(fsdp=2, devices=jax.devices()[:2])
        other = load_model(released[0], batch_size=2, dtype="float64", mesh=mesh, stay=False)
        other.vector_flow, other.flow = model.vector_flow, model.flow
        waiting = jax.tree.leaves((other.params, other.decoder_params))
        assert all(isinstance(x.value, np.ndarray) for x in waiting)
        assert len({str(x.where.spec) for x in waiting}) > 3
        asked = [(Text(draw_instruction(words, BLIP3O_INSTRUCTION)),) for words in (PROMPT, "two dogs")]
        again = other.draw(asked, describe=False, seed=5)
    for got, wanted in zip(again, drawings, strict=True):
        assert parity.relative(got.vectors, wanted.vectors) < 1e-9
        assert np.abs(got.image.astype(int) - wanted.image).max() <= 1


def test_a_run_draws_with_the_released_decoder(released):
    """`decoder` names the folder, for vectors of the same width; guidance takes the run's own for no prompt."""
    config = released_config(released[0])
    assert config.decoder.endswith("diffusion-decoder")
    del config.model.generator
    config.model.update(hidden=dict(projector=24, vector_head=24), fed_vectors=True)
    decoder, how = make_decoder(released[0], config)
    assert decoder.takes_null and decoder.size == 16 and (how.steps, how.guidance) == (50, 3.0)
    config.model.generation_encoder.width = 32
    with pytest.raises(UserError, match="draws from vectors of 16 numbers and model.generation_encoder gives 32"):
        make_decoder(released[0], config)


# --- tuning


def test_tuning_starts_from_the_folder_and_keeps_the_language_model(released, tmp_path):
    """Frozen parts are the folder's, bit for bit, before and after steps; queries and generator train from it."""
    made = released_config(released[0])
    encoder = build(ViTConfig, made.model.generation_encoder, "")
    export_part(tmp_path / "eva", "generation_encoder", encoder, filled(encoder))
    frozen = (("(language_model|generation_encoder)/.*", 0.0, 0.0), (".*", 1.0, 0.0))
    config = tiny.config(
        program="unified", batch_size=2, model=made.model.to_dict(),
        init_from=dict(made.init_from, generation_encoder=f"{tmp_path}/eva"),
        data=dict(tokenizer=made.data.tokenizer, row_length=64, draw_slots=2, features="features", train={"a": {}}),
        loss=dict(text=0.0), vector_flow=made.vector_flow.to_dict(),
        optimizer=dict(param_groups=frozen, learning_rate=1e-2),
    )  # fmt: skip
    tokenizer = load_tokenizer(config, tmp_path)
    trainer = make_trainer(make_program(config, tokenizer.vocab_size), config, make_mesh(devices=jax.devices()[:1]))
    parts = starting_parts(config, tmp_path, trainer, tokenizer)
    files = parts_of(released[0])
    for part in PARTS:
        for name, x in flatten(parts[part]).items():
            np.testing.assert_array_equal(x, files[part, name])
    state = trainer.init(jax.random.key(0), parts)
    assert set(trainer.abstract.trained) == {"queries", "generator"}
    before = jax.device_get((state.trained, state.frozen))
    rng = np.random.default_rng(0)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in trainer.abstract_batch().items()}
    batch["tokens"] += rng.integers(0, 200, batch["tokens"].shape).astype(np.int32)
    batch["segment_ids"] += 1
    batch["positions"] += np.arange(64, dtype=np.int32)
    batch["draw_start"] += np.array([10, 40], np.int32)
    batch["draw_valid"] = np.ones_like(batch["draw_valid"])
    batch["draw_features"] = rng.standard_normal(batch["draw_features"].shape).astype(np.float32)
    step = trainer.train_step()
    for _ in range(2):
        state, metrics = step(state, trainer.put(batch))
    assert metrics["vectors"].compute() > 0
    jax.tree.map(np.testing.assert_array_equal, before[1], jax.device_get(state.frozen))
    for part, tree in jax.device_get(state.trained).items():
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (tree, before[0][part])), strict=True)), part
