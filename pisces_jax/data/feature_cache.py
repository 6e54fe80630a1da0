"""Cached features of pictures, in ArrayRecord shards: the output of a frozen encoder, read in place of the pictures.
The encoder is the generation encoder, or the autoencoder whose latents a decoder learns to make.

There is one record per example, by its number in the source: the features of the picture that the example draws, or
else of its first picture. An example without a readable picture has an empty record. If a shard has any of these, a
file beside it has their number.
"""

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from pisces_jax.data.example import BrokenExample, Example, Picture
from pisces_jax.data.formats.record_files import RecordFiles, Span
from pisces_jax.data.images import UnreadablePicture
from pisces_jax.data.packing.layout import Entry, Source
from pisces_jax.data.packing.lengths import fingerprint_words
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import is_as_written, replacing, write_atomic, write_checksum

log = logging.getLogger(__name__)
SHARD = 4096  # records
# NumPy has no bfloat16, so its bits are kept.
DTYPES: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "bfloat16": np.dtype("<u2")}


def cached_picture(example: Example) -> Picture:
    """The picture whose features are cached.

    Raises:
        BrokenExample: the example has no picture.
        UserError: it draws several.
    """
    pictures = [part for part in example.parts if isinstance(part, Picture)]
    drawn = [picture for picture in pictures if picture.role == "draw"]
    if len(drawn) > 1:
        raise UserError(f"example {example.key} draws {len(drawn)} pictures: features are cached of one only")
    if not pictures:
        raise BrokenExample(example.key, "a picture is missing")
    return (drawn or pictures)[0]


class FeatureCache:
    """A source's features, complete or being written. `encoder` describes what made them: any JSON.

    Sources of the same pictures have the same folder, whatever their names and texts.

    Raises:
        UserError: the folder has features of another encoder.
    """

    def __init__(self, folder: str | os.PathLike, entry: Entry, encoder: Mapping[str, Any]):
        words = "\0".join(map(str, picture_words(entry.source)))
        digest = hashlib.blake2b(words.encode(errors="surrogatepass"), digest_size=8).hexdigest()
        self.folder = Path(folder) / digest
        self.name, self.count = entry.name, len(entry.source)
        self.encoder = json.loads(json.dumps(dict(encoder)))
        self._about: dict[str, Any] | None = None
        sizes = [min(SHARD, self.count - SHARD * s) for s in range(len(self.shards))]
        self._records = RecordFiles([Span(str(p), 0, n) for p, n in zip(self.shards, sizes, strict=True)])
        try:
            about = json.loads(self._description.read_text())
        except (OSError, ValueError):
            return
        if not is_as_written(self._description) or not {"encoder", "shape", "dtype"} <= about.keys():
            return  # damaged
        if about["encoder"] != self.encoder:
            raise UserError(
                f"{self.folder} holds features of another encoder or pooling, or of one that was trained or replaced "
                "since: remove it and cache again"
            )
        self._about = about

    @property
    def _description(self) -> Path:
        return self.folder / "about.json"

    @property
    def shards(self) -> list[Path]:
        n = math.ceil(self.count / SHARD)
        return [self.folder / f"{shard:05d}-of-{n:05d}.array_record" for shard in range(n)]

    def todo(self, process_index: int, process_count: int) -> list[int]:
        """The shards that this process still has to write."""
        return [s for s, path in enumerate(self.shards) if s % process_count == process_index and not path.exists()]

    def set_damaged_aside(self, process_index: int, process_count: int) -> None:
        """Reads this process's share of the shards, and renames those that are not what was written: they are to be
        written again. Without a description that can be read, no shard can be used."""
        for path in self.shards[process_index::process_count]:
            if path.exists() and (self._about is None or not is_as_written(path)):
                aside = path.with_suffix(".damaged")
                os.replace(path, aside)
                log.warning("%s is damaged: it is set aside as %s, and made anew", path, aside.name)

    def describe(self, shape: Sequence[int], dtype: str) -> None:
        """Sets the shape and dtype of the records, before the first shard is written.

        Raises:
            UserError: the shards that are there have another form.
        """
        about = {"encoder": self.encoder, "shape": list(shape), "dtype": dtype}
        if self._about is not None and self._about != about:
            raise UserError(
                f"{self.folder} was begun as {self._about['dtype']} {self._about['shape']} and not as {dtype} "
                f"{list(shape)}: remove it or continue as it was begun"
            )
        self._about = about
        with replacing(self._description) as temporary:
            temporary.write_text(json.dumps(about))
            write_checksum(temporary, self._description)

    def write(self, shard: int, records: Sequence[bytes]) -> None:
        """Writes a shard atomically."""
        from array_record.python.array_record_module import ArrayRecordWriter

        path = self.shards[shard]
        if empty := sum(not record for record in records):
            write_atomic(_count_of(path), str(empty))
        else:
            _count_of(path).unlink(missing_ok=True)  # left over from a shard that was removed
        with replacing(path) as temporary:
            writer = ArrayRecordWriter(str(temporary), "group_size:1")  # records are read one at a time
            for record in records:
                writer.write(record)
            writer.close()
            write_checksum(temporary, path)

    def empty(self) -> int:
        """How many pictures of the written shards could not be read."""
        counts = (_count_of(path) for path in self.shards if path.exists())
        found = [path.read_text(errors="replace") for path in counts if path.exists()]
        return sum(int(text) for text in found if text.isdecimal())

    def open(self) -> "FeatureCache":
        """Returns the cache itself, ready to be read.

        Raises:
            UserError: it is missing or not finished.
        """
        missing = [path for path in self.shards if not path.exists()]
        if self._about is None or missing:
            lacks = f"{len(missing)} of {len(self.shards)} shards of cached features" if missing else "its description"
            raise UserError(
                f"{self.folder} lacks {lacks}: run python -m pisces_jax.cache with this config and workdir first"
            )
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """[m, C] of a generation encoder, [Z, Z, c] of an autoencoder."""
        assert self._about is not None
        return tuple(self._about["shape"])

    def __getitem__(self, i: int) -> Float32[np.ndarray, "..."]:
        """The features of example `i`, of shape `shape`.

        Raises:
            BrokenExample: the picture could not be read when it was cached, or the record cannot be read now.
        """
        assert self._about is not None
        key = f"{self.name}[{i}]"
        try:
            data = self._records[i]
        except UserError as error:
            raise BrokenExample(key, "cached features cannot be read", str(error)) from error
        if not data:
            raise BrokenExample(key, UnreadablePicture.reason, "when its features were cached")
        stored = np.frombuffer(data, DTYPES[self._about["dtype"]])
        if stored.dtype == np.uint16:
            stored = (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return stored.reshape(self.shape)


def _count_of(shard: Path) -> Path:
    return shard.with_suffix(".empty")


def picture_words(source: Source) -> list[Any]:
    """What the features of a source depend on: not its texts, where the source knows its pictures apart from them."""
    known = source.pictures_fingerprint
    return fingerprint_words(source) if known is None else [len(source), known]
