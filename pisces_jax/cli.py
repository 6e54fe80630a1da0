"""What the commands share: flags whose mistakes are one sentence, configs from files, and output that is whole.

A data worker imports its command's module again, and with it this one: what brings JAX is imported inside functions.
"""

import argparse
import dataclasses
import difflib
import logging
import os
import runpy
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from pisces_jax.errors import UserError

if TYPE_CHECKING:
    from pisces_jax.evaluation.suite import Amount

Stages = dict[str, ConfigDict]
"""Runs by name, each after those that it takes weights from."""


# Flags


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


def add_drawing_flags(parser: Parser) -> None:
    """How to draw; what is not given is as the run's config says."""
    parser.add_argument(
        "--describe", action="store_true", default=None, help="let the model write a description of its own first"
    )
    parser.add_argument("--nodescribe", action="store_false", dest="describe", help="draw at once")
    parser.add_argument("--temperature", type=number(0), help="of the descriptions; 0: the likeliest words")
    parser.add_argument("--guidance", type=number(0), help="of the decoder; 1 is none")


def drawing_choice(given: argparse.Namespace | None, config: ConfigDict) -> dict[str, Any]:
    """Arguments of `Model.draw`, from the flags and where they are silent from the run's config."""
    from pisces_jax.training.config import run_config

    chosen = config.get("sampling", run_config().sampling)  # runs of before there was that key
    flag = {name: getattr(given, name, None) for name in ("describe", "temperature", "guidance")}
    return {
        "describe": chosen.describe if flag["describe"] is None else flag["describe"],
        "most": chosen.tokens,
        "temperature": chosen.temperature if flag["temperature"] is None else flag["temperature"],
        "guidance": flag["guidance"],
    }


def add_process_flags(parser: Parser) -> None:
    """For `processes.start`."""
    parser.add_argument("--coordinator", default="", metavar="HOST:PORT", help="of the first of several processes")
    parser.add_argument("--processes", type=whole_number(1), default=0, help="how many processes the run has")
    parser.add_argument("--process", type=whole_number(0), default=-1, help="which of them this is, from 0")


def add_amount_flags(parser: Parser) -> None:
    """How much to evaluate: the fields of `evaluation.suite.Amount`."""
    from pisces_jax.evaluation.suite import SPREAD_IMAGES, Amount

    helps = {
        "per_task": "prompts of each of GenEval's kinds",
        "images": "pictures a prompt",
        "per_kind": "questions of each kind",
        "held_out": "prompts and questions of each kind about what is held out of training; 0: none",
        "spread": f"prompts drawn {SPREAD_IMAGES} times each, to see how much their pictures differ; 0: none",
        "pictures": "pictures to reconstruct; real pictures to read and draw",
        "seed": "another seed, other prompts, questions and noise",
    }
    for field in dataclasses.fields(Amount):
        least = 0 if field.name in ("held_out", "spread", "seed") else 1
        text = f"{helps[field.name]} (default {field.default})"
        parser.add_argument(f"--{field.name}", type=whole_number(least), default=field.default, help=text)


def amount(given: argparse.Namespace) -> "Amount":
    from pisces_jax.evaluation.suite import Amount

    return Amount(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Amount)})


# Configs


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


def load_stages(config: str, overrides: Mapping[str, str]) -> Stages:
    """The runs of `FILE.py` or of `FILE.py:STAGE`, with values from the command line.

    Where a config has stages, `stages.NAME.key` is a key of one of them and `key` one of all that have it.

    Raises:
        UserError: no such file, stage or key, a file that fails, or a value of the wrong type.
    """
    from pisces_jax.training.config import in_order

    path, _, stage = config.partition(":")
    whole = _run(path)
    stages = whole.get("stages")
    runs = in_order(stages) if stages else {whole.name: whole}
    if stage:
        if not stages or stage not in runs:
            known = f"its stages are {', '.join(runs)}" if stages else "it has no stages"
            raise UserError(f"--config={config}: {path} has no stage {stage!r}: {known}")
        runs = {stage: runs[stage]}
    for key, value in overrides.items():
        named, _, rest = key.removeprefix("stages.").partition(".") if key.startswith("stages.") else ("", "", key)
        if named and named not in runs:
            raise UserError(f"config key {key}: the stages are {', '.join(runs)}")
        chosen = {named: runs[named]} if named else runs
        missing = {name: nearest for name, run in chosen.items() if (nearest := _missing(run, rest)) is not None}
        if len(missing) == len(chosen):
            prefix = f"stages.{named}." if named else ""
            nearest = max(missing.values(), key=lambda near: _likeness(rest, near))
            raise UserError(f"config key {key} does not exist: did you mean {prefix}{nearest}?")
        for name, run in chosen.items():
            if name not in missing:
                _override(run, rest, value)
    return runs


def _run(path: str) -> ConfigDict:
    if not Path(path).is_file():
        raise UserError(f"--config={path} does not exist: give the path of a config file")
    try:
        functions = runpy.run_path(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever a user's file raises is its mistake
        raise _failed(path, error) from error
    if not callable(functions.get("get_config")):
        raise UserError(f"{path} defines no function get_config: give a config file")
    try:
        config = functions["get_config"]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:
        raise _failed(path, error) from error
    if not isinstance(config, ConfigDict) or ("stages" not in config and "program" not in config):
        raise UserError(f"get_config of {path} returns no run: return run_config(...), or a ConfigDict of stages")
    return config


def _failed(path: str, error: Exception) -> UserError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f" in line {line}" if line else ""
    reason = " ".join(str(error).split())
    return UserError(f"{path} fails{where} with {type(error).__name__}: {reason}: mend the file")


def _flat(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys.append(f"{prefix}{key}")
        if isinstance(value, ConfigDict):
            keys += _flat(value, f"{prefix}{key}.")
    return keys


def _likeness(key: str, other: str) -> float:
    whole = difflib.SequenceMatcher(None, key, other).ratio()
    return whole + difflib.SequenceMatcher(None, key.rpartition(".")[2], other.rpartition(".")[2]).ratio()


def _missing(config: ConfigDict, key: str) -> str | None:
    """None if `key` may be set, else the key most like it."""
    from pisces_jax.training.config import OPEN_KEYS

    node: Any = config
    parts = key.split(".")
    for i, part in enumerate(parts):
        if isinstance(node, ConfigDict) and part in node:
            node = node[part]
        # Below an open key the names are the user's own, one level deep.
        elif isinstance(node, ConfigDict) and i and parts[i - 1] in OPEN_KEYS and i == len(parts) - 1:
            return None
        else:
            return max(_flat(config), key=lambda other: _likeness(key, other))
    return None


_TYPES = {int: "a whole number", float: "a number", bool: "true or false", tuple: "a tuple", str: "a text"}


def _override(config: ConfigDict, key: str, value: str) -> None:
    """Sets `key` as `config_flags` reads it: with the type that it has."""
    known = flags.FlagValues()
    argument = f"--config.{key}={value}"
    old = _get(config, key)
    if isinstance(old, ConfigDict):
        raise UserError(f"config key {key} holds {', '.join(old) or 'keys of your own'}: set --config.{key}.NAME=...")
    try:
        config_flags.DEFINE_config_dict(
            "config", config, flag_values=known, sys_argv=["", argument], lock_config=False, accept_new_attributes=True
        )
        known(["", argument])
    except (flags.Error, ValueError, TypeError, SyntaxError) as error:
        kind = _TYPES.get(type(old), "a value that Python can read")
        raise UserError(f"{argument}: config key {key} must be {kind}, like {old!r}") from error


def _get(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, ConfigDict) else None
    return config


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
            (scratch / name).write_bytes(content)
        for name in files:
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
