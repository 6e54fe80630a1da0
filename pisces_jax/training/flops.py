"""Model FLOPs by formula, for MFU: what the mathematics needs, without what rematerialisation computes again.

A matrix product of [m, k] by [k, n] is 2·m·k·n. Causal attention counts as half: T²/2 pairs of positions. Elementwise
operations, norms and softmax are left out. A trained part counts as three forward passes (the backward pass has the
gradients with respect to inputs and to weights), a frozen part as one; a frozen language model with adapters as two,
since the gradients of its inputs pass through all of it. The adapters' own few products are left out.
"""

import itertools
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.denoiser import DenoiserConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import TextTowerConfig, ViTConfig
from pisces_jax.utils.chips import find_chip


def _encoder(width: int, mlp: int, layers: int, positions: int) -> float:
    weights = 4 * width**2 + 2 * width * mlp
    return layers * (2.0 * positions * weights + 4.0 * positions**2 * width)


def vit(c: ViTConfig) -> float:
    """The forward pass of one picture."""
    positions = c.vectors + c.class_token
    channels = (3, *c.stem)
    stem = sum(18.0 * a * b * (c.image_size / 2**i) ** 2 for i, (a, b) in enumerate(itertools.pairwise(channels), 1))
    patch = channels[-1] * (c.patch_size // 2 ** len(c.stem)) ** 2
    ends = 2.0 * c.vectors * (patch * c.width + c.width * c.output_dim)
    return stem + _encoder(c.width, c.mlp_hidden, c.layers, positions) + ends


def text_tower(c: TextTowerConfig) -> float:
    """The forward pass of one text of full length."""
    return _encoder(c.width, c.mlp_hidden, c.layers, c.max_length)


def transformer(c: TransformerConfig, positions: int) -> float:
    """The forward pass of one row of `positions` tokens, with logits at every position."""
    weights = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.mlp_hidden
    attention = 4.0 * positions**2 / 2 * c.heads * c.head_dim
    return c.layers * (2.0 * positions * weights + attention) + 2.0 * positions * c.width * c.vocab_size


def dit(c: DiTConfig) -> float:
    """The forward pass of one picture at one time."""
    n, m = c.side**2, c.condition_vectors
    per_layer = 2.0 * n * (4 * c.width**2 + 3 * c.width * c.mlp_hidden) + 2.0 * m * 2 * c.width**2
    per_layer += 4.0 * n * (n + m) * c.width + 2.0 * 4 * c.width**2
    ends = 2.0 * n * 2 * c.patch_size**2 * c.channels * c.width + 2.0 * m * c.condition_width * c.width
    if c.local_condition:  # one map into the patches' embeddings, one into their pixels
        ends += 2.0 * n * c.condition_width * (c.width + c.patch_size**2 * c.channels)
    return c.layers * per_layer + ends + 2.0 * 4 * c.width**2


def denoiser(c: DenoiserConfig) -> float:
    """The forward pass of one vector at one time."""
    blocks = c.layers * 5 * c.width**2
    return 2.0 * (blocks + 2 * c.width**2 + 2 * c.channels * c.width + c.condition_width * (2 * c.width + c.channels))


def autoencoder(c: AutoencoderConfig, cells: int) -> float:
    """Encoding one picture to `cells`² latents: the convolutions and the attention in the middle."""
    total, before = 0.0, c.channels[0]
    for level, width in enumerate(c.channels):
        pixels = float(cells * 2 ** (len(c.channels) - 1 - level)) ** 2
        if level == 0:
            total += pixels * 9 * 3 * width
        total += pixels * ((before != width) * before * width + 9 * (before * width + (2 * c.blocks - 1) * width**2))
        if level < len(c.channels) - 1:
            total += pixels / 4 * 9 * width**2
        before = width
    n = float(cells) ** 2
    total += n * (4 * 9 * before**2 + 4 * before**2 + 2 * n * before + 9 * before * 2 * c.latent_channels)
    return 2 * (total + n * c.quant_conv * 4 * c.latent_channels**2)


def projector(inputs: int, hidden: int, outputs: int) -> float:
    """The forward pass of one vector."""
    return 2.0 * hidden * (inputs + outputs)


def step_flops_by_part(program: Any, spec: Mapping[str, Any], trained: set[str]) -> dict[str, float]:
    """Model FLOPs of one training step over a global batch with this specification, by part.

    Args:
        trained: the parts with any trained parameter.
    """
    forward: dict[str, float] = program.forward_flops(spec)
    passes = {part: 3 for part in trained - set(program.targets)}
    if "lora" in trained:
        passes = {"language_model": 2, **passes}
    return {part: passes.get(part, 1) * flops for part, flops in forward.items()}


def step_flops(program: Any, spec: Mapping[str, Any], trained: set[str]) -> float:
    """The sum of `step_flops_by_part`."""
    return sum(step_flops_by_part(program, spec, trained).values())


def peak_flops() -> float:
    """Peak FLOP/s of all devices: bfloat16 by the data sheet, or on a CPU the best of five float32 products."""
    if (chip := find_chip(jax.devices()[0].device_kind)) is not None:
        return chip.flops * jax.device_count()
    n = 1024
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)
