"""Single pictures with their texts, for encoder pretraining and decoder training: no packing."""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pisces_jax.data.example import Example, Picture, identity, reason_of
from pisces_jax.data.feature_cache import FeatureCache
from pisces_jax.data.packing.layout import Entry, Layout, lay_out
from pisces_jax.data.packing.lengths import scan_lengths
from pisces_jax.data.packing.mixture import Mixture
from pisces_jax.data.packing.rows import MAX_BROKEN, Broken, Made, check_readable
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

Pair = dict[str, np.ndarray]


class Pairs:
    """An example's first picture with all its texts, by position in the endless sequence of epochs.

    `pairs[i]` is a dict of arrays:

        image      uint8 [S,S,3]
        tokens     int32 [L]   bos, the texts, eos; then the pad id
        text_mask  bool  [L]   not padding
        id         uint32 [2]  `identity(seed, epoch, example.key, 0)`
        valid      bool  []    False where the picture cannot be read (the rest is then empty)
        features   float32 [m,C]    with `features` (one cache an entry)
        latents    float32 [Z,Z,c]  with `latents` (one cache an entry), and then there is no `image`

    Examples longer than `length` tokens, or without a picture, are left out and counted in `left_out`. `folder`,
    `scaled_jpeg` and `max_broken` are as for `PackedGroups`.

    Raises:
        UserError: a source has no example that can be used, or more than `max_broken` of them are unreadable.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        length: int,
        size: int,
        seed: int,
        examples_per_epoch: int | None = None,
        shuffle: bool = True,
        folder: str | Path | None = None,
        scaled_jpeg: bool = False,
        max_broken: float = MAX_BROKEN,
        features: Sequence[FeatureCache] | None = None,
        latents: Sequence[FeatureCache] | None = None,
    ):
        given = {"features": features, "latents": latents}
        self._cached = {name: caches for name, caches in given.items() if caches is not None}
        self.entries = [Entry(*entry) for entry in entries]
        self.tokenizer, self.length, self.size, self.seed = tokenizer, length, size, seed
        self.scaled_jpeg = scaled_jpeg
        # Pictures take no place here; a drawn one still leaves its two marks, which are removed.
        self._layout = Layout(0, 0, length, rows=1, read_slots=1, draw_slots=1, read_size=size, draw_size=size)
        self.left_out: dict[str, int] = {}
        self.lengths = []
        usable = []
        for entry in self.entries:
            lengths = scan_lengths(entry.source, tokenizer, self._layout, f"{entry.name}-pairs", folder)
            self.lengths.append(lengths)
            fits = (lengths.tokens >= 0) & (lengths.reads + lengths.draws > 0)
            fits &= lengths.tokens - 2 * lengths.draws.astype(np.int32) <= length
            usable.append(np.flatnonzero(fits).astype(np.uint32 if len(fits) < 2**32 else np.int64))
            self.left_out[entry.name] = left_out = int((~fits).sum())
            if entry.weight > 0 and left_out == len(fits):
                found = f" ({lengths.messages[0]})" if lengths.messages else ""
                raise UserError(
                    f"no example of source {entry.name} has a picture and a text of at most {length} tokens{found}: "
                    "set a greater length or another recipe"
                )
            check_readable(entry.name, lengths, max_broken)
            if left_out:
                logger.warning(
                    "source %s: %d of %d examples are left out: above %d tokens, unreadable or no picture",
                    *(entry.name, left_out, len(fits), length),
                )
        names, weights = [entry.name for entry in self.entries], [entry.weight for entry in self.entries]
        self.mixture = Mixture(names, weights, usable, seed, examples_per_epoch, shuffle)
        self.per_epoch = sum(self.mixture.counts)

    def __getitem__(self, i: int) -> Pair:
        return self.make(i).item

    def make(self, i: int) -> Made:
        """Pair `i`."""
        epoch, place = divmod(i, self.per_epoch)
        (source,), (index,) = self.mixture.at(epoch, np.array([place]))
        entry = self.entries[source]
        pair, key = self.empty(), f"{entry.name}[{index}]"
        try:
            example = entry.source[int(index)]
            key = example.key
            ids = self._ids(example)
            if len(ids) > self.length:
                raise UserError(f"{key} has changed since its length was scanned")
            for name, caches in self._cached.items():
                pair[name] = caches[source][int(index)]
            if "image" in pair:
                picture = next(part for part in example.parts if isinstance(part, Picture))
                pair["image"] = picture.square(self.size, scaled=self.scaled_jpeg)
        except UserError as error:
            return Made(pair, 1, [Broken(key, reason_of(error), str(error))])
        pair["tokens"][: len(ids)] = ids
        pair["text_mask"][: len(ids)] = True
        pair["id"] = identity(self.seed, epoch, key, 0)
        pair["valid"] = np.asarray(True)
        return Made(pair, 1, [])

    def _ids(self, example: Example) -> np.ndarray:
        tokens = lay_out(example, self.tokenizer, self._layout).tokens
        return tokens[(tokens != self.tokenizer.begin_image) & (tokens != self.tokenizer.end_image)]

    def empty(self) -> Pair:
        """A pair that is not valid."""
        image = {} if "latents" in self._cached else {"image": np.zeros((self.size, self.size, 3), np.uint8)}
        return {
            **image,
            **{name: np.zeros(caches[0].shape, np.float32) for name, caches in self._cached.items()},
            "tokens": np.full(self.length, self.tokenizer.pad, np.int32),
            "text_mask": np.zeros(self.length, bool),
            "id": np.zeros(2, np.uint32),
            "valid": np.asarray(False),
        }
