"""Pictures in labelled grids that a person can judge, as arrays and PNG files."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

GREEN, RED, GREY = (22, 140, 60), (205, 45, 45), (200, 200, 200)
_INK, _PAPER = (25, 25, 25), (255, 255, 255)
_GAP = 10
_FRAME = 3


@dataclasses.dataclass(frozen=True)
class Cell:
    """A picture, uint8 [H, W, 3], in a frame: green if right, red if wrong, grey if it is not judged."""

    image: np.ndarray
    correct: bool | None = None

    @property
    def frame(self) -> tuple[int, int, int]:
        return GREY if self.correct is None else GREEN if self.correct else RED


Row = tuple[str, Sequence[Cell]]
"""What was asked, and the pictures."""


def labelled_grid(
    rows: Sequence[Row],
    headings: Sequence[str],
    *,
    title: str = "",
    picture: int = 112,
    text: int = 210,
    blocks: int = 1,
) -> Image.Image:
    """Rows of pictures, each `picture` pixels wide, their texts at the left; long lists in `blocks` side by side."""
    title_font, font = ImageFont.load_default(20), ImageFont.load_default(15)
    per_block = -(-len(rows) // blocks)
    columns = max([len(headings), *(len(cells) for _, cells in rows)])
    cell = picture + 2 * _FRAME + _GAP
    width = text + columns * cell + 2 * _GAP
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    head_lines = [_wrap(measure, h, font, cell - 4) for h in headings]
    head = 20 * max([1, *(len(lines) for lines in head_lines)]) + 8 if any(headings) else 0
    title_lines = _wrap(measure, title, title_font, blocks * width - 2 * _GAP) if title else []
    top = 28 * len(title_lines) + _GAP
    sheet = Image.new("RGB", (blocks * width, top + head + per_block * cell + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, line in enumerate(title_lines):
        pen.text((_GAP, _GAP / 2 + 28 * i), line, _INK, title_font)
    for block in range(blocks):
        left = block * width + _GAP
        for c, lines in enumerate(head_lines):
            for i, line in enumerate(lines):
                pen.text((left + text + c * cell, top + 20 * i), line, _INK, font)
        for r, (label, cells) in enumerate(rows[block * per_block : (block + 1) * per_block]):
            y = top + head + r * cell
            lines = _wrap(measure, label, font, text - _GAP)[: max(picture // 19, 1)]
            for i, line in enumerate(lines):
                pen.text((left, y + (picture - 19 * len(lines)) // 2 + 19 * i), line, _INK, font)
            for c, one in enumerate(cells):
                x = left + text + c * cell
                pen.rectangle((x, y, x + picture + 2 * _FRAME - 1, y + picture + 2 * _FRAME - 1), one.frame)
                sheet.paste(enlarge(one.image, picture), (x + _FRAME, y + _FRAME))
    return sheet


def side_by_side(sheets: Sequence[Image.Image], title: str) -> Image.Image:
    """Sheets of `labelled_grid` without titles, one beside the other, under one title."""
    head = labelled_grid([], [], title=title, text=sum(sheet.width for sheet in sheets) - 2 * _GAP)
    out = Image.new("RGB", (head.width, head.height + max(sheet.height for sheet in sheets)), _PAPER)
    out.paste(head)
    left = 0
    for sheet in sheets:
        out.paste(sheet, (left, head.height))
        left += sheet.width
    return out


def enlarge(image: np.ndarray, size: int) -> Image.Image:
    """At `size` pixels a side; small pictures keep their pixels."""
    method = Image.Resampling.NEAREST if image.shape[0] <= size else Image.Resampling.LANCZOS
    return Image.fromarray(image).resize((size, size), method)


def _wrap(
    pen: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if pen.textlength(longer, font) <= width or not lines[-1]:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
