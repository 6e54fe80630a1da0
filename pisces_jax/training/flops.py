"""Model FLOPs by formula, for MFU: what the mathematics needs, whatever is computed again.

A matrix product of [m, k] by [k, n] is 2·m·k·n. Causal attention is counted in half: T²/2 pairs of positions.
Elementwise work, norms and softmax are left out. A trained part counts three times its forward pass (its gradient
with respect to inputs and to weights), a frozen part once.
"""

import time

import jax
import jax.numpy as jnp

from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import TextTowerConfig, ViTConfig
from pisces_jax.training.programs import DecoderProgram, PretrainProgram, Program, UnifiedProgram

# Peak bfloat16 FLOP/s of a device, from the makers' data sheets, by the start of `device_kind`.
PEAKS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6": 918e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA A100": 312e12,
}


def _encoder(width: int, mlp: int, layers: int, positions: int) -> float:
    weights = 4 * width**2 + 2 * width * mlp
    return layers * (2.0 * positions * weights + 4.0 * positions**2 * width)


def vit(c: ViTConfig) -> float:
    """One picture, forward."""
    positions = c.vectors + c.class_token
    ends = 2.0 * c.vectors * (3 * c.patch_size**2 * c.width + c.width * c.output_dim)
    return _encoder(c.width, c.mlp_hidden, c.layers, positions) + ends


def text_tower(c: TextTowerConfig) -> float:
    return _encoder(c.width, c.mlp_hidden, c.layers, c.max_length)


def transformer(c: TransformerConfig, positions: int) -> float:
    """One row of `positions`, forward; the output matrix at every position."""
    weights = c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.mlp_hidden
    attention = 4.0 * positions**2 / 2 * c.heads * c.head_dim
    return c.layers * (2.0 * positions * weights + attention) + 2.0 * positions * c.width * c.vocab_size


def dit(c: DiTConfig) -> float:
    """One picture at one time, forward."""
    n, m = c.side**2, c.condition_vectors
    per_layer = 2.0 * n * (4 * c.width**2 + 3 * c.width * c.mlp_hidden) + 2.0 * m * 2 * c.width**2
    per_layer += 4.0 * n * (n + m) * c.width + 2.0 * 4 * c.width**2
    ends = 2.0 * n * 2 * c.patch_size**2 * c.channels * c.width + 2.0 * m * c.condition_width * c.width
    return c.layers * per_layer + ends + 2.0 * 4 * c.width**2


def step_flops(program: Program, batch_shapes: dict[str, tuple[int, ...]], trained: set[str]) -> float:
    """Model FLOPs of one training step over the global batch; `trained` are the parts with any trained parameter."""

    def times(part: str) -> int:
        return 3 if part in trained else 1

    if isinstance(program, UnifiedProgram):
        c = program.model.config
        groups, rows, length = batch_shapes["tokens"]
        read = batch_shapes["read_images"][1]
        draw = batch_shapes["draw_images"][1] if "draw_images" in batch_shapes else 0  # cached features: no encoder
        total = times("language_model") * groups * rows * transformer(c.language_model, length)
        total += groups * read * times("understanding_encoder") * vit(c.understanding_encoder)
        return total + groups * draw * vit(c.generation_encoder)
    pictures = batch_shapes["image"][0]
    if isinstance(program, DecoderProgram):
        r = program.reconstruction
        encoder = 0.0 if "features" in batch_shapes else vit(r.encoder.config)
        return pictures * (encoder + 3 * dit(r.decoder.config))
    assert isinstance(program, PretrainProgram)
    r = program.reconstruction
    once = vit(r.encoder.config) + dit(r.decoder.config) + vit(program.understanding_encoder.config)
    return 3 * pictures * (once + text_tower(program.text_tower.config))


def peak_flops() -> tuple[float, str]:
    """FLOP/s of all devices and where the number is from: a data sheet, or on CPU a float32 product timed here."""
    device = jax.devices()[0]
    for kind, peak in PEAKS.items():
        if device.device_kind.startswith(kind):
            return peak * jax.device_count(), f"data sheet of {kind}, bfloat16"
    n = 1024
    a = jnp.ones((n, n))
    product = jax.jit(lambda a: a @ a)
    product(a).block_until_ready()
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best, f"float32 product of {n}² matrices timed on this machine"
