"""Packing as an index: from (seed, epoch, lengths) an epoch's rows follow, and any group is random access."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pisces_jax.data.example import identity, reason_of
from pisces_jax.data.feature_cache import FeatureCache
from pisces_jax.data.packing import epochs
from pisces_jax.data.packing.layout import Entry, LaidOut, Layout, Placed, lay_out
from pisces_jax.data.packing.lengths import Lengths, scan_lengths
from pisces_jax.data.packing.mixture import check_mixture, shares
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.utils.errors import UserError

__all__ = [
    "Broken",
    "Entry",
    "Fill",
    "LaidOut",
    "Layout",
    "LeftOut",
    "Made",
    "PackedGroups",
    "check_readable",
    "lay_out",
]

logger = logging.getLogger(__name__)

Group = dict[str, np.ndarray]
MAX_BROKEN = 0.01  # share of broken examples above which a run stops
LEAST_SEEN = 1000  # examples that the share is taken of at least


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


class Broken(NamedTuple):
    """An example that turned out to be unusable when it was read."""

    key: str
    reason: str
    message: str


class Made(NamedTuple):
    """A group or a pair, how many examples it was made of, and those that are masked in it."""

    item: Group
    examples: int
    broken: list[Broken]


class PackedGroups:
    """Groups of packed rows by number; the epochs, `per_epoch` groups each, follow each other without end.

    `groups[i]` is a dict of arrays (G rows of T tokens, pools of Pr and Pd pictures):

        tokens        int32 [G,T]  the pad id where nothing lies
        loss_mask     bool  [G,T]  the token is a target
        segment_ids   int32 [G,T]  1, 2, ... along each row; 0 is padding
        positions     int32 [G,T]  from 0 in each segment
        source        int32 [G,T]  the number of the mixture's entry; -1 is padding
        read_images   uint8 [Pr,S,S,3]
        read_row, read_start  int32 [Pr]  row and position of the picture's first vector
        read_valid    bool  [Pr]   the slot is in use (else everything in it is to be ignored)
        read_source   int32 [Pr]   as `source`
        read_id       uint32 [Pr,2]  `identity(seed, epoch, example.key, ordinal of the part)`
        draw_...      the same for the pictures to draw

    With `features` (one cache an entry, None for one that draws nothing) there are no `draw_images` but

        draw_features float32 [Pd,m,C]

    An example that turns out broken keeps its segment, with nothing learned and no valid slot. `folder` is where
    lengths are kept (`scan_lengths`). With `scaled_jpeg`, JPEGs are decoded no larger than needed
    (`images.load_image`).

    Raises:
        UserError: a source has no example that fits the layout, or more than `max_broken` of them are unreadable.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        layout: Layout,
        seed: int,
        examples_per_epoch: int | None = None,
        shuffle: bool = True,
        folder: str | Path | None = None,
        scaled_jpeg: bool = False,
        max_broken: float = MAX_BROKEN,
        features: Sequence[FeatureCache | None] | None = None,
    ):
        self.features = features
        self.entries = [Entry(*entry) for entry in entries]
        self.tokenizer, self.layout, self.seed, self.scaled_jpeg = tokenizer, layout, seed, scaled_jpeg
        self.lengths = [scan_lengths(e.source, tokenizer, layout, e.name, folder) for e in self.entries]
        self.left_out: dict[str, LeftOut] = {}
        usable = []
        for entry, lengths in zip(self.entries, self.lengths, strict=True):
            usable.append(self._usable(entry, lengths))
            check_readable(entry.name, lengths, max_broken)
        names, weights = [entry.name for entry in self.entries], [entry.weight for entry in self.entries]
        check_mixture(names, weights, usable)
        self.counts = shares(weights, examples_per_epoch or sum(usable))
        if not sum(self.counts):
            raise UserError("an epoch of this mixture has no example: set a greater examples_per_epoch")
        self._epochs = epochs.Epochs(self.lengths, self.counts, names, layout, seed, shuffle, folder)
        self.per_epoch = self._epochs.per_epoch

    def _usable(self, entry: Entry, lengths: Lengths) -> int:
        """How many examples fit an empty group; the others are counted in `left_out`."""
        layout = self.layout
        found = epochs.fits(lengths, layout)
        counts = np.bincount(found, minlength=4).tolist()
        self.left_out[entry.name] = left_out = LeftOut(*counts[1:])
        if sum(left_out):
            logger.warning(
                "source %s: of %d examples %d are longer than a row of %d tokens, %d have more pictures than "
                "a group has slots, %d are unreadable%s; they are left out",
                *(entry.name, len(found), left_out.too_long, layout.length, left_out.too_many_pictures),
                *(left_out.unreadable, _listed(lengths.reasons)),
            )
        if entry.weight > 0 and not counts[0]:
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
            found_first = f" ({lengths.messages[0]})" if lengths.messages else ""
            raise UserError(
                f"source {entry.name} has no readable example{found_first}: mend it or remove it from the mixture"
            )
        return counts[0]

    def locate(self, i: int) -> tuple[int, int]:
        """The epoch of group `i` and its number in that epoch."""
        return divmod(i, self.per_epoch)

    def members(self, i: int) -> epochs.Members:
        """The examples of group `i`."""
        return self._epochs.members(*self.locate(i))

    def fill(self) -> Fill:
        """Shares of the tokens and picture slots of an epoch that are in use, broken examples included."""
        layout = self.layout
        sizes = layout.rows * layout.length, layout.read_slots, layout.draw_slots
        used = zip(self._epochs.used, sizes, strict=True)
        return Fill(*(n / (self.per_epoch * size) if size else 1.0 for n, size in used))

    def __getitem__(self, i: int) -> Group:
        return self.make(i).item

    def make(self, i: int) -> Made:
        """Group `i`."""
        epoch, _ = self.locate(i)
        members = self.members(i)
        group, broken = self.empty(), []
        taken, used = {"read": 0, "draw": 0}, [0] * self.layout.rows
        for s, index, row, start, length in zip(*(values.tolist() for values in members), strict=True):
            used[row] += 1
            span = slice(start, start + length)
            key = f"{self.entries[s].name}[{index}]"
            try:
                example = self.entries[s].source[index]
                key = example.key
                laid_out = lay_out(example, self.tokenizer, self.layout)
                if len(laid_out.tokens) != length:
                    raise UserError(f"{key} has changed since its length was scanned")
                if example.drop:
                    laid_out = lay_out(example.of_epoch(self.seed, epoch), self.tokenizer, self.layout)
                    span = slice(start, start + len(laid_out.tokens))
                    if span.stop > start + length:
                        raise UserError(f"{key} is longer without its caption than with it")
                group["tokens"][row, span] = laid_out.tokens
                pictures = [self._picture(p, s, index) for p in laid_out.pictures]
            except UserError as error:
                broken.append(Broken(key, reason_of(error), str(error)))
                pictures = None
            group["segment_ids"][row, span] = used[row]
            group["positions"][row, span] = np.arange(span.stop - start)
            group["source"][row, span] = s
            if pictures is None:
                continue
            group["loss_mask"][row, span] = laid_out.loss_mask
            for placed, (kind, picture) in zip(laid_out.pictures, pictures, strict=True):
                slot = taken[placed.role]
                taken[placed.role] += 1
                for name, value in {
                    kind: picture,
                    "row": row,
                    "start": start + placed.start,
                    "valid": True,
                    "source": s,
                    "id": identity(self.seed, epoch, key, placed.ordinal),
                }.items():
                    group[f"{placed.role}_{name}"][slot] = value
        return Made(group, len(members.example), broken)

    def _picture(self, placed: Placed, s: int, index: int) -> tuple[str, np.ndarray]:
        if placed.role == "draw" and self.features is not None:
            cache = self.features[s]
            assert cache is not None
            return "features", cache[index]
        size = self._size(placed.role)
        stretch = placed.role == "read" and self.layout.read_stretch
        return "images", placed.picture.square(size, stretch, self.scaled_jpeg)

    def empty(self) -> Group:
        """A group in which nothing lies."""
        layout = self.layout
        shape = layout.rows, layout.length
        group: dict[str, Any] = {
            "tokens": np.full(shape, self.tokenizer.pad, np.int32),
            "loss_mask": np.zeros(shape, bool),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "source": np.full(shape, -1, np.int32),
        }
        for role, slots in ("read", layout.read_slots), ("draw", layout.draw_slots):
            size = self._size(role)
            if role == "draw" and self.features is not None:
                of_one = next(cache.shape for cache in self.features if cache is not None)
                group["draw_features"] = np.zeros((slots, *of_one), np.float32)
            else:
                group[f"{role}_images"] = np.zeros((slots, size, size, 3), np.uint8)
            group[f"{role}_row"] = np.zeros(slots, np.int32)
            group[f"{role}_start"] = np.zeros(slots, np.int32)
            group[f"{role}_valid"] = np.zeros(slots, bool)
            group[f"{role}_source"] = np.full(slots, -1, np.int32)
            group[f"{role}_id"] = np.zeros((slots, 2), np.uint32)
        return group

    def _size(self, role: str) -> int:
        return self.layout.read_size if role == "read" else self.layout.draw_size


def check_readable(name: str, lengths: Lengths, max_broken: float) -> None:
    """
    Raises:
        UserError: more of a source is broken than may be.
    """
    broken, n = sum(lengths.reasons.values()), len(lengths.tokens)
    if broken > max_broken * max(n, LEAST_SEEN):
        raise UserError(
            f"source {name}: {broken} of {n} examples are broken{_listed(lengths.reasons)}, more than "
            f"{max_broken:.2%}, the first: {lengths.messages[0]}; mend them or raise data.max_broken"
        )


def _listed(reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))
    return f" ({listed})" if listed else ""
