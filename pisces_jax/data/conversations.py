"""Conversations as published sets spell them: who says what, and where pictures stand."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pisces_jax.data.example import BrokenExample


class Turn(NamedTuple):
    """One turn of a conversation; what the `model` says is learned."""

    model: bool
    text: str


MARK = "<image>"
# What stands for a picture: <image>, <Image>, <image_1>, <image 1>, <|image|>, <|image_1|>.
_MARKS = re.compile(r"<(\|?)image(?:[ _-]?(\d+))?\1>", re.IGNORECASE)
# Marks of other models and media, for which there is no place: their text alone would be learned as if nothing were
# missing. HTML in a conversation about code is none of them, so <video> counts only where no </video> follows.
_FOREIGN = re.compile(
    r"<img>|<(video|audio)(?:[ _-]?\d+)?>(?!.*</\1>)|<\|(?:video|audio|vision|image)\w*\|>|"
    r"<image[ _-]?(?:here|placeholder|pad)>",
    re.IGNORECASE | re.DOTALL,
)
_SPEAKERS = {"human": False, "user": False, "system": False, "gpt": True, "assistant": True, "model": True}
_PICTURE_PARTS = ("image", "image_url")


def sound(text: str, key: str) -> str:
    """Returns `text`. Raises `BrokenExample` if it has lone surrogates, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BrokenExample(key, "not UTF-8", f"character {error.start}") from error
    return text


def place(turns: Sequence[Turn], pictures: int, key: str) -> list[list[str | int]]:
    """Each turn as its pieces of text, with the number of a picture (from 0) where its mark stands.

    Marks stand for the pictures in order, or for the ones that they number, from 0 or from 1. Without any mark there is
    no number in the result.

    Raises:
        BrokenExample: marks and pictures differ, or a mark is of another model or medium.
    """
    found = [list(_MARKS.finditer(turn.text)) for turn in turns]
    marks = [mark for each in found for mark in each]
    numbers = [int(mark[2]) for mark in marks if mark[2]]
    first = min(numbers, default=0)
    if numbers and (first > 1 or sorted(numbers) != list(range(first, first + len(marks)))):
        raise BrokenExample(key, "marks and pictures differ", " ".join(mark[0] for mark in marks))
    if marks and len(marks) != pictures:
        raise BrokenExample(key, "marks and pictures differ", f"{len(marks)} {MARK}, {pictures} pictures")
    order = iter([number - first for number in numbers] or range(len(marks)))
    placed = []
    for turn, each in zip(turns, found, strict=True):
        pieces: list[str | int] = []
        start = 0
        for mark in each:
            pieces += [turn.text[start : mark.start()], next(order)]
            start = mark.end()
        pieces.append(turn.text[start:])
        for piece in pieces:
            if isinstance(piece, str) and not turn.model and (foreign := _FOREIGN.search(piece)):
                raise BrokenExample(key, "a mark that is not understood", foreign[0])
        placed.append(pieces)
    return placed


def turns_of(fields: Mapping[str, Any], key: str) -> list[Turn]:
    """The turns of LLaVA's and ShareGPT's `conversations` (from, value), of `messages` (role, content), or of the
    Cauldron's `texts` (user, assistant), each as a list or as JSON in a text.

    Raises:
        BrokenExample: the record has none of these, a turn has another form, or dropping an empty one would join two.
    """
    turns = _listed(fields.get("conversations"), key) or _listed(fields.get("messages"), key)
    if turns is None and isinstance(texts := _listed(fields.get("texts"), key), list):
        both = {"user", "assistant"}
        pairs = [turn for turn in texts if isinstance(turn, Mapping) and both <= set(turn)]
        turns = [{"role": role, "content": turn[role]} for turn in pairs for role in ("user", "assistant")]
    if not isinstance(turns, (list, tuple)) or not turns:
        raise BrokenExample(key, "no conversation")
    told: list[Turn] = []
    for number, turn in enumerate(turns, start=1):
        try:
            speaker, text = _SPEAKERS[_filled(turn, "from", "role")], _said(_filled(turn, "value", "content"))
        except (KeyError, TypeError) as error:
            raise BrokenExample(key, "a turn of an unknown form", repr(error)) from error
        if not text.strip() and (speaker or (told and told[-1].model)):
            raise BrokenExample(key, "an empty turn", f"turn {number}")
        told.append(Turn(speaker, sound(text, key)))
    return told


def _listed(value: Any, key: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BrokenExample(key, "no conversation", f"a text that is not JSON: {error}") from error


def _filled(turn: Any, *names: str) -> Any:
    """The first of these that the turn has: tables of mixed styles have all columns, and null in some."""
    values = [turn[name] for name in names if name in turn]
    if not values:
        raise KeyError(names[0])
    return next((value for value in values if value is not None), None)


def _said(content: Any) -> str:
    if isinstance(content, (list, tuple)):  # parts: {"type": "text", "text": ...}, {"type": "image"}
        for part in content:
            if part["type"] not in ("text", *_PICTURE_PARTS):
                raise TypeError(f"a part of the type {part['type']!r}")
        content = " ".join(part["text"] if part["type"] == "text" else MARK for part in content)
    if not isinstance(content, (str, int, float)) or (isinstance(content, float) and not math.isfinite(content)):
        raise TypeError(f"its text is {content!r}")
    return str(content)
