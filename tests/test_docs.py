"""The docs show what works: commands parse, those that take seconds run, links lead somewhere, examples are run."""

import contextlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import types
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pisces_jax import sharding
from pisces_jax.data import sources
from pisces_jax.planning import shardings
from pisces_jax.training.config_files import load_stages
from pisces_jax.training.programs import PROGRAMS
from pisces_jax.utils import cli
from pisces_jax.utils.errors import run_command
from pisces_jax.weights.families import FAMILIES

ROOT = Path(__file__).resolve().parent.parent
# The records of past runs keep the commands and keys of their time.
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
TINY = ROOT / "tests/tiny_config.py"


# What the pages hold


def blocks(page):
    """(language, text) of the fenced code blocks."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.M | re.S)


def lines(page):
    """The shell lines of a page: comments taken off, continued lines joined."""
    for language, text in blocks(page):
        if language in ("", "sh", "bash"):
            for line in text.replace("\\\n", " ").splitlines():
                yield re.sub(r"(^|\s)#.*", "", line).strip()


def commands_in(line):
    """The arguments of every `python -m pisces_jax...` and launch script in a line, `$(...)` included."""
    for inner in re.findall(r"\$\((.*?)\)", line):
        yield from commands_in(inner)
    line = re.sub(r"\$\(.*?\)", "", line).split(">")[0]
    if found := re.search(r"(\bpython -m pisces_jax|\blaunch/\w+\.sh).*", line):
        yield tuple(shlex.split(found[0].removeprefix("python -m ")))


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    found = set()
    for heading in re.findall(r"^#+ +(.*)$", text, re.M):
        name = re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", heading).lower()).replace(" ", "-")
        found.add(name if name not in found else f"{name}-{sum(f.startswith(name) for f in found)}")
    return found


COMMANDS = sorted({command for page in PAGES for line in lines(page) for command in commands_in(line)})
MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "pisces_jax").rglob("*.py")
    if 'if __name__ == "__main__"' in path.read_text()
)


def show(command):
    return " ".join(command)


def training_of(command):
    """A launch script's command as the one that it starts on every host (none with `--delete`)."""
    if not command[0].startswith("launch/"):
        return command
    if "--" not in command:
        return ("pisces_jax.train", "--help")
    module = next((flag.removeprefix("--module=") for flag in command if flag.startswith("--module=")), "train")
    return (f"pisces_jax.{module}", *command[command.index("--") + 1 :])


# Flags


class Parsed(Exception):
    """Stops a command as soon as its flags are parsed."""


def main_of(module):
    folder = (ROOT / module.replace(".", "/")).is_dir()
    return import_module(f"{module}.__main__" if folder else module).main


@contextlib.contextmanager
def called_with(command, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", list(command))
        yield patch


def parse(command, monkeypatch):
    """The flags of a command; None where it only prints its help.

    Raises:
        UserError: a flag that does not exist, or a value that it does not take.
    """
    parse_flags = cli.Parser.parse

    def stop(parser, argv=None):
        raise Parsed(parse_flags(parser, argv))

    with called_with(command, monkeypatch) as patch:
        patch.setattr(cli.Parser, "parse", stop)
        try:
            main_of(command[0])()
        except Parsed as parsed:
            return parsed.args[0]
        except SystemExit as end:
            assert not end.code
    return None


def check(command, monkeypatch):
    """That the command's module, flags, config file, stage and config keys exist."""
    flags = parse(command, monkeypatch)
    if getattr(flags, "config", None):
        _, overrides = cli.split_overrides(command[1:])
        load_stages(str(ROOT / flags.config), overrides)


def test_commands_are_found():
    shown = {command[0] for command in COMMANDS}
    assert {"pisces_jax.train", "pisces_jax.plan", "launch/tpu_vm.sh"} <= shown and len(COMMANDS) > 40


@pytest.mark.parametrize("command", COMMANDS, ids=show)
def test_flags_and_config_keys_exist(command, monkeypatch):
    check(training_of(command), monkeypatch)


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_commands_that_parse(module, monkeypatch, capsys):
    """`--help` of every command; the examples in it are held to the same as those of the pages."""
    for sub in {"pisces_jax.data": ("inspect", "stats", "index"), "pisces_jax.convert": ("import", "export")}.get(
        module, ("",)
    ):
        assert parse((module, *filter(None, [sub]), "--help"), monkeypatch) is None
        printed = capsys.readouterr().out
        examples = [command for line in printed.splitlines() for command in commands_in(line.partition("#")[0])]
        examples = [command for command in examples if len(command) > 1 and "[" not in show(command)]
        assert examples, printed
        for command in examples:
            check(command, monkeypatch)


# Commands that run

# How each command is run here, at its smallest: the value that a flag gets, or None to leave it out. The first pattern
# that matches holds.
TRAINED = {"--workdir": "{trained}/run", "--run": None}
RUNS = {
    r"pisces_jax\.xla_flags .*": {},
    r"pisces_jax\.\w+( \w+)? --help": {},
    r"pisces_jax\.plan .*--topology=cpu:2.*": {"--config": f"{TINY}:decoder", "--json": "{tmp}/plan.json"},
    r"pisces_jax\.data (stats|inspect) .*": {
        **TRAINED, "--config": f"{TINY}:unified", "--config.": None, "--out": "{tmp}/out", "--first": "0",
        "--count": "1",
    },
    r"pisces_jax\.data index .*": {"--path": "{tmp}/shard.tar", "--index_dir": "{tmp}", "--workers": "1"},
    r"pisces_jax\.answer .*": {
        **TRAINED, "--image": "{trained}/picture.png", "--question": "how many?", "--images": "{trained}",
        "--questions": "{tmp}/questions.jsonl", "--out": "{tmp}/answers.jsonl",
    },
    r"pisces_jax\.generate --workdir=weights/.*": {
        "--workdir": "{released}", "--out": "{tmp}/drawn_released", "--prompt": "a red circle", "--seeds": "1",
    },
    r"pisces_jax\.convert import --from=(weights/)?BLIP3o-Model.*": {"--from": "{released}", "--out": "{tmp}/blip3o"},
    r"pisces_jax\.generate .*": {
        **TRAINED, "--out": "{tmp}/drawn", "--prompts_file": "{tmp}/prompts.txt", "--num_images": "1",
        "--prompt": "a red circle",
        "--geneval": "{tmp}/geneval/00000/metadata.jsonl",
    },
    r"pisces_jax\.evaluate --workdir=\S+ --task=(?!pictures).*": {
        **TRAINED, "--out": "{tmp}/scores.json", "--grid": "{tmp}/grid.png", "few": ""
    },
    r"pisces_jax\.evaluate --folder=.*": {"--folder": "{tmp}/geneval", "--out": "{tmp}/results.jsonl"},
    r"pisces_jax\.convert export .*": {
        **TRAINED, "--part": None, "--merge": None, "--dtype": "bfloat16", "--out": "{tmp}/exported",
    },
    r"launch/.*": {"dry": ""},
}  # fmt: skip
FEW = ("--per_task=1", "--images=2", "--per_kind=2", "--held_out=1", "--spread=1", "--pictures=3")
NOT_RUN = {
    r"pisces_jax\.train .*": "minutes to days; tests/test_commands.py and test_training.py train tiny runs",
    r"pisces_jax\.demo .*": "20 minutes and more; the fixture `trained` is a tiny one",
    r"pisces_jax\.cache .*": "needs a trained or published encoder; tests/test_features.py writes and reads caches",
    r"pisces_jax\.plan .*--search.*": "half an hour; tests/test_planning.py searches for a tiny step",
    r"pisces_jax\.plan .*--topology=(rtx|[ah])\d+\w*:.*": "needs the extra plan-gpu and a minute or more",
    r"pisces_jax\.plan .*": "two minutes and more for a slice; tests/test_planning.py plans tiny steps for slices",
    r"pisces_jax\.evaluate --workdir=\S+ --task=pictures.*": "needs a run on real pictures; tests/test_evaluation.py",
    r"pisces_jax\.chat .*": "reads what is typed; tests/test_chat.py types",
    r"pisces_jax\.serve .*": "serves until it is ended; tests/test_serve.py",
    r"pisces_jax\.checkpoint .*": "its arguments are folders of a run; tests/test_checkpoints.py runs each command",
    r"pisces_jax\.convert import .*": "needs published weights; tests/test_weights.py imports generated ones",
}


def first_match(command, table):
    return next((value for pattern, value in table.items() if re.fullmatch(pattern, show(command))), None)


def smallest(command, values, **places):
    """The command with those values in place of its own."""
    words = [command[0]]
    for word in command[1:]:
        flag = "--config." if word.startswith("--config.") else word.partition("=")[0]
        if flag not in values:
            words.append(word)
        elif values[flag] is not None:
            words.append(f"{flag}={values[flag].format(**places)}")
    if "dry" in values:
        words = [words[0], "--dry-run", *(word for word in words[1:] if word != "--dry-run")]
    return (*words, *(FEW if "few" in values else ()))


@pytest.mark.parametrize("command", COMMANDS, ids=show)
def test_a_command_is_run_or_there_is_a_reason_why_not(command):
    assert first_match(command, {**RUNS, **NOT_RUN}) is not None, "add it to RUNS, or to NOT_RUN with the reason"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("docs")
    (folder / "prompts.txt").write_text("a red circle\n")
    (folder / "questions.jsonl").write_text('{"question": "how many?", "image": "picture.png"}\n')
    for name in ("1.png", "1.txt"):
        (folder / name).write_text("a caption")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / "1.png")
    prompt = folder / "geneval/00000"
    (prompt / "samples").mkdir(parents=True)
    shutil.copy(folder / "1.png", prompt / "samples/0000.png")
    line = dict(tag="single_object", include=[{"class": "circle", "count": 1}], prompt="a photo of a circle")
    (prompt / "metadata.jsonl").write_text(json.dumps(line) + "\n")
    with tarfile.open(folder / "shard.tar", "w") as shard:
        for name in ("1.png", "1.txt"):
            shard.add(folder / name, name)
    return folder


@pytest.mark.parametrize("command", [c for c in COMMANDS if "plan" in c[0] and "cpu:" in show(c)], ids=show)
def test_plans_on_cpus_are_not_refused(command, monkeypatch):
    """Without the compilation, which is run on a tiny config below."""
    flags = parse(command, monkeypatch)
    (config,) = load_stages(str(ROOT / flags.config), {}).values()
    mesh = {"fsdp": int(flags.topology.partition(":")[2]), **(flags.mesh or {})}
    assert shardings.trainer_without_devices(config, mesh).abstract.trained


# Commands that differ in paths and amounts alone are run once; paths are filled in by the test.
SMALLEST = list(
    dict.fromkeys(
        tuple(smallest(command, values, tmp="{tmp}", trained="{trained}", released="{released}"))
        for command in COMMANDS
        if (values := first_match(command, RUNS)) is not None
    )
)


@pytest.mark.parametrize("words", SMALLEST, ids=show)
def test_what_runs_on_a_laptop_runs(words, places, trained, models_opened_once, monkeypatch, capsys):
    words = [word.replace("{tmp}", str(places)).replace("{trained}", str(trained)) for word in words]
    if any("{released}" in word for word in words):
        words = [word.replace("{released}", str(released(places))) for word in words]
    if words[0].startswith("launch/"):
        ended = subprocess.run(["bash", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0 and ended.stdout, ended.stderr
        return
    with called_with(words, monkeypatch) as patch:
        patch.chdir(ROOT)
        try:
            run_command(main_of(words[0]))
        except SystemExit as end:
            assert not end.code, capsys.readouterr().err
    assert capsys.readouterr().out


def released(places):
    """A tiny folder in the layout of BLIP3-o's released models."""
    import blip3o_folder  # with torch and its libraries

    folder = places / "BLIP3o-Tiny"
    if not folder.exists():
        blip3o_folder.write(folder)
    return folder


def test_commands_of_every_kind_are_run():
    assert len(SMALLEST) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    shown = set(re.findall(r"^make ([a-z-]+)", "\n".join(lines(page)), re.M))
    shown |= set(re.findall(r"`make ([a-z-]+)", page.read_text()))
    assert shown <= targets


# Links and Python


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name}: {target} does not exist"
        assert not anchor or anchor in anchors(file), f"{page.name}: {target}: headings are {sorted(anchors(file))}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    """Paths in code spans: modules of the package, configs, tests, scripts."""
    named = re.findall(r"`((?:pisces_jax|configs|tests|launch|notebooks|benchmarks)/[\w/.]+)`", page.read_text())
    made = {first_line(text) for _, text in blocks(ROOT / "docs/extend.md")}
    missing = [name for name in named if not (ROOT / name).exists() and name not in made]
    assert not missing, missing


def first_line(text):
    return text.partition("\n")[0].removeprefix("# ")


EXECUTED = ("extend.md", "gpu.md", "look_at_shardings.md", "README.md")


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in EXECUTED], ids=lambda page: page.name)
def test_python_is_python(page):
    for language, text in blocks(page):
        if language == "python":
            compile(text, str(page), "exec")


@pytest.mark.parametrize("name", ["gpu.md", "look_at_shardings.md"])
def test_examples_of_planning_run(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sharding, "RULES", sharding.RULES)  # which an example replaces
    for language, text in blocks(ROOT / "docs" / name):
        if language == "python":
            exec(compile(text, name, "exec"), {"__name__": "__main__"})
    assert "GiB" in capsys.readouterr().out


@pytest.mark.slow
def test_the_example_of_the_readme_runs(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "drawn").mkdir()
    (tmp_path / "runs/shapes").symlink_to(trained / "run")
    (tmp_path / "drawn/0000_00.png").symlink_to(trained / "picture.png")
    (text,) = [text for language, text in blocks(ROOT / "README.md") if language == "python"]
    exec(compile(text, "README.md", "exec"), {"__name__": "__main__"})
    assert "[" in capsys.readouterr().out


@pytest.mark.slow
def test_examples_of_extensions_run(tmp_path, monkeypatch):
    """The Python blocks of docs/extend.md in order: one that begins with a file's name is that module, the others are
    one script."""
    monkeypatch.chdir(tmp_path)
    script = {"__name__": "__main__"}
    before = {name: dict(table) for name, table in tables().items()}
    try:
        for language, text in blocks(ROOT / "docs/extend.md"):
            if language != "python":
                continue
            if not first_line(text).endswith(".py"):
                exec(compile(text, "docs/extend.md", "exec"), script)
                continue
            assert not (ROOT / first_line(text)).exists(), f"{first_line(text)}: the example would replace a file"
            name = first_line(text).removesuffix(".py").replace("/", ".")
            module = types.ModuleType(name)
            monkeypatch.setitem(sys.modules, name, module)
            exec(compile(text, name, "exec"), module.__dict__)
    finally:
        for name, table in tables().items():
            table.clear()
            table.update(before[name])
    assert os.listdir(tmp_path)


def tables():
    """What the examples add to."""
    return {"programs": PROGRAMS, "readers": sources.READERS, "families": FAMILIES}
