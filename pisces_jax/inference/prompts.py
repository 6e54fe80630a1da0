"""Questions and prompts, sequences of texts and pictures, as batches of a fixed size for the rollout."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from pisces_jax.data.example import Example, Picture, Role, Text
from pisces_jax.data.packing.layout import Layout, lay_out
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.inference.rollout import Pool, Prompts
from pisces_jax.models.pisces import PiscesConfig
from pisces_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class PromptMaker:
    """Makes batches of `batch_size` rows; those without a prompt have the length 1.

    Attributes:
        knows_drawn: whether the parameters of the generation encoder are there.
    """

    config: PiscesConfig
    tokenizer: Tokenizer
    layout: Layout
    batch_size: int
    knows_drawn: bool

    def prompts(self, some: Sequence[Sequence[Text | Picture]], closing: Sequence[int] = ()) -> Prompts:
        """A batch of prompts; `closing` is written where one ends with the header of the assistant's turn.

        Raises:
            UserError: a picture cannot be read, or the model has no encoder for it.
        """
        laid = [lay_out(Example(tuple(parts), "prompt"), self.tokenizer, self.layout, prompt=True) for parts in some]
        header = self.tokenizer.header("assistant") if closing else []
        ids = [
            np.append(row.tokens, closing).astype(np.int32) if header and [*row.tokens[-len(header) :]] == header
            else row.tokens
            for row in laid
        ]  # fmt: skip
        placed: dict[Role, list[tuple[int, int, Picture]]] = {"read": [], "draw": []}
        for b, row in enumerate(laid):
            for found in row.pictures:
                placed[found.role].append((b, found.start, found.picture))
        self.check_pictures(placed)
        return self.rows(ids, *(self._pool(role, pictures) for role, pictures in placed.items()))

    def rows(self, ids: Sequence[np.ndarray], read: Pool | None = None, drawn: Pool | None = None) -> Prompts:
        """Rows of tokens as a batch. Lengths are rounded up to powers of two, so that few programs are compiled."""
        longest = max(32, *map(len, ids), 0)
        tokens = np.full((self.batch_size, 1 << (longest - 1).bit_length()), self.tokenizer.pad, np.int32)
        length = np.ones(self.batch_size, np.int32)
        for b, row in enumerate(ids):
            tokens[b, : len(row)], length[b] = row, len(row)
        read = self._pool("read", []) if read is None else read
        drawn = self._pool("draw", []) if drawn is None else drawn
        return Prompts(jnp.asarray(tokens), jnp.asarray(length), read, drawn)

    def check_pictures(self, placed: Mapping[Role, Sequence[Any]]) -> None:
        """
        Raises:
            UserError: there are pictures, and no encoder for them.
        """
        if len(placed["read"]) and self.config.understanding_encoder is None:
            raise UserError(
                "this model reads no pictures (the vision tower of BLIP3-o, Qwen2.5-VL's, is not part of this "
                "project): ask it about text alone, or draw"
            )
        if len(placed["draw"]) and not self.knows_drawn:
            raise UserError(
                "this model came without its generation encoder, which pictures drawn before need: draw from text alone"
            )

    def _pool(self, role: Role, placed: Sequence[tuple[int, int, Picture]]) -> Pool:
        """Pictures at (row, position), in a multiple of `batch_size` slots."""
        slots = -(-len(placed) // self.batch_size) * self.batch_size
        size, stretch = self.layout.size(role), role == "read" and self.layout.read_stretch
        images = np.zeros((slots, size, size, 3), np.uint8)
        row, start, valid = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.arange(slots) < len(placed)
        for i, (b, at, picture) in enumerate(placed):
            images[i], row[i], start[i] = picture.square(size, stretch), b, at
        return Pool(*map(jnp.asarray, (images, row, start, valid)))
