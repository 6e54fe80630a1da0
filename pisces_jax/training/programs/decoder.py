"""Decoder training: flow matching from frozen pooled generation features; no language model takes part."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from pisces_jax.losses import objectives
from pisces_jax.models.vit import pooled_features
from pisces_jax.training import config as settings
from pisces_jax.training import flops
from pisces_jax.training.programs.base import Batch, CachedInput, Losses, Params, Spec
from pisces_jax.training.programs.pictures import PicturesProgram
from pisces_jax.training.programs.reconstruction import Reconstruction


@dataclasses.dataclass(frozen=True)
class DecoderProgram(PicturesProgram):
    """The decoder learns to make a picture from its pooled features, which the frozen generation encoder gives."""

    reconstruction: Reconstruction
    weights: Mapping[str, float]
    targets: ClassVar[tuple[str, ...]] = ("generation_encoder",)

    @property
    def samples(self) -> Literal["reconstructions"]:
        return "reconstructions"

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> Self:
        return cls(Reconstruction.from_config(config), {"reconstruction": config.loss.reconstruction})

    @classmethod
    def parts(cls, config: ConfigDict) -> tuple[str, ...]:
        return Reconstruction.parts(config)

    @classmethod
    def cached_inputs(cls, config: ConfigDict) -> dict[str, CachedInput]:
        """Pooled features, and the latents of an autoencoder."""
        inputs = {"features": CachedInput("generation_encoder", "", {"pool": config.model.pool})}
        if "autoencoder" in config.model:
            size = settings.vit_config(config, "generation_encoder").image_size
            inputs["latents"] = CachedInput("autoencoder", "latents", {"image_size": size})
        return inputs

    @property
    def picture_size(self) -> int:
        return self.reconstruction.encoder.config.image_size

    def cached_spec(self, config: ConfigDict) -> Spec:
        r, size = self.reconstruction, config.batch_size
        c = r.decoder.config
        spec = {"features": jax.ShapeDtypeStruct((size, c.condition_vectors, c.condition_width), jnp.float32)}
        if r.autoencoder is not None:
            spec["latents"] = jax.ShapeDtypeStruct((size, c.size, c.size, c.channels), jnp.float32)
        return spec

    def init(self, key: jax.Array) -> dict[str, Any]:
        return self.reconstruction.init(key)

    def counts(self, batch: Batch) -> dict[str, Array]:
        return {"reconstruction": batch["valid"].sum().astype(jnp.float32)}

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> Losses:
        r = self.reconstruction
        # What is cached was computed before, by the same frozen encoders.
        features, signal = batch.get("features"), batch.get("latents")
        if features is None:
            features = pooled_features(r.vectors(params, batch["image"]), r.pool)
        if signal is None:
            signal = r.signal(params, batch["image"])
        errors = r.errors(params, jax.lax.stop_gradient(features), signal, batch["id"], key)
        return {"reconstruction": objectives.masked_average(errors, batch["valid"])}, {}

    def forward_flops(self, spec: Spec) -> dict[str, float]:
        r, pictures = self.reconstruction, spec["tokens"].shape[0]
        encoder = 0.0 if "features" in spec else pictures * flops.vit(r.encoder.config)
        return {"generation_encoder": encoder, **r.decoding_flops(pictures, "latents" in spec)}
