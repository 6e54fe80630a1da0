"""Model FLOPs by formula, for MFU: what the mathematics needs, whatever is computed again.

A matrix product of [m, k] by [k, n] is 2·m·k·n. Causal attention is counted in half: T²/2 pairs of positions.
Elementwise work, norms and softmax are left out. A trained part counts three times its forward pass (its gradient
with respect to inputs and to weights), a frozen part once.
"""

import itertools
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import TextTowerConfig, ViTConfig
from pisces_jax.training.programs import (
    DecoderProgram,
    PretrainProgram,
    Program,
    Reconstruction,
    TextProgram,
    UnifiedProgram,
)

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
    channels = (3, *c.stem)
    stem = sum(18.0 * a * b * (c.image_size / 2**i) ** 2 for i, (a, b) in enumerate(itertools.pairwise(channels), 1))
    patch = channels[-1] * (c.patch_size // 2 ** len(c.stem)) ** 2
    ends = 2.0 * c.vectors * (patch * c.width + c.width * c.output_dim)
    return stem + _encoder(c.width, c.mlp_hidden, c.layers, positions) + ends


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
    if c.local_condition:  # one map into the patches' embeddings, one into their pixels
        ends += 2.0 * n * c.condition_width * (c.width + c.patch_size**2 * c.channels)
    return c.layers * per_layer + ends + 2.0 * 4 * c.width**2


def autoencoder(c: AutoencoderConfig, cells: int) -> float:
    """Encoding one picture of `cells`² latents: its convolutions and the attention in the middle."""
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
    """One vector, forward."""
    return 2.0 * hidden * (inputs + outputs)


def step_flops_by_part(
    program: Program, batch_shapes: Mapping[str, tuple[int, ...]], trained: set[str]
) -> dict[str, float]:
    """Model FLOPs of one training step over the global batch; `trained` are the parts with any trained parameter."""
    forward: dict[str, float]
    if isinstance(program, TextProgram):
        groups, rows, length = batch_shapes["tokens"]
        forward = {"language_model": groups * rows * transformer(program.model.config, length)}
    elif isinstance(program, UnifiedProgram):
        c = program.model.config
        width, features = c.language_model.width, c.generation_encoder.output_width
        groups, rows, length = batch_shapes["tokens"]
        cached = "draw_features" in batch_shapes  # then no encoder runs
        read = groups * batch_shapes["read_images"][1]
        draw = groups * batch_shapes["draw_features" if cached else "draw_images"][1]
        drawn = draw * c.draw_vectors
        forward = {
            "language_model": groups * rows * transformer(c.language_model, length),
            "understanding_encoder": read * vit(c.understanding_encoder),
            "generation_encoder": 0.0 if cached else draw * vit(c.generation_encoder),
            "understanding_projector": read
            * c.read_vectors
            * projector(c.understanding_encoder.output_width, c.projector_hidden, width),
            "generation_projector": drawn * projector(features, c.projector_hidden, width),
            "vector_head": drawn * projector(width, c.vector_head_hidden, features),
        }
        if program.reconstruction is not None:
            forward |= _decoding(program.reconstruction, draw)
    else:
        pictures = batch_shapes["tokens"][0]
        assert isinstance(program, DecoderProgram | PretrainProgram)
        forward = {}
        if (r := program.reconstruction) is not None:
            encoder = 0.0 if "features" in batch_shapes else vit(r.encoder.config)
            forward = {"generation_encoder": pictures * encoder, **_decoding(r, pictures, "latents" in batch_shapes)}
        if isinstance(program, PretrainProgram):
            tower = program.text_tower.config
            forward["text_tower"] = pictures * text_tower(tower)
            if program.understanding_encoder is not None:
                reader = program.understanding_encoder.config
                forward["understanding_encoder"] = pictures * vit(reader)
                if "words" in program.weights:
                    forward["words"] = pictures * 2.0 * reader.vectors * reader.output_width * tower.vocab_size
    # The generation encoder's features are what is predicted: it takes gradients in pretraining alone.
    once = {"generation_encoder"} if isinstance(program, UnifiedProgram | DecoderProgram) else set()
    return {part: (3 if part in trained - once else 1) * flops for part, flops in forward.items()}


def _decoding(r: Reconstruction, pictures: int, cached: bool = False) -> dict[str, float]:
    forward = {"decoder": pictures * dit(r.decoder.config)}
    if r.autoencoder is not None and not cached:
        forward["autoencoder"] = pictures * autoencoder(r.autoencoder.config, r.decoder.config.size)
    return forward


def step_flops(program: Program, batch_shapes: Mapping[str, tuple[int, ...]], trained: set[str]) -> float:
    """The sum of `step_flops_by_part`."""
    return sum(step_flops_by_part(program, batch_shapes, trained).values())


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
