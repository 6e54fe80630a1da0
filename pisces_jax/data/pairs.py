"""Single pictures with their texts, for encoder pretraining and decoder training: no packing."""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pisces_jax.data.example import Example, Picture, identity
from pisces_jax.data.images import fit
from pisces_jax.data.layout import Layout, lay_out, scan_lengths
from pisces_jax.data.mixture import Mixture
from pisces_jax.data.packing import Entry, logger
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.errors import UserError

Pair = dict[str, np.ndarray]


class Pairs:
    """An example's first picture with all its texts, by position in the endless sequence of epochs.

    `pairs[i]` is a dict of arrays:

        image      uint8 [S,S,3]
        tokens     int32 [L]   bos, the texts, eos; then the pad id
        text_mask  bool  [L]   not padding
        id         uint32 [2]  `identity(seed, epoch, example.key, 0)`
        valid      bool  []    False where the picture cannot be read (the rest is then empty)

    Examples longer than `length` tokens, or without a picture, are left out and counted in `left_out`.
    Raises `UserError` when a source has no example that can be used.
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
        lengths_dir: str | Path | None = None,
    ):
        self.entries = [Entry(*entry) for entry in entries]
        self.tokenizer, self.length, self.size, self.seed = tokenizer, length, size, seed
        # Pictures take no place here; a drawn one still leaves its two marks, which are removed.
        self._layout = Layout(
            0, 0, length, rows=1, read_slots=1, draw_slots=1, read_size=size, draw_size=size
        )
        self.left_out: dict[str, int] = {}
        usable = []
        for entry in self.entries:
            cache = None if lengths_dir is None else Path(lengths_dir) / f"{entry.name}-pairs.npz"
            tokens, reads, draws = scan_lengths(entry.source, tokenizer, self._layout, cache)
            fits = (tokens >= 0) & (tokens - 2 * draws <= length) & (reads + draws > 0)
            usable.append(np.flatnonzero(fits))
            self.left_out[entry.name] = left_out = int((~fits).sum())
            if entry.weight > 0 and left_out == len(fits):
                raise UserError(
                    f"no example of source {entry.name} has a picture and a text of at most {length} tokens: "
                    "set a greater length or another recipe"
                )
            if left_out:
                logger.warning(
                    "source %s: %d of %d examples are left out: above %d tokens, unreadable or no picture",
                    *(entry.name, left_out, len(fits), length),
                )
        names, weights = [entry.name for entry in self.entries], [entry.weight for entry in self.entries]
        self.mixture = Mixture(names, weights, usable, seed, examples_per_epoch, shuffle)
        self.per_epoch = sum(self.mixture.counts)
        self._epochs: collections.OrderedDict[int, tuple[np.ndarray, np.ndarray]] = collections.OrderedDict()

    def __getitem__(self, i: int) -> Pair:
        return self.make(i)[0]

    def make(self, i: int) -> tuple[Pair, list[str]]:
        """Pair `i`, and the key of its example if that could not be read."""
        epoch, place = divmod(i, self.per_epoch)
        source, index = self._epoch(epoch)
        entry = self.entries[source[place]]
        pair, key = self.empty(), f"{entry.name}[{index[place]}]"
        try:
            example = entry.source[int(index[place])]
            key = example.key
            ids = self._ids(example)
            if len(ids) > self.length:
                raise UserError(f"{key} has changed since its length was scanned")
            picture = next(part for part in example.parts if isinstance(part, Picture))
            pair["image"] = fit(picture.array(), self.size)
        except UserError:
            return pair, [key]
        pair["tokens"][: len(ids)] = ids
        pair["text_mask"][: len(ids)] = True
        pair["id"] = identity(self.seed, epoch, key, 0)
        pair["valid"] = np.asarray(True)
        return pair, []

    def _ids(self, example: Example) -> np.ndarray:
        tokens = lay_out(example, self.tokenizer, self._layout).tokens
        return tokens[(tokens != self.tokenizer.begin_image) & (tokens != self.tokenizer.end_image)]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        # Threads may compute the same epoch twice, with the same result: no lock is needed.
        found = self._epochs.get(epoch)
        if found is None:
            found = self._epochs[epoch] = self.mixture.epoch(epoch)
            for old in list(self._epochs)[:-2]:
                self._epochs.pop(old, None)
        return found

    def empty(self) -> Pair:
        """A pair that is not valid."""
        return {
            "image": np.zeros((self.size, self.size, 3), np.uint8),
            "tokens": np.full(self.length, self.tokenizer.pad, np.int32),
            "text_mask": np.zeros(self.length, bool),
            "id": np.zeros(2, np.uint32),
            "valid": np.asarray(False),
        }
