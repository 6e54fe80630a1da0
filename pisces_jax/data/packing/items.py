"""What batches are stacked from: numbered items made of a mixture's examples, epoch after epoch."""

import abc
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from jaxtyping import UInt8

from pisces_jax.data.example import reason_of
from pisces_jax.data.packing.layout import Entry, Layout
from pisces_jax.data.packing.lengths import Lengths, digest, scan_lengths
from pisces_jax.data.packing.mixture import mixture_counts
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

Item = dict[str, np.ndarray]
MAX_BROKEN = 0.01  # share of broken examples above which a run stops
LEAST_SEEN = 1000  # the share is of at least this many examples


class Broken(NamedTuple):
    """An example that could not be used when it was read."""

    key: str
    reason: str
    message: str

    @classmethod
    def of(cls, key: str, error: UserError) -> "Broken":
        return cls(key, reason_of(error), str(error))


class Made(NamedTuple):
    """An item, the number of examples that it was made of, and those of them that are masked."""

    item: Item
    examples: int
    broken: list[Broken]


class Items(abc.ABC):
    """Items by number; epochs of `per_epoch` items follow each other without end.

    An item is a dict of arrays, whose shapes and dtypes are the same for all items. It is a pure function of its
    number, the seed and the examples' lengths, so any worker on any host can make any item at any time.

    Attributes:
        lengths: the lengths of each source's examples.
        counts: how many examples of each source an epoch takes.
        left_out: for each source, how many of its examples cannot be used, by reason.

    Args:
        examples_per_epoch: by default as many as can be used.
        folder: where lengths are kept (`scan_lengths`).
        scaled_jpeg: decode JPEGs no larger than needed (`images.open_image`).
        max_broken: the share of a source's examples that may be unreadable.

    Raises:
        UserError: the mixture is not valid (`mixture_counts`), a source has no example that can be used, or more than
            `max_broken` of its examples are unreadable.
    """

    reasons: ClassVar[tuple[str, ...]]  # why an example may be left out, beside "unreadable"
    per_epoch: int

    def __init__(
        self,
        entries: Sequence[Entry],
        tokenizer: Tokenizer,
        layout: Layout,
        seed: int,
        examples_per_epoch: int | None = None,
        folder: str | Path | None = None,
        scaled_jpeg: bool = False,
        max_broken: float = MAX_BROKEN,
    ):
        self.entries = [Entry(*entry) for entry in entries]
        self.tokenizer, self.layout, self.seed, self.scaled_jpeg = tokenizer, layout, seed, scaled_jpeg
        self.names = [entry.name for entry in self.entries]
        self.lengths = [scan_lengths(e.source, tokenizer, layout, e.name, folder) for e in self.entries]
        self.left_out: dict[str, dict[str, int]] = {}
        usable = []
        for entry, lengths in zip(self.entries, self.lengths, strict=True):
            usable.append(self._usable(entry, lengths))
            check_readable(entry.name, lengths, max_broken)
        weights = [entry.weight for entry in self.entries]
        self.counts = mixture_counts(self.names, weights, usable, examples_per_epoch)

    @abc.abstractmethod
    def verdicts(self, lengths: Lengths) -> UInt8[np.ndarray, "N"]:
        """For each example 0 if it can be used, r if `reasons[r - 1]` applies, and one more if it is unreadable."""

    def explain(self, reason: str, lengths: Lengths) -> tuple[str, str]:
        """What is wrong with the examples that are left out for this reason, and what to change."""
        first = f" ({lengths.messages[0]})" if lengths.messages else ""
        return f"unreadable{_listed(lengths.reasons)}", f"fix it{first} or remove it from the mixture"

    @abc.abstractmethod
    def make(self, i: int) -> Made:
        """Item `i`. An example that turns out to be broken is masked."""

    @abc.abstractmethod
    def places(self, i: int) -> list[tuple[int, int]]:
        """The examples of item `i`: the number of the source, and the example's number there."""

    def describe(self, i: int) -> list[str]:
        """The examples of item `i` as a user finds them: the source's name and number, and the example's key."""
        named = []
        for s, index in self.places(i):
            try:
                key = self.entries[s].source[index].key
            except UserError as error:
                key = reason_of(error)
            named.append(f"{self.entries[s].name}[{index}] {key}")
        return named

    @abc.abstractmethod
    def empty(self) -> Item:
        """An item without examples."""

    def __getitem__(self, i: int) -> Item:
        return self.make(i).item

    def locate(self, i: int) -> tuple[int, int]:
        """The epoch of item `i` and its number in that epoch."""
        return divmod(i, self.per_epoch)

    def summary(self) -> dict[str, Any]:
        """Further numbers of an epoch, for `python -m pisces_jax.data stats`."""
        return {}

    @property
    def digest(self) -> str:
        """A hash of all lengths: where it differs, the same number means another item."""
        return digest(self.lengths)

    def _usable(self, entry: Entry, lengths: Lengths) -> int:
        """The number of a source's examples that can be used; the others are counted in `left_out`."""
        names = (*self.reasons, "unreadable")
        usable, *others = np.bincount(self.verdicts(lengths), minlength=len(names) + 1).tolist()
        self.left_out[entry.name] = left_out = dict(zip(names, others, strict=True))
        explained = {reason: self.explain(reason, lengths) for reason, n in left_out.items() if n}
        listed = ", ".join(f"{left_out[reason]} {what}" for reason, (what, _) in explained.items())
        if explained and entry.weight > 0 and not usable:
            _, change = next(iter(explained.values()))
            raise UserError(f"no example of source {entry.name} can be used ({listed}): {change}")
        if explained:
            logger.warning("source %s: left out of %d examples: %s", entry.name, sum(others) + usable, listed)
        return usable


def check_readable(name: str, lengths: Lengths, max_broken: float) -> None:
    """
    Raises:
        UserError: more than `max_broken` of a source's examples are broken.
    """
    broken, n = sum(lengths.reasons.values()), len(lengths.tokens)
    if broken > max_broken * max(n, LEAST_SEEN):
        raise UserError(
            f"source {name}: {broken} of {n} examples are broken{_listed(lengths.reasons)}, more than "
            f"{max_broken:.2%}, the first: {lengths.messages[0]}; fix them or raise data.max_broken"
        )


def _listed(reasons: dict[str, int]) -> str:
    listed = ", ".join(f"{reason}: {n}" for reason, n in sorted(reasons.items(), key=lambda item: -item[1]))
    return f" ({listed})" if listed else ""
