"""What all commands share: paths as users give them, and output that may be closed, narrow or full."""

import errno
import io
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pisces_jax.data import sources
from pisces_jax.data.arrays import write_arrays
from pisces_jax.data.formats import webdataset
from pisces_jax.training.config_files import load_stages
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils import cli, files
from pisces_jax.utils.errors import UserError, run_command
from pisces_jax.weights.sources import resolve

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know, and no HOME."""
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)


# Paths


def test_paths_of_flags_are_on_this_machine(home):
    parser = cli.Parser("x", "", [])
    parser.add_argument("--out", type=cli.path)
    assert parser.parse(["--out=~/runs"]).out == home / "runs"
    assert parser.parse(["--out", "a:b/c"]).out == Path("a:b/c")
    for address in ("gs://bucket/run", "s3://bucket", "https://host/run", "file:///run"):
        with pytest.raises(UserError, match=f"argument --out: {address} is not on this machine: give a local path"):
            parser.parse([f"--out={address}"])
    with pytest.raises(UserError, match="~nobody-at-all/run names a home folder that this machine does not know"):
        parser.parse(["--out=~nobody-at-all/run"])


def test_every_path_flag_is_of_that_type():
    for path in (ROOT / "pisces_jax").rglob("*.py"):
        assert "type=Path" not in path.read_text(), f"{path}: take cli.path"


def test_paths_of_configs_are_expanded(home):
    (home / "data").mkdir()
    (home / "data/a.jsonl").write_text('{"image": "1.png", "text": "a"}\n')
    for path in ("~/data/a.jsonl", ["~/data/a.jsonl"], "~/data/*.jsonl"):
        source = sources.make_source(dict(kind="json", path=path, recipe="caption", image_root="~/pictures")).source
        assert len(source) == 1
        with pytest.raises(UserError, match=f"{home}/pictures/1.png"):
            source[0].parts[0].array()
    config = load_stages(f"{ROOT}/tests/tiny_config.py:decoder", {})["decoder"]
    for place in ("gs://bucket/llama", "~nobody-at-all/llama"):
        config.data.tokenizer = place
        for read in (lambda: load_tokenizer(config, home), lambda place=place: resolve(place)):
            with pytest.raises(UserError, match=place):
                read()
    with pytest.raises(UserError, match="gs://bucket/index is not on this machine"):
        webdataset._place("a.tar", "gs://bucket/index")


def test_configs_lie_in_folders_with_colons(home):
    folder = home / "12:30:00"
    folder.mkdir()
    (folder / "c.py").symlink_to(ROOT / "tests/tiny_config.py")
    for name in (f"{folder}/c.py", "~/12:30:00/c.py"):
        assert list(load_stages(name, {})) == ["pretrain", "decoder", "unified"]
        assert list(load_stages(f"{name}:decoder", {})) == ["decoder"]
    for wrong, words in ((f"{folder}/d.py", "does not exist"), (f"{folder}/c.py:x", "has no stage 'x'")):
        with pytest.raises(UserError, match=re.escape(str(folder)) + f".*{words}"):
            load_stages(wrong, {})


def test_a_user_without_a_home_needs_none(homeless, tmp_path):
    assert files.user_cache("xla") is None
    cli.start()
    with pytest.raises(UserError, match="no place for the index of memory://a.tar: set index_dir to a folder"):
        webdataset._place("memory://a.tar", None)
    with pytest.raises(UserError, match="~/runs names a home folder that this machine does not know"):
        files.local_path("~/runs")


# Output


def ended(main):
    """Exit status of a command."""
    try:
        run_command(main)
    except SystemExit as end:
        return end.code
    return 0


def test_output_that_is_not_read_stops_nothing(monkeypatch):
    done = []

    def main():
        cli.say("x" * 100_000)
        cli.say("more")
        done.append(True)

    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert ended(main) == 0 and done
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)  # `>&-`
    assert ended(main) == 0 and len(done) == 2


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_output_takes_any_text(encoding, monkeypatch):
    """A terminal of ASCII alone; a file name of bytes that are not UTF-8."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    assert ended(lambda: cli.say("4 × v5p", os.fsdecode(b"caf\xe9"))) == 0
    assert (
        written.getvalue() == ("4 × v5p caf\\udce9\n" if encoding == "utf-8" else "4 \\xd7 v5p caf\\udce9\n").encode()
    )


def test_in_the_c_locale_a_message_holds_any_name(tmp_path):
    """Without UTF-8 mode, as `LC_ALL=C` once was: the name is written with escapes, and the file is found."""
    code = (
        "import sys; from pathlib import Path; from pisces_jax.utils.errors import UserError, run_command\n"
        "def main():\n    raise UserError(f'{sys.argv[1]} holds ' + Path(sys.argv[1]).read_text())\n"
        "run_command(main)"
    )
    path = tmp_path / "café.txt"
    path.write_text("one sentence")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": ""}
    done = subprocess.run([sys.executable, "-c", code, path], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/caf\\udcc3\\udca9.txt holds one sentence\n".encode()


def refused(number, *names):
    def main():
        raise OSError(number, os.strerror(number), *names)

    return main


def test_what_the_machine_refuses_is_one_sentence(capsys):
    for number, words in (
        (errno.ENOSPC, "No space left on device: free some space"), (errno.EROFS, "change its permissions"),
        (errno.EACCES, "Permission denied: change its permissions, or give another"), (errno.ENOTDIR, "another path"),
    ):  # fmt: skip
        assert ended(refused(number, b"/run/caf\xe9")) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: /run/caf") and words in error and error.count("\n") == 1
    with pytest.raises(OSError):
        run_command(refused(errno.EBADF))  # a mistake of ours


def test_a_full_disk_is_one_sentence(tmp_path, capsys):
    """Here a limit on the size of files."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    try:
        for write in (
            lambda: files.write_atomic(tmp_path / "tokenizer.model", bytes(2**21)),
            lambda: write_arrays(tmp_path / "a.lengths", {}, {"tokens": np.zeros(2**18)}),
        ):
            assert ended(write) == 1
            error = capsys.readouterr().err
            assert re.fullmatch(rf"error: {tmp_path}/(tokenizer.model|a.lengths): .*: free some space.*\n", error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
