"""BLIP3-o's checkpoints (arXiv 2505.09568): a Qwen2.5-VL with the learned queries and the generator in the same files.

Their `config.json` says nothing of the generator, so its settings are read from the shapes of its tensors. The decoder
lies beside them in `diffusion-decoder/`, as diffusers writes it.

Not seen: the released files themselves. Names and shapes are those of the published code and of listings.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pisces_jax.models.dit import DiTConfig
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.families import FAMILIES, TOWERS
from pisces_jax.weights.tensors import Tensor

PARTS = ("language_model", "queries", "generator")
DECODER = "diffusion-decoder"
# The vocabularies of Qwen2.5-VL 3B and 7B have more rows than tokens, for no multiple of a power of two.
QWEN_ROWS = (151_936, 152_064)


def is_checkpoint(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the files hold queries and a generator too."""
    return "model.latent_queries" in tensors or any(name.startswith("model.dit.") for name in tensors)


def rows(tensors: Mapping[str, Tensor], described: int) -> int:
    """Rows of the vocabulary: as the files have them. `described` is what `config.json` says, if they have none."""
    names = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
    return next((tensors[name].shape[0] for name in names if name in tensors), described)


def left_out(tensors: Mapping[str, Tensor]) -> list[str]:
    """A sentence for each tower whose tensors are there and not read."""
    found = []
    for pattern, what in TOWERS.items():
        if number := sum(bool(re.fullmatch(pattern, name)) for name in tensors):
            found.append(f"{number} tensors are left out: {what}")
    return found


def queries_shape(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Our shape of the queries, by name."""
    _, number, width = tensors["model.latent_queries"].shape
    return {"embedding": np.broadcast_to(np.int8(0), (number, width))}


def settings_of(part: str, path: Path, tensors: Mapping[str, Tensor]) -> tuple[str, Any]:
    """The family of the queries or of the generator, and its settings (None for the queries).

    Raises:
        UserError: the files do not hold it, or it has another form.
    """
    if not is_checkpoint(tensors):
        raise UserError(f"{path} holds a language model alone: take the {part} from a checkpoint of BLIP3-o")
    if part == "queries":
        return "queries", None
    prefix = FAMILIES["lumina"].prefixes[0]

    def shape(name: str, dimensions: int) -> tuple[int, ...]:
        key = name if name.startswith("model.") else prefix + name
        if key not in tensors or len(tensors[key].shape) != dimensions:
            found = f"has the shape {tensors[key].shape}" if key in tensors else "is missing"
            raise UserError(f"{path} does not hold BLIP3-o's generator: {key} {found}")
        return tensors[key].shape

    _, vectors, _ = shape("model.latent_queries", 3)
    width, channels = shape("patch_embedder.proj.weight", 2)
    _, condition = shape("caption_projection.linear_1.weight", 2)
    numbers = [re.match(re.escape(prefix) + r"layers\.(\d+)\.", name) for name in tensors]
    try:
        return "lumina", DiTConfig(
            size=math.isqrt(vectors), patch_size=1, channels=channels, width=width,
            layers=1 + max(int(found[1]) for found in numbers if found), heads=shape("layers.0.gate", 1)[0],
            mlp_hidden=shape("layers.0.feed_forward.linear_1.weight", 2)[0], condition_width=condition,
            condition_vectors=vectors, published=True,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"{path} does not hold BLIP3-o's generator: {error}") from error
