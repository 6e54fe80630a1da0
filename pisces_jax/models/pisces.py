"""The unified model (Pisces, arXiv 2506.10395): one causal language model, two visual encoders.

A picture that is read enters as the understanding encoder's long sequence of vectors, `V_n = MLP(φ(I))`; a picture
that is drawn is learned as the generation encoder's short, pooled one, `Pool(ϕ(I))`, by one of three vector heads:

- regression (Pisces): the vectors are fed in, `V_m = MLP(Pool(ϕ(I)))`; the state at `[IMG]` predicts vector 0 and the
  state at vector k predicts vector k+1.
- flow (BLIP3-o, arXiv 2505.09568): m learned queries stand behind `[IMG]`; the states at the queries are the condition
  of a diffusion transformer, the generator, that makes the whole map of vectors from noise.
- flow of each vector (Li et al. 2024, arXiv 2406.11838): the vectors are fed in as with regression, and the state that
  predicts a vector is the condition of a small MLP, the denoiser, that makes this vector from noise.

A batch holds groups of rows. The rows of a group share a pool of pictures, each with a pointer (row, start) to its
place. A model without the understanding encoder draws and reads text alone; without both it is the language model.

Letters: B groups, G rows per group, T positions, P pictures per group, n read vectors, m drawn vectors, D width, C the
generation encoder's width.
"""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pisces_jax.models.denoiser import Denoiser, DenoiserConfig
from pisces_jax.models.dit import DiT, DiTConfig
from pisces_jax.models.layers import Projector, logical
from pisces_jax.models.transformer import Cache, Transformer, TransformerConfig
from pisces_jax.models.vit import ViT, ViTConfig, pooled_features
from pisces_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PiscesConfig:
    """Sizes of the parts; with no encoders the model reads and writes text alone.

    Attributes:
        pool: stride a of Pool_{a×a}.
        projector_hidden, vector_head_hidden: hidden widths of the two-layer MLPs.
        generator: settings of the flow head's diffusion transformer, if that is the head. Its width of the condition is
            the language model's, and its picture the square map of the m vectors.
        denoiser: settings of the flow of each vector, if that is the head; with neither the head is regression.
        standardise: a flow makes vectors with the mean 0 and the standard deviation 1 in each dimension; the
            statistics are the part `feature_statistics`.
        place_embedding: not with a generator. Adds to each drawn vector that is fed in learned embeddings of the row
            and the column of the vector that comes next. Pisces has none: a CLIP's vectors say where they are. Those of
            the small runs' autoencoders do not.
        fed_vectors: whether drawn vectors are fed in at all. Without, the place embedding alone is fed in: one learned
            query per place. A vector that regression predicts is a mean and tells nothing that the text
            before it does not, while a true one shows how the picture goes on; a model trained on true vectors learns
            to follow them, and in a rollout its own lead it astray. Pisces feeds them. With the flow head they are
            fed in after the queries, and take m more positions: what comes later in the row sees the picture itself.
    """

    language_model: TransformerConfig
    understanding_encoder: ViTConfig | None = None
    generation_encoder: ViTConfig | None = None
    pool: int = 1
    projector_hidden: int = 0
    vector_head_hidden: int = 0
    generator: DiTConfig | None = None
    denoiser: DenoiserConfig | None = None
    standardise: bool = False
    place_embedding: bool = False
    fed_vectors: bool = True

    def __post_init__(self) -> None:
        if self.understanding_encoder is not None and self.generation_encoder is None:
            raise ValueError("a model that reads pictures draws them too: give it a generation encoder")
        if self.generator is not None and self.denoiser is not None:
            raise ValueError("generator and denoiser are two vector heads: choose one")
        if self.standardise and not self.flow:
            raise ValueError("standardise is of the flow heads: name a generator or a denoiser, or leave it out")

    @property
    def flow(self) -> bool:
        """Whether vectors are made from noise."""
        return self.generator is not None or self.denoiser is not None

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parameters' parts."""
        language = ("language_model", *("lora",) * (self.language_model.lora is not None))
        if self.generation_encoder is None:
            return language
        reads = self.understanding_encoder is not None
        common = (*language, *("understanding_encoder", "understanding_projector") * reads, "generation_encoder")
        common += ("feature_statistics",) * self.standardise
        if self.generator is None:
            return (*common, "generation_projector", "vector_head" if self.denoiser is None else "denoiser")
        return (*common, *("generation_projector",) * self.fed_vectors, "queries", "generator")

    @property
    def read_vectors(self) -> int:
        """n: vectors of a picture that is read."""
        return 0 if self.understanding_encoder is None else self.understanding_encoder.vectors

    @property
    def read_size(self) -> int:
        """Side of the pictures that are read, in pixels."""
        return 0 if self.understanding_encoder is None else self.understanding_encoder.image_size

    @property
    def draw_size(self) -> int:
        """Side of the pictures that are encoded for drawing, in pixels."""
        return 0 if self.generation_encoder is None else self.generation_encoder.image_size

    @property
    def draw_vectors(self) -> int:
        """m: vectors of a picture that is drawn."""
        return 0 if self.generation_encoder is None else self.generation_encoder.vectors // self.pool**2

    @property
    def draw_positions(self) -> int:
        """Positions that a drawn picture takes in its row, behind `[IMG]`."""
        return self.draw_vectors * (2 if self.generator is not None and self.fed_vectors else 1)


def slot_positions(
    row: Int[Array, "B P"], start: Int[Array, "B P"], valid: Array, vectors: int, length: int, rows: int
) -> Int[Array, "B P vectors"]:
    """Where each picture's vectors lie among its group's G·T positions; those of idle slots lie behind the end."""
    index = (row * length + start)[..., None] + jnp.arange(vectors)
    return jnp.where(valid[..., None], index, rows * length)


def place_vectors(x: Float[Array, "B GT D"], index: Int[Array, "B P n"], vectors: Float[Array, "B P n D"]) -> Array:
    """`x` with the pictures' vectors put at their positions; out-of-range positions (idle slots) are dropped."""
    flat = vectors.reshape(*vectors.shape[:-3], -1, vectors.shape[-1])
    return jax.vmap(lambda a, i, v: a.at[i].set(v.astype(a.dtype), mode="drop"))(
        x, index.reshape(index.shape[0], -1), flat
    )


def take_states(x: Float[Array, "B GT D"], index: Int[Array, "B P n"], before: int) -> Float[Array, "B P n D"]:
    """The states `before` positions before each of those in `index`. Zeros for idle slots."""
    flat, end = index.reshape(index.shape[0], -1), x.shape[1]
    taken = jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=0))(x, jnp.where(flat >= end, end, flat - before))
    return taken.reshape(*index.shape, x.shape[-1])


class Queries(nn.Module):
    """Learned inputs of the language model, one per drawn vector (BLIP3-o's latent queries)."""

    number: int
    width: int
    dtype: Any

    @nn.compact
    def __call__(self) -> Float[Array, "m D"]:
        init = logical(nn.initializers.normal(1.0), "position", "embed")
        return self.param("embedding", init, (self.number, self.width)).astype(self.dtype)


class FeatureStatistics(nn.Module):
    """Mean and standard deviation of the pooled features in each dimension, measured once and never trained."""

    width: int

    def setup(self) -> None:
        self.mean = self.param("mean", logical(nn.initializers.zeros, "norm"), (self.width,))
        self.std = self.param("std", logical(nn.initializers.ones, "norm"), (self.width,))

    def standardise(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return (x - self.mean) / self.std

    def restore(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        return x * self.std + self.mean


class Pisces(nn.Module):
    """The parts and how they join; each public method is an entry for `apply(..., method=...)`."""

    config: PiscesConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        width = c.language_model.width
        self.language_model = Transformer(c.language_model, self.dtype)
        if c.generation_encoder is None:
            return
        self.generation_encoder = ViT(c.generation_encoder, self.dtype)
        if c.understanding_encoder is not None:
            self.understanding_encoder = ViT(c.understanding_encoder, self.dtype)
            self.understanding_projector = Projector(width, c.projector_hidden, self.dtype)
        features = c.generation_encoder.output_width
        if c.generator is None or c.fed_vectors:
            grid = math.isqrt(c.draw_vectors) if c.place_embedding and c.generator is None else 0
            self.generation_projector = Projector(width, c.projector_hidden, self.dtype, grid)
        if c.standardise:
            self.feature_statistics = FeatureStatistics(features)
        if c.generator is not None:
            self.queries = Queries(c.draw_vectors, width, self.dtype)
            self.generator = DiT(c.generator, self.dtype)
            return
        if c.denoiser is not None:
            self.denoiser = Denoiser(c.denoiser, self.dtype)
            return
        # Features are small: a head that starts at the usual size has its own random vectors to unlearn first.
        self.vector_head = Projector(features, c.vector_head_hidden, self.dtype, scale=0.1)

    def read(self, images: Int[Array, "B S S 3"]) -> Float[Array, "B n D"]:
        """Pictures to read as the language model's inputs."""
        return self.understanding_projector(self.understanding_encoder(images))

    def features(self, images: Int[Array, "B S S 3"]) -> Float[Array, "B m C"]:
        """What drawn vectors are trained towards and the decoder decodes: pooled features, float32, detached."""
        return jax.lax.stop_gradient(pooled_features(self.generation_encoder(images), self.config.pool))

    def feed(self, features: Float[Array, "*B m C"], place: Int[Array, "m"]) -> Float[Array, "*B m D"]:
        """Visual vectors, true or predicted, of the given places (0 is the first) as the language model's inputs."""
        if not self.config.fed_vectors:
            features = jnp.zeros_like(features)
        return self.generation_projector(features, place)

    def drawn_inputs(self, features: Float[Array, "*B m C"]) -> Float[Array, "*B positions D"]:
        """What stands at the positions of a drawn picture."""
        c = self.config
        places = jnp.arange(c.draw_vectors)
        if c.generator is None:
            return self.feed(features, places)
        queries = jnp.broadcast_to(self.queries(), (*features.shape[:-1], c.language_model.width))
        return jnp.concatenate([queries, self.feed(features, places)], axis=-2) if c.fed_vectors else queries

    def drawn_states(self, hidden: Float[Array, "B GT D"], index: Int[Array, "B P positions"]) -> Array:
        """The states [B, P, m, D] that say which vectors are drawn, of pictures at the positions `index`."""
        if self.config.generator is None:
            return take_states(hidden, index, before=1)
        return take_states(hidden, index[..., : self.config.draw_vectors], before=0)

    def predict(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        """Regression: the next visual vector from a hidden state, float32."""
        return self.vector_head(hidden).astype(jnp.float32)

    def query_inputs(self) -> Float[Array, "m D"]:
        """Flow: what stands behind `[IMG]`."""
        return self.queries()

    def generate(
        self, x: Float[Array, "B *s C"], t: Float[Array, "B"], states: Float[Array, "B *m D"], keep: Array
    ) -> Float[Array, "B *s C"]:
        """Flow: the network's output at times t, for maps of vectors given m states (`models.dit.DiT`), or for single
        vectors given one (`models.denoiser.Denoiser`)."""
        network = self.denoiser if self.config.generator is None else self.generator
        return network(x, t, states, keep)

    def to_data(self, features: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """Flow: pooled features as the flow makes them, standardised where the config says so; a generator's [.., m, C]
        as a map [.., s, s, C]."""
        x = self.feature_statistics.standardise(features) if self.config.standardise else features
        if self.config.generator is None:
            return x
        side = math.isqrt(self.config.draw_vectors)
        return x.reshape(*x.shape[:-2], side, side, x.shape[-1])

    def from_data(self, x: Float[Array, "*B C"]) -> Float[Array, "*B C"]:
        """The inverse of `to_data`."""
        if self.config.generator is not None:
            x = x.reshape(*x.shape[:-3], -1, x.shape[-1])
        return self.feature_statistics.restore(x) if self.config.standardise else x

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.language_model.embed(tokens)

    def run(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segment_ids: Any = None, cache: Any = None
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        return self.language_model(x, positions, segment_ids, cache)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        return self.language_model.logits(hidden)

    def output_matrix(self) -> Float[Array, "V D"]:
        return self.language_model.output_matrix()

    def __call__(
        self, batch: dict[str, Array], fed_noise: Float[Array, "B P m C"] | None = None
    ) -> tuple[Array, Array | None, Array | None]:
        """Hidden states, and for each drawn picture the states that say what is drawn and the true vectors, for a batch
        of packed groups (`data/packing/rows.py`).

        Args:
            fed_noise: is added to the drawn vectors where they are fed in, not to the target.

        Returns:
            hidden [B·G, T, D]; states [B, P, m, D] and target [B, P, m, C], float32, or None without encoders.
        """
        tokens = batch["tokens"]
        B, G, T = tokens.shape
        flat = (B * G, T)
        x = self.language_model.embed(tokens.reshape(flat))
        positions, segment_ids = batch["positions"].reshape(flat), batch["segment_ids"].reshape(flat)
        if self.config.generation_encoder is None:
            return self.language_model(x, positions, segment_ids)[0], None, None
        x = constrain(x.reshape(B, G * T, -1), "batch", "length", "width")

        def pool(role: str, kind: str = "images") -> tuple[Array, Array, Array]:
            images = batch[f"{role}_{kind}"]
            slots = math.prod(images.shape[:2])  # -1 cannot stand for it: a pool without slots has pictures of no size
            return images.reshape(slots, *images.shape[2:]), batch[f"{role}_row"], batch[f"{role}_start"]

        images, row, start = pool("read")
        if images.shape[0]:
            with jax.named_scope("read"):
                read = self.read(images).reshape(*row.shape, self.config.read_vectors, -1)
                index = slot_positions(row, start, batch["read_valid"], self.config.read_vectors, T, G)
                x = place_vectors(x, index, read)
        cached = "draw_features" in batch  # instead of the pictures: the encoder's features, computed before
        images, row, start = pool("draw", "features" if cached else "images")
        index = slot_positions(row, start, batch["draw_valid"], self.config.draw_positions, T, G)
        if images.shape[0]:
            with jax.named_scope("draw"):
                target = (images if cached else self.features(images)).reshape(*row.shape, self.config.draw_vectors, -1)
                fed = target if fed_noise is None else target + fed_noise
                x = place_vectors(x, index, self.drawn_inputs(fed))
        else:
            target = jnp.zeros((*row.shape, self.config.draw_vectors, self.config.generation_encoder.output_width))

        hidden, _ = self.language_model(x.reshape(*flat, -1), positions, segment_ids)
        return hidden, self.drawn_states(hidden.reshape(B, G * T, -1), index), target

    def init_all(self, images: Array, drawn: Array, tokens: Array) -> None:
        """Touches every parameter: what `init` is called with."""
        self.language_model.init_all(tokens)
        if self.config.understanding_encoder is not None:
            self.read(images)
        features = self.features(drawn)
        x = self.drawn_inputs(features)
        if not self.config.flow:
            self.predict(x)
            return
        data, states = self.to_data(features), x[:, : self.config.draw_vectors]
        if self.config.generator is None:
            data, states = data[:, 0], states[:, 0]
        B = drawn.shape[0]
        self.generate(data, jnp.zeros(B), states, jnp.ones(B, bool))
