"""The unified model on packed rows: cross-entropy of the next token and the vector head's loss, in one pass."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from ml_collections import ConfigDict

from pisces_jax.data.packing.layout import Entry, Layout
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.losses import objectives
from pisces_jax.losses.flow import FlowConfig
from pisces_jax.models.layers import apply
from pisces_jax.models.lora import detach
from pisces_jax.models.pisces import Pisces, PiscesConfig
from pisces_jax.models.transformer import Transformer
from pisces_jax.ops.cross_entropy import text_cross_entropy
from pisces_jax.training import config as settings
from pisces_jax.training import flops
from pisces_jax.training.programs.base import (
    Batch,
    CachedInput,
    Losses,
    Params,
    Program,
    Spec,
    by_source,
    example_keys,
)
from pisces_jax.training.programs.reconstruction import Reconstruction
from pisces_jax.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class UnifiedProgram(Program):
    """The Pisces stages (arXiv 2506.10395), and BLIP3-o's training (arXiv 2505.09568) where the model has a generator.
    A model without encoders is trained on text alone.

    The loss "vectors" is the regression's error of each vector, or the flow-matching error of each vector or of each
    picture's map of vectors. With `reconstruction` the decoder learns on in the same run, from the vectors as
    regression predicts them: it gives the mean of what its text leaves open, which no true vector is. A flow's vectors
    are like true ones, so there the decoder learns from these. Nothing flows back from it into the language model.

    Attributes:
        weights: of "text", "vectors" and "reconstruction".
        chunk: entries of the vocabulary whose logits exist at a time; 0: all.
        sources: names of the mixture, whose losses are also reported one by one.
        true_vectors: share of the pictures of which the decoder is given the true vectors.
        error: of regression, "mse" or "cosine" (`objectives.VECTOR_ERRORS`).
        flow: how the generator or the denoiser is trained.
        flow_samples: times and noises per picture, or vector, and step; the language model runs once for all of them.
        fed_noise: standard deviation of the noise on the drawn vectors that are fed in.
    """

    model: Pisces
    weights: Mapping[str, float]
    chunk: int
    sources: tuple[str, ...]
    reconstruction: Reconstruction | None = None
    true_vectors: float = 0.0
    error: str = "mse"
    flow: FlowConfig = FlowConfig()
    flow_samples: int = 1
    fed_noise: float = 0.0
    targets: ClassVar[tuple[str, ...]] = ("generation_encoder",)
    draws_only: ClassVar[bool] = True

    @property
    def samples(self) -> Literal["drawings"] | None:
        return None if self.model.config.generation_encoder is None else "drawings"

    @classmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> Self:
        pisces: PiscesConfig = settings.pisces_config(config, vocab_size)
        weights = {"text": config.loss.text}
        if pisces.generation_encoder is not None:
            weights["vectors"] = config.loss.vectors
        elif config.data.features:
            raise UserError("data.features are of drawn pictures, and this model draws none: leave it empty")
        reconstruction = None
        if config.train_decoder:
            if config.data.features:
                raise UserError("train_decoder: a decoder learns from pictures: leave data.features empty")
            weights["reconstruction"] = config.loss.reconstruction
            reconstruction = Reconstruction.from_config(config)
        if config.loss.vector_error not in objectives.VECTOR_ERRORS:
            known = ", ".join(objectives.VECTOR_ERRORS)
            raise UserError(f"config key loss.vector_error: {config.loss.vector_error!r} is none of {known}")
        if config.loss.fed_noise and not (pisces.generation_encoder is not None and pisces.fed_vectors):
            raise UserError("loss.fed_noise is noise on drawn vectors that are fed in, and here none are: set it to 0")
        return cls(
            Pisces(pisces, jnp.dtype(config.compute_dtype)), weights, config.loss.chunk, tuple(config.data.train),
            reconstruction, config.loss.true_vectors, config.loss.vector_error, settings.vector_flow_config(config),
            config.loss.flow_samples, config.loss.fed_noise,
        )  # fmt: skip

    @classmethod
    def parts(cls, config: ConfigDict) -> tuple[str, ...]:
        own = settings.pisces_config(config, config.data.tokenizer_vocabulary or 512).parts
        return own + (Reconstruction.parts(config)[1:] if config.train_decoder else ())

    @classmethod
    def cached_inputs(cls, config: ConfigDict) -> dict[str, CachedInput]:
        """Pooled features, the vectors that are predicted."""
        return {"features": CachedInput("generation_encoder", "", {"pool": config.model.pool})}

    @classmethod
    def reads_and_draws(cls, config: ConfigDict) -> bool:
        return "generation_encoder" in config.model

    # Data

    def batch_spec(self, config: ConfigDict) -> Spec:
        """Groups of `rows_per_pool` rows along the leading axis, `batch_size` rows in all."""
        d, layout = config.data, self._layout(config)
        if config.batch_size % d.rows_per_pool:
            raise UserError(
                f"batch_size {config.batch_size} counts rows: make it a multiple of the {d.rows_per_pool} of "
                "data.rows_per_pool"
            )
        groups = config.batch_size // d.rows_per_pool
        c = self.model.config

        def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct((groups, *shape), dtype)

        row = layout.rows, layout.length
        spec = {name: array(jnp.int32, *row) for name in ("tokens", "segment_ids", "positions", "source")}
        spec["loss_mask"] = array(jnp.bool_, *row)
        for role, slots, side in (
            ("read", layout.read_slots, layout.read_size),
            ("draw", layout.draw_slots, layout.draw_size),
        ):
            if role == "draw" and d.features and c.generation_encoder is not None:
                width = c.generation_encoder.output_width
                spec["draw_features"] = array(jnp.float32, slots, c.draw_vectors, width)
            else:
                spec[f"{role}_images"] = array(jnp.uint8, slots, side, side, 3)
            for name in ("row", "start", "source"):
                spec[f"{role}_{name}"] = array(jnp.int32, slots)
            spec[f"{role}_valid"] = array(jnp.bool_, slots)
            spec[f"{role}_id"] = array(jnp.uint32, slots, 2)
        return spec

    def dataset(
        self, config: ConfigDict, entries: Sequence[Entry], tokenizer: Tokenizer, caches: Mapping[str, Any], **how: Any
    ) -> PackedGroups:
        return PackedGroups(entries, tokenizer, self._layout(config), config.seed, **caches, **how)

    def _layout(self, config: ConfigDict) -> Layout:
        c, d = self.model.config, config.data
        return Layout(
            c.read_vectors, c.draw_positions, d.row_length, rows=d.rows_per_pool,
            read_slots=d.read_slots if c.read_size else 0, draw_slots=d.draw_slots if c.draw_size else 0,
            read_size=c.read_size, draw_size=c.draw_size, read_stretch=d.read_stretch,
        )  # fmt: skip

    @staticmethod
    def examples(batch: Mapping[str, np.ndarray]) -> int:
        return int(batch["segment_ids"].max(axis=-1).sum())

    # Objective

    def init(self, key: jax.Array) -> dict[str, Any]:
        c, tokens = self.model.config, jnp.zeros((1, 8), jnp.int32)
        if c.generation_encoder is None:
            language_model = Transformer(c.language_model, self.model.dtype)
            return detach({"language_model": language_model.init(key, tokens, method="init_all")["params"]})

        def blank(size: int) -> Array:
            return jnp.zeros((1, size, size, 3), jnp.uint8)

        images = blank(c.read_size), blank(c.draw_size)
        params = dict(self.model.init(key, *images, tokens, method="init_all")["params"])
        decoding = {} if self.reconstruction is None else self.reconstruction.init(jax.random.fold_in(key, 1))
        return {**decoding, **detach(params)}

    def counts(self, batch: Batch) -> dict[str, Array]:
        _, learned = text_targets(batch)
        counts = {"text": learned.sum().astype(jnp.float32)}
        pictures = batch["draw_valid"].sum().astype(jnp.float32)
        if self.model.config.generation_encoder is not None:
            counts["vectors"] = pictures * self._errors_per_picture
        return counts if self.reconstruction is None else {**counts, "reconstruction": pictures}

    def losses(self, params: Params, batch: Batch, key: jax.Array) -> Losses:
        fed_noise = None
        if self.fed_noise:
            c, ids = self.model.config, batch["draw_id"]
            assert c.generation_encoder is not None
            keys = example_keys(key, ids.reshape(-1, 2), "fed_noise")
            shape = c.draw_vectors, c.generation_encoder.output_width
            noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys)
            fed_noise = self.fed_noise * noise.reshape(*ids.shape[:-1], *shape)
        hidden, states, target = apply(self.model, params, batch, fed_noise)
        targets, learned = text_targets(batch)
        with jax.named_scope("text_loss"):
            matrix = apply(self.model, params, method="output_matrix")
            text = text_cross_entropy(
                hidden, matrix, targets, chunk=self.chunk, vocab_size=self.model.config.language_model.vocab_size
            )
        source = batch["source"].reshape(text.shape)
        if states is None or target is None:
            losses = {"text": objectives.masked_average(text, learned)}
            return losses, by_source(text, learned, source, self.sources, "text")
        with jax.named_scope("vector_loss"):
            if self.model.config.flow:
                predicted = target
                vectors = self._flow_errors(params, states, target, batch["draw_id"], key)
            else:
                predicted = apply(self.model, params, states, method="predict")
                vectors = objectives.VECTOR_ERRORS[self.error](predicted, target)
        drawn = jnp.broadcast_to(batch["draw_valid"][..., None], vectors.shape)
        losses = {
            "text": objectives.masked_average(text, learned),
            "vectors": objectives.masked_average(vectors, drawn),
        }
        if self.reconstruction is not None:
            errors = self._decoding_errors(self.reconstruction, params, batch, predicted, target, key)
            losses["reconstruction"] = objectives.masked_average(errors, batch["draw_valid"])
        draw_source = jnp.broadcast_to(batch["draw_source"][..., None], vectors.shape)
        reported = by_source(text, learned, source, self.sources, "text")
        return losses, reported | by_source(vectors, drawn, draw_source, self.sources, "vectors")

    @property
    def _errors_per_picture(self) -> int:
        """One where a generator makes the whole map of a picture, else one for each vector."""
        return self.model.config.draw_vectors if self.model.config.generator is None else 1

    def _flow_errors(self, params: Params, states: Array, target: Array, ids: Array, key: jax.Array) -> Array:
        """Flow-matching errors of each picture [B, P, 1 or m]: means over `flow_samples` times."""
        shape, n, each = states.shape[:2], self.flow_samples, self._errors_per_picture
        states, target, ids = (x.reshape(-1, *x.shape[2:]) for x in (states, target, ids))
        data = apply(self.model, params, target, method="to_data")
        if self.model.config.generator is None:  # each vector is a sample of its own
            data, states = (x.reshape(-1, x.shape[-1]) for x in (data, states))
        keys = jax.vmap(lambda k: jax.random.split(k, each * n))(example_keys(key, ids, "vectors")).reshape(-1)
        data, states = (jnp.repeat(x, n, axis=0) for x in (data, states))
        errors = objectives.flow_matching(
            lambda *a: apply(self.model, params, *a, method="generate"), data, states, keys, self.flow
        )
        return errors.reshape(*shape, each, n).mean(-1)

    @property
    def measured(self) -> tuple[str, ...]:
        return ("feature_statistics",) if self.model.config.standardise else ()

    def measure(self, params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """Mean and standard deviation of each dimension of the drawn pictures' pooled features."""

        @jax.jit
        def moments(params: Params, batch: Batch) -> Array:
            x = batch.get("draw_features")
            if x is None:
                images = batch["draw_images"]
                x = apply(self.model, params, images.reshape(-1, *images.shape[2:]), method="features")
                x = x.reshape(*images.shape[:2], *x.shape[1:])
            weight = jnp.broadcast_to(batch["draw_valid"][..., None, None], x.shape).astype(jnp.float32)
            x = x.astype(jnp.float32)
            return jnp.stack([(w * weight).sum((0, 1, 2)) for w in (jnp.ones_like(x), x, jnp.square(x))])

        found = [np.asarray(moments(params, batch), np.float64) for batch in batches]
        count, total, squares = np.sum(found, axis=0)
        if not count.all():
            raise UserError("model.standardise: the first batches hold no drawn picture: name a source that draws")
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
        return {"feature_statistics": {"mean": mean.astype(np.float32), "std": std.astype(np.float32)}}

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

    # Costs

    def forward_flops(self, spec: Spec) -> dict[str, float]:
        c = self.model.config
        groups, rows, length = spec["tokens"].shape
        forward = {"language_model": groups * rows * flops.transformer(c.language_model, length)}
        if c.generation_encoder is None:
            return forward
        cached = "draw_features" in spec  # then no encoder runs
        width, features = c.language_model.width, c.generation_encoder.output_width
        draw = groups * spec["draw_features" if cached else "draw_images"].shape[1]
        drawn_vectors = draw * c.draw_vectors
        features_to_text = drawn_vectors * flops.projector(features, c.projector_hidden, width)
        forward["generation_encoder"] = 0.0 if cached else draw * flops.vit(c.generation_encoder)
        if (reader := c.understanding_encoder) is not None:
            read = groups * spec["read_images"].shape[1]
            projector = flops.projector(reader.output_width, c.projector_hidden, width)
            forward["understanding_encoder"] = read * flops.vit(reader)
            forward["understanding_projector"] = read * c.read_vectors * projector
        if c.generator is not None:
            forward["generator"] = draw * self.flow_samples * flops.dit(c.generator)
        elif c.denoiser is not None:
            forward["denoiser"] = drawn_vectors * self.flow_samples * flops.denoiser(c.denoiser)
        else:
            forward["vector_head"] = drawn_vectors * flops.projector(width, c.vector_head_hidden, features)
        if c.generator is None or c.fed_vectors:
            forward["generation_projector"] = features_to_text
        return forward if self.reconstruction is None else forward | self.reconstruction.decoding_flops(draw)

    def block_positions(self, config: ConfigDict) -> dict[str, tuple[Any, int]]:
        c, spec = self.model.config, self.batch_spec(config)
        groups, rows, length = spec["tokens"].shape
        positions: dict[str, tuple[Any, int]] = {"language_model": (c.language_model, groups * rows * length)}
        if (reader := c.understanding_encoder) is not None:
            vectors = reader.vectors + reader.class_token
            positions["understanding_encoder"] = reader, groups * spec["read_images"].shape[1] * vectors
        if c.generator is not None:
            pictures = groups * spec["draw_valid"].shape[1] * self.flow_samples
            positions["generator"] = c.generator, pictures * c.draw_vectors
        return positions


def text_targets(batch: Batch) -> tuple[Array, Array]:
    """The rows of all groups, one after the other: what each position is to predict, and whether it counts [B·G, T]."""
    flat = (-1, batch["tokens"].shape[-1])
    return objectives.next_token_targets(*(batch[k].reshape(flat) for k in ("tokens", "loss_mask", "segment_ids")))
