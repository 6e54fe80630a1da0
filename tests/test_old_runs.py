"""Runs that were trained before keys and folders had today's names still open, draw, answer, go on and export.

`fixtures/run_before_renames.tar.xz` holds a tiny run of the shapes world (pretrain, decoder, unified;
tests/tiny_config.py as it was at commit d0c4524), the unified stage's checkpoints of steps 1 and 2, and what the code
of that commit drew and answered with it.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from pisces_jax import convert
from pisces_jax.data.example import Picture, Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.inference.model import load_model
from pisces_jax.training.old_configs import upgrade
from pisces_jax.training.run_folder import is_finished, read_config
from pisces_jax.training.steps import finished_step
from pisces_jax.weights.folder import Folder

ARCHIVE = pathlib.Path(__file__).parent / "fixtures/run_before_renames.tar.xz"


@pytest.fixture
def old(tmp_path):
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def test_saved_names_are_read_as_todays(old):
    saved = json.loads((old / "unified/config.json").read_text())
    assert {"parts", "storage"} <= set(saved) and saved["data"]["rows"] == 2
    config = read_config(old / "unified")
    assert config.init_from.to_dict() == saved["parts"] and config.train_decoder
    assert config.batch_size == saved["batch_size"] * 2 and config.data.rows_per_pool == 2
    assert config.sampling.max_tokens == saved["sampling"]["tokens"]
    assert config.optimizer.grad_accum_steps == saved["optimizer"]["accumulate"]
    text = upgrade(
        dict(saved, program="text", parts={}, model=dict(language_model=dict(remat="nothing", rotary_base=7)))
    )
    assert text.program == "unified" and not text.train_decoder
    assert text.model.language_model.to_dict() == dict(remat="full", rope_theta=7)
    assert upgrade(json.loads(config.to_json())).to_dict() == json.loads(config.to_json()) | {}


def test_an_old_run_draws_and_answers_as_it_did(old):
    expected = np.load(old.parent / "expected.npz")
    model = load_model(old, batch_size=2)
    prompts = [(Text(draw_instruction(words)),) for words in ("a red circle", "two squares")]
    drawn = model.draw(prompts, describe=False, seed=3)
    np.testing.assert_allclose(np.stack([d.vectors for d in drawn]), expected["vectors"], rtol=1e-4, atol=1e-6)
    difference = np.abs(np.stack([d.image for d in drawn]).astype(int) - expected["images"])
    assert difference.max() <= 1, "rounding may differ between processors, and nothing else"
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    question = [Picture(picture, "read"), Text("what colour is the circle?")]
    assert model.answer([question], max_tokens=6) == expected["answer"].tolist()


def arrays(run, step):
    tree = ocp.PyTreeCheckpointer().restore((run / "checkpoints" / str(step) / "state").absolute())
    return {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.slow
def test_an_old_run_goes_on_to_where_it_would_have_come(old):
    run = old / "unified"
    expected = arrays(run, 2)
    shutil.rmtree(run / "checkpoints/2")
    assert finished_step(run) == 1 and not is_finished(run)
    # In a process of its own: one device and optimised code, as the fixture was made with.
    code = (
        "import pathlib, sys\n"
        "from pisces_jax.training.run_folder import read_config\n"
        "from pisces_jax.training.loop import train\n"
        "workdir = pathlib.Path(sys.argv[1])\n"
        "config = read_config(workdir / 'unified')\n"
        "config.log.samples_every = 0\n"
        "train(config, workdir)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", code, str(old)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    got = arrays(run, 2)
    assert got.keys() == expected.keys() and len(got) > 50
    for name, value in expected.items():
        # Another processor rounds otherwise, and Adam divides small gradients by their own size.
        distance = np.linalg.norm(got[name].astype(np.float64) - value)
        assert distance <= 1e-3 * np.linalg.norm(value.astype(np.float64)) + 1e-7, (name, distance)


def test_an_old_run_exports(old, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", "export", f"--workdir={old}", f"--out={old.parent}/out"])
    convert.main()
    capsys.readouterr()
    parts = {path.name for path in (old.parent / "out").iterdir()}
    assert {"language_model", "decoder", "generation_encoder", "vector_head"} <= parts
    for part in parts:
        assert Folder.open(f"{old.parent}/out/{part}").tensors
