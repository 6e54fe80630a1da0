"""From items (groups of packed rows, or pairs) to this host's batches, through Grain; the state is one number.

Grain (0.2) imports JAX for its tree functions where JAX is installed. Nothing here or in Grain's reading asks JAX for
a device, so worker processes take no accelerator. Workers are spawned, never forked.
"""

import collections
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from pisces_jax.data.packing.items import LEAST_SEEN, MAX_BROKEN, Broken, Items
from pisces_jax.utils.errors import UserError

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]


def batches(
    items: Items,
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
) -> "BatchIterator":
    """This process's contiguous share of batches of `batch_size` items over all processes, stacked along a new axis.

    Epochs follow each other without end. With `one_pass` the iterator ends with the first epoch, as evaluation needs
    it, and empty items fill up the last batch. `num_batches` is an upper limit. `prefetch` batches are made ahead by
    `threads`, or by `workers` processes where Python's threads are too slow; with neither, batches are made when they
    are asked for.

    Raises:
        UserError: `process_count` does not divide `batch_size`.
    """
    if batch_size % process_count:
        raise UserError(f"batch size {batch_size} is not a multiple of {process_count} processes: change it")
    share = batch_size // process_count
    mine = range(process_index * share, (process_index + 1) * share)
    source = _Batches(items, batch_size, mine, items.per_epoch if one_pass else None)
    return BatchIterator(source, threads, workers, prefetch, num_batches, max_broken)


class _Batches:
    """One host's batches by number: what Grain reads. It is pickled to worker processes."""

    def __init__(self, items: Items, batch_size: int, mine: range, end: int | None):
        self.items, self.batch_size, self.mine, self.end = items, batch_size, mine, end

    def __len__(self) -> int:
        return 2**60 if self.end is None else math.ceil(self.end / self.batch_size)

    def __getitem__(self, b: int) -> tuple[Batch, int, list[Broken]]:
        numbers = [b * self.batch_size + offset for offset in self.mine]
        made = [self.items.make(i) for i in numbers if self.end is None or i < self.end]
        items = [one.item for one in made] + [self.items.empty()] * (len(numbers) - len(made))
        batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
        return batch, sum(one.examples for one in made), [broken for one in made for broken in one.broken]


class BatchIterator(Iterator[Batch]):
    """Batches in order (see `batches`).

    The state is the number of the next batch, good for any number of threads, workers and hosts, and a digest of the
    lengths, by which a state of other data is refused.

    `seen` counts the examples of this host's batches so far, and `broken` those that are masked, by (key, reason). As
    soon as the share of broken examples (of at least `LEAST_SEEN`) exceeds `max_broken`, `next` raises a `UserError`
    that holds the counts.
    """

    def __init__(
        self, source: _Batches, threads: int, workers: int, prefetch: int, num_batches: int | None, max_broken: float
    ):
        self._source, self._threads, self._workers, self._prefetch = source, threads, workers, prefetch
        self._end = len(source) if num_batches is None else min(num_batches, len(source))
        self._next = 0
        self._max_broken = max_broken
        self._reader: Any = None
        self.digest = source.items.digest
        self.seen = 0
        self.broken: collections.Counter[tuple[str, str]] = collections.Counter()

    def __len__(self) -> int:
        """The number of batches (2^60 if there is no end)."""
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
            raise UserError(f"{self.report()}: fix them or raise data.max_broken (now {self._max_broken:g})")
        return batch

    def describe(self, b: int) -> list[str]:
        """The examples of batch `b`, of all processes, as `Items.describe` gives them."""
        source = self._source
        numbers = range(b * source.batch_size, (b + 1) * source.batch_size)
        return [one for i in numbers if source.end is None or i < source.end for one in source.items.describe(i)]

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
        # Grain's own states differ with the number of workers, so a reader always starts anew, at a slice.
        dataset = grain.MapDataset.source(self._source).slice(slice(self._next, self._end))
        # Worker processes read with one thread each; the buffer is per process.
        threads = 1 if self._workers else self._threads
        buffer = max(threads, self._prefetch) if threads else 0
        reader = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
        if self._workers:
            if not flags.FLAGS.is_parsed():  # Grain reads absl flags of its own, also where nobody uses absl
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=self._prefetch)
            reader = reader.mp_prefetch(options)
        return iter(reader)

    def get_state(self) -> dict[str, Any]:
        return {"next_batch": self._next, "lengths": self.digest}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Continues with batch `state["next_batch"]`.

        Raises:
            UserError: the state is of other data. A state without a digest, as in early checkpoints, is accepted.
        """
        if state.get("lengths", self.digest) != self.digest:
            raise UserError(
                "the examples of data.train, or their lengths, are not those of the checkpoint, so its position in "
                "them means nothing: restore the data, or start anew in another --workdir"
            )
        self.close()
        self._next = int(state["next_batch"])

    def close(self) -> None:
        """Ends threads and worker processes. The iterator can still be used; it starts them again."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None
