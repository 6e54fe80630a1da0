"""Which examples an epoch takes from a mixture of sources, in which order: a function of seed and epoch."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, UInt64

from pisces_jax.data.example import identity
from pisces_jax.errors import UserError


def shuffled(positions: Int64[np.ndarray, "P"], n: int, *key: object) -> Int64[np.ndarray, "P"]:
    """Where a permutation of `range(n)`, chosen by `key`, takes `positions`.

    It does not depend on NumPy's generators, whose streams may change, and for a large `n` any part of it
    costs no more than its own size: a Feistel network over a power of four, walked until it lands below `n`.
    """
    words = identity(*key).astype(np.uint64)
    secret = words[0] << np.uint64(32) | words[1]
    if n <= 2**16:  # small networks know few permutations
        return np.argsort(_mixed(np.arange(n, dtype=np.uint64) + secret), kind="stable")[positions]
    half = np.uint64((int(n - 1).bit_length() + 1) // 2)  # n <= 4^half < 4 n, so that walks are short
    result = np.asarray(positions, np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        result[walking] = _feistel(result[walking], half, secret)
        walking = walking[result[walking] >= n]
    return result.astype(np.int64)


def _feistel(values: UInt64[np.ndarray, "P"], half: np.uint64, secret: np.uint64) -> UInt64[np.ndarray, "P"]:
    """Six rounds over `2 * half` bits: a bijection whatever the round function is."""
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for number in range(6):
        left, right = right, left ^ (_mixed((right << np.uint64(3) | np.uint64(number)) + secret) & mask)
    return left << half | right


def _mixed(values: UInt64[np.ndarray, "P"]) -> UInt64[np.ndarray, "P"]:
    """splitmix64: numbers in a row become random numbers, all different."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources by name and weight; `usable[s]` are the indices of the examples that source s may give.

    An epoch takes `round(share * examples_per_epoch)` examples of each source from that source's endless
    stream (one permutation a pass), going on where the epoch before stopped, and shuffles them together.
    Without `shuffle`, sources are read in order and interleaved evenly.
    """

    names: Sequence[str]
    weights: Sequence[float]
    usable: Sequence[Int64[np.ndarray, "N"]]
    seed: int
    examples_per_epoch: int | None = None  # None: as many as there are usable examples
    shuffle: bool = True

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            raise UserError(
                f"two sources of the mixture have the same name ({', '.join(self.names)}): rename one"
            )
        if min(self.weights) < 0 or sum(self.weights) <= 0:
            raise UserError(
                f"mixture weights {list(self.weights)} must not be negative, nor all zero: change them"
            )
        for name, weight, usable in zip(self.names, self.weights, self.usable, strict=True):
            if weight > 0 and len(usable) == 0:
                raise UserError(
                    f"no example of source {name} can be used: remove it from the mixture or mend it"
                )
        if sum(self.counts) == 0:
            raise UserError("an epoch of this mixture has no example: set a greater examples_per_epoch")

    @property
    def counts(self) -> list[int]:
        """Examples of each source in every epoch."""
        total = self.examples_per_epoch or sum(len(usable) for usable in self.usable)
        return [round(weight / sum(self.weights) * total) for weight in self.weights]

    def epoch(self, epoch: int) -> tuple[Int32[np.ndarray, "E"], Int64[np.ndarray, "E"]]:
        """For every example of the epoch, in order, its source's number and its index in that source."""
        sources, indices, places = [], [], []
        for s, count in enumerate(self.counts):
            sources.append(np.full(count, s, np.int32))
            indices.append(self._stream(s, epoch * count, (epoch + 1) * count))
            places.append((np.arange(count) + 0.5) / max(count, 1))
        source, index = np.concatenate(sources), np.concatenate(indices)
        if self.shuffle:
            order = shuffled(np.arange(len(source)), len(source), "epoch", self.seed, epoch)
        else:
            order = np.argsort(np.concatenate(places), kind="stable")
        return source[order], index[order]

    def _stream(self, s: int, start: int, stop: int) -> Int64[np.ndarray, "stop-start"]:
        """Elements `start` to `stop` of source s's endless stream, as indices into that source."""
        n = len(self.usable[s])
        taken = [np.zeros(0, np.int64)]
        while start < stop:
            pass_number, first = divmod(start, n)
            last = min(n, first + stop - start)
            positions = np.arange(first, last)
            if self.shuffle:
                positions = shuffled(positions, n, "pass", self.seed, self.names[s], pass_number)
            taken.append(np.asarray(self.usable[s], np.int64)[positions])
            start += last - first
        return np.concatenate(taken)
