"""Packed rows. From (seed, epoch, lengths) the rows of an epoch follow, so any of them is made without the others.

A *group* is some rows that share a pool of pictures to read and a pool of pictures to draw (`Layout`). It is what
packing fills, what a worker makes, and what a batch is stacked from.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from pisces_jax.data.example import Example, identity
from pisces_jax.data.feature_cache import FeatureCache
from pisces_jax.data.packing.epochs import Epochs, Members, fits
from pisces_jax.data.packing.items import Broken, Item, Items, Made
from pisces_jax.data.packing.layout import Entry, LaidOut, Layout, Placed, lay_out
from pisces_jax.data.packing.lengths import Lengths
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.utils.errors import UserError


class Fill(NamedTuple):
    """Shares in use, from 0 to 1; a pool without slots counts as full."""

    tokens: float
    read_slots: float
    draw_slots: float


class PackedGroups(Items):
    """Groups of packed rows. `groups[i]` is a dict of arrays (G rows of T tokens, pools of Pr and Pd pictures):

        tokens        int32 [G,T]  the pad id on padding
        loss_mask     bool  [G,T]  the token is a target
        segment_ids   int32 [G,T]  1, 2, ... along each row; 0 on padding
        positions     int32 [G,T]  from 0 in each segment
        source        int32 [G,T]  the number of the mixture's entry; -1 on padding
        read_images   uint8 [Pr,S,S,3]
        read_row, read_start  int32 [Pr]  row and position of the picture's first vector
        read_valid    bool  [Pr]   the slot is in use; if not, the rest of it has no meaning
        read_source   int32 [Pr]   as `source`
        read_id       uint32 [Pr,2]  `identity(seed, epoch, example.key, ordinal of the part)`
        draw_...      the same for the pictures to draw

    With `features` (a cache for each entry, None for one that draws nothing) there are no `draw_images` but

        draw_features float32 [Pd,m,C]

    A broken example keeps its segment, without targets and valid slots. `options` are those of `Items`.
    """

    reasons = ("too_long", "too_many_pictures")

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        layout: Layout,
        seed: int,
        *,
        shuffle: bool = True,
        folder: str | Path | None = None,
        features: Sequence[FeatureCache | None] | None = None,
        **options: Any,
    ):
        super().__init__(entries, tokenizer, layout, seed, folder=folder, **options)
        self._features = features
        self._epochs = Epochs(self.lengths, self.counts, self.names, layout, seed, shuffle, folder)
        self.per_epoch = self._epochs.per_epoch

    def verdicts(self, lengths: Lengths) -> UInt8[np.ndarray, "N"]:
        return fits(lengths, self.layout)

    def explain(self, reason: str, lengths: Lengths) -> tuple[str, str]:
        if reason == "too_long":
            shortest = lengths.tokens[self.verdicts(lengths) == 1].min()
            return f"longer than {self.layout.length} tokens", f"set data.row_length to at least {shortest}"
        if reason == "too_many_pictures":
            return (
                "with more pictures than a group has slots",
                f"set data.read_slots to {lengths.reads.max()} and data.draw_slots to {lengths.draws.max()} or more",
            )
        return super().explain(reason, lengths)

    def members(self, i: int) -> Members:
        """The examples of group `i`."""
        return self._epochs.members(*self.locate(i))

    def places(self, i: int) -> list[tuple[int, int]]:
        members = self.members(i)
        return list(zip(members.source.tolist(), members.example.tolist(), strict=True))

    def fill(self) -> Fill:
        """Shares of an epoch's tokens and picture slots that are in use, broken examples included."""
        layout = self.layout
        sizes = layout.rows * layout.length, layout.read_slots, layout.draw_slots
        used = zip(self._epochs.used, sizes, strict=True)
        return Fill(*(n / (self.per_epoch * size) if size else 1.0 for n, size in used))

    def summary(self) -> dict[str, Any]:
        fill = {name: round(share, 4) for name, share in self.fill()._asdict().items()}
        return {"groups_per_epoch": self.per_epoch, "fill": fill}

    def make(self, i: int) -> Made:
        epoch, _ = self.locate(i)
        members = self.members(i)
        group, broken = self.empty(), []
        segments, slots = [0] * self.layout.rows, {"read": 0, "draw": 0}
        for s, index, row, start, length in zip(*(values.tolist() for values in members), strict=True):
            segments[row] += 1
            key, span = f"{self.entries[s].name}[{index}]", slice(start, start + length)
            laid_out = None
            try:
                example = self.entries[s].source[index]
                key = example.key
                laid_out = self._lay_out(example, epoch, length)
                span = slice(start, start + len(laid_out.tokens))
                group["tokens"][row, span] = laid_out.tokens
                pictures = [self._picture(placed, s, index) for placed in laid_out.pictures]
            except UserError as error:
                broken.append(Broken.of(key, error))
                laid_out = None
            group["segment_ids"][row, span] = segments[row]
            group["positions"][row, span] = np.arange(span.stop - start)
            group["source"][row, span] = s
            if laid_out is None:
                continue
            group["loss_mask"][row, span] = laid_out.loss_mask
            for placed, (kind, picture) in zip(laid_out.pictures, pictures, strict=True):
                slot = slots[placed.role]
                slots[placed.role] += 1
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

    def _lay_out(self, example: Example, epoch: int, length: int) -> LaidOut:
        """The example's tokens as they are in that epoch, in at most `length` places."""
        laid_out = lay_out(example, self.tokenizer, self.layout)
        if len(laid_out.tokens) != length:
            raise UserError(f"{example.key} has changed since its length was scanned")
        if example.varies:
            laid_out = lay_out(example.of_epoch(self.seed, epoch), self.tokenizer, self.layout)
            if len(laid_out.tokens) > length:
                raise UserError(f"{example.key} is longer without its caption than with it")
        return laid_out

    def _picture(self, placed: Placed, s: int, index: int) -> tuple[str, np.ndarray]:
        if placed.role == "draw" and self._features is not None:
            cache = self._features[s]
            assert cache is not None
            return "features", cache[index]
        stretch = placed.role == "read" and self.layout.read_stretch
        return "images", placed.picture.square(self.layout.size(placed.role), stretch, self.scaled_jpeg)

    def empty(self) -> Item:
        layout = self.layout
        shape = layout.rows, layout.length
        group: Item = {
            "tokens": np.full(shape, self.tokenizer.pad, np.int32),
            "loss_mask": np.zeros(shape, bool),
            "segment_ids": np.zeros(shape, np.int32),
            "positions": np.zeros(shape, np.int32),
            "source": np.full(shape, -1, np.int32),
        }
        for role, slots in ("read", layout.read_slots), ("draw", layout.draw_slots):
            if role == "draw" and self._features is not None:
                of_one = next(cache.shape for cache in self._features if cache is not None)
                group["draw_features"] = np.zeros((slots, *of_one), np.float32)
            else:
                size = layout.size(role)
                group[f"{role}_images"] = np.zeros((slots, size, size, 3), np.uint8)
            group[f"{role}_row"] = np.zeros(slots, np.int32)
            group[f"{role}_start"] = np.zeros(slots, np.int32)
            group[f"{role}_valid"] = np.zeros(slots, bool)
            group[f"{role}_source"] = np.full(slots, -1, np.int32)
            group[f"{role}_id"] = np.zeros((slots, 2), np.uint32)
        return group
