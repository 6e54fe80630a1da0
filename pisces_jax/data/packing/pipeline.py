"""From packed rows or pairs to batches on this host, through Grain; the state of an iterator is one number.

Grain (0.2) imports JAX for its tree functions, where JAX is installed; nothing here or in Grain's reading
asks JAX for a device, so worker processes take no accelerator. Workers are spawned, never forked.
"""

import collections
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from pisces_jax.data.packing import lengths
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.packing.rows import LEAST_SEEN, MAX_BROKEN, Broken, PackedGroups
from pisces_jax.utils.errors import UserError

logger = logging.getLogger(__name__)


Batch = dict[str, np.ndarray]


class _Batches:
    """Batch number b of one host, by random access: what Grain reads. It is pickled to worker processes."""

    def __init__(
        self,
        items: PackedGroups | Pairs,
        batch_size: int,
        process_index: int,
        process_count: int,
        end: int | None,
    ):
        if batch_size % process_count:
            raise UserError(f"batch size {batch_size} is not a multiple of {process_count} processes: change it")
        self.items, self.batch_size, self.end = items, batch_size, end
        share = batch_size // process_count
        self.mine = range(process_index * share, (process_index + 1) * share)

    def __len__(self) -> int:
        return 2**60 if self.end is None else math.ceil(self.end / self.batch_size)

    def __getitem__(self, b: int) -> tuple[Batch, int, list[Broken]]:
        numbers = [b * self.batch_size + offset for offset in self.mine]
        made = [self.items.make(i) for i in numbers if self.end is None or i < self.end]
        items = [one.item for one in made] + [self.items.empty()] * (len(numbers) - len(made))
        batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
        return batch, sum(one.examples for one in made), [broken for one in made for broken in one.broken]


class BatchIterator(Iterator[Batch]):
    """Batches in order; the state is the number of the next one, good for any threads, workers and hosts, and a digest
    of the lengths, by which a state of other data is refused.

    `broken` counts, by (key, reason), examples of this host's batches so far that are masked. As soon as they are
    more than `max_broken` of the `seen` examples (of a thousand at least), the next batch is a `UserError` that holds
    the counts.
    """

    def __init__(
        self,
        batches: _Batches,
        threads: int,
        workers: int,
        prefetch: int,
        num_batches: int | None,
        max_broken: float = MAX_BROKEN,
    ):
        self._batches, self._threads, self._workers, self._prefetch = batches, threads, workers, prefetch
        self._end = len(batches) if num_batches is None else min(num_batches, len(batches))
        self._next = 0
        self._max_broken = max_broken
        self.digest = lengths.digest(batches.items.lengths)
        self._reader: Any = None
        self.seen = 0
        self.broken: collections.Counter[tuple[str, str]] = collections.Counter()

    def __len__(self) -> int:
        """Batches in all (2^60 where they have no end)."""
        return self._end

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = self._open()
        batch, examples, broken = next(self._reader)
        self._next += 1
        self.seen += examples
        for one in broken:
            if not self.broken[one.key, one.reason]:
                logger.warning("%s: it is masked", one.message)
            self.broken[one.key, one.reason] += 1
        if broken and self.broken.total() > self._max_broken * max(self.seen, LEAST_SEEN):
            self.close()
            raise UserError(f"{self.report()}: mend them or raise data.max_broken (now {self._max_broken:g})")
        return batch

    def report(self) -> str:
        """How many examples were masked, by reason, with the first keys of each."""
        reasons: dict[str, list[str]] = {}
        for key, reason in self.broken:
            reasons.setdefault(reason, []).append(key)
        counted = [
            f"{sum(self.broken[key, reason] for key in keys)} {reason} ({', '.join(keys[:3])}"
            f"{', ...' if len(keys) > 3 else ''})"
            for reason, keys in reasons.items()
        ]
        return f"{self.broken.total()} of {self.seen} examples are broken: {'; '.join(counted)}"

    def _open(self) -> Iterator[tuple[Batch, int, list[Broken]]]:
        # Grain's own states differ with the number of workers: a reader always starts anew, at a slice.
        dataset = grain.MapDataset.source(self._batches).slice(slice(self._next, self._end))
        # Worker processes each read with one thread; the buffer is per process.
        threads = 1 if self._workers else self._threads
        buffer = max(threads, self._prefetch) if threads else 0
        reader = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain asks absl for flags of its own, also where nobody uses absl
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._prefetch)
            reader = reader.mp_prefetch(options)
        return iter(reader)

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._next, "lengths": self.digest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with batch `state["next_batch"]`.

        Raises:
            UserError: the state is of other data. One without a digest, as checkpoints of before have it, is believed.
        """
        if state.get("lengths", self.digest) != self.digest:
            raise UserError(
                "the examples of data.train, or their lengths, are not those of the checkpoint, so its place in them "
                "means nothing: put the data back as they were, or start anew in another --workdir"
            )
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Ends threads and worker processes; the iterator can still be used and opens them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def packed_iterator(
    groups: PackedGroups,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    one_pass: bool = False,
    num_batches: int | None = None,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
    max_broken: float = MAX_BROKEN,
) -> BatchIterator:
    """Batches of `batch_size` groups over all processes, with the keys of `PackedGroups` and a leading axis.

    This process gets its contiguous share of every batch. With `one_pass` the iterator ends with the first
    epoch (the last batch is filled up with empty groups), as evaluation wants it; else epochs follow on.
    `num_batches` is an upper limit. Batches are made ahead (`prefetch` of them) by `threads`, or by `workers`
    processes where Python's threads are too slow; with neither, when asked for.
    """
    end = groups.per_epoch if one_pass else None
    batches = _Batches(groups, batch_size, process_index, process_count, end)
    return BatchIterator(batches, threads, workers, prefetch, num_batches, max_broken)


def pairs_iterator(
    pairs: Pairs,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    one_pass: bool = False,
    num_batches: int | None = None,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 4,
    max_broken: float = MAX_BROKEN,
) -> BatchIterator:
    """`batch_size` pairs over all processes, with the keys of `Pairs`; see `packed_iterator`."""
    batches = _Batches(pairs, batch_size, process_index, process_count, pairs.per_epoch if one_pass else None)
    return BatchIterator(batches, threads, workers, prefetch, num_batches, max_broken)
