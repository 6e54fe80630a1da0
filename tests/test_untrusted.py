"""Files of others execute nothing: weights, data, tokenizers, checkpoints, configs; pictures take bounded memory."""

import io
import json
import pickle
import subprocess
import tarfile

import numpy as np
import pytest
from PIL import Image

from pisces_jax.data import images
from pisces_jax.data.arrays import read_arrays
from pisces_jax.data.images import UnreadablePicture, open_image
from pisces_jax.data.sources import make_source
from pisces_jax.data.tokenizers import open_tokenizer
from pisces_jax.training import run_folder, steps
from pisces_jax.training.config_files import load_stages
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.manifests import write_manifest
from pisces_jax.weights.folder import Folder


class Armed:
    """A pickle of it creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def trap(tmp_path):
    """Bytes that create a file when anything unpickles them."""
    path = tmp_path / "it ran"
    data = pickle.dumps(Armed(path))
    pickle.loads(data)
    assert path.exists(), "the trap works"
    path.unlink()
    yield data
    assert not path.exists(), "a file of others was executed"


def refused(what):
    with pytest.raises(UserError) as error:
        what()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.safetensors", "model.ckpt", "model.npz"])
def test_weights(trap, tmp_path, name):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / name).write_bytes(trap)
    code = f"open({str(tmp_path / 'it ran')!r}, 'w')"
    described = dict(model_type="llama", auto_map={"AutoModel": "modeling.Model"}, trust_remote_code=True)
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "modeling.py").write_text(code)
    refused(lambda: Folder.open(str(folder)).shapes())


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json"])
def test_tokenizers(trap, tmp_path, name):
    (tmp_path / name).write_bytes(trap)
    refused(lambda: open_tokenizer(tmp_path / name))
    refused(lambda: open_tokenizer(tmp_path))


def in_tar(path, members):
    with tarfile.open(path, "w") as shard:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            shard.addfile(member, io.BytesIO(data))
    return dict(kind="webdataset", path=str(path), recipe="pair", index_dir=str(path.parent))


def test_data(trap, tmp_path):
    """Pickles as members, as lines, as files of each format; a kind of source that is somebody's function."""
    sources = [
        in_tar(
            tmp_path / "a.tar", {f"1.{kind}": trap for kind in ("pkl", "pickle", "pyd", "npy", "pth", "jpg", "txt")}
        ),
        dict(kind="json", path=str(tmp_path / "a.jsonl"), recipe="pair"),
        dict(kind="json", path=str(tmp_path / "a.json"), recipe="pair"),
        dict(kind="parquet", path=str(tmp_path / "a.parquet"), recipe="pair"),
        dict(kind="array_record", path=str(tmp_path / "a.array_record"), recipe="pair"),
    ]
    for source in sources[1:]:
        open(source["path"], "wb").write(trap)
    for source in sources:
        refused(lambda source=source: list(make_source(source).source[0].parts)[0].image())
    for kind in "os:system", "builtins:eval", "pisces_jax.utils.files:replacing":
        refused(lambda kind=kind: make_source(dict(kind=kind, path="x")))
    (tmp_path / "x.index").write_bytes(trap)
    assert read_arrays(tmp_path / "x.index") is None


def test_checkpoints_and_saved_configs(trap, tmp_path):
    run = tmp_path / "run"
    state = run / "checkpoints/3/state"
    state.mkdir(parents=True)
    for name in "_METADATA", "manifest.ocdbt", "checkpoint", "_sharding":
        (state / name).write_bytes(trap)
    write_manifest(state.parent)
    (state.parent / "MANIFEST").write_bytes(trap)
    assert "damaged" in steps.flaw(state.parent)
    code = f"open({str(tmp_path / 'it ran')!r}, 'w')"
    for text in trap, json.dumps({"program": code}).encode(), b"!!python/object/apply:os.system [x]", code.encode():
        (run / "config.json").write_bytes(text)
        try:
            read = run_folder.read_config(run)
        except UserError:
            continue
        assert isinstance(read.program, str)


def test_a_config_is_executed_only_where_the_user_names_it(trap, tmp_path):
    """A file of Python, and no other: not a saved config, nor what lies beside it."""
    path = tmp_path / "config.json"
    path.write_bytes(trap)
    refused(lambda: load_stages(str(path), {}))


# --- pictures


def encoded(size=(8, 8), mode="RGB", kind="PNG", **how):
    file = io.BytesIO()
    Image.new(mode, size).save(file, kind, **how)
    return file.getvalue()


def test_picture_formats_are_an_allow_list(tmp_path, monkeypatch):
    """EPS would go to Ghostscript."""
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail(f"it started {a}"))
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail(f"it started {a}"))
    for kind in "PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM":
        assert open_image(encoded(kind=kind)).size == (8, 8)
    for kind in "EPS", "ICO", "PCX", "TGA", "SGI", "IM", "DDS":
        with pytest.raises(UnreadablePicture, match="cannot be read"):
            open_image(encoded((16, 16), kind=kind))
    (tmp_path / "a.png").write_bytes(encoded((16, 16), kind="EPS"))
    with pytest.raises(UnreadablePicture, match="a.png cannot be read"):
        open_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    "mode, kind, share", [("RGB", "PNG", 1), ("L", "PNG", 1), ("RGBA", "PNG", 2), ("LA", "PNG", 2), ("I;16", "PNG", 2),
                          ("RGB", "JPEG2000", 4)],
)  # fmt: skip
def test_large_pictures_are_refused_before_they_are_decoded(mode, kind, share, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 6400)
    side = 80 // {1: 1, 2: 2, 4: 2}[share]
    assert open_image(encoded((side, side), mode, kind)).mode == "RGB"
    decoded = []
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(self))
    with pytest.raises(UnreadablePicture, match="above the limit of"):
        open_image(encoded((81, 81), mode, kind))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "I;16"])
def test_strips_give_the_same_pixels_as_the_whole(mode, monkeypatch):
    rng = np.random.default_rng(0)
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 2**16, (37, 20), np.uint16))
    elif mode == "P":
        picture = Image.fromarray(rng.integers(0, 255, (37, 20, 3), np.uint8)).quantize(16)
    else:
        picture = Image.fromarray(rng.integers(0, 256, (37, 20, 4), np.uint8)).convert(mode)
    file = io.BytesIO()
    picture.save(file, "PNG", **(dict(transparency=3) if mode == "P" else {}))
    whole = np.asarray(open_image(file.getvalue()))
    monkeypatch.setattr(images, "_STRIP", 100)
    np.testing.assert_array_equal(np.asarray(open_image(file.getvalue())), whole)
    assert whole.std() > 10
