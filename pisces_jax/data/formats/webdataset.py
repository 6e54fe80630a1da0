"""WebDataset: tar shards in which neighbouring files of one name are one sample, with random access.

An index of offsets is built once for each shard, in parallel, and kept in a small file beside the shard (or, if that
folder is not writable, in the user's cache). It holds for the shard's size and time: a changed shard is indexed again.
"""

import concurrent.futures
import fnmatch
import functools
import hashlib
import io
import multiprocessing
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from pisces_jax.data import storage
from pisces_jax.data.arrays import read_arrays, write_arrays
from pisces_jax.data.example import SHARD_CHANGED, SHARD_GONE, BrokenExample
from pisces_jax.data.formats.records import (
    PICTURES,
    labels,
    locate,
    parse_json,
    parse_object,
    parse_text,
    reading,
    unchanged,
)
from pisces_jax.data.images import EncodedImage
from pisces_jax.data.recipes import Record
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import SNIFFED, local_path, sniff, user_cache

VERSION = 3  # of the index
TEXTS = ("txt", "text", "caption")  # of several of them, the first is the text
LARGEST_TEXT = 2**16  # bytes: larger members with other suffixes are not fields
WHOLE, DUPLICATE, OUTSIDE, CUT, NOT_A_FILE, SPARSE = PROBLEMS = (
    "",
    "duplicate key",
    "a name outside its folder",
    "the shard is cut off",
    "a member that is not a file",
    "a sparse member (pack without tar's -S)",
)
FIRST_DOT = "; the first dot ends a sample's name, so that 22.05.jpg is the 05.jpg of sample 22"
OPEN_INDICES = 256
LONGEST_END = 2**16  # bytes: an archive ends with two blocks of zeros, and more of them up to tar's record size


class Index(NamedTuple):
    """One shard: N samples, their M members in the order of the file, and the members' kinds (names after the first
    dot).
    """

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
    """Records of WebDataset shards; `path` is a pattern or a list of them.

    A `.txt` is the field `text`, and a `.json` gives its own fields. `.prompt.txt` and `.prompt.json` are the field
    `prompt`. Other small members have their whole suffix as their name, with `_` for a dot (in a format, a dot asks for
    an attribute). Of several members that give one field, in whatever order they come, a text is taken before others,
    and a member of its own before a field of the `.json`. `images` names the members that are pictures ("jpg",
    "input.png", or all that match "*.jpg") in the order in which a recipe takes them; by default it is the one with a
    plain name ("jpg" beside "mask.png"), or the only one. `index_dir` is where the indices go, by default beside the
    shards, and `index_workers` the number of processes that make them.

    Raises:
        UserError: no sample at all, or a shard that is compressed, or that is missing and was never indexed.
    """

    names = None

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
        indices = [self._load(shard) for shard in range(len(self.paths))]
        if all(index.problem.all() for index in indices):
            others = " and its like" if len(indices) > 1 else ""
            raise UserError(f"{self.paths[0]}{others} hold no sample: change path")
        self._ends = np.cumsum([len(index.problem) for index in indices])
        marks = storage.digest([*self.paths, *(index.signature for index in indices)])
        self.fingerprint = f"{marks}/{self.images}"

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, i: int, fields: frozenset[str] | None = None) -> Record:
        shard, i = locate(self._ends, i)
        path, index = self.paths[shard], self._load(shard)
        key = f"{self._labels[shard]}/{index.key(i)}"
        if index.problem[i]:
            raise BrokenExample(key, PROBLEMS[index.problem[i]], path)
        found: dict[str, Any] = {}
        pictures = {}
        for m in sorted(_needed(index, i, fields), key=lambda m: _rank(index.kinds[int(index.kind[m])])):
            kind = index.kinds[index.kind[m]]
            read = functools.partial(_read, path, index.signature, int(index.offset[m]), int(index.size[m]), key)
            name, _, suffix = kind.rpartition(".")
            name = name.replace(".", "_")
            if suffix in PICTURES:
                pictures[kind] = EncodedImage(read, key)
            elif suffix in TEXTS:
                found[name or "text"] = parse_text(read(), key)
            elif suffix == "json" and name:
                value = parse_json(read(), key)
                found |= {} if value is None and name in found else {name: value}
            elif suffix == "json":
                found.update(parse_object(read(), key))
            elif index.size[m] < LARGEST_TEXT:
                data = read()
                try:
                    found[kind.replace(".", "_")] = parse_text(data, key)
                except BrokenExample:  # an array or the like, which is not a field
                    continue
        wanted = _plain(tuple(pictures)) if self.images is None else _matching(self.images, tuple(pictures))
        note = FIRST_DOT if any("." in kind for kind in pictures) else ""
        missing = [kind for kind in wanted if kind not in pictures]
        if missing or not pictures:
            raise BrokenExample(key, "a picture is missing", f"no .{' and .'.join(missing or PICTURES[:1])} in {path}")
        if self.images is None and len(wanted) > 1:
            raise BrokenExample(key, "several pictures", f"{', '.join(sorted(wanted))}: set images{note}")
        return Record(key, found, [pictures[kind] for kind in wanted], note)

    def problems(self) -> list[int]:
        """How many samples have each of `PROBLEMS`."""
        found = np.concatenate([self._load(shard).problem for shard in range(len(self.paths))])
        return np.bincount(found, minlength=len(PROBLEMS)).tolist()

    def _load(self, shard: int) -> Index:
        index = _load_index(str(self._index_paths[shard]))
        if index is None:
            raise UserError(f"the index {self._index_paths[shard]} is gone: start again, which makes a new one")
        return index


def _matching(images: Sequence[str], kinds: Sequence[str]) -> Sequence[str]:
    """The names `images`, with those of a sample's pictures that match in place of a pattern, 2 before 10."""
    ordered = sorted(kinds, key=lambda kind: [(len(word), word) for word in re.findall(r"\d+|\D", kind)])
    return [kind for name in images for kind in (fnmatch.filter(ordered, name) or [name])]


def _plain(kinds: Sequence[str]) -> Sequence[str]:
    """Of a sample's pictures those with a plain name; all if there is none."""
    return tuple(kind for kind in kinds if "." not in kind) or kinds


def _rank(kind: str) -> tuple[int, str]:
    """Sorts members so that what stands comes last: the fields of the .json, other members, texts."""
    suffix = kind.rpartition(".")[2]
    rank = 2 + TEXTS[::-1].index(suffix) if suffix in TEXTS else int(kind != "json")
    return rank, kind


def _needed(index: Index, i: int, fields: frozenset[str] | None) -> list[int]:
    """The members of sample i that are a picture or may give one of `fields`: others are not fetched."""
    members = range(int(index.first[i]), int(index.first[i + 1]))
    if fields is None:
        return list(members)
    needed, left = [], fields
    for m in sorted(members, key=lambda m: _rank(index.kinds[int(index.kind[m])]), reverse=True):
        kind = index.kinds[index.kind[m]]
        if kind in TEXTS:
            use = "text" in left
            left -= {"text"}  # other texts and the .json would give one in vain
        elif kind == "json":
            use = bool(left)
        else:
            begins = kind.replace(".", "_")
            use = kind.rpartition(".")[2] in PICTURES or any(begins.startswith(name) for name in fields)
        needed += [m] if use else []
    return needed


def _read(path: str, signature: str, offset: int, size: int, key: str) -> bytes:
    with reading(key, gone=SHARD_GONE):
        unchanged(path, signature, key, SHARD_CHANGED)
        data = storage.read(path, offset, size)
    if len(data) < size:
        raise BrokenExample(key, CUT, path)
    return data


@functools.lru_cache(OPEN_INDICES)
def _load_index(path: str) -> Index | None:
    found = read_arrays(path)
    if found is None or found[0].get("version") != VERSION:
        return None
    about, arrays = found
    return Index(about["signature"], about["kinds"], **arrays)


def index_shards(paths: Sequence[str], index_dir: str | None = None, workers: int | None = None) -> list[Path]:
    """The index file of every shard. Those that are missing or older than their shard are made.

    Raises:
        UserError: a shard is compressed, or missing and without an index, or an index cannot be written.
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
        # Spawned, since the caller may have started JAX. Threads would wait for each other.
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
    digest = hashlib.blake2b(os.fsencode(whole), digest_size=6).hexdigest()
    if index_dir is None:
        beside = Path(f"{path}.index")
        if not storage.is_remote(path) and (beside.exists() or os.access(beside.parent, os.W_OK)):
            return beside
        if (cache := user_cache("index")) is None:
            raise UserError(f"there is no place for the index of {path}: set index_dir to a folder")
        index_dir = str(cache)
    return local_path(index_dir) / f"{Path(path).name}-{digest}.index"


def _write_index(path: str, place: Path) -> None:
    index = index_shard(path)
    about = {"version": VERSION, "signature": index.signature, "kinds": list(index.kinds)}
    try:
        write_arrays(place, about, {name: getattr(index, name) for name in Index._fields[2:]})
    except OSError as error:
        raise UserError(f"the index {place} cannot be written ({error.strerror}): set index_dir") from error


def index_shard(path: str) -> Index:
    """Reads the headers of one shard. Where it breaks off, one more sample stands for those that are lost.

    Raises:
        UserError: it cannot be read, is compressed, or is not a tar file.
    """
    signature = storage.signature(path)
    file = storage.File(path)
    total = file.seek(0, io.SEEK_END)
    samples: list[tuple[str, str]] = []  # key, problem
    first, kinds, rows = [0], dict[str, int](), list[tuple[int, int, int]]()
    seen: set[str] = set()
    current: set[str] = set()  # kinds of the last sample
    last = None

    def begin(key: str, problem: str) -> None:
        if samples:
            first.append(len(rows))
        samples.append((key, problem))
        current.clear()

    try:
        for member in _members(path, file, total):
            folder, _, name = member.name.rpartition("/")
            stem, _, kind = name.partition(".")
            if member.isdir() or (storage.inside(member.name) and _is_no_sample(stem, kind)):
                continue
            key, kind = (f"{folder}/{stem}" if folder else stem), kind.lower()
            if key != last or kind in current:
                begin(key, DUPLICATE if key in seen else WHOLE)
            last = key
            seen.add(key)
            current.add(kind)
            if not storage.inside(member.name):
                samples[-1] = key, OUTSIDE
            elif not member.isreg():
                samples[-1] = key, NOT_A_FILE
            elif member.issparse():  # its bytes do not lie in the archive as they are
                samples[-1] = key, SPARSE
            elif member.offset_data + member.size > total:
                samples[-1] = key, CUT
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
        problem=np.array([PROBLEMS.index(problem) for _, problem in samples], np.uint8),
        key_start=np.cumsum([0, *map(len, keys)]).astype(np.int64),
        keys=np.frombuffer(b"".join(keys), np.uint8),
        kind=table[:, 0].astype(np.uint16),
        offset=table[:, 1],
        size=table[:, 2],
    )


def _is_no_sample(stem: str, kind: str) -> bool:
    """Whether a member is one of those beside the samples, which the webdataset library skips too: notes of macOS
    (`._1.png`), files without a suffix, and `__meta__.json`.
    """
    return not stem or not kind or (len(stem) > 4 and stem.startswith("__") and stem.endswith("__"))


def _members(path: str, file: storage.File, total: int) -> Iterator[tarfile.TarInfo]:
    """The members in order.

    Raises:
        UserError: it is not a tar file.
        TarError, EOFError, ValueError: it breaks off.
    """
    file.seek(0)
    buffered = io.BufferedReader(file, 2**22 if storage.is_remote(path) else 2**16)
    try:
        archive = tarfile.TarFile(path, fileobj=buffered)
    except (tarfile.TarError, EOFError, ValueError) as error:
        if not total:
            raise
        if (meaning := sniff(storage.read(path, 0, SNIFFED))) is not None:
            raise UserError(f"{path} is {meaning}, not a plain tar file") from error
        raise UserError(f"{path} is not a tar file ({error}): remove it from path") from error
    with archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined] # else it remembers them all
            yield member
        # tarfile takes a damaged header, or a file that is over, for the end of the archive.
        end = storage.read(path, archive.offset, LONGEST_END + 1)
        if not tarfile.BLOCKSIZE <= len(end) <= LONGEST_END or end.strip(b"\0"):
            raise tarfile.ReadError("the archive does not end")
