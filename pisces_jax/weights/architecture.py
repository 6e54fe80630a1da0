"""From a published `config.json` to our settings, and back; what is not supported is refused, never guessed.

Published files leave out what is a default of their format's own configuration class, so those defaults stand here
(`DEFAULTS`); `tests/test_parity.py` holds them against transformers and diffusers.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.layers import ACTIVATIONS
from pisces_jax.models.transformer import RopeScaling, TransformerConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.sizes import CLIP_MEAN, CLIP_STD, EVA_CLIP_E_PLUS_224

NATIVE = "pisces_jax"
Json = Mapping[str, Any]
Refuse = Callable[[str, str], UserError]

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
    ),
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
}  # fmt: skip
BICUBIC = 3  # in PIL and in processors' files
_ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "gelu_quick", "silu": "silu"}
assert set(_ACTIVATIONS.values()) == set(ACTIVATIONS)
# timm names its architectures; what a name means is in its code.
TIMM = {"eva02_enormous_patch14_clip_224": EVA_CLIP_E_PLUS_224}
# Settings that say how a model runs or begins, not what it is.
_RUNNING = {"attention", "remat", "unroll", "post_scale", "vocab_size", "vocab_multiple"}


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        UserError: no such file, or no JSON object in it.
    """
    try:
        values = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a folder of published weights with its {path.name}"
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): download it again") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no JSON object: download it again")
    return values


def read_architecture(folder: Path) -> tuple[str, Any]:
    """The family of a published folder and its settings as ours.

    Raises:
        UserError: no `config.json`, or a model that is not supported; the sentence says what of it.
    """
    path = folder / ("config.json" if (folder / "config.json").exists() else "open_clip_config.json")
    if not path.exists():
        path = folder / "config.json"
    values = read_json(path)
    refuse = _refusal(path)
    if values.get("quantization_config"):
        raise refuse("a quantized model", "take the weights in bfloat16, float16 or float32")
    try:
        family = _family(values, refuse)
        config = _checked(_READERS[family](values, refuse))
        path = folder / "preprocessor_config.json"
        if isinstance(config, ViTConfig) and family != NATIVE and path.exists():
            config = _preprocessed(config, read_json(path), _refusal(path))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} lacks or garbles what it must say ({error!r}): download it again") from error
    return family, config


def _preprocessed(config: ViTConfig, given: Json, refuse: Refuse) -> ViTConfig:
    """With the processor's mean and deviation; a processor that does something else than ours is refused."""
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(key, True) is False:
            raise refuse(f"preprocessing with {key} false", "take an encoder of resized, normalised pictures")
    if given.get("resample") not in (None, BICUBIC):
        raise refuse(f"resampling {given['resample']}", f"only bicubic ({BICUBIC}) is")
    if abs((given.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-6:
        raise refuse(f"a rescale_factor of {given['rescale_factor']}", "only 1/255 is")
    for key in ("crop_size", "size"):
        sizes = given.get(key)
        sizes = set(sizes.values()) if isinstance(sizes, Mapping) else {sizes}
        if sizes - {config.image_size, None}:
            raise refuse(f"a {key} of {given[key]} for pictures of {config.image_size}", "take one of the same size")
    mean = tuple(map(float, given.get("image_mean") or config.mean))
    std = tuple(map(float, given.get("image_std") or config.std))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"image_mean {mean} and image_std {std}")
    return dataclasses.replace(config, mean=mean, std=std)


def _checked(config: Any) -> Any:
    """
    Raises:
        ValueError: a value of another type than its field.
    """
    for field in dataclasses.fields(config) if config is not None else ():
        value = getattr(config, field.name)
        kind = (int, float) if field.type is float else field.type
        if isinstance(kind, type | tuple) and field.type in (int, float, bool, str) and not isinstance(value, kind):
            raise ValueError(f"{field.name} is {value!r}")
    return config


def _refusal(path: Path) -> Refuse:
    return lambda what, instead: UserError(f"{path} describes {what}, which is not supported: {instead}")


def _family(values: Json, refuse: Refuse) -> str:
    if values.get("model_type") == NATIVE:
        return NATIVE
    if _eva_settings(values) is not None:
        return "eva"
    kind = values.get("_class_name") or values.get("model_type") or values.get("architecture") or "nothing known"
    known = {
        "llama": "llama", "siglip": "siglip", "siglip_vision_model": "siglip", "clip": "clip",
        "clip_vision_model": "clip", "AutoencoderKL": "autoencoder",
    }  # fmt: skip
    if kind not in known:
        raise refuse(f"{kind!r}", f"the supported kinds are {', '.join(known)} and EVA-CLIP")
    return known[kind]


# EVA-CLIP: timm, open_clip (timm inside), EVA-CLIP's and Emu2's own


def _eva_settings(values: Json) -> Json | None:
    if values.get("architecture") in TIMM:
        return values
    tower = values.get("model_cfg", values)
    tower = tower.get("vision_config") or tower.get("vision_cfg") or {} if isinstance(tower, Mapping) else {}
    known = tower.get("timm_model_name") in TIMM or "eva_model_name" in tower or "postnorm" in tower
    return tower if known else None


def _eva(values: Json, refuse: Refuse) -> ViTConfig:
    tower = _eva_settings(values) or {}
    name = tower.get("architecture") or tower.get("timm_model_name")
    if name in TIMM:
        arguments = tower.get("model_args") or {}
        size = arguments.get("img_size") or tower.get("image_size") or TIMM[name].image_size
        # Tests and small trainings change sizes; anything else would be another model.
        fields = {"embed_dim": "width", "depth": "layers", "num_heads": "heads", "patch_size": "patch_size"}
        changes: dict[str, Any] = {ours: arguments[theirs] for theirs, ours in fields.items() if theirs in arguments}
        if "mlp_ratio" in arguments:
            changes["mlp_hidden"] = int(arguments["mlp_ratio"] * changes.get("width", TIMM[name].width))
        if unknown := sorted(set(arguments) - {*fields, "mlp_ratio", "img_size"}):
            raise refuse(f"an EVA-CLIP with model_args {', '.join(unknown)}", "take EVA-CLIP-E or E-plus")
        return dataclasses.replace(TIMM[name], image_size=size, **changes)
    wanted: dict[str, Any] = {
        "qkv_bias": True, "postnorm": True, "rope": False, "naiveswiglu": False, "subln": False, "init_value": None,
        "ls_init_value": None, "global_average_pool": False,
    }  # fmt: skip
    for key, value in wanted.items():
        if tower.get(key, value) != value:
            raise refuse(f"an EVA-CLIP tower with {key} {tower[key]!r}", "take EVA-CLIP-E or E-plus")
    if not tower.get("postnorm"):
        raise refuse("an EVA-CLIP tower without postnorm", "take EVA-CLIP-E or E-plus")
    width = tower["width"]
    return ViTConfig(
        image_size=tower["image_size"], patch_size=tower["patch_size"], width=width, layers=tower["layers"],
        heads=width // tower["head_width"], mlp_hidden=int(width * tower["mlp_ratio"]), norm="post", class_token=True,
        final_norm=False, biases="qv", activation="gelu", eps=tower.get("layer_norm_eps", 1e-6), mean=CLIP_MEAN,
        std=CLIP_STD,
    )  # fmt: skip


# transformers


def _llama(values: Json, refuse: Refuse) -> TransformerConfig:
    v = {**DEFAULTS["llama"], **values}
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling.
    scaled = v.get("rope_parameters") or v.get("rope_scaling") or {}
    rope = {"rope_theta": v.get("rope_theta", 10_000.0), **scaled}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise refuse(f"rotary embeddings of rope_type {kind!r}", "the supported ones are default and llama3")
    if v["hidden_act"] != "silu" or v["attention_bias"] or v["mlp_bias"]:
        what = next((k for k in ("attention_bias", "mlp_bias") if v[k]), "hidden_act")
        raise refuse(f"a LLaMA with {what} {v[what]!r}", "take one without biases and with silu")
    scaling = None
    if kind == "llama3":
        scaling = RopeScaling(
            float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
            int(rope["original_max_position_embeddings"]),
        )  # fmt: skip
    heads = v["num_attention_heads"]
    return TransformerConfig(
        vocab_size=v["vocab_size"], width=v["hidden_size"], layers=v["num_hidden_layers"], heads=heads,
        kv_heads=v.get("num_key_value_heads") or heads, head_dim=v.get("head_dim") or v["hidden_size"] // heads,
        mlp_hidden=v["intermediate_size"], rope_theta=float(rope["rope_theta"]), rope_scaling=scaling,
        eps=v["rms_norm_eps"], tied_embedding=v["tie_word_embeddings"],
    )  # fmt: skip


def _transformers_vit(family: str, values: Json, refuse: Refuse, **fixed: Any) -> ViTConfig:
    v = {**DEFAULTS[family], **(values.get("vision_config") or values)}
    if v["num_channels"] != 3:
        raise refuse(f"pictures of {v['num_channels']} channels", "take an encoder of RGB pictures")
    if v["hidden_act"] not in _ACTIVATIONS:
        raise refuse(f"the activation {v['hidden_act']!r}", f"the supported ones are {', '.join(_ACTIVATIONS)}")
    return ViTConfig(
        image_size=v["image_size"], patch_size=v["patch_size"], width=v["hidden_size"], layers=v["num_hidden_layers"],
        heads=v["num_attention_heads"], mlp_hidden=v["intermediate_size"], activation=_ACTIVATIONS[v["hidden_act"]],
        eps=v["layer_norm_eps"], **fixed,
    )  # fmt: skip


def _siglip(values: Json, refuse: Refuse) -> ViTConfig:
    return _transformers_vit("siglip", values, refuse)


_CLIP: dict[str, Any] = dict(
    class_token=True, patch_bias=False, embedding_norm=True, final_norm=False, mean=CLIP_MEAN, std=CLIP_STD
)


def _clip(values: Json, refuse: Refuse) -> ViTConfig:
    return _transformers_vit("clip", values, refuse, **_CLIP)


# diffusers


def _autoencoder(values: Json, refuse: Refuse) -> AutoencoderConfig:
    v = {**DEFAULTS["autoencoder"], **values}
    levels = len(v["block_out_channels"])
    wanted = dict(
        in_channels=3, out_channels=3, act_fn="silu", mid_block_add_attention=True, latents_mean=None, latents_std=None,
        use_post_quant_conv=v["use_quant_conv"], down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
    )  # fmt: skip
    for key, value in wanted.items():
        if v.get(key, value) not in (value, tuple(value) if isinstance(value, list) else value):
            raise refuse(f"an autoencoder with {key} {v[key]!r}", "take that of SDXL, SD3 or FLUX")
    return AutoencoderConfig(
        latent_channels=v["latent_channels"], channels=tuple(v["block_out_channels"]), blocks=v["layers_per_block"],
        groups=v["norm_num_groups"], quant_conv=v["use_quant_conv"], scale=v["scaling_factor"],
        shift=v["shift_factor"] or 0.0,
    )  # fmt: skip


# Ours


_KINDS: dict[str, Any] = {kind.__name__: kind for kind in (TransformerConfig, ViTConfig, AutoencoderConfig, DiTConfig)}


def _native(values: Json, refuse: Refuse) -> Any:
    """Our own layout: any part; projectors and heads have no settings (None)."""
    if values["kind"] is None:
        return None
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["settings"].items()}
    if settings.get("rope_scaling"):
        settings["rope_scaling"] = RopeScaling(**settings["rope_scaling"])
    return _KINDS[values["kind"]](**settings)


def part_of(folder: Path, settings: Any) -> str:
    """What a folder holds, in a word: its own if it says so."""
    values = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    names = {"TransformerConfig": "language_model", "ViTConfig": "encoder", "AutoencoderConfig": "autoencoder"}
    return values.get("part") or names.get(type(settings).__name__, "decoder")


_READERS: dict[str, Callable[[Json, Refuse], Any]] = {
    NATIVE: _native, "llama": _llama, "siglip": _siglip, "clip": _clip, "eva": _eva, "autoencoder": _autoencoder
}  # fmt: skip


def differences(published: Any, ours: Any) -> list[str]:
    """What two settings of one kind disagree on, as words; not what says how a model runs."""
    if type(published) is not type(ours):
        return [f"the kind ({_kind(published)} there, {_kind(ours)} in the config)"]
    if published is None:
        return []
    return [
        f"{f.name} ({getattr(published, f.name)} there, {getattr(ours, f.name)} in the config)"
        for f in dataclasses.fields(published)
        if f.name not in _RUNNING and not _equal(getattr(published, f.name), getattr(ours, f.name))
    ]


def _kind(settings: Any) -> str:
    return "no settings" if settings is None else type(settings).__name__


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):  # means and deviations are written with more or fewer digits
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, float) and isinstance(b, float):
        return abs(a - b) <= 1e-6 * abs(a)
    return a == b


# And back


def family_of(config: Any) -> str:
    """The published layout that settings can be written in; ours where there is none."""
    if isinstance(config, TransformerConfig):
        return "llama"
    if isinstance(config, AutoencoderConfig):
        return "autoencoder" if config.eps == 1e-6 else NATIVE
    if isinstance(config, ViTConfig) and not config.output_dim:
        base = dataclasses.replace(config, **{f: getattr(_PLAIN_VIT, f) for f in _FREE_VIT})
        for family, form in (("siglip", _PLAIN_VIT), ("clip", _CLIP_FORM)):
            if base == form:
                return family
        if base == _EVA_FORM and config.activation == "gelu":  # EVA's files do not name theirs
            return "eva"
    return NATIVE


_FREE_VIT = (
    "image_size", "patch_size", "width", "layers", "heads", "mlp_hidden", "activation", "eps", "mean", "std",
    "post_scale", "positions", "remat", "unroll", "attention",
)  # fmt: skip
_PLAIN_VIT = ViTConfig(1, 1, 1, 1, 1, 1)
_CLIP_FORM = dataclasses.replace(_PLAIN_VIT, **{k: v for k, v in _CLIP.items() if k not in _FREE_VIT})
_EVA_FORM = dataclasses.replace(_PLAIN_VIT, norm="post", class_token=True, final_norm=False, biases="qv")


def config_json(config: Any, part: str, dtype: str) -> dict[str, Any]:
    """The `config.json` that describes `config` in the layout of `family_of`."""
    family = family_of(config)
    if family == "llama":
        c: TransformerConfig = config
        rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
        if c.rope_scaling is not None:
            s = c.rope_scaling
            rope |= dict(
                rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor,
                high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_max_position,
            )  # fmt: skip
        scaling = {k: v for k, v in rope.items() if k != "rope_theta"} if c.rope_scaling else None
        return dict(
            architectures=["LlamaForCausalLM"], model_type="llama", dtype=dtype, torch_dtype=dtype,
            vocab_size=c.vocab_size, hidden_size=c.width, intermediate_size=c.mlp_hidden, num_hidden_layers=c.layers,
            num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, hidden_act="silu",
            rms_norm_eps=c.eps, tie_word_embeddings=c.tied_embedding, attention_bias=False, mlp_bias=False,
            # What every published model with this scaling says; without it, transformers' own default stands.
            **({"max_position_embeddings": 131_072} if c.rope_scaling else {}),
            rope_parameters=rope, rope_theta=c.rope_theta, rope_scaling=scaling,  # of transformers 5, and of 4
        )  # fmt: skip
    if family in ("siglip", "clip"):
        v: ViTConfig = config
        activation = next(k for k, name in _ACTIVATIONS.items() if name == v.activation)
        head = {"vision_use_head": False} if family == "siglip" else {}
        name = {"siglip": "SiglipVisionModel", "clip": "CLIPVisionModel"}[family]
        return dict(
            architectures=[name], model_type=f"{family}_vision_model", dtype=dtype, hidden_size=v.width,
            intermediate_size=v.mlp_hidden, num_hidden_layers=v.layers, num_attention_heads=v.heads, num_channels=3,
            image_size=v.image_size, patch_size=v.patch_size, hidden_act=activation, layer_norm_eps=v.eps, **head,
        )  # fmt: skip
    if family == "eva":
        e: ViTConfig = config
        ratio = e.mlp_hidden / e.width
        while int(e.width * ratio) < e.mlp_hidden:  # readers round down
            ratio = math.nextafter(ratio, math.inf)
        tower = dict(
            eva_model_name="eva-clip-4b-14-x", image_size=e.image_size, patch_size=e.patch_size, width=e.width,
            layers=e.layers, head_width=e.width // e.heads, mlp_ratio=ratio, qkv_bias=True,
            postnorm=True, layer_norm_eps=e.eps,
        )  # fmt: skip
        return dict(vision_config=tower, dtype=dtype)
    if family == "autoencoder":
        a: AutoencoderConfig = config
        levels = len(a.channels)
        return dict(
            _class_name="AutoencoderKL", in_channels=3, out_channels=3, latent_channels=a.latent_channels,
            block_out_channels=list(a.channels), layers_per_block=a.blocks, act_fn="silu", norm_num_groups=a.groups,
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            scaling_factor=a.scale, shift_factor=a.shift or None, use_quant_conv=a.quant_conv,
            use_post_quant_conv=a.quant_conv, mid_block_add_attention=True,
        )  # fmt: skip
    return native_json(config, part, dtype)


def native_json(config: Any, part: str, dtype: str) -> dict[str, Any]:
    """The `config.json` of our own layout."""
    settings = None if config is None else dataclasses.asdict(config)
    if isinstance(config, TransformerConfig) and settings is not None:
        settings |= {"vocab_multiple": 1}  # files hold the tokens that exist
    kind = None if config is None else type(config).__name__
    return dict(model_type=NATIVE, part=part, kind=kind, settings=settings, dtype=dtype)
