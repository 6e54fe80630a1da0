"""The packing of every epoch at once: places for classes of examples, and who takes which place.

A *class* is the examples of one source with the same numbers of tokens, of pictures to read and of pictures to draw.
Every epoch takes the same number of examples of each class, so one packing serves all epochs: it packs places for
classes, and an epoch only decides which example of a class takes which place, and in which order the groups come. Both
are permutations that are computed where they are needed (`mixture.permuted`), so any group of any epoch is found
without the others, and every epoch has the same number of groups.

Large epochs repeat a *template* of about a million places. If an epoch is not a whole number of passes over a source,
the number of examples of a class differs by one between epochs, and in some epochs its last place stays empty. To keep
such places few, rare lengths are then joined into one class, whose places are as long as its longest example.
"""

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, Shaped

from pisces_jax.data.arrays import read_arrays, write_arrays
from pisces_jax.data.packing.binning import pack
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.packing.lengths import Lengths
from pisces_jax.data.packing.mixture import secret, shuffled, stream

TEMPLATE = 2**20  # places
_CHUNK = 2**22


class Members(NamedTuple):
    """The examples of one group by row and offset: source, index in the source, place, and length in tokens."""

    source: Int32[np.ndarray, "E"]
    example: Int64[np.ndarray, "E"]
    row: Int32[np.ndarray, "E"]
    offset: Int64[np.ndarray, "E"]
    length: Int64[np.ndarray, "E"]


@dataclasses.dataclass
class _Classes:
    """The classes of one source; `order` has the indices of its usable examples, class by class."""

    tokens: Int64[np.ndarray, "C"]
    reads: Int64[np.ndarray, "C"]
    draws: Int64[np.ndarray, "C"]
    count: Int64[np.ndarray, "C"]
    order: Shaped[np.ndarray, "U"]


class Epochs:
    """Groups of examples by number; `per_epoch` of them are an epoch.

    An epoch takes `counts[s]` examples of source s on average; in a single epoch, each class may have one more or less.
    `used` has the tokens, pictures to read and pictures to draw of an epoch, on average. If `folder` is given, each
    source's order of examples is kept there, in a file that processes share.
    """

    def __init__(
        self,
        lengths: Sequence[Lengths],
        counts: Sequence[int],
        names: Sequence[str],
        layout: Layout,
        seed: int,
        shuffle: bool = True,
        folder: str | os.PathLike | None = None,
    ):
        self._tokens = [each.tokens for each in lengths]
        self._seed, self._shuffle = seed, shuffle
        total = sum(counts)
        self._repeats = repeats = -(-total // TEMPLATE)
        classes = []
        for name, each, count in zip(names, lengths, counts, strict=True):
            n = int((fits(each, layout) == FITS).sum())
            exact = n > 0 and count % n == 0 and repeats == 1
            least = 0 if exact or not count else max(np.sqrt(count) / 2, 16 * repeats) * n / count
            classes.append(_classes(each, layout, least, name, folder))
        # A table of the classes of all sources.
        self._source = np.repeat(np.arange(len(classes), dtype=np.int32), [len(c.count) for c in classes])
        self._count = np.concatenate([c.count for c in classes])
        self._start = np.concatenate([np.cumsum(c.count) - c.count for c in classes])
        self._orders = [c.order for c in classes]
        per_class = np.concatenate([np.arange(len(c.count)) for c in classes])
        owners = [names[s] for s in self._source.tolist()]
        self._secrets = np.array(
            [secret("class", seed, owner, c) for owner, c in zip(owners, per_class.tolist(), strict=True)], np.uint64
        )
        # An epoch takes the share count_s / n_s of every class: `whole` examples and the part `part / n` of one more.
        usable = np.array([int(c.count.sum()) for c in classes])[self._source]
        self._usable = usable
        taken = np.array(counts, np.int64)[self._source]
        passes, rest = np.divmod(taken, usable)
        more, self._part = np.divmod(rest * self._count, usable)
        self._whole = passes * self._count + more
        phase = (self._secrets >> np.uint64(11)) / 2**53
        self._phase = np.where(self._part > 0, (phase * usable).astype(np.int64), 0)
        due = self._whole + (self._part > 0)
        self._pack(classes, -(-due // repeats), layout)
        means = [
            [float(array[order].mean()) if len(order) else 0.0 for array in each[:3]]
            for each, order in zip(lengths, self._orders, strict=True)
        ]
        self.used = tuple(float(np.dot(counts, of_sources)) for of_sources in zip(*means, strict=True))

    def _pack(self, classes: Sequence[_Classes], places: Int64[np.ndarray, "C"], layout: Layout) -> None:
        """Packs the template; its places are sorted by group, row and offset."""
        of = np.repeat(np.arange(len(places), dtype=np.int32), places)
        number = np.arange(len(of)) - np.repeat(np.cumsum(places) - places, places)
        order = shuffled(np.arange(len(of)), len(of), "template", self._seed)
        of, number = of[order], number[order]
        tokens, reads, draws = (
            np.concatenate([getattr(c, name) for c in classes])[of] for name in ("tokens", "reads", "draws")
        )
        bins = pack(tokens, reads, draws, layout)
        order = np.lexsort((bins.offset, bins.row, bins.group))
        self._class, self._number, self._row = of[order], number[order], bins.row[order]
        self._first = np.searchsorted(bins.group[order], np.arange(bins.num_groups + 1))
        self._template_groups = bins.num_groups

    @property
    def per_epoch(self) -> int:
        return self._template_groups * self._repeats

    def members(self, epoch: int, g: int) -> Members:
        """The examples in group `g` of an epoch."""
        if self._shuffle:
            g = int(shuffled(np.array([g]), self.per_epoch, "groups", self._seed, epoch)[0])
        repeat, template = divmod(g, self._template_groups)
        span = slice(self._first[template], self._first[template + 1])
        of, row = self._class[span], self._row[span]
        place = self._number[span].astype(np.int64) * self._repeats + repeat
        before, after = self._taken(of, epoch), self._taken(of, epoch + 1)
        here = place < after - before
        of, row, position = of[here], row[here], (before + place)[here]
        element = self._start[of] + stream(position, self._count[of], self._secrets[of], self._shuffle)
        source = self._source[of]
        index, length = np.empty(len(of), np.int64), np.empty(len(of), np.int64)
        for s in np.unique(source):
            mine = source == s
            index[mine] = self._orders[s][element[mine]]
            length[mine] = self._tokens[s][index[mine]]
        ends = np.cumsum(length)
        starts = ends - length
        # The first of each row starts at 0; an example shorter than its place moves the next ones up.
        first = np.searchsorted(row, row)
        return Members(source, index, row, starts - starts[first], length)

    def _taken(self, of: Int32[np.ndarray, "E"], epoch: int) -> Int64[np.ndarray, "E"]:
        """How many examples of these classes all epochs before `epoch` took together."""
        return epoch * self._whole[of] + (epoch * self._part[of] + self._phase[of]) // self._usable[of]


FITS, TOO_LONG, TOO_MANY_PICTURES, UNREADABLE = range(4)


def fits(lengths: Lengths, layout: Layout) -> Shaped[np.ndarray, "N"]:
    """Whether each example fits into an empty group (`FITS`), or why it does not; uint8."""
    found = np.zeros(len(lengths.tokens), np.uint8)
    found[(lengths.reads > layout.read_slots) | (lengths.draws > layout.draw_slots)] = TOO_MANY_PICTURES
    found[lengths.tokens > layout.length] = TOO_LONG
    found[lengths.tokens < 0] = UNREADABLE
    return found


def _classes(lengths: Lengths, layout: Layout, least: float, name: str, folder: str | os.PathLike | None) -> _Classes:
    """Classes of at least `least` examples each: neighbours in length are joined. The last one may have fewer."""
    digest = hashlib.blake2b(digest_size=8)
    for array in (lengths.tokens, lengths.reads, lengths.draws):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(f"{layout.length} {layout.read_slots} {layout.draw_slots} {least:.6f}".encode())
    path = None if folder is None else Path(folder) / f"{name}-{digest.hexdigest()}.order"
    if path is not None and (found := read_arrays(path)) is not None:
        return _Classes(**found[1])
    n = len(lengths.tokens)
    spans = [slice(start, start + _CHUNK) for start in range(0, n, _CHUNK)]
    # Codes of examples with the same numbers of pictures are neighbours, sorted by tokens.
    scale = np.array([(layout.draw_slots + 1) * (layout.length + 1), layout.length + 1, 1], np.int64)

    def code(span: slice) -> Int64[np.ndarray, "K"]:
        part = Lengths(lengths.tokens[span], lengths.reads[span], lengths.draws[span], {}, ())
        codes = part.reads * scale[0] + part.draws * scale[1] + part.tokens * scale[2]
        return np.where(fits(part, layout) == FITS, codes, -1)

    found_codes = [np.unique(code(span), return_counts=True) for span in spans]
    codes = np.unique(np.concatenate([c for c, _ in found_codes] or [np.zeros(0, np.int64)]))
    count = np.zeros(len(codes), np.int64)
    for some, many in found_codes:
        count[np.searchsorted(codes, some)] += many
    unusable = int(count[codes == -1].sum())
    codes, count = codes[codes >= 0], count[codes >= 0]
    joined = _join(count, least)
    classes = int(joined[-1]) + 1 if len(joined) else 0
    wide = np.uint16 if classes < 2**16 - 1 else np.uint32  # NumPy's radix sort is for 16 bits
    of = np.empty(n, wide)
    for span in spans:
        each = code(span)
        known = joined[np.searchsorted(codes, np.maximum(each, codes[0]))] if classes else np.zeros(len(each), int)
        of[span] = np.where(each >= 0, known, np.iinfo(wide).max)
    order = np.argsort(of, kind="stable")[: n - unusable].astype(np.uint32 if n < 2**32 else np.int64)
    del of
    largest = [np.zeros(classes, np.int64) for _ in range(3)]
    for array, values in zip(largest, np.unravel_index(codes, _shape(layout)), strict=True):
        np.maximum.at(array, joined, values)
    reads, draws, tokens = largest
    made = _Classes(tokens, reads, draws, np.bincount(joined, count, classes).astype(np.int64), order)
    if path is None:
        return made
    write_arrays(path, {}, vars(made))
    stored = read_arrays(path)
    return _Classes(**stored[1]) if stored else made


def _shape(layout: Layout) -> tuple[int, int, int]:
    return layout.read_slots + 1, layout.draw_slots + 1, layout.length + 1


def _join(count: Int64[np.ndarray, "K"], least: float) -> Int64[np.ndarray, "K"]:
    """The class of each code. A class is closed when it has `least` examples; a last one with fewer joins another."""
    classes, held, current = np.zeros(len(count), np.int64), 0, 0
    for i, many in enumerate(count.tolist()):
        classes[i] = current
        held += many
        if held >= least:
            current, held = current + 1, 0
    if held and current:
        classes[classes == current] = current - 1
    return classes
