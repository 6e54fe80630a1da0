"""The choice of the next token: greedy or drawn, from the whole vocabulary or from its likeliest part.

The order is that of transformers: the repetition penalty, the temperature, then top-k, then top-p. Each row of a batch
has settings of its own, as arrays, so that one compiled program serves all.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pisces_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class TextSampling:
    """How one text is written.

    Attributes:
        max_tokens: the longest text.
        temperature: 0: the likeliest token, always.
        top_k: only the k likeliest tokens; 0: all.
        top_p: only the likeliest tokens whose probabilities add up to p (Holtzman et al. 2020, arXiv 1904.09751).
        repetition_penalty: divides the positive logits and multiplies the negative ones of tokens that stand in the
            prompt or the text (Keskar et al. 2019, arXiv 1909.05858); 1: none.
        stop: the text ends before the first of these.

    Raises:
        UserError: a value is out of its range.
    """

    max_tokens: int = 32
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, valid, range_ in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", 0 <= self.top_k < 2**31, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
        ):
            if not valid:
                raise UserError(f"{name} {getattr(self, name)} is not {range_}: give another value")
        if not all(self.stop):
            raise UserError("a stop text is empty: leave it out")

    def cut(self, text: str) -> tuple[str, bool]:
        """The text before the first stop text, and whether there is one."""
        ends = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        return (text[: min(ends)], True) if ends else (text, False)


class Choices(flax.struct.PyTreeNode):
    """The settings of B rows; a row of `limit` 0 writes nothing."""

    limit: Int[Array, "B"]
    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    penalty: Float[Array, "B"]

    @classmethod
    def of(cls, rows: Sequence[TextSampling | None]) -> "Choices":
        """The settings of each row; None: it writes nothing."""
        idle = TextSampling()
        some = [how or idle for how in rows]
        columns: tuple[Any, ...] = (
            np.array([how.max_tokens if how else 0 for how in rows], np.int32),
            np.array([how.temperature for how in some], np.float32),
            np.array([how.top_k for how in some], np.int32),
            np.array([how.top_p for how in some], np.float32),
            np.array([how.repetition_penalty for how in some], np.float32),
        )
        return cls(*columns)  # fmt: skip


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]) -> Float[Array, "B V"]:
    """The logits after the repetition penalty of the tokens that were `seen`."""
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def likeliest(logits: Float[Array, "B V"], top_k: Int[Array, "B"], top_p: Float[Array, "B"]) -> Float[Array, "B V"]:
    """The logits with -inf at the tokens that top-k and top-p leave out. Of equal tokens at the border all stay."""
    V = logits.shape[-1]
    falling = -jnp.sort(-logits, axis=-1)
    k = jnp.where(top_k > 0, jnp.minimum(top_k, V), V)
    least = jnp.take_along_axis(falling, k[:, None] - 1, axis=-1)
    falling = jnp.where(falling >= least, falling, -jnp.inf)
    probabilities = jax.nn.softmax(falling, axis=-1)
    above = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = (above < top_p[:, None]) | (jnp.arange(V) == 0)
    least = jnp.min(jnp.where(kept & (falling > -jnp.inf), falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def choose(logits: Float[Array, "B V"], keys: Array, seen: Bool[Array, "B V"], how: Choices) -> Int[Array, "B"]:
    """The next token of each row.

    Args:
        logits: -inf at tokens that may not come.
        keys: one random key per row.
        seen: the tokens of its prompt and its text.
    """
    logits = jax.lax.cond(jnp.any(how.penalty != 1), lambda z: penalise(z, seen, how.penalty), lambda z: z, logits)
    greedy = jnp.argmax(logits, axis=-1)

    def drawn(z: Array) -> Array:
        z = z / jnp.where(how.temperature > 0, how.temperature, 1)[:, None]
        some = jnp.any((how.top_k > 0) | (how.top_p < 1))
        z = jax.lax.cond(some, lambda z: likeliest(z, how.top_k, how.top_p), lambda z: z, z)
        return jnp.where(how.temperature > 0, jax.vmap(jax.random.categorical)(keys, z), greedy)

    return jax.lax.cond(jnp.any(how.temperature > 0), drawn, lambda z: greedy, logits)
