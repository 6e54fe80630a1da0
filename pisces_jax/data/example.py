"""The one type of training example: a sequence of texts and pictures.

Captioning is `read picture, learned text`; text to image is `text, drawn picture`; question answering, chat,
interleaved documents and editing (`read, text, draw`) are other sequences of the same two parts. Everything
upstream makes examples; everything downstream (`packing.py`) sees packed rows.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import UInt8, UInt32

Role = Literal["read", "draw"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text; with `learn` its tokens are predicted (next-token cross-entropy)."""

    text: str
    learn: bool = False


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that the model reads (understanding encoder) or draws (next-vector prediction).

    `image` is a `uint8 [H, W, 3]` RGB array, or a function that makes it: lengths are known without decoding.
    """

    image: np.ndarray | Callable[[], np.ndarray]
    role: Role

    def array(self) -> UInt8[np.ndarray, "H W 3"]:
        return self.image() if callable(self.image) else self.image


Part = Text | Picture


@dataclasses.dataclass(frozen=True)
class Example:
    """Parts in order, and a `key` that names this example in messages and seeds its noise."""

    parts: tuple[Part, ...]
    key: str


def identity(*words: object) -> UInt32[np.ndarray, "2"]:
    """A stable 64-bit hash of `words`, as two numbers: what an example's noise is keyed by on the device."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)
