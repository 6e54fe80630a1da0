"""The folder of Emu2-Gen's decoder, as diffusers writes it: `unet/`, `vae/` and `scheduler/`."""

import os

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.unet import UNetConfig
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.blip3o import DECODER
from pisces_jax.weights.folder import Folder


def decoder_sources(source: str) -> dict[str, str]:
    """The folders of the decoder's parts."""
    return {part: os.path.join(source, name) for part, name in (("decoder", "unet"), ("autoencoder", "vae"))}


def open_decoder(source: str, width: int) -> dict[str, Folder]:
    """Its parts, opened, for vectors of `width` numbers.

    Raises:
        UserError: it is another decoder, or draws from vectors of another width.
    """
    opened = {part: Folder.open(folder) for part, folder in decoder_sources(source).items()}
    network, latent = (opened[part].settings for part in ("decoder", "autoencoder"))
    for part, kind, found in (("unet", UNetConfig, network), ("vae", AutoencoderConfig, latent)):
        if not isinstance(found, kind):
            raise UserError(f"{source}: {part}/ is not part of Emu2-Gen's decoder: give BLIP3-o's {DECODER} folder")
    if network.condition_width != width:
        raise UserError(
            f"{source} draws from vectors of {network.condition_width} numbers and model.generation_encoder gives "
            f"{width}: name a decoder of the same encoder in config key decoder"
        )
    if network.channels != latent.latent_channels:
        raise UserError(
            f"{source}: its U-Net makes {network.channels} channels and its autoencoder takes "
            f"{latent.latent_channels}: take both from one folder"
        )
    return opened
