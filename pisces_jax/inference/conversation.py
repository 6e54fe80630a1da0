"""Conversations of a person and the model, with pictures on both sides, as the parts of a prompt."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from pisces_jax.data.example import Part, Picture, Text
from pisces_jax.data.images import FORMATS, UnreadablePicture, load_image

Role = Literal["system", "user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Message:
    """What one side says: texts and pictures, uint8 [H, W, 3], in order. The user's pictures are read, the model's were
    drawn. What the system says opens the user's next turn."""

    role: Role
    content: tuple[str | UInt8[np.ndarray, "H W 3"], ...]


def as_parts(messages: Sequence[Message]) -> tuple[Part, ...]:
    """The parts of a prompt that the model continues. What it said before stands there as in training: its texts end
    with the end of its turn."""
    parts: list[Part] = []
    before = None
    for message in messages:
        speaker: Literal["user", "assistant"] = "assistant" if message.role == "assistant" else "user"
        for content in message.content:
            # A single turn needs no word about whose it is, and is laid out as a question to `answer`.
            turn = speaker if len(messages) > 1 and speaker != before else None
            before = speaker
            if isinstance(content, str):
                parts.append(Text(content, learn=speaker == "assistant", turn=turn))
            else:
                parts.append(Picture(content, "draw" if speaker == "assistant" else "read", turn))
    return tuple(parts)


def open_upload(data: bytes, name: str, most_pixels: int) -> UInt8[np.ndarray, "H W 3"]:
    """A picture that somebody sent; its size is looked at before it is decoded.

    Raises:
        UnreadablePicture: it is no picture, is damaged, or has more pixels.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Exception:  # which `load_image` puts into words
        return load_image(data, name)
    if width * height > most_pixels:
        raise UnreadablePicture(
            f"picture {name} is {width} x {height}, above the limit of {most_pixels / 1e6:g} megapixels: shrink it"
        )
    return load_image(data, name)
