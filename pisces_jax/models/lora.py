"""LoRA (Hu et al. 2021, arXiv 2106.09685): low-rank adapters beside the frozen matrices of the language model.

A target's product W x becomes W x + α/r · B (A x), with A [r, inputs] and B [outputs, r] and B zero at first. Adapters
are a part of the model by themselves, `lora`: it trains, is stored, published and read like every other, while the
part `language_model` stays as it was published. Inside the module, A and B stand beside the kernel, as `lora_a` and
`lora_b`; `attach` and `detach` go between the two.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax import traverse_util

PART, BASE = "lora", "language_model"
TARGETS = ("query", "key", "value", "out", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Settings of the adapters.

    Attributes:
        rank: r.
        alpha: α; the adapters' product counts α/r times.
        targets: the matrices of every block that have adapters, of `TARGETS`.
        base: the settings of the language model (`TransformerConfig`), where the adapters' shapes are asked for.

    Raises:
        ValueError: a rank below 1, no target, or an unknown one.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = TARGETS
    base: Any = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"a rank of {self.rank} adapts nothing: set rank to at least 1")
        unknown = [target for target in self.targets if target not in TARGETS]
        if unknown or not self.targets:
            named = repr(unknown[0]) if unknown else "nothing"
            raise ValueError(f"targets name {named}: choose of {', '.join(TARGETS)}")
        object.__setattr__(self, "targets", tuple(t for t in TARGETS if t in self.targets))

    @property
    def scale(self) -> float:
        """α/r."""
        return self.alpha / self.rank


def attach(params: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters by part with the adapters inside the language model, as its module has them."""
    if PART not in params:
        return params
    inside = {**_flat(params[BASE]), **_flat(params[PART])}
    return {**{k: v for k, v in params.items() if k != PART}, BASE: _tree(inside)}


def detach(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `attach`: the adapters as a part of their own."""
    flat = _flat(params[BASE])
    adapters = {k: v for k, v in flat.items() if k[-1] in ("lora_a", "lora_b")}
    if not adapters:
        return dict(params)
    return {**params, BASE: _tree({k: v for k, v in flat.items() if k not in adapters}), PART: _tree(adapters)}


def merge(base: Mapping[str, Any], adapters: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """The language model's parameters with the adapters multiplied out, W + α/r · A B, the matrices in float32 or
    wider: rounded to bfloat16, most of what adapters learn would be lost.
    """
    flat, found = dict(_flat(base)), _flat(adapters)
    for name in [k[:-1] for k in found if k[-1] == "lora_a"]:
        kernel, a, b = flat[*name, "kernel"], found[*name, "lora_a"], found[*name, "lora_b"]
        a, b, kernel = (x.astype(np.promote_types(x.dtype, np.float32)) for x in (a, b, kernel))
        layers = len(a)
        product = a.reshape(layers, -1, lora.rank) @ b.reshape(layers, lora.rank, -1)
        flat[*name, "kernel"] = kernel + lora.scale * product.reshape(kernel.shape)
    return _tree(flat)


def adapted(names: Iterable[str]) -> dict[str, str]:
    """Of parameters by name with slashes: for each adapter's A the matrix that it adapts."""
    return {name: f"{BASE}/{name.removeprefix(f'{PART}/')[:-6]}kernel" for name in names if name.endswith("/lora_a")}


def _flat(tree: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    return traverse_util.flatten_dict(dict(tree))


def _tree(flat: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    return traverse_util.unflatten_dict(dict(flat))
