"""Texts that are written side by side, each in a row of its own, which it joins and leaves while the others go on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pisces_jax.data.example import Part
from pisces_jax.inference.model import Model
from pisces_jax.inference.rollout import Rows
from pisces_jax.inference.sampling import Choices, TextSampling
from pisces_jax.utils.errors import UserError


@dataclasses.dataclass
class Written:
    """A text so far.

    Attributes:
        ended: why it has ended: "stop" (the model or a stop text ended it), "length" (of its limit), or "" (not yet).
    """

    how: TextSampling
    prompt_tokens: int
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    ended: str = ""

    @property
    def certain(self) -> str:
        """The part of the text that more tokens cannot change: without half a character, and without what may become a
        stop text."""
        if self.ended:
            return self.text
        certain = self.text.rstrip("\ufffd")
        open_ = (len(stop[:n]) for stop in self.how.stop for n in range(1, len(stop)) if certain.endswith(stop[:n]))
        return certain[: len(certain) - max(open_, default=0)]


class RunningTexts:
    """A batch of `rows` rows of `slots` positions. A prompt is run alone, then its row joins the batch; so a text is
    what it is alone, whatever else is written (with the same shapes, to the bit)."""

    def __init__(self, model: Model, rows: int, slots: int, steps: int = 8) -> None:
        """
        Args:
            steps: tokens that are written between two looks at who has ended or waits.
        """
        self.alone, self.together = model.resized(1), model.resized(rows)
        self.slots, self._steps = 1 << (slots - 1).bit_length(), steps
        self._put = jax.jit(Rows.put, donate_argnums=0)
        self.clear()

    def clear(self) -> None:
        """Every row is free."""
        self.texts: list[Written | None] = [None] * self.together.batch_size
        self._rows: Rows | None = None
        self._keys = np.zeros(len(self.texts), np.int64)

    @property
    def free(self) -> int:
        return self.texts.count(None)

    def join(self, parts: Sequence[Part], how: TextSampling, seed: int) -> Written:
        """Runs a prompt and gives its text a free row.

        Raises:
            UserError: the prompt cannot be read, or there is no room for it and its longest text.
        """
        row, model = self.texts.index(None), self.alone
        with model.on_mesh():
            prompts = model.prompt_maker.prompts([parts])
            length = int(prompts.length[0])
            if length + how.max_tokens + 1 > self.slots:
                raise UserError(
                    f"the prompt has {length} tokens, pictures included, and the longest answer {how.max_tokens}; "
                    f"together they may have {self.slots - 1}: shorten the prompt, or set max_tokens lower"
                )
            one = model.prefill(model.there(model.params), prompts, self.slots)
            if self._rows is None:
                self._rows = self._empty(one)
            self._rows = self._put(self._rows, jnp.int32(row), one)
        self._keys[row] = seed
        self.texts[row] = text = Written(how, length)
        return text

    def _empty(self, one: Rows) -> Rows:
        """A batch of nothing, in the shapes of a single row."""
        n = len(self.texts)

        def zeros(axis: int) -> Any:
            return lambda x: jnp.zeros((*x.shape[:axis], n, *x.shape[axis + 1 :]), x.dtype)

        cache = jax.tree.map(zeros(1), one.cache)
        return jax.tree.map(zeros(0), one.replace(cache=None)).replace(cache=cache)

    def leave(self, text: Written) -> None:
        """Its row is free; a text that has left already is passed over."""
        self.texts = [None if other is text else other for other in self.texts]

    def advance(self) -> list[Written]:
        """Some tokens further. Texts that end leave.

        Returns:
            The texts that were written on.
        """
        model, written = self.together, [text for text in self.texts if text is not None]
        if not written:
            return []
        how = Choices.of([None if text is None else text.how for text in self.texts])
        with model.on_mesh():
            keys = model.keys(0, 0, self._keys.tolist())
            params = model.there(model.params)
            self._rows, tokens = model.write(params, self._rows, keys, how, self._steps)
        for row, (new, going) in enumerate(zip(np.asarray(tokens), np.asarray(self._rows.going), strict=True)):
            if (text := self.texts[row]) is None:
                continue
            text.tokens += new[new >= 0].tolist()
            text.text, stopped = text.how.cut(model.text(np.asarray(text.tokens)))
            if stopped or not going:
                full = len(text.tokens) == text.how.max_tokens
                text.ended = "length" if full and not stopped else "stop"
                self.leave(text)
        return written
