"""The published models at their true sizes: as many parameters as their authors say."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT
from pisces_jax.models.transformer import Transformer
from pisces_jax.models.vit import ViT
from pisces_jax.weights import sizes as published


def count(module, *inputs, method=None):
    init = jax.eval_shape(lambda *a: module.init(jax.random.key(0), *a, method=method), *inputs)
    return sum(x.size for x in jax.tree.leaves(nn.unbox(init)["params"]))


def picture(size, dtype=jnp.uint8, channels=3):
    return jax.ShapeDtypeStruct((1, size, size, channels), dtype)


@pytest.mark.parametrize(
    "name, parameters",
    # The models' cards: 8B; 3B and 1B with tied embeddings.
    [("LLAMA_3_1_8B", 8_030_261_248), ("LLAMA_3_2_3B", 3_212_749_824), ("LLAMA_3_2_1B", 1_235_814_400)],
)
def test_language_models(name, parameters):
    model = Transformer(getattr(published, name))
    assert count(model, jax.ShapeDtypeStruct((1, 4), jnp.int32), method="init_all") == parameters


def pooling_head(width, mlp):
    """SigLIP's attention pooling, which is no part of ours: probe, attention, norm, MLP."""
    return width + 4 * (width**2 + width) + 2 * width + 2 * width * mlp + mlp + width


@pytest.mark.parametrize(
    "name, parameters",
    [
        # transformers' SiglipVisionModel of the two checkpoints, pooling head and all.
        ("SIGLIP_SO400M_384", 428_225_600 - pooling_head(1152, 4304)),
        ("SIGLIP_BASE_224", 92_884_224 - pooling_head(768, 3072)),
        # CLIPVisionModel, without the norm of the class token.
        ("CLIP_L_14", 303_179_776 - 2 * 1024),
        ("CLIP_L_14_336", 303_507_456 - 2 * 1024),
        # A block has q, k, v and out, biases for all but k, two norms and the MLP; 1025 positions, patches of 14.
        (
            "EVA_CLIP_E_PLUS_448",
            64 * (4 * 1792**2 + 3 * 1792 + 4 * 1792 + 2 * 1792 * 15_360 + 15_360 + 1792)
            + (588 + 1) * 1792 + 1792 + 1025 * 1792,
        ),
    ],
)  # fmt: skip
def test_encoders(name, parameters):
    config = getattr(published, name)
    assert count(ViT(config), picture(config.image_size)) == parameters


@pytest.mark.parametrize(
    "name, parameters",
    [("SDXL_AUTOENCODER", 83_653_863), ("SD3_AUTOENCODER", 83_819_683), ("FLUX_AUTOENCODER", 83_819_683)],
)
def test_autoencoders(name, parameters):
    config = getattr(published, name)
    assert config.downscale == 8
    assert count(Autoencoder(config), picture(64, jnp.float32)) == parameters


def test_vectors_of_a_picture():
    assert published.SIGLIP_SO400M_384.vectors == 27**2
    assert published.EVA_CLIP_E_PLUS_448.vectors == 32**2


def test_latent_decoder_is_of_one_to_two_billion():
    c = published.latent_decoder(published.EVA_CLIP_E_PLUS_448, 4, published.SDXL_AUTOENCODER)
    assert (c.size, c.channels, c.condition_vectors, c.condition_width) == (56, 4, 64, 1792)
    inputs = (picture(56, jnp.float32, 4), *(jax.ShapeDtypeStruct(s, d) for s, d in (
        ((1,), jnp.float32), ((1, 64, 1792), jnp.float32), ((1,), jnp.bool_)
    )))  # fmt: skip
    assert 1.0e9 < count(DiT(c), *inputs) < 2.0e9


def test_padded_vocabulary():
    """LLaMA 3's 128,256 tokens and four more, on rows in multiples of 256."""
    config = dataclasses.replace(published.LLAMA_3_1_8B, vocab_size=128_260, vocab_multiple=256)
    assert config.vocab_rows == 128_512
    small = dataclasses.replace(
        config, vocab_size=260, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_hidden=8
    )
    model = Transformer(small)
    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(model.init(jax.random.key(0), tokens, method="init_all"))["params"]
    for name in ("embedding", "head"):
        assert params[name].shape == (512, 16) and not params[name][260:].any() and params[name][:260].all()
    logits = model.apply({"params": params}, jnp.ones((1, 4, 16)), method="logits")
    assert logits.shape == (1, 4, 260)
