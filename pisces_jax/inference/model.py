"""A trained model that reads and draws: what the commands, the evaluation and the notebooks use."""

import contextlib
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.inference.decode import Decoder
from pisces_jax.inference.loading import Places, load_decoder, load_parts, open_config
from pisces_jax.inference.prompts import PromptMaker
from pisces_jax.inference.rollout import Prompts, Rollout, Rows
from pisces_jax.inference.sampling import Choices, TextSampling
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
STEPS = 32  # tokens between two looks at stop texts; room for text is made in multiples of it
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

        def write(params: Any, rows: Rows, keys: Any, how: Choices, steps: int) -> Any:
            stop = (tokenizer.eos,)
            return rollout.sample_text(params, rows, keys, how, steps=steps, stop=stop, allowed=jnp.asarray(plain))

        def draw(params: Any, prompts: Prompts, keys: Any, how: Choices, steps: int, flow: FlowConfig) -> Any:
            rows = rollout.prefill(params, prompts, prompts.tokens.shape[1] + steps + c.draw_positions + 2)
            tokens = jnp.zeros((prompts.tokens.shape[0], 0), jnp.int32)
            if steps:
                stop = tokenizer.begin_image, tokenizer.eos
                rows, tokens = rollout.sample_text(
                    params, rows, keys, how, steps=steps, stop=stop, allowed=jnp.asarray(allowed_draw)
                )
            # The noise has keys of its own, which do not depend on how much text came before.
            noise = jax.vmap(lambda k: jax.random.fold_in(k, NOISE))(keys)
            return tokens, rollout.draw_vectors(params, rows, tokenizer.begin_image, noise, flow)[1]

        # `write` continues texts and takes the memory of the rows that it is given.
        self.prefill = jax.jit(rollout.prefill, static_argnums=2)
        self.write = jax.jit(write, static_argnums=4, donate_argnums=1)
        self._draw = jax.jit(draw, static_argnums=(4, 5))
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

    def resized(self, batch_size: int) -> "Model":
        """The same model, with the same parameters, in batches of another size."""
        if batch_size == self.batch_size:
            return self
        parts = self.params, self._decoder, self.decoder_params, self.flow
        return Model(self.config, self.tokenizer, *parts, batch_size, self.mesh, self._stay)

    @property
    def picture_size(self) -> int:
        """Side of the pictures that it draws, in pixels; 0 if it draws none."""
        return self._decoder.size if self._decoder is not None else 0

    @property
    def prompt_maker(self) -> PromptMaker:
        known = "generation_encoder" in (self.params or {})
        return PromptMaker(self.pisces.config, self.tokenizer, self._layout, self.batch_size, known)

    def on_mesh(self) -> Any:
        return contextlib.nullcontext() if self.mesh is None else jax.set_mesh(self.mesh)

    def there(self, params: Any) -> Any:
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
        seeds: Sequence[int] | None = None,
        **how: Any,
    ) -> list[str]:
        """The model's text after each question, a sequence of pictures to read and texts.

        Args:
            seed, seeds: as `draw` takes them; for a temperature above 0.
            how: more of `sampling.TextSampling`.
        """
        sampling = TextSampling(max_tokens, temperature, **how)
        answers: list[str] = []
        params = self.there(self.params)
        for first in self._batches(len(questions), "reading"):
            some = questions[first : first + self.batch_size]
            keys = self.keys(seed, first, seeds)
            with self.on_mesh():
                answers += self._texts(params, self.prompt_maker.prompts(some), keys, sampling, len(some))
        return answers

    def _texts(self, params: Any, prompts: Prompts, keys: Any, sampling: TextSampling, number: int) -> list[str]:
        """The texts of the first `number` rows: written at once, or, where texts stop it, in steps between which they
        are looked for."""
        most = _rounded(sampling.max_tokens)
        rows = self.prefill(params, prompts, prompts.tokens.shape[1] + most + 1)
        how: list[TextSampling | None] = [*[sampling] * number, *[None] * (self.batch_size - number)]
        tokens = np.zeros((number, 0), np.int32)
        while True:
            rows, new = self.write(params, rows, keys, Choices.of(how), STEPS if sampling.stop else most)
            tokens = np.concatenate([tokens, np.asarray(new)[:number]], axis=1)
            texts = [sampling.cut(self.text(row)) for row in tokens]
            how = [None if b >= number or texts[b][1] else sampling for b in range(self.batch_size)]
            if not (np.asarray(rows.going) & [row is not None for row in how]).any():
                return [text for text, _ in texts]

    def draw(
        self,
        prompts: Sequence[Sequence[Text | Picture]],
        *,
        describe: bool,
        max_tokens: int = 96,
        temperature: float = 1.0,
        guidance: float | None = None,
        steps: int | None = None,
        solver: str | None = None,
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
            steps, solver: of the decoder's sampler (`FlowConfig`).
            seed: of all pictures; each has noise of its own, by its place among the prompts.
            seeds: of each picture, in place of `seed`: the picture that its prompt alone gives with that seed.
            turn_ends: whether the tokenizer's `before_picture` is written, as in training.

        Raises:
            UserError: guidance of a network that was trained without dropped conditions, or of a regression head.
        """
        if vector_guidance is not None and not self.pisces.config.flow:
            raise UserError("--vector_guidance is of the flow heads, and this model's head is regression: leave it out")
        flow = _changed(self.vector_flow, "vector_guidance", guidance=vector_guidance)
        if not prompts:
            return []
        texts, made = [], []
        params = self.there(self.params)
        with self.on_mesh():
            for first in self._batches(len(prompts), "drawing"):
                some = prompts[first : first + self.batch_size]
                closed = not describe and turn_ends
                given = self.prompt_maker.prompts(some, self.tokenizer.before_picture if closed else ())
                keys = self.keys(seed, first, seeds)
                how = [TextSampling(max_tokens, temperature) if b < len(some) else None for b in range(self.batch_size)]
                most = _rounded(max_tokens) if describe else 0
                tokens, vectors = self._draw(params, given, keys, Choices.of(how), most, flow)
                texts += [self.text(t) for t in np.asarray(tokens)[: len(some)]]
                made.append(np.asarray(vectors)[: len(some)])
            null = self._null(params, flow)
        del params
        vectors = np.concatenate(made)
        images = self.decode(vectors, seed=seed, seeds=seeds, guidance=guidance, steps=steps, solver=solver, null=null)
        return [Drawing(*drawn) for drawn in zip(texts, vectors, images, strict=True)]

    def _null(self, params: Any, flow: FlowConfig) -> Any:
        """The model's own vectors [1, m, C] for a prompt of one space, without a chat template: what Emu2-Gen's decoder
        takes for no prompt. None for a decoder that takes none."""
        if self._decoder is None or not self._decoder.takes_null:
            return None
        if flow not in self._nulls:
            t = self.tokenizer
            start = [t.bos] if list(t.opening) == [t.bos] else []
            prompts = self.prompt_maker.rows([np.array([*start, *t.encode(" ")], np.int32)])
            how = Choices.of([None] * self.batch_size)
            self._nulls[flow] = np.asarray(self._draw(params, prompts, self.keys(NULL_SEED, 0), how, 0, flow)[1])[:1]
        return self._nulls[flow]

    def features(self, images: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N m C"]:
        """The true visual vectors of pictures of the generation encoder's size."""
        self.prompt_maker.check_pictures({"read": (), "draw": list(images)})
        parts, params = [], self.there(self.params)
        for first in range(0, len(images), self.batch_size):
            some = images[first : first + self.batch_size]
            with self.on_mesh():
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
        steps: int | None = None,
        solver: str | None = None,
        null: Any = None,
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Pictures from visual vectors [N, m, C]; picture i's noise comes from (seed, first + i), or from its own of
        `seeds`.

        Args:
            null: the vectors of no prompt, for a decoder that takes them; by default they are made.
        """
        if self._decoder is None or self.flow is None:
            raise UserError("this run names no decoder (config key decoder): it can answer but not draw")
        if solver is not None and not isinstance(self.flow, FlowConfig):
            raise UserError("--solver is of decoders that follow a flow, and this one removes noise: leave it out")
        how = _changed(self.flow, "guidance", guidance=guidance, steps=steps, solver=solver)
        if null is None and self._decoder.takes_null:
            with self.on_mesh():
                null = self._null(self.there(self.params), self.vector_flow)
        params = self.there(self.decoder_params)
        images = []
        for start in self._batches(len(vectors), "decoding"):
            some = vectors[start : start + self.batch_size]
            keys = self.keys(seed, first + start, seeds, DECODING)
            with self.on_mesh():
                made = self._decode(params, _pad(np.asarray(some), self.batch_size), keys, how, null)
                images.append(np.asarray(made)[: len(some)])
        return np.concatenate(images)

    def _batches(self, number: int, doing: str) -> Iterable[int]:
        """Where each batch starts; shows progress where there are several."""
        starts = range(0, number, self.batch_size)
        return tqdm(starts, desc=doing, unit="batch", leave=False, disable=len(starts) < 3, dynamic_ncols=True)

    def keys(self, seed: int, first: int, seeds: Sequence[int] | None = None, added: int = 0) -> Any:
        """The keys of a batch: of (seed, place), or of (its own seed, 0)."""
        if seeds is None:
            key = jax.random.key(seed + added)
            return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + self.batch_size))
        own = [*seeds[first : first + self.batch_size]]
        own += [0] * (self.batch_size - len(own))
        return jax.vmap(lambda s: jax.random.fold_in(jax.random.key(s), 0))(jnp.asarray(own) + added)

    def text(self, tokens: Iterable[int]) -> str:
        """The text of a row of tokens; -1 is none."""
        return self.tokenizer.decode([int(t) for t in tokens if t >= 0])


def _changed(flow: Any, flag: str, **values: Any) -> Any:
    try:
        return dataclasses.replace(flow, **{name: value for name, value in values.items() if value is not None})
    except ValueError as error:
        raise UserError(f"--{flag}: {error}") from error


def _rounded(tokens: int) -> int:
    return -(-tokens // STEPS) * STEPS


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
