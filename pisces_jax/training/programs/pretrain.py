"""Encoders from scratch: contrastive between picture and caption, with what else each encoder learns from."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array
from ml_collections import ConfigDict

from pisces_jax.losses import objectives
from pisces_jax.models.layers import Linear, apply
from pisces_jax.models.vit import ContrastiveHead, TextTower, TextTowerConfig, ViT, pooled_features
from pisces_jax.training import config as settings
from pisces_jax.training import flops
from pisces_jax.training.programs.base import Batch, Losses, Params, Spec
from pisces_jax.training.programs.pictures import PicturesProgram
from pisces_jax.training.programs.reconstruction import Reconstruction
from pisces_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class PretrainProgram(PicturesProgram):
    """Contrastive pretraining of both encoders, or of the one that the config's model has, with one text tower.

    The generation encoder also learns by reconstruction through the decoder, as its model was trained both ways.

    Attributes:
        reconstruction: None where the generation encoder is not trained.
        understanding_encoder: None where it is not trained.
        same_text: pictures of the same text are positives too.
        contrast: "sigmoid" (SigLIP) or "softmax" (CLIP).
    """

    reconstruction: Reconstruction | None
    understanding_encoder: ViT | None
    text_tower: TextTower
    head: ContrastiveHead
    weights: Mapping[str, float]
    same_text: bool = False
    contrast: str = "sigmoid"
    divisible: ClassVar[bool] = False

    @property
    def samples(self) -> Literal["reconstructions"] | None:
        return None if self.reconstruction is None else "reconstructions"

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> Self:
        loss, dtype = config.loss, jnp.dtype(config.compute_dtype)
        if config.data.features:
            raise UserError("data.features: program pretrain trains the encoder that makes them: leave it empty")
        if config.optimizer.grad_accum_steps != 1:
            raise UserError(
                "optimizer.grad_accum_steps must be 1 in program pretrain: its contrastive loss is over the whole batch"
            )
        if loss.contrast not in ("sigmoid", "softmax"):
            raise UserError(f"config key loss.contrast: {loss.contrast!r} is neither 'sigmoid' nor 'softmax'")
        reads, draws = (f"{name}_encoder" in config.model for name in ("understanding", "generation"))
        if not (reads or draws):
            raise UserError(
                "program pretrain trains encoders: give model.understanding_encoder, model.generation_encoder or both"
            )
        if loss.words and not reads:
            raise UserError("loss.words trains model.understanding_encoder: give it, or set loss.words to 0")
        weights = {"contrastive_understanding": loss.contrastive} if reads else {}
        if draws:
            weights |= {"contrastive_generation": loss.contrastive, "reconstruction": loss.reconstruction}
        if loss.words:
            weights["words"] = loss.words
        tower: TextTowerConfig = settings.text_tower_config(config, vocab_size)
        return cls(
            Reconstruction.from_config(config) if draws else None,
            ViT(settings.vit_config(config, "understanding_encoder"), dtype) if reads else None,
            TextTower(tower, dtype), ContrastiveHead(tower.width, dtype), weights, loss.same_text, loss.contrast,
        )  # fmt: skip

    @classmethod
    def parts(cls, config: ConfigDict) -> tuple[str, ...]:
        drawn = Reconstruction.parts(config) if "generation_encoder" in config.model else ()
        return drawn + (("understanding_encoder",) if "understanding_encoder" in config.model else ())

    @property
    def picture_size(self) -> int:
        """The generation encoder's, or that of the understanding encoder where it is trained alone."""
        encoder = self.reconstruction.encoder if self.reconstruction is not None else self.understanding_encoder
        assert encoder is not None
        return encoder.config.image_size

    @property
    def encoders(self) -> dict[str, ViT]:
        """Those that are pretrained."""
        drawn = None if self.reconstruction is None else self.reconstruction.encoder
        found = {"understanding": self.understanding_encoder, "generation": drawn}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def init(self, key: jax.Array) -> dict[str, Any]:
        keys = jax.random.split(key, 6)
        params = {} if self.reconstruction is None else self.reconstruction.init(keys[0])
        if self.understanding_encoder is not None:
            size = self.understanding_encoder.config.image_size
            images = jnp.zeros((1, size, size, 3), jnp.uint8)
            params["understanding_encoder"] = self.understanding_encoder.init(keys[1], images)["params"]
        t = self.text_tower.config
        tokens = jnp.zeros((1, t.max_length), jnp.int32)
        params["text_tower"] = self.text_tower.init(keys[2], tokens, tokens == 0)["params"]
        widths = {"text": t.width, **{name: encoder.config.output_width for name, encoder in self.encoders.items()}}
        head_keys = dict(zip(("text", "understanding", "generation"), keys[3:], strict=True))
        params["contrastive"] = {
            name: self.head.init(head_keys[name], jnp.zeros((1, width)))["params"] for name, width in widths.items()
        }
        # SigLIP starts at scale 10 and bias -10; CLIP at scale 14, without a bias.
        params["contrastive"]["log_scale"] = jnp.full(len(self.encoders), jnp.log(10.0))
        if self.contrast == "sigmoid":
            params["contrastive"]["bias"] = jnp.full(len(self.encoders), -10.0)
        if "words" in self.weights:
            vectors = jnp.zeros((1, widths["understanding"]))
            params["words"] = self._words().init(jax.random.fold_in(key, 6), vectors)["params"]
        return params

    def _words(self) -> Linear:
        return Linear((self.text_tower.config.vocab_size,), ("features",), ("vocab",), dtype=self.text_tower.dtype)

    def counts(self, batch: Batch) -> dict[str, Array]:
        return dict.fromkeys(self.weights, batch["valid"].sum().astype(jnp.float32))

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> Losses:
        heads = params["contrastive"]

        def embed(name: str, x: Array) -> Array:
            return apply(self.head, heads[name], x)

        with jax.named_scope("text_tower"):
            text = apply(self.text_tower, params["text_tower"], batch["tokens"], batch["text_mask"])
            text = embed("text", text)
        vectors_of = {}
        if self.understanding_encoder is not None:
            with jax.named_scope("understanding_encoder"):
                images = resize(batch["image"], self.understanding_encoder.config.image_size)
                vectors_of["understanding"] = apply(self.understanding_encoder, params["understanding_encoder"], images)
        if self.reconstruction is not None:
            vectors_of["generation"] = self.reconstruction.vectors(params, batch["image"])
        every = batch["valid"]
        same = jnp.eye(text.shape[0], dtype=bool)
        if self.same_text:
            same = (batch["tokens"][:, None] == batch["tokens"][None]).all(axis=-1)
        losses, reported = {}, {}
        for i, (name, vectors) in enumerate(vectors_of.items()):
            pictures = embed(name, vectors.astype(jnp.float32).mean(axis=1))
            scale = heads["log_scale"][i]
            if self.contrast == "sigmoid":
                error = objectives.sigmoid_contrastive(pictures, text, scale, heads["bias"][i], every, same)
            else:
                error = objectives.softmax_contrastive(pictures, text, scale, every, same)
            losses[f"contrastive_{name}"] = objectives.masked_average(error, every)
            nearest = jnp.argmax(pictures @ text.T, axis=1)
            matched = jnp.take_along_axis(same, nearest[:, None], axis=1)[:, 0]
            reported[f"matched_{name}"] = objectives.masked_average(matched.astype(jnp.float32), every)
        if "words" in self.weights:
            scores = apply(self._words(), params["words"], vectors_of["understanding"])
            error = objectives.words_of_pictures(scores, batch["tokens"], batch["text_mask"], every)
            losses["words"] = objectives.masked_average(error, every)
        if self.reconstruction is not None:
            features = pooled_features(vectors_of["generation"], self.reconstruction.pool)
            signal = self.reconstruction.signal(params, batch["image"])
            errors = self.reconstruction.errors(params, features, signal, batch["id"], key)
            losses["reconstruction"] = objectives.masked_average(errors, every)
        return losses, reported

    def forward_flops(self, spec: Spec) -> dict[str, float]:
        pictures, tower = spec["tokens"].shape[0], self.text_tower.config
        forward: dict[str, float] = {}
        if (r := self.reconstruction) is not None:
            forward = {"generation_encoder": pictures * flops.vit(r.encoder.config), **r.decoding_flops(pictures)}
        forward["text_tower"] = pictures * flops.text_tower(tower)
        if self.understanding_encoder is not None:
            c = self.understanding_encoder.config
            forward["understanding_encoder"] = pictures * flops.vit(c)
            if "words" in self.weights:
                forward["words"] = pictures * 2.0 * c.vectors * c.output_width * tower.vocab_size
        return forward


def resize(images: Array, size: int) -> Array:
    """uint8 pictures [B, S, S, 3] to `size`: bicubic, as the data pipeline does for the unified stages."""
    if images.shape[1] == size:
        return images
    for axis in (2, 1):  # as PIL: whole numbers between the passes
        shape = (*images.shape[:axis], size, *images.shape[axis + 1 :])
        resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic")
        images = jnp.round(jnp.clip(resized, 0, 255)).astype(jnp.uint8)
    return images
