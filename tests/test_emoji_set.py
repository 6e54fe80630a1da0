"""The emoji set, made from tiny packages that have the form of the real ones."""

import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from pisces_jax.data import emoji_set
from pisces_jax.data.sources import make_source
from pisces_jax.utils.errors import UserError


def package(folder, name, **files):
    path = folder / f"{name.replace('/', '-').strip('@')}-1.0.0.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for file, content in {"package.json": {"name": name}, **files}.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{file}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def packages(folder, names=30):
    entries = [
        {"label": f"animal {i}", "hexcode": f"1F4{i:02X}-FE0F", "group": 3, "subgroup": 7, "tags": ["zoo", "big"]}
        for i in range(names)
    ]
    messages = {
        "groups": [
            {"key": "animals-nature", "message": "animals & nature", "order": 3},
            {"key": "component", "message": "component", "order": 2},
        ],
        "subgroups": [{"key": "m", "message": "mammals", "order": 7}],
    }
    hair = {"label": "animal 1", "hexcode": "1F401", "group": 2, "subgroup": 7, "tags": ["hair"]}
    data = [*entries, {"label": "regional indicator A", "hexcode": "1F1E6"}, hair]
    paths = [package(folder, "emojibase-data", **{"en/data.json": data, "en/messages.json": messages})]
    for style in emoji_set.STYLES:
        icons = {f"animal-{i}": {"body": f"<b>{i}</b>"} for i in range(1, names)}
        chars = {f"1f4{i:02x}": f"animal-{i}" for i in range(names)}  # animal 0 is an alias
        chars = {} if "emojione" in style else chars  # its icons are known by the names of the others
        whole = {"icons": icons, "aliases": {"animal-0": {"parent": "animal-1"}}, "width": 36, "height": 36}
        paths.append(package(folder, style, **{"icons.json": whole, "chars.json": chars}))
    return paths


def draw(svg, size):
    """A square whose shade is the number in the SVG, transparent at its right half."""
    assert 'viewBox="0 0 36 36"' in svg
    pixels = np.zeros((size, size, 4), np.uint8)
    pixels[:, : size // 2] = [int(svg.split("<b>")[1].split("<")[0]), 0, 0, 255]
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def test_the_set_is_made_of_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(emoji_set, "PER_SHARD", 80)
    out = tmp_path / "emoji"
    counts = emoji_set.make(packages(tmp_path), out, draw)
    assert sum(counts.values()) == 30 * 7 and all(counts.values())
    assert sorted(path.name for path in out.iterdir()) == [
        "new_names-00000.tar", "train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar"
    ] or counts["train"] <= 160  # fmt: skip
    rows = {}
    for split, number in counts.items():
        how = dict(recipe="draw_caption", caption_format="{label}, {style}", index_dir=str(tmp_path), index_workers=1)
        source = make_source(dict(kind="webdataset", path=f"{out}/{split}-*.tar", **how)).source
        assert len(source) == number
        rows[split] = [source.record(i).fields for i in range(number)]
        example, fields = source[0], source.record(0).fields
        assert example.parts[0].text == f"draw: {fields['text']}" == f"draw: {fields['label']}, {fields['style']}"
        image = example.parts[1].array()
        shade = max(1, int(fields["label"].split()[1]))
        assert image.shape == (64, 64, 3) and (image[:, :32] == [shade, 0, 0]).all() and (image[:, 32:] == 255).all()
        assert (
            fields["tags"] == "big, zoo" and fields["group"] == "animals & nature" and fields["subgroup"] == "mammals"
        )
    names = {split: {fields["label"] for fields in some} for split, some in rows.items()}
    assert not names["new_names"] & (names["train"] | names["val"]) and names["val"] <= names["train"]
    assert {fields["style"] for fields in rows["train"]} == set(emoji_set.STYLES.values())
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    emoji_set.make(packages(tmp_path), out, draw)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first


def test_pixels_are_halved_by_means():
    pixels = np.zeros((4, 4, 3), np.uint8)
    pixels[:2, :2, 0] = [[1, 2], [3, 4]]  # mean 2.5
    pixels[2:, 2:] = 255
    found = emoji_set.halved(pixels)
    assert found[0, 0, 0] == 3 and (found[1, 1] == 255).all() and found[0, 1].sum() == 0


def test_packages_that_cannot_be_used(tmp_path):
    paths = packages(tmp_path, names=2)
    with pytest.raises(UserError, match="--packages has no @iconify-json/emojione: fetch"):
        emoji_set.make([path for path in paths if "emojione" not in path.name], tmp_path / "out", draw)
    (tmp_path / "broken.tgz").write_bytes(b"no")
    with pytest.raises(UserError, match=r"broken\.tgz is no npm package"):
        emoji_set.make([tmp_path / "broken.tgz"], tmp_path / "out", draw)
    other = package(tmp_path, "emojibase-data", **{"en/data.json": [{"group": 1}], "en/messages.json": {}})
    with pytest.raises(UserError, match="another form"):
        emoji_set.make([*paths[1:], other], tmp_path / "out", draw)
    assert not (tmp_path / "out").exists()
