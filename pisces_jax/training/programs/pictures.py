"""What the programs over single pictures and their texts share: batch and dataset."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.training.programs.base import Program, Spec


class PicturesProgram(Program):
    """A batch of `batch_size` pictures with their texts, or with cached inputs in place of the pictures."""

    @property
    def picture_size(self) -> int:
        """Side of the pictures, in pixels."""
        raise NotImplementedError

    def cached_spec(self, config: ConfigDict) -> Spec:
        """The arrays of `cached_inputs` in a batch."""
        return {}

    def batch_spec(self, config: ConfigDict) -> Spec:
        size, side, length = config.batch_size, self.picture_size, config.data.text_length
        cached = self.cached_spec(config) if config.data.features else {}
        images = {} if "latents" in cached else {"image": jax.ShapeDtypeStruct((size, side, side, 3), jnp.uint8)}
        return {
            **images,
            **cached,
            "tokens": jax.ShapeDtypeStruct((size, length), jnp.int32),
            "text_mask": jax.ShapeDtypeStruct((size, length), jnp.bool_),
            "id": jax.ShapeDtypeStruct((size, 2), jnp.uint32),
            "valid": jax.ShapeDtypeStruct((size,), jnp.bool_),
        }

    def dataset(
        self, config: ConfigDict, entries: Sequence[Entry], tokenizer: Tokenizer, caches: Mapping[str, Any], **how: Any
    ) -> Pairs:
        return Pairs(entries, tokenizer, config.data.text_length, self.picture_size, config.seed, **caches, **how)
