"""Parts written as folders: in their published layout, or in ours; tensor by tensor, and all or nothing."""

import functools
import glob
import json
import math
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from flax import traverse_util

from pisces_jax.data.tokenizers import Tokenizer, open_tokenizer
from pisces_jax.models.vit import ViTConfig
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import synchronize, umask
from pisces_jax.utils.units import gib
from pisces_jax.weights.architecture import config_json, part_of
from pisces_jax.weights.blip3o import DECODER, PARTS, is_checkpoint, queries_shape
from pisces_jax.weights.config_json import DIFFUSERS, NATIVE, family_of, preprocessor_json
from pisces_jax.weights.families import FAMILIES, Family
from pisces_jax.weights.folder import Flat, Folder, flatten, native_family, progress_bar
from pisces_jax.weights.layout import Entry
from pisces_jax.weights.sources import resolve
from pisces_jax.weights.tensors import Pending, common_dtype, read_folder, slabs, write_folder


def import_folder(source: str, target: Path, dtype: str | None = None) -> tuple[Folder, int]:
    """Rewrites a published folder in our own layout, one tensor at a time. A checkpoint of BLIP3-o has several parts:
    each gets a folder below `target`.

    Returns the folder that was read and its number of parameters.

    Raises:
        UserError: the folder is unsupported or damaged, or `target` cannot be written.
    """
    path = resolve(source)
    if (path / "config.json").exists() and is_checkpoint(read_folder(path)):
        return _import_checkpoint(path, target, dtype)
    folder = Folder.open(source)
    return folder, _import_part(folder, part_of(folder.path, folder.settings), target, dtype)


def _import_part(folder: Folder, part: str, target: Path, dtype: str | None, tokenizer: Tokenizer | None = None) -> int:
    settings = folder.settings
    shapes = flatten(folder.shapes()) if folder.family != "queries" else queries_shape(folder.tensors)
    views = folder.views(shapes, getattr(settings, "vocab_size", None))
    tree = traverse_util.unflatten_dict(views, sep="/")
    export_part(target, part, settings, tree, dtype=dtype, native=True, tokenizer=tokenizer)
    return sum(math.prod(view.shape) for view in views.values())


def _import_checkpoint(path: Path, target: Path, dtype: str | None) -> tuple[Folder, int]:
    """The parts of BLIP3-o's checkpoint, each in a folder of its own, with tokenizer and decoder; all or nothing.

    Everything is opened before anything is written.
    """
    opened = {part: Folder.open(f"{path}{os.sep}", part) for part in PARTS}
    names = {"decoder": "unet", "autoencoder": "vae"} if (path / DECODER).is_dir() else {}
    drawing = {part: Folder.open(f"{path / DECODER / name}") for part, name in names.items()}
    tokenizer = open_tokenizer(path)
    with new_folder(target) as scratch:
        parameters = 0
        for part, folder in opened.items():
            beside = tokenizer if part == "language_model" else None
            parameters += _import_part(folder, part, scratch / part, dtype, beside)
        for part, folder in drawing.items():
            parameters += _import_part(folder, part, scratch / DECODER / names[part], dtype)
        if (path / DECODER / "scheduler").is_dir():
            shutil.copytree(path / DECODER / "scheduler", scratch / DECODER / "scheduler")
    return opened["language_model"], parameters


def export_part(
    target: Path,
    part: str,
    settings: Any,
    params: Mapping[str, Any],
    *,
    dtype: str | None = None,
    native: bool = False,
    tokenizer: Tokenizer | None = None,
) -> str:
    """Writes a part's parameters with a `config.json`, all or nothing, and returns the family of the layout.

    Args:
        params: a tree of arrays, or of views of files.
        dtype: what to store in, by default each array in its own.
        native: whether to use our layout also where there is a published one.
        tokenizer: of a language model, to be saved in the same folder.

    Raises:
        UserError: `target` exists already, or cannot be written.
    """
    flat = flatten(params)
    name = NATIVE if native else family_of(settings)
    pending = _pending(native_family(flat) if name == NATIVE else FAMILIES[name], settings, flat, dtype)
    total = sum(tensor.nbytes for tensor in pending)
    _check_room(target, total)
    sizes: Counter[np.dtype] = Counter()
    for array in flat.values():
        sizes[np.dtype(dtype or array.dtype)] += math.prod(array.shape)
    most = str(sizes.most_common(1)[0][0])  # the dtype of most parameters
    adapter = "adapter_" if name == "peft" else ""
    files = {f"{adapter}config.json": config_json(name, settings, part, most)}
    if tokenizer is not None:
        ids = dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad)
        files["config.json"] |= ids
        never = sorted(tokenizer.special - {tokenizer.eos})  # as `inference.model.Model` answers
        files["generation_config.json"] = dict(ids, suppress_tokens=never)
    if isinstance(settings, ViTConfig) and name != NATIVE:
        files["preprocessor_config.json"] = preprocessor_json(name, settings)
    stem = "diffusion_pytorch_model" if name in DIFFUSERS else f"{adapter}model"
    with new_folder(target) as scratch, progress_bar(f"writing {part}", total) as bar:
        write_folder(scratch, pending, stem, bar.update)
        if tokenizer is not None:
            tokenizer.save(scratch)
        for file, values in files.items():
            (scratch / file).write_text(json.dumps(values, indent=1) + "\n")
    return name


def _check_room(target: Path, size: int) -> None:
    above = target.absolute().parent
    while not above.exists():
        above = above.parent
    if (free := shutil.disk_usage(above).free) < 1.02 * size:
        raise UserError(
            f"{above} has {gib(free)} free and {target.name} takes {gib(size)}: free some space or give another folder"
        )


def _pending(family: Family, settings: Any, flat: Flat, dtype: str | None) -> list[Pending]:
    """What is to be written, in the order of the table, layer by layer."""
    tokens = getattr(settings, "vocab_size", None)
    fused: dict[str, list[Entry]] = {}
    for entry in family.table(settings):
        fused.setdefault(entry.theirs, []).append(entry)
    layered = [(rows, flat[rows[0].ours].shape[0]) for rows in fused.values() if rows[0].stacked]
    deepest = max((depth for _, depth in layered), default=0)
    jobs: list[tuple[list[Entry], int | None]] = [(rows, None) for rows in fused.values() if not rows[0].stacked]
    jobs += [(rows, i) for i in range(deepest) for rows, depth in layered if i < depth]
    pending = []
    for rows, layer in jobs:
        ours = [flat[row.ours] for row in rows]
        shape = tuple(ours[0].shape[rows[0].stacked :])  # of one layer
        if rows[0].vocabulary and tokens is not None:
            shape = (tokens, *shape[1:])
        name = family.prefixes[0] + rows[0].theirs.format(i=layer)
        kind = np.dtype(dtype) if dtype else common_dtype(np.dtype(a.dtype) for a in ours)
        give = functools.partial(_pieces, rows, ours, layer, shape)
        pending.append(Pending(name, rows[0].published_shape(shape), kind, give))
    return pending


def _pieces(
    rows: Sequence[Entry], ours: Sequence[Any], layer: int | None, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    for entry, array in zip(rows, ours, strict=True):
        left, right = entry.pattern.split(" -> ")
        if layer is not None:
            yield entry.to_theirs(np.asarray(array[layer : layer + 1])[0])
        elif left == right:  # the layouts are the same
            yield from slabs(array, shape)
        else:
            yield entry.to_theirs(np.asarray(array[:]))


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that takes the place of `target` when the block ends well, and is removed when it does not.

    It is locked while its process lives; what a killed process left for the same target is removed first.

    Raises:
        UserError: `target` exists already, or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} exists already: give a new folder")
    prefix = f".{target.name}.writing-"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(glob.escape(prefix) + "*"):
            if (lock := _lock(left)) is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(lock)
        scratch = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix))
        held = _lock(scratch)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    try:
        yield scratch
        for path in scratch.rglob("*"):
            if path.is_file():
                synchronize(path)  # a power cut must not leave a folder with its name and without its content
        scratch.chmod(0o777 & ~umask())
        os.replace(scratch, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}: free some space") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:  # not earlier: any process may remove an unlocked scratch folder
            os.close(held)


def _lock(folder: Path) -> int | None:
    """A lock on `folder`, to be closed, that ends with the process; None if another process holds it, or the file
    system has no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle
