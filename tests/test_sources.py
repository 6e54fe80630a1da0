"""Sources and pictures: real data where it is there, and generated folders of everything that comes in."""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.images import UnreadablePicture, fit, load_image
from pisces_jax.data.pipeline import make_source
from pisces_jax.data.sources import ImageFolder, TfdsPictures
from pisces_jax.errors import UserError

DATA = Path(os.environ.get("PISCES_DATA", Path(__file__).parents[2] / "shared" / "data"))


def real(name):
    if not (DATA / name).exists():
        pytest.skip(f"no {DATA / name}: set PISCES_DATA to a folder that holds {name}")
    return DATA / name


def texts(example):
    return [(part.text, part.learn) for part in example.parts if isinstance(part, Text)]


def picture(example):
    (part,) = [part for part in example.parts if isinstance(part, Picture)]
    return part


def png(mode, colour, size=(4, 4), **options):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    with open(tmp_path / "metadata.jsonl", "w") as metadata:
        for i in range(200):
            (tmp_path / f"{i}.png").write_bytes(png("RGB", (i, 0, 0)))
            line = {"file_name": f"{i}.png", "text": f"number {i}", "tags": f"red, {i}"}
            metadata.write(json.dumps(line) + "\n\n" * (i % 2))
            metadata.write("" if i % 2 else "\n")
    return tmp_path


def test_recipes(folder):
    def make(recipe):
        example = ImageFolder(folder, "all", recipe, detailed_format="{text}: {tags}")[7]
        order = [part.role if isinstance(part, Picture) else "text" for part in example.parts]
        assert (picture(example).array() == [7, 0, 0]).all() and example.key.endswith("/7.png")
        return order, texts(example)

    assert make("caption") == (["read", "text", "text"], [("caption:", False), ("number 7", True)])
    assert make("describe") == (["read", "text", "text"], [("describe:", False), ("number 7: red, 7", True)])
    assert make("draw_caption") == (["text", "draw"], [("draw: number 7", False)])
    assert make("draw_details") == (["text", "draw"], [("draw: number 7: red, 7", False)])
    expected = [("draw: number 7", False), ("number 7: red, 7", True)]
    assert make("draw_described") == (["text", "text", "draw"], expected)
    assert make("pair") == (["read", "text"], [("number 7", False)])


def test_folder_splits_are_disjoint_whole_and_stable(folder):
    def keys_of(split):
        source = ImageFolder(folder, split, "pair")
        return [source[i].key for i in range(len(source))]

    keys = {split: keys_of(split) for split in ("train", "val", "all")}
    assert sorted(keys["train"] + keys["val"]) == sorted(keys["all"]) and len(set(keys["all"])) == 200
    assert 5 <= len(keys["val"]) <= 40
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join(lines[::-2]))
    assert set(keys_of("val")) <= set(keys["val"])  # whatever else is in the folder


def test_folder_mistakes_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="set path"):
        ImageFolder(tmp_path / "missing", "train", "pair")
    with pytest.raises(UserError, match="train, val or all"):
        ImageFolder(folder, "test", "pair")
    with pytest.raises(UserError, match="choose one of caption"):
        ImageFolder(folder, "train", "draw")
    with pytest.raises(UserError, match="detailed_format"):
        ImageFolder(folder, "train", "describe")
    with pytest.raises(UserError, match="'label', but the fields are file_name, tags, text"):
        ImageFolder(folder, "train", "pair", caption_format="{label}")
    for line in (
        '{"file_name": "0.png", "te',
        "[1]",
        '{"text": "x"}',
        '{"file_name": "../a.png", "text": "x"}',
    ):
        (folder / "metadata.jsonl").write_text(line)
        with pytest.raises(UserError, match="line 1 is not a JSON object"):
            ImageFolder(folder, "all", "pair")
    (folder / "metadata.jsonl").write_text("")
    with pytest.raises(UserError, match="empty"):
        ImageFolder(folder, "all", "pair")


def test_openmoji():
    source = ImageFolder(real("openmoji64"), "all", "describe", detailed_format="{text}, {group}: {tags}")
    assert len(source) == 1653
    assert texts(source[0])[1][0].startswith("grinning face, smileys-emotion: cheerful, cheery")
    assert picture(source[0]).role == "read" and picture(source[0]).array().shape == (64, 64, 3)
    assert (picture(source[0]).array()[0, 0] == 255).all()  # on white


def test_cifar10():
    entry = make_source(
        {
            "kind": "tfds",
            "dataset": "cifar10",
            "split": "test",
            "data_dir": real("tfds"),
            "recipe": "draw_caption",
        }
    )
    source = pickle.loads(pickle.dumps(entry.source))  # as a data worker gets it
    assert entry.name == "tfds" and entry.weight == 1 and len(source) == 4000
    names = (DATA / "tfds/cifar10/3.0.2/label.labels.txt").read_text().split()
    seen = {texts(source[i])[0][0] for i in range(300)}
    assert seen == {f"draw: a photo of a {name}" for name in names}
    array = picture(source[0]).array()
    assert array.shape == (32, 32, 3) and array.dtype == np.uint8 and array.std() > 5
    assert len(TfdsPictures("cifar10/3.0.2", "train[:10%]", DATA / "tfds", "pair")) == 2000
    with pytest.raises(UserError, match="its splits are train, test"):
        TfdsPictures("cifar10", "validation", DATA / "tfds", "pair")
    with pytest.raises(UserError, match="the fields are id, label"):
        TfdsPictures("cifar10", "test", DATA / "tfds", "pair", caption_format="{name}")


def test_a_missing_dataset_is_named_without_asking_the_network(tmp_path):
    with pytest.raises(UserError, match="no prepared dataset cifar10 in"):
        TfdsPictures("cifar10", "train", tmp_path, "pair")


def test_make_source_names_mistakes(folder):
    with pytest.raises(UserError, match="choose one of shapes, tfds, image_folder"):
        make_source({"kind": "webdataset"})
    with pytest.raises(UserError, match="takes no 'folder'"):
        make_source({"kind": "image_folder", "folder": "x"})
    with pytest.raises(UserError, match="needs 'recipe'"):
        make_source({"kind": "image_folder", "path": str(folder), "split": "all"})
    entry = make_source(
        dict(kind="image_folder", name="n", weight=2, path=str(folder), split="all", recipe="pair")
    )
    assert entry[:2] == ("n", 2.0) and len(entry.source) == 200


def test_every_kind_of_picture_becomes_rgb():
    def colour(data):
        array = load_image(data)
        assert array.shape == (4, 4, 3) and array.dtype == np.uint8
        return array[0, 0].tolist()

    assert colour(png("RGB", (1, 2, 3))) == [1, 2, 3]
    assert colour(png("L", 100)) == [100] * 3
    assert colour(png("1", 1)) == [255] * 3
    assert colour(png("I;16", 30000)) == [round(30000 / 257)] * 3
    assert colour(png("RGBA", (200, 0, 0, 0))) == [255] * 3
    half = colour(png("RGBA", (200, 0, 0, 128)))
    assert np.abs(np.array(half) - (np.array([200, 0, 0]) * 128 + 255 * 127) / 255).max() <= 1
    assert colour(png("LA", (0, 0))) == [255] * 3
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    for options, expected in (({}, [10, 20, 30]), ({"transparency": 1}, [255] * 3)):
        file = io.BytesIO()
        palette.save(file, "PNG", **options)
        assert colour(file.getvalue()) == expected
    file = io.BytesIO()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(file, "JPEG", quality=100)
    assert np.abs(np.array(colour(file.getvalue())) - [255, 0, 0]).max() < 12


def test_exif_orientation():
    array = np.zeros((4, 8, 3), np.uint8)
    array[:, :4] = 255  # white on the left
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: left becomes top
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", exif=exif)
    upright = load_image(file.getvalue())
    assert upright.shape == (8, 4, 3) and upright[:4].min() == 255 and upright[4:].max() == 0


def test_broken_pictures_are_named(tmp_path):
    whole = png("RGB", (1, 2, 3), (200, 200))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0))
    bomb += chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    broken = {"cut.png": whole[: len(whole) // 2], "empty.png": b"", "text.jpg": b"hello", "bomb.png": bomb}
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UnreadablePicture, match=name):
            load_image(tmp_path / name)
        with pytest.raises(UnreadablePicture, match="key7"):
            load_image(data, "key7")
    with pytest.raises(UnreadablePicture, match="missing.png"):
        load_image(tmp_path / "missing.png")


def test_fit():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    assert fit(image, 40) is image
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 255  # the middle square
    assert (fit(wide, 20) == 255).all()
    assert fit(wide.transpose(1, 0, 2), 10).shape == (10, 10, 3)
    assert fit(image, 64).shape == (64, 64, 3) and fit(np.zeros((1, 1000, 3), np.uint8), 8).shape == (8, 8, 3)
    # Against PIL's own way for a whole number of pixels.
    expected = Image.fromarray(image[:, :20]).resize((10, 20), Image.Resampling.BICUBIC)
    assert (fit(image[:, :20], 10) == np.asarray(expected)[5:15]).all()


def test_reading_needs_neither_jax_nor_tensorflow():
    program = (
        "import sys, pisces_jax.data.packing, pisces_jax.data.pairs, pisces_jax.data.sources\n"
        "sys.exit(' '.join({'jax', 'tensorflow', 'torch'} & set(sys.modules)) or 0)"
    )
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
