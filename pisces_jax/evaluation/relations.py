"""GenEval's rule for where one box lies relative to another."""

import math

Box = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels; y points down."""

RELATIONS = ("left of", "right of", "above", "below")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

SLACK = 0.1  # part of the boxes' sizes that a centre may be off before it counts


def relations(box: Box, target: Box) -> tuple[str, ...]:
    """The relations in which `box` stands to `target`: none, one, or two (say left of and above).

    With offset o between the centres and sizes d, per axis: `r = sign(o) max(|o| - 0.1 (d + d_target), 0)`,
    and a relation holds where `r / ||o||` passes 0.5 (Ghosh et al. 2023, GenEval, `relative_position`).
    """
    offset_x = (box[0] + box[2] - target[0] - target[2]) / 2
    offset_y = (box[1] + box[3] - target[1] - target[3]) / 2
    x = max(abs(offset_x) - SLACK * (abs(box[2] - box[0]) + abs(target[2] - target[0])), 0.0)
    y = max(abs(offset_y) - SLACK * (abs(box[3] - box[1]) + abs(target[3] - target[1])), 0.0)
    if x < 1e-3 and y < 1e-3:
        return ()
    half = 0.5 * math.hypot(offset_x, offset_y)
    found = []
    if x > half:
        found.append("left of" if offset_x < 0 else "right of")
    if y > half:
        found.append("above" if offset_y < 0 else "below")
    return tuple(found)
