"""A conversation in the terminal, line by line."""

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pisces_jax.data.images import load_image, png
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.inference.conversation import Message, as_parts
from pisces_jax.inference.model import Model
from pisces_jax.inference.running import RunningTexts
from pisces_jax.inference.sampling import TextSampling
from pisces_jax.inference.terminal import inline
from pisces_jax.utils.errors import UserError, refusal
from pisces_jax.utils.files import local_path, write_atomic

HELP = """/image FILE   show the model a picture; what you write next is about it
/draw TEXT    have a picture drawn
/new          forget what was said
/help         this list
/quit         end (so does the end of the input)"""


@dataclasses.dataclass
class Talk:
    """What was said so far, and how to go on.

    Attributes:
        drawing: how `Model.draw` draws.
        folder: drawn pictures are saved there, numbered.
        context: tokens of the conversation and the next answer together.
        shown: the protocol by which the terminal shows pictures; "": it does not.
        say: prints characters as they are.
    """

    model: Model
    how: TextSampling
    drawing: dict[str, Any]
    folder: Path
    context: int
    seed: int = 0
    shown: str = ""
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self._texts = RunningTexts(self.model, 1, self.context)
        self._new()

    def _new(self) -> None:
        self._said: list[Message] = []
        self._pictures: list[Any] = []  # that were shown since the user wrote last

    def answer(self, line: str) -> bool:
        """Does what a line of the user's says; False if it ends the conversation.

        Raises:
            UserError: it cannot be done; the conversation stands as before.
        """
        command, _, rest = line.strip().partition(" ")
        if not command.startswith("/"):
            if line.strip():
                self._write(line.strip())
        elif command == "/image":
            image = load_image(local_path(rest.strip()))
            self._pictures.append(image)
            self.say(f"[{image.shape[1]} x {image.shape[0]} pixels]\n")
        elif command == "/draw":
            self._draw(" ".join(rest.split()))
        elif command == "/new":
            self._new()
        elif command == "/help":
            self.say(HELP + "\n")
        elif command == "/quit":
            return False
        else:
            raise UserError(f"there is no {command}: /help lists what there is")
        return True

    def _write(self, line: str) -> None:
        asked = Message("user", (*self._pictures, line))
        text, shown = self._texts.join(as_parts([*self._said, asked]), self.how, self.seed), ""
        try:
            while not text.ended:
                self._texts.advance()
                self.say(text.certain[len(shown) :])
                shown = text.certain
        finally:
            self._texts.leave(text)
        self.say("\n")
        self._said += [asked, Message("assistant", (text.text,))] if text.text else [asked]
        self._pictures = []

    def _draw(self, prompt: str) -> None:
        if not prompt:
            raise UserError("/draw needs a text: say what to draw")
        asked = Message("user", (*self._pictures, draw_instruction(prompt, self.model.config.sampling.instruction)))
        parts = as_parts([*self._said, asked])
        (drawing,) = self._texts.alone.draw([parts], seeds=[self.seed], **self.drawing)
        self.seed += 1  # the next picture of the same words is another one
        if drawing.description:
            self.say(drawing.description + "\n")
        path = next(p for n in range(10**6) if not (p := self.folder / f"{n:04d}.png").exists())
        try:
            write_atomic(path, png(drawing.image))
        except OSError as error:
            raise UserError(refusal(error) or f"{path} cannot be written ({error.strerror})") from error
        self.say((inline(drawing.image, self.shown) + "\n" if self.shown else "") + f"[{path}]\n")
        drawn = (drawing.description, drawing.image) if drawing.description else (drawing.image,)
        self._said += [asked, Message("assistant", drawn)]
        self._pictures = []


def converse(talk: Talk) -> None:
    """Reads lines until the input ends. Input that is no terminal is shown after the prompt, as if it were typed."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  (lines can be edited)
    while True:
        try:
            line = input("> ")
        except EOFError:
            talk.say("\n")
            return
        if not typed:
            talk.say(line + os.linesep)
        try:
            if not talk.answer(line):
                return
        except UserError as error:
            talk.say(f"{error}\n")
