"""Published folders in and out: a part's parameters straight into their shards, and from them into files.

A *source* is a folder with a path separator in its name (`./siglip`, `/data/llama`), or `hf://ORG/NAME[/SUB][@REVISION]`
on the Hugging Face hub; a plain name is a run below --workdir. Either holds a published layout (`families.py`) or ours:
the same files with our own names, which is what `convert import` writes and what parts without a published layout have.
"""

import dataclasses
import functools
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from pisces_jax.data.tokenizers import APPENDED, Tokenizer
from pisces_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from pisces_jax.models.dit import DiT
from pisces_jax.models.transformer import Transformer, TransformerConfig
from pisces_jax.models.vit import ViT, ViTConfig
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import synchronize, umask
from pisces_jax.weights import architecture
from pisces_jax.weights.families import FAMILIES, Family
from pisces_jax.weights.layout import Entry
from pisces_jax.weights.tensors import Pending, Tensor, read_folder, slabs, without_safetensors, write_folder

HUB = "hf://"
_VOCABULARY = ("embedding", "head")
Flat = dict[str, Any]


def is_folder(source: str) -> bool:
    """Whether a config's source names a folder or a hub's repository, and not a run below --workdir."""
    return source.startswith(HUB) or os.sep in source


WEIGHTS, TOKENIZER = ("*.json", "*.safetensors"), ("*.json", "tokenizer.model")


def resolve(source: str, wanted: Sequence[str] = WEIGHTS) -> Path:
    """The local folder of a source; of a repository of the hub the `wanted` files are downloaded first.

    Raises:
        UserError: no such folder, or a download that fails.
    """
    if not source.startswith(HUB):
        path = Path(source).expanduser()
        if not path.is_dir():
            raise UserError(f"{source} is no folder: give the folder of published weights")
        return path
    name, _, revision = source.removeprefix(HUB).partition("@")
    organisation, _, rest = name.partition("/")
    repository, _, sub = rest.partition("/")
    if not organisation or not repository:
        raise UserError(
            f"{source} names no repository: write hf://ORGANISATION/NAME or hf://ORGANISATION/NAME@REVISION"
        )
    import huggingface_hub

    repository, inside = f"{organisation}/{repository}", f"{sub}/" if sub else ""
    try:
        folder = huggingface_hub.snapshot_download(
            repository, revision=revision or None, allow_patterns=[inside + pattern for pattern in wanted]
        )
        if wanted is WEIGHTS and not list(Path(folder, sub).glob("*.safetensors")):  # perhaps only what is not fetched
            files = huggingface_hub.list_repo_files(repository, revision=revision or None)
            there = [name.removeprefix(inside) for name in files if name.startswith(inside)]
            raise UserError(without_safetensors(source, there))
    except UserError:
        raise
    except Exception as error:  # the hub's client raises errors of many libraries
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{source} cannot be downloaded ({reason}): check its name and your access to it") from error
    return Path(folder) / sub


@dataclasses.dataclass(frozen=True)
class View:
    """One of our parameters as it lies in files: slicing reads what is asked for and no more.

    `layers` are published arrays in our layout (one where ours is not stacked). A vocabulary may be longer than the
    file's: new tokens start at the mean of those that are there, rows of padding are zeros.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    layers: Sequence[Callable[[], np.ndarray]]
    tokens: int | None = None  # of a vocabulary: rows that are no padding

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        if self.stacked:
            return np.stack([self.layers[i]()[index[1:]] for i in range(*index[0].indices(self.shape[0]))])
        array = self.layers[0]()
        if self.tokens is None or array.shape == self.shape:
            return np.asarray(array[index])
        start, stop, _ = index[0].indices(self.shape[0])
        known = array.shape[0]
        array = array[(slice(None), *index[1:])]
        rows = [array[min(start, known) : min(stop, known)]]
        if (new := min(stop, self.tokens) - max(start, known)) > 0:
            rows.append(np.broadcast_to(_mean_row(array), (new, *array.shape[1:])))
        if (padding := stop - max(start, self.tokens)) > 0:
            rows.append(np.zeros((padding, *array.shape[1:]), self.dtype))
        return np.concatenate(rows)


def _mean_row(array: np.ndarray, step: int = 4096) -> np.ndarray:
    # Always by as many rows: the sum of a column does not depend on how many columns a shard has.
    total = sum(array[i : i + step].sum(axis=0, dtype=np.float64) for i in range(0, array.shape[0], step))
    return (np.asarray(total) / array.shape[0]).astype(array.dtype)


@dataclasses.dataclass(frozen=True)
class Folder:
    """A published folder that was opened: its family, its settings as ours (None for projectors) and its tensors."""

    path: Path
    family: str
    settings: Any
    tensors: Mapping[str, Tensor]

    @classmethod
    def open(cls, source: str) -> "Folder":
        """
        Raises:
            UserError: nothing that is supported, or damaged files.
        """
        path = resolve(source)
        if not any((path / name).exists() for name in ("config.json", "open_clip_config.json")):
            read_folder(path)  # what is wrong with the weights is worth saying first
        family, settings = architecture.read_architecture(path)
        return cls(path, family, settings, read_folder(path))

    def tensors_by_path(self) -> Any:
        """The tensors of our own layout as the tree of the part."""
        return traverse_util.unflatten_dict(dict(self.tensors), sep="/")

    def check(self, settings: Any, where: str) -> None:
        """Holds a config's settings against those of the folder.

        Raises:
            UserError: they differ; the message lists every setting. Or a vocabulary that is not the tokenizer's.
        """
        wrong = architecture.differences(self.settings, settings)
        if wrong:
            raise UserError(f"{where} does not fit {self.path / 'config.json'}: set {', '.join(wrong)} as there")
        # Only our own tokens may be new: with more or fewer, every text would be other ids than the weights know.
        if isinstance(settings, TransformerConfig):
            rows = self.settings.vocab_size
            if not 0 <= settings.vocab_size - rows <= len(APPENDED):
                raise UserError(
                    f"{self.path} has {rows} tokens and the tokenizer {settings.vocab_size}, with ours: set "
                    "data.tokenizer to that of these weights"
                )

    def views(self, shapes: Mapping[str, Any], vocab_size: int | None = None) -> dict[str, View]:
        """Our parameters by name, for the shapes (or arrays) of a part, `vocab_size` being a language model's tokens.

        Raises:
            UserError: tensors that are missing, surplus or misshapen: one message with each name and both shapes.
        """
        family = _native(shapes) if self.family == architecture.NATIVE else FAMILIES[self.family]
        found = _by_name(family, self.settings, self.tensors)
        hints = {"C": 3, "P": 0, "Q": 0}
        if isinstance(self.settings, ViTConfig):
            hints |= {"P": self.settings.patch_size, "Q": self.settings.patch_size}
        wrong: list[str] = []
        views, used = {}, set()
        for entry in family.table(self.settings):
            if entry.ours not in shapes:
                wrong.append(f"surplus {entry.theirs}, for which the model has no {entry.ours}")
                continue
            ours = tuple(shapes[entry.ours].shape)
            one = ours[1:] if entry.stacked else ours
            names = [entry.theirs.format(i=i) for i in range(ours[0])] if entry.stacked else [entry.theirs]
            used |= set(names)
            there = [found.get(name) for name in names]
            growing = entry.vocabulary and there[0] is not None and len(there[0].shape) == len(one)
            known = min(there[0].shape[0], vocab_size or 0) if growing and there[0] is not None else 0
            wanted = entry.published_shape((known, *one[1:]) if growing and known else one, hints)
            for name, tensor in zip(names, there, strict=True):
                if tensor is None:
                    wrong.append(f"missing {name} {wanted}")
                elif tensor.shape != wanted:
                    wrong.append(f"{name} is {tensor.shape} and must be {wanted}")
            if wrong:
                continue
            dtype = functools.reduce(np.promote_types, map(_dtype, there))
            shape = (known, *one[1:]) if growing and known else one
            reads = [_reader(entry, tensor, shape, hints) for tensor in there if tensor is not None]
            views[entry.ours] = View(ours, dtype, entry.stacked, reads, vocab_size if entry.vocabulary else None)
        known_names = [re.compile(pattern) for pattern in family.unused]
        for name in sorted(set(found) - used):
            if not any(pattern.fullmatch(name) for pattern in known_names):
                wrong.append(f"surplus {name} {found[name].shape}")
        if lacking := sorted(set(shapes) - {entry.ours for entry in family.table(self.settings)}):
            wrong += [f"missing {name} {tuple(shapes[name].shape)} (of ours)" for name in lacking]
        if wrong:
            raise UserError(f"{self.path} does not fit the model: {'; '.join(wrong)}")
        return views


def _native(shapes: Mapping[str, Any]) -> Family:
    """Our own layout: our names, our shapes; the vocabulary without its padding."""
    letters = "ABCDEFG"

    def table(_: Any) -> list[Entry]:
        rows = []
        for name, leaf in shapes.items():
            axes = " ".join(letters[: len(leaf.shape)])
            rows.append(Entry(name, name, f"{axes} -> {axes}", vocabulary=name in _VOCABULARY))
        return rows

    return Family(table)


def _by_name(family: Family, settings: Any, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part's tensors by the names of its table, without prefix."""
    wanted = {entry.theirs.format(i=0) for entry in family.table(settings)}
    best: dict[str, Tensor] = {}
    most = -1
    for prefix in family.prefixes:
        inside = {family.today(n.removeprefix(prefix)): t for n, t in tensors.items() if n.startswith(prefix)}
        if (matches := len(wanted & set(inside))) > most:
            best, most = inside, matches
    return best


def _dtype(tensor: Tensor | None) -> np.dtype:
    assert tensor is not None
    return tensor.array().dtype


def _reader(entry: Entry, tensor: Tensor, shape: tuple[int, ...], hints: Mapping[str, int]) -> Callable[[], np.ndarray]:
    # Mapped anew at every read: what was read before does not stay in this process.
    return lambda: entry.to_ours(tensor.array(), shape, hints)


def read_part(
    folder: Folder,
    shapes: Any,
    *,
    vocab_size: int | None = None,
    shardings: Any = None,
    dtype: Any = None,
    doing: str = "reading",
) -> Any:
    """A part's parameters, tensor by tensor: on each device its own shards and nothing else is read for it.

    Args:
        shapes: the part's tree of shapes.
        shardings: the same tree of shardings; without, host arrays are given.
        dtype: what to store in, by default what the files hold; or a tree of dtypes.

    Raises:
        UserError: the folder does not fit.
    """
    flat = _flatten(shapes)
    views = folder.views(flat, vocab_size)
    where = None if shardings is None else _flatten(shardings)
    dtypes = dict.fromkeys(flat, dtype) if not isinstance(dtype, Mapping) else _flatten(dtype)
    got: Flat = {}
    with _progress(doing, sum(math.prod(v.shape) * v.dtype.itemsize for v in views.values())) as progress:
        for name, view in views.items():
            kind = np.dtype(dtypes[name] or view.dtype)

            def shard(index: Any, view: View = view, kind: Any = kind) -> np.ndarray:
                return view[index].astype(kind, copy=False)

            if where is None:
                got[name] = shard(())
            else:
                got[name] = jax.make_array_from_callback(view.shape, where[name], shard)
                got[name].block_until_ready()
            progress(math.prod(view.shape) * view.dtype.itemsize)
    return traverse_util.unflatten_dict(got, sep="/")


def _flatten(tree: Any) -> Flat:
    return traverse_util.flatten_dict(tree, sep="/")


def read_source(source: str, settings: Any, part: str) -> Any:
    """A part's parameters as a folder holds them, as host arrays.

    Raises:
        UserError: the folder does not fit these settings.
    """
    folder = Folder.open(source)
    folder.check(settings, f"model.{part}")
    shapes = folder.tensors_by_path() if settings is None else part_shapes(settings)
    tokens = settings.vocab_size if isinstance(settings, TransformerConfig) else None
    return read_part(folder, shapes, vocab_size=tokens, doing=f"reading {part}")


ENDS = 2**20  # bytes


def folder_mark(source: str) -> str:
    """Changes when a folder's weights change: a hash of the size, the first and the last megabyte of its files.

    Times are left out: they differ between hosts that have the same files.
    """
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(resolve(source).glob("*.safetensors")):
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size} ".encode() + file.read(ENDS))
            file.seek(max(0, size - ENDS))
            digest.update(file.read())
    return digest.hexdigest()


def import_folder(source: str, target: Path, dtype: str | None = None) -> tuple[Folder, int]:
    """Rewrites a published folder in our own layout, one tensor at a time: whole or not there.

    Returns the folder that was read and its number of parameters.

    Raises:
        UserError: the folder is unsupported or damaged, or `target` cannot be written.
    """
    folder = Folder.open(source)
    settings = folder.settings
    shapes = folder.tensors_by_path() if settings is None else part_shapes(settings)
    tokens = settings.vocab_size if isinstance(settings, TransformerConfig) else None
    views = folder.views(_flatten(shapes), tokens)
    tree = traverse_util.unflatten_dict(views, sep="/")
    export_part(target, architecture.part_of(folder.path, settings), settings, tree, dtype=dtype, native=True)
    return folder, sum(math.prod(view.shape) for view in views.values())


def part_shapes(settings: Any) -> Any:
    """The tree of shapes of a part that has settings; nothing is allocated."""
    key = jax.random.key(0)

    def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def abstract(module: nn.Module, *inputs: Any, method: str | None = None) -> Any:
        return nn.unbox(jax.eval_shape(lambda *a: module.init(key, *a, method=method), *inputs))["params"]

    c = settings
    if isinstance(c, TransformerConfig):
        return abstract(Transformer(c), zeros(1, 4, dtype=jnp.int32), method="init_all")
    if isinstance(c, ViTConfig):
        return abstract(ViT(c), zeros(1, c.image_size, c.image_size, 3, dtype=jnp.uint8))
    if isinstance(c, AutoencoderConfig):
        return abstract(Autoencoder(c), zeros(1, 8 * c.downscale, 8 * c.downscale, 3))
    condition = zeros(1, c.condition_vectors, c.condition_width)
    return abstract(DiT(c), zeros(1, c.size, c.size, c.channels), zeros(1), condition, zeros(1, dtype=jnp.bool_))


class _progress:
    """A bar of bytes, told by calling it, for a person who watches; none for what is read in a blink."""

    def __init__(self, doing: str, total: int) -> None:
        self._bar = tqdm(
            total=total, desc=doing, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, mininterval=1.0,
            disable=total < 2**27 or not sys.stderr.isatty(),
        )  # fmt: skip

    def __enter__(self) -> Callable[[int], Any]:
        return self._bar.update

    def __exit__(self, *_: object) -> None:
        self._bar.close()


# Out


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
    """Writes a part's parameters (a tree of arrays or of views) with a `config.json`, all or nothing.

    In the published layout of its kind where there is one, else (or with `native`) in ours; in `dtype`, by default each
    array in its own. A language model's `tokenizer` is laid beside it. Returns the family.

    Raises:
        UserError: `target` is there already, or cannot be written.
    """
    flat = _flatten(params)
    sizes: Counter[np.dtype] = Counter()
    for array in flat.values():
        sizes[np.dtype(dtype or array.dtype)] += math.prod(array.shape)
    kind = str(sizes.most_common(1)[0][0])  # what most are in
    family = architecture.NATIVE if native else architecture.family_of(settings)
    if family == architecture.NATIVE:
        described = architecture.native_json(settings, part, kind)
        table: Sequence[Entry] = _native(flat).table(None)
        prefix = ""
    else:
        described = architecture.config_json(settings, part, kind)
        table, prefix = FAMILIES[family].table(settings), FAMILIES[family].prefixes[0]
    hints = {"C": 3}
    if isinstance(settings, ViTConfig):
        hints |= {"P": settings.patch_size, "Q": settings.patch_size}
    tokens = settings.vocab_size if isinstance(settings, TransformerConfig) else None
    pending = _pending(table, prefix, flat, hints, tokens, None if dtype is None else np.dtype(dtype))
    _check_room(target, sum(p.nbytes for p in pending))
    stem = "diffusion_pytorch_model" if family == "autoencoder" else "model"
    with new_folder(target) as scratch, _progress(f"writing {part}", sum(p.nbytes for p in pending)) as progress:
        write_folder(scratch, pending, stem, progress)
        if tokenizer is not None:
            ids = dict(bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad)
            described |= ids
            (scratch / "generation_config.json").write_text(json.dumps(ids, indent=1) + "\n")
            tokenizer.save(scratch)
        (scratch / "config.json").write_text(json.dumps(described, indent=1) + "\n")
        if isinstance(settings, ViTConfig) and family != architecture.NATIVE:
            preprocessor = json.dumps(_preprocessor(family, settings), indent=1)
            (scratch / "preprocessor_config.json").write_text(preprocessor + "\n")
    return family


def _check_room(target: Path, size: int) -> None:
    above = target.absolute().parent
    while not above.exists():
        above = above.parent
    if (free := shutil.disk_usage(above).free) < 1.02 * size:
        raise UserError(
            f"{above} has {free / 2**30:.1f} GiB free and {target.name} takes {size / 2**30:.1f}: free some space or "
            "give another folder"
        )


def _preprocessor(family: str, c: ViTConfig) -> dict[str, Any]:
    values: dict[str, Any] = dict(
        image_mean=list(c.mean), image_std=list(c.std), rescale_factor=1 / 255, resample=architecture.BICUBIC
    )
    if family == "siglip":
        size = {"height": c.image_size, "width": c.image_size}
        return dict(values, image_processor_type="SiglipImageProcessor", size=size)
    size = {"shortest_edge": c.image_size}
    crop = {"height": c.image_size, "width": c.image_size}
    return dict(values, image_processor_type="CLIPImageProcessor", size=size, crop_size=crop, do_center_crop=True)


def _pending(
    table: Sequence[Entry],
    prefix: str,
    flat: Flat,
    hints: Mapping[str, int],
    tokens: int | None,
    dtype: np.dtype | None,
) -> list[Pending]:
    """What is to be written, in the order of the table, layer by layer."""
    fused: dict[str, list[Entry]] = {}
    for entry in table:
        fused.setdefault(entry.theirs, []).append(entry)
    plain = [rows for name, rows in fused.items() if "{i}" not in name]
    layered = [rows for name, rows in fused.items() if "{i}" in name]
    depth = flat[layered[0][0].ours].shape[0] if layered else 0
    jobs = [(rows, None) for rows in plain] + [(rows, i) for i in range(depth) for rows in layered]
    pending = []
    for rows, layer in jobs:
        ours = [flat[row.ours] for row in rows]
        shapes = [tuple(a.shape) if layer is None else tuple(a.shape[1:]) for a in ours]
        if rows[0].vocabulary and tokens is not None:
            shapes = [(tokens, *shapes[0][1:])]
        shape = rows[0].published_shape(shapes[0], hints)
        name = prefix + rows[0].theirs.format(i=layer)
        kind = dtype or functools.reduce(np.promote_types, [np.dtype(a.dtype) for a in ours])
        pending.append(Pending(name, shape, kind, _pieces(rows, ours, layer, shapes[0], hints)))
    return pending


def _pieces(
    rows: Sequence[Entry], ours: Sequence[Any], layer: int | None, shape: tuple[int, ...], hints: Mapping[str, int]
) -> Callable[[], Iterator[np.ndarray]]:
    def give() -> Iterator[np.ndarray]:
        for entry, array in zip(rows, ours, strict=True):
            left, _, right = entry.pattern.partition(" -> ")
            if layer is not None:
                yield entry.to_theirs(np.asarray(array[layer : layer + 1])[0], hints)
            elif left == right:  # as it lies
                yield from slabs(array, shape)
            else:
                yield entry.to_theirs(np.asarray(array[:]), hints)

    return give


class new_folder:
    """A folder that is whole or not there: what is written inside is moved into its place at the end.

    The scratch folder is locked while its process lives; what a killed one has left for this target is removed.

    Raises:
        UserError: it exists, or cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target

    def __enter__(self) -> Path:
        if self._target.exists():
            raise UserError(f"{self._target} exists already: give a new folder")
        prefix = f".{self._target.name}.writing-"
        try:
            self._target.parent.mkdir(parents=True, exist_ok=True)
            for left in self._target.parent.glob(glob.escape(prefix) + "*"):
                if (lock := _lock(left)) is not None:
                    shutil.rmtree(left, ignore_errors=True)
                    os.close(lock)
            self._scratch = Path(tempfile.mkdtemp(dir=self._target.parent, prefix=prefix))
            self._held = _lock(self._scratch)
        except OSError as error:
            raise UserError(f"{self._target} cannot be written: {error.strerror}") from error
        return self._scratch

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        try:
            self._finish(kind, error)
        finally:  # not before: an unlocked scratch folder is anyone's to clear
            if self._held is not None:
                os.close(self._held)

    def _finish(self, kind: Any, error: Any) -> None:
        if kind is None:
            for path in self._scratch.rglob("*"):
                if path.is_file():
                    synchronize(path)  # or a power cut could leave a folder that is whole by its name alone
            self._scratch.chmod(0o777 & ~umask())
            os.replace(self._scratch, self._target)
            return
        shutil.rmtree(self._scratch, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{self._target} cannot be written: {error.strerror}: free some space") from error


def _lock(folder: Path) -> int | None:
    """A lock on `folder` that ends with the process, to be closed; None if another process holds one, or the file
    system has none."""
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
