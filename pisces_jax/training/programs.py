"""The programs: what is trained on a batch. A program is parts, losses over a batch, and their counts.

The loop, the state and the checkpoints know no more of it than this. Parameters are a dict from part to tree.

Noise for an example comes from (seed, the example's identity, purpose): neither packing, nor the place in the batch,
nor accumulation changes it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from clu.metrics import Average
from jaxtyping import Array
from ml_collections import ConfigDict

from pisces_jax.losses import objectives
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT, DiTConfig
from pisces_jax.models.layers import Linear, apply
from pisces_jax.models.pisces import Pisces, PiscesConfig
from pisces_jax.models.transformer import Transformer
from pisces_jax.models.vit import ContrastiveHead, TextTower, TextTowerConfig, ViT, pooled_features
from pisces_jax.ops.cross_entropy import text_cross_entropy
from pisces_jax.training import config as settings
from pisces_jax.utils.errors import UserError

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
PURPOSES = ("flow", "feature_noise", "true_vectors")


class Program(Protocol):
    """What the loop needs of a program."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of each loss in the objective."""
        ...

    def init(self, key: jax.Array) -> dict[str, Any]:
        """Boxed parameters by part."""
        ...

    def counts(self, batch: Batch) -> dict[str, Array]:
        """How many items each loss is over in this batch: from the batch alone, before anything is computed."""
        ...

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> tuple[dict[str, Average], dict[str, Average]]:
        """The losses (names as in `weights`), and further averages to report."""
        ...


def example_keys(key: jax.Array, ids: Array, purpose: str) -> Array:
    """One random key an example: ids uint32 [B, 2] -> keys [B]."""
    key = jax.random.fold_in(key, PURPOSES.index(purpose))
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i[0]), i[1]))(ids)


def to_signal(images: Array) -> Array:
    """uint8 pixels to the decoder's range, -1..1."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_pixels(signal: Array) -> Array:
    return jnp.round((jnp.clip(signal, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def resize(images: Array, size: int) -> Array:
    """uint8 pictures [B, S, S, 3] to `size`: bicubic, as the pipeline does for the unified stages."""
    if images.shape[1] == size:
        return images
    for axis in (2, 1):  # as PIL: whole numbers between the passes
        shape = (*images.shape[:axis], size, *images.shape[axis + 1 :])
        resized = jax.image.resize(images.astype(jnp.float32), shape, "cubic")
        images = jnp.round(jnp.clip(resized, 0, 255)).astype(jnp.uint8)
    return images


def by_source(values: Array, mask: Array, source: Array, names: tuple[str, ...], prefix: str) -> dict[str, Average]:
    """The average of each source of the mixture apart."""
    return {f"{prefix}/{name}": objectives.masked_average(values, mask & (source == i)) for i, name in enumerate(names)}


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """Generation encoder and decoder: from a picture through its pooled features back to the picture, to its pixels
    or to the latents of an autoencoder."""

    encoder: ViT
    decoder: DiT
    pool: int
    flow: FlowConfig
    feature_noise: float
    autoencoder: Autoencoder | None = None

    def init(self, key: jax.Array) -> dict[str, Any]:
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
        """What the decoder is to make of a picture: its pixels as −1..1, or its latents, detached."""
        if self.autoencoder is None:
            return to_signal(images)
        with jax.named_scope("autoencoder"):
            latents = apply(self.autoencoder, params["autoencoder"], to_signal(images), method="encode")
        return jax.lax.stop_gradient(latents)

    def vectors(self, params: Params, images: Array) -> Array:
        with jax.named_scope("generation_encoder"):
            return apply(self.encoder, params["generation_encoder"], images)

    def errors(self, params: Params, features: Array, signal: Array, ids: Array, key: jax.Array) -> Array:
        """Flow-matching error of each picture, as `signal` gives it, given the encoder's pooled features."""
        if self.feature_noise:
            noise = jax.vmap(lambda k: jax.random.normal(k, features.shape[1:]))
            features = features + self.feature_noise * noise(example_keys(key, ids, "feature_noise"))
        with jax.named_scope("decoder"):
            return objectives.flow_matching(
                lambda *a: apply(self.decoder, params["decoder"], *a),
                signal, features, example_keys(key, ids, "flow"), self.flow,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DecoderProgram:
    """Decoder training: flow matching from frozen pooled generation features; no language model in the loop."""

    reconstruction: Reconstruction
    weights: Mapping[str, float]

    def init(self, key: jax.Array) -> dict[str, Any]:
        return self.reconstruction.init(key)

    def counts(self, batch: Batch) -> dict[str, Array]:
        return {"reconstruction": batch["valid"].sum().astype(jnp.float32)}

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> tuple[dict[str, Average], dict[str, Average]]:
        r = self.reconstruction
        # What is cached was computed before, by the same frozen encoders.
        features, signal = batch.get("features"), batch.get("latents")
        if features is None:
            features = pooled_features(r.vectors(params, batch["image"]), r.pool)
        if signal is None:
            signal = r.signal(params, batch["image"])
        errors = r.errors(params, jax.lax.stop_gradient(features), signal, batch["id"], key)
        return {"reconstruction": objectives.masked_average(errors, batch["valid"])}, {}


@dataclasses.dataclass(frozen=True)
class PretrainProgram:
    """Encoders from scratch: contrastive (`contrast`: "sigmoid" or "softmax") between picture and caption for both
    encoders or one of them, one text tower; for the generation encoder reconstruction through the decoder in the same
    run, as its model was trained both ways. With a weight for `words`, the understanding encoder's vectors also tell
    which words the caption has.
    """

    reconstruction: Reconstruction | None
    understanding_encoder: ViT | None
    text_tower: TextTower
    head: ContrastiveHead
    weights: Mapping[str, float]
    same_text: bool = False
    contrast: str = "sigmoid"

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
        # SigLIP's starting point: scale 10, bias -10; CLIP starts at 14, without a bias.
        params["contrastive"]["log_scale"] = jnp.full(len(self.encoders), jnp.log(10.0))
        if self.contrast == "sigmoid":
            params["contrastive"]["bias"] = jnp.full(len(self.encoders), -10.0)
        if "words" in self.weights:
            vectors = jnp.zeros((1, widths["understanding"]))
            params["words"] = self._words().init(jax.random.fold_in(key, 6), vectors)["params"]
        return params

    @property
    def encoders(self) -> dict[str, ViT]:
        """Those that are pretrained."""
        drawn = None if self.reconstruction is None else self.reconstruction.encoder
        found = {"understanding": self.understanding_encoder, "generation": drawn}
        return {name: encoder for name, encoder in found.items() if encoder is not None}

    def _words(self) -> Linear:
        return Linear((self.text_tower.config.vocab_size,), ("features",), ("vocab",), dtype=self.text_tower.dtype)

    def counts(self, batch: Batch) -> dict[str, Array]:
        return dict.fromkeys(self.weights, batch["valid"].sum().astype(jnp.float32))

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> tuple[dict[str, Average], dict[str, Average]]:
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


def text_targets(batch: Batch) -> tuple[Array, Array]:
    """The rows of all groups, one after the other: what each position is to predict, and whether it counts [B·G, T]."""
    flat = (-1, batch["tokens"].shape[-1])
    return objectives.next_token_targets(*(batch[k].reshape(flat) for k in ("tokens", "loss_mask", "segment_ids")))


@dataclasses.dataclass(frozen=True)
class TextProgram:
    """The language model alone, on packed rows of text: `UnifiedProgram` with pictures turned off."""

    model: Transformer
    weights: Mapping[str, float]
    chunk: int
    sources: tuple[str, ...]

    def init(self, key: jax.Array) -> dict[str, Any]:
        return {"language_model": self.model.init(key, jnp.zeros((1, 8), jnp.int32), method="init_all")["params"]}

    def counts(self, batch: Batch) -> dict[str, Array]:
        return {"text": text_targets(batch)[1].sum().astype(jnp.float32)}

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> tuple[dict[str, Average], dict[str, Average]]:
        del key  # nothing here is random
        tokens, positions, segment_ids, source = (
            batch[k].reshape(-1, batch[k].shape[-1]) for k in ("tokens", "positions", "segment_ids", "source")
        )
        own = params["language_model"]
        x = apply(self.model, own, tokens, method="embed")
        hidden, _ = apply(self.model, own, x, positions, segment_ids)
        targets, learned = text_targets(batch)
        with jax.named_scope("text_loss"):
            matrix = apply(self.model, own, method="output_matrix")
            text = text_cross_entropy(
                hidden, matrix, targets, chunk=self.chunk, vocab_size=self.model.config.vocab_size
            )
        losses = {"text": objectives.masked_average(text, learned)}
        return losses, by_source(text, learned, source, self.sources, "text")


@dataclasses.dataclass(frozen=True)
class UnifiedProgram:
    """The Pisces stages: next-token cross-entropy and next-vector regression in one pass over packed rows.

    With `reconstruction` the decoder learns on in the same run, from the vectors as they are predicted (and from the
    true ones for `true_vectors` of the pictures): a regression gives the mean of what its text leaves open, which no
    true vector is. Nothing flows back from it into the language model.
    """

    model: Pisces
    weights: Mapping[str, float]
    chunk: int
    sources: tuple[str, ...]
    reconstruction: Reconstruction | None = None
    true_vectors: float = 0.0

    def init(self, key: jax.Array) -> dict[str, Any]:
        c = self.model.config

        def blank(size: int) -> Array:
            return jnp.zeros((1, size, size, 3), jnp.uint8)

        images = blank(c.understanding_encoder.image_size), blank(c.generation_encoder.image_size)
        params = dict(self.model.init(key, *images, jnp.zeros((1, 8), jnp.int32), method="init_all")["params"])
        decoding = {} if self.reconstruction is None else self.reconstruction.init(jax.random.fold_in(key, 1))
        return {**decoding, **params}

    def counts(self, batch: Batch) -> dict[str, Array]:
        _, learned = text_targets(batch)
        pictures = batch["draw_valid"].sum().astype(jnp.float32)
        counts = {"text": learned.sum().astype(jnp.float32), "vectors": pictures * self.model.config.draw_vectors}
        return counts if self.reconstruction is None else {**counts, "reconstruction": pictures}

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> tuple[dict[str, Average], dict[str, Average]]:
        hidden, predicted, target = apply(self.model, params, batch)
        targets, learned = text_targets(batch)
        with jax.named_scope("text_loss"):
            matrix = apply(self.model, params, method="output_matrix")
            text = text_cross_entropy(
                hidden, matrix, targets, chunk=self.chunk, vocab_size=self.model.config.language_model.vocab_size
            )
        with jax.named_scope("vector_loss"):
            vectors = objectives.vector_error(predicted, target)
        drawn = jnp.broadcast_to(batch["draw_valid"][..., None], vectors.shape)
        losses = {
            "text": objectives.masked_average(text, learned),
            "vectors": objectives.masked_average(vectors, drawn),
        }
        if self.reconstruction is not None:
            errors = self._decoding_errors(self.reconstruction, params, batch, predicted, target, key)
            losses["reconstruction"] = objectives.masked_average(errors, batch["draw_valid"])
        source = batch["source"].reshape(text.shape)
        draw_source = jnp.broadcast_to(batch["draw_source"][..., None], vectors.shape)
        reported = by_source(text, learned, source, self.sources, "text")
        reported |= by_source(vectors, drawn, draw_source, self.sources, "vectors")
        return losses, reported

    def _decoding_errors(
        self, reconstruction: Reconstruction, params: Params, batch: Batch, predicted: Array, target: Array,
        key: jax.Array,
    ) -> Array:  # fmt: skip
        """Flow-matching error of each drawn picture [B, P] given its vectors as predicted, or as they are."""
        predicted, target, images, ids = (
            x.reshape(-1, *x.shape[2:]) for x in (predicted, target, batch["draw_images"], batch["draw_id"])
        )
        known = jax.vmap(jax.random.uniform)(example_keys(key, ids, "true_vectors")) < self.true_vectors
        vectors = jax.lax.stop_gradient(jnp.where(known[:, None, None], target, predicted))
        errors = reconstruction.errors(params, vectors, reconstruction.signal(params, images), ids, key)
        return errors.reshape(batch["draw_valid"].shape)


def make_program(config: ConfigDict, vocab_size: int) -> Program:
    """The program that a config names.

    Raises:
        UserError: an unknown program, or settings that it lacks.
    """
    settings.check_names(config)
    dtype = jnp.dtype(config.compute_dtype)
    if config.program == "unified":
        pisces: PiscesConfig = settings.pisces_config(config, vocab_size)
        weights = {"text": config.loss.text, "vectors": config.loss.vectors}
        reconstruction = None
        if "decoder" in config.init_from:
            if config.data.features:
                raise UserError("init_from.decoder: a decoder learns from pictures: leave data.features empty")
            weights["reconstruction"] = config.loss.reconstruction
            reconstruction = _reconstruction(config, dtype)
        return UnifiedProgram(
            Pisces(pisces, dtype), weights, config.loss.chunk, tuple(config.data.train), reconstruction,
            config.loss.true_vectors,
        )  # fmt: skip
    if config.program == "text":
        language = Transformer(settings.transformer_config(config, vocab_size), dtype)
        return TextProgram(language, {"text": config.loss.text}, config.loss.chunk, tuple(config.data.train))
    if config.program not in ("pretrain", "decoder"):
        raise UserError(f"config key program: {config.program!r} is none of pretrain, decoder, unified, text")
    if config.program == "decoder":
        return DecoderProgram(_reconstruction(config, dtype), {"reconstruction": config.loss.reconstruction})
    return _pretrain(config, dtype, vocab_size)


def _pretrain(config: ConfigDict, dtype: Any, vocab_size: int) -> PretrainProgram:
    """Of the encoders that `config.model` has.

    Raises:
        UserError: settings that pretraining does not have.
    """
    if config.data.features:
        raise UserError("data.features: program pretrain trains the encoder that features are of: leave it empty")
    if config.optimizer.grad_accum_steps != 1:
        raise UserError(
            "optimizer.grad_accum_steps must be 1 in program pretrain: its contrastive loss compares the whole batch"
        )
    loss = config.loss
    if loss.contrast not in ("sigmoid", "softmax"):
        raise UserError(f"config key loss.contrast: {loss.contrast!r} is neither 'sigmoid' nor 'softmax'")
    reads, draws = (f"{name}_encoder" in config.model for name in ("understanding", "generation"))
    if not (reads or draws):
        raise UserError("program pretrain trains encoders: give model.understanding_encoder, model.generation_encoder")
    if loss.words and not reads:
        raise UserError("loss.words is of the understanding encoder: give model.understanding_encoder, or set it to 0")
    weights = {"contrastive_understanding": loss.contrastive} if reads else {}
    if draws:
        weights |= {"contrastive_generation": loss.contrastive, "reconstruction": loss.reconstruction}
    if loss.words:
        weights["words"] = loss.words
    tower: TextTowerConfig = settings.text_tower_config(config, vocab_size)
    return PretrainProgram(
        _reconstruction(config, dtype) if draws else None,
        ViT(settings.vit_config(config, "understanding_encoder"), dtype) if reads else None,
        TextTower(tower, dtype), ContrastiveHead(tower.width, dtype), weights, loss.same_text, loss.contrast,
    )  # fmt: skip


def _reconstruction(config: ConfigDict, dtype: Any) -> Reconstruction:
    """
    Raises:
        UserError: encoder, decoder and autoencoder that do not fit one another.
    """
    dit: DiTConfig = settings.dit_config(config)
    encoder = ViT(settings.vit_config(config, "generation_encoder"), dtype)
    latent = settings.autoencoder_config(config)
    pixels = dit.size * (latent.downscale if latent else 1)
    if encoder.config.image_size != pixels:
        raise UserError(
            f"model.decoder.size {dit.size} gives pictures of {pixels} pixels, model.generation_encoder.image_size is "
            f"{encoder.config.image_size}: a decoder learns from the pictures that its encoder sees, so make them equal"
        )
    if latent and latent.latent_channels != dit.channels:
        raise UserError(
            f"model.decoder.channels {dit.channels} must be the {latent.latent_channels} of model.autoencoder's latents"
        )
    return Reconstruction(
        encoder, DiT(dit, dtype), config.model.pool, settings.flow_config(config), config.loss.feature_noise,
        Autoencoder(latent, dtype) if latent else None,
    )  # fmt: skip
