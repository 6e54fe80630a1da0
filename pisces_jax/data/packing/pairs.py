"""Single pictures with their texts, for encoder pretraining and decoder training: no packing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from pisces_jax.data.example import Example, Picture, identity
from pisces_jax.data.feature_cache import FeatureCache
from pisces_jax.data.packing.items import Broken, Item, Items, Made
from pisces_jax.data.packing.layout import Entry, Layout, lay_out
from pisces_jax.data.packing.lengths import Lengths
from pisces_jax.data.packing.mixture import Mixture
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.utils.errors import UserError


class Pairs(Items):
    """An example's first picture with all its texts. `pairs[i]` is a dict of arrays:

        image      uint8 [S,S,3]
        tokens     int32 [L]   bos, the texts, eos; then the pad id
        text_mask  bool  [L]   False on padding
        id         uint32 [2]  `identity(seed, epoch, example.key, 0)`
        valid      bool  []    False if the example is broken; then the rest is empty
        features   float32 [m,C]    with `features`, a cache for each entry
        latents    float32 [Z,Z,c]  with `latents`, a cache for each entry; then there is no `image`

    Examples without a picture or with more than `length` tokens are left out. `options` are those of `Items`.
    """

    reasons = ("too_long", "no_picture")

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        length: int,
        size: int,
        seed: int,
        *,
        shuffle: bool = True,
        features: Sequence[FeatureCache] | None = None,
        latents: Sequence[FeatureCache] | None = None,
        **options: Any,
    ):
        # Pictures take no tokens here. A drawn one still has its two marks, which `_ids` removes.
        layout = Layout(0, 0, length, rows=1, read_slots=1, draw_slots=1, read_size=size, draw_size=size)
        super().__init__(entries, tokenizer, layout, seed, **options)
        given = {"features": features, "latents": latents}
        self._cached = {name: caches for name, caches in given.items() if caches is not None}
        usable = []
        for lengths in self.lengths:
            index = np.uint32 if len(lengths.tokens) < 2**32 else np.int64
            usable.append(np.flatnonzero(self.verdicts(lengths) == 0).astype(index))
        self._mixture = Mixture(self.names, self.counts, usable, seed, shuffle)
        self.per_epoch = sum(self.counts)

    def verdicts(self, lengths: Lengths) -> UInt8[np.ndarray, "N"]:
        marks = 2 * lengths.draws.astype(np.int32)
        found = np.zeros(len(lengths.tokens), np.uint8)
        found[lengths.reads + lengths.draws == 0] = 2
        found[lengths.tokens - marks > self.layout.length] = 1
        found[lengths.tokens < 0] = 3
        return found

    def explain(self, reason: str, lengths: Lengths) -> tuple[str, str]:
        if reason == "too_long":
            shortest = lengths.tokens[self.verdicts(lengths) == 1].min()
            return f"longer than {self.layout.length} tokens", f"set data.text_length to at least {shortest}"
        if reason == "no_picture":
            return "without a picture", "choose another recipe"
        return super().explain(reason, lengths)

    def member(self, i: int) -> tuple[int, int]:
        """The source of pair `i` and its example there."""
        epoch, place = self.locate(i)
        (source,), (index,) = self._mixture.at(epoch, np.array([place]))
        return int(source), int(index)

    def places(self, i: int) -> list[tuple[int, int]]:
        return [self.member(i)]

    def make(self, i: int) -> Made:
        source, index = self.member(i)
        entry, pair = self.entries[source], self.empty()
        key = f"{entry.name}[{index}]"
        try:
            example = entry.source[index]
            key = example.key
            ids = self._ids(example)
            if len(ids) > self.layout.length:
                raise UserError(f"{key} has changed since its length was scanned")
            for name, caches in self._cached.items():
                pair[name] = caches[source][index]
            if "image" in pair:
                if not self._cached:  # features are of the pictures as they are
                    example = example.viewed(self.seed, self.locate(i)[0])
                picture = next(part for part in example.parts if isinstance(part, Picture))
                pair["image"] = picture.square(self.layout.read_size, scaled=self.scaled_jpeg)
        except UserError as error:
            return Made(pair, 1, [Broken.of(key, error)])
        pair["tokens"][: len(ids)] = ids
        pair["text_mask"][: len(ids)] = True
        pair["id"] = identity(self.seed, self.locate(i)[0], key, 0)
        pair["valid"] = np.asarray(True)
        return Made(pair, 1, [])

    def _ids(self, example: Example) -> Int32[np.ndarray, "L"]:
        tokens = lay_out(example, self.tokenizer, self.layout).tokens
        return tokens[(tokens != self.tokenizer.begin_image) & (tokens != self.tokenizer.end_image)]

    def empty(self) -> Item:
        length, size = self.layout.length, self.layout.read_size
        image = {} if "latents" in self._cached else {"image": np.zeros((size, size, 3), np.uint8)}
        return {
            **image,
            **{name: np.zeros(caches[0].shape, np.float32) for name, caches in self._cached.items()},
            "tokens": np.full(length, self.tokenizer.pad, np.int32),
            "text_mask": np.zeros(length, bool),
            "id": np.zeros(2, np.uint32),
            "valid": np.asarray(False),
        }
