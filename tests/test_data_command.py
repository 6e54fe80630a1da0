"""`python -m pisces_jax.data`: the page shows what is in the rows, the numbers are those of the files."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

from pisces_jax.data import show
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.data.sources import make_source
from pisces_jax.data.tokenizers import train_sentencepiece
from pisces_jax.utils.errors import run_command

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests/tiny_config.py")


@pytest.fixture
def call(monkeypatch, capsys):
    def run(*flags, module="pisces_jax.data.__main__"):
        monkeypatch.setattr(sys, "argv", ["data", *map(str, flags)])
        status = 0
        capsys.readouterr()
        try:
            run_command(import_module(module).main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def folder_of(path, n, broken=()):
    """Pictures of one colour each, 8 x 10 and 12 x 6 in turns, with a caption of one word more than `i % 3`."""
    path.mkdir()
    for i in range(n):
        image = Image.new("RGB", (8, 10) if i % 2 else (12, 6), (10 * i, 0, 0))
        image.save(path / f"{i}.png")
        if i in broken:
            (path / f"{i}.png").write_bytes(b"")
    lines = [json.dumps({"file_name": f"{i}.png", "text": "word " * (i % 3) + "<b>end</b>"}) for i in range(n)]
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return str(path)


def test_the_page_shows_the_rows(tmp_path):
    path = folder_of(tmp_path / "set", 12, broken=(5,))
    tokenizer = train_sentencepiece(["word word <b>end</b> caption: draw:"] * 9, tmp_path / "t.model", 300)
    spec = dict(kind="image_folder", path=path)
    entries = [
        make_source({**spec, "name": "reads", "recipe": "caption"}),
        make_source({**spec, "name": "draws", "recipe": "draw_caption"}),
    ]
    groups = PackedGroups(entries, tokenizer, Layout(4, 2, 64, 2, 8, 8, 6, 4), seed=0)
    numbers = range(groups.per_epoch)
    page = show.page(groups, numbers, "a title & more\x1b")
    assert "<b>end" not in page and page.count("&lt;b&gt;end") == 24
    assert page.count("a title &amp; more\N{REPLACEMENT CHARACTER}") == 2 and "\x1b" not in page
    assert page.count("masked: picture set/5.png") == 2
    # Every picture in a slot is on the page, pixel by pixel.
    shown = {"read": [], "draw": []}
    for role, data in re.findall(r"<img class=(\w+) .*?base64,([^']*)'", page):
        shown[role].append(np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))).tobytes())
    for role in shown:
        made = [groups[i] for i in numbers]
        held = [g[f"{role}_images"][s] for g in made for s in np.flatnonzero(g[f"{role}_valid"])]
        assert sorted(shown[role]) == sorted(image.tobytes() for image in held) and len(held) == 11
    # What is learned, and nothing else, is marked: captions that are read, with the end.
    marked = "".join(re.findall(r"<mark>(.*?)</mark>", page))
    learned = sum(int(groups[i]["loss_mask"].sum()) for i in numbers)
    assert marked.count("end") >= 11 and learned > 0 and marked.count("<code>eos</code>") == 11
    pairs = Pairs(entries[:1], tokenizer, 32, 4, seed=0)
    page = show.page(pairs, range(12), "pairs")
    assert page.count("<img") == 11 and page.count("masked:") == 1


def test_the_page_of_rows_with_cached_features(tmp_path):
    class Cache:
        shape = (2, 5)

        def __getitem__(self, i):
            return np.full(self.shape, i, np.float32)

    path = folder_of(tmp_path / "set", 7)
    tokenizer = train_sentencepiece(["word word <b>end</b> caption: draw:"] * 9, tmp_path / "t.model", 300)
    entries = [
        make_source(dict(kind="image_folder", path=path, name=recipe, recipe=recipe))
        for recipe in ("caption", "draw_caption")
    ]
    layout = Layout(4, 2, 64, 2, 8, 8, 6, 4)
    groups = PackedGroups(entries, tokenizer, layout, seed=0, features=[Cache(), Cache()])
    page = show.page(groups, range(groups.per_epoch), "t")
    assert page.count("<img class=read") == 7 and page.count("<span class='box draw'>cached features</span>") == 7
    assert "<img class=draw" not in page


def test_commands(call, tmp_path):
    for command in ("inspect", "stats", "index"):
        status, out, _ = call(command, "--help")
        assert status == 0 and f"python -m pisces_jax.data {command} --" in out.split("examples:")[1]
    status, out, _ = call("--help")
    assert status == 0 and "inspect" in out
    status, out, _ = call("--help", module="pisces_jax.cache")
    assert status == 0 and "python -m pisces_jax.cache --" in out.split("examples:")[1]
    for flags, words in (
        ((), "the command is missing"),
        (("inspekt",), "'inspekt' does not exist"),
        (("inspect", f"--config={TINY}"), "--out is missing"),
        (("stats",), "--config is missing"),
        (("stats", f"--config={TINY}", "--config.data.trian=1"), "did you mean"),
        (("index", f"--path={tmp_path}/none*.tar"), "no file matches"),
    ):
        status, _, err = call(*flags)
        assert status == 1 and words in err and err.count("\n") == 1, flags
    status, _, err = call(f"--config={TINY}", f"--workdir={tmp_path}", module="pisces_jax.cache")
    assert status == 1 and "several stages: name one" in err


def test_inspect_and_stats_of_a_config(call, tmp_path):
    page = tmp_path / "out" / "rows.html"
    status, out, err = call("inspect", f"--config={TINY}", f"--out={page}", "--count=2", f"--workdir={tmp_path}/w")
    assert status == 0, err
    assert page.read_text().startswith("<!doctype html>") and page.read_text().count("<h2>") == 2
    path = folder_of(tmp_path / "set", 40, broken=(4, 7))
    with open(f"{path}/metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "0.png", "te')
    config = tmp_path / "config.py"
    config.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import tiny_config\n"
        "def get_config(stage=''):\n"
        "    c = tiny_config.get_config('unified')\n"
        f"    source = dict(kind='image_folder', path={path!r}, recipe='caption')\n"
        "    c.data.train = dict(folder=source); c.data.evaluate = dict(folder=source)\n"
        "    return c\n"
    )
    numbers = tmp_path / "stats.json"
    status, out, err = call("stats", f"--config={config}", f"--out={numbers}")
    assert status == 0, err
    assert "broken texts: not JSON: 1" in out and "broken pictures: a picture cannot be decoded: 2" in out
    found = json.loads(numbers.read_text())["sources"]["folder"]
    assert found["examples"] == 41 and found["pictures_read"] == 40 and found["broken"] == {"not JSON": 1}
    assert found["left_out"] == {"too_long": 0, "too_many_pictures": 0, "unreadable": 1}
    seen = found["pictures_seen"]
    # 19 pictures of 12 x 6 and 19 of 8 x 10
    assert seen["decoded"] == 38 and seen["short_side"] == [6, 7, 8] and seen["long_side"] == [10, 11, 12]


def test_index(call, tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name in ("a.jpg", "a.txt", "../b.jpg", "c.jpg", "a.png"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    status, out, err = call("index", f"--path={tmp_path}/*.tar", f"--index_dir={tmp_path}/index")
    assert status == 0, err
    assert out.splitlines() == ["4 samples in 1 shards", "  duplicate key: 1", "  a name outside its folder: 1"]
    assert len(list((tmp_path / "index").iterdir())) == 1


def test_index_of_a_bucket(call, tmp_path, monkeypatch):
    """Its place does not depend on where the command runs, and that other hosts do not see it is said."""
    system = fsspec.filesystem("memory")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    system.pipe("/indexed/a.tar", (tmp_path / "a.tar").read_bytes())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for folder in "one", "two":
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        status, out, err = call("index", "--path=memory://indexed/a.tar")
        assert status == 0 and "give --index_dir a folder that all share" in out, err
    assert len(list((tmp_path / "cache/pisces_jax/index").iterdir())) == 1
    status, out, err = call("index", "--path=memory://indexed/a.tar", f"--index_dir={tmp_path}/shared")
    assert status == 0 and "--index_dir" not in out, err
    system.rm("/indexed", recursive=True)


def test_workers_of_the_command_import_no_jax(tmp_path):
    """A file that every Python of the command reads first notes which process imports JAX."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name in ('jax', 'pisces_jax'):\n"
        f"            open({str(tmp_path / 'imports')!r}, 'a').write(f'{{name}} {{os.getpid()}}\\n')\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    for name in "abc":
        with tarfile.open(tmp_path / f"{name}.tar", "w") as archive:
            archive.addfile(tarfile.TarInfo("a.jpg"), io.BytesIO())
    command = [sys.executable, "-m", "pisces_jax.data", "index", f"--path={tmp_path}/?.tar", "--workers=2"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "3 samples in 3 shards\n", done.stderr
    noted = [line.split() for line in (tmp_path / "imports").read_text().splitlines()]
    assert len({process for name, process in noted if name == "pisces_jax"}) == 3  # the command and two workers
    assert not [name for name, _ in noted if name == "jax"]


def test_the_mixture_of_real_sets_fills_its_rows(data_folder, tmp_path, monkeypatch):
    """CIFAR-10, OpenMoji and shapes, 4 : 3 : 3, as `configs/mixed_small.py` packs them; a tenth of each to be quick."""
    from pisces_jax.training.config_files import load_stages
    from pisces_jax.training.input import open_items

    monkeypatch.setenv("PISCES_DATA", str(data_folder))
    config = load_stages(str(ROOT / "configs/mixed_small.py:stage1"), {})["stage1"]
    config.data.tokenizer_examples, config.data.examples_per_epoch = 500, 12_000
    for name, spec in config.data.train.items():
        spec.update(dict(split="train[:10%]") if "cifar" in name else {})
        spec.update(dict(num_examples=2000) if "shapes" in name else {})
    groups = open_items(config, tmp_path)
    assert groups.counts == [2400, 2400, 1800, 1800, 1800, 1800]
    made = [groups[i] for i in range(0, groups.per_epoch, 20)]
    shares = np.bincount(
        np.concatenate([g["source"][(g["positions"] == 0) & (g["segment_ids"] > 0)] for g in made]), minlength=6
    )
    np.testing.assert_allclose(shares / shares.sum(), [0.2, 0.2, 0.15, 0.15, 0.15, 0.15], atol=0.07)
    assert groups.fill().tokens >= 0.95
    assert groups.fill().tokens == pytest.approx(np.mean([(g["segment_ids"] > 0).mean() for g in made]), abs=0.01)
