"""Damaged files of data: they are noticed, and made anew or refused."""

import json
import os
import random

import numpy as np
import pytest
import tiny

from pisces_jax.data.arrays import read_arrays, write_arrays
from pisces_jax.data.example import BrokenExample, Example, Picture, Text
from pisces_jax.data.feature_cache import FeatureCache
from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.packing.lengths import scan_lengths
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import checksum_of, is_as_written


def flipped(data, bit):
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_flipped_bits_of_stored_arrays_are_noticed(tmp_path):
    """One bit of each byte of a small file: the arrays are those that were written, or none."""
    path = tmp_path / "x.lengths"
    arrays = {"tokens": np.arange(7, dtype=np.int32), "reads": np.ones((2, 3), np.uint16), "none": np.zeros((0, 2))}
    about = {"reasons": {"a": 3}}
    write_arrays(path, about, arrays)
    whole = path.read_bytes()
    noticed = 0
    for byte in range(len(whole)):
        bit = 8 * byte + byte % 8
        path.write_bytes(flipped(whole, bit))
        found = read_arrays(path)
        if found is None:
            noticed += 1
            continue
        assert found[0] == about, bit  # a bit of padding, or of the checksum's name
        for name, array in arrays.items():
            assert found[1][name].dtype == array.dtype and np.array_equal(found[1][name], array), (bit, name)
    assert noticed > 0.8 * len(whole)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        assert read_arrays(path) is None


class Captions:
    """A source of texts, or of pictures that are drawn."""

    remote, draws, fingerprint, pictures_fingerprint = False, True, "", "these"

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return Example((Text("a" * (i % 9 + 1)), Picture(np.zeros((4, 4, 3), np.uint8), "draw")), f"k{i}")


def test_damaged_lengths_are_read_anew(tmp_path, caplog):
    source = Captions()
    right = scan_lengths(source, tiny.Letters(), tiny.LAYOUT, "s", tmp_path)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    right = [np.array(array) for array in right[:3]]
    for bit in random.Random(0).sample(range(8 * len(whole) - 8 * 300, 8 * len(whole)), 10):
        path.write_bytes(flipped(whole, bit))
        got = scan_lengths(source, tiny.Letters(), tiny.LAYOUT, "s", tmp_path)
        assert all(np.array_equal(a, b) for a, b in zip(got[:3], right, strict=True))
        assert read_arrays(path) is not None
    assert caplog.text.count("is damaged: it is not used, and made anew") == 10


def config():
    return tiny.config(
        name="run", program="decoder",
        data=dict(
            tokenizer_vocabulary=300, tokenizer_examples=24,
            train={"pair": dict(kind="shapes", task="pair", num_examples=24, size=16)},
        ),
    )  # fmt: skip


def test_a_damaged_tokenizer_is_made_anew_until_runs_have_been_trained_with_it(tmp_path, caplog):
    right = load_tokenizer(config(), tmp_path)
    path = tmp_path / "tokenizer.model"
    whole = path.read_bytes()
    assert is_as_written(path) and sorted(p.name for p in tmp_path.iterdir()) == [path.name, f"{path.name}.sha256"]
    path.write_bytes(flipped(whole, 8 * 900))
    assert load_tokenizer(config(), tmp_path).fingerprint == right.fingerprint
    assert path.read_bytes() == whole and "tokenizer.model is damaged: it is made anew" in caplog.text
    (tmp_path / "run/checkpoints/60").mkdir(parents=True)
    for damaged in flipped(whole, 8 * 900), whole[:-1], b"":
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="is not what was written .* and runs were trained with it: put the right"):
            load_tokenizer(config(), tmp_path)
        assert path.read_bytes() == damaged
    path.write_bytes(whole)
    assert load_tokenizer(config(), tmp_path).fingerprint == right.fingerprint
    checksum_of(path).unlink()  # a file that a user has put there
    assert load_tokenizer(config(), tmp_path).fingerprint == right.fingerprint


def cache_of(folder):
    return FeatureCache(folder, Entry("s", 1.0, Captions()), {"start": "pretrain"})


def test_damaged_features_are_noticed_and_made_anew(tmp_path):
    values = np.random.default_rng(0).normal(size=(40, 4, 6)).astype(np.float32)

    def make():
        cache = cache_of(tmp_path)
        cache.set_damaged_aside(0, 1)
        for shard in cache.todo(0, 1):
            cache.describe((4, 6), "float32")
            cache.write(shard, [v.tobytes() for v in values])

    make()
    cache = cache_of(tmp_path).open()
    (shard,) = cache.shards
    whole = shard.read_bytes()
    np.testing.assert_array_equal(cache[7], values[7])
    for n, bit in enumerate(random.Random(0).sample(range(8 * len(whole)), 10)):
        shard.write_bytes(flipped(whole, bit))
        os.utime(shard, (n, n))  # so that readers see that it is another file
        wrong = 0
        for i in range(40):  # while training: a record is right or it is counted as broken
            try:
                wrong += not np.array_equal(cache_of(tmp_path).open()[i], values[i])
            except BrokenExample:
                pass
        assert not wrong, bit
        make()
        assert is_as_written(shard) and shard.with_suffix(".damaged").read_bytes() == flipped(whole, bit)
        np.testing.assert_array_equal(cache_of(tmp_path).open()[7], values[7])
    about = shard.parent / "about.json"
    text = about.read_text()
    for damaged in text.replace("float32", "gloat32"), text.replace("[4", "[5"), "", "null", json.dumps({"shape": 1}):
        about.write_text(damaged)
        with pytest.raises(UserError, match="lacks its description: run"):
            cache_of(tmp_path).open()
        make()
        assert about.read_text() == text
        np.testing.assert_array_equal(cache_of(tmp_path).open()[7], values[7])
