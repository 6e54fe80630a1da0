"""What trains, how fast and with which weight decay: a table of patterns over parameter names; and AdamW."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict

from pisces_jax.errors import UserError

Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of the table: the first whose pattern matches a whole parameter name holds for it."""

    pattern: str
    multiple: float
    weight_decay: float


def read_table(rows: Sequence[Sequence[Any]]) -> tuple[Rule, ...]:
    try:
        table = tuple(Rule(str(p), float(m), float(w)) for p, m, w in rows)
        for rule in table:
            re.compile(rule.pattern)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"optimizer.table: rows are (pattern, multiple, weight decay): {error}") from error
    return table


def match(table: Sequence[Rule], names: Sequence[str]) -> dict[str, Rule]:
    """The rule of each parameter.

    Raises:
        UserError: a parameter without a rule, or a rule that matches no parameter at all (a misspelling).
    """
    rules = {}
    for name in names:
        found = next((rule for rule in table if re.fullmatch(rule.pattern, name)), None)
        if found is None:
            raise UserError(f"optimizer.table has no row for parameter {name}: end it with ('.*', 1.0, 0.0)")
        rules[name] = found
    for rule in table[:-1]:
        if not any(re.fullmatch(rule.pattern, name) for name in names):
            raise UserError(f"optimizer.table: pattern {rule.pattern!r} matches no parameter: correct or delete it")
    return rules


def flatten(tree: Mapping[str, Any]) -> Flat:
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Flat) -> dict[str, Any]:
    return traverse_util.unflatten_dict(flat, sep="/")


def split(tree: Mapping[str, Any], rules: Mapping[str, Rule]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(trained, frozen) subtrees: the frozen get no gradients and no optimizer state."""
    flat = flatten(tree)
    trained = {k: v for k, v in flat.items() if rules[k].multiple}
    frozen = {k: v for k, v in flat.items() if not rules[k].multiple}
    return unflatten(trained), unflatten(frozen)


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    return unflatten({**flatten(trained), **flatten(frozen)})


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine to `final_rate` of the peak."""
    if config.warmup_steps >= steps:
        raise UserError(f"optimizer.warmup_steps {config.warmup_steps} must be less than the {steps} steps of the run")
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate, config.learning_rate, config.warmup_steps, steps,
        end_value=config.learning_rate * config.final_rate,
    )  # fmt: skip


def _per_parameter(values: Any, apply: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.tree.map(apply, updates, params, values))


def make_optimizer(
    config: ConfigDict, steps: int, trained: Mapping[str, Any], rules: Mapping[str, Rule]
) -> optax.GradientTransformation:
    """Clipping by global norm, AdamW (Loshchilov & Hutter 2019) with each parameter's own decay and rate."""
    flat = flatten(trained)
    decay = unflatten({k: rules[k].weight_decay for k in flat})
    multiple = unflatten({k: rules[k].multiple for k in flat})
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.moment_dtype)),
        _per_parameter(decay, lambda u, p, d: u + d * p.astype(u.dtype)),
        _per_parameter(multiple, lambda u, p, m: m * u),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )
