"""The published layouts as data: for each family a table from our names to the published ones.

Sources: transformers (LlamaForCausalLM, Qwen2ForCausalLM, SiglipVisionModel, CLIPVisionModel), diffusers
(AutoencoderKL, UNet2DConditionModel, LuminaNextDiT2DModel) and timm's Eva, whose names open_clip and Emu2 share.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.lora import LoRA
from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.unet import UNetConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.utils.errors import UserError, listed
from pisces_jax.weights.layout import Entry

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Family:
    """A published layout.

    Attributes:
        table: the rows for a part's settings.
        prefixes: what may come before all names. The one that matches most names is taken; tensors with another one
            belong to another part. The first is written at export. Where none fits, any other prefix will do (of
            torch.compile, or of a larger model) if all names are there with it.
        unused: patterns of names, after the prefix, of tensors that belong to the model but are not used here.
        renamed: (pattern, replacement): older names of the same tensors.
    """

    table: Callable[[Any], Sequence[Entry]]
    prefixes: tuple[str, ...] = ("",)
    unused: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()

    def select(self, table: Iterable[Entry], tensors: Mapping[str, T]) -> tuple[str, dict[str, T]]:
        """The prefix of this part's tensors, and these by their names in the table: without it, older names replaced.

        Raises:
            UserError: the tensors are there several times, with other prefixes than the known ones.
        """
        wanted = {entry.theirs.format(i=0) for entry in table}

        def inside(prefix: str) -> dict[str, T]:
            named = {n.removeprefix(prefix): tensor for n, tensor in tensors.items() if n.startswith(prefix)}
            return {self._current(name): tensor for name, tensor in named.items()}

        found = {prefix: inside(prefix) for prefix in self.prefixes}
        best = max(found, key=lambda prefix: len(wanted & set(found[prefix])))
        if wanted <= set(found[best]):
            return best, found[best]
        probe = min(wanted, default="")
        others = {n.removesuffix(probe) for n in tensors if n.endswith(f".{probe}")} - set(self.prefixes)
        whole = sorted(prefix for prefix in others if wanted <= set(inside(prefix)))
        if len(whole) > 1:
            raise UserError(f"this part is there several times, as {listed(whole)}: keep only one of them")
        return (whole[0], inside(whole[0])) if whole else (best, found[best])

    def _current(self, name: str) -> str:
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return name

    def uses(self, name: str) -> bool:
        """Whether a tensor of this name (after the prefix) is needed, and not one that is known to be unused."""
        return not any(re.fullmatch(pattern, name) for pattern in self.unused)


def _norm(ours: str, theirs: str, bias: bool = True) -> list[Entry]:
    rows = [Entry(f"{ours}/scale", f"{theirs}.weight", "D -> D")]
    return rows + ([Entry(f"{ours}/bias", f"{theirs}.bias", "D -> D")] if bias else [])


def _linear(ours: str, theirs: str, kernel: str = "O I -> I O", bias: str = "O -> O", **sizes: int) -> list[Entry]:
    """A matrix and its bias (none if `bias` is empty)."""
    rows = [Entry(f"{ours}/kernel", f"{theirs}.weight", kernel, sizes)]
    return rows + ([Entry(f"{ours}/bias", f"{theirs}.bias", bias)] if bias else [])


# The matrices of a LLaMA's or Qwen2's block, in the order of the files.
PROJECTIONS = {
    "attention/query": ("self_attn.q_proj", "(N H) D -> D N H"),
    "attention/key": ("self_attn.k_proj", "(N H) D -> D N H"),
    "attention/value": ("self_attn.v_proj", "(N H) D -> D N H"),
    "attention/out": ("self_attn.o_proj", "D (N H) -> N H D"),
    "mlp/gate": ("mlp.gate_proj", "O I -> I O"),
    "mlp/up": ("mlp.up_proj", "O I -> I O"),
    "mlp/down": ("mlp.down_proj", "O I -> I O"),
}


def llama(c: TransformerConfig) -> list[Entry]:
    """LLaMA, and Qwen2 with its biases."""
    block, ours = "model.layers.{i}", "layers"
    rows = [Entry("embedding", "model.embed_tokens.weight", "V D -> V D", vocabulary=True)]
    rows += _norm(f"{ours}/attention_norm", f"{block}.input_layernorm", bias=False)
    for name, (theirs, kernel) in PROJECTIONS.items():
        if name == "mlp/gate":
            rows += _norm(f"{ours}/mlp_norm", f"{block}.post_attention_layernorm", bias=False)
        bias = "(N H) -> N H" if c.qkv_bias and kernel.startswith("(N H)") else ""
        rows += _linear(f"{ours}/{name}", f"{block}.{theirs}", kernel, bias)
    rows += _norm("final_norm", "model.norm", bias=False)
    if not c.tied_embedding:
        rows.append(Entry("head", "lm_head.weight", "V D -> V D", vocabulary=True))
    return rows


def peft(c: LoRA) -> list[Entry]:
    """Adapters of a LLaMA or a Qwen2: A of shape [R, inputs] and B of [outputs, R], split as the matrix is."""
    rows = []
    for name, (theirs, kernel) in PROJECTIONS.items():
        if name.rpartition("/")[2] not in c.targets:
            continue
        ours, block = f"layers/{name}", f"model.layers.{{i}}.{theirs}"
        outputs, inputs = re.findall(r"\(.*?\)|\w+", kernel.partition(" -> ")[0])
        rows.append(Entry(f"{ours}/lora_a", f"{block}.lora_A.weight", f"R {inputs} -> {inputs.strip('()')} R"))
        rows.append(Entry(f"{ours}/lora_b", f"{block}.lora_B.weight", f"{outputs} R -> R {outputs.strip('()')}"))
    return rows


def _patches(c: ViTConfig, theirs: str) -> list[Entry]:
    """The convolution over patches, which is a product with flattened patches in our models."""
    bias = "O -> O" if c.patch_bias else ""
    return _linear("patch_embedding", theirs, "O C P Q -> (P Q C) O", bias, P=c.patch_size, Q=c.patch_size, C=3)


def _transformers_encoder(c: ViTConfig) -> list[Entry]:
    """What SigLIP's and CLIP's vision towers share in transformers."""
    block = "encoder.layers.{i}"
    rows = _patches(c, "embeddings.patch_embedding")
    rows.append(Entry("position_embedding", "embeddings.position_embedding.weight", "T D -> T D"))
    for name, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows += _linear(f"layers/attention/{name}", f"{block}.self_attn.{theirs}", "(N H) D -> D N H", "(N H) -> N H")
    rows += _linear("layers/attention/out", f"{block}.self_attn.out_proj", "D (N H) -> N H D")
    rows += _linear("layers/mlp/up", f"{block}.mlp.fc1") + _linear("layers/mlp/down", f"{block}.mlp.fc2")
    return rows + _norm("layers/norm1", f"{block}.layer_norm1") + _norm("layers/norm2", f"{block}.layer_norm2")


def siglip(c: ViTConfig) -> list[Entry]:
    return _transformers_encoder(c) + _norm("final_norm", "post_layernorm")


def clip(c: ViTConfig) -> list[Entry]:
    rows = [Entry("class_token", "embeddings.class_embedding", "D -> D")]
    return rows + _norm("embedding_norm", "pre_layrnorm") + _transformers_encoder(c)  # spelt so in the files


def eva(c: ViTConfig) -> list[Entry]:
    block = "blocks.{i}"
    rows = [
        Entry("class_token", "cls_token", "1 1 D -> D"),
        Entry("position_embedding", "pos_embed", "1 T D -> T D"),
        *_patches(c, "patch_embed.proj"),
    ]
    for i, name in enumerate(("query", "key", "value")):
        rows.append(
            Entry(f"layers/attention/{name}/kernel", f"{block}.attn.qkv.weight", "(N H) D -> D N H", part=(i, 3))
        )
    for name in ("query", "value"):
        rows.append(Entry(f"layers/attention/{name}/bias", f"{block}.attn.{name[0]}_bias", "(N H) -> N H"))
    rows += _linear("layers/attention/out", f"{block}.attn.proj", "D (N H) -> N H D")
    rows += _linear("layers/mlp/up", f"{block}.mlp.fc1") + _linear("layers/mlp/down", f"{block}.mlp.fc2")
    rows += _norm("layers/norm1", f"{block}.norm1") + _norm("layers/norm2", f"{block}.norm2")
    return rows + (_norm("final_norm", "norm") if c.final_norm else [])


def _conv(ours: str, theirs: str) -> list[Entry]:
    return _linear(ours, theirs, "O I P Q -> P Q I O")


def _residual(ours: str, theirs: str, shortcut: bool, time: bool = False) -> list[Entry]:
    """A residual block of diffusers."""
    rows = [row for n in (1, 2) for row in _norm(f"{ours}/norm{n}", f"{theirs}.norm{n}")]
    rows += [row for n in (1, 2) for row in _conv(f"{ours}/conv{n}", f"{theirs}.conv{n}")]
    rows += _conv(f"{ours}/shortcut", f"{theirs}.conv_shortcut") if shortcut else []
    return rows + (_linear(f"{ours}/time", f"{theirs}.time_emb_proj") if time else [])


def autoencoder(c: AutoencoderConfig) -> list[Entry]:
    def middle(side: str) -> list[Entry]:
        ours, theirs = f"{side}/middle", f"{side}.mid_block"
        rows = _residual(f"{ours}/block_0", f"{theirs}.resnets.0", False)
        rows += _residual(f"{ours}/block_1", f"{theirs}.resnets.1", False)
        rows += _norm(f"{ours}/attention/norm", f"{theirs}.attentions.0.group_norm")
        for name, their in (("query", "to_q"), ("key", "to_k"), ("value", "to_v"), ("out", "to_out.0")):
            rows += _linear(f"{ours}/attention/{name}", f"{theirs}.attentions.0.{their}")
        return rows

    rows: list[Entry] = []
    last = len(c.channels) - 1
    for side, folder, resample, blocks, channels, before in (
        ("encoder", "down_blocks", "down", c.blocks, c.channels, c.channels[0]),
        ("decoder", "up_blocks", "up", c.blocks + 1, c.channels[::-1], c.channels[-1]),
    ):
        rows += _conv(f"{side}/conv_in", f"{side}.conv_in") + middle(side)
        for level, width in enumerate(channels):
            for i in range(blocks):
                name = f"{side}.{folder}.{level}.resnets.{i}"
                rows += _residual(f"{side}/level_{level}_block_{i}", name, i == 0 and width != before)
            if level < last:
                rows += _conv(f"{side}/level_{level}_{resample}", f"{side}.{folder}.{level}.{resample}samplers.0.conv")
            before = width
        rows += _norm(f"{side}/norm_out", f"{side}.conv_norm_out") + _conv(f"{side}/conv_out", f"{side}.conv_out")
    if c.quant_conv:
        rows += _conv("quant", "quant_conv") + _conv("post_quant", "post_quant_conv")
    return rows


def unet(c: UNetConfig) -> list[Entry]:
    def transformer(ours: str, theirs: str) -> list[Entry]:
        rows = _norm(f"{ours}/norm", f"{theirs}.norm")
        rows += _linear(f"{ours}/project_in", f"{theirs}.proj_in") + _linear(
            f"{ours}/project_out", f"{theirs}.proj_out"
        )
        ours, theirs = f"{ours}/layers", f"{theirs}.transformer_blocks.{{i}}"
        for name, their in (("self_attention", "attn1"), ("cross_attention", "attn2")):
            for kind in ("query", "key", "value"):
                rows += _linear(f"{ours}/{name}/{kind}", f"{theirs}.{their}.to_{kind[0]}", "(N H) D -> D N H", bias="")
            rows += _linear(f"{ours}/{name}/out", f"{theirs}.{their}.to_out.0", "D (N H) -> N H D")
        for i, name in enumerate(("up", "gate")):
            for kind, their, pattern in (("kernel", "weight", "O I -> I O"), ("bias", "bias", "O -> O")):
                rows.append(Entry(f"{ours}/mlp/{name}/{kind}", f"{theirs}.ff.net.0.proj.{their}", pattern, part=(i, 2)))
        rows += _linear(f"{ours}/mlp/down", f"{theirs}.ff.net.2")
        return rows + [row for n in (1, 2, 3) for row in _norm(f"{ours}/norm{n}", f"{theirs}.norm{n}")]

    def blocks(ours: str, theirs: str, shortcuts: Sequence[bool], transformers: int) -> list[Entry]:
        rows: list[Entry] = []
        for i, shortcut in enumerate(shortcuts):
            rows += _residual(f"{ours}_block_{i}", f"{theirs}.resnets.{i}", shortcut, time=True)
        for i in range(transformers):
            rows += transformer(f"{ours}_attention_{i}", f"{theirs}.attentions.{i}")
        return rows

    rows = _conv("conv_in", "conv_in")
    for name, their in (("time", "time_embedding"), ("size", "add_embedding")):
        rows += _linear(f"{name}_up", f"{their}.linear_1") + _linear(f"{name}_down", f"{their}.linear_2")
    before, passed, last = c.widths[0], [c.widths[0]], len(c.widths) - 1
    for level, width in enumerate(c.widths):
        ours, theirs = f"down_{level}", f"down_blocks.{level}"
        shortcuts = [width != before] + [False] * (c.blocks - 1)
        rows += blocks(ours, theirs, shortcuts, c.blocks if c.depths[level] else 0)
        passed += [width] * c.blocks
        if level < last:
            rows += _conv(f"{ours}_resample", f"{theirs}.downsamplers.0.conv")
            passed.append(width)
        before = width
    rows += blocks("middle", "mid_block", [False, False], 1)
    for level, width in reversed(list(enumerate(c.widths))):
        ours, theirs = f"up_{level}", f"up_blocks.{last - level}"  # published from the lowest level up
        shortcuts = [x + passed.pop() != width for x in (before, *[width] * c.blocks)]
        rows += blocks(ours, theirs, shortcuts, c.blocks + 1 if c.depths[level] else 0)
        if level:
            rows += _conv(f"{ours}_resample", f"{theirs}.upsamplers.0.conv")
        before = width
    return rows + _norm("norm_out", "conv_norm_out") + _conv("conv_out", "conv_out")


def lumina(c: DiTConfig) -> list[Entry]:
    """BLIP3-o's generator. Its rotary embedding turns neighbouring numbers, those of y and x in turns; ours turns
    numbers of two halves, first all of y: so queries and keys have another order (K pairs; A is y or x; R of a pair).
    """
    block, ours = "layers.{i}", "layers"
    turned = dict(N=c.heads, A=2, R=2)
    rows = _linear("patch_embedding", "patch_embedder.proj")
    rows += _linear("condition_up", "caption_projection.linear_1")
    rows += _linear("condition_down", "caption_projection.linear_2")
    rows += _linear("time_up", "time_caption_embed.timestep_embedder.linear_1")
    rows += _linear("time_down", "time_caption_embed.timestep_embedder.linear_2")
    rows += _norm("pooled_norm", "time_caption_embed.caption_embedder.0")
    rows += _linear("pooled_embedding", "time_caption_embed.caption_embedder.1")
    rows += _linear(f"{ours}/modulation", f"{block}.norm1.linear", "(F D) E -> E F D", "(F D) -> F D")
    for name, their in (
        ("attention_norm", "norm1.norm"), ("condition_norm", "norm1_context"), ("attention_post_norm", "norm2"),
        ("mlp_norm", "ffn_norm1"), ("mlp_post_norm", "ffn_norm2"),
    ):  # fmt: skip
        rows += _norm(f"{ours}/{name}", f"{block}.{their}", bias=False)
    for name, number in (("gate", 1), ("down", 2), ("up", 3)):
        rows += _linear(f"{ours}/mlp/{name}", f"{block}.feed_forward.linear_{number}", bias="")
    rows.append(Entry(f"{ours}/attention/gate", f"{block}.gate", "N -> N"))
    for prefix, their in (("", "attn1"), ("condition_", "attn2")):
        for name, letter in (("query", "q"), ("key", "k")):
            own = f"{ours}/attention/{prefix}{name}"
            order = "(N K A R) D -> D (N R A K)"
            rows += _linear(own, f"{block}.{their}.to_{letter}", order, bias="", **turned)
            for kind, tensor in (("scale", "weight"), ("bias", "bias")):
                name_ = f"{block}.{their}.norm_{letter}.{tensor}"
                rows.append(Entry(f"{own}_norm/{kind}", name_, "(N K A R) -> (N R A K)", turned))
        rows += _linear(f"{ours}/attention/{prefix}value", f"{block}.{their}.to_v", bias="")
    rows += _linear(f"{ours}/attention/out", f"{block}.attn2.to_out.0", bias="")
    return rows + _linear("final_modulation", "norm_out.linear_1") + _linear("output", "norm_out.linear_2")


def queries(c: None) -> list[Entry]:
    return [Entry("embedding", "latent_queries", "1 M D -> M D")]


# BLIP3-o's checkpoints hold all three of these; a part does not use the tensors of the others, nor of towers that read.
TOWERS = {
    r"(model\.)?visual\..*": "Qwen2.5-VL's vision tower, which this project does not read pictures with",
    r"model\.gen_vision_tower\..*": "the generation encoder, which drawing does not need",
}
_GENERATOR = r"model\.dit\.model\..*"
_QUERIES = r"model\.latent_queries"

FAMILIES = {
    # A file may hold the output matrix although it is tied to the embedding.
    "llama": Family(llama, unused=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight")),
    "qwen2": Family(
        llama,
        unused=(r".*\.rotary_emb\.inv_freq", r"lm_head\.weight", *TOWERS, _GENERATOR, _QUERIES),
        renamed=((r"^model\.language_model\.", "model."),),  # of Qwen2.5-VL in transformers 5
    ),
    "peft": Family(peft, ("base_model.model.",)),
    # A parameter of diffusers' model that pads texts of one batch: BLIP3-o's conditions are all equally long.
    "lumina": Family(lumina, ("model.dit.model.",), (r"pad_token",)),
    "queries": Family(queries, ("model.",), (r"(?!latent_queries).*",)),
    "siglip": Family(siglip, ("vision_model.", ""), (r"head\..*", r"embeddings\.position_ids")),
    "clip": Family(clip, ("vision_model.", ""), (r"post_layernorm\..*", r"embeddings\.position_ids")),
    # The prefixes of timm, open_clip, EVA-CLIP and of the tower inside Emu2.
    "eva": Family(
        eva,
        ("", "visual.trunk.", "visual.", "model.visual."),
        (r"norm\..*", r"fc_norm\..*", r"head\..*", r".*\.attn\.k_bias"),
    ),
    "autoencoder": Family(
        autoencoder,
        renamed=(
            (r"attentions\.0\.query\.", "attentions.0.to_q."),
            (r"attentions\.0\.key\.", "attentions.0.to_k."),
            (r"attentions\.0\.value\.", "attentions.0.to_v."),
            (r"attentions\.0\.proj_attn\.", "attentions.0.to_out.0."),
        ),
    ),
    "unet": Family(unet),
}
