"""The published `config.json` formats: for each family its fields, defaults, reader and writer.

Published files leave out what equals a default of their library's configuration class, so those defaults are repeated
here (`DEFAULTS`); `tests/test_parity.py` compares them with transformers and diffusers. A reader refuses what is not
supported: it gives `refuse` what the file describes and what to do instead.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.denoiser import DenoiserConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.layers import ACTIVATIONS
from pisces_jax.models.lora import LoRA
from pisces_jax.models.transformer import RopeScaling, TransformerConfig
from pisces_jax.models.unet import SIZES, UNetConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.weights import language_json
from pisces_jax.weights.fields import Json, Refuse, ours, require, theirs
from pisces_jax.weights.sizes import CLIP_MEAN, CLIP_STD, EVA_CLIP_E_PLUS_224

NATIVE = "pisces_jax"
DIFFUSERS = ("autoencoder", "unet")  # families that diffusers publishes

DEFAULTS: dict[str, dict[str, Any]] = {
    **language_json.DEFAULTS,
    "siglip": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
        image_size=224, patch_size=16, hidden_act="gelu_pytorch_tanh", layer_norm_eps=1e-6,
    ),
    "clip": dict(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, num_channels=3,
        image_size=224, patch_size=32, hidden_act="quick_gelu", layer_norm_eps=1e-5,
    ),
    "autoencoder": dict(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(64,), layers_per_block=1, act_fn="silu",
        norm_num_groups=32, scaling_factor=0.18215, shift_factor=None, latents_mean=None, latents_std=None,
        use_quant_conv=True, use_post_quant_conv=True, mid_block_add_attention=True,
    ),
    "unet": dict(
        sample_size=None, in_channels=4, out_channels=4, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2,
        down_block_types=(*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *["CrossAttnUpBlock2D"] * 3), transformer_layers_per_block=1, attention_head_dim=8,
        norm_num_groups=32, norm_eps=1e-5, cross_attention_dim=1280, use_linear_projection=False,
        addition_embed_type=None, addition_time_embed_dim=None, projection_class_embeddings_input_dim=None,
    ),
}  # fmt: skip
# Our field -> theirs, where both hold the same value.
_VIT = dict(
    width="hidden_size", mlp_hidden="intermediate_size", layers="num_hidden_layers", heads="num_attention_heads",
    image_size="image_size", patch_size="patch_size", eps="layer_norm_eps",
)  # fmt: skip
_TIMM = dict(width="embed_dim", layers="depth", heads="num_heads", patch_size="patch_size")
_EVA = dict(image_size="image_size", patch_size="patch_size", width="width", layers="layers")
_AUTOENCODER = dict(
    latent_channels="latent_channels", blocks="layers_per_block", groups="norm_num_groups",
    quant_conv="use_quant_conv", scale="scaling_factor",
)  # fmt: skip
_UNET = dict(
    size="sample_size", channels="in_channels", condition_width="cross_attention_dim", blocks="layers_per_block",
    size_numbers="addition_time_embed_dim", groups="norm_num_groups", eps="norm_eps",
)  # fmt: skip
# What every supported model says; another value is another model.
_EVA_FIXED: dict[str, Any] = dict(
    qkv_bias=True, postnorm=True, rope=False, naiveswiglu=False, subln=False, init_value=None, ls_init_value=None,
    global_average_pool=False,
)  # fmt: skip
UNET_FIXED: dict[str, Any] = dict(
    use_linear_projection=True, addition_embed_type="text_time", mid_block_type="UNetMidBlock2DCrossAttn",
    act_fn="silu", flip_sin_to_cos=True, freq_shift=0, downsample_padding=1, mid_block_scale_factor=1,
    conv_in_kernel=3, conv_out_kernel=3, resnet_time_scale_shift="default", resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False, time_embedding_type="positional", time_embedding_dim=None, time_embedding_act_fn=None,
    timestep_post_act=None, time_cond_proj_dim=None, center_input_sample=False, class_embed_type=None,
    num_class_embeds=None, class_embeddings_concat=False, encoder_hid_dim=None, encoder_hid_dim_type=None,
    attention_type="default", only_cross_attention=False, mid_block_only_cross_attention=None,
    dual_cross_attention=False, cross_attention_norm=None, num_attention_heads=None,
    reverse_transformer_layers_per_block=None,
)  # fmt: skip
# The settings of ViTConfig that make a CLIP or an EVA-CLIP-E of it; those of SigLIP are its defaults.
_CLIP_FORM: dict[str, Any] = dict(class_token=True, patch_bias=False, embedding_norm=True, final_norm=False)
_EVA_FORM: dict[str, Any] = dict(norm="post", class_token=True, final_norm=False, biases="qv")
_FORMS = {"siglip": {}, "clip": _CLIP_FORM, "eva": _EVA_FORM}
_CLIP_PIXELS: dict[str, Any] = dict(mean=CLIP_MEAN, std=CLIP_STD)
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "gelu_quick", "silu": "silu"}
assert set(_ACTIVATIONS.values()) == set(ACTIVATIONS)
# timm's files name an architecture, whose settings are in timm's code.
TIMM = {"eva02_enormous_patch14_clip_224": EVA_CLIP_E_PLUS_224}
BICUBIC = 3  # of PIL, and so in the files of image processors


# SigLIP and CLIP (transformers)


def _read_vit(family: str, values: Json, refuse: Refuse, **form: Any) -> ViTConfig:
    v = {**DEFAULTS[family], **(values.get("vision_config") or values)}
    if v["num_channels"] != 3:
        raise refuse(f"pictures of {v['num_channels']} channels", "take an encoder of RGB pictures")
    if v["hidden_act"] not in _ACTIVATIONS:
        raise refuse(f"the activation {v['hidden_act']!r}", f"the supported ones are {', '.join(_ACTIVATIONS)}")
    return ViTConfig(**ours(_VIT, v), activation=_ACTIVATIONS[v["hidden_act"]], **form)


def _write_vit(family: str, name: str, c: ViTConfig, **more: Any) -> dict[str, Any]:
    activation = next(theirs for theirs, ours in _ACTIVATIONS.items() if ours == c.activation)
    kind = dict(architectures=[name], model_type=f"{family}_vision_model", num_channels=3, hidden_act=activation)
    return {**kind, **theirs(_VIT, c), **more}


def preprocessor_json(family: str, c: ViTConfig) -> dict[str, Any]:
    """The `preprocessor_config.json` of an encoder in a published layout."""
    square = {"height": c.image_size, "width": c.image_size}
    values = dict(image_mean=list(c.mean), image_std=list(c.std), rescale_factor=1 / 255, resample=BICUBIC)
    if family == "siglip":
        return dict(values, image_processor_type="SiglipImageProcessor", size=square)
    size = {"shortest_edge": c.image_size}
    return dict(values, image_processor_type="CLIPImageProcessor", size=size, crop_size=square, do_center_crop=True)


# EVA-CLIP: timm, open_clip (with timm inside), and the files of EVA-CLIP and Emu2


def _eva_settings(values: Json) -> Json | None:
    if values.get("architecture") in TIMM:
        return values
    tower = values.get("model_cfg", values)
    tower = tower.get("vision_config") or tower.get("vision_cfg") or {} if isinstance(tower, Mapping) else {}
    known = tower.get("timm_model_name") in TIMM or "eva_model_name" in tower or "postnorm" in tower
    return tower if known else None


def _read_eva(values: Json, refuse: Refuse) -> ViTConfig:
    tower, instead = _eva_settings(values) or {}, "take EVA-CLIP-E or E-plus"
    name = tower.get("architecture") or tower.get("timm_model_name")
    if name in TIMM:
        arguments = tower.get("model_args") or {}
        # Tests and small runs change sizes; any other argument would make it another model.
        if unknown := sorted(set(arguments) - {*_TIMM.values(), "mlp_ratio", "img_size"}):
            raise refuse(f"an EVA-CLIP with model_args {', '.join(unknown)}", instead)
        changes: dict[str, Any] = ours({k: v for k, v in _TIMM.items() if v in arguments}, arguments)
        changes["image_size"] = arguments.get("img_size") or tower.get("image_size") or TIMM[name].image_size
        if "mlp_ratio" in arguments:
            changes["mlp_hidden"] = int(arguments["mlp_ratio"] * changes.get("width", TIMM[name].width))
        return dataclasses.replace(TIMM[name], **changes)
    require(tower, _EVA_FIXED, refuse, "an EVA-CLIP tower", instead)
    if not tower.get("postnorm"):
        raise refuse("an EVA-CLIP tower without postnorm", instead)
    width = tower["width"]
    return ViTConfig(
        **ours(_EVA, tower), heads=width // tower["head_width"], mlp_hidden=int(width * tower["mlp_ratio"]),
        activation="gelu", eps=tower.get("layer_norm_eps", 1e-6), **_EVA_FORM, **_CLIP_PIXELS,
    )  # fmt: skip


def _write_eva(c: ViTConfig) -> dict[str, Any]:
    ratio = c.mlp_hidden / c.width
    while int(c.width * ratio) < c.mlp_hidden:  # readers round down
        ratio = math.nextafter(ratio, math.inf)
    tower = dict(
        eva_model_name="eva-clip-4b-14-x", **theirs(_EVA, c), head_width=c.width // c.heads, mlp_ratio=ratio,
        qkv_bias=True, postnorm=True, layer_norm_eps=c.eps,
    )  # fmt: skip
    return dict(vision_config=tower)


# Autoencoders (diffusers)


def _autoencoder_fixed(levels: int, quant_conv: bool) -> dict[str, Any]:
    return dict(
        in_channels=3, out_channels=3, act_fn="silu", mid_block_add_attention=True, latents_mean=None, latents_std=None,
        use_post_quant_conv=quant_conv, down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )  # fmt: skip


def _read_autoencoder(values: Json, refuse: Refuse) -> AutoencoderConfig:
    v = {**DEFAULTS["autoencoder"], **values}
    fixed = _autoencoder_fixed(len(v["block_out_channels"]), v["use_quant_conv"])
    require(v, fixed, refuse, "an autoencoder", "take that of SDXL, SD3 or FLUX")
    return AutoencoderConfig(
        **ours(_AUTOENCODER, v), channels=tuple(v["block_out_channels"]), shift=v["shift_factor"] or 0.0
    )


def _write_autoencoder(c: AutoencoderConfig) -> dict[str, Any]:
    fixed = {k: v for k, v in _autoencoder_fixed(len(c.channels), c.quant_conv).items() if v is not None}
    return dict(
        _class_name="AutoencoderKL", **theirs(_AUTOENCODER, c), block_out_channels=list(c.channels),
        shift_factor=c.shift or None, **fixed,
    )  # fmt: skip


# U-Nets (diffusers)


def _unet_implied(c: UNetConfig) -> dict[str, Any]:
    """What follows from settings of ours."""
    return dict(
        out_channels=c.channels, projection_class_embeddings_input_dim=c.condition_width + SIZES * c.size_numbers,
        down_block_types=["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in c.depths],
        up_block_types=["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(c.depths)],
    )  # fmt: skip


def _read_unet(values: Json, refuse: Refuse) -> UNetConfig:
    what, instead = "a U-Net", "take that of Emu2-Gen or BLIP3-o, SDXL's with visual vectors"
    v = {**DEFAULTS["unet"], **values}
    require(v, UNET_FIXED, refuse, what, instead)
    widths = tuple(v["block_out_channels"])

    def levels(value: Any) -> tuple[Any, ...]:
        return tuple(value) if isinstance(value, list) else (value,) * len(widths)

    crossed = [str(kind).startswith("Cross") for kind in v["down_block_types"]]
    depths = tuple(n if here else 0 for n, here in zip(levels(v["transformer_layers_per_block"]), crossed, strict=True))
    config = UNetConfig(**ours(_UNET, v), widths=widths, depths=depths, heads=levels(v["attention_head_dim"]))
    v = {key: list(value) if isinstance(value, tuple) else value for key, value in v.items()}
    require(v, _unet_implied(config), refuse, what, instead)
    return config


def _write_unet(c: UNetConfig) -> dict[str, Any]:
    return dict(
        _class_name="UNet2DConditionModel", **theirs(_UNET, c), block_out_channels=list(c.widths),
        transformer_layers_per_block=[max(depth, 1) for depth in c.depths], attention_head_dim=list(c.heads),
        **_unet_implied(c), **UNET_FIXED,
    )  # fmt: skip


# Our own layout, for any part


_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (TransformerConfig, ViTConfig, AutoencoderConfig, DiTConfig, DenoiserConfig, UNetConfig)
}


def _read_native(values: Json, refuse: Refuse) -> Any:
    if values["kind"] is None:  # projectors and heads have no settings
        return None
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["settings"].items()}
    if settings.get("rope_scaling"):
        settings["rope_scaling"] = RopeScaling(**settings["rope_scaling"])
    return _KINDS[values["kind"]](**settings)


def _write_native(config: Any) -> dict[str, Any]:
    settings = None if config is None else dataclasses.asdict(config)
    if isinstance(config, TransformerConfig) and settings is not None:
        settings["vocab_multiple"] = 1  # files hold the tokens that exist, without padding
    return dict(model_type=NATIVE, kind=None if config is None else type(config).__name__, settings=settings)


# All of them


READERS: dict[str, Callable[[Json, Refuse], Any]] = {
    NATIVE: _read_native, "llama": language_json.read_llama, "qwen2": language_json.read_qwen2, "eva": _read_eva,
    "autoencoder": _read_autoencoder, "unet": _read_unet, "peft": language_json.read_peft,
    "siglip": lambda values, refuse: _read_vit("siglip", values, refuse),
    "clip": lambda values, refuse: _read_vit("clip", values, refuse, **_CLIP_FORM, **_CLIP_PIXELS),
}  # fmt: skip
WRITERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    NATIVE: _write_native, "llama": language_json.write_llama, "qwen2": language_json.write_qwen2, "eva": _write_eva,
    "autoencoder": _write_autoencoder, "unet": _write_unet, "peft": language_json.write_peft,
    "siglip": lambda c: _write_vit("siglip", "SiglipVisionModel", c, vision_use_head=False),
    "clip": lambda c: _write_vit("clip", "CLIPVisionModel", c),
}  # fmt: skip


def family_of_file(values: Json, refuse: Refuse) -> str:
    """The family that a `config.json` describes."""
    if values.get("model_type") == NATIVE:
        return NATIVE
    if "peft_type" in values:
        return "peft"
    if _eva_settings(values) is not None:
        return "eva"
    kind = values.get("_class_name") or values.get("model_type") or values.get("architecture") or "an unknown model"
    kind = "blip3o_qwen" if str(kind).startswith("blip3o_qwen") else kind
    known = {
        "llama": "llama", **dict.fromkeys(language_json.QWEN_KINDS, "qwen2"), "siglip": "siglip",
        "siglip_vision_model": "siglip", "clip": "clip", "clip_vision_model": "clip",
        "AutoencoderKL": "autoencoder", "UNet2DConditionModel": "unet",
    }  # fmt: skip
    if kind not in known:
        raise refuse(f"{kind!r}", f"the supported kinds are {', '.join(known)} and EVA-CLIP")
    return known[kind]


def family_of(config: Any) -> str:
    """The published layout in which a part with these settings is written; ours where there is none."""
    if isinstance(config, TransformerConfig):
        if not config.qkv_bias:
            return "llama"
        return "qwen2" if config.rope_scaling is None and config.head_dim * config.heads == config.width else NATIVE
    if isinstance(config, LoRA):
        return "peft"
    if isinstance(config, AutoencoderConfig):
        return "autoencoder" if config.eps == 1e-6 else NATIVE
    if isinstance(config, UNetConfig):
        return "unet"
    if isinstance(config, ViTConfig):
        plain = ViTConfig(1, 1, 1, 1, 1, 1)
        fixed = {f.name for f in dataclasses.fields(config)} - _FREE_VIT
        for family, form in _FORMS.items():
            same = all(getattr(config, name) == form.get(name, getattr(plain, name)) for name in fixed)
            if same and (family != "eva" or config.activation == "gelu"):  # EVA's files do not name theirs
                return family
    return NATIVE


# Settings of ViTConfig that published layouts can express, or that make no other model.
_FREE_VIT = {*_VIT, "activation", "mean", "std", "post_scale", "positions", "remat", "unroll", "attention"}
