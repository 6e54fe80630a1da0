"""WebDataset: tar shards in which neighbouring files of one name are one sample, with random access.

An index of offsets is built once for each shard, in parallel, and kept in a small file beside the shard (or, where
nothing can be written there, in the user's cache). It belongs to the shard's size and time: a shard that changed is
indexed again.
"""

import concurrent.futures
import functools
import hashlib
import io
import multiprocessing
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pisces_jax.data import storage
from pisces_jax.data.example import SHARD_CHANGED, SHARD_GONE, BrokenExample
from pisces_jax.data.formats.records import PICTURES, labels, locate, parse_any_json, parse_json, parse_text
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.packing.arrays import read_arrays, write_arrays
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError

VERSION = 2  # of the index
TEXTS = ("txt", "text", "caption")
CUT = "the shard is cut off"
_WHOLE = ""
PROBLEMS = (_WHOLE, "duplicate key", "a name outside its folder", CUT, "a member that is no file")
OPEN_INDICES = 256
LONGEST_END = 2**16  # bytes: two blocks of zeros end an archive, and more of them fill it up to a record of tar's


class Index(NamedTuple):
    """One shard: samples N, their members M in file order, and the kinds (names after the first dot) of members."""

    signature: str
    kinds: Sequence[str]
    first: np.ndarray  # int64 [N+1]: sample i has members first[i] to first[i+1]
    problem: np.ndarray  # uint8 [N], into PROBLEMS
    key_start: np.ndarray  # int64 [N+1], into `keys`
    keys: np.ndarray  # uint8: all keys in UTF-8, one after the other
    kind: np.ndarray  # uint16 [M], into `kinds`
    offset: np.ndarray  # int64 [M]: where the member's bytes start
    size: np.ndarray  # int64 [M]

    def key(self, i: int) -> str:
        return bytes(self.keys[self.key_start[i] : self.key_start[i + 1]]).decode("utf-8", "replace")


class WebDataset:
    """Records of WebDataset shards. `path` is a pattern or a list of them (`storage.expand`).

    A `.txt` is the field `text` and a `.json` gives its own fields; `.prompt.txt` and `.prompt.json` are the field
    `prompt`, and other small members go by their whole names, with `_` for a dot (in a format a dot asks for an
    attribute). `images` names the members that are pictures ("jpg", "input.png"), in the order that a recipe takes
    them; by default every picture of a sample. `index_dir` is where the indices go, by default beside the shards.

    Raises:
        UserError: no shard, a missing one that was never indexed, a compressed one, or no sample at all.
    """

    names = None
    wanted: frozenset[str] | None = None  # the fields that are used; None: perhaps all

    def __init__(
        self,
        path: str | Sequence[str],
        images: Sequence[str] | None = None,
        index_dir: str | None = None,
        index_workers: int | None = None,
        name: str = "webdataset",
    ):
        self.paths = storage.expand(path)
        self._labels = labels(name, self.paths)
        self.images = tuple(images) if images is not None else None
        self.remote = any(map(storage.is_remote, self.paths))
        self._index_paths = index_shards(self.paths, index_dir, index_workers)
        counts, signatures, whole = [], [], 0
        for shard in range(len(self.paths)):
            index = self._load(shard)
            counts.append(len(index.problem))
            signatures.append(index.signature)
            whole += counts[-1] - int(np.count_nonzero(index.problem))
        self._ends = np.cumsum(counts)
        if not whole:
            raise UserError(f"{self.paths[0]}{' and its like' if len(counts) > 1 else ''} hold no sample: change path")
        digest = hashlib.blake2b("\0".join([*self.paths, *signatures]).encode(), digest_size=16).hexdigest()
        self.fingerprint = f"{digest}/{self.images}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, i: int) -> Record:
        shard, i = locate(self._ends, i)
        path, index = self.paths[shard], self._load(shard)
        key = f"{self._labels[shard]}/{index.key(i)}"
        if index.problem[i]:
            raise BrokenExample(key, PROBLEMS[index.problem[i]], path)
        fields: dict[str, Any] = {}
        pictures = {}
        for m in self._needed(index, i):
            kind = index.kinds[index.kind[m]]
            read = functools.partial(self._read, path, index.signature, int(index.offset[m]), int(index.size[m]), key)
            name, _, suffix = kind.rpartition(".")
            name = name.replace(".", "_")
            if suffix in PICTURES:
                pictures[kind] = EncodedImage(read, key)
            elif suffix in TEXTS:
                fields[name or "text"] = parse_text(read(), key)
            elif suffix == "json" and name:
                fields[name] = parse_any_json(read(), key)
            elif suffix == "json":
                fields.update(parse_json(read(), key))
            elif index.size[m] < 2**16:  # whatever else is text is a field; arrays and the like are left alone
                try:
                    fields[kind.replace(".", "_")] = parse_text(read(), key)
                except BrokenExample as error:
                    if error.reason != "not UTF-8":
                        raise
        wanted = self.images if self.images is not None else tuple(pictures)
        missing = [kind for kind in wanted if kind not in pictures]
        if missing or not pictures:
            raise BrokenExample(key, "a picture is missing", f"no .{' and .'.join(missing or PICTURES[:1])} in {path}")
        return Record(key, fields, [pictures[kind] for kind in wanted])

    def _needed(self, index: Index, i: int) -> list[int]:
        """The members of sample i that are a picture or may give a field that is used: others are not fetched."""
        members = range(int(index.first[i]), int(index.first[i + 1]))
        if self.wanted is None:
            return list(members)
        needed, left = [], self.wanted
        for m in reversed(members):
            kind = index.kinds[index.kind[m]]
            if kind in TEXTS:
                use = "text" in self.wanted
                left -= {"text"}  # a .json before it would give one in vain
            elif kind == "json":
                use = bool(left)
            else:
                begins = kind.replace(".", "_")
                use = kind.rpartition(".")[2] in PICTURES or any(begins.startswith(name) for name in self.wanted)
            needed += [m] if use else []
        return needed[::-1]

    def problems(self) -> list[int]:
        """How many samples have each of `PROBLEMS`."""
        return sum(
            np.bincount(self._load(shard).problem, minlength=len(PROBLEMS)) for shard in range(len(self.paths))
        ).tolist()  # type: ignore[union-attr]

    @staticmethod
    def _read(path: str, signature: str, offset: int, size: int, key: str) -> bytes:
        try:
            if not storage.is_remote(path) and storage.signature(path) != signature:
                raise BrokenExample(key, SHARD_CHANGED, path)
            data = storage.read(path, offset, size)
        except storage.Unreachable as error:
            raise BrokenExample(key, SHARD_GONE, str(error)) from error
        if len(data) < size:
            raise BrokenExample(key, CUT, path)
        return data

    def _load(self, shard: int) -> Index:
        index = _load_index(str(self._index_paths[shard]))
        if index is None:
            raise UserError(f"the index {self._index_paths[shard]} is gone: start again, and it is made again")
        return index


@functools.lru_cache(OPEN_INDICES)
def _load_index(path: str) -> Index | None:
    found = read_arrays(path)
    if found is None or found[0].get("version") != VERSION:
        return None
    about, arrays = found
    return Index(about["signature"], about["kinds"], **arrays)


def index_shards(paths: Sequence[str], index_dir: str | None = None, workers: int | None = None) -> list[Path]:
    """The index file of every shard; those that are missing or belong to an older state of a shard are made.

    Raises:
        UserError: a shard is missing and has no index, is compressed, or its index can be written nowhere.
    """
    places = [_place(path, index_dir) for path in paths]
    todo = []
    for path, place in zip(paths, places, strict=True):
        known = _load_index(str(place))
        try:
            current = storage.signature(path)
        except storage.Unreachable:
            if known is None:
                raise
            continue  # gone since it was indexed: its samples are counted as they are met
        if known is None or known.signature != current:
            todo.append((path, place))
    workers = min(len(todo), workers or os.cpu_count() or 1)
    if workers < 2:
        for path, place in todo:
            _write_index(path, place)
    else:
        # Spawned, as everything here: the caller may have started JAX. Threads would wait for one another.
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
            made = [pool.submit(_write_index, path, place) for path, place in todo]
            for done in tqdm(made, desc="index", unit="shard", delay=3.0, mininterval=1.0):
                done.result()
    if todo:
        _load_index.cache_clear()
    return places


def _place(path: str, index_dir: str | None) -> Path:
    whole = path if storage.is_remote(path) else os.path.abspath(path)
    digest = hashlib.blake2b(whole.encode(), digest_size=6).hexdigest()
    if index_dir is None:
        beside = Path(f"{path}.index")
        if not storage.is_remote(path) and (beside.exists() or os.access(beside.parent, os.W_OK)):
            return beside
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        index_dir = str(Path(cache) / "pisces_jax" / "index")
    return Path(index_dir) / f"{Path(path).name}-{digest}.index"


def _write_index(path: str, place: Path) -> None:
    index = index_shard(path)
    about = {"version": VERSION, "signature": index.signature, "kinds": list(index.kinds)}
    try:
        write_arrays(place, about, {name: getattr(index, name) for name in Index._fields[2:]})
    except OSError as error:
        raise UserError(f"the index {place} cannot be written ({error.strerror}): set index_dir") from error


def index_shard(path: str) -> Index:
    """Reads through one shard's headers. Where it breaks off, one more sample stands for those that are lost.

    Raises:
        UserError: it cannot be read, is compressed, or is no tar file.
    """
    signature, total = storage.signature(path), storage.size(path)
    start = storage.read(path, 0, 4)
    if start[:2] == b"\x1f\x8b" or start[:3] == b"BZh" or start == b"\x28\xb5\x2f\xfd" or start[:4] == b"\xfd7zX":
        raise UserError(f"{path} is compressed, and random access is not possible in it: unpack it to a plain .tar")
    samples: list[tuple[str, int]] = []  # key, problem
    first, kinds, rows = [0], dict[str, int](), list[tuple[int, int, int]]()
    seen: set[str] = set()
    current: dict[str, None] = {}  # kinds of the sample in hand

    def begin(key: str, problem: str = _WHOLE) -> None:
        if samples:
            first.append(len(rows))
        samples.append((key, PROBLEMS.index(problem)))
        current.clear()

    def spoil(problem: str) -> None:
        samples[-1] = samples[-1][0], PROBLEMS.index(problem)

    last = None
    try:
        for member in _members(path, total):
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if member.isdir() or (storage.inside(member.name) and _is_no_sample(stem, kind)):
                continue
            key, kind = (f"{folder}/{stem}" if folder else stem), kind.lower()
            if key != last or kind in current:
                begin(key, PROBLEMS[1] if key in seen else _WHOLE)
            last = key
            seen.add(key)
            current[kind] = None
            if not storage.inside(member.name):
                spoil(PROBLEMS[2])
            elif not member.isreg():
                spoil(PROBLEMS[4])
            elif member.offset_data + member.size > total:
                spoil(CUT)
                break
            rows.append((kinds.setdefault(kind, len(kinds)), member.offset_data, member.size))
    except (tarfile.TarError, EOFError, ValueError):
        begin(f"after {samples[-1][0] if samples else 'its start'}", CUT)
    if samples:
        first.append(len(rows))
    keys = [key.encode("utf-8", "surrogateescape") for key, _ in samples]
    table = np.array(rows, np.int64).reshape(-1, 3)
    return Index(
        signature=signature,
        kinds=list(kinds),
        first=np.array(first, np.int64),
        problem=np.array([problem for _, problem in samples], np.uint8),
        key_start=np.cumsum([0, *map(len, keys)]).astype(np.int64),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        kind=table[:, 0].astype(np.uint16),
        offset=table[:, 1],
        size=table[:, 2],
    )


def _is_no_sample(stem: str, kind: str) -> bool:
    """What lies beside the samples: the notes of macOS (`._1.png`), files without a suffix, and `__meta__.json`.

    The webdataset library passes over them too.
    """
    return not stem or not kind or (len(stem) > 4 and stem.startswith("__") and stem.endswith("__"))


def _members(path: str, total: int) -> Iterator[tarfile.TarInfo]:
    """The members in order.

    Raises:
        UserError: it is no tar file.
        TarError, EOFError, ValueError: it breaks off.
    """
    try:
        archive = tarfile.TarFile(path, fileobj=io.BufferedReader(_Reader(path, total), 2**16))
    except (tarfile.TarError, EOFError, ValueError) as error:
        if not total:
            raise
        raise UserError(f"{path} is no tar file ({error}): remove it from path") from error
    with archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined] # or it remembers them all
            yield member
        # tarfile takes a damaged header, and a file that is over, for the archive's end.
        end = storage.read(path, archive.offset, LONGEST_END + 1)
        if not tarfile.BLOCKSIZE <= len(end) <= LONGEST_END or end.strip(b"\0"):
            raise tarfile.ReadError("the archive does not end")


class _Reader(io.RawIOBase):
    """A shard as a file that can seek; a remote one is fetched some megabytes at a time."""

    def __init__(self, path: str, total: int):
        self._path, self._total, self._at = path, total, 0
        self._block = 2**22 if storage.is_remote(path) else 2**16
        self._start, self._data = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._total}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        if not self._start <= self._at < self._start + len(self._data):
            self._start, self._data = self._at, storage.read(self._path, self._at, self._block)
        piece = self._data[self._at - self._start :][: len(buffer)]
        buffer[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)
