"""Runs that start from published folders: decoder and unified model, then reading, drawing and export."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file
from test_weights import PARTS, assert_same, filled, read
from tiny import llama_tokenizer
from transformers import AutoConfig, GenerationConfig

from pisces_jax import convert
from pisces_jax.data.example import Picture, Text
from pisces_jax.data.tokenizers import open_tokenizer
from pisces_jax.inference.model import load_model
from pisces_jax.training import checkpoints
from pisces_jax.training.checkpoints import load_part
from pisces_jax.training.config import merge, run_config
from pisces_jax.training.config_files import load_stages
from pisces_jax.training.loop import train
from pisces_jax.training.stages import check_stages
from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command
from pisces_jax.weights.export import export_part
from pisces_jax.weights.sizes import settings

LLAMA, SIGLIP, EVA, AUTOENCODER = (PARTS[name] for name in ("llama", "siglip", "eva", "autoencoder"))


def published(folder):
    """Folders as their publishers make them, with a tokenizer beside the language model."""
    bare = llama_tokenizer(folder / "tokenizer.json")
    language = dataclasses.replace(LLAMA, vocab_size=bare.get_vocab_size(), layers=1)
    made = {}
    for name, config in (("llama", language), ("siglip", SIGLIP), ("eva", EVA), ("autoencoder", AUTOENCODER)):
        made[name] = filled(config)
        export_part(folder / name, name, config, made[name])
    (folder / "tokenizer.json").rename(folder / "llama/tokenizer.json")
    return language, made


def sources(task):
    source = dict(kind="shapes", task=task, num_examples=32, size=16)
    return dict(train={task: dict(source, split="train")}, evaluate={task: dict(source, split="val")})


def runs(folder, language):
    """A latent decoder and a stage, as `configs/pisces_8b/` has them, small."""
    encoder = dict(generation_encoder=settings(EVA), pool=3)
    decoder = run_config(
        name="decoder", program="decoder", steps=1, batch_size=8,
        model=dict(
            encoder, autoencoder=settings(AUTOENCODER),
            decoder=dict(size=6, patch_size=2, channels=4, width=16, layers=1, heads=2, mlp_hidden=24),
        ),
        init_from=dict(generation_encoder=f"{folder}/eva", autoencoder=f"{folder}/autoencoder"),
        param_dtype=dict(generation_encoder="bfloat16"), flow=dict(steps=2),
        data=dict(tokenizer=f"{folder}/llama", text_length=128, **sources("pair")),
        optimizer=dict(param_groups=(("(generation_encoder|autoencoder)/.*", 0.0, 0.0), (".*", 1.0, 0.0))),
    )  # fmt: skip
    unified = run_config(
        name="stage1", program="unified", steps=1, batch_size=8, decoder="decoder",
        model=dict(
            encoder, understanding_encoder=settings(SIGLIP), hidden=dict(projector=16, vector_head=16),
            language_model=settings(language, vocab_multiple=256),
        ),
        init_from=dict(
            language_model=f"{folder}/llama", understanding_encoder=f"{folder}/siglip",
            generation_encoder=f"{folder}/eva",
        ),
        data=dict(
            tokenizer=f"{folder}/llama", row_length=160, read_slots=1, draw_slots=1, read_stretch=True,
            **sources("describe"),
        ),
        optimizer=dict(param_groups=(("(generation|understanding)_encoder/.*", 0.0, 0.0), (".*", 1.0, 0.0))),
    )  # fmt: skip
    return {"decoder": decoder, "stage1": unified}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    language, made = published(folder)
    stages = runs(folder, language)
    check_stages(stages, folder / "run")
    for config in stages.values():
        train(config, folder / "run")
    return folder, made


def test_frozen_parts_are_the_published_ones(trained):
    folder, made = trained
    assert_same(load_part(folder / "run", "stage1", "understanding_encoder"), made["siglip"])
    assert_same(load_part(folder / "run", "stage1", "generation_encoder"), made["eva"])
    assert_same(load_part(folder / "run", "decoder", "autoencoder"), made["autoencoder"])


def test_what_was_trained_whole_is_not_read_elsewhere(trained, monkeypatch):
    """A stage's language model is in its own checkpoint; the runs and folders before it need not exist any more."""
    folder, _ = trained
    expected = load_part(folder / "run", "stage1", "language_model")

    def gone(*_):
        raise AssertionError("read again")

    monkeypatch.setattr(checkpoints, "read_source", gone)
    assert_same(load_part(folder / "run", "stage1", "language_model"), expected)
    with pytest.raises(AssertionError, match="read again"):
        load_part(folder / "run", "stage1", "understanding_encoder")  # frozen


def test_a_run_on_texts_alone_is_exported(trained, tmp_path, monkeypatch):
    folder, made = trained
    turns = [dict(role="user", content="which colour?"), dict(role="assistant", content="red")]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(dict(messages=turns)) + "\n" for _ in range(16)))
    source = dict(kind="json", path=f"{tmp_path}/chats.jsonl", recipe="conversation")
    language = dataclasses.replace(LLAMA, vocab_size=llama_rows(folder) - 4, layers=1)
    config = run_config(
        name="text", steps=1, batch_size=8,
        model=dict(language_model=settings(language)), init_from=dict(language_model=f"{folder}/llama"),
        data=dict(tokenizer=f"{folder}/llama", row_length=64, train=dict(chats=source)),
        optimizer=dict(learning_rate=0.0),
    )  # fmt: skip
    train(config, tmp_path / "run")
    flags = ["export", f"--workdir={tmp_path}/run", "--run=text", f"--out={tmp_path}/out"]
    monkeypatch.setattr(cli, "arguments", lambda: flags)
    run_command(convert.main)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["language_model"]
    exported = load_file(tmp_path / "out/language_model/model.safetensors")
    rows = made["llama"]["embedding"].shape[0]
    embedding = exported["model.embed_tokens.weight"]
    assert embedding.shape[0] == rows + 4
    np.testing.assert_array_equal(embedding[:rows], made["llama"]["embedding"])


def llama_rows(folder):
    return json.loads((folder / "llama/config.json").read_text())["vocab_size"] + 4


def test_the_language_model_starts_from_the_published_one(trained):
    """After one step of AdamW without decay every value lies within the learning rate of where it started."""
    folder, made = trained
    trained_part = flatten_dict(load_part(folder / "run", "stage1", "language_model"), sep="/")
    rows = made["llama"]["embedding"].shape[0]
    for name, start in flatten_dict(made["llama"], sep="/").items():
        got = np.asarray(trained_part[name])
        if name in ("embedding", "head"):
            assert got.shape[0] == 512 and not got[rows + 4 :].any()  # padding stays zero
            np.testing.assert_allclose(got[rows : rows + 4], np.tile(start.mean(0), (4, 1)), atol=1.5e-3)
            got = got[:rows]
        np.testing.assert_allclose(got, start, atol=1.5e-3)
        assert not np.array_equal(got, start), name


def test_it_reads_draws_and_is_exported(trained, tmp_path, monkeypatch):
    folder, made = trained
    model = load_model(folder / "run", batch_size=2)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    assert isinstance(model.answer([[Picture(image, "read"), Text("what?")]], max_tokens=4)[0], str)
    drawn = model.draw([[Text("draw: a circle")]], describe=False)[0]
    assert drawn.image.shape == (12, 12, 3) and drawn.vectors.shape == (1, 16)

    for flags in (["export", f"--workdir={folder}/run", f"--out={tmp_path}/out"],):
        monkeypatch.setattr(cli, "arguments", lambda flags=flags: flags)
        run_command(convert.main)
    parts = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert parts == [
        "autoencoder", "decoder", "generation_encoder", "generation_projector", "language_model",
        "understanding_encoder", "understanding_projector", "vector_head",
    ]  # fmt: skip
    assert_same(read(tmp_path / "out/generation_encoder", EVA), made["eva"])
    # It stops in transformers where it stops here.
    tokens = open_tokenizer(tmp_path / "out/language_model")
    theirs = GenerationConfig.from_pretrained(tmp_path / "out/language_model")
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (tokens.bos, tokens.eos, tokens.pad)
    assert theirs.suppress_tokens == sorted(tokens.special - {tokens.eos})
    assert AutoConfig.from_pretrained(tmp_path / "out/language_model").eos_token_id == tokens.eos
    monkeypatch.setattr(
        cli, "arguments", lambda: ["import", f"--from={tmp_path}/out/decoder/", f"--out={tmp_path}/again"]
    )
    run_command(convert.main)
    assert (tmp_path / "again/model.safetensors").read_bytes() == (
        tmp_path / "out/decoder/model.safetensors"
    ).read_bytes()


def test_mistakes_are_told_before_anything_runs(trained, tmp_path):
    folder, _ = trained
    language = dataclasses.replace(LLAMA, vocab_size=llama_rows(folder) - 4, layers=1)

    def check(stage, changes):
        config = runs(folder, language)[stage]
        merge(config, changes)
        check_stages({stage: config}, tmp_path / "run")

    with pytest.raises(UserError, match="is not a directory"):
        check("decoder", dict(init_from=dict(autoencoder=f"{folder}/nowhere")))
    with pytest.raises(UserError, match=r"language_model does not fit .*the kind"):
        check("stage1", dict(init_from=dict(language_model=f"{folder}/siglip")))
    with pytest.raises(UserError, match=r"autoencoder.* does not fit .*the kind"):
        check("decoder", dict(init_from=dict(autoencoder=f"{folder}/eva")))
    config = runs(folder, language)["decoder"]
    config.model.autoencoder.scale = 0.5
    with pytest.raises(UserError, match=r"scale \(0.13 there, 0.5 in the config\)"):
        check_stages({"decoder": config}, tmp_path / "run")
    config.model.decoder.channels = 5
    with pytest.raises(UserError, match="channels is 5 and .* has 4 latent channels"):
        check_stages({"decoder": config}, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("config", ["8b", "1b"])
def test_full_size_configs_are_whole(config):
    """Every stage has the parts that it needs; frozen ones have a start; pictures become 8×8 vectors."""
    from pisces_jax.training import optimizer
    from pisces_jax.training.programs import make_program

    folder = Path(__file__).resolve().parent.parent / "configs" / f"pisces_{config}"
    paths = [path for path in sorted(folder.glob("*.py")) if path.stem != "parts"]  # what the configs share
    of_one_gpu = {"8b": ["stage1_1gpu", "stage1_lora"], "1b": ["stage1_lora"]}[config]
    assert [path.stem for path in paths] == ["decoder", "stage1", *of_one_gpu, "stage2", "stage3"]
    for path in paths:
        (run,) = load_stages(str(path), {}).values()
        assert run.name == path.stem
        program = make_program(run, 128_260)
        names = [
            "/".join(k.key for k in keys if hasattr(k, "key"))
            for keys, _ in jax.tree_util.tree_leaves_with_path(jax.eval_shape(program.init, jax.random.key(0)))
        ]
        rules = optimizer.match(optimizer.read_table(run.optimizer.param_groups), names)
        frozen = {name.split("/")[0] for name, rule in rules.items() if not rule.multiple}
        assert frozen <= set(run.init_from) and "generation_encoder" in frozen
        if run.program == "unified":
            assert program.model.config.draw_vectors == 64 and program.model.config.read_vectors == 729
            assert program.model.config.language_model.vocab_rows == 128_512
