"""Ours against the reference implementations, on the same randomly filled files, number by number.

`TINY` are the parts at sizes for `test_parity.py`; `python tests/parity.py` (`make parity`) takes them at their true
shapes and prints the table of `docs/parity.md`.

Each case builds the reference's model and fills it so that mistakes show: queries and keys sharpened, norms and biases
random. The file is written in the published layout and read as a user's config would read it.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jax.numpy as jnp
import numpy as np
import torch
from diffusers import AutoencoderKL, LuminaNextDiT2DModel, UNet2DConditionModel
from diffusers.models import embeddings
from diffusers.models.embeddings import PixArtAlphaTextProjection
from safetensors.torch import save_file
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT
from pisces_jax.models.layers import apply
from pisces_jax.models.transformer import Transformer
from pisces_jax.models.unet import UNet
from pisces_jax.models.vit import ViT
from pisces_jax.weights.folder import Folder, part_shapes, read_part

NARROW = torch.float32  # by this name also where `lifted` holds
ROPE = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
# The tests' compiler otherwise leaves out what makes float32 sums exact; users run optimised code.
OPTIMISED = {"xla_backend_optimization_level": 3}
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


@contextlib.contextmanager
def lifted():
    """float64 everywhere in the reference: what it casts to float32 inside (rotary angles, RMSNorm, softmax) is
    cast to float64 instead. This is the one change that is made to it."""
    with (
        mock.patch.object(torch, "float", torch.float64),
        mock.patch.object(torch, "float32", torch.float64),
        mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    ):
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


def fill(model: torch.nn.Module, seed: int = 0, sharpen: float = 2.0) -> None:
    """Random values for every parameter, so large that each one matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        x = torch.randn(p.shape, generator=generator, dtype=torch.float32)
        if p.ndim == 1:
            x = 0.3 * x + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
        elif "embed" in name and "patch" not in name and "linear" not in name:
            x = 0.5 * x
        else:
            x = x / p[0].numel() ** 0.5
            if any(word in name for word in ("q_proj", "k_proj", "to_q", "to_k")):
                x = sharpen * x
        p.data = x.to(p.dtype)


@contextlib.contextmanager
def widened(model: torch.nn.Module):
    """Each layer's float32 values as float64 while that layer runs: exact, and without a second copy of the model."""

    def cast(dtype: torch.dtype) -> Callable[..., None]:
        def hook(module: torch.nn.Module, *_: Any) -> None:
            for p in module.parameters(recurse=False):
                p.data = p.data.to(dtype)

        return hook

    hooks = []
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            hooks.append(module.register_forward_pre_hook(cast(torch.double)))
            hooks.append(module.register_forward_hook(cast(NARROW)))
    rotary = [(module, module.rotary_emb) for module in model.modules() if hasattr(module, "rotary_emb")]
    for module, narrow in rotary:
        module.rotary_emb = type(narrow)(module.config)
    try:
        yield
    finally:
        for module, narrow in rotary:
            module.rotary_emb = narrow
        for hook in hooks:
            hook.remove()


class Eva(torch.nn.Module):
    """EVA-CLIP-E in plain torch, written from its description, for the true block width; its own weights are held
    against timm's numbers in `test_parity.py`."""

    def __init__(self, image: int, patch: int, width: int, heads: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.heads = heads
        self.cls_token = torch.nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = torch.nn.Parameter(torch.zeros(1, 1 + (image // patch) ** 2, width))
        self.patch_embed = torch.nn.ModuleDict({"proj": torch.nn.Conv2d(3, width, patch, patch)})
        self.blocks = torch.nn.ModuleList()
        for _ in range(layers):
            block = torch.nn.Module()
            block.attn = torch.nn.Module()
            block.attn.qkv = torch.nn.Linear(width, 3 * width, bias=False)
            block.attn.q_bias = torch.nn.Parameter(torch.zeros(width))
            block.attn.v_bias = torch.nn.Parameter(torch.zeros(width))
            block.attn.proj = torch.nn.Linear(width, width)
            block.norm1, block.norm2 = (torch.nn.LayerNorm(width, eps=1e-6) for _ in range(2))
            block.mlp = torch.nn.ModuleDict(
                {"fc1": torch.nn.Linear(width, hidden), "fc2": torch.nn.Linear(hidden, width)}
            )
            self.blocks.append(block)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed["proj"](pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            bias = torch.cat([block.attn.q_bias, torch.zeros_like(block.attn.q_bias), block.attn.v_bias])
            qkv = torch.nn.functional.linear(x, block.attn.qkv.weight, bias)
            q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            x = x + block.norm1(block.attn.proj(y))
            y = torch.nn.functional.gelu(block.mlp["fc1"](x))
            x = x + block.norm2(block.mlp["fc2"](y))
        return x[:, 1:]


@dataclasses.dataclass
class Case:
    """A part: the reference's model, its inputs, and both forward passes.

    Attributes:
        make: builds the reference's model, with the default dtype.
        run: the reference's output for (model, inputs, dtype).
        ours: our output for (settings, params, inputs, dtype).
        inputs: host array, or a tuple of them.
        config_json: where the reference has no writer of its own.
        in_place: for models that would not fit twice: float64 is had by widening each layer's values while it runs, and
            for bfloat16 the model's own values are rounded, for good.
        name: of the part, in a folder that holds several.
    """

    part: str
    size: str
    make: Callable[[], torch.nn.Module]
    run: Callable[..., torch.Tensor]
    ours: Callable[..., Any]
    inputs: Any
    config_json: dict | None = None
    in_place: bool = False
    name: str = ""

    def write(self, folder: Path, **fill_settings: Any) -> torch.nn.Module:
        """The files of a randomly filled reference model, in float32."""
        model = self.make().eval()
        fill(model, **fill_settings)
        if self.config_json is None:
            model.save_pretrained(folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "model.safetensors")
            (folder / "config.json").write_text(json.dumps(self.config_json))
        return model

    def reference(self, model: torch.nn.Module, dtype: str, gradients: bool = False) -> Any:
        """The reference's output with the values of `model` in `dtype`; its buffers stay as they are made."""
        with lifted() if dtype == "float64" else contextlib.nullcontext(), torch.set_grad_enabled(gradients):
            if self.in_place and dtype != "bfloat16":
                with widened(model) if dtype == "float64" else contextlib.nullcontext():
                    return self.run(model, self.inputs, DTYPES[dtype]).double().numpy()
            copy = model if self.in_place else self.make().eval()
            if copy is not model:
                copy.load_state_dict(model.state_dict())
            for p in copy.parameters():
                p.data = p.data.to(DTYPES[dtype])
            out = self.run(copy, self.inputs, DTYPES[dtype])
            return (out, copy) if gradients else out.double().numpy()

    def params(self, folder: Path, dtype: Any = None) -> tuple[Any, Any]:
        """(our settings as `config.json` says them, our parameters), read from the folder; float64 under x64."""
        opened = Folder.open(f"{folder}{os.sep}", self.name)
        shapes = part_shapes(opened.settings)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
        tokens = vocabulary(opened)
        return opened.settings, read_part(opened, shapes, vocab_size=tokens, shardings=shardings, dtype=dtype)


def vocabulary(folder: Folder) -> int | None:
    return getattr(folder.settings, "vocab_size", None)


def relative(got: Any, expected: np.ndarray) -> float:
    """‖got − expected‖ / ‖expected‖."""
    got = np.asarray(got, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# The parts


def logits(settings: Any, params: Any, tokens: Any, dtype: Any) -> Any:
    model = Transformer(settings, dtype)
    tokens = jnp.asarray(tokens)
    x = apply(model, params, tokens, method="embed")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return apply(model, params, apply(model, params, x, positions)[0], method="logits")


def vectors(settings: Any, params: Any, images: Any, dtype: Any) -> Any:
    return apply(ViT(settings, dtype), params, jnp.asarray(images))


def llama(size: str, positions: int, in_place: bool = False, **config: Any) -> Case:
    full = {"rms_norm_eps": 1e-5, "max_position_embeddings": 131_072, "rope_parameters": ROPE, **config}
    tokens = np.random.default_rng(1).integers(0, full["vocab_size"], (1, positions))
    return Case(
        "LLaMA 3.1", f"{size}, {positions} positions",
        lambda: LlamaForCausalLM(LlamaConfig(**{**full, "rope_parameters": dict(full["rope_parameters"])})),
        lambda m, x, _: m(torch.as_tensor(x), use_cache=False).logits, logits, tokens, in_place=in_place,
    )  # fmt: skip


def pictures(size: int, number: int = 1) -> np.ndarray:
    return np.random.default_rng(2).integers(0, 256, (number, size, size, 3)).astype(np.uint8)


def pixels(images: np.ndarray, mean: Any, std: Any, dtype: torch.dtype) -> torch.Tensor:
    x = (images / 255.0 - np.asarray(mean)) / np.asarray(std)
    return torch.as_tensor(x.transpose(0, 3, 1, 2)).to(dtype)


def siglip(size: str, **config: Any) -> Case:
    return Case(
        "SigLIP", size, lambda: SiglipVisionModel(SiglipVisionConfig(**config)),
        lambda m, x, dtype: m(pixels(x, [0.5] * 3, [0.5] * 3, dtype)).last_hidden_state, vectors,
        pictures(config["image_size"]),
    )  # fmt: skip


MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip(size: str, **config: Any) -> Case:
    return Case(
        "CLIP", size, lambda: CLIPVisionModel(CLIPVisionConfig(**config)),
        lambda m, x, dtype: m(pixels(x, MEAN, STD, dtype)).last_hidden_state[:, 1:], vectors,
        pictures(config["image_size"]),
    )  # fmt: skip


def eva(size: str, image: int, patch: int, width: int, heads: int, hidden: int, layers: int) -> Case:
    tower = dict(
        eva_model_name="eva-clip-4b-14-x", image_size=image, patch_size=patch, width=width, layers=layers,
        head_width=width // heads, mlp_ratio=hidden / width, qkv_bias=True, postnorm=True,
    )  # fmt: skip
    return Case(
        "EVA-CLIP", size, lambda: Eva(image, patch, width, heads, hidden, layers),
        lambda m, x, dtype: m(pixels(x, MEAN, STD, dtype)), vectors, pictures(image), {"vision_config": tower},
    )  # fmt: skip


def autoencoder(part: str, size: str, side: int, latent: int, **config: Any) -> list[Case]:
    """Encoding and decoding: two cases on the same weights. Latents are scaled and shifted as pipelines do."""
    levels = len(config["block_out_channels"])
    full = dict(
        latent_channels=latent, down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels, **config,
    )  # fmt: skip
    rng = np.random.default_rng(3)

    def make() -> torch.nn.Module:
        return AutoencoderKL(**full)

    def encode(model: Any, x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        mean = model.encode(channels_first(x, dtype)).latent_dist.mean
        return ((mean - (model.config.shift_factor or 0)) * model.config.scaling_factor).permute(0, 2, 3, 1)

    def decode(model: Any, z: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
        z = channels_first(z, dtype) / model.config.scaling_factor + (model.config.shift_factor or 0)
        return model.decode(z).sample.permute(0, 2, 3, 1)

    def ours(method: str) -> Callable[..., Any]:
        return lambda settings, params, x, dtype: apply(
            Autoencoder(settings, dtype), params, jnp.asarray(x), method=method
        )

    cells = side // 2 ** (levels - 1)
    pixels_, latents = rng.uniform(-1, 1, (1, side, side, 3)), rng.standard_normal((1, cells, cells, latent))
    return [
        Case(f"{part}, encode", size, make, encode, ours("encode"), pixels_),
        Case(f"{part}, decode", size, make, decode, ours("decode"), latents),
    ]


# BLIP3-o: the language model of Qwen2.5-VL, and the generator of visual vectors.
QWEN_ROPE = dict(rope_type="default", rope_theta=1_000_000.0)


def qwen_model(vision: bool, **config: Any) -> torch.nn.Module:
    """`Qwen2ForCausalLM`, or Qwen2.5-VL with the smallest of vision towers: text alone runs through it."""
    if not vision:
        return Qwen2ForCausalLM(Qwen2Config(**config, rope_parameters=dict(QWEN_ROPE)))
    eyes = dict(
        depth=1, hidden_size=16, out_hidden_size=config["hidden_size"], intermediate_size=16, num_heads=2,
        fullatt_block_indexes=[0],
    )  # fmt: skip
    tied = config.pop("tie_word_embeddings", False)
    third = config["hidden_size"] // config["num_attention_heads"] // 2
    sections = [third // 3, third // 3, third - 2 * (third // 3)]
    text = dict(config, rope_parameters=dict(QWEN_ROPE, mrope_section=sections), bos_token_id=None, eos_token_id=None)
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(text_config=text, vision_config=eyes, tie_word_embeddings=tied)
    )


def qwen(size: str, positions: int, vision: bool = False, in_place: bool = False, **config: Any) -> Case:
    full = {"rms_norm_eps": 1e-6, "max_position_embeddings": 32_768, **config}
    tokens = np.random.default_rng(1).integers(0, full["vocab_size"], (1, positions))
    return Case(
        "Qwen2.5-VL, text" if vision else "Qwen2.5", f"{size}, {positions} positions",
        lambda: qwen_model(vision, **full), lambda m, x, _: m(torch.as_tensor(x), use_cache=False).logits, logits,
        tokens, in_place=in_place,
    )  # fmt: skip


class Generator(torch.nn.Module):
    """BLIP3-o's queries and generator, `LuminaNextDiT2DModel` behind a projection of the condition, by their released
    names."""

    def __init__(self, vectors: int, states: int, multiple: int, **config: int) -> None:
        super().__init__()
        width = config["hidden_size"]
        self.model = torch.nn.Module()
        self.model.dit = torch.nn.Module()
        self.model.dit.model = LuminaNextDiT2DModel(
            sample_size=round(vectors**0.5), patch_size=1, num_kv_heads=config["num_attention_heads"], norm_eps=1e-5,
            multiple_of=multiple, learn_sigma=False, qk_norm=True, cross_attention_dim=width, **config,
        )  # fmt: skip
        self.model.dit.model.caption_projection = PixArtAlphaTextProjection(states, width)
        self.model.latent_queries = torch.nn.Parameter(torch.randn(1, vectors, states))

    def forward(self, x: torch.Tensor, time: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """noise − data [B, C, s, s] at times 1000·σ; a dropped condition is zero before its projection."""
        network = self.model.dit.model
        config, side = network.config, x.shape[-1]
        wide = torch.get_default_dtype()
        rotary = embeddings.get_1d_rotary_pos_embed
        with mock.patch.object(
            embeddings, "get_1d_rotary_pos_embed", lambda *a, **k: rotary(*a, **{**k, "freqs_dtype": wide})
        ):
            rope = embeddings.get_2d_rotary_pos_embed_lumina(
                config.hidden_size // config.num_attention_heads, side, side
            )
        mask = torch.ones(condition.shape[:2])
        return network(
            x, time, network.caption_projection(condition), mask, rope, cross_attention_kwargs={}
        ).sample  # fmt: skip


def velocity_of(model: Any, inputs: Any, dtype: torch.dtype) -> torch.Tensor:
    x, t, states, keep = inputs
    condition = torch.as_tensor(states * keep[:, None, None]).to(dtype)
    return -model(channels_first(x, dtype), torch.as_tensor(1000 * (1 - t)), condition).permute(0, 2, 3, 1)


def velocity(settings: Any, params: Any, inputs: Any, dtype: Any) -> Any:
    return apply(DiT(settings, dtype), params, *map(jnp.asarray, inputs))


GENERATOR = dict(in_channels=1792, hidden_size=1792, num_layers=24, num_attention_heads=28)
TINY_GENERATOR = dict(in_channels=16, hidden_size=16, num_layers=2, num_attention_heads=2)


def generator(size: str, vectors: int, states: int, multiple: int, in_place: bool = False, **config: int) -> Case:
    rng, side = np.random.default_rng(5), round(vectors**0.5)
    inputs = (
        rng.standard_normal((3, side, side, config["in_channels"])), np.array([0.0, 0.31, 0.9]),
        rng.standard_normal((3, vectors, states)), np.array([True, False, True]),
    )  # fmt: skip
    return Case(
        "BLIP3-o's generator", size, lambda: Generator(vectors, states, multiple, **config), velocity_of, velocity,
        inputs, {"model_type": "blip3o_qwen"}, in_place=in_place, name="generator",
    )  # fmt: skip


# SDXL's U-Net with the condition of Emu2, as `unet/config.json` says it.
UNET = dict(
    sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20),
    transformer_layers_per_block=(1, 2, 10), down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    up_block_types=(*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"), use_linear_projection=True, cross_attention_dim=1792,
    addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=1792 + 6 * 256,
)  # fmt: skip
TINY_UNET = dict(
    UNET, sample_size=8, block_out_channels=(16, 32, 32), attention_head_dim=(2, 2, 4), norm_num_groups=8,
    transformer_layers_per_block=(1, 2, 3), cross_attention_dim=24, addition_time_embed_dim=8,
    projection_class_embeddings_input_dim=24 + 6 * 8,
)  # fmt: skip


def channels_first(x: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x).transpose(0, 3, 1, 2)).to(dtype)


def noise_of(model: Any, inputs: Any, dtype: torch.dtype) -> torch.Tensor:
    """What the reference predicts; the pooled condition is the mean of the vectors, as in Emu2-Gen's pipeline."""
    x, t, vectors, sizes = inputs
    vectors = torch.as_tensor(vectors).to(dtype)
    added = {"text_embeds": vectors.mean(1), "time_ids": torch.as_tensor(sizes)}
    out = model(channels_first(x, dtype), torch.as_tensor(t), vectors, added_cond_kwargs=added)
    return out.sample.permute(0, 2, 3, 1)


def noise(settings: Any, params: Any, inputs: Any, dtype: Any) -> Any:
    return apply(UNet(settings, dtype), params, *map(jnp.asarray, inputs))


def unet(size: str, side: int, condition: int, in_place: bool = False, **config: Any) -> Case:
    rng = np.random.default_rng(4)
    sizes = np.array([[1024, 768, 16, 40, 512, 640], [640, 480, 0, 3, 1024, 1024]], float)
    inputs = (
        rng.standard_normal((2, side, side, 4)), np.array([981.0, 321.0]),
        rng.standard_normal((2, condition, config["cross_attention_dim"])), sizes,
    )  # fmt: skip
    return Case(
        "U-Net", size, lambda: UNet2DConditionModel(**config), noise_of, noise, inputs, in_place=in_place
    )  # fmt: skip


def tiny() -> list[Case]:
    small = dict(hidden_size=48, intermediate_size=56, num_attention_heads=4, image_size=30, patch_size=4)
    return [
        llama(
            "tiny", 600, vocab_size=61, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        ),
        siglip("tiny", num_hidden_layers=2, **small),
        clip("tiny", num_hidden_layers=2, **{**small, "image_size": 32}),
        eva("tiny", 28, 7, 48, 4, 56, 2),
        *(
            qwen(
                "tiny", 40, vision, vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=vision,
            )
            for vision in (False, True)
        ),
        generator("tiny", 4, 24, 8, **TINY_GENERATOR),
        *autoencoder(
            "autoencoder, 4 channels", "tiny", 16, 4, block_out_channels=(16, 32, 32), layers_per_block=1,
            norm_num_groups=8, scaling_factor=0.13025,
        ),
        *autoencoder(
            "autoencoder, 16 channels", "tiny", 16, 16, block_out_channels=(16, 32), layers_per_block=2,
            norm_num_groups=8, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False,
        ),
    ]  # fmt: skip


def true_size() -> list[Case]:
    four = (128, 256, 512, 512)
    return [
        siglip(
            "so400m-patch14-384", num_hidden_layers=27, hidden_size=1152, intermediate_size=4304,
            num_attention_heads=16, image_size=384, patch_size=14,
        ),
        clip(
            "ViT-L/14", num_hidden_layers=24, hidden_size=1024, intermediate_size=4096, num_attention_heads=16,
            image_size=224, patch_size=14,
        ),
        eva("E-plus, one block, 448 px", 448, 14, 1792, 16, 15_360, 1),
        *autoencoder(
            "autoencoder of SDXL", "256 px", 256, 4, block_out_channels=four, layers_per_block=2, scaling_factor=0.13025
        ),
        *autoencoder(
            "autoencoder of FLUX", "256 px", 256, 16, block_out_channels=four, layers_per_block=2,
            scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False,
        ),
        llama(
            "3.2-1B", 256, in_place=True, vocab_size=128_256, hidden_size=2048, intermediate_size=8192,
            num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
            rope_parameters={**ROPE, "factor": 32.0},
        ),
        unet("Emu2-Gen, 256 px", 32, 64, in_place=True, **UNET),
        qwen(
            "VL-7B, two layers, 8,192 words", 256, in_place=True, vocab_size=8192, hidden_size=3584,
            intermediate_size=18_944, num_hidden_layers=2, num_attention_heads=28, num_key_value_heads=4,
        ),
        qwen(
            "VL-3B, two layers", 256, vision=True, in_place=True, vocab_size=151_936, hidden_size=2048,
            intermediate_size=11_008, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
        generator("8B", 64, 3584, 256, in_place=True, **GENERATOR),
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Result:
    """Relative errors against the reference in float64: ours and the reference's own, by dtype."""

    part: str
    size: str
    dtype: str
    ours: float
    reference: float
    within: bool


def measure(case: Case, folder: Path, model: torch.nn.Module) -> list[Result]:
    """In float64 ours must be within 1e-9; in float32 and bfloat16 at most twice the reference's own error.

    A `model` of a case that is `in_place` is rounded, and gone afterwards if the caller keeps no other reference.
    """
    expected = {dtype: case.reference(model, dtype) for dtype in DTYPES}
    del model  # both implementations need not be in memory at once
    exact = expected["float64"]
    results = []
    for dtype in DTYPES:
        own = relative(expected[dtype], exact)
        with jax.enable_x64(dtype == "float64"):
            # In float64 the values are those of the file, widened where they are used: a third of the memory.
            settings, params = case.params(folder, None if dtype == "float64" else dtype)
            compute = jnp.dtype(dtype)
            run = jax.jit(lambda p, x, s=settings, d=compute: case.ours(s, p, x, d), compiler_options=OPTIMISED)
            ours = relative(run(params, case.inputs), exact)
        results.append(Result(case.part, case.size, dtype, ours, own, ours <= (2 * own if own else 1e-9)))
    return results


def row(r: Result) -> str:
    own = f"{r.reference:.1e}" if r.reference else "–"
    return f"| {r.part} | {r.size} | {r.dtype} | {r.ours:.1e} | {own} | {'yes' if r.within else '**no**'} |"


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the parity table, at true shapes (or --tiny).")
    parser.add_argument("--tiny", action="store_true", help="the sizes of the tests")
    parser.add_argument("--only", default="", help="parts whose name or size holds this")
    flags = parser.parse_args()
    print("| part | size | dtype | ours against float64 | reference against float64 | within bounds |")
    print("|---|---|---|---|---|---|", flush=True)
    good = True
    for case in tiny() if flags.tiny else true_size():
        if flags.only not in f"{case.part} {case.size}":
            continue
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            for result in measure(case, Path(scratch) / "m", case.write(Path(scratch) / "m")):
                print(row(result), flush=True)
                good &= result.within
        with torch.device("meta"):
            count = sum(p.numel() for p in case.make().parameters())
        print(f"{case.part}, {case.size}: {count:,} parameters, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if not good:
        sys.exit("some parts are out of bounds")


if __name__ == "__main__":
    main()
