"""From a record (a key, fields, pictures) to an example: what is read, what is learned, what is drawn."""

import dataclasses
import functools
import re
import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from pisces_jax.data.conversations import Turn, place, sound, turns_of
from pisces_jax.data.example import BrokenExample, Example, Part, Picture, Role, Text, identity
from pisces_jax.data.instructions import (
    CAPTION_INSTRUCTION,
    DESCRIBE_INSTRUCTION,
    DRAW_INSTRUCTION,
    draw_instruction,
)
from pisces_jax.utils.errors import UserError

Image = Callable[[], np.ndarray]


class Record(NamedTuple):
    """What a file holds of one example.

    `pictures` are in order, and each is decoded when it is called; None stands for one that is null or empty, so that
    no other takes its place. `note` is for the message if a field or a picture is missing.
    """

    key: str
    fields: Mapping[str, Any]
    pictures: Sequence[Image | None]
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How records become examples.

    | recipe | example |
    |---|---|
    | caption, describe | read; caption or detailed text learned |
    | draw_caption, draw_details | caption or detailed text; draw |
    | draw_described | caption; detailed text learned; draw |
    | question | read (all pictures); question; answer learned |
    | conversation | turns in order, each picture where its mark `<image>` stands; the model's turns learned |
    | edit | read the first picture; caption as the instruction; draw the second |
    | pair | picture and caption, for encoders |

    Formats are Python's, over the record's fields ("{text}"). A tuple of formats is several wordings, of which the
    example's key chooses one. `drop` is the rate at which a picture is drawn without its caption, for guidance. With
    `cut`, an example that is longer than a row is cut at the end of its last text instead of being left out. With
    `flip`, training mirrors half of the pictures that are read, others in every epoch: not for labels such as "left
    arrow". With `crop` it takes a window that lacks up to that share of both sides. `instruction` is what tells the
    model to draw: the text stands at `{}` in it.

    Raises:
        UserError: an unknown recipe, a missing format, or an invalid format or rate.
    """

    recipe: str
    caption_format: str | Sequence[str] = "{text}"
    detailed_format: str | Sequence[str] | None = None
    question_format: str | Sequence[str] = "{question}"
    answer_format: str | Sequence[str] = "{answer}"
    drop: float = 0.0
    cut: bool = False
    # Not in the representation, by which sources know their lengths: these do not depend on them.
    flip: bool = dataclasses.field(default=False, repr=False)
    crop: float = dataclasses.field(default=0.0, repr=False)
    instruction: str = dataclasses.field(default=DRAW_INSTRUCTION, repr=False)  # in fingerprints by `wording`

    def __post_init__(self) -> None:
        if self.recipe not in tuple(RECIPES):
            raise UserError(f"unknown recipe {self.recipe!r}: choose one of {', '.join(RECIPES)}")
        if self.detailed_format is None and "detailed" in RECIPES[self.recipe].formats:
            raise UserError(
                f"the recipe {self.recipe!r} needs a detailed text: set detailed_format, such as '{{text}}: {{tags}}'"
            )
        for name in ("caption_format", "detailed_format", "question_format", "answer_format"):
            _check_format(name, getattr(self, name))
        if not isinstance(self.drop, (int, float)) or not 0 <= self.drop < 1:
            raise UserError(f"drop={self.drop!r} is not a rate: give a number from 0 to below 1")
        if self.drop and not self.draws:
            raise UserError(f"drop={self.drop} is for drawing, but {self.recipe!r} draws nothing: remove it")
        if not isinstance(self.crop, (int, float)) or not 0 <= self.crop < 1:
            raise UserError(f"crop={self.crop!r} is not a share: give a number from 0 to below 1")
        if not isinstance(self.instruction, str) or self.instruction.count("{}") != 1:
            raise UserError(f"instruction={self.instruction!r} has no place for the text: write {{}} where it stands")
        if not isinstance(self.flip, bool):
            raise UserError(f"flip={self.flip!r} is neither True nor False: give one of them")

    @property
    def _used(self) -> list[Any]:
        return [getattr(self, f"{name}_format") for name in RECIPES[self.recipe].formats]

    @functools.cached_property
    def fields(self) -> frozenset[str] | None:
        """The fields that are used; None if the formats do not tell, as in "{text:{width}}" or for conversations."""
        formats = [one for wordings in self._used for one in _wordings(wordings)]
        nested = any("{" in (inner or "") for one in formats for _, _, inner, _ in string.Formatter().parse(one))
        return None if nested or not formats else frozenset(name for one in formats for name in _names(one))

    @property
    def draws(self) -> bool:
        return RECIPES[self.recipe].draws

    @property
    def wording(self) -> str:
        """What `instruction` changes of an example's length; "" for the usual one."""
        return "" if self.instruction == DRAW_INSTRUCTION else f"/{self.instruction}"

    @property
    def pictures(self) -> str:
        """The picture of a record that features are cached of (`feature_cache.cached_picture`)."""
        return "second" if self.recipe == "edit" else "first"

    def check(self, fields: Sequence[str]) -> None:
        """Raises `UserError` if a format names a field that the records do not have."""
        for text_format in (one for wordings in self._used for one in _wordings(wordings)):
            for name in _names(text_format):
                if name not in fields:
                    raise UserError(
                        f"{text_format!r} names the field {name!r}, but the fields are "
                        f"{', '.join(sorted(fields))}: change the format"
                    )

    def example(self, record: Record) -> Example:
        """
        Raises:
            BrokenExample: a field or a picture is missing, or a field does not fit its format.
        """
        parts, dropped = RECIPES[self.recipe].make(self, record)
        drop = self.drop if dropped else 0.0
        return Example(parts, record.key, drop, dropped, self.cut, self.flip, self.crop)

    def text(self, record: Record, number: int = 0) -> str:
        """The record in the wording of one of the formats that the recipe uses.

        Raises:
            BrokenExample: a field is missing or does not fit the format, or the text is empty.
        """
        wordings = _wordings(self._used[number])
        chosen = int(identity(record.key, "wording")[0]) % len(wordings) if len(wordings) > 1 else 0
        try:
            text = _Formatter(record.key).vformat(wordings[chosen], (), record.fields).strip()
        except (KeyError, IndexError) as error:
            known = f"{error.args[0]}; it has {', '.join(map(str, record.fields)) or 'none'}{record.note}"
            raise BrokenExample(record.key, "a field is missing", known) from error
        except UnicodeDecodeError as error:
            raise BrokenExample(record.key, "not UTF-8", f"byte {error.start}") from error
        except (ValueError, TypeError, AttributeError) as error:
            raise BrokenExample(record.key, "a field does not fit its format", str(error)) from error
        if not text:
            raise BrokenExample(record.key, "an empty text")
        return sound(text, record.key)


def _wordings(text_format: str | Sequence[str]) -> Sequence[str]:
    return [text_format] if isinstance(text_format, str) else text_format


def _names(text_format: str) -> list[str]:
    """The fields that a format takes: `answers` for `{answers[0]}` and `{answers.first}`."""
    return [re.split(r"[.\[]", name)[0] for _, name, _, _ in string.Formatter().parse(text_format) if name is not None]


def _check_format(name: str, given: Any) -> None:
    """Raises `UserError` if `given` is not a format or several of them."""
    if given is None and name == "detailed_format":
        return
    if not isinstance(given, (str, list, tuple)) or not given or not all(isinstance(one, str) for one in given):
        raise UserError(f"{name}={given!r} is not a format: give one such as '{{text}}', or several in a tuple")
    for one in _wordings(given):
        try:
            names = _names(one)
        except ValueError as error:
            raise UserError(f"{name}={one!r} is not a format ({error}): fix its braces") from error
        if any(not field or field.isdigit() for field in names):
            raise UserError(f"{name}={one!r} has braces without a field's name: write one there, as in '{{text}}'")


class _Formatter(string.Formatter):
    """`str.format` for the values of a record. Bytes are UTF-8. A null, an empty list, and a number that is not finite
    count as a missing field, and a list or an object is no text (else "None", "nan" or "['a', 'b']" would be learned).
    Of a list of texts the record's key chooses one: the same place in every list, as questions and answers go together.
    """

    def __init__(self, key: str):
        self._key = key

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if isinstance(value, np.ndarray):
            value = value.tolist()
        if isinstance(value, (list, tuple)) and value:
            if not all(one is None or isinstance(one, (str, bytes)) for one in value):
                raise TypeError(f"{field_name} is a list of other things than texts: {value!r}")
            value = value[int(identity(self._key, "one of several")[0]) % len(value)]
        if value is None or (isinstance(value, (list, tuple, dict)) and not value):
            raise KeyError(field_name)
        if isinstance(value, (float, np.floating)) and not np.isfinite(value):
            raise KeyError(field_name)
        if isinstance(value, Mapping):
            raise TypeError(f"{field_name} is an object with {', '.join(map(str, value))}")
        return value.decode() if isinstance(value, bytes) else value, first


Parts = tuple[Part, ...]


def _picture(record: Record, number: int, role: Role) -> Picture:
    if number >= len(record.pictures):
        raise BrokenExample(record.key, "a picture is missing", f"it has {len(record.pictures)}{record.note}")
    if (picture := record.pictures[number]) is None:
        raise BrokenExample(record.key, "a picture is missing", f"number {number + 1} is null or empty")
    return Picture(picture, role)


def _caption(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    learned = Text(recipe.text(record), learn=True)
    instruction = DESCRIBE_INSTRUCTION if recipe.recipe == "describe" else CAPTION_INSTRUCTION
    return (_picture(record, 0, "read"), Text(instruction), learned), ()


def _draw(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    prompt = Text(draw_instruction(recipe.text(record), recipe.instruction))
    picture = _picture(record, 0, "draw")
    return (prompt, picture), (Text(draw_instruction("", recipe.instruction)), picture)


def _draw_described(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    (prompt, picture), dropped = _draw(recipe, record)
    return (prompt, Text(recipe.text(record, 1), learn=True), picture), dropped


def _edit(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    before, after = _picture(record, 0, "read"), _picture(record, 1, "draw")
    prompt = Text(draw_instruction(recipe.text(record), recipe.instruction))
    return (before, prompt, after), (before, Text(draw_instruction("", recipe.instruction)), after)


def _question(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    first, (asked,) = _said(record, [Turn(False, recipe.text(record))])
    return (*first, *asked, Text(recipe.text(record, 1), learn=True)), ()


def _pair(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    return (_picture(record, 0, "read"), Text(recipe.text(record))), ()


def _said(record: Record, turns: Sequence[Turn]) -> tuple[list[Part], list[list[Part]]]:
    """The parts of each turn, and before them the pictures of a record without marks, as in LLaVA's older files."""
    placed = place(turns, len(record.pictures), record.key)
    marked = any(isinstance(piece, int) for pieces in placed for piece in pieces)
    first: list[Part] = [] if marked else [_picture(record, i, "read") for i in range(len(record.pictures))]
    said: list[list[Part]] = [
        [
            _picture(record, piece, "read") if isinstance(piece, int) else Text(piece.strip(), learn=turn.model)
            for piece in pieces
            if isinstance(piece, int) or piece.strip()
        ]
        for turn, pieces in zip(turns, placed, strict=True)
    ]
    return first, said


def _conversation(recipe: Recipe, record: Record) -> tuple[Parts, Parts]:
    turns = turns_of(record.fields, record.key)
    parts, said = _said(record, turns)
    opened = bool(parts)
    for turn, own in zip(turns, said, strict=True):
        if own and not (opened and not turn.model):  # pictures without marks stand in the user's first turn
            own[0] = dataclasses.replace(own[0], turn="assistant" if turn.model else "user")
        opened = opened and not own
        parts += own
    if not any(isinstance(part, Text) and part.learn for part in parts):
        raise BrokenExample(record.key, "the model says nothing")
    return tuple(parts), ()


class _Kind(NamedTuple):
    """`make` gives the parts of an example, and those without its caption if it draws; `formats` are those it uses."""

    make: Callable[[Recipe, Record], tuple[Parts, Parts]]
    formats: Sequence[str]
    draws: bool = False


RECIPES = {
    "caption": _Kind(_caption, ["caption"]),
    "describe": _Kind(_caption, ["detailed"]),
    "draw_caption": _Kind(_draw, ["caption"], draws=True),
    "draw_details": _Kind(_draw, ["detailed"], draws=True),
    "draw_described": _Kind(_draw_described, ["caption", "detailed"], draws=True),
    "question": _Kind(_question, ["question", "answer"]),
    "conversation": _Kind(_conversation, []),
    "edit": _Kind(_edit, ["caption"], draws=True),
    "pair": _Kind(_pair, ["caption"]),
}
