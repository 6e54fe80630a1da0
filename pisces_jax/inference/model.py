"""A trained model that reads and draws: what the commands, the evaluation and the notebooks use."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict
from tqdm import tqdm

from pisces_jax.data.example import Example, Picture, Role, Text
from pisces_jax.data.packing.layout import Layout, lay_out
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.inference.decode import PictureDecoder
from pisces_jax.inference.rollout import Pool, Prompts, Rollout
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT
from pisces_jax.models.layers import apply
from pisces_jax.models.pisces import Pisces
from pisces_jax.training import config as settings
from pisces_jax.training.checkpoints import is_finished, load_part, read_config
from pisces_jax.training.programs import program_class
from pisces_jax.training.tokenizer import load_tokenizer
from pisces_jax.utils.errors import UserError

NOISE = 1  # folded into a drawing's key for the flow head's noise


@dataclasses.dataclass(frozen=True)
class Drawing:
    """The result of one prompt: the description that the model wrote first ("" if it drew directly), the visual vectors
    float32 [m, C], and the picture uint8 [S, S, 3]."""

    description: str
    vectors: np.ndarray
    image: np.ndarray


def find_run(workdir: Path) -> str:
    """The finished unified run that no other run starts from; of several, the one that finished last.

    Raises:
        UserError: there is no finished unified run.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist: give the folder of a finished training")
    runs = {}
    for path in sorted(workdir.glob("*/config.json")):
        config = read_config(path.parent)
        if program_class(config).reads_and_draws(config) and is_finished(path.parent):
            runs[path.parent.name] = config
    started_from = {source for config in runs.values() for source in config.init_from.values()}
    last = [name for name in runs if name not in started_from]
    if not last:
        raise UserError(f"--workdir={workdir} holds no finished unified run: train one there first")
    return max(last, key=lambda name: (workdir / name / "checkpoints").stat().st_mtime)


class Model:
    """Reads and draws in batches of a fixed size, so that few programs are compiled; results do not depend on the
    batch."""

    def __init__(
        self,
        config: ConfigDict,
        tokenizer: Tokenizer,
        params: Any,
        decoder: PictureDecoder | None,
        decoder_params: Any,
        flow: FlowConfig | None,
        batch_size: int = 64,
    ) -> None:
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
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
        for first in self._batches(len(questions), "reading"):
            some = questions[first : first + self.batch_size]
            tokens = self._answer(self.params, self._prompts(some), self._keys(seed, first), max_tokens, temperature)
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
    ) -> list[Drawing]:
        """A picture for each prompt, in which pictures to read and pictures drawn before may stand (role "draw").

        With `describe` the model first writes, sampled at `temperature`, a description of its own (at most `max_tokens`
        tokens), and then draws from prompt and description in the same rollout.

        Args:
            guidance, vector_guidance: scales of the decoder's and of the flow head's guidance; None: the config's.

        Raises:
            UserError: guidance of a network that was trained without dropped conditions, or of a regression head.
        """
        if vector_guidance is not None and not self.pisces.config.flow:
            raise UserError("--vector_guidance is of the flow heads, and this model's head is regression: leave it out")
        flow = _with_guidance(self.vector_flow, vector_guidance, "--vector_guidance")
        drawings: list[Drawing] = []
        for first in self._batches(len(prompts), "drawing"):
            some = prompts[first : first + self.batch_size]
            keys = self._keys(seed, first)
            tokens, vectors = self._draw(
                self.params, self._prompts(some), keys, max_tokens if describe else 0, temperature, flow
            )  # fmt: skip
            images = self.decode(vectors, seed=seed, first=first, guidance=guidance)
            drawings += [
                Drawing(self._text(t), v, i)
                for t, v, i in zip(np.asarray(tokens)[: len(some)], np.asarray(vectors), images, strict=False)
            ]
        return drawings

    def features(self, images: UInt8[np.ndarray, "N S S 3"]) -> Float[np.ndarray, "N m C"]:
        """The true visual vectors of pictures of the generation encoder's size."""
        parts = []
        for first in range(0, len(images), self.batch_size):
            some = images[first : first + self.batch_size]
            parts.append(np.asarray(self._features(self.params, _pad(some, self.batch_size)))[: len(some)])
        return np.concatenate(parts)

    def decode(
        self, vectors: Any, *, seed: int = 0, first: int = 0, guidance: float | None = None
    ) -> UInt8[np.ndarray, "N S S 3"]:
        """Pictures from visual vectors [N, m, C]; picture i's noise comes from (seed, first + i)."""
        if self._decoder is None or self.flow is None:
            raise UserError("this run names no decoder (config key decoder): it can answer but not draw")
        flow = _with_guidance(self.flow, guidance, "--guidance")
        images = []
        for start in range(0, len(vectors), self.batch_size):
            some = vectors[start : start + self.batch_size]
            keys = self._keys(seed + 1_000_003, first + start)
            padded = _pad(np.asarray(some), self.batch_size)
            images.append(np.asarray(self._decode(self.decoder_params, padded, keys, flow))[: len(some)])
        return np.concatenate(images)

    def _batches(self, number: int, doing: str) -> Iterable[int]:
        """Where each batch starts; shows progress where there are several."""
        starts = range(0, number, self.batch_size)
        return tqdm(starts, desc=doing, unit="batch", leave=False, disable=len(starts) < 3, dynamic_ncols=True)

    def _keys(self, seed: int, first: int) -> Any:
        key = jax.random.key(seed)
        return jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(first, first + self.batch_size))

    def _text(self, tokens: np.ndarray) -> str:
        return self.tokenizer.decode([int(t) for t in tokens if t >= 0])

    def _prompts(self, some: Sequence[Sequence[Text | Picture]]) -> Prompts:
        laid = [lay_out(Example(tuple(parts), "prompt"), self.tokenizer, self._layout, prompt=True) for parts in some]
        ids = [row.tokens for row in laid]
        # Lengths are rounded up to powers of two, so that few programs are compiled.
        longest = max(32, *map(len, ids))
        tokens = np.full((self.batch_size, 1 << (longest - 1).bit_length()), self.tokenizer.pad, np.int32)
        length = np.ones(self.batch_size, np.int32)
        placed: dict[Role, list[tuple[int, int, Picture]]] = {"read": [], "draw": []}
        for b, row in enumerate(ids):
            tokens[b, : len(row)], length[b] = row, len(row)
            for found in laid[b].pictures:
                placed[found.role].append((b, found.start, found.picture))
        read, drawn = (self._pool(role, pictures) for role, pictures in placed.items())
        return Prompts(jnp.asarray(tokens), jnp.asarray(length), read, drawn)

    def _pool(self, role: Role, placed: Sequence[tuple[int, int, Picture]]) -> Pool:
        """Pictures at (row, position), in a multiple of `batch_size` slots."""
        slots = -(-len(placed) // self.batch_size) * self.batch_size
        size, stretch = self._layout.size(role), role == "read" and self._layout.read_stretch
        images = np.zeros((slots, size, size, 3), np.uint8)
        row, start, valid = np.zeros(slots, np.int32), np.zeros(slots, np.int32), np.arange(slots) < len(placed)
        for i, (b, at, picture) in enumerate(placed):
            images[i], row[i], start[i] = picture.square(size, stretch), b, at
        return Pool(*map(jnp.asarray, (images, row, start, valid)))


def _with_guidance(flow: FlowConfig, guidance: float | None, flag: str) -> FlowConfig:
    try:
        return flow if guidance is None else dataclasses.replace(flow, guidance=float(guidance))
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from error


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), x.dtype)]) if len(x) < size else x


def load_model(workdir: Path, run: str = "", batch_size: int = 64) -> Model:
    """The model of a finished unified run (by default the last one), with the decoder that its config names.

    Raises:
        UserError: there is no such run, or it cannot be loaded.
    """
    run = run or find_run(workdir)
    config = read_config(workdir / run)
    if not program_class(config).reads_and_draws(config):
        raise UserError(f"{workdir / run} is a {config.program} run: reading and drawing need a unified one")
    tokenizer = load_tokenizer(config, workdir)
    names = settings.pisces_config(config, tokenizer.vocab_size).parts
    params = {part: jax.tree.map(jnp.asarray, load_part(workdir, run, part)) for part in names}
    decoder, decoder_params, flow = load_decoder(workdir, config)
    return Model(config, tokenizer, params, decoder, decoder_params, flow, batch_size)


def load_decoder(workdir: Path, config: ConfigDict) -> tuple[PictureDecoder | None, Any, FlowConfig | None]:
    """The decoder of a unified run, its weights by part, and how it samples."""
    decoder, flow = make_decoder(workdir, config)
    if decoder is None:
        return None, None, None
    parts = ("decoder", "autoencoder") if decoder.autoencoder else ("decoder",)
    run = settings.decoder_run(config)
    return decoder, {part: jax.tree.map(jnp.asarray, load_part(workdir, run, part)) for part in parts}, flow


def make_decoder(workdir: Path, config: ConfigDict) -> tuple[PictureDecoder | None, FlowConfig | None]:
    """The decoder of a unified run and how it samples, without its weights."""
    run = settings.decoder_run(config)
    if not run:
        return None, None
    decoder_config = config if run == config.name else read_config(workdir / run)
    dtype = jnp.dtype(decoder_config.compute_dtype)
    latent = settings.autoencoder_config(decoder_config)
    decoder = PictureDecoder(
        DiT(settings.dit_config(decoder_config), dtype), Autoencoder(latent, dtype) if latent else None
    )
    return decoder, settings.flow_config(decoder_config)
