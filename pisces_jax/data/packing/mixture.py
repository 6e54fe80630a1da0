"""Orders as functions of a position: permutations, endless streams, and mixtures of sources by weight.

Nothing here has a state: the element at any position of any epoch is computed from the seed, in constant time and
memory. (Grain's `shuffle` and `mix` do the same; theirs would give other orders than the runs that exist.)
"""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int32, Int64, Shaped, UInt64

from pisces_jax.data.example import identity
from pisces_jax.utils.errors import UserError


def secret(*words: object) -> np.uint64:
    """A 64-bit key of a permutation, hashed from `words`."""
    low, high = identity(*words).tolist()
    return np.uint64(low << 32 | high)


def shuffled(positions: Int64[np.ndarray, "P"], n: int, *key: object) -> Int64[np.ndarray, "P"]:
    """`positions` through a permutation of `range(n)` that `key` chooses."""
    positions = np.asarray(positions, np.int64)
    return permuted(positions, np.full(positions.shape, n), np.full(positions.shape, secret(*key)))


def permuted(
    positions: Int64[np.ndarray, "P"], n: Int64[np.ndarray, "P"], secrets: UInt64[np.ndarray, "P"]
) -> Int64[np.ndarray, "P"]:
    """Each position (below its n) through a permutation of `range(n)` of its own, which its secret chooses.

    A Feistel network over the least power of two that is not below n, repeated until the result is below n (cycle
    walking), on average twice at most. It does not use NumPy's generators, whose streams may change.
    """
    bits = np.frexp(np.asarray(n - 1, np.float64))[1].astype(np.uint64)  # n <= 2^bits < 2 n for n above 1
    result = np.asarray(positions).astype(np.uint64)
    limit = np.asarray(n).astype(np.uint64)
    walking = np.arange(len(result))
    while len(walking):
        walked = _feistel(result[walking], bits, secrets)
        result[walking] = walked
        still = walked >= limit
        walking, bits, secrets, limit = walking[still], bits[still], secrets[still], limit[still]
    return result.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, "P"], bits: UInt64[np.ndarray, "P"], secrets: UInt64[np.ndarray, "P"]
) -> UInt64[np.ndarray, "P"]:
    """Eight rounds over `bits` bits in two halves: a bijection for any round function."""
    low = bits >> np.uint64(1)
    low_mask = (np.uint64(1) << low) - np.uint64(1)
    high_mask = (np.uint64(1) << (bits - low)) - np.uint64(1)
    left, right = values >> low, values & low_mask
    for number in range(0, 8, 2):
        left = left ^ (mixed((right << np.uint64(3) | np.uint64(number)) + secrets) & high_mask)
        right = right ^ (mixed((left << np.uint64(3) | np.uint64(number + 1)) + secrets) & low_mask)
    return left << low | right


def mixed(values: UInt64[np.ndarray, "P"]) -> UInt64[np.ndarray, "P"]:
    """splitmix64: maps consecutive numbers to random ones, all different."""
    values = values * np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


def stream(
    positions: Int64[np.ndarray, "P"], n: Int64[np.ndarray, "P"], secrets: UInt64[np.ndarray, "P"], shuffle: bool = True
) -> Int64[np.ndarray, "P"]:
    """Elements of endless streams over `range(n)`, with a new permutation in every pass."""
    passes, places = np.divmod(positions, n)
    if not shuffle:
        return places
    return permuted(places, n, mixed(secrets + passes.astype(np.uint64)))


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Sources by name; an epoch takes `counts[s]` examples of source s, out of those whose indices `usable[s]` holds.

    They come from the source's endless stream, which goes on where the epoch before stopped, and are shuffled
    together. Without `shuffle`, sources are read in order and interleaved evenly.
    """

    names: Sequence[str]
    counts: Sequence[int]
    usable: Sequence[Shaped[np.ndarray, "N"]]
    seed: int
    shuffle: bool = True

    def at(self, epoch: int, places: Int64[np.ndarray, "P"]) -> tuple[Int32[np.ndarray, "P"], Int64[np.ndarray, "P"]]:
        """The examples at these places of an epoch: each source's number and the index in that source."""
        ends = np.cumsum(self.counts)
        if self.shuffle:
            order = shuffled(places, int(ends[-1]), "epoch", self.seed, epoch)
        else:
            order = self._interleaved[places]
        source = np.searchsorted(ends, order, side="right").astype(np.int32)
        counts = np.array(self.counts)[source]
        positions = epoch * counts + order - (ends[source] - counts)
        n = np.array([len(usable) for usable in self.usable])[source]
        secrets = np.array([secret("stream", self.seed, name) for name in self.names])[source]
        element = stream(positions, n, secrets, self.shuffle)
        index = np.empty(len(element), np.int64)
        for s, usable in enumerate(self.usable):
            mine = source == s
            index[mine] = usable[element[mine]]
        return source, index

    @functools.cached_property
    def _interleaved(self) -> Int64[np.ndarray, "E"]:
        return np.argsort(np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in self.counts]), kind="stable")


def mixture_counts(
    names: Sequence[str], weights: Sequence[float], usable: Sequence[int], examples_per_epoch: int | None = None
) -> list[int]:
    """How many examples of each source an epoch takes: its share of `examples_per_epoch`, rounded.

    `usable` has the number of examples that each source can give. An epoch has by default as many as all together.

    Raises:
        UserError: two names are the same, weights are negative or all zero, a source has nothing to give, or an epoch
            would be empty.
    """
    if len(set(names)) != len(names):
        raise UserError(f"two sources of the mixture have the same name ({', '.join(names)}): rename one")
    if min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"mixture weights {list(weights)} must not be negative, nor all zero: change them")
    for name, weight, n in zip(names, weights, usable, strict=True):
        if weight > 0 and n == 0:
            raise UserError(f"no example of source {name} can be used: fix it or remove it from the mixture")
    total = examples_per_epoch or sum(usable)
    counts = [round(weight / sum(weights) * total) for weight in weights]
    if not sum(counts):
        raise UserError("an epoch of this mixture has no example: set a greater data.examples_per_epoch")
    return counts
