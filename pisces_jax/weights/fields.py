"""What the readers and writers of `config.json` share: types, and values that both sides hold under other names."""

from collections.abc import Callable, Mapping
from typing import Any

from pisces_jax.utils.errors import UserError

Json = Mapping[str, Any]
Refuse = Callable[[str, str], UserError]


def ours(fields: Mapping[str, str], values: Json) -> dict[str, Any]:
    """The values of a published file by our names; `fields` maps ours to theirs."""
    return {own: values[theirs] for own, theirs in fields.items()}


def theirs(fields: Mapping[str, str], config: Any) -> dict[str, Any]:
    """Our settings by the published names."""
    return {published: getattr(config, own) for own, published in fields.items()}


def require(values: Json, fixed: Json, refuse: Refuse, what: str, instead: str) -> None:
    """
    Raises:
        UserError: a value is not the one that every supported model has.
    """
    for key, value in fixed.items():
        given = values.get(key, value)
        if given != value and (given or value):  # null stands for False
            raise refuse(f"{what} with {key} {given!r}", instead)
