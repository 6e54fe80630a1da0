"""Packing examples of known lengths into groups of rows: best fit over a bounded number of open groups."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Int32

from pisces_jax.data.layout import Layout


class Bins(NamedTuple):
    """Where each example goes: its group, its row in the group, its first position in the row."""

    group: Int32[np.ndarray, "E"]
    row: Int32[np.ndarray, "E"]
    offset: Int32[np.ndarray, "E"]
    num_groups: int


def pack(
    tokens: Int[np.ndarray, "E"],
    reads: Int[np.ndarray, "E"],
    draws: Int[np.ndarray, "E"],
    layout: Layout,
    open_groups: int = 16,
) -> Bins:
    """Puts every example where it leaves the least room, within the token and both picture budgets.

    Every example must fit into an empty group. Where none of the open groups has room, the one nearest to full
    is closed and a new one is opened, so time and memory do not depend on how many groups there are.
    """
    group, row, offset = (np.empty(len(tokens), np.int32) for _ in range(3))
    # One entry for each open group: its number, free tokens of its rows, free slots to read and to draw.
    opened: list[tuple[int, list[int], list[int]]] = []
    num_groups = 0
    for i, (t, r, d) in enumerate(zip(tokens.tolist(), reads.tolist(), draws.tolist(), strict=True)):
        best = layout.length + 1
        for number, rows, slots in opened:
            if slots[0] < r or slots[1] < d:
                continue
            for place, free in enumerate(rows):
                if t <= free < best:
                    best, found = free, (number, place, rows, slots)
            if best == t:
                break
        if best > layout.length:
            if len(opened) == open_groups:
                opened.remove(min(opened, key=lambda entry: _room(entry[1], entry[2], layout)))
            rows, slots = [layout.length] * layout.rows, [layout.read_slots, layout.draw_slots]
            opened.append((num_groups, rows, slots))
            found = (num_groups, 0, rows, slots)
            num_groups += 1
        number, place, rows, slots = found
        group[i], row[i], offset[i] = number, place, layout.length - rows[place]
        rows[place] -= t
        slots[0] -= r
        slots[1] -= d
    return Bins(group, row, offset, num_groups)


def _room(rows: list[int], slots: list[int], layout: Layout) -> float:
    """What limits a group: its share of free tokens, or of free picture slots."""
    tokens = sum(rows) / (layout.length * layout.rows)
    return min(tokens, sum(slots) / max(layout.read_slots + layout.draw_slots, 1)) if any(slots) else 0.0
