"""What the commands share: flags whose errors are one sentence, checks of output paths, and atomic output.

Data workers import the module of their command again, and with it this one. So JAX is imported inside functions only.
"""

import argparse
import difflib
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn, TypeVar

from pisces_jax.utils import files
from pisces_jax.utils.errors import UserError, reader_may_leave, refusal

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """`argparse` that raises `UserError`, and names the nearest flag when one is unknown."""

    def __init__(self, module: str, description: str, examples: Sequence[str]) -> None:
        """A parser for `python -m pisces_jax.MODULE`; `examples` are command lines without that beginning."""
        command = f"python -m pisces_jax.{module}"
        shown = "\n".join(f"  {command} {example}" for example in examples)
        super().__init__(
            prog=command, description=description, epilog=f"examples:\n{shown}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            names = missing.split(", ")
            verb, them = ("are", "them") if len(names) > 1 else ("is", "it")
            message = f"{' and '.join(names)} {verb} missing: give {them}, as in the examples of --help"
        raise UserError(message.replace("\n", " "))

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """The values of all flags, from `argv` or the command line.

        Raises:
            UserError: a flag is unknown or missing, or its value is not valid.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.0)[0]
            raise UserError(f"flag {unknown[0]!r} does not exist: did you mean {near}?")
        return given


def whole_number(least: int) -> Callable[[str], int]:
    """An argparse type: whole numbers of at least `least`."""
    return _number(int, "a whole number", least)


def number(least: float) -> Callable[[str], float]:
    """An argparse type: finite numbers of at least `least`."""
    return _number(float, "a number", least)


def path(text: str) -> Path:
    """An argparse type: a path on this machine, with `~` expanded (`files.local_path`)."""
    try:
        return files.local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def mesh_sizes(text: str) -> dict[str, int]:
    """An argparse type: the sizes of a mesh, like `data=2,fsdp=16,tensor=4`."""
    try:
        sizes = {name: int(size) for name, size in (word.split("=") for word in text.split(","))}
    except ValueError:
        sizes = {"": 0}
    if not set(sizes) <= {"data", "fsdp", "tensor"}:
        raise argparse.ArgumentTypeError(f"{text!r}: write it like data=2,fsdp=16,tensor=4")
    return sizes


def _number(convert: Callable[[str], Number], kind: str, least: Number) -> Callable[[str], Number]:
    def parse(text: str) -> Number:
        try:
            if least <= (value := convert(text)) < float("inf"):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is not {kind} of at least {least}")

    return parse


def add_process_flags(parser: Parser) -> None:
    """Adds the flags that `processes.start` takes."""
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="address of process 0 of several")
    parser.add_argument("--processes", type=whole_number(1), default=0, help="number of processes of the run")
    parser.add_argument("--process", type=whole_number(0), default=-1, help="index of this process, from 0")
    parser.add_argument(
        "--meet_seconds", type=whole_number(1), default=300, metavar="N", help="how long they wait for each other"
    )
    parser.add_argument(
        "--silent_seconds", type=whole_number(2), default=10, metavar="N",
        help="one that is not heard of for so long counts as gone, and the others end",
    )  # fmt: skip


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Separates `--config.key=value` and `--config.key value` from the other flags.

    Returns:
        The other flags, and the value of each key.

    Raises:
        UserError: a `--config.` flag has no value.
    """
    others: list[str] = []
    overrides: dict[str, str] = {}
    rest = list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--config."):
            others.append(flag)
            continue
        key, equals, value = flag.removeprefix("--config.").partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"{flag} has no value: write --config.{key}=VALUE")
            value = rest.pop(0)
        overrides[key] = value
    return others, overrides


def start() -> None:
    """Call this before the work of a command: it silences warnings of libraries and sets JAX's compilation cache.

    Compiled programs are kept in the user's cache folder, unless JAX_COMPILATION_CACHE_DIR names another.
    """
    import jax
    from absl import logging as absl_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)  # replaces absl's handler
    absl_logging.set_verbosity(absl_logging.ERROR)
    # Its background threads show a traceback of every save that storage refuses, which `training/saving.py` reports.
    absl_logging.get_absl_logger().addFilter(lambda record: "orbax" not in record.pathname)
    warnings.filterwarnings("ignore", module="orbax")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") is None and (cache := files.user_cache("xla")) is not None:
        jax.config.update("jax_compilation_cache_dir", str(cache))


def check_output(path: Path, flag: str, *, folder: bool) -> None:
    """Checks, without creating anything, that `path` can be written as a folder or as a file.

    Raises:
        UserError: it cannot; the sentence begins with `flag`.
    """
    if path.exists() and path.is_dir() != folder:
        kind = "a file: give a folder" if folder else "a folder: give a file"
        raise UserError(f"{flag}={path} is {kind}")
    above = path if path.is_dir() else path.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{flag}={path} cannot be written: {above} is not a writable directory")


def write_files(folder: Path, files: Mapping[str, bytes], flag: str) -> None:
    """Writes all files or none: first into a temporary folder inside `folder`, then each is moved to its place.

    Raises:
        UserError: they cannot be written; the sentence begins with `flag`.
    """
    made = not folder.exists()
    scratch = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".writing-"))
        for name, content in files.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_bytes(content)
        for name in files:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(scratch / name, folder / name)
    except OSError as error:
        raise UserError(f"{flag}={folder} cannot be written: {refusal(error) or error.strerror}") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def say(*words: object) -> None:
    """Prints a line and flushes it, so that output piped into a file appears while the command works.

    A command whose output nobody reads any more (`... | head`) does its work to the end.
    """
    with reader_may_leave():
        print(*words, flush=True)


def arguments() -> list[str]:
    """The arguments of the command line."""
    return sys.argv[1:]
