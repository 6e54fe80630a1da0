"""How a published tensor lies in ours: one pattern, read in both directions.

    "(N H) D -> D N H"      left: the published axes; right: ours. Groups are one axis, row-major.
    "1 N D -> N D"          an axis of one element is dropped, or put back.

Sizes follow from the shapes of both sides. The published tensor's first axis may hold several of ours side by side
(fused query, key and value): `part=(i, n)` is the i-th of n.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Axes = tuple[tuple[str, ...], ...]


@functools.cache
def _parse(pattern: str) -> tuple[Axes, Axes]:
    def side(text: str) -> Axes:
        return tuple(tuple(group.strip("()").split()) for group in re.findall(r"\([^)]*\)|\S+", text))

    left, right = pattern.split("->")
    return side(left), side(right)


def _flat(axes: Axes) -> list[str]:
    return [name for group in axes for name in group if name != "1"]


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a family's table.

    Attributes:
        ours: our name, e.g. `layers/mlp/up/kernel`; below `layers/` ours has a leading axis over the layers.
        theirs: the published name; `{i}` is the layer.
        pattern: see above; of one layer.
        part: the i-th of n tensors in one.
        vocabulary: the first axis is the vocabulary's, which may grow.
    """

    ours: str
    theirs: str
    pattern: str
    part: tuple[int, int] = (0, 1)
    vocabulary: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs

    def _sizes(self, theirs: Sequence[int] | None, ours: Sequence[int]) -> dict[str, int]:
        left, right = _parse(self.pattern)
        sizes = {group[0]: n for group, n in zip(right, ours, strict=True) if len(group) == 1}
        if theirs is not None:
            sizes |= {group[0]: n for group, n in zip(left, theirs, strict=True) if len(group) == 1 and group[0] != "1"}
        return sizes

    def published_shape(self, ours: Sequence[int], hints: Mapping[str, int]) -> tuple[int, ...]:
        """The shape that a published tensor has for ours; `hints` sizes the axes that ours holds in groups."""
        left, _ = _parse(self.pattern)
        sizes = {**hints, **self._sizes(None, ours), "1": 1}
        shape = [math.prod(sizes[name] for name in group) for group in left]
        return (shape[0] * self.part[1], *shape[1:])

    def to_ours(self, array: np.ndarray, ours: Sequence[int], hints: Mapping[str, int]) -> np.ndarray:
        """The published array in our layout: a view wherever it can be one."""
        left, right = _parse(self.pattern)
        i, n = self.part
        if n > 1:
            rows = array.shape[0] // n
            array = array[i * rows : (i + 1) * rows]
        sizes = {**hints, **self._sizes(array.shape, ours)}
        names = _flat(left)
        array = array.reshape([sizes[name] for name in names])
        return array.transpose([names.index(name) for name in _flat(right)]).reshape(ours)

    def to_theirs(self, array: np.ndarray, hints: Mapping[str, int]) -> np.ndarray:
        """Our array (one layer) in the published layout, its part alone."""
        left, right = _parse(self.pattern)
        sizes = {**hints, **self._sizes(None, array.shape), "1": 1}
        names = _flat(right)
        out = array.reshape([sizes[name] for name in names])
        out = out.transpose([names.index(name) for name in _flat(left)])
        return out.reshape([math.prod(sizes[name] for name in group) for group in left])
