"""The commands as a user meets them: on a tiny trained work directory, with right input and with all kinds of wrong."""

import json
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from pisces_jax.evaluation.geneval import TAGS
from pisces_jax.inference.flags import given_prompts
from pisces_jax.shapes_world import drawing
from pisces_jax.shapes_world.text import geneval_prompts
from pisces_jax.training.config_files import load_stages
from pisces_jax.training.metrics import read_metrics
from pisces_jax.utils import cli
from pisces_jax.utils.errors import UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
TINY = str(ROOT / "tests/tiny_config.py")
COMMANDS = ("train", "generate", "answer", "evaluate", "demo")


@pytest.fixture
def call(models_opened_once, monkeypatch, capsys):
    """Runs a command in this process: (exit status, standard output, standard error)."""

    def run(command: str, *flags: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [command, *flags])
        status = 0
        capsys.readouterr()
        try:
            run_command(import_module(f"pisces_jax.{command}").main)
        except SystemExit as stop:
            status = int(stop.code or 0)
        return status, *capsys.readouterr()

    return run


def test_a_pretraining_run_is_exported(trained, call, tmp_path):
    out = tmp_path / "out"
    status, printed, _ = call("convert", "export", f"--workdir={trained / 'run'}", "--run=pretrain", f"--out={out}")
    assert status == 0 and "understanding_encoder" in printed
    assert sorted(p.name for p in out.iterdir()) == ["decoder", "generation_encoder", "understanding_encoder"]


def test_an_encoder_that_reads_is_pretrained_alone_and_exported(call, tmp_path):
    config = tmp_path / "reader.py"
    config.write_text(
        "import tiny_config\n\n\n"
        "def get_config(stage=''):\n"
        "    config = tiny_config.get_config('pretrain')\n"
        "    for part in ('generation_encoder', 'decoder', 'pool'):\n"
        "        del config.model[part]\n"
        "    config.loss.words, config.log.samples_every = 0.5, 0\n"
        "    return config\n"
    )
    run = tmp_path / "run"
    assert call("train", f"--config={config}", f"--workdir={run}")[0] == 0
    losses = {k for record in read_metrics(run / "pretrain") for k in record if k.startswith("val/")}
    assert losses == {"val/contrastive_understanding", "val/words", "val/matched_understanding"}
    out = tmp_path / "out"
    assert call("convert", "export", f"--workdir={run}", "--run=pretrain", f"--out={out}")[0] == 0
    assert [p.name for p in out.iterdir()] == ["understanding_encoder"]


def contents(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in sorted(folder.rglob("*"))}


# What they do


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(call, command):
    status, out, _ = call(command, "--help")
    assert status == 0 and f"python -m pisces_jax.{command} --" in out.split("examples:")[1]


def test_demo_leaves_scores_samples_and_a_report(trained):
    scores = json.loads((trained / "run/scores.json").read_text())
    assert {
        "overall",
        "single_object",
        "two_object",
        "counting",
        "colors",
        "position",
        "color_attr",
        "held_out",
    } <= set(scores["geneval"])
    assert {"described", "direct"} <= set(scores["geneval"]) and scores["geneval"]["drawn"] == "described"
    assert {"overall", "held_out", "colour", "count", "relation", "existence", "comparison"} <= set(scores["reading"])
    assert {"true_vectors", "predicted_vectors"} <= set(scores["reconstruction"])
    seconds = scores["seconds"]
    assert list(seconds) == ["pretrain", "decoder", "unified", "evaluation", "total"]
    assert (
        seconds["total"] == pytest.approx(sum(seconds.values()) - seconds["total"], abs=0.2)
        and min(seconds.values()) > 0
    )
    assert {"python", "jax", "jaxlib", "flax", "optax", "orbax", "grain", "numpy"} == set(scores["versions"])
    assert Image.open(trained / "run/samples.png").width > 500
    page = (trained / "run/report.html").read_text()
    assert "data:image/svg+xml" in page and "step 2:" in page and "expected" in page
    printed = (trained / "run/printed.txt").read_text()
    assert "stage 2 of 3: decoder, 2 steps" in printed and "min of training to come" in printed
    assert f"{scores['reading']['overall']:.3f}" in printed


def test_training_again_does_nothing(trained, call):
    before = contents(trained / "run")
    status, out, _ = call("train", f"--config={TINY}:pretrain", f"--workdir={trained / 'run'}")
    assert status == 0 and "finished already" in out and contents(trained / "run") == before


def test_only_a_newline_ends_a_prompt(tmp_path):
    """A byte order mark is no part of a prompt; other breaks stand for spaces within one."""
    path = tmp_path / "prompts.txt"
    path.write_text("a red\u2028circle\r\na\x85blue\x0csquare\n\n", "utf-8-sig", newline="")
    given = given_prompts(Namespace(prompt=[], prompts_file=path))
    assert given == [("a red circle", None), ("a blue square", None)]
    path.write_text("a red circle", "utf-16")
    with pytest.raises(UserError, match="is text in UTF-16"):
        given_prompts(Namespace(prompt=[], prompts_file=path))


def test_generate_writes_pictures_grid_and_prompts(trained, call, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\n two  blue squares \n")
    flags = [f"--workdir={trained / 'run'}", f"--prompts_file={prompts}", "--num_images=2", "--seed=7"]
    status, out, error = call("generate", *flags, f"--out={tmp_path / 'a'}")
    assert (status, error) == (0, "") and "4 pictures of 2 prompts" in out
    names = {"0000_00.png", "0000_01.png", "0001_00.png", "0001_01.png"}
    assert {p.name for p in (tmp_path / "a").iterdir()} == names | {"grid.png", "prompts.jsonl"}
    assert Image.open(tmp_path / "a/0001_01.png").size == (16, 16)
    lines = [json.loads(line) for line in (tmp_path / "a/prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in lines] == ["a red circle"] * 2 + ["two blue squares"] * 2
    assert {line["file"] for line in lines} == names and all(isinstance(line["description"], str) for line in lines)

    call("generate", *flags, f"--out={tmp_path / 'again'}")
    for name in names | {"prompts.jsonl"}:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    call("generate", *flags, "--nodescribe", f"--out={tmp_path / 'direct'}")
    assert '"description": null' in (tmp_path / "direct/prompts.jsonl").read_text()


def test_answer_prints_the_answer_alone(trained, call):
    flags = [f"--workdir={trained / 'run'}", f"--image={trained / 'picture.png'}", "--max_tokens=4"]
    status, out, error = call("answer", *flags, "--question=what colour is the circle?")
    assert (status, error) == (0, "") and out.endswith("\n")
    assert call("answer", *flags)[0] == 0


def test_many_questions_are_answered_in_their_order(trained, call, tmp_path):
    picture = Image.open(trained / "picture.png")
    for name in ("b.png", "a.jpg"):
        picture.rotate(90 * (name == "b.png")).save(tmp_path / name)
    asked = [{"question": "how many?", "image": "b.png", "id": 7}, {"question": "and now?"}, {"image": "a.jpg"}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(line) + "\n\n" for line in asked))
    run = f"--workdir={trained / 'run'}"
    flags = [run, "--max_tokens=4", "--batch_size=2", f"--questions={tmp_path / 'q.jsonl'}"]
    status, out, error = call("answer", *flags, f"--out={tmp_path / 'a.jsonl'}")
    assert (status, error) == (0, "") and "3 answers" in out
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [{k: line[k] for k in given} for line, given in zip(lines, asked, strict=True)] == asked
    assert lines[2]["question"] == "describe:"
    assert call("answer", *flags)[1] == (tmp_path / "a.jsonl").read_text()
    _, out, _ = call("answer", run, "--max_tokens=4", f"--images={tmp_path}", "--question=how  many?", "--batch_size=2")
    folder = [json.loads(line) for line in out.splitlines()]
    assert [line["image"] for line in folder] == ["a.jpg", "b.png"]
    assert folder[1]["answer"] == lines[0]["answer"] and folder[1]["question"] == "how many?"


def test_prompts_with_pictures_are_drawn_in_their_order(trained, call, tmp_path):
    lines = [{"prompt": "a red circle"}, {"prompt": "the same in blue", "image": "picture.png"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [f"--workdir={trained / 'run'}", f"--images={trained}", "--num_images=1", "--solver=dpm++", "--steps=3"]
    status, out, error = call("generate", *flags, f"--prompts_file={tmp_path / 'p.jsonl'}", f"--out={tmp_path / 'out'}")
    assert (status, error) == (0, "") and "2 pictures of 2 prompts" in out
    made = [json.loads(line) for line in (tmp_path / "out/prompts.jsonl").read_text().splitlines()]
    assert [line["prompt"] for line in made] == [line["prompt"] for line in lines]


def test_evaluate_writes_what_it_prints(trained, call, tmp_path):
    flags = [f"--workdir={trained / 'run'}", "--task=reading", "--per_kind=2", "--held_out=1", "--batch_size=8"]
    status, out, _ = call("evaluate", *flags, f"--out={tmp_path / 'new/scores.json'}")
    assert status == 0
    scores = json.loads((tmp_path / "new/scores.json").read_text())
    assert scores["amount"]["per_kind"] == 2 and scores["run"] == "unified"
    kinds = [line.split() for line in out.splitlines() if line.startswith("  ")]
    shown = {words[0]: float(words[1]) for words in kinds if len(words) == 2}
    assert shown["overall"] == pytest.approx(scores["reading"]["overall"], abs=5e-4)


def test_evaluate_shows_what_it_drew(trained, call, tmp_path):
    flags = [f"--workdir={trained / 'run'}", "--task=geneval", "--per_task=1", "--images=1", "--held_out=0"]
    assert call("evaluate", *flags, f"--grid={tmp_path / 'drawn.png'}")[0] == 0
    assert Image.open(tmp_path / "drawn.png").width > 500


def test_genevals_prompts_are_drawn_into_its_layout_and_scored(trained, call, tmp_path):
    lines = geneval_prompts(1) + geneval_prompts(1, held_out=True)[:1]
    prompts, out, results = tmp_path / "metadata.jsonl", tmp_path / "drawn", tmp_path / "new/results.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    draw = ["generate", f"--workdir={trained / 'run'}", f"--geneval={prompts}", "--num_images=2", f"--out={out}"]
    status, printed, error = call(*draw)
    assert (status, error) == (0, "") and "14 pictures of 7 prompts" in printed
    names = [f"{i:05d}/samples/{k:04d}.png" for i in range(7) for k in range(2)]
    assert sorted(str(p.relative_to(out)) for p in out.glob("*/samples/*")) == names
    assert [json.loads((out / f"{i:05d}/metadata.jsonl").read_text()) for i in range(7)] == lines
    noted = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    assert [(n["file"], n["prompt"]) for n in noted] == [(n, lines[i // 2]["prompt"]) for i, n in enumerate(names)]
    assert call(*draw)[0] == 1  # samples of another run would be scored with these

    # One picture is right.
    true = drawing.true_picture(lines[3], 32)
    Image.fromarray(true).save(out / names[7])
    status, printed, error = call("evaluate", f"--folder={out}", "--task=geneval", f"--out={results}")
    rows = [json.loads(row) for row in results.read_text().splitlines()]
    assert (status, error) == (0, "") and [row["filename"] for row in rows] == [str(out / name) for name in names]
    assert list(rows[0]) == ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert rows[7]["correct"] and rows[7]["tag"] == "colors" and "found 0" in rows[0]["reason"]
    share = {tag: [row["correct"] for row in rows if row["tag"] == tag] for tag in TAGS}
    shown = dict(line.split() for line in printed.splitlines() if len(line.split()) == 2)
    assert {tag: float(shown[tag]) for tag in TAGS} == pytest.approx(
        {tag: sum(right) / len(right) for tag, right in share.items()}, abs=5e-4
    )
    assert float(shown["overall"]) == pytest.approx(sum(float(shown[tag]) for tag in TAGS) / 6, abs=1e-3)


# What they refuse


BAD = [
    ("train --workdir=NEW", "--config is missing"),
    ("train --config=TINY", "--workdir is missing"),
    ("train --config=TINY --workdir=NEW --wrokdir=x", "did you mean --workdir?"),
    ("train --config=missing.py --workdir=NEW", "missing.py does not exist"),
    ("train --config=TINY:stage9 --workdir=NEW", "its stages are pretrain, decoder, unified"),
    ("train --config=TINY --workdir=NEW --config.stepz=3", "did you mean steps?"),
    ("train --config=TINY --workdir=NEW --config.optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
    ("train --config=TINY --workdir=NEW --config.learning_rate=1", "did you mean optimizer.learning_rate?"),
    (
        "train --config=TINY --workdir=NEW --config.stages.unified.data.row_len=1",
        "mean stages.unified.data.row_length?",
    ),
    ("train --config=TINY --workdir=NEW --config.model.decoder.widht=1", "did you mean model.decoder.width?"),
    ("train --config=TINY --workdir=NEW --config.steps=many", "must be a whole number, like 2"),
    ("train --config=TINY --workdir=NEW --config.optimizer.learning_rate=fast", "must be a number"),
    ("train --config=TINY --workdir=NEW --config.optimizer=3", "set --config.optimizer.NAME="),
    ("train --config=TINY --workdir=NEW --config.steps", "--config.steps has no value"),
    ("train --config=TINY --workdir=NEW --config.steps=0", "at least 1"),
    ("train --config=TINY --workdir=NEW --config.compute_dtype=float23", "compute_dtype: 'float23' is none of"),
    ("train --config=TINY --workdir=NEW --config.optimizer.mu_dtype=int8", "mu_dtype: 'int8' is none of"),
    ("plan --config=TINY:unified --topology=cpu:8 --config.compute_dtype=half", "compute_dtype: 'half' is none of"),
    ("train --config=TINY --workdir=NEW --config.mesh.fsdp=7", "devices"),
    ("train --config=TINY:unified --workdir=NEW", "train it first"),
    ("train --config=BROKEN --workdir=NEW", "fails in line 2 with ZeroDivisionError"),
    ("train --config=SYNTAX --workdir=NEW", "fails in line 1 with SyntaxError"),
    ("train --config=EMPTY --workdir=NEW", "defines no function get_config"),
    ("train --config=TINY --workdir=FILE", "is a file"),
    ("generate --workdir=RUN --out=NEW", "there is nothing to draw"),
    ("generate --workdir=RUN --out=NEW --prompt=", "--prompt is empty"),
    ("generate --workdir=RUN --out=NEW --prompts_file=missing.txt", "cannot be read"),
    ("generate --workdir=RUN --out=NEW --prompts_file=PICTURE", "is not UTF-8 text"),
    ("generate --workdir=RUN --out=NEW --prompts_file=EMPTY", "holds no prompt"),
    ("generate --workdir=RUN --out=NEW --geneval=missing.jsonl", "cannot be read as GenEval's metadata"),
    ("generate --workdir=RUN --out=NEW --geneval=SYNTAX", "line 1 is not a GenEval prompt"),
    ("generate --workdir=RUN --out=NEW --geneval=EMPTY", "there is nothing to draw"),
    ("generate --workdir=RUN --out=NEW --geneval=PROMPTS --prompt=x", "leave --prompt and --prompts_file out"),
    ("generate --workdir=RUN --out=SAMPLES --geneval=PROMPTS", "holds pictures in GenEval's layout already"),
    ("generate --workdir=RUN --out=FILE --prompt=x", "is a file"),
    ("generate --workdir=RUN --out=FILE/below --prompt=x", "cannot be written"),
    ("generate --workdir=RUN --out=NEW --prompt=x --num_images=0", "at least 1"),
    ("generate --workdir=NEW --out=NEW --prompt=x", "does not exist"),
    ("generate --workdir=FOREIGN --out=NEW --prompt=x", "holds no finished unified run"),
    ("generate --workdir=RUN --run=nothing --out=NEW --prompt=x", "is not a run"),
    ("generate --workdir=RUN --run=pretrain --out=NEW --prompt=x", "is a pretrain run"),
    ("answer --workdir=RUN --image=missing.png", "cannot be read"),
    ("answer --workdir=RUN --image=SYNTAX", "cannot be read"),
    ("answer --workdir=RUN --image=PICTURE --question=", "--question is empty"),
    ("answer --workdir=FOREIGN --image=PICTURE", "holds no finished unified run"),
    ("answer --workdir=RUN", "there is nothing to read"),
    ("answer --workdir=RUN --image=PICTURE --images=RUN", "there is nothing to read"),
    ("answer --workdir=RUN --images=FOREIGN", "holds no pictures"),
    ("answer --workdir=RUN --questions=LINES", "line 3 is not of the form"),
    ("answer --workdir=RUN --questions=LINES --image=PICTURE", "leave --image and --question out"),
    ("answer --workdir=RUN --questions=EMPTY", "holds no question"),
    ("answer --workdir=RUN --questions=LOST", "gone.png cannot be read"),
    ("answer --workdir=RUN --image=PICTURE --top_p=0", "top_p 0.0 is not above 0"),
    ("answer --workdir=RUN --image=PICTURE --out=FOREIGN", "is a folder"),
    ("generate --workdir=RUN --out=NEW --prompts_file=LINES", "line 1 is not of the form"),
    ("chat --workdir=FOREIGN", "holds no finished unified run"),
    ("chat --workdir=RUN --out=FILE", "is a file"),
    ("serve --workdir=FOREIGN --port=0", "holds no finished unified run"),
    ("serve --workdir=RUN --host=192.0.2.1", "cannot be used"),
    ("evaluate --workdir=RUN --task=painting", "spread, reading, reconstruction, pictures, judge, all"),
    ("evaluate --workdir=RUN --task=pictures", "does not fit this run"),
    ("evaluate --workdir=RUN --task=reading --grid=NEW", "draws none"),
    ("evaluate --workdir=RUN --task=all --per_kind=-1", "at least 1"),
    ("evaluate --workdir=RUN --task=all --out=FOREIGN", "is a folder"),
    ("evaluate --workdir=NEW --task=all", "does not exist"),
    ("evaluate --task=all", "one of the arguments --workdir --folder is required"),
    ("evaluate --workdir=RUN --folder=NEW --task=geneval", "not allowed with argument --workdir"),
    ("evaluate --folder=NEW --task=reading", "--folder is scored with --task=geneval"),
    ("evaluate --folder=NEW --task=geneval", "holds no GenEval samples"),
    ("evaluate --folder=SAMPLES --task=geneval", "must hold one prompt and holds 0"),
    ("demo --workdir=NEW --config=TINY --images=none", "at least 1"),
    ("demo --workdir=FILE --config=TINY", "is a file"),
]


@pytest.mark.parametrize("line, words", BAD, ids=[line for line, _ in BAD])
def test_a_mistake_is_one_sentence_and_leaves_no_trace(trained, call, tmp_path, line, words):
    places = {"TINY": TINY, "RUN": trained / "run", "PICTURE": trained / "picture.png", "NEW": tmp_path / "new"}
    for name, text in (("BROKEN", "def get_config(s=''):\n    return 1 / 0\n"), ("SYNTAX", "def (\n"), ("EMPTY", "")):
        places[name] = tmp_path / f"{name.lower()}.py"
        places[name].write_text(text)
    places["FILE"] = tmp_path / "file"
    places["FILE"].write_text("a file")
    places["FOREIGN"] = tmp_path / "foreign"
    (places["FOREIGN"] / "photos").mkdir(parents=True)
    places["LINES"], places["LOST"] = tmp_path / "lines.jsonl", tmp_path / "lost.jsonl"
    places["LINES"].write_text('{"question": "how many?"}\n\n{"question": 3}\n')
    places["LOST"].write_text('{"image": "gone.png"}\n')
    places["PROMPTS"] = tmp_path / "prompts.jsonl"
    places["PROMPTS"].write_text(json.dumps(geneval_prompts(1)[0]))
    places["SAMPLES"] = tmp_path / "samples"
    (places["SAMPLES"] / "00000").mkdir(parents=True)
    (places["SAMPLES"] / "00000/metadata.jsonl").write_text("")
    for name, place in places.items():
        line = line.replace(f"={name}", f"={place}")
    before = contents(tmp_path), contents(trained)
    status, out, error = call(*line.split())
    assert status == 1 and words in error, error
    assert error.startswith("error: ") and error.endswith("\n") and error.count("\n") == 1 and out == ""
    assert (contents(tmp_path), contents(trained)) == before


def test_errors_are_plain_in_a_real_process():
    command = [sys.executable, "-m", "pisces_jax.evaluate", "--workdir=nowhere", "--task=all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: --workdir=nowhere does not exist: give the folder of a finished training\n"


# Configs


def test_a_key_without_a_stage_holds_for_all_that_have_it():
    changes = {"seed": "3", "model.decoder.width": "8", "model.text_tower.width": "8", "stages.unified.steps": "9"}
    stages = load_stages(TINY, changes)
    assert list(stages) == ["pretrain", "decoder", "unified"]  # what others need comes first
    assert [run.seed for run in stages.values()] == [3, 3, 3]
    assert [run.steps for run in stages.values()] == [2, 2, 9]
    assert [run.model.decoder.width for run in stages.values()] == [8, 8, 8]
    assert stages["pretrain"].model.text_tower.width == 8 and "text_tower" not in stages["unified"].model


def test_values_keep_their_types_and_names_of_ones_own_may_be_new():
    run = load_stages(f"{TINY}:decoder", {
        "optimizer.param_groups": "((r'.*', 0.5, 0.1),)", "log.tensorboard": "true", "optimizer.clip": "3",
        "param_dtype.generation_encoder": "bfloat16",
    })["decoder"]  # fmt: skip
    assert run.optimizer.param_groups == ((".*", 0.5, 0.1),) and run.log.tensorboard is True
    assert run.optimizer.clip == 3.0 and run.param_dtype.generation_encoder == "bfloat16"


def test_stages_in_a_circle_are_refused(tmp_path):
    path = tmp_path / "circle.py"
    path.write_text(
        "from ml_collections import ConfigDict\nfrom pisces_jax.training.config import run_config\n"
        "def get_config(stage=''):\n    a = run_config(name='a', init_from=dict(x='b'))\n"
        "    b = run_config(name='b', init_from=dict(x='a'))\n    return ConfigDict(dict(stages=dict(a=a, b=b)))\n"
    )
    with pytest.raises(UserError, match="need one another's weights"):
        load_stages(str(path), {})


def test_output_is_whole_or_not_there(tmp_path, monkeypatch):
    (tmp_path / "old.png").write_bytes(b"old")
    real = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        if content == b"second":
            raise OSError(28, "No space left on device")
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", full)
    for folder in (tmp_path, tmp_path / "new"):
        with pytest.raises(UserError, match="No space left"):
            cli.write_files(folder, {"old.png": b"first", "other.png": b"second"}, "--out")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"old.png": b"old"}
