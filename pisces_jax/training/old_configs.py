"""Saved configs with the names that keys and values had before, in today's: runs of before still open and go on."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.training.config import OPEN_KEYS, run_config

_TOP = {"parts": "init_from", "storage": "param_dtype"}
_OPTIMIZER = {
    "accumulate": "grad_accum_steps",
    "average": "ema",
    "gradient_dtype": "grad_dtype",
    "moment_dtype": "mu_dtype",
    "table": "param_groups",
}
_PART = {"rotary_base": "rope_theta", "rotary_scaling": "rope_scaling"}
_REMAT = {"everything": "none", "nothing": "full", "context": "attention", "projections": "dots"}


def upgrade(saved: Mapping[str, Any]) -> ConfigDict:
    """A run's saved config with today's keys; keys that are newer than the run have the defaults, which keep what the
    run did."""
    config = _renamed(saved, _TOP)
    if "vector_flow" not in saved:  # from before the shapes world had several wordings
        config["data"] = {
            key: _standard_words(value) if key in ("train", "evaluate", "tokenizer_sources") else value
            for key, value in saved.get("data", {}).items()
        }
    if "parts" in saved:
        config |= {
            "optimizer": _renamed(saved.get("optimizer", {}), _OPTIMIZER),
            "sampling": _renamed(saved.get("sampling", {}), {"tokens": "max_tokens"}),
            "data": _renamed(config.get("data", {}), {"rows": "rows_per_pool"}),
            "model": {name: _part(settings) for name, settings in saved.get("model", {}).items()},
        }
        if saved.get("program") in ("unified", "text"):  # a batch was counted in groups of rows
            config["batch_size"] = saved["batch_size"] * saved["data"].get("rows", 1)
            config["train_decoder"] = "decoder" in saved["parts"]
        if saved.get("program") == "text":
            config["program"] = "unified"
    return ConfigDict(_completed(run_config().to_dict(), config))


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}


def _standard_words(sources: Any) -> dict[str, Any]:
    shapes = {"other_words": 0.0}
    return {name: {**shapes, **s} if s.get("kind") == "shapes" else s for name, s in dict(sources or {}).items()}


def _part(settings: Any) -> Any:
    if not isinstance(settings, Mapping):
        return settings
    part = _renamed(settings, _PART)
    if "remat" in part:
        part["remat"] = _REMAT.get(part["remat"], part["remat"])
    return part


def _completed(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over `defaults`, key by key; below an open key there are no defaults."""
    merged = dict(defaults)
    for key, value in values.items():
        both = isinstance(value, Mapping) and isinstance(defaults.get(key), Mapping) and key not in OPEN_KEYS
        merged[key] = _completed(defaults[key], value) if both else value
    return merged
