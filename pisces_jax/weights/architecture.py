"""The settings of a published folder as ours, and a part's settings as a `config.json`."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pisces_jax.models.vit import ViTConfig
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.config_json import BICUBIC, DIFFUSERS, NATIVE, READERS, WRITERS, Json, Refuse, family_of_file
from pisces_jax.weights.tensors import read_json

# The files that say what a folder holds: of transformers, diffusers and ours; of open_clip; of PEFT.
CONFIGS = ("config.json", "open_clip_config.json", "adapter_config.json")
# Settings of how a model runs or is initialised: they do not make it another model.
_RUNNING = {"base", "attention", "remat", "unroll", "post_scale", "vocab_size", "vocab_multiple"}


def read_architecture(folder: Path) -> tuple[str, Any]:
    """The family of a published folder, and its settings as ours (None for projectors and heads).

    Raises:
        UserError: there is no `config.json`, or the model is not supported; the message says what is not.
    """
    path = next((folder / name for name in CONFIGS if (folder / name).exists()), folder / CONFIGS[0])
    values = read_json(path)
    refuse = _refusal(path)
    if values.get("quantization_config"):
        raise refuse("a quantized model", "take the weights in bfloat16, float16 or float32")
    try:
        family = family_of_file(values, refuse)
        config = _checked(READERS[family](values, refuse))
        if isinstance(config, ViTConfig) and family != NATIVE:
            for path, given in _preprocessors(folder):
                config = _preprocessed(config, given, _refusal(path))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{path} has a missing or invalid value ({error!r}): download it again") from error
    return family, config


def _preprocessors(folder: Path) -> Iterator[tuple[Path, Json]]:
    """What a folder says of its pictures, in the words of transformers; where files differ, the last one is right."""
    for name, key in (
        ("config.json", "pretrained_cfg"),
        ("open_clip_config.json", "preprocess_cfg"),
    ):  # timm, open_clip
        path = folder / name
        if path.exists() and (given := read_json(path).get(key)):
            yield path, dict(
                image_mean=given.get("mean"), image_std=given.get("std"), resample=given.get("interpolation"),
                size=given.get("size", (given.get("input_size") or [None])[1:]),
                crop_pct=given.get("crop_pct"), resize_mode=given.get("crop_mode", given.get("resize_mode")),
            )  # fmt: skip
    # transformers 5 writes the first of these, and takes it where both exist.
    path = folder / "processor_config.json"
    given = read_json(path).get("image_processor") if path.exists() else None
    if not given:
        path = folder / "preprocessor_config.json"
        given = read_json(path) if path.exists() else None
    if given:
        yield path, given


def _preprocessed(config: ViTConfig, given: Json, refuse: Refuse) -> ViTConfig:
    """With the mean and deviation of the published processor, which must otherwise do what ours does."""
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(key, True) is False:
            raise refuse(f"preprocessing with {key} false", "take an encoder whose pictures are resized and normalised")
    if given.get("resample") not in (None, BICUBIC, "bicubic"):
        raise refuse(f"resampling {given['resample']}", f"take an encoder with bicubic resampling ({BICUBIC})")
    if abs((given.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-6:
        raise refuse(f"a rescale_factor of {given['rescale_factor']}", "take an encoder with 1/255")
    if given.get("crop_pct") not in (None, 1):
        raise refuse(f"a crop_pct of {given['crop_pct']}", "take an encoder that sees the whole middle square (1.0)")
    if given.get("resize_mode") not in (None, "center", "shortest", "squash"):
        raise refuse(
            f"resizing by {given['resize_mode']!r}", "take an encoder of middle squares or of stretched pictures"
        )
    for key in ("crop_size", "size"):
        sizes = given.get(key)
        sizes = sizes.values() if isinstance(sizes, Mapping) else sizes if isinstance(sizes, list) else [sizes]
        if set(sizes) - {config.image_size, None}:
            raise refuse(f"a {key} of {given[key]} for pictures of {config.image_size}", "take one of the same size")
    mean = tuple(map(float, given.get("image_mean") or config.mean))
    std = tuple(map(float, given.get("image_std") or config.std))
    if len(mean) != 3 or len(std) != 3:
        raise ValueError(f"image_mean {mean} and image_std {std}")
    return dataclasses.replace(config, mean=mean, std=std)


def _checked(config: Any) -> Any:
    """
    Raises:
        ValueError: a value is not of its field's type.
    """
    for field in dataclasses.fields(config) if config is not None else ():
        value = getattr(config, field.name)
        kind = (int, float) if field.type is float else field.type
        if isinstance(kind, type | tuple) and field.type in (int, float, bool, str) and not isinstance(value, kind):
            raise ValueError(f"{field.name} is {value!r}")
    return config


def _refusal(path: Path) -> Refuse:
    return lambda what, instead: UserError(f"{path} describes {what}, which is not supported: {instead}")


def part_of(folder: Path, settings: Any) -> str:
    """The name of the part in a folder: as its `config.json` says, else by its kind."""
    values = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    names = {"TransformerConfig": "language_model", "ViTConfig": "encoder", "AutoencoderConfig": "autoencoder"}
    return values.get("part") or names.get(type(settings).__name__, "decoder")


def config_json(family: str, config: Any, part: str, dtype: str) -> dict[str, Any]:
    """The `config.json` of a part's settings in the layout of a family."""
    values = WRITERS[family](config)
    if family == NATIVE:
        values["part"] = part
    if family not in (*DIFFUSERS, "peft"):  # they write no dtype
        values["dtype"] = dtype
    if family == "llama":
        values["torch_dtype"] = dtype  # the key of transformers 4
    return values


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
