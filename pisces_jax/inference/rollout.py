"""Generation of text and visual vectors by the unified model, one after the other, with the key-value cache.

A rollout starts from prompts (`prefill`), may sample text (`sample_text`), and may draw (`draw_vectors`): `[IMG]`,
then m vectors. With regression each is predicted from the state before it and fed back through the projector; with a
denoiser each is made from noise, given that state. With a generator m queries are fed in at once, and all vectors are
made from noise together, given the states at the queries.
The rows of a batch advance together, each at its own length; a row's result does not depend on the other rows.

Letters: B rows, T prompt positions, m drawn vectors, C their width.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pisces_jax.inference.sampling import Choices, choose
from pisces_jax.losses.flow import FlowConfig, guided, integrate
from pisces_jax.models.layers import apply
from pisces_jax.models.pisces import Pisces, place_vectors, slot_positions
from pisces_jax.models.transformer import Cache, empty_cache

CHUNK = 512  # positions of prompts that are run at once: masks and logits of attention grow with it


class Rows(flax.struct.PyTreeNode):
    """A batch of rollouts.

    Attributes:
        length: positions that are in the cache.
        hidden: the state at the last of them.
        seen: the tokens that stand in the prompt and the text.
        written: the number of tokens of the text.
        going: whether the text goes on.
    """

    cache: Cache
    length: Int[Array, "B"]
    hidden: Float[Array, "B D"]
    seen: Bool[Array, "B V"]
    written: Int[Array, "B"]
    going: Bool[Array, "B"]

    def put(self, at: Int[Array, ""], one: "Rows") -> "Rows":
        """With the single rollout `one`, of as many slots, in place of row `at`."""

        def row(axis: int) -> Any:
            return lambda many, new: jax.lax.dynamic_update_slice_in_dim(many, new.astype(many.dtype), at, axis)

        cache = jax.tree.map(row(1), self.cache, one.cache)
        return jax.tree.map(row(0), self.replace(cache=None), one.replace(cache=None)).replace(cache=cache)


@flax.struct.dataclass
class Pool:
    """Pictures of a batch of prompts, with pointers to their places, as in `data/packing/rows.py`."""

    images: Int[Array, "P S S 3"]
    row: Int[Array, "P"]
    start: Int[Array, "P"]
    valid: Bool[Array, "P"]


@flax.struct.dataclass
class Prompts:
    """Prompts, left-aligned in `tokens [B, T]`, with the pictures that they read and those that were drawn in them."""

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]
    read: Pool
    drawn: Pool


@dataclasses.dataclass(frozen=True)
class Rollout:
    """The functions of a rollout; `params` are the model's, by part. Call them under jit."""

    model: Pisces

    def _apply(self, params: Any, *args: Any, method: str) -> Any:
        return apply(self.model, params, *args, method=method)

    def prefill(self, params: Any, prompts: Prompts, slots: int, chunk: int = CHUNK) -> Rows:
        """Runs the prompts, `chunk` positions at a time; the cache has `slots` positions, for them and all that
        follows."""
        B, T = prompts.tokens.shape
        x = self._apply(params, prompts.tokens, method="embed")

        def put(x: Array, pool: Pool, vectors: Array) -> Array:
            index = slot_positions(pool.row[None], pool.start[None], pool.valid[None], vectors.shape[1], T, B)
            return place_vectors(x.reshape(1, B * T, -1), index, vectors[None]).reshape(x.shape)

        if prompts.read.images.shape[0]:
            x = put(x, prompts.read, self._apply(params, prompts.read.images, method="read"))
        if prompts.drawn.images.shape[0]:
            features = self._apply(params, prompts.drawn.images, method="features")
            x = put(x, prompts.drawn, self._apply(params, features, method="drawn_inputs"))
        cache = empty_cache(self.model.config.language_model, B, slots, self.model.dtype)
        positions = jnp.broadcast_to(jnp.arange(T), (B, T))
        last = jnp.zeros((B, x.shape[-1]), self.model.dtype)
        if T <= chunk or T % chunk:
            chunk = T

        def run(carried: tuple[Cache, Array], start: Array) -> tuple[tuple[Cache, Array], None]:
            cache, last = carried
            x_, where = (jax.lax.dynamic_slice_in_dim(a, start, chunk, 1) for a in (x, positions))
            hidden, cache = self._apply(params, x_, where, None, cache, method="run")
            at = prompts.length - 1 - start
            found = jnp.take_along_axis(hidden, jnp.clip(at, 0, chunk - 1)[:, None, None], axis=1)[:, 0]
            return (cache, jnp.where(((at >= 0) & (at < chunk))[:, None], found, last)), None

        if chunk == T:
            (cache, last), _ = run((cache, last), jnp.zeros((), jnp.int32))
        else:
            (cache, last), _ = jax.lax.scan(run, (cache, last), jnp.arange(0, T, chunk))
        V = self.model.config.language_model.vocab_size
        tokens = jnp.where(positions < prompts.length[:, None], prompts.tokens, V)
        seen = jnp.zeros((B, V), bool).at[jnp.arange(B)[:, None], tokens].set(True, mode="drop")
        return Rows(cache, prompts.length, last, seen, jnp.zeros(B, jnp.int32), jnp.ones(B, bool))

    def advance(self, params: Any, rows: Rows, x: Float[Array, "B D"], move: Bool[Array, "B"]) -> Rows:
        """One position further with input x for the rows in `move`; for the others the next slot is written but
        does not count."""
        hidden, cache = self._apply(params, x[:, None], rows.length[:, None], None, rows.cache, method="run")
        hidden = jnp.where(move[:, None], hidden[:, 0], rows.hidden)
        return rows.replace(cache=cache, length=rows.length + move, hidden=hidden)

    def extend(self, params: Any, rows: Rows, x: Float[Array, "B n D"]) -> tuple[Rows, Float[Array, "B n D"]]:
        """n positions further with inputs x; the states at them."""
        positions = rows.length[:, None] + jnp.arange(x.shape[1])
        hidden, cache = self._apply(params, x, positions, None, rows.cache, method="run")
        return rows.replace(cache=cache, length=rows.length + x.shape[1], hidden=hidden[:, -1]), hidden

    def sample_text(
        self,
        params: Any,
        rows: Rows,
        keys: Array,
        how: Choices,
        *,
        steps: int,
        stop: tuple[int, ...],
        allowed: Array,
    ) -> tuple[Rows, Int[Array, "B steps"]]:
        """Up to `steps` more tokens per row, before one of `stop` or the row's limit; then -1. It ends as soon as all
        rows have. Several calls, one after the other, write what one call does.

        Args:
            keys: one random key per row.
            allowed: bool [V], the tokens that may be sampled, `stop` included.
        """
        stops, B = jnp.asarray(stop, jnp.int32), rows.length.shape[0]

        def step(carried: Any) -> Any:
            i, rows, tokens = carried
            logits = self._apply(params, rows.hidden[:, None], method="logits")[:, 0]
            own = jax.vmap(jax.random.fold_in)(keys, rows.written)
            token = choose(jnp.where(allowed, logits, -jnp.inf), own, rows.seen, how)
            going = rows.going & ~jnp.isin(token, stops)
            x = self._apply(params, token[:, None], method="embed")[:, 0]
            rows = self.advance(params, rows, x, going)
            written = rows.written + going
            seen = rows.seen.at[jnp.arange(B), token].max(going)
            rows = rows.replace(seen=seen, written=written, going=going & (written < how.limit))
            return i + 1, rows, tokens.at[:, i].set(jnp.where(going, token, -1))

        rows = rows.replace(going=rows.going & (rows.written < how.limit))
        start = jnp.zeros((), jnp.int32), rows, jnp.full((B, steps), -1, jnp.int32)
        _, rows, tokens = jax.lax.while_loop(lambda c: (c[0] < steps) & c[1].going.any(), step, start)
        return rows, tokens

    def draw_vectors(
        self, params: Any, rows: Rows, begin_image: int, keys: Array, flow: FlowConfig
    ) -> tuple[Rows, Float[Array, "B m C"]]:
        """`[IMG]`, then the m vectors of a picture; the rows have them in their cache where the model feeds vectors.

        Args:
            keys: one random key per row, of a flow head's noise.
            flow: how a flow head is sampled.
        """
        move = jnp.ones(rows.length.shape, bool)
        begin = self._apply(params, jnp.full((rows.length.shape[0], 1), begin_image), method="embed")[:, 0]
        rows = self.advance(params, rows, begin, move)
        if self.model.config.generator is not None:
            return self._draw_by_flow(params, rows, keys, flow)

        def step(rows: Rows, place: Array) -> tuple[Rows, Array]:
            if self.model.config.denoiser is None:
                vector = self._apply(params, rows.hidden, method="predict")
            else:
                each = jax.vmap(lambda k: jax.random.fold_in(k, place))(keys)
                shape = (self.model.config.denoiser.channels,)
                vector = self._integrate(params, rows.hidden, each, shape, flow)
            x = self._apply(params, vector[:, None], place[None], method="feed")[:, 0]
            return self.advance(params, rows, x, move), vector

        rows, vectors = jax.lax.scan(step, rows, jnp.arange(self.model.config.draw_vectors))
        return rows, vectors.swapaxes(0, 1)

    def _draw_by_flow(
        self, params: Any, rows: Rows, keys: Array, flow: FlowConfig
    ) -> tuple[Rows, Float[Array, "B m C"]]:
        c = self.model.config
        assert c.generator is not None
        queries = self._apply(params, method="query_inputs")
        rows, states = self.extend(params, rows, jnp.broadcast_to(queries, (len(keys), *queries.shape)))
        shape = (c.generator.size, c.generator.size, c.generator.channels)
        vectors = self._integrate(params, states, keys, shape, flow)
        if c.fed_vectors:
            x = self._apply(params, vectors, jnp.arange(c.draw_vectors), method="feed")
            rows, _ = self.extend(params, rows, x)
        return rows, vectors

    def _integrate(
        self, params: Any, states: Float[Array, "B *m D"], keys: Array, shape: tuple[int, ...], flow: FlowConfig
    ) -> Float[Array, "B *m C"]:
        """Features made from noise of this shape, given the states."""

        def network(*args: Array) -> Array:
            return self._apply(params, *args, method="generate")

        noise = jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)
        noise = noise.astype(jnp.promote_types(self.model.dtype, jnp.float32))
        made = integrate(guided(network, states, flow), flow.temperature * noise, flow.steps, flow.solver, flow.shift)
        return self._apply(params, made, method="from_data")
