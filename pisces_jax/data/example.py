"""The one type of training example: a sequence of texts and pictures.

Captioning is `read picture, learned text`; text to image is `text, drawn picture`; question answering, chat,
interleaved documents and editing (`read, text, draw`) are other sequences of the same two parts. Everything
upstream (`sources.py`) makes examples; everything downstream (`packing/`) sees packed rows.
"""

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Literal

import numpy as np
from jaxtyping import UInt8, UInt32

from pisces_jax.data.images import EncodedImage, View, fit
from pisces_jax.utils.errors import UserError, cut

Role = Literal["read", "draw"]
Speaker = Literal["user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Text:
    """A piece of text; with `learn`, its tokens are predicted (next-token cross-entropy). `turn` as in `Picture`."""

    text: str
    learn: bool = False
    turn: Speaker | None = None


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture that the model reads (understanding encoder) or draws (next-vector prediction).

    `image` is a `uint8 [H, W, 3]` RGB array, or a function that makes it: lengths are known without decoding.
    `turn` opens a turn of that speaker, also after another one of the same speaker. It lasts until the next part with a
    `turn`. Parts before the first such part fall into turns by what they are (`layout.lay_out`).
    """

    image: np.ndarray | Callable[[], np.ndarray]
    role: Role
    turn: Speaker | None = None

    def array(self) -> UInt8[np.ndarray, "H W 3"]:
        """The decoded picture."""
        return self.image() if callable(self.image) else self.image

    def square(self, size: int, stretch: bool = False, scaled: bool = False) -> UInt8[np.ndarray, "size size 3"]:
        """Decoded and fitted (`images.fit`). With `scaled`, a JPEG may be decoded smaller (`images.open_image`)."""
        if isinstance(self.image, EncodedImage):  # without an array of the full size
            return fit(self.image.open(size if scaled else 0), size, stretch)
        return fit(self.array(), size, stretch)


Part = Text | Picture


@dataclasses.dataclass(frozen=True)
class Example:
    """Parts in order, and a `key` that names the example in messages and seeds its noise.

    At the rate `drop`, packing takes `dropped` in place of `parts`, decided anew in every epoch: the same pictures
    without their caption, for guidance. `dropped` must not be longer than `parts`. With `cut`, an example that is
    longer than a row loses the end of its last text instead of being left out. With `flip` and `crop`, training sees
    its pictures to read otherwise in every epoch: mirrored or not, and without up to that share of both sides.
    """

    parts: tuple[Part, ...]
    key: str
    drop: float = 0.0
    dropped: tuple[Part, ...] = ()
    cut: bool = False
    flip: bool = False
    crop: float = 0.0

    @property
    def varies(self) -> bool:
        """Whether it differs between epochs."""
        return bool(self.drop or self.flip or self.crop)

    def of_epoch(self, seed: int, epoch: int) -> "Example":
        """The example as it is in that epoch: with its caption or without, and its pictures as they are then read."""
        if self.drop and identity(seed, epoch, self.key, "drop")[0] < self.drop * 2**32:
            return dataclasses.replace(self, parts=self.dropped).viewed(seed, epoch)
        return self.viewed(seed, epoch)

    def viewed(self, seed: int, epoch: int) -> "Example":
        """The example with its pictures as they are read in that epoch."""
        if not (self.flip or self.crop):
            return self
        parts = list(self.parts)
        for i, part in enumerate(parts):
            if isinstance(part, Picture) and part.role == "read":
                mirror, share, left, top = np.random.default_rng(identity(seed, epoch, self.key, "view", i)).random(4)
                view = View(part.image, self.flip and mirror < 0.5, 1 - self.crop * share, left, top)
                parts[i] = Picture(view, "read")
        return dataclasses.replace(self, parts=tuple(parts))


class BrokenExample(UserError):
    """An example that cannot be used: its `key`, a `reason` of a few words to count by, and what exactly was found."""

    def __init__(self, key: str, reason: str, found: str = ""):
        super().__init__(f"example {cut(key)}: {reason}{f' ({cut(found)})' if found else ''}")
        self.key, self.reason = key, reason
        self._words = key, reason, found

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:  # by default exceptions pickle only their message
        return type(self), self._words


SHARD_GONE = "the shard is gone or cannot be read"
SHARD_CHANGED = "the shard changed since it was indexed"
FILE_GONE = "the file is gone or cannot be read"
FILE_CHANGED = "the file changed since it was opened"
# Failures of the storage, not of the example, which may be readable another time: lengths and features that were
# made meanwhile are not kept.
TRANSIENT = frozenset({SHARD_GONE, SHARD_CHANGED, FILE_GONE, FILE_CHANGED})


def reason_of(error: UserError) -> str:
    """The words that a broken example is counted by."""
    return getattr(error, "reason", "unreadable")


def identity(*words: object) -> UInt32[np.ndarray, "2"]:
    """A stable 64-bit hash of `words`, as two numbers. On the device, it keys an example's noise."""
    digest = hashlib.blake2b("\0".join(map(str, words)).encode(errors="surrogatepass"), digest_size=8).digest()
    return np.frombuffer(digest, dtype="<u4").astype(np.uint32)
