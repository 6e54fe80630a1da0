"""The runs of a config file, with values from the command line."""

import contextlib
import difflib
import os
import runpy
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict
from ml_collections.config_flags import config_flags

from pisces_jax.training.config import OPEN_KEYS, in_order
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import local_path

Stages = dict[str, ConfigDict]
"""Runs by name, each after the runs whose weights it takes."""


def load_stages(config: str, overrides: Mapping[str, str]) -> Stages:
    """The runs of `FILE` or of `FILE:STAGE`, with values from the command line.

    Where a config has stages, `stages.NAME.key` sets a key of one of them and `key` that of every stage that has it.

    Raises:
        UserError: no such file, stage or key, a file that fails, or a value of the wrong type.
    """
    path, stage = _file_and_stage(config)
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


def _file_and_stage(config: str) -> tuple[str, str]:
    """The file that `--config` names, and the stage ("": none); a folder's name may have colons too."""
    whole = str(local_path(config))
    path, colon, stage = whole.rpartition(":")
    return (whole, "") if not colon or os.sep in stage or Path(whole).is_file() else (path, stage)


def _run(path: str) -> ConfigDict:
    if not Path(path).is_file():
        raise UserError(f"--config={path} does not exist: give the path of a config file")
    try:
        with _importable(Path(path).resolve().parent):
            functions = runpy.run_path(path)
            if not callable(functions.get("get_config")):
                raise UserError("it defines no function get_config: give a config file")
            config = functions["get_config"]()
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    except Exception as error:  # whatever a user's file raises is its mistake
        raise _failed(path, error) from error
    if not isinstance(config, ConfigDict) or ("stages" not in config and "program" not in config):
        raise UserError(f"get_config of {path} does not return a run: return run_config(...) or a ConfigDict of stages")
    return config


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """A config file may import modules that lie beside it, as a script may; each folder has its own."""
    known = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - known:
            if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == folder:
                del sys.modules[name]


def _failed(path: str, error: Exception) -> UserError:
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    where = f" in line {line}" if line else ""
    reason = " ".join(str(error).split())
    return UserError(f"{path} fails{where} with {type(error).__name__}: {reason}: fix the file")


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
    """None if `key` may be set, else the most similar key."""
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
    """Sets `key`, read by `config_flags` with the type that the key has."""
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
