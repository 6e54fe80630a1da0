"""Sample pictures during training: what the run makes of the first held-out examples, below the true pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from pisces_jax.data.example import Picture
from pisces_jax.data.images import fit
from pisces_jax.inference.decode import PictureDecoder
from pisces_jax.inference.loading import load_decoder, make_decoder
from pisces_jax.inference.model import Model
from pisces_jax.models.vit import pooled_features
from pisces_jax.training import input
from pisces_jax.training.loop import Sampler
from pisces_jax.training.optimizer import join
from pisces_jax.training.programs.base import Program
from pisces_jax.training.programs.reconstruction import Reconstruction
from pisces_jax.training.step import State
from pisces_jax.utils.errors import UserError


def picture_grid(rows: Sequence[Sequence[np.ndarray] | np.ndarray], scale: int = 3, gap: int = 4) -> np.ndarray:
    """Rows of pictures of one size on white; each pixel becomes `scale` pixels wide."""
    size = rows[0][0].shape[0] * scale
    cell = size + gap
    sheet = np.full((len(rows) * cell + gap, max(map(len, rows)) * cell + gap, 3), 255, np.uint8)
    for r, row in enumerate(rows):
        for c, image in enumerate(row):
            big = image.repeat(scale, axis=0).repeat(scale, axis=1)
            sheet[gap + r * cell : gap + r * cell + size, gap + c * cell : gap + c * cell + size] = big
    return sheet


def make_sampler(config: ConfigDict, workdir: Path, tokenizer: Any, program: Program) -> Sampler:
    """A function that draws `log.samples` held-out pictures (first row: the true ones) into a PNG, with the averaged
    weights where there are any.

    Raises:
        UserError: there is nothing to sample from, or no decoder to draw with.
    """
    makers = {"drawings": _drawer, "reconstructions": _reconstructor}
    if program.samples is None:
        raise UserError(f"log.samples_every: run {config.name} draws nothing: set it to 0")
    return makers[program.samples](config, workdir, tokenizer, program)


def _save(grid: np.ndarray, path: Path) -> np.ndarray:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(grid).save(path)
    return grid


def _weights(state: State) -> Any:
    return join(state.ema or state.trained, state.frozen)


def _reconstructor(config: ConfigDict, workdir: Path, tokenizer: Any, program: Any) -> Sampler:
    model: Reconstruction = program.reconstruction
    sources = input.evaluation_sources(config)
    examples = [sources[0][i] for i in range(min(config.log.samples, len(sources[0])))]
    pictures = [next(p for p in e.parts if isinstance(p, Picture)).array() for e in examples]
    decoder = PictureDecoder(model.decoder, model.autoencoder)
    truth = np.stack([fit(p, decoder.size) for p in pictures])
    keys = jax.random.split(jax.random.key(0), len(truth))

    @jax.jit
    def reconstruct(params: Any, images: Any) -> Any:
        vectors = pooled_features(model.vectors(params, images), model.pool)
        return decoder.decode(params, vectors, keys, model.flow)

    def sample(state: State, path: Path) -> np.ndarray:
        return _save(picture_grid([truth, np.asarray(reconstruct(_weights(state), truth))]), path)

    return sample


def _drawer(config: ConfigDict, workdir: Path, tokenizer: Any, program: Any) -> Sampler:
    sources = input.evaluation_sources(config)
    decoder, flow = make_decoder(workdir, config)
    if decoder is None:
        raise UserError("log.samples_every needs a decoder to draw with: name its run in config key decoder")
    own = config.train_decoder  # it changes with the run
    drawn = [s for s in sources if any(isinstance(p, Picture) and p.role == "draw" for p in s[0].parts)]
    if not drawn:
        raise UserError("log.samples_every: no source of data.evaluate has pictures to draw")
    examples = [drawn[i % len(drawn)][i // len(drawn)] for i in range(config.log.samples)]
    prompts, truth = [], []
    for example in examples:
        at = next(i for i, p in enumerate(example.parts) if isinstance(p, Picture) and p.role == "draw")
        prompts.append(example.parts[:at])
        truth.append(example.parts[at].array())
    decoder_params = None if own else load_decoder(workdir, config)[1]
    model = Model(config, tokenizer, None, decoder, decoder_params, flow, batch_size=len(prompts))
    truth = [fit(image, model.drawn_size) for image in truth]

    def sample(state: State, path: Path) -> np.ndarray:
        model.params = _weights(state)
        if own:
            model.decoder_params = model.params
        drawings = model.draw(prompts, describe=False)
        return _save(picture_grid([truth, [d.image for d in drawings]]), path)

    return sample
