"""From a picture through its pooled generation features back to the picture: what several programs train."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from pisces_jax.losses import objectives
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT, DiTConfig
from pisces_jax.models.layers import apply
from pisces_jax.models.vit import ViT
from pisces_jax.training import config as settings
from pisces_jax.training import flops
from pisces_jax.training.programs.base import Params, example_keys
from pisces_jax.utils.errors import UserError


def to_signal(images: Array) -> Array:
    """uint8 pixels to the decoder's range, -1..1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(signal: Array) -> Array:
    """The inverse of `to_signal`, clipped."""
    return jnp.round((jnp.clip(signal, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Generation encoder and decoder. The decoder makes the picture's pixels, or the latents of an autoencoder.

    Attributes:
        pool: stride of the encoder's average pooling.
        feature_noise: standard deviation of the noise on the features that the decoder is trained on.
    """

    encoder: ViT
    decoder: DiT
    pool: int
    flow: FlowConfig
    feature_noise: float
    autoencoder: Autoencoder | None = None

    @staticmethod
    def parts(config: ConfigDict) -> tuple[str, ...]:
        """The encoder, the decoder, and the autoencoder whose latents it makes."""
        return ("generation_encoder", "decoder", *(("autoencoder",) if "autoencoder" in config.model else ()))

    @classmethod
    def from_config(cls, config: ConfigDict) -> "Reconstruction":
        """
        Raises:
            UserError: encoder, decoder and autoencoder that do not fit one another.
        """
        dtype = jnp.dtype(config.compute_dtype)
        dit: DiTConfig = settings.dit_config(config)
        encoder = ViT(settings.vit_config(config, "generation_encoder"), dtype)
        latent = settings.autoencoder_config(config)
        pixels = dit.size * (latent.downscale if latent else 1)
        if encoder.config.image_size != pixels:
            raise UserError(
                f"model.decoder.size {dit.size} makes pictures of {pixels} pixels and "
                f"model.generation_encoder.image_size is {encoder.config.image_size}: make them equal, as a decoder "
                "learns from the pictures that its encoder sees"
            )
        if latent and latent.latent_channels != dit.channels:
            raise UserError(
                f"model.decoder.channels is {dit.channels} and model.autoencoder has {latent.latent_channels} latent "
                "channels: make them equal"
            )
        return cls(
            encoder, DiT(dit, dtype), config.model.pool, settings.flow_config(config), config.loss.feature_noise,
            Autoencoder(latent, dtype) if latent else None,
        )  # fmt: skip

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Boxed parameters of the encoder, the decoder and the autoencoder."""
        k1, k2, k3 = jax.random.split(key, 3)
        e, d = self.encoder.config, self.decoder.config
        images = jnp.zeros((1, e.image_size, e.image_size, 3), jnp.uint8)
        x = jnp.zeros((1, d.size, d.size, d.channels))
        condition = jnp.zeros((1, d.condition_vectors, d.condition_width))
        params = {
            "generation_encoder": self.encoder.init(k1, images)["params"],
            "decoder": self.decoder.init(k2, x, jnp.zeros(1), condition, jnp.ones(1, bool))["params"],
        }
        if self.autoencoder is not None:
            params["autoencoder"] = self.autoencoder.init(k3, to_signal(images))["params"]
        return params

    def signal(self, params: Params, images: Array) -> Array:
        """What the decoder is to make of pictures uint8 [B, S, S, 3]: pixels as -1..1, or latents, detached."""
        if self.autoencoder is None:
            return to_signal(images)
        with jax.named_scope("autoencoder"):
            latents = apply(self.autoencoder, params["autoencoder"], to_signal(images), method="encode")
        return jax.lax.stop_gradient(latents)

    def vectors(self, params: Params, images: Array) -> Array:
        """The encoder's vectors, before pooling."""
        with jax.named_scope("generation_encoder"):
            return apply(self.encoder, params["generation_encoder"], images)

    def errors(self, params: Params, features: Array, signal: Array, ids: Array, key: jax.Array) -> Array:
        """Flow-matching error of each picture [B], as `signal` gives it, given its pooled features [B, m, C]."""
        if self.feature_noise:
            noise = jax.vmap(lambda k: jax.random.normal(k, features.shape[1:]))
            features = features + self.feature_noise * noise(example_keys(key, ids, "feature_noise"))
        with jax.named_scope("decoder"):
            return objectives.flow_matching(
                lambda *a: apply(self.decoder, params["decoder"], *a),
                signal, features, example_keys(key, ids, "flow"), self.flow,
            )  # fmt: skip

    def decoding_flops(self, pictures: int, latents_cached: bool = False) -> dict[str, float]:
        """Model FLOPs of the decoder's forward pass, and of the autoencoder's where latents are not cached."""
        forward = {"decoder": pictures * flops.dit(self.decoder.config)}
        if self.autoencoder is not None and not latents_cached:
            forward["autoencoder"] = pictures * flops.autoencoder(self.autoencoder.config, self.decoder.config.size)
        return forward
