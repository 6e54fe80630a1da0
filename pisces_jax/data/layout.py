"""From an example to its token sequence, and the lengths of a whole source's examples.

The sequence is `bos`, the parts in order, `eos`. A text is its ids. A picture to read is `read_vectors` times
the `<image>` id, nothing around it. A drawn picture is `[IMG]`, `draw_vectors` times `<image>`, `[/IMG]`.

With a chat tokenizer (LLaMA 3's) what is given is the user's turn and what is learned or drawn the assistant's: each
turn opens with its header, and every turn but the last, which `eos` ends, with the end of turn.
"""

import dataclasses
import hashlib
import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from pisces_jax.data.example import Example, Picture, Role, Text
from pisces_jax.data.tokenizers import Speaker, Tokenizer
from pisces_jax.errors import UserError
from pisces_jax.files import write_atomic


class Source(Protocol):
    """Random access to examples; it must be picklable, and reading it must not decode pictures."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of the rows, the same for a whole run.

    A group of `rows` rows of `length` tokens shares one pool of `read_slots` pictures to read and one of
    `draw_slots` pictures to draw. A picture takes `read_vectors` or `draw_vectors` places in its row and is
    `read_size` or `draw_size` pixels wide and high.
    """

    read_vectors: int
    draw_vectors: int
    length: int
    rows: int
    read_slots: int
    draw_slots: int
    read_size: int
    draw_size: int
    read_stretch: bool = False  # pictures to read are stretched to the square, not cropped (`images.fit`)


class Placed(NamedTuple):
    """A picture: `start` is the position of its first `<image>`, `ordinal` its number among the parts."""

    role: Role
    start: int
    picture: Picture
    ordinal: int


class LaidOut(NamedTuple):
    """One example as `L` tokens; where `learn[t]`, token t is a target, predicted from the state at t-1."""

    tokens: Int32[np.ndarray, "L"]
    learn: Bool[np.ndarray, "L"]
    pictures: list[Placed]


def lay_out(example: Example, tokenizer: Tokenizer, layout: Layout, *, prompt: bool = False) -> LaidOut:
    """The token sequence of `example`; no picture is decoded. With `prompt` it is left open, for the model to go on.

    Learned are the tokens of learned texts, and the `[IMG]` or `eos` right after one: there it was the
    model's own decision to draw or to stop, elsewhere it is given. The state at `[IMG]` (`start - 1`)
    predicts vector 0.
    """
    tokens, learn = [tokenizer.bos], [False]
    pictures = []
    decides = False  # whether the part before was a learned text
    speaker: Speaker | None = None

    def put(ids: Sequence[int], learned: bool) -> None:
        tokens.extend(ids)
        learn.extend([learned] * len(ids))

    def turn(new: Speaker) -> None:
        nonlocal speaker
        if new == speaker:
            return
        if speaker is not None and tokenizer.end_of_turn is not None:
            put([tokenizer.end_of_turn], decides)
        put(tokenizer.header(new), False)
        speaker = new

    for ordinal, part in enumerate(example.parts):
        made = part.learn if isinstance(part, Text) else part.role == "draw"
        turn("assistant" if made else "user")
        if isinstance(part, Text):
            put(tokenizer.encode(part.text), part.learn)
            decides = part.learn
            continue
        if part.role == "draw":
            put([tokenizer.begin_image], decides)
        pictures.append(Placed(part.role, len(tokens), part, ordinal))
        put([tokenizer.image] * (layout.read_vectors if part.role == "read" else layout.draw_vectors), False)
        if part.role == "draw":
            put([tokenizer.end_image], False)
        decides = False
    if prompt:
        turn("assistant")
    else:
        put([tokenizer.eos], decides)
    return LaidOut(np.asarray(tokens, np.int32), np.asarray(learn, bool), pictures)


class Lengths(NamedTuple):
    """What packing must know of every example; `tokens` is -1 where the example cannot be read."""

    tokens: Int32[np.ndarray, "N"]
    reads: Int32[np.ndarray, "N"]
    draws: Int32[np.ndarray, "N"]


def scan_lengths(
    source: Source, tokenizer: Tokenizer, layout: Layout, cache: str | os.PathLike | None = None
) -> Lengths:
    """Reads every example's text once; with `cache` (a path) the result is kept in that npz file.

    The file is used again as long as source, tokenizer and layout are the same, and is rebuilt otherwise.
    """
    key = _fingerprint(source, tokenizer, layout) if cache is not None else ""
    if cache is not None and (found := _read_cache(Path(cache), key)) is not None:
        return found
    lengths = Lengths(*(np.zeros(len(source), np.int32) for _ in Lengths._fields))
    for i in range(len(source)):
        try:
            laid_out = lay_out(source[i], tokenizer, layout)
        except UserError:
            lengths.tokens[i] = -1
            continue
        lengths.tokens[i] = len(laid_out.tokens)
        lengths.reads[i] = sum(placed.role == "read" for placed in laid_out.pictures)
        lengths.draws[i] = len(laid_out.pictures) - lengths.reads[i]
    if cache is not None:
        _write_cache(Path(cache), key, lengths)
    return lengths


def _fingerprint(source: Source, tokenizer: Tokenizer, layout: Layout) -> str:
    """Changes with whatever can change a length; a source may name its own contents by `fingerprint`."""
    words = [tokenizer.fingerprint, layout.read_vectors, layout.draw_vectors, len(source)]
    words += [type(source).__qualname__, getattr(source, "fingerprint", "")]
    for i in np.linspace(0, len(source) - 1, num=min(len(source), 32)).astype(int):
        try:
            example = source[int(i)]
        except UserError:
            words.append("unreadable")
            continue
        words.append(example.key)
        words += [part.text if isinstance(part, Text) else part.role for part in example.parts]
    return hashlib.blake2b("\0".join(map(str, words)).encode(), digest_size=16).hexdigest()


def _read_cache(path: Path, key: str) -> Lengths | None:
    try:
        with np.load(path, allow_pickle=False) as file:
            if str(file["key"]) == key:
                return Lengths(*(file[name] for name in Lengths._fields))
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        zipfile.BadZipFile,
    ):  # missing, damaged or of an older form: it is made again
        pass
    return None


def _write_cache(path: Path, key: str, lengths: Lengths) -> None:
    file = io.BytesIO()
    np.savez(file, key=np.array(key), **lengths._asdict())
    write_atomic(path, file.getvalue())
