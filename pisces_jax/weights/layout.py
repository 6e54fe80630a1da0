"""The layout of a published tensor in terms of ours: an einops pattern that is read in both directions.

    "(N H) D -> D N H"      left: the published axes; right: ours
    "1 T D -> T D"          an axis of size one is dropped, or added again

Where both sides have an axis of several letters, a group, `sizes` has those of the letters. A published tensor may hold
several of ours along its first axis (fused query, key and value): `part=(i, n)` is the i-th of n.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a family's table.

    Attributes:
        ours: our name, e.g. `layers/mlp/up/kernel`; parameters below `layers/` have a leading axis over the layers.
        theirs: the published name; `{i}` is the layer.
        pattern: the two layouts, of one layer.
        sizes: of the axes that our side holds in a group; where both sides have groups, of enough to tell the rest.
        part: the i-th of n tensors in one.
        vocabulary: the first axis is the vocabulary, which may grow.
    """

    ours: str
    theirs: str
    pattern: str
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    part: tuple[int, int] = (0, 1)
    vocabulary: bool = False

    @property
    def stacked(self) -> bool:
        return "{i}" in self.theirs

    def published_shape(self, ours: Sequence[int]) -> tuple[int, ...]:
        """The shape of the published tensor for the shape of ours (one layer)."""
        shape = self.to_theirs(np.broadcast_to(np.int8(0), ours)).shape  # strides of 0: takes no memory
        return (shape[0] * self.part[1], *shape[1:])

    def to_ours(self, array: np.ndarray, ours: Sequence[int]) -> np.ndarray:
        """The published array in our layout and shape: a view wherever that is possible."""
        left, right = self.pattern.split(" -> ")
        i, n = self.part
        if n > 1:
            rows = array.shape[0] // n
            array = array[i * rows : (i + 1) * rows]
        if "(" in left and "(" in right:
            return rearrange(array, self.pattern, **self.sizes)
        sizes = dict(zip(right.split(), ours, strict=True)) if "(" in left else {}
        return rearrange(array, self.pattern, **sizes)

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our array (one layer) in the published layout; of a fused tensor, this part alone."""
        left, right = self.pattern.split(" -> ")
        return rearrange(array, f"{right} -> {left}", **self.sizes)
