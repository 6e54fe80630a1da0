"""What the commands share: flags whose mistakes are one sentence, and output that is written whole or not at all.

A data worker imports its command's module again, and with it this one, so imports that bring JAX are inside functions.
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
from typing import NoReturn

from pisces_jax.utils.errors import UserError


class Parser(argparse.ArgumentParser):
    """`argparse` with `UserError` for a mistake, and with the nearest flag's name for an unknown one."""

    def __init__(self, module: str, description: str, examples: Sequence[str]) -> None:
        command = f"python -m pisces_jax.{module}"
        shown = "\n".join(f"  {command} {example}" for example in examples)
        super().__init__(
            prog=command, description=description, epilog=f"examples:\n{shown}", allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )  # fmt: skip

    def error(self, message: str) -> NoReturn:
        missing = message.removeprefix("the following arguments are required: ")
        if missing != message:
            names = " and ".join(missing.split(", "))
            message = f"{names} {'are' if ', ' in missing else 'is'} missing: give"
            message += f" {'them' if ', ' in missing else 'it'}, as in the examples of --help"
        raise UserError(message.replace("\n", " "))

    def parse(self, argv: Sequence[str] | None = None) -> argparse.Namespace:
        """All flags.

        Raises:
            UserError: an unknown flag, a missing one or a value that does not fit.
        """
        given, unknown = self.parse_known_args(argv)
        if unknown:
            known = [o for action in self._actions for o in action.option_strings if o.startswith("--")]
            near = difflib.get_close_matches(unknown[0].split("=")[0], known, 1, 0.0)[0]
            raise UserError(f"flag {unknown[0]!r} does not exist: did you mean {near}?")
        return given


def whole_number(least: int) -> Callable[[str], int]:
    """A type for argparse: whole numbers from `least`."""

    def parse(text: str) -> int:
        try:
            if (value := int(text)) >= least:
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")

    return parse


def number(least: float) -> Callable[[str], float]:
    """A type for argparse: finite numbers from `least`."""

    def parse(text: str) -> float:
        try:
            if least <= (value := float(text)) < float("inf"):
                return value
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{text!r} is no number of at least {least:g}")

    return parse


def add_process_flags(parser: Parser) -> None:
    """For `processes.start`."""
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of the first of several processes")
    parser.add_argument("--processes", type=whole_number(1), default=0, help="how many processes the run has")
    parser.add_argument("--process", type=whole_number(0), default=-1, help="which of them this is, from 0")


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(the other flags, the values of `--config.key=value` or `--config.key value`)."""
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


# Compilations that are kept, and output


def start() -> None:
    """To be called before a command's work: only what the user can use is said, and compilations are kept.

    Programs compiled once are kept for the user's next commands, unless JAX was told where to keep them.
    """
    import jax
    from absl import logging as absl_logging

    logging.basicConfig(level=logging.WARNING, format="%(message)s", force=True)  # absl has been there before
    absl_logging.set_verbosity(absl_logging.ERROR)
    warnings.filterwarnings("ignore", module="orbax")
    if os.environ.get("JAX_COMPILATION_CACHE_DIR") is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pisces_jax" / "xla"
        jax.config.update("jax_compilation_cache_dir", str(cache))


def check_output(path: Path, flag: str, *, folder: bool) -> None:
    """Looks, without making anything, whether `path` can be written.

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
        raise UserError(f"{flag}={path} cannot be written: {above} is no folder that you may write in")


def write_files(folder: Path, files: Mapping[str, bytes], flag: str) -> None:
    """Writes all files or none: beside their places first, then each is moved into its own.

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
        raise UserError(f"{flag}={folder} cannot be written: {error.strerror}: free some space or change it") from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        if made and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def say(*words: object) -> None:
    """A line of result, at once: what is piped into a file is seen while the command works."""
    print(*words, flush=True)


def arguments() -> list[str]:
    return sys.argv[1:]
