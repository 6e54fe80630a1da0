"""From an example to its token sequence.

The sequence is the tokenizer's `opening` (`bos`), the parts in order, `eos`. A text is its ids. A picture to read is
`read_vectors` times the `<image>` id. A drawn picture is `[IMG]`, `draw_vectors` times `<image>`, `[/IMG]`.

With a chat tokenizer (LLaMA 3's, Qwen2's), what is given is the user's turn, and what is learned or drawn is the
assistant's. Parts of a conversation say themselves where a turn begins (`Text.turn`).
Each turn starts with its header and ends with the end of turn, except for the last turn, which `eos` ends.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import Bool, Int32

from pisces_jax.data.example import Example, Picture, Role, Speaker, Text
from pisces_jax.data.tokenizers import Tokenizer


class Source(Protocol):
    """Random access to examples; it must be picklable, and reading it must not decode pictures."""

    @property
    def draws(self) -> bool:
        """Whether some of its examples draw a picture: features of drawn pictures are cached for such a source."""
        ...

    @property
    def remote(self) -> bool:
        """Whether reading an example is a request to a bucket: then lengths are read by many threads at once."""
        ...

    @property
    def fingerprint(self) -> str:
        """Changes with whatever changes an example but not its key: files, and settings that the keys do not show.

        Stored lengths are found by it, together with the keys and texts of some examples; "" if those say it all.
        """
        ...

    @property
    def pictures_fingerprint(self) -> str | None:
        """`fingerprint` for the pictures alone, by which cached features are found: sources that have only other texts
        share them. None if texts and pictures are not told apart.
        """
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, i: int) -> Example:
        """
        Raises:
            BrokenExample: this example cannot be used; the others still can.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static sizes of the rows, the same for a whole run.

    A group of `rows` rows of `length` tokens shares one pool of `read_slots` pictures to read and one of
    `draw_slots` pictures to draw. A picture takes `read_vectors` or `draw_vectors` tokens of its row and is
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

    def size(self, role: str) -> int:
        """Pixels of a picture's side."""
        return self.read_size if role == "read" else self.draw_size


class Entry(NamedTuple):
    """One source of a mixture."""

    name: str
    weight: float
    source: Source


class Placed(NamedTuple):
    """A picture: `start` is the position of its first `<image>`, `ordinal` its index among the parts."""

    role: Role
    start: int
    picture: Picture
    ordinal: int


class LaidOut(NamedTuple):
    """One example as L tokens. If `loss_mask[t]`, token t is a target, predicted from the state at t - 1."""

    tokens: Int32[np.ndarray, "L"]
    loss_mask: Bool[np.ndarray, "L"]
    pictures: list[Placed]


def lay_out(example: Example, tokenizer: Tokenizer, layout: Layout, *, prompt: bool = False) -> LaidOut:
    """The token sequence of `example`; no picture is decoded. With `prompt` it has no end, for the model to continue.

    Targets are the tokens of learned texts, and what the model decides right after one: the `[IMG]` of a picture that
    it draws, or the `eos` with which it stops. A learned text before a given one, or before the next turn, ends its own
    turn: with an `eos`, or the tokenizer's end of turn. Elsewhere `[IMG]` and `eos` are given. The state at `[IMG]`
    (`start - 1`) predicts vector 0.

    If an example with `cut` is longer than a row, its last text loses its end, and the `eos` after it is no target.
    """
    laid_out, texts = _lay_out(example, tokenizer, layout, 0, prompt)
    surplus = len(laid_out.tokens) - layout.length
    if example.cut and surplus > 0 and texts and texts[-1] > surplus:
        laid_out, _ = _lay_out(example, tokenizer, layout, surplus, prompt)
    return laid_out


def _lay_out(
    example: Example, tokenizer: Tokenizer, layout: Layout, cut: int, prompt: bool
) -> tuple[LaidOut, list[int]]:
    """The sequence without the last `cut` tokens of the last text, and the number of tokens of each text."""
    tokens = list(tokenizer.opening)
    loss_mask = [False] * len(tokens)
    pictures = []
    texts: list[int] = []
    decides = False  # whether the part before was a learned text
    last = max((i for i, part in enumerate(example.parts) if isinstance(part, Text)), default=-1)
    speaker: Speaker | None = None
    said = False  # whether the parts themselves say where turns begin
    opened = False  # whether the header of a turn is the last that was written

    def put(ids: Sequence[int], learned: bool) -> None:
        tokens.extend(ids)
        loss_mask.extend([learned] * len(ids))

    def turn(new: Speaker, ends: bool) -> None:
        """Opens a turn. With `ends`, a learned text before it has said all, also where no token parts turns."""
        nonlocal speaker, decides, opened
        if speaker is not None and tokenizer.end_of_turn is not None:
            put([tokenizer.end_of_turn], decides)
        elif ends and decides:
            put([tokenizer.eos], True)
        put(tokenizer.header(new), False)
        speaker, decides, opened = new, False, True

    for ordinal, part in enumerate(example.parts):
        given = isinstance(part, Text) and not part.learn
        said = said or part.turn is not None
        made = not given and (isinstance(part, Text) or part.role == "draw")
        usual: Speaker = "assistant" if made else "user"
        if part.turn or (usual != speaker and not said):
            turn(part.turn or usual, given or part.turn is not None)
        if isinstance(part, Text):
            ids = tokenizer.encode(part.text)
            shortened = ordinal == last and cut > 0
            put(ids[: len(ids) - cut] if shortened else ids, part.learn)
            texts.append(len(ids))
            decides, opened = part.learn and not shortened, False
            continue
        if part.role == "draw":
            put(tokenizer.before_picture if opened else [], False)
            put([tokenizer.begin_image], decides)
        pictures.append(Placed(part.role, len(tokens), part, ordinal))
        put([tokenizer.image] * (layout.read_vectors if part.role == "read" else layout.draw_vectors), False)
        if part.role == "draw":
            put([tokenizer.end_image], False)
        decides = opened = False
    if prompt and speaker != "assistant":
        turn("assistant", ends=False)
    if not prompt:
        put([tokenizer.eos], decides)
    return LaidOut(np.asarray(tokens, np.int32), np.asarray(loss_mask, bool), pictures), texts
