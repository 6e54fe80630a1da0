"""Safetensors files, read lazily and written one tensor at a time; nothing in them is ever executed.

A file is eight bytes (the header's length), a JSON header (name -> dtype, shape, offsets) and the bytes of the tensors
(https://huggingface.co/docs/safetensors). Tensors are memory-mapped: only what is used is read from the file. The
library checks files here; it does not read them, since its slices cannot be taken in our layout, and it does not write
them, since it needs all tensors in memory.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from pisces_jax.utils.errors import UserError, listed
from pisces_jax.utils.files import SNIFFED, sniff

DTYPES: Mapping[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
INDEX_SUFFIX = ".safetensors.index.json"
SHARD_BYTES = 5 * 10**9  # the size at which published models split their files
# Of several, what the libraries themselves would take: transformers a single file, diffusers an index.
_USUAL = (
    "model.safetensors", f"model{INDEX_SUFFIX}", f"diffusion_pytorch_model{INDEX_SUFFIX}",
    "diffusion_pytorch_model.safetensors", "open_clip_model.safetensors", f"open_clip_model{INDEX_SUFFIX}",
    "open_clip_pytorch_model.safetensors",
)  # fmt: skip
_LONGEST_HEADER = 10**8  # bytes; the library's own limit
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file.

    Attributes:
        dtype: the format's name of it, e.g. `BF16`.
        offset: of its first byte in the file.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def array(self) -> np.ndarray:
        """A read-only view of the mapped bytes.

        Raises:
            UserError: the values are quantized, not floating-point numbers of 16 bits or more.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f"{self.path} has quantized values ({self.dtype}), which are not supported: take the weights in "
                "bfloat16, float16 or float32"
            )
        return np.memmap(self.path, DTYPES[self.dtype], "r", self.offset, self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        UserError: the file cannot be read, is not a safetensors file, or is truncated or damaged.
    """
    try:
        with path.open("rb") as file, safe_open(path, "numpy"):  # checks that header and file fit each other
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(_damage(path, str(error).removeprefix("Error while deserializing header: "))) from error
    header.pop("__metadata__", None)
    return {
        name: Tensor(path, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _damage(path: Path, reason: str) -> str:
    """The error message for a file that the library refuses."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(SNIFFED)
        length = int.from_bytes(first[:8], "little")
        file.seek(8)
        header = file.read(length) if length <= _LONGEST_HEADER else b""
    if meaning := sniff(first):
        return f"{path} is {meaning}, not safetensors"
    whole, least = 8, "at least "
    if size >= 8 and length <= _LONGEST_HEADER:
        whole += length
        try:
            entries = [entry for name, entry in json.loads(header).items() if name != "__metadata__"]
            whole, least = whole + max(entry["data_offsets"][1] for entry in entries), ""
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            pass  # the header is cut off, or is none
    if size < whole:
        return f"{path} is truncated (it has {size:,} of {least}{whole:,} bytes): download it again"
    return f"{path} is damaged or not a safetensors file ({reason}): download it again"


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    try:
        values = json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a folder of published weights with its {path.name}"
        ) from error
    except ValueError as error:
        with path.open("rb") as file:
            meaning = sniff(file.read(SNIFFED))
        raise UserError(
            f"{path} is {meaning}, not JSON" if meaning else f"{path} is not valid JSON ({error}): download it again"
        ) from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object: download it again")
    return values


def read_folder(folder: Path) -> dict[str, Tensor]:
    """All tensors of a published folder: of its one file, or of several files with their index.

    Raises:
        UserError: there is no safetensors file, or more than one set of weights; files that the index names are
            missing or damaged.
    """
    # A variant is named before the last suffix: model.safetensors.index.bf16.json.
    indices = sorted(folder.glob("*.safetensors.index*.json"))
    files = sorted(folder.glob("*.safetensors"))
    usual = [f for name in _USUAL for f in (*files, *indices) if f.name == name]
    if usual:
        chosen = usual[0]
    elif len(indices) == 1 or (not indices and len(files) == 1):
        chosen = (indices or files)[0]
    elif indices or files:
        names = listed([f.name for f in indices or files])
        raise UserError(f"{folder} holds several sets of weights ({names}): keep only one of them there")
    else:
        raise UserError(without_safetensors(str(folder), [f.name for f in folder.iterdir()]))
    if chosen.suffix != ".json":
        return read_header(chosen)
    index = read_json(chosen)
    try:
        weight_map = index["weight_map"]
        parts = {name: folder / Path(file).name for name, file in weight_map.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{chosen} cannot be read as an index of safetensors: download it again") from error
    missing = sorted({path.name for path in parts.values() if not path.is_file()})
    if missing:
        raise UserError(f"{folder} lacks {listed(missing)}, which {chosen.name} names: download them")
    headers = {path: read_header(path) for path in sorted(set(parts.values()))}
    gone = [name for name, path in parts.items() if name not in headers[path]]
    if gone:
        raise UserError(f"{chosen} names tensors that their files lack ({listed(gone)}): download the folder again")
    return {name: headers[path][name] for name, path in parts.items()}


def without_safetensors(where: str, files: Iterable[str]) -> str:
    """The error message for a folder without safetensors, by the names of its files."""
    pickles = sorted(f for f in files if Path(f).suffix in _PICKLES and "/" not in f)
    if not pickles:
        return f"{where} has no safetensors file: give the folder of published weights"
    return (
        f"{where} has only pickles ({listed(pickles)}), which are not opened since they can run any code: convert "
        "each with safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors') and give the "
        "folder of the result"
    )


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The one dtype among `dtypes`; of several, the narrowest that holds all their values."""
    # NumPy has no common dtype for bfloat16 and float16.
    pair = {DTYPES["F16"], DTYPES["BF16"]}
    kinds = set(dtypes)
    return functools.reduce(np.promote_types, kinds - pair | {DTYPES["F32"]} if pair <= kinds else kinds)


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written. `pieces` gives its values in order, so that it is never in memory as a whole."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_folder(folder: Path, tensors: Iterable[Pending], stem: str, progress: Callable[[int], Any]) -> None:
    """Writes the tensors in order into `stem.safetensors`, or into several files of `SHARD_BYTES` with an index.

    `progress` is called with the number of bytes of each piece.
    """
    shards: list[list[Pending]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    if len(shards) == 1:
        _write_file(folder / f"{stem}.safetensors", shards[0], progress)
        return
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        _write_file(folder / name, shard, progress)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=1) + "\n")


def _write_file(path: Path, tensors: list[Pending], progress: Callable[[int], Any]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    at = 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at multiples of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            before = file.tell()
            for piece in t.pieces():
                data = np.ascontiguousarray(piece, t.dtype)
                file.write(data.reshape(-1).view(np.uint8).data)
                progress(data.nbytes)
            if file.tell() - before != t.nbytes:
                raise ValueError(f"{t.name}: {file.tell() - before} bytes were given for {t.nbytes}")


def slabs(array: Any, shape: tuple[int, ...], limit: int = 2**28) -> Iterator[np.ndarray]:
    """The first `shape[0]` rows of `array`, in slices of about `limit` bytes."""
    row = max(1, math.prod(shape[1:]) * 4)
    step = max(1, limit // row)
    for first in range(0, shape[0], step):
        yield np.asarray(array[first : min(first + step, shape[0])])
