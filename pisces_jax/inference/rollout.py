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

from pisces_jax.losses.flow import FlowConfig, guided, integrate
from pisces_jax.models.layers import apply
from pisces_jax.models.pisces import Pisces, place_vectors, slot_positions
from pisces_jax.models.transformer import Cache, empty_cache


@flax.struct.dataclass
class Rows:
    """A batch of rollouts: `length[b]` positions are in the cache, `hidden` is the state at the last of them."""

    cache: Cache
    length: Int[Array, "B"]
    hidden: Float[Array, "B D"]


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

    def prefill(self, params: Any, prompts: Prompts, slots: int) -> Rows:
        """Runs the prompts; the cache has `slots` positions, for the prompts and all that follows."""
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
        hidden, cache = self._apply(params, x, positions, None, cache, method="run")
        last = jnp.take_along_axis(hidden, (prompts.length - 1)[:, None, None], axis=1)[:, 0]
        return Rows(cache, prompts.length, last)

    def advance(self, params: Any, rows: Rows, x: Float[Array, "B D"], move: Bool[Array, "B"]) -> Rows:
        """One position further with input x for the rows in `move`; for the others the next slot is written but
        does not count."""
        hidden, cache = self._apply(params, x[:, None], rows.length[:, None], None, rows.cache, method="run")
        return Rows(cache, rows.length + move, jnp.where(move[:, None], hidden[:, 0], rows.hidden))

    def extend(self, params: Any, rows: Rows, x: Float[Array, "B n D"]) -> tuple[Rows, Float[Array, "B n D"]]:
        """n positions further with inputs x; the states at them."""
        positions = rows.length[:, None] + jnp.arange(x.shape[1])
        hidden, cache = self._apply(params, x, positions, None, rows.cache, method="run")
        return Rows(cache, rows.length + x.shape[1], hidden[:, -1]), hidden

    def sample_text(
        self,
        params: Any,
        rows: Rows,
        keys: Array,
        *,
        max_tokens: int,
        temperature: float,
        stop: tuple[int, ...],
        allowed: Array,
    ) -> tuple[Rows, Int[Array, "B max_tokens"]]:
        """Up to `max_tokens` tokens per row, before one of `stop`; then -1.

        Args:
            keys: one random key per row.
            temperature: 0 is greedy.
            allowed: bool [V], the tokens that may be sampled, `stop` included.
        """
        stops = jnp.asarray(stop)

        def step(carry: Any, i: Array) -> tuple[Any, Array]:
            rows, going = carry
            logits = self._apply(params, rows.hidden[:, None], method="logits")[:, 0]
            logits = jnp.where(allowed, logits, -jnp.inf)
            if temperature:
                draw = jax.vmap(lambda k, z: jax.random.categorical(jax.random.fold_in(k, i), z))
                token = draw(keys, logits / temperature)
            else:
                token = jnp.argmax(logits, axis=-1)
            going = going & ~jnp.isin(token, stops)
            x = self._apply(params, token[:, None], method="embed")[:, 0]
            return (self.advance(params, rows, x, going), going), jnp.where(going, token, -1)

        (rows, _), tokens = jax.lax.scan(step, (rows, jnp.ones(rows.length.shape, bool)), jnp.arange(max_tokens))
        return rows, tokens.T

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
        made = integrate(guided(network, states, flow), flow.temperature * noise, flow.steps)
        return self._apply(params, made, method="from_data")
