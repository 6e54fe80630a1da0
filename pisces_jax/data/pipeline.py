"""From a config's sources to batches on this host, through Grain; the state of an iterator is one number.

Grain (0.2) imports JAX for its tree functions, where JAX is installed; nothing here or in Grain's reading
asks JAX for a device, so worker processes take no accelerator. Workers are spawned, never forked.
"""

import collections
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import grain
import numpy as np
from absl import flags

from pisces_jax.data.layout import Source
from pisces_jax.data.packing import Entry, PackedGroups, logger
from pisces_jax.data.pairs import Pairs
from pisces_jax.data.shapes import ShapesSource
from pisces_jax.data.sources import ImageFolder, TfdsPictures
from pisces_jax.errors import UserError

KINDS: dict[str, Callable[..., Source]] = {
    "shapes": ShapesSource,
    "tfds": lambda dataset, **rest: TfdsPictures(dataset, **rest),
    "image_folder": ImageFolder,
}
Batch = dict[str, np.ndarray]


def make_source(spec: Mapping[str, Any]) -> Entry:
    """A mixture's entry from a config's: `kind`, `name`, `weight` (1) and the arguments of the source.

    Kinds: "shapes" (`ShapesSource`), "image_folder" (`ImageFolder`), "tfds" (`TfdsPictures`, the dataset's
    name as `dataset`). `name` is what reports call it, by default its kind. Raises `UserError` for an unknown
    kind or argument, or as the source itself does.
    """
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"no kind of source {kind!r}: choose one of {', '.join(KINDS)}")
    name, weight = arguments.pop("name", kind), arguments.pop("weight", 1.0)
    parameters = inspect.signature(TfdsPictures if kind == "tfds" else KINDS[kind]).parameters
    known = [("dataset" if kind == "tfds" and key == "name" else key) for key in parameters]
    required = [
        key for key, p in zip(known, parameters.values(), strict=True) if p.default is inspect.Parameter.empty
    ]
    for key in arguments:
        if key not in known:
            raise UserError(f"source {name}: {kind} takes no {key!r}: choose among {', '.join(known)}")
    for key in required:
        if key not in arguments:
            raise UserError(f"source {name}: {kind} needs {key!r}: set it")
    return Entry(name, float(weight), KINDS[kind](**arguments))


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
            raise UserError(
                f"batch size {batch_size} is not a multiple of {process_count} processes: change it"
            )
        self.items, self.batch_size, self.end = items, batch_size, end
        share = batch_size // process_count
        self.mine = range(process_index * share, (process_index + 1) * share)

    def __len__(self) -> int:
        return 2**60 if self.end is None else math.ceil(self.end / self.batch_size)

    def __getitem__(self, b: int) -> tuple[Batch, list[str]]:
        made = []
        for offset in self.mine:
            i = b * self.batch_size + offset
            made.append(
                (self.items.empty(), []) if self.end is not None and i >= self.end else self.items.make(i)
            )
        batch = {name: np.stack([item[name] for item, _ in made]) for name in made[0][0]}
        return batch, [key for _, broken in made for key in broken]


class BatchIterator(Iterator[Batch]):
    """Batches in order; `get_state()` is `{"next_batch": n}`, good for any threads, workers and hosts.

    `broken` counts, by key, examples of this host's batches so far that could not be read and are masked.
    """

    def __init__(self, batches: _Batches, threads: int, workers: int, prefetch: int, num_batches: int | None):
        self._batches, self._threads, self._workers, self._prefetch = batches, threads, workers, prefetch
        self._end = len(batches) if num_batches is None else min(num_batches, len(batches))
        self._next = 0
        self._reader: Any = None
        self.broken: collections.Counter[str] = collections.Counter()

    def __len__(self) -> int:
        """Batches in all (2^60 where they have no end)."""
        return self._end

    def __next__(self) -> Batch:
        if self._reader is None:
            self._reader = self._open()
        batch, broken = next(self._reader)
        self._next += 1
        for key in broken:
            if not self.broken[key]:
                logger.warning("example %s cannot be read and is masked", key)
            self.broken[key] += 1
        return batch

    def _open(self) -> Iterator[tuple[Batch, list[str]]]:
        # Grain's own states differ with the number of workers: a reader always starts anew, at a slice.
        dataset = grain.MapDataset.source(self._batches).slice(slice(self._next, self._end))
        # Worker processes each read with one thread; the buffer is per process.
        threads = 1 if self._workers else self._threads
        buffer = max(threads, self._prefetch) if threads else 0
        reader = dataset.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffer))
        if self._workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # Grain asks absl for flags of its own, also where nobody uses absl
                flags.FLAGS.mark_as_parsed()
            options = grain.MultiprocessingOptions(
                num_workers=self._workers, per_worker_buffer_size=self._prefetch
            )
            reader = reader.mp_prefetch(options)
        return iter(reader)

    def get_state(self) -> dict[str, int]:
        return {"next_batch": self._next}

    def set_state(self, state: Mapping[str, int]) -> None:
        """Continues with batch `state["next_batch"]`."""
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
) -> BatchIterator:
    """Batches of `batch_size` groups over all processes, with the keys of `PackedGroups` and a leading axis.

    This process gets its contiguous share of every batch. With `one_pass` the iterator ends with the first
    epoch (the last batch is filled up with empty groups), as evaluation wants it; else epochs follow on.
    `num_batches` is an upper limit. Batches are made ahead (`prefetch` of them) by `threads`, or by `workers`
    processes where Python's threads are too slow; with neither, when asked for.
    """
    end = len(groups.epoch(0)) if one_pass else None
    batches = _Batches(groups, batch_size, process_index, process_count, end)
    return BatchIterator(batches, threads, workers, prefetch, num_batches)


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
) -> BatchIterator:
    """`batch_size` pairs over all processes, with the keys of `Pairs`; see `packed_iterator`."""
    batches = _Batches(pairs, batch_size, process_index, process_count, pairs.per_epoch if one_pass else None)
    return BatchIterator(batches, threads, workers, prefetch, num_batches)
