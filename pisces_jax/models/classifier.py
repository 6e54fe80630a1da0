"""A small convolutional classifier with several heads over one feature vector.

It judges pictures (`evaluation/judge.py`) and is no part of a model that is trained here. Letters: B pictures, S pixels
a side, C channels, D width of the features, K classes of a head.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pisces_jax.models.layers import LayerNorm


@dataclasses.dataclass(frozen=True)
class ClassifierConfig:
    """Settings of the classifier.

    Attributes:
        classes: number of classes of each head.
        widths: channels of the stages; each stage after the first halves the side. The first one works on at most 32
            pixels a side.
        blocks: residual blocks in each stage after the first.
        features: width of the vector that the heads see.
    """

    classes: tuple[int, ...]
    widths: tuple[int, ...] = (24, 48, 96, 192)
    blocks: int = 0
    features: int = 128


class Classifier(nn.Module):
    """Maps pictures to features and to the logits of every head."""

    config: ClassifierConfig

    @nn.compact
    def __call__(self, images: UInt8[Array, "B S S 3"]) -> tuple[Float[Array, "B D"], list[Float[Array, "B K"]]]:
        """`images` may be floats from 0 to 255 too."""
        c = self.config

        def convolve(x: Any, width: int, stride: int = 1, side: int = 3) -> Any:
            x = nn.Conv(width, (side, side), (stride, stride), use_bias=False)(x)
            return LayerNorm(1e-5)(x)

        x = images.astype(jnp.float32) / 127.5 - 1.0
        stride = max(1, x.shape[1] // 32)
        x = nn.relu(convolve(x, c.widths[0], stride, side=max(3, stride + 1)))
        for width in c.widths[1:]:
            x = nn.relu(convolve(x, width, 2))
            for _ in range(c.blocks):
                x = nn.relu(x + convolve(nn.relu(convolve(x, width)), width))
        # The largest and the mean response: whether something is there, and how much of it.
        pooled = jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], axis=-1)
        features = LayerNorm(1e-5)(nn.Dense(c.features)(pooled))
        return features, [nn.Dense(classes)(features) for classes in c.classes]
