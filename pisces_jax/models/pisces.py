"""The unified model (Pisces, arXiv 2506.10395): one causal language model, two visual encoders.

A picture that is read enters as the understanding encoder's long sequence of vectors, `V_n = MLP(φ(I))`; a picture
that is drawn as the generation encoder's short, pooled one, `V_m = MLP(Pool(ϕ(I)))`. The state at `[IMG]` predicts
vector 0 and the state at vector k predicts vector k+1, by regression to the pooled features themselves.

A batch holds groups of rows. The rows of a group share a pool of pictures, each with a pointer (row, start) to its
place. Without its encoders the model is the language model alone.

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

from pisces_jax.models.layers import Projector
from pisces_jax.models.transformer import Cache, Transformer, TransformerConfig
from pisces_jax.models.vit import ViT, ViTConfig, pooled_features
from pisces_jax.sharding import constrain


@dataclasses.dataclass(frozen=True)
class PiscesConfig:
    """Sizes of the parts; with no encoders the model reads and writes text alone.

    Attributes:
        pool: stride a of Pool_{a×a}.
        projector_hidden, vector_head_hidden: hidden widths of the two-layer MLPs.
        place_embedding: adds to each drawn vector that is fed in learned embeddings of the row and the column of the
            vector that comes next. Pisces has none: a CLIP's vectors say where they are. Those of the small runs'
            autoencoders do not.
        fed_vectors: whether drawn vectors are fed in at all. Without, the place embedding alone is fed in: one learned
            query per place, as in BLIP3-o. A vector that regression predicts is a mean and tells nothing that the text
            before it does not, while a true one shows how the picture goes on; a model trained on true vectors learns
            to follow them, and in a rollout its own lead it astray. Pisces feeds them.
    """

    language_model: TransformerConfig
    understanding_encoder: ViTConfig | None = None
    generation_encoder: ViTConfig | None = None
    pool: int = 1
    projector_hidden: int = 0
    vector_head_hidden: int = 0
    place_embedding: bool = False
    fed_vectors: bool = True

    def __post_init__(self) -> None:
        if (self.understanding_encoder is None) != (self.generation_encoder is None):
            raise ValueError("a unified model has both encoders or none")

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


def take_states(x: Float[Array, "B GT D"], index: Int[Array, "B P n"]) -> Float[Array, "B P n D"]:
    """The states one position before each vector: those that predict it. Zeros for idle slots."""
    flat = index.reshape(index.shape[0], -1) - 1
    last = x.shape[1] - 1
    taken = jax.vmap(lambda a, i: a.at[i].get(mode="fill", fill_value=0))(x, jnp.where(flat >= last, last + 1, flat))
    return taken.reshape(*index.shape, x.shape[-1])


class Pisces(nn.Module):
    """The parts and how they join; each public method is an entry for `apply(..., method=...)`."""

    config: PiscesConfig
    dtype: Any = jnp.float32

    def setup(self) -> None:
        c = self.config
        width = c.language_model.width
        self.language_model = Transformer(c.language_model, self.dtype)
        if c.understanding_encoder is None or c.generation_encoder is None:
            return
        self.understanding_encoder = ViT(c.understanding_encoder, self.dtype)
        self.generation_encoder = ViT(c.generation_encoder, self.dtype)
        self.understanding_projector = Projector(width, c.projector_hidden, self.dtype)
        grid = math.isqrt(c.draw_vectors) if c.place_embedding else 0
        self.generation_projector = Projector(width, c.projector_hidden, self.dtype, grid)
        # Features are small: a head that starts at the usual size has its own random vectors to unlearn first.
        self.vector_head = Projector(c.generation_encoder.output_width, c.vector_head_hidden, self.dtype, scale=0.1)

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

    def predict(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B C"]:
        """The next visual vector from a hidden state, float32."""
        return self.vector_head(hidden).astype(jnp.float32)

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

    def __call__(self, batch: dict[str, Array]) -> tuple[Array, Array | None, Array | None]:
        """Hidden states, predicted vectors and their targets for a batch of packed groups (`data/packing/rows.py`).

        Returns:
            hidden [B·G, T, D]; predicted [B, P, m, C] and target [B, P, m, C], both float32, or None without encoders.
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
            return images.reshape(-1, *images.shape[2:]), batch[f"{role}_row"], batch[f"{role}_start"]

        images, row, start = pool("read")
        if images.shape[0]:
            with jax.named_scope("read"):
                read = self.read(images).reshape(*row.shape, self.config.read_vectors, -1)
                index = slot_positions(row, start, batch["read_valid"], self.config.read_vectors, T, G)
                x = place_vectors(x, index, read)
        cached = "draw_features" in batch  # instead of the pictures: the encoder's features, computed before
        images, row, start = pool("draw", "features" if cached else "images")
        index = slot_positions(row, start, batch["draw_valid"], self.config.draw_vectors, T, G)
        if images.shape[0]:
            with jax.named_scope("draw"):
                target = (images if cached else self.features(images)).reshape(*row.shape, self.config.draw_vectors, -1)
                x = place_vectors(x, index, self.feed(target, jnp.arange(self.config.draw_vectors)))
        else:
            target = jnp.zeros((*index.shape, self.config.generation_encoder.output_width))

        hidden, _ = self.language_model(x.reshape(*flat, -1), positions, segment_ids)
        states = take_states(hidden.reshape(B, G * T, -1), index)
        return hidden, self.predict(states), target

    def init_all(self, images: Array, drawn: Array, tokens: Array) -> None:
        """Touches every parameter: what `init` is called with."""
        self.language_model.init_all(tokens)
        self.read(images)
        self.predict(self.feed(self.features(drawn), jnp.arange(self.config.draw_vectors)))
