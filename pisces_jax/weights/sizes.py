"""The published models at their true sizes, one place each; `weights/` reads their files.

A config takes one by `settings`, e.g. `language_model=settings(LLAMA_3_1_8B)`. Where a part starts from a published
folder, its settings are held against the folder's own `config.json` (`weights/architecture.py`).
"""

import dataclasses
from typing import Any

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.transformer import RopeScaling, TransformerConfig
from pisces_jax.models.unet import UNetConfig
from pisces_jax.models.vit import ViTConfig

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Language models (Dubey et al. 2024; Llama 3.2 model card, September 2024).

LLAMA_3_1_8B = TransformerConfig(
    vocab_size=128_256, width=4096, layers=32, heads=32, kv_heads=8, head_dim=128, mlp_hidden=14_336,
    rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), eps=1e-5,
)  # fmt: skip
LLAMA_3_2_3B = TransformerConfig(
    vocab_size=128_256, width=3072, layers=28, heads=24, kv_heads=8, head_dim=128, mlp_hidden=8192,
    rope_theta=500_000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), eps=1e-5, tied_embedding=True,
)  # fmt: skip
LLAMA_3_2_1B = TransformerConfig(
    vocab_size=128_256, width=2048, layers=16, heads=32, kv_heads=8, head_dim=64, mlp_hidden=8192,
    rope_theta=500_000.0, rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192), eps=1e-5, tied_embedding=True,
)  # fmt: skip

# The language models of Qwen2.5-VL (Bai et al. 2025, arXiv 2502.13923), which BLIP3-o starts from. For text their
# three-dimensional rotary embedding is the plain one.
QWEN_2_5_VL_7B = TransformerConfig(
    vocab_size=152_064, width=3584, layers=28, heads=28, kv_heads=4, head_dim=128, mlp_hidden=18_944,
    rope_theta=1_000_000.0, eps=1e-6, qkv_bias=True,
)  # fmt: skip
QWEN_2_5_VL_3B = TransformerConfig(
    vocab_size=151_936, width=2048, layers=36, heads=16, kv_heads=2, head_dim=128, mlp_hidden=11_008,
    rope_theta=1_000_000.0, eps=1e-6, tied_embedding=True, qkv_bias=True,
)  # fmt: skip

# Encoders. SigLIP (Zhai et al. 2023) without its pooling head: the patch vectors after the final norm.

SIGLIP_SO400M_384 = ViTConfig(image_size=384, patch_size=14, width=1152, layers=27, heads=16, mlp_hidden=4304)
SIGLIP_BASE_224 = ViTConfig(image_size=224, patch_size=16, width=768, layers=12, heads=12, mlp_hidden=3072)

# EVA-CLIP-E-plus (Sun et al. 2023) as Emu2 and BLIP3-o take it: at 448 pixels, the last block's patch vectors raw.
EVA_CLIP_E_PLUS_448 = ViTConfig(
    image_size=448, patch_size=14, width=1792, layers=64, heads=16, mlp_hidden=15_360, norm="post", class_token=True,
    final_norm=False, biases="qv", activation="gelu", eps=1e-6, mean=CLIP_MEAN, std=CLIP_STD,
)  # fmt: skip
# The same tower as it was published first, at 224 pixels (timm: eva02_enormous_patch14_clip_224).
EVA_CLIP_E_PLUS_224 = dataclasses.replace(EVA_CLIP_E_PLUS_448, image_size=224)
# CLIP ViT-L/14 (Radford et al. 2021): the last block's patch vectors; its final norm is for the class token alone.
CLIP_L_14 = ViTConfig(
    image_size=224, patch_size=14, width=1024, layers=24, heads=16, mlp_hidden=4096, class_token=True,
    patch_bias=False, embedding_norm=True, final_norm=False, activation="gelu_quick", eps=1e-5, mean=CLIP_MEAN,
    std=CLIP_STD,
)  # fmt: skip
CLIP_L_14_336 = dataclasses.replace(CLIP_L_14, image_size=336)

# Autoencoders of latent diffusion.

SDXL_AUTOENCODER = AutoencoderConfig(latent_channels=4, scale=0.13025)
SD3_AUTOENCODER = AutoencoderConfig(latent_channels=16, quant_conv=False, scale=1.5305, shift=0.0609)
FLUX_AUTOENCODER = AutoencoderConfig(latent_channels=16, quant_conv=False, scale=0.3611, shift=0.1159)

# The U-Net that draws Emu2-Gen's and BLIP3-o's pictures of 1,024 pixels: SDXL's, with EVA-CLIP-E-plus features.
EMU2_UNET = UNetConfig(size=128, channels=4, condition_width=1792)


def latent_decoder(encoder: ViTConfig, pool: int, autoencoder: AutoencoderConfig) -> DiTConfig:
    """Our flow-matching decoder: 1.4 B parameters for EVA-CLIP-E-plus, the blocks of BLIP3-o's feature generator
    (Lumina-Next's) on latents of the pictures that the encoder sees.
    """
    return DiTConfig(
        size=encoder.image_size // autoencoder.downscale, patch_size=2, channels=autoencoder.latent_channels,
        width=1792, layers=24, heads=28, mlp_hidden=4864, condition_width=encoder.output_width,
        condition_vectors=encoder.vectors // pool**2,
    )  # fmt: skip


# BLIP3-o's generator of visual vectors (arXiv 2505.09568), as `model.generator`: 1,365,010,336 parameters for the 8×8
# map of EVA-CLIP-E-plus features and the 3,584-wide states of its 8B model.
FEATURE_GENERATOR = dict(width=1792, layers=24, heads=28, mlp_hidden=4864, published=True)

# What a config says elsewhere: the tokenizer its vocabulary, the generation encoder what the decoder is conditioned on,
# and `model.lora` the adapters.
_IMPLIED = ("vocab_size", "condition_width", "condition_vectors", "lora")


def settings(config: Any, **changes: Any) -> dict[str, Any]:
    """The values of a definition as a config file holds them, with `changes` over them."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in _IMPLIED}
    return {**values, **changes}
