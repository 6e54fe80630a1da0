"""Published folders opened, checked and read: a part's parameters straight into their shards.

A folder holds a published layout (`families.py`) or ours: the same files with our own names, which is what
`convert import` writes and what parts without a published layout have.
"""

import dataclasses
import functools
import logging
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from tqdm import tqdm

from pisces_jax.data.tokenizers import APPENDED
from pisces_jax.models.autoencoder import Autoencoder, AutoencoderConfig
from pisces_jax.models.denoiser import Denoiser, DenoiserConfig
from pisces_jax.models.dit import DiT
from pisces_jax.models.transformer import Transformer, TransformerConfig
from pisces_jax.models.unet import SIZES, UNet, UNetConfig
from pisces_jax.models.vit import ViT, ViTConfig
from pisces_jax.utils.errors import UserError, listed
from pisces_jax.weights import blip3o
from pisces_jax.weights.architecture import differences, read_architecture
from pisces_jax.weights.config_json import NATIVE
from pisces_jax.weights.families import FAMILIES, Family
from pisces_jax.weights.layout import Entry
from pisces_jax.weights.sources import resolve
from pisces_jax.weights.tensors import Tensor, common_dtype, read_folder

Flat = dict[str, Any]
log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class View:
    """One of our parameters as it lies in files: indexing reads what is asked for and no more.

    Attributes:
        dtype: of what is read.
        layers: gives the published arrays in our layout, one by one (a single one if ours is not stacked).
        tokens: for a vocabulary, the rows that are tokens. Tokens that the file lacks start at the mean of its rows;
            the rows after the tokens are padding and zero.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stacked: bool
    layers: Sequence[Callable[[], np.ndarray]]
    tokens: int | None = None

    def __getitem__(self, index: Any) -> np.ndarray:
        index = index if isinstance(index, tuple) else (index,)
        index = (*index, *[slice(None)] * (len(self.shape) - len(index)))
        if self.stacked:
            layers = [self.layers[i]()[index[1:]] for i in range(*index[0].indices(self.shape[0]))]
            return np.stack([layer.astype(self.dtype, copy=False) for layer in layers])
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
    # In blocks of fixed size, so that a column's sum does not depend on the number of columns in a shard.
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
    def open(cls, source: str, part: str = "") -> "Folder":
        """
        Args:
            part: which one is wanted, of a folder that holds several (`blip3o.PARTS`); "": the language model.

        Raises:
            UserError: the model is not supported, or files are missing or damaged.
        """
        path = resolve(source)
        if part and (path / part).is_dir() and not (path / "config.json").exists():  # as `convert import` writes them
            path = path / part
        if not any((path / name).exists() for name in ("config.json", "open_clip_config.json")):
            read_folder(path)  # if the weights are wrong too, the user should know that first
        family, settings = read_architecture(path)
        tensors = read_folder(path)
        if family == "qwen2":
            settings = dataclasses.replace(settings, vocab_size=blip3o.rows(tensors, settings.vocab_size))
            if part in ("queries", "generator"):
                return cls(path, *blip3o.settings_of(part, path, tensors), tensors)
            for what in blip3o.left_out(tensors):
                _say_once(path, what)
        if family in ("llama", "qwen2") and settings.tied_embedding and _other_head(path, family, settings, tensors):
            settings = dataclasses.replace(settings, tied_embedding=False)
        return cls(path, family, settings, tensors)

    def shapes(self) -> Any:
        """The tree of shapes of the part, as its settings or else the tensors of our own layout give it."""
        if self.settings is None:
            return traverse_util.unflatten_dict(dict(self.tensors), sep="/")
        return part_shapes(self.settings)

    def check(self, settings: Any, where: str, own_tokens: int | None = None) -> None:
        """Compares a config's settings with those of the folder.

        Args:
            where: the config's key, for messages.
            own_tokens: of a language model, those that the tokenizer's file has (`Tokenizer.own_size`).

        Raises:
            UserError: they differ, and the message lists every setting; or the vocabulary is not the tokenizer's.
        """
        wrong = differences(self.settings, settings)
        if wrong:
            raise UserError(f"{where} does not fit the weights of {self.path}: set {', '.join(wrong)} as there")
        if isinstance(settings, TransformerConfig):
            self._check_vocabulary(settings.vocab_size, own_tokens)

    def _check_vocabulary(self, tokens: int, own: int | None) -> None:
        """Only our own tokens may be missing in the folder, and no rows but padding may be without a token: otherwise
        texts, or our tokens, would take rows that mean something else.
        """
        rows = self.settings.vocab_size
        if own is not None and rows > own and not _is_padded(rows, own):
            raise UserError(
                f"{self.path} has rows for {rows} tokens and the tokenizer's file has {own}: set data.tokenizer to the "
                "one that was saved with these weights"
            )
        if own is None or rows <= own:
            if not 0 <= tokens - rows <= len(APPENDED):
                raise UserError(
                    f"{self.path} has {rows} tokens and the tokenizer {tokens}, with ours: set data.tokenizer to that "
                    "of these weights"
                )

    def views(
        self, shapes: Mapping[str, Any], vocab_size: int | None = None, own_tokens: int | None = None
    ) -> dict[str, View]:
        """Our parameters by name.

        Args:
            shapes: of the part, by name (arrays will do).
            vocab_size: a language model's tokens.
            own_tokens: those that the tokenizer's file has. Rows after them are padding in the files, and not read.

        Raises:
            UserError: tensors are missing, surplus or of the wrong shape; the message lists each with both shapes.
        """
        family = native_family(shapes) if self.family == NATIVE else FAMILIES[self.family]
        table = family.table(self.settings)
        prefix, found = _select(self.path, family, table, self.tensors)
        if prefix not in family.prefixes:
            log.warning("%s: the names of its tensors begin with %r, which is left out", self.path, prefix)
        rows = self.settings.vocab_size if isinstance(self.settings, TransformerConfig) else None
        known = min(n for n in (rows, vocab_size, own_tokens) if n is not None) if rows and vocab_size else rows
        wrong: list[str] = []
        views, used = {}, set()
        for entry in table:
            if entry.ours not in shapes:
                wrong.append(f"surplus {entry.theirs}, for which the model has no {entry.ours}")
                continue
            ours = tuple(shapes[entry.ours].shape)
            shape = ours[1:] if entry.stacked else ours  # of one layer, as the files have it
            names = [entry.theirs.format(i=i) for i in range(ours[0] if entry.stacked else 1)]
            used |= set(names)
            tensors = [found[name] for name in names if name in found]
            vocabulary = entry.vocabulary and rows is not None
            wanted = (rows, *shape[1:]) if vocabulary else entry.published_shape(shape)
            if vocabulary:
                shape = (known, *shape[1:])
            wrong += [f"missing {name} {wanted}" for name in names if name not in found]
            wrong += [
                f"{name} is {found[name].shape} and must be {wanted}"
                for name in names
                if name in found and found[name].shape != wanted
            ]
            if not wrong:
                dtype = common_dtype(tensor.array().dtype for tensor in tensors)
                end = known if vocabulary else None
                # Mapped anew at every read, so that what was read does not stay in memory.
                reads = [lambda t=t, e=entry, s=shape, n=end: e.to_ours(t.array()[:n], s) for t in tensors]
                views[entry.ours] = View(ours, dtype, entry.stacked, reads, vocab_size if vocabulary else None)
        for name in sorted(set(found) - used):
            if family.uses(name):
                wrong.append(f"surplus {name} {found[name].shape}")
        for name in sorted(set(shapes) - {entry.ours for entry in table}):
            wrong.append(f"missing {name} {tuple(shapes[name].shape)} (of ours)")
        if wrong:
            raise UserError(f"{self.path} does not fit the model: {listed(wrong, separator='; ')}")
        return views


@functools.cache
def _say_once(path: Path, what: str) -> None:
    """A folder is opened for its settings, and again to be read."""
    log.warning("%s: %s", path, what)


def _is_padded(rows: int, tokens: int) -> bool:
    """Whether a vocabulary of `tokens` was padded to `rows`: to the next multiple of a power of two."""
    return rows in {-(-tokens // 2**i) * 2**i for i in range(3, 11)} or rows in blip3o.QWEN_ROWS


def _select(
    path: Path, family: Family, table: Sequence[Entry], tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    try:
        return family.select(table, tensors)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _other_head(path: Path, kind: str, settings: TransformerConfig, tensors: Mapping[str, Tensor]) -> bool:
    """Whether the files hold an output matrix that is not the embedding, to which `config.json` ties it.

    transformers keeps such a matrix.
    """
    table = FAMILIES[kind].table(dataclasses.replace(settings, tied_embedding=False))
    names = {entry.ours: entry.theirs for entry in table}
    _, found = _select(path, FAMILIES[kind], table, tensors)
    if names["head"] not in found or names["embedding"] not in found:
        return False
    head, embedding = found[names["head"]].array(), found[names["embedding"]].array()
    blocks = range(0, len(head), 4096)
    return head.shape != embedding.shape or not all(
        np.array_equal(head[i : i + 4096].astype(np.float32), embedding[i : i + 4096].astype(np.float32))
        for i in blocks
    )


def native_family(shapes: Mapping[str, Any]) -> Family:
    """Our own layout: our names, our shapes; the vocabulary without its padding."""
    rows = []
    for name, leaf in shapes.items():
        axes = " ".join("ABCDEFG"[: len(leaf.shape)])
        rows.append(Entry(name, name, f"{axes} -> {axes}", vocabulary=name in ("embedding", "head")))
    return Family(lambda _: rows)


def read_part(
    folder: Folder,
    shapes: Any,
    *,
    vocab_size: int | None = None,
    own_tokens: int | None = None,
    shardings: Any = None,
    dtype: Any = None,
    only: Collection[str] | None = None,
    doing: str = "reading",
) -> Any:
    """A part's parameters, tensor by tensor; each device reads its own shards and nothing else.

    Args:
        shapes: the part's tree of shapes.
        vocab_size, own_tokens: as in `Folder.views`.
        shardings: the same tree of shardings; without it, host arrays are returned.
        dtype: what to store in, by default as the files do; or a tree of dtypes.
        only: the names of the parameters to read, by default all.

    Raises:
        UserError: the folder does not fit.
    """
    flat = flatten(shapes)
    views = folder.views(flat, vocab_size, own_tokens)
    if only is not None:
        views = {name: view for name, view in views.items() if name in only}
    where = None if shardings is None else flatten(shardings)
    dtypes = flatten(dtype) if isinstance(dtype, Mapping) else dict.fromkeys(flat, dtype)
    got: Flat = {}
    sizes = {name: math.prod(view.shape) * view.dtype.itemsize for name, view in views.items()}
    with progress_bar(doing, sum(sizes.values())) as bar:
        for name, view in views.items():
            kind = np.dtype(dtypes[name] or view.dtype)

            def shard(index: Any, view: View = view, kind: Any = kind) -> np.ndarray:
                return view[index].astype(kind, copy=False)

            if where is None:
                got[name] = shard(())
            else:
                got[name] = jax.make_array_from_callback(view.shape, where[name], shard)
                got[name].block_until_ready()
            bar.update(sizes[name])
    return traverse_util.unflatten_dict(got, sep="/")


def flatten(tree: Any) -> Flat:
    """A part's tree as one dict of names with slashes."""
    return traverse_util.flatten_dict(tree, sep="/")


def read_source(
    source: str, settings: Any, part: str, own_tokens: int | None = None, like: Any = None,
    only: Collection[str] | None = None,
) -> Any:  # fmt: skip
    """A part's parameters as a folder holds them, as host arrays; with `like` (abstract arrays), as those lie. `only`:
    the names of the parameters to read, by default all.

    Raises:
        UserError: the folder does not fit these settings.
    """
    folder = Folder.open(source, part)
    folder.check(settings, f"model.{part}", own_tokens)
    shapes = folder.shapes() if settings is None else part_shapes(settings)
    tokens = getattr(settings, "vocab_size", None)
    return read_part(
        folder, shapes, vocab_size=tokens, own_tokens=own_tokens, only=only, doing=f"reading {part}",
        shardings=None if like is None else jax.tree.map(lambda x: x.sharding, like),
        dtype=None if like is None else jax.tree.map(lambda x: x.dtype, like),
    )  # fmt: skip


def part_shapes(settings: Any) -> Any:
    """The tree of shapes of a part with these settings; nothing is allocated."""
    return nn.unbox(boxed_shapes(settings))


def boxed_shapes(settings: Any) -> Any:
    """`part_shapes` with the logical axes of each parameter, for `sharding.param_shardings`."""
    key = jax.random.key(0)

    def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def abstract(module: nn.Module, *inputs: Any, method: str | None = None) -> Any:
        return jax.eval_shape(lambda *a: module.init(key, *a, method=method), *inputs)["params"]

    c = settings
    if isinstance(c, TransformerConfig):
        return abstract(Transformer(c), zeros(1, 4, dtype=jnp.int32), method="init_all")
    if isinstance(c, ViTConfig):
        return abstract(ViT(c), zeros(1, c.image_size, c.image_size, 3, dtype=jnp.uint8))
    if isinstance(c, AutoencoderConfig):
        return abstract(Autoencoder(c), zeros(1, 8 * c.downscale, 8 * c.downscale, 3))
    if isinstance(c, UNetConfig):
        latents = zeros(1, c.size, c.size, c.channels)
        return abstract(UNet(c), latents, zeros(1), zeros(1, 1, c.condition_width), zeros(1, SIZES))
    if isinstance(c, DenoiserConfig):
        return abstract(Denoiser(c), zeros(1, c.channels), zeros(1), zeros(1, c.condition_width), zeros(1, dtype=bool))
    condition = zeros(1, c.condition_vectors, c.condition_width)
    return abstract(DiT(c), zeros(1, c.size, c.size, c.channels), zeros(1), condition, zeros(1, dtype=jnp.bool_))


def progress_bar(doing: str, total: int) -> tqdm:
    """A bar of `total` bytes on a terminal; hidden when there is little to read or write."""
    return tqdm(
        total=total, desc=doing, unit="B", unit_scale=True, leave=False, dynamic_ncols=True, mininterval=1.0,
        disable=total < 2**27 or not sys.stderr.isatty(),
    )  # fmt: skip
