"""BLIP3-o's released folders as runs of this project: their config, and the decoder that lies beside their weights.

The config is that of a run that starts from the folder and does not train, so `load_model` opens both alike. The facts
are those of the published code (docs/blip3o.md).
"""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.data.instructions import BLIP3O_INSTRUCTION
from pisces_jax.inference.decode import DiffusionDecoder
from pisces_jax.losses.diffusion import DiffusionConfig
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.unet import UNet
from pisces_jax.models.vit import ViTConfig
from pisces_jax.training import config as run_settings
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.blip3o import DECODER, PARTS
from pisces_jax.weights.diffusion_decoder import open_decoder
from pisces_jax.weights.folder import Folder
from pisces_jax.weights.sizes import EVA_CLIP_E_PLUS_448, settings
from pisces_jax.weights.tensors import read_json

POOL = 4  # stride of the pooling of EVA-CLIP-E-plus features
# Thirty steps with guidance 3; the network was trained on a grid of 1,000 times.
VECTOR_FLOW = dict(grid=1000, drop=0.1, steps=30, guidance=3.0)
# What a scheduler's file must say: noise is predicted, and steps are taken as Emu2-Gen takes them.
_SCHEDULER = dict(
    _class_name="EulerDiscreteScheduler", beta_schedule="scaled_linear", prediction_type="epsilon",
    timestep_spacing="leading", interpolation_type="linear", use_karras_sigmas=False, use_exponential_sigmas=False,
    use_beta_sigmas=False, trained_betas=None, timestep_type="discrete", rescale_betas_zero_snr=False,
    final_sigmas_type="zero",
)  # fmt: skip


def is_released(folder: Path) -> bool:
    """Whether a folder holds BLIP3-o's checkpoint, published or as `convert import` writes it; and not runs."""
    if all((folder / part / "config.json").exists() for part in PARTS):
        return True
    return (folder / "config.json").exists() and "model_type" in read_json(folder / "config.json")


def is_released_config(config: ConfigDict) -> bool:
    """Whether a config is a `released_config`: what it reads is in no run."""
    return not config.data.train


def released_config(folder: Path) -> ConfigDict:
    """The config of a run that is the released model.

    Raises:
        UserError: it is not BLIP3-o's, or files are missing or damaged.
    """
    source = f"{folder}{os.sep}"
    opened = {part: Folder.open(source, part) for part in PARTS}
    language, generator = (opened[part].settings for part in ("language_model", "generator"))
    if not isinstance(generator, DiTConfig):
        raise UserError(f"{folder} is not a checkpoint of BLIP3-o: give its folder, or the --workdir of a training")
    decoder = folder / DECODER
    return run_settings.run_config(
        name=folder.name, program="unified", compute_dtype="bfloat16",
        model=dict(
            language_model=settings(language), generation_encoder=settings(_encoder(generator)), pool=POOL,
            generator=_stated(generator), fed_vectors=False,
        ),
        init_from=dict.fromkeys(PARTS, source),
        decoder=f"{decoder}" if decoder.is_dir() else "",
        data=dict(tokenizer=f"{opened['language_model'].path}{os.sep}", row_length=1024),
        vector_flow=VECTOR_FLOW, sampling=dict(instruction=BLIP3O_INSTRUCTION),
    )  # fmt: skip


def _encoder(generator: DiTConfig) -> ViTConfig:
    """The tower whose pooled vectors the generator makes: EVA-CLIP-E-plus, at a width and a size that fit its map."""
    size = EVA_CLIP_E_PLUS_448.patch_size * POOL * generator.size
    return dataclasses.replace(EVA_CLIP_E_PLUS_448, width=generator.channels, image_size=size)


def _stated(generator: DiTConfig) -> dict[str, Any]:
    """What `model.generator` says itself; the rest follows from the encoder and the language model."""
    implied = ("size", "patch_size", "channels", "condition_width", "condition_vectors")
    return {k: v for k, v in dataclasses.asdict(generator).items() if k not in implied}


def decoder_of_folder(source: str, config: ConfigDict) -> tuple[DiffusionDecoder, DiffusionConfig]:
    """The decoder in a folder with `unet/`, `vae/` and `scheduler/`, for the vectors of `config`'s model.

    The autoencoder computes in at least float32: its values are too large for float16, and it draws sharper so.

    Raises:
        UserError: it is another decoder, or makes pictures of vectors of another width.
    """
    opened = open_decoder(source, run_settings.vit_config(config, "generation_encoder").output_width)
    network, latent = (opened[part].settings for part in ("decoder", "autoencoder"))
    dtype = jnp.dtype(config.compute_dtype)
    wide = jnp.promote_types(dtype, jnp.float32)
    return DiffusionDecoder(UNet(network, dtype), Autoencoder(latent, wide)), read_scheduler(source)


def read_scheduler(source: str) -> DiffusionConfig:
    """
    Raises:
        UserError: the scheduler is another one than Emu2-Gen's, or its file is missing or damaged.
    """
    path = Path(source, "scheduler", "scheduler_config.json")
    values = read_json(path)
    for key, wanted in _SCHEDULER.items():
        if values.get(key, wanted) != wanted:
            raise UserError(f"{path} says {key} {values[key]!r}, which is not supported: take the one with {wanted!r}")
    try:
        return DiffusionConfig(
            levels=int(values["num_train_timesteps"]), beta_start=float(values["beta_start"]),
            beta_end=float(values["beta_end"]), offset=int(values["steps_offset"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} has a missing or invalid value ({error!r}): download it again") from error
