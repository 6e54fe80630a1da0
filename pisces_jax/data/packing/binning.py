"""Packs examples of known lengths into groups of rows: best fit over a bounded number of open groups."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from pisces_jax.data.packing.layout import Layout


class Bins(NamedTuple):
    """Where each example goes: its group, its row in the group, its first position in the row."""

    group: Int32[np.ndarray, "E"]
    row: Int32[np.ndarray, "E"]
    offset: Int32[np.ndarray, "E"]
    num_groups: int


class _Group:
    """An open group: free tokens of each row, free slots of each pool."""

    __slots__ = ("number", "free", "reads", "draws")

    def __init__(self, number: int, layout: Layout):
        self.number = number
        self.free = [layout.length] * layout.rows
        self.reads, self.draws = layout.read_slots, layout.draw_slots

    def room(self, layout: Layout) -> float:
        """The free share of what runs out first: the tokens, or the slots of both pools together."""
        slots = layout.read_slots + layout.draw_slots
        return min(
            sum(self.free) / (layout.length * layout.rows),
            (self.reads + self.draws) / slots if slots else 1.0,
        )


def pack(
    tokens: Int[np.ndarray, "E"],
    reads: Int[np.ndarray, "E"],
    draws: Int[np.ndarray, "E"],
    layout: Layout,
    open_rows: int = 64,
) -> Bins:
    """Puts every example into the row that it fills best and whose group has enough free picture slots.

    Every example must fit into an empty group. If no open group has room, the fullest one is closed and a new one is
    opened, so the time is linear in the number of examples. At least `open_rows` rows and 16 groups stay open; more of
    them pack slightly better, and more slowly.
    """
    open_groups = max(16, open_rows // layout.rows)
    group, row, offset = (np.empty(len(tokens), np.int32) for _ in range(3))
    opened: list[_Group] = []
    # `by_free` has the open rows by their free tokens, and `lengths` a bit for every number of free tokens that some
    # row has: the lowest bit at or above an example's length is its best fit.
    by_free: list[list[tuple[_Group, int]]] = [[] for _ in range(layout.length + 1)]
    lengths = num_groups = 0
    for i, (t, r, d) in enumerate(zip(tokens.tolist(), reads.tolist(), draws.tolist(), strict=True)):
        place = None
        longer = lengths >> t
        while longer and place is None:
            lowest = longer & -longer
            longer ^= lowest
            for candidate in by_free[t + lowest.bit_length() - 1]:
                if candidate[0].reads >= r and candidate[0].draws >= d:
                    place = candidate
                    break
        if place is None:
            if len(opened) == open_groups:
                closed = min(opened, key=lambda one: one.room(layout))
                opened.remove(closed)
                for number, free in enumerate(closed.free):
                    by_free[free].remove((closed, number))
                    if not by_free[free]:
                        lengths &= ~(1 << free)
            new = _Group(num_groups, layout)
            num_groups += 1
            opened.append(new)
            by_free[layout.length] += [(new, number) for number in range(layout.rows)]
            lengths |= 1 << layout.length
            place = new, 0
        found, number = place
        free = found.free[number]
        group[i], row[i], offset[i] = found.number, number, layout.length - free
        found.free[number] = free - t
        found.reads -= r
        found.draws -= d
        by_free[free].remove(place)
        if not by_free[free]:
            lengths &= ~(1 << free)
        by_free[free - t].append(place)
        lengths |= 1 << (free - t)
    return Bins(group, row, offset, num_groups)
