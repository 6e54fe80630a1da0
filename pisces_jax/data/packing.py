"""Packing as an index: from (seed, epoch, lengths) an epoch's rows follow, and any group is random access."""

import collections
import dataclasses
import logging
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64

from pisces_jax.data.binning import pack
from pisces_jax.data.example import Picture, identity
from pisces_jax.data.images import fit
from pisces_jax.data.layout import LaidOut, Layout, Lengths, Placed, Source, lay_out, scan_lengths
from pisces_jax.data.mixture import Mixture, shuffled
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.errors import UserError

__all__ = [
    "Entry",
    "Fill",
    "LaidOut",
    "Layout",
    "LeftOut",
    "Lengths",
    "PackedGroups",
    "lay_out",
    "scan_lengths",
]

logger = logging.getLogger(__name__)

Group = dict[str, np.ndarray]


class Entry(NamedTuple):
    """One source of a mixture."""

    name: str
    weight: float
    source: Source


class LeftOut(NamedTuple):
    """How many examples of a source cannot be packed, by reason."""

    too_long: int  # longer than a row
    too_many_pictures: int  # more pictures than a group has slots
    unreadable: int


class Fill(NamedTuple):
    """Shares in use, from 0 to 1; a pool without slots counts as full."""

    tokens: float
    read_slots: float
    draw_slots: float


@dataclasses.dataclass(frozen=True)
class EpochIndex:
    """An epoch's packing, sorted by group, row and offset; group g is entries `first[g]` to `first[g+1]`."""

    first: Int64[np.ndarray, "groups+1"]
    row: Int32[np.ndarray, "E"]
    offset: Int32[np.ndarray, "E"]
    length: Int32[np.ndarray, "E"]
    source: Int32[np.ndarray, "E"]
    index: Int64[np.ndarray, "E"]

    def __len__(self) -> int:
        return len(self.first) - 1


class PackedGroups:
    """Groups of packed rows by number; the epochs follow each other without end.

    `groups[i]` is a dict of arrays (G rows of T tokens, pools of Pr and Pd pictures):

        tokens        int32 [G,T]  the pad id where nothing lies
        learn         bool  [G,T]  the token is a target
        segment_ids   int32 [G,T]  1, 2, ... along each row; 0 is padding
        positions     int32 [G,T]  from 0 in each segment
        source        int32 [G,T]  the number of the mixture's entry; -1 is padding
        read_images   uint8 [Pr,S,S,3]
        read_row, read_start  int32 [Pr]  row and position of the picture's first vector
        read_valid    bool  [Pr]   the slot is in use (else everything in it is to be ignored)
        read_source   int32 [Pr]   as `source`
        read_id       uint32 [Pr,2]  `identity(seed, epoch, example.key, ordinal of the part)`
        draw_...      the same for the pictures to draw

    An example with a picture that cannot be read keeps its segment, with nothing learned and no valid slot;
    it is counted in `broken` and logged once.

    Raises `UserError` when a source has no example that fits the layout.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        layout: Layout,
        seed: int,
        examples_per_epoch: int | None = None,
        shuffle: bool = True,
        lengths_dir: str | Path | None = None,
    ):
        self.entries = [Entry(*entry) for entry in entries]
        self.tokenizer = tokenizer
        self.layout = layout
        self.seed = seed
        self.broken: collections.Counter[str] = collections.Counter()
        self.left_out: dict[str, LeftOut] = {}
        self.lengths = []
        usable = []
        for entry in self.entries:
            cache = None if lengths_dir is None else Path(lengths_dir) / f"{entry.name}.npz"
            lengths = scan_lengths(entry.source, tokenizer, layout, cache)
            self.lengths.append(lengths)
            usable.append(self._usable(entry, lengths))
        self.mixture = Mixture(
            names=[entry.name for entry in self.entries],
            weights=[entry.weight for entry in self.entries],
            usable=usable,
            seed=seed,
            examples_per_epoch=examples_per_epoch,
            shuffle=shuffle,
        )
        self._ends: list[int] = []  # groups of the epochs so far, summed up
        self._epochs: dict[int, EpochIndex] = {}  # the latest two
        self._lock = threading.Lock()

    def _usable(self, entry: Entry, lengths: Lengths) -> Int64[np.ndarray, "U"]:
        """Indices of the examples that fit an empty group; the others are counted in `left_out`."""
        layout = self.layout
        unreadable = lengths.tokens < 0
        long = lengths.tokens > layout.length
        many = ~long & ((lengths.reads > layout.read_slots) | (lengths.draws > layout.draw_slots))
        self.left_out[entry.name] = left_out = LeftOut(
            int(long.sum()), int(many.sum()), int(unreadable.sum())
        )
        if sum(left_out):
            logger.warning(
                "source %s: of %d examples %d are longer than a row of %d tokens, %d have more pictures than "
                "a group has slots, %d are unreadable; they are left out",
                *(entry.name, len(long), left_out.too_long, layout.length),
                *(left_out.too_many_pictures, left_out.unreadable),
            )
        usable = np.flatnonzero(~(unreadable | long | many))
        if entry.weight > 0 and len(usable) == 0:
            if left_out.too_long:
                raise UserError(
                    f"no example of source {entry.name} fits a row of {layout.length} tokens: "
                    f"set the row length to at least {lengths.tokens[lengths.tokens >= 0].min()}"
                )
            if left_out.too_many_pictures:
                raise UserError(
                    f"every example of source {entry.name} has more pictures than a group has slots: "
                    f"set read_slots to {lengths.reads.max()} and draw_slots to {lengths.draws.max()} or more"
                )
            raise UserError(
                f"source {entry.name} has no readable example: mend it or remove it from the mixture"
            )
        return usable

    def pack_epoch(self, epoch: int) -> EpochIndex:
        """The packing of an epoch: a pure function of seed, epoch, lengths and weights."""
        source, index = self.mixture.epoch(epoch)
        tokens, reads, draws = (np.empty(len(source), np.int32) for _ in range(3))
        for s, lengths in enumerate(self.lengths):
            mine = source == s
            for values, known in zip((tokens, reads, draws), lengths, strict=True):
                values[mine] = known[index[mine]]
        bins = pack(tokens, reads, draws, self.layout)
        group = bins.group
        if self.mixture.shuffle:
            # The groups that the end of the epoch left open are emptier: they go anywhere among the others.
            moved = shuffled(np.arange(bins.num_groups), bins.num_groups, "groups", self.seed, epoch)
            group = moved[group]
        order = np.lexsort((bins.offset, bins.row, group))
        return EpochIndex(
            first=np.searchsorted(group[order], np.arange(bins.num_groups + 1)),
            row=bins.row[order],
            offset=bins.offset[order],
            length=tokens[order],
            source=source[order],
            index=index[order],
        )

    def epoch(self, epoch: int) -> EpochIndex:
        """`pack_epoch`, remembered for the latest two epochs."""
        with self._lock:
            if epoch not in self._epochs:
                self._epochs[epoch] = self.pack_epoch(epoch)
                while len(self._epochs) > 2:
                    del self._epochs[next(iter(self._epochs))]
            return self._epochs[epoch]

    def locate(self, i: int) -> tuple[int, int]:
        """The epoch of group `i` and its number in that epoch.

        How many groups an epoch has is known only from its packing, so the first call for a late group packs
        all epochs before it.
        """
        while not self._ends or i >= self._ends[-1]:
            epoch = len(self._ends)
            end = (self._ends[-1] if self._ends else 0) + len(self.epoch(epoch))
            with self._lock:
                if len(self._ends) == epoch:
                    self._ends.append(end)
        epoch = int(np.searchsorted(self._ends, i, side="right"))
        return epoch, i - (self._ends[epoch - 1] if epoch else 0)

    def fill(self, epoch: int = 0) -> Fill:
        """Shares of the tokens and picture slots of an epoch that are in use."""
        packed, layout = self.epoch(epoch), self.layout
        pictures = [0, 0]
        for s, lengths in enumerate(self.lengths):
            mine = packed.index[packed.source == s]
            pictures[0] += int(lengths.reads[mine].sum())
            pictures[1] += int(lengths.draws[mine].sum())
        slots = [len(packed) * layout.read_slots, len(packed) * layout.draw_slots]
        return Fill(
            int(packed.length.sum()) / (len(packed) * layout.rows * layout.length),
            *(used / total if total else 1.0 for used, total in zip(pictures, slots, strict=True)),
        )

    def __getitem__(self, i: int) -> Group:
        group, broken = self.make(i)
        for key in broken:
            if not self.broken[key]:
                logger.warning("example %s cannot be read and is masked", key)
            self.broken[key] += 1
        return group

    def make(self, i: int) -> tuple[Group, list[str]]:
        """Group `i`, and the keys of its examples that could not be read; changes nothing in this object."""
        epoch, g = self.locate(i)
        packed = self.epoch(epoch)
        group, broken = self.empty(), []
        taken, used = {"read": 0, "draw": 0}, [0] * self.layout.rows
        for entry in range(packed.first[g], packed.first[g + 1]):
            s, index = int(packed.source[entry]), int(packed.index[entry])
            row, start, length = int(packed.row[entry]), int(packed.offset[entry]), int(packed.length[entry])
            used[row] += 1
            span = slice(start, start + length)
            group["segment_ids"][row, span] = used[row]
            group["positions"][row, span] = np.arange(length)
            group["source"][row, span] = s
            key = f"{self.entries[s].name}[{index}]"
            try:
                example = self.entries[s].source[index]
                key = example.key
                laid_out = lay_out(example, self.tokenizer, self.layout)
                if len(laid_out.tokens) != length:
                    raise UserError(f"{key} has changed since its length was scanned")
                group["tokens"][row, span] = laid_out.tokens
                images = [self._fit(p.picture) for p in laid_out.pictures]
            except UserError:
                broken.append(key)
                continue
            group["learn"][row, span] = laid_out.learn
            for placed, image in zip(laid_out.pictures, images, strict=True):
                slot = taken[placed.role]
                taken[placed.role] += 1
                for name, value in {
                    "images": image,
                    "row": row,
                    "start": start + placed.start,
                    "valid": True,
                    "source": s,
                    "id": identity(self.seed, epoch, key, placed.ordinal),
                }.items():
                    group[f"{placed.role}_{name}"][slot] = value
        return group, broken

    def empty(self) -> Group:
        """A group in which nothing lies."""
        layout = self.layout
        shape = layout.rows, layout.length
        group: dict[str, Any] = {
            "tokens": np.full(shape, self.tokenizer.pad, np.int32),
            "learn": np.zeros(shape, bool),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "source": np.full(shape, -1, np.int32),
        }
        for role, slots in ("read", layout.read_slots), ("draw", layout.draw_slots):
            size = self._size(role)
            group[f"{role}_images"] = np.zeros((slots, size, size, 3), np.uint8)
            group[f"{role}_row"] = np.zeros(slots, np.int32)
            group[f"{role}_start"] = np.zeros(slots, np.int32)
            group[f"{role}_valid"] = np.zeros(slots, bool)
            group[f"{role}_source"] = np.full(slots, -1, np.int32)
            group[f"{role}_id"] = np.zeros((slots, 2), np.uint32)
        return group

    def _fit(self, placed: Placed) -> np.ndarray:
        stretch = placed.role == "read" and self.layout.read_stretch
        return fit(placed.picture.array(), self._size(placed.role), stretch)

    def _size(self, role: str) -> int:
        return self.layout.read_size if role == "read" else self.layout.draw_size

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())
