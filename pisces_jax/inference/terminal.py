"""Pictures inside a terminal, by the protocols of kitty, iTerm2 and DEC's sixel."""

import base64
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pisces_jax.data.images import png

KINDS = ("kitty", "iterm", "sixel")
_SHOWN = 256  # pixels of the shorter side, at least
_CHUNK = 4096  # characters of one message to kitty


def kind_of(environment: Mapping[str, str]) -> str:
    """The protocol that the terminal takes, as far as its environment variables tell; "" if none is known."""
    terminal, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if "kitty" in terminal or "KITTY_WINDOW_ID" in environment or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "sixel" if terminal.split("-")[0] in ("foot", "mlterm", "contour") or "sixel" in terminal else ""


def inline(image: UInt8[np.ndarray, "H W 3"], kind: str) -> str:
    """The characters that show a picture where the cursor is; small ones are enlarged."""
    times = max(1, -(-_SHOWN // min(image.shape[:2])))
    image = image.repeat(times, axis=0).repeat(times, axis=1)
    if kind == "sixel":
        return _sixel(image)
    file = png(image)
    data = base64.b64encode(file).decode()
    if kind == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(file)};preserveAspectRatio=1:{data}\a"
    chunks = [data[i : i + _CHUNK] for i in range(0, len(data), _CHUNK)]
    heads = ["a=T,f=100,"] + [""] * (len(chunks) - 1)
    more = [1] * (len(chunks) - 1) + [0]
    return "".join(f"\x1b_G{head}m={m};{chunk}\x1b\\" for head, m, chunk in zip(heads, more, chunks, strict=True))


def _sixel(image: UInt8[np.ndarray, "H W 3"]) -> str:
    """Bands of six rows; in each band one line of characters per colour, of which there are at most 256."""
    height, width = image.shape[:2]
    reduced = Image.fromarray(image).quantize(256, dither=Image.Dither.NONE)
    palette = np.asarray(reduced.getpalette("RGB")).reshape(-1, 3)
    colours = np.asarray(reduced)
    used = np.unique(colours)
    out = ["\x1bPq", f'"1;1;{width};{height}']
    out += [f"#{i};2;" + ";".join(str(round(100 * int(part) / 255)) for part in palette[i]) for i in used]
    for top in range(0, height, 6):
        band = colours[top : top + 6]
        weights = 1 << np.arange(len(band))
        lines = [f"#{i}" + "".join(_runs(weights @ (band == i))) for i in np.unique(band)]
        out.append("$".join(lines) + "-")
    return "".join(out) + "\x1b\\"


def _runs(bits: Iterable[int]) -> Iterator[str]:
    """One character per column, 63 + its bits; from four on equal ones are counted."""
    row = np.asarray(bits)
    starts = np.flatnonzero(np.diff(row, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
        character, n = chr(63 + int(row[start])), int(end - start)
        yield f"!{n}{character}" if n > 3 else character * n
