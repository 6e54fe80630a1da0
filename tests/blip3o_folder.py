"""A tiny, randomly filled folder in the layout of BLIP3-o's released models, and the references it is made of."""

import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import parity
import tokenizers
import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file

VECTORS, CHANNELS, STATES = 4, 16, 24
TEXT = dict(
    hidden_size=STATES, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, max_position_embeddings=512,
)  # fmt: skip
UNET = dict(
    parity.TINY_UNET, layers_per_block=1, transformer_layers_per_block=(1, 1, 1), cross_attention_dim=CHANNELS,
    projection_class_embeddings_input_dim=CHANNELS + 6 * 8,
)  # fmt: skip
VAE = dict(
    latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, scaling_factor=0.13025,
    down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
)  # fmt: skip
SCHEDULER = dict(  # SDXL's scheduler_config.json
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
    timestep_spacing="leading", prediction_type="epsilon", interpolation_type="linear", use_karras_sigmas=False,
)  # fmt: skip
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "[IMG]", "[/IMG]", "<image>")


def tokenizer(folder: Path, slow: bool = False, pictures: bool = True) -> tokenizers.Tokenizer:
    """A byte-level tokenizer with Qwen2's special tokens, in one file or in those of the slow tokenizer."""
    from pisces_jax.data.qwen import _QWEN_WORDS

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.normalizer = tokenizers.normalizers.NFC()
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), "isolated")
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, letters])
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    texts = ["system user assistant You are a helpful assistant.", "Please generate image based on the caption: a"]
    made.train_from_iterator(texts * 4, trainer)
    special = [tokenizers.AddedToken(name, special=True, normalized=False) for name in SPECIAL[: 6 if pictures else 3]]
    made.add_special_tokens(special)
    folder.mkdir(parents=True, exist_ok=True)
    if not slow:
        made.save(str(folder / "tokenizer.json"))
        return made
    made.model.save(str(folder))
    added = {str(made.token_to_id(token.content)): dict(content=token.content, special=True) for token in special}
    (folder / "tokenizer_config.json").write_text(json.dumps(dict(added_tokens_decoder=added)))
    return made


def references(vocabulary: int, tied: bool = False) -> dict[str, Any]:
    """The models, randomly filled in float32."""
    made: dict[str, Any] = dict(
        language=parity.qwen_model(True, **TEXT, vocab_size=vocabulary, tie_word_embeddings=tied),
        generator=parity.Generator(VECTORS, STATES, 8, **parity.TINY_GENERATOR), unet=UNet2DConditionModel(**UNET),
        vae=AutoencoderKL(**VAE),
    )  # fmt: skip
    for seed, model in enumerate(made.values()):
        parity.fill(model.eval(), seed)
    return made


def write(
    folder: Path, *, tied: bool = False, new_names: bool = False, slow: bool = False, dtype: Any = torch.float32,
    shards: int = 2,
) -> dict[str, Any]:  # fmt: skip
    """Writes the folder; returns the references.

    Args:
        new_names: of transformers 5 (`model.language_model`, `model.visual`), with its `config.json`.
        slow: whether the tokenizer is written as the slow one writes it.
        dtype: of the checkpoint's tensors.
    """
    vocabulary = tokenizer(folder, slow).get_vocab_size()
    made = references(vocabulary, tied)
    tensors = made["language"].state_dict()
    if not new_names:
        tensors = {
            n.replace("model.language_model.", "model.").replace("model.visual.", "visual."): t
            for n, t in tensors.items()
        }
    if tied:
        tensors.pop("lm_head.weight")
    tensors |= made["generator"].state_dict()
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        own = names[i::shards]
        save_file({n: tensors[n].to(dtype).clone().contiguous() for n in own}, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps(dict(metadata={}, weight_map=weight_map)))
    (folder / "config.json").write_text(json.dumps(config_json(vocabulary, tied, new_names)))
    (folder / "trainer_state.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"a pickle, which nothing opens")
    decoder = folder / "diffusion-decoder"
    made["unet"].to(dtype).save_pretrained(decoder / "unet", variant="bf16" if dtype == torch.bfloat16 else None)
    made["vae"].to(dtype).save_pretrained(decoder / "vae", variant="bf16" if dtype == torch.bfloat16 else None)
    EulerDiscreteScheduler(**SCHEDULER).save_pretrained(decoder / "scheduler")
    return made


def config_json(vocabulary: int, tied: bool, new_names: bool) -> dict[str, Any]:
    text = dict(TEXT, vocab_size=vocabulary)
    own = dict(architectures=["blip3oQwenForCausalLM"], model_type="blip3o_qwen", tie_word_embeddings=tied)
    if new_names:
        return dict(own, text_config=dict(text, rope_parameters=dict(parity.QWEN_ROPE, mrope_section=[1, 1, 1])))
    scaling = dict(type="mrope", mrope_section=[1, 1, 1])
    return dict(own, **text, rope_theta=parity.QWEN_ROPE["rope_theta"], rope_scaling=scaling, vision_config={})
