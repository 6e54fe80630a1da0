"""A trained model that reads and draws: what the commands, the evaluation and the notebooks use."""

import contextlib
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from pisces_jax.data.example import Example, Picture, Role, Text
from pisces_jax.data.packing.layout import Layout, lay_out
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.inference.decode import Decoder
from pisces_jax.inference.loading import Places, load_decoder, load_parts, open_config
from pisces_jax.inference.rollout import Pool, Prompts, Rollout
from pisces_jax.losses.diffusion import DiffusionConfig
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.layers import apply
from pisces_jax.models.pisces import Pisces
from pisces_jax.training import config as settings
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.errors import UserError

NOISE = 1  # folded into a drawing's key for the flow head's noise
DECODING = 1_000_003  # added to a seed for the decoder's noise
NULL_SEED = 1_000_033  # of the noise of the vectors that stand for no prompt
Sampling = FlowConfig | DiffusionConfig


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The result of one prompt: the description that the model wrote first ("" if it drew directly), the visual vectors
    float32 [m, C], and the picture uint8 [S, S, 3]."""

    description: str
    vectors: np.ndarray
    image: np.ndarray


class Model:
    """Reads and draws in batches of a fixed size, so that few programs are compiled; results do not depend on the
    batch.

    Args:
        flow: how the decoder samples.
        mesh: the devices to compute on, where the parameters lie as `sharding.RULES` says; None: one device.
        stay: whether all parameters stay on the devices; else those of the language model and those of the decoder go
            there in turn, from arrays of the host.
    """

    def __init__(
        self,
        config: ConfigDict,
        tokenizer: Tokenizer,
        params: Any,
        decoder: Decoder | None,
        decoder_params: Any,
        flow: Sampling | None,
        batch_size: int = 64,
        mesh: Mesh | None = None,
        stay: bool = True,
    ) -> None:
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.mesh, self._stay = mesh, stay
        self.pisces = Pisces(settings.pisces_config(config, tokenizer.vocab_size), jnp.dtype(config.compute_dtype))
        self.vector_flow = settings.vector_flow_config(config)
        self.params, self._decoder, self.decoder_params, self.flow = params, decoder, decoder_params, flow
        rollout = Rollout(self.pisces)
        c = self.pisces.config
        self._layout = Layout(
            c.read_vectors, c.draw_positions, config.data.row_length, rows=1, read_slots=1, draw_slots=1,
            read_size=c.read_size, draw_size=c.draw_size,
            read_stretch=config.data.read_stretch,
        )  # fmt: skip
        plain = np.array([i == tokenizer.eos or i not in tokenizer.special for i in range(tokenizer.vocab_size)])
        allowed_draw = plain.copy()
        allowed_draw[tokenizer.begin_image] = True

        def answer(params: Any, prompts: Prompts, keys: Any, max_tokens: int, temperature: float) -> Any:
            rows = rollout.prefill(params, prompts, prompts.tokens.shape[1] + max_tokens + 1)
            stop = (tokenizer.eos,)
            return rollout.sample_text(
                params,
                rows,
                keys,
                max_tokens=max_tokens,
                temperature=temperature,
                stop=stop,
                allowed=jnp.asarray(plain),
            )[1]

        def draw(
            params: Any, prompts: Prompts, keys: Any, max_tokens: int, temperature: float, flow: FlowConfig
        ) -> Any:
            rows = rollout.prefill(params, prompts, prompts.tokens.shape[1] + max_tokens + c.draw_positions + 2)
            tokens = jnp.zeros((prompts.tokens.shape[0], 0), jnp.int32)
            if max_tokens:
                rows, tokens = rollout.sample_text(
                    params, rows, keys, max_tokens=max_tokens, temperature=temperature,
                    stop=(tokenizer.begin_image, tokenizer.eos), allowed=jnp.asarray(allowed_draw),
                )  # fmt: skip
            # The noise has keys of its own, which do not depend on how much text came before.
            noise = jax.vmap(lambda k: jax.random.fold_in(k, NOISE))(keys)
            return tokens, rollout.draw_vectors(params, rows, tokenizer.begin_image, noise, flow)[1]

        self._answer = jax.jit(answer, static_argnums=(3, 4))
        self._draw = jax.jit(draw, static_argnums=(3, 4, 5))
        self._features = jax.jit(lambda p, x: apply(self.pisces, p, x, method="features"))
        if decoder is not None:
            self._decode = jax.jit(decoder.decode, static_argnums=3)

    @property
    def params(self) -> Any:
        """The model's parameters by part."""
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = params
        self._nulls: dict[FlowConfig, Any] = {}  # the vectors of no prompt, by how they are made

    @property
    def programs(self) -> dict[str, Any]:
        """The compiled functions of drawing by phase, for the planner."""
        return {"vectors": self._draw, "pictures": self._decode}

    def _on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def _there(self, params: Any) -> Any:
        """The parameters on the devices: for good, or until the result is dropped."""
        if self._stay:
            return params
        return jax.tree.map(lambda x: jax.device_put(x.value, x.where), params)

    @property
    def read_size(self) -> int:
        """Side of the pictures that it reads, in pixels."""
        return self.pisces.config.read_size

    @property
    def drawn_size(self) -> int:
        """Side of the pictures that it encodes for drawing, in pixels."""
        return self.pisces.config.draw_size

    def answer(
        self,
        questions: Sequence[Sequence[Text | Picture]],
        *,
        max_tokens: int = 32,
        temperature: float = 0.0,
        seed: int = 0,
    ) -> list[str]:
        """The model's text after each question, a sequence of pictures to read and texts."""
        answers: list[str] = []
        params = self._there(self.params)
        for first in self._batches(len(questions), "reading"):
            some = questions[first : first + self.batch_size]
            with self._on_mesh():
                prompts, keys = self._prompts(some), self._keys(seed, first)
                tokens = self._answer(params, prompts, keys, max_tokens, temperature)
            answers += [self._text(row) for row in np.asarray(tokens)[: len(some)]]
        return answers

    def draw(
        self,
        prompts: Sequence[Sequence[Text | Picture]],
        *,
        describe: bool,
        max_tokens: int = 96,
        temperature: float = 1.0,
        guidance: float | None = None,
        vector_guidance: float | None = None,
        seed: int = 0,
        seeds: Sequence[int] | None = None,
        turn_ends: bool = True,
    ) -> list[Drawing]:
        """A picture for each prompt, in which pictures to read and pictures drawn before may stand (role "draw").

        With `describe` the model first writes, sampled at `temperature`, a description of its own (at most `max_tokens`
        tokens), and then draws from prompt and description in the same rollout.

        Args:
            guidance, vector_guidance: scales of the decoder's and of the flow head's guidance; None: the config's.
            seed: of all pictures; each has noise of its own, by its place among the prompts.
            seeds: of each picture, in place of `seed`: the picture that its prompt alone gives with that seed.
            turn_ends: whether the tokenizer's `before_picture` is written, as in training.

        Raises:
            UserError: guidance of a network that was trained without dropped conditions, or of a regression head.
        """
        if vector_guidance is not None and not self.pisces.config.flow:
            raise UserError("--vector_guidance is of the flow heads, and this model's head is regression: leave it out")
        flow = _with_guidance(self.vector_flow, vector_guidance, "--vector_guidance")
        if not prompts:
            return []
        texts, made = [], []
        params = self._there(self.params)
        with self._on_mesh():
            for first in self._batches(len(prompts), "drawing"):
                some = prompts[first : first + self.batch_size]
                closed = not describe and turn_ends
                given = self._prompts(some, self.tokenizer.before_picture if closed else ())
                keys = self._keys(seed, first, seeds)
                tokens, vectors = self._draw(params, given, keys, max_tokens if describe else 0, temperature, flow)
                texts += [self._text(t) for t in np.asarray(tokens)[: len(some)]]
                made.append(np.asarray(vectors)[: len(some)])
            null = self._null(params, flow)
        del params
        vectors = np.concatenate(made)
        images = self.decode(vectors, seed=seed, seeds=seeds, guidance=guidance, null=null)
        return [Drawing(*drawn) for drawn in zip(texts, vectors, images, strict=True)]

    def _null(self, params: Any, flow: FlowConfig) -> Any:
        """The model's own vectors [1, m, C] for a prompt of one space, without a chat template: what Emu2-Gen's decoder
        takes for no prompt. None for a decoder that takes none."""
        if self._decoder is None or not self._decoder.takes_null:
            return None
        if flow not in self._nulls:
            t = self.tokenizer
            start = [t.bos] if list(t.opening) == [t.bos] else []
            prompts = self._rows([np.array([*start, *t.encode(" ")], np.int32)])
            self._nulls[flow] = np.asarray(self._draw(params, prompts, self._keys(NULL_SEED, 0), 0, 1.0, flow)[1])[:1]
        return self._nulls[flow]

    def features(self, images: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N m C"]:
        """The true visual vectors of pictures of the generation encoder's size."""
        self._check_pictures({"read": (), "draw": list(images)})
        parts, params = [], self._there(self.params)
        for first in range(0, len(images), self.batch_size):
            some = images[first : first + self.batch_size]
            with self._on_mesh():
                parts.append(np.asarray(self._features(params, _pad(some, self.batch_size)))[: len(some)])
        return np.concatenate(parts)

    def decode(
        self,
        vectors: Any,
        *,
        seed: int = 0,
        first: int = 0,
        seeds: Sequence[int] | None = None,
        guidance: float | None = None,
        null: Any = None,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Pictures from visual vectors [N, m, C]; picture i's noise comes from (seed, first + i), or from its own of
        `seeds`.

        Args:
            null: the vectors of no prompt, for a decoder that takes them; by default they are made.
        """
        if self._decoder is None or self.flow is None:
            raise UserError("this run names no decoder (config key decoder): it can answer but not draw")
        how = _with_guidance(self.flow, guidance, "--guidance")
        if null is None and self._decoder.takes_null:
            with self._on_mesh():
                null = self._null(self._there(self.params), self.vector_flow)
        params = self._there(self.decoder_params)
        images = []
        for start in self._batches(len(vectors), "decoding"):
            some = vectors[start : start + self.batch_size]
            keys = self._keys(seed, first + start, seeds, DECODING)
            with self._on_mesh():
                made = self._decode(params, _pad(np.asarray(some), self.batch_size), keys, how, null)
                images.append(np.asarray(made)[: len(some)])
        return np.concatenate(images)

    def _batches(self, number: int, doing: str) -> Iterable[int]:
        """Where each batch starts; shows progress where there are several."""
        starts = range(0, number, self.batch_size)
        return tqdm(starts, desc=doing, unit="batch", leave=False, disable=len(starts) < 3, dynamic_ncols=True)

    def _keys(self, seed: int, first: int, seeds: Sequence[int] | None = None, added: int = 0) -> Any:
        """The keys of a batch: of (seed, place), or of (its own seed, 0)."""
        if seeds is None:
            key = jax.random.key(seed + added)
            return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + self.batch_size))
        own = [*seeds[first : first + self.batch_size]]
        own += [0] * (self.batch_size - len(own))
        return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(jnp.asarray(own) + added)

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode([int(t) for t in tokens if t >= 0])

    def _prompts(self, some: Sequence[Sequence[Text | Picture]], closing: Sequence[int] = ()) -> Prompts:
        """A batch of prompts; `closing` is written where one ends with the header of the assistant's turn."""
        laid = [lay_out(Example(tuple(parts), "prompt"), self.tokenizer, self._layout, prompt=True) for parts in some]
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
        self._check_pictures(placed)
        return self._rows(ids, *(self._pool(role, pictures) for role, pictures in placed.items()))

    def _rows(self, ids: Sequence[np.ndarray], read: Pool | None = None, drawn: Pool | None = None) -> Prompts:
        """Rows of tokens as a batch. Lengths are rounded up to powers of two, so that few programs are compiled."""
        longest = max(32, *map(len, ids), 0)
        tokens = np.full((self.batch_size, 1 << (longest - 1).bit_length()), self.tokenizer.pad, np.int32)
        length = np.ones(self.batch_size, np.int32)
        for b, row in enumerate(ids):
            tokens[b, : len(row)], length[b] = row, len(row)
        read = self._pool("read", []) if read is None else read
        drawn = self._pool("draw", []) if drawn is None else drawn
        return Prompts(jnp.asarray(tokens), jnp.asarray(length), read, drawn)

    def _check_pictures(self, placed: Mapping[Role, Sequence[Any]]) -> None:
        """
        Raises:
            UserError: there are pictures, and no encoder for them.
        """
        if len(placed["read"]) and self.pisces.config.understanding_encoder is None:
            raise UserError(
                "this model reads no pictures (the vision tower of BLIP3-o, Qwen2.5-VL's, is not part of this "
                "project): ask it about text alone, or draw"
            )
        if len(placed["draw"]) and "generation_encoder" not in (self.params or {}):
            raise UserError(
                "this model came without its generation encoder, which pictures drawn before need: draw from text alone"
            )

    def _pool(self, role: Role, placed: Sequence[tuple[int, int, Picture]]) -> Pool:
        """Pictures at (row, position), in a multiple of `batch_size` slots."""
        slots = -(-len(placed) // self.batch_size) * self.batch_size
        size, stretch = self._layout.size(role), role == "read" and self._layout.read_stretch
        images = np.zeros((slots, size, size, 3), np.uint8)
        row, start, valid = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.arange(slots) < len(placed)
        for i, (b, at, picture) in enumerate(placed):
            images[i], row[i], start[i] = picture.square(size, stretch), b, at
        return Pool(*map(jnp.asarray, (images, row, start, valid)))


def _with_guidance(flow: Any, guidance: float | None, flag: str) -> Any:
    try:
        return flow if guidance is None else dataclasses.replace(flow, guidance=float(guidance))
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)]) if len(x) < size else x


def load_model(
    workdir: Path,
    run: str = "",
    batch_size: int = 64,
    mesh: Mesh | None = None,
    dtype: str = "",
    stay: bool = True,
) -> Model:
    """The model of a finished unified run (by default the last one), with the decoder that its config names; or the
    released model of BLIP3-o in the folder `workdir`.

    Args:
        mesh, stay: as `Model` takes them.
        dtype: to store parameters and to compute in; "": as the run says.

    Raises:
        UserError: there is no such run, or it cannot be loaded.
    """
    config = open_config(workdir, run)
    if dtype:
        config.compute_dtype = dtype
    tokenizer = load_tokenizer(config, workdir)
    places = Places(mesh, dtype, stay)
    params = load_parts(workdir, config, tokenizer, places)
    decoder, decoder_params, how = load_decoder(workdir, config, places)
    return Model(config, tokenizer, params, decoder, decoder_params, how, batch_size, mesh, stay)
