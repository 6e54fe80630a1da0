"""Cached features: the same numbers as from pictures, whole shards or none, the same by any processes."""

import json
import os
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny_config
from PIL import Image

from pisces_jax.data import feature_cache as cached
from pisces_jax.data.example import FILE_GONE, BrokenExample, Example, Picture, Text
from pisces_jax.data.images import UnreadablePicture
from pisces_jax.data.packing.layout import Entry
from pisces_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from pisces_jax.models.layers import apply
from pisces_jax.models.vit import ViT, pooled_features
from pisces_jax.training import checkpoints, input, programs
from pisces_jax.training import feature_cache as features
from pisces_jax.training.config import vit_config
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.export import export_part

AUTOENCODER = dict(latent_channels=4, channels=(8, 16), blocks=1, groups=4, scale=0.13, shift=0.06)


def config_of(stage):
    """Of the tiny stages, or of a decoder that makes latents."""
    config = tiny_config.get_config("decoder" if stage == "latent" else stage)
    if stage == "unified":
        del config.init_from["decoder"]
        config.train_decoder = False  # it learns from pictures, and there are none
    if stage == "latent":
        config.model.autoencoder = AUTOENCODER
        config.model.decoder.update(size=8, channels=4)
        config.init_from.autoencoder = "published"
    return config


@pytest.fixture(scope="module")
def params():
    """Random parameters of every part, the encoder's the same in all programs."""
    made = {}
    for stage in ("decoder", "latent", "unified"):
        program = programs.make_program(config_of(stage), 300)
        made[stage] = jax.tree.map(np.asarray, jax.jit(program.init)(jax.random.key(0)))
        made[stage] = jax.tree.map(lambda x: getattr(x, "value", x), made[stage], is_leaf=lambda x: hasattr(x, "value"))
    for stage in ("latent", "unified"):
        made[stage]["generation_encoder"] = made["decoder"]["generation_encoder"]
    return made


@pytest.fixture
def run(monkeypatch, params):
    monkeypatch.setattr(features, "load_part", lambda workdir, name, part: params["latent"][part])
    monkeypatch.setattr(features, "part_mark", lambda workdir, name, part: "as it was")
    monkeypatch.setattr(features, "SHARD", 16)
    monkeypatch.setattr(cached, "SHARD", 16)

    def make(stage, **data):
        config = config_of(stage)
        config.data.update(data)
        return config

    return make


def expected(config, params, entry, i):
    vit = ViT(vit_config(config, "generation_encoder"))
    image = cached.cached_picture(entry.source[i]).array()
    return np.asarray(pooled_features(apply(vit, params["decoder"]["generation_encoder"], image[None]), 2)[0])


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_features_are_the_encoders_and_survive_interruption(run, params, tmp_path, monkeypatch):
    config = run("decoder", features="features")
    entries = input.entries_of(config.data.train)
    features.cache_features(config, tmp_path / "a", entries, "float32", 8)
    (cache,) = features.open_caches(config, tmp_path / "a", entries)["features"]
    for i in (0, 1, 15, 16, 63):
        np.testing.assert_allclose(cache[i], expected(config, params, entries[0], i), atol=1e-5)
    # Stopped in its third shard, and begun again: nothing half-written, nothing done twice, the same end.
    write, written = cached.FeatureCache.write, []

    def stop(self, shard, records):
        if shard == 2 and len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard)
        write(self, shard, records)

    monkeypatch.setattr(cached.FeatureCache, "write", stop)
    with pytest.raises(KeyboardInterrupt):
        features.cache_features(config, tmp_path / "b", entries, "float32", 8)
    with pytest.raises(UserError, match="lacks 2 of 4 shards of cached features: run python -m pisces_jax.cache"):
        features.open_caches(config, tmp_path / "b", entries)
    written.append("again")
    features.cache_features(config, tmp_path / "b", entries, "float32", 8)
    assert written == [0, 1, "again", 2, 3]
    # Two processes, each with its own shards.
    for process in range(2):
        features.cache_features(config, tmp_path / "c", entries, "float32", 8, share=(process, 2))
    assert contents(tmp_path / "a") == contents(tmp_path / "b") == contents(tmp_path / "c")
    assert len(contents(tmp_path / "a")) == 2 * 5  # each file has its checksum beside it


def test_pictures_of_another_size_are_others(run, tmp_path):
    """Their texts and keys are the same."""
    config = run("decoder", features="features")
    for size in (8, 16):
        config.data.train = dict(pair=dict(kind="shapes", task="pair", num_examples=16, size=size))
        features.cache_features(config, tmp_path, input.entries_of(config.data.train), "float32", 8)
    assert len(contents(tmp_path)) == 2 * 2 * 2  # of each one shard, and what it is of, with their checksums


def test_another_encoder_or_form_is_refused(run, tmp_path):
    config = run("decoder", features="features")
    entries = input.entries_of(config.data.train)
    with pytest.raises(UserError, match="lacks 4 of 4"):
        features.open_caches(config, tmp_path, entries)
    features.cache_features(config, tmp_path, entries, "bfloat16", 8)
    for change, message in ((dict(pool=4), "another encoder or pooling"),):
        config.model.update(change)
        with pytest.raises(UserError, match=message):
            features.open_caches(config, tmp_path, entries)
    with pytest.raises(UserError, match="choose one of float32, bfloat16"):
        features.cache_features(config, tmp_path, entries, "float8", 8)
    config = run("decoder", features="features")
    (cache,) = features.open_caches(config, tmp_path, entries)["features"]
    cache.shards[0].unlink()
    with pytest.raises(UserError, match="was begun as bfloat16"):
        features.cache_features(config, tmp_path, entries, "float32", 8)


def test_an_encoder_that_was_replaced_is_refused(run, params, tmp_path, monkeypatch):
    """A published folder; then the same name with other weights."""
    config = run("decoder", features="features")
    folder = tmp_path / "published"
    config.init_from.generation_encoder = str(folder)
    monkeypatch.setattr(features, "part_mark", checkpoints.part_mark)
    settings, weights = vit_config(config, "generation_encoder"), params["decoder"]["generation_encoder"]
    export_part(folder, "generation_encoder", settings, weights, native=True)
    entries = input.entries_of(config.data.train)
    features.cache_features(config, tmp_path, entries, "float32", 64)
    (cache,) = features.open_caches(config, tmp_path, entries)["features"]
    np.testing.assert_allclose(cache[5], expected(config, params, entries[0], 5), atol=1e-5)
    shutil.copytree(folder, tmp_path / "copy")
    for path in (tmp_path / "copy").iterdir():
        os.utime(path, (1, 1))
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "copy", folder)  # the same, as another host has it
    features.open_caches(config, tmp_path, entries)
    shutil.rmtree(folder)
    export_part(folder, "generation_encoder", settings, jax.tree.map(lambda x: x + 1, weights), native=True)
    with pytest.raises(UserError, match="trained or replaced since: remove it"):
        features.open_caches(config, tmp_path, entries)


def test_a_run_that_was_trained_anew_is_another(tmp_path):
    """Its weights and its step; and those of the run that it took the part from."""

    def train(name, seed, steps=3, **parts):
        run = tmp_path / name
        shutil.rmtree(run, ignore_errors=True)
        folder = run / "checkpoints" / str(steps) / "state"
        weights = {"encoder": {"kernel": np.random.default_rng(seed).normal(size=8)}}
        ocp.PyTreeCheckpointer().save(folder, {"trained": weights})
        (run / "config.json").write_text(json.dumps(dict(steps=steps, init_from=parts)))

    marks = []
    for change in (
        lambda: (train("first", 0), train("second", 0, encoder="first")),
        lambda: train("first", 1),
        lambda: train("first", 1, steps=4),
        lambda: train("second", 1, encoder="first"),
    ):
        change()
        marks.append(checkpoints.part_mark(tmp_path, "second", "encoder"))
        assert marks[-1] == checkpoints.part_mark(tmp_path, "second", "encoder")
    assert len(set(marks)) == 4
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    with pytest.raises(UserError, match=r"first is not finished \(0 of 4 steps\): train it first"):
        checkpoints.part_mark(tmp_path, "second", "encoder")


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("bfloat16", 1e-2)])
def test_programs_lose_the_same_with_features_as_with_pictures(run, params, tmp_path, dtype, tolerance):
    """bfloat16 keeps 8 bits: a relative error of 2^-9 a number."""
    from pisces_jax.training.programs.base import check_batch
    from pisces_jax.training.tokenizer import load_tokenizer

    for stage in ("decoder", "latent", "unified"):
        config = run(stage)
        entries = input.entries_of(config.data.train)
        features.cache_features(config, tmp_path, entries, dtype, 64)
        tokenizer = load_tokenizer(config, tmp_path)
        losses = []
        for folder in ("", "features"):
            config = run(stage, features=folder)
            program = programs.make_program(config, tokenizer.vocab_size)
            made = input.items(config, tokenizer, program, tmp_path, config.data.train)
            batch = {
                name: np.stack([made.make(i).item[name] for i in range(program.batch_items(config))])
                for name in made.empty()
            }
            check_batch(program.batch_spec(config), batch, 1)
            if folder:
                (gone,) = {"decoder": {"features"}, "latent": {"image"}, "unified": {"draw_images"}}[stage]
                assert (gone in batch) == (stage == "decoder")  # whose pictures are what it is to make
            got = jax.jit(program.losses)(params[stage], batch, jax.random.key(0))[0]
            losses.append({name: float(value.compute()) for name, value in got.items()})
        assert losses[0] == pytest.approx(losses[1], rel=tolerance)
        assert all(value > 0 for value in losses[0].values())


def test_features_are_made_once_and_of_what_is_drawn_alone(run, params, tmp_path, monkeypatch):
    """Three sources of the same pictures: one reads them, two draw them from other texts."""
    from pisces_jax.training.tokenizer import load_tokenizer

    written = []
    write = cached.FeatureCache.write
    monkeypatch.setattr(cached.FeatureCache, "write", lambda *a: written.append(a[1]) or write(*a))
    shades = [6 * i for i in range(40)]
    for shade in shades:
        Image.new("RGB", (16, 16), (shade, 255 - shade, 0)).save(tmp_path / f"{shade}.png")
    lines = [{"image": f"{shade}.png", "a": "red", "b": "very red"} for shade in shades]
    (tmp_path / "data.json").write_text(json.dumps(lines))
    common = dict(kind="json", path=f"{tmp_path}/data.json", split="train", val_share=0.5, detailed_format="{b}")
    recipes = dict(caption="{a}", draw_caption="{a}", draw_details="{b}")
    config = run("unified", features="features")
    config.data.train = {name: dict(common, recipe=name, caption_format=text) for name, text in recipes.items()}
    entries = input.entries_of(config.data.train)
    assert features.cache_features(config, tmp_path, entries, "float32", 8) == {"draw_caption": 0, "draw_details": 0}
    assert written == [0, 1]  # 20 pictures, 16 a shard
    read, *drawn = features.open_caches(config, tmp_path, entries)["features"]
    assert read is None and drawn[0].folder == drawn[1].folder
    tokenizer = load_tokenizer(config, tmp_path)
    program = programs.make_program(config, tokenizer.vocab_size)
    made = input.items(config, tokenizer, program, tmp_path, config.data.train)
    groups = [made.make(i).item for i in range(made.per_epoch)]
    found = np.concatenate([group["draw_features"][group["draw_valid"]] for group in groups])
    assert sum(group["read_valid"].sum() for group in groups) == 20 and len(found) == 40
    of_each = sorted(map(tuple, np.stack([drawn[0][i] for i in range(20)]).reshape(20, -1)))
    assert sorted(map(tuple, found.reshape(40, -1))) == sorted(of_each * 2)
    with pytest.raises(UserError, match="no source of the config draws pictures"):
        features.open_caches(config, tmp_path, entries[:1])


def test_latents_are_the_autoencoders_and_are_kept_apart(run, params, tmp_path):
    """Beside the features, which a stage on the same pictures shares; of each its own shards are missing."""
    config = run("latent", features="features")
    entries = input.entries_of(config.data.train)
    features.cache_features(run("decoder"), tmp_path, entries, "float32", 64)
    kept = contents(tmp_path)
    with pytest.raises(UserError, match=r"latents/.* lacks 4 of 4 shards"):
        features.open_caches(config, tmp_path, entries)
    features.cache_features(config, tmp_path, entries, "float32", 24)
    caches = features.open_caches(config, tmp_path, entries)
    assert {name: each[0].shape for name, each in caches.items()} == {"features": (4, 8), "latents": (8, 8, 4)}
    assert {path: data for path, data in contents(tmp_path).items() if "latents" not in path} == kept
    for i in (0, 17, 63):
        image = cached.cached_picture(entries[0].source[i]).array()[None] / np.float32(127.5) - 1
        model = Autoencoder(AutoencoderConfig(**AUTOENCODER))
        expected = apply(model, params["latent"]["autoencoder"], image, method="encode")[0]
        np.testing.assert_allclose(caches["latents"][0][i], expected, atol=1e-5)
    config.model.autoencoder.scale = 1.0
    with pytest.raises(UserError, match="another encoder or pooling"):
        features.open_caches(config, tmp_path, entries)


def test_a_failure_of_the_storage_stops_and_is_not_kept(run, tmp_path):
    class Source:
        draws, remote, fingerprint, pictures_fingerprint = True, False, "", None
        away = True

        def __len__(self):
            return 40

        def __getitem__(self, i):
            if i == 19 and self.away:
                raise BrokenExample("k19", FILE_GONE)
            return Example((Picture(np.full((16, 16, 3), i, np.uint8), "draw"),), f"k{i}")

    config, source = run("unified", features="features"), Source()
    entries = [Entry("s", 1.0, source)]
    with pytest.raises(UserError, match=f"source s: example k19: {FILE_GONE}: run the same command again"):
        features.cache_features(config, tmp_path, entries, "float32", 8)
    assert [path.name[:5] for path in tmp_path.rglob("*.array_record")] == ["00000"]
    source.away = False
    assert features.cache_features(config, tmp_path, entries, "float32", 8) == {"s": 0}
    (cache,) = features.open_caches(config, tmp_path, entries)["features"]
    assert np.isfinite(cache[19]).all()


def test_a_broken_picture_is_masked_with_features_too(run, tmp_path, monkeypatch):
    def broken():
        raise UnreadablePicture("picture 3 cannot be read: replace it")

    class Source:
        draws, remote, fingerprint, pictures_fingerprint = True, False, "", None

        def __len__(self):
            return 20

        def __getitem__(self, i):
            image = broken if i == 3 else np.full((16, 16, 3), i, np.uint8)
            return Example((Text("a" * (i % 4 + 1)), Picture(image, "draw")), f"k{i}")

    config = run("unified", features="features")
    entries = [Entry("s", 1.0, Source())]
    for _ in range(2):  # the second time it is there already
        assert features.cache_features(config, tmp_path, entries, "float32", 8) == {"s": 1}
    (cache,) = features.open_caches(config, tmp_path, entries)["features"]
    assert np.isfinite(cache[2]).all()
    with pytest.raises(UserError, match="cannot be decoded"):
        cache[3]
    monkeypatch.setattr(features, "LEAST_SEEN", 20)
    with pytest.raises(UserError, match="source s: 1 of 20 pictures cannot be read so far, more than 1.00%"):
        features.cache_features(config, tmp_path / "strict", entries, "float32", 8)
    assert not list((tmp_path / "strict").rglob("*.array_record"))
    config.data.max_broken = 0.05
    assert features.cache_features(config, tmp_path / "strict", entries, "float32", 8) == {"s": 1}
    twice = Example((Picture(np.zeros((2, 2, 3), np.uint8), "draw"),) * 2, "k")
    with pytest.raises(UserError, match="draws 2 pictures"):
        cached.cached_picture(twice)


@pytest.mark.parametrize(
    "stage, words",
    [("unified", "train_decoder: a decoder learns from pictures"), ("pretrain", "trains the encoder that makes them")],
)
def test_what_learns_from_pictures_takes_no_features(stage, words):
    config = tiny_config.get_config(stage)
    config.data.features = "features"
    with pytest.raises(UserError, match=words):
        programs.make_program(config, 300)
