"""AdamW and Muon, with a table of parameter groups: which parameters train, how fast, with which weight decay."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util
from ml_collections import ConfigDict
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from pisces_jax.utils.errors import UserError

Flat = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row of the table: the first whose pattern matches the whole name of a parameter applies to it.

    Attributes:
        multiple: of the learning rate; 0 freezes.
    """

    pattern: str
    multiple: float
    weight_decay: float


def read_table(rows: Sequence[Sequence[Any]]) -> tuple[Rule, ...]:
    """The rules of config key `optimizer.param_groups`.

    Raises:
        UserError: a row of another form, or a pattern that is not a regular expression.
    """
    try:
        table = tuple(Rule(str(p), float(m), float(w)) for p, m, w in rows)
        for rule in table:
            re.compile(rule.pattern)
    except (TypeError, ValueError, re.error) as error:
        raise UserError(f"optimizer.param_groups: rows are (pattern, multiple, weight decay): {error}") from error
    return table


def match(table: Sequence[Rule], names: Sequence[str]) -> dict[str, Rule]:
    """The rule of each parameter.

    Raises:
        UserError: a parameter without a rule, or a rule that matches no parameter (a misspelling).
    """
    rules = {}
    for name in names:
        found = next((rule for rule in table if re.fullmatch(rule.pattern, name)), None)
        if found is None:
            raise UserError(f"optimizer.param_groups has no row for parameter {name}: end it with ('.*', 1.0, 0.0)")
        rules[name] = found
    for rule in table[:-1]:
        if not any(re.fullmatch(rule.pattern, name) for name in names):
            raise UserError(
                f"optimizer.param_groups: pattern {rule.pattern!r} matches no parameter: correct or delete it"
            )
    return rules


def flatten(tree: Mapping[str, Any]) -> Flat:
    """Leaves by name, as `language_model/layers/mlp/up`."""
    return traverse_util.flatten_dict(dict(tree), sep="/")


def unflatten(flat: Flat) -> dict[str, Any]:
    """The inverse of `flatten`."""
    return traverse_util.unflatten_dict(flat, sep="/")


def split(tree: Mapping[str, Any], rules: Mapping[str, Rule]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The trained and the frozen parameters; the frozen have no gradients and no optimizer state."""
    flat = flatten(tree)
    trained = {k: v for k, v in flat.items() if rules[k].multiple}
    return unflatten(trained), unflatten({k: v for k, v in flat.items() if k not in trained})


def join(trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `split`."""
    return unflatten({**flatten(trained), **flatten(frozen)})


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine down to `final_rate` times the peak.

    Raises:
        UserError: the warm-up is as long as the run or longer.
    """
    if config.warmup_steps >= steps:
        raise UserError(f"optimizer.warmup_steps {config.warmup_steps} must be less than the {steps} steps of the run")
    return optax.warmup_cosine_decay_schedule(
        0.0 if config.warmup_steps else config.learning_rate, config.learning_rate, config.warmup_steps, steps,
        end_value=config.learning_rate * config.final_rate,
    )  # fmt: skip


def _per_parameter(values: Any, apply: Any) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: jax.tree.map(apply, updates, params, values))


def _muon_axes(rows: Sequence[Sequence[Any]], flat: Flat) -> dict[str, MuonDimensionNumbers]:
    """The axes that make up the rows and columns of each matrix that Muon updates.

    `rows` are (pattern, number of input axes, number of output axes). These are the last axes of a parameter that the
    pattern matches; axes before them number matrices (the layers of a scan).

    Raises:
        UserError: a row of another form, one that matches no trained parameter, or one with more axes than it has.
    """
    found = {}
    for row in rows:
        try:
            pattern, inputs, outputs = re.compile(row[0]), int(row[1]), int(row[2])
        except (TypeError, ValueError, IndexError, re.error) as error:
            raise UserError(f"optimizer.muon: rows are (pattern, input axes, output axes): {error}") from error
        names = [k for k in flat if pattern.fullmatch(k)]
        if not names:
            raise UserError(f"optimizer.muon: pattern {row[0]!r} matches no trained parameter: correct or delete it")
        for k in names:
            n = flat[k].ndim
            if n < inputs + outputs:
                raise UserError(f"optimizer.muon: {k} has {n} axes, {row[0]!r} says {inputs} + {outputs}")
            middle = n - outputs
            found[k] = MuonDimensionNumbers(tuple(range(middle - inputs, middle)), tuple(range(middle, n)))
    return found


def _muon(axes: Mapping[str, MuonDimensionNumbers], config: ConfigDict) -> optax.GradientTransformation:
    def numbers(tree: Any) -> Any:
        return unflatten({k: axes.get(k, x) for k, x in flatten(tree).items()})

    def rescale(updates: Any, _: Any) -> Any:
        flat = flatten(updates)
        for k, a in axes.items():
            rows, columns = (math.prod(flat[k].shape[i] for i in side) for side in (a.reduction_axis, a.output_axis))
            flat[k] = 0.2 * max(rows, columns) ** 0.5 * flat[k]
        return unflatten(flat)

    momentum = jnp.dtype(config.mu_dtype)
    direction = scale_by_muon(beta=0.95, mu_dtype=momentum, weight_dimension_numbers=numbers)
    return optax.chain(direction, optax.stateless(rescale))


def make_optimizer(
    config: ConfigDict, steps: int, trained: Mapping[str, Any], rules: Mapping[str, Rule]
) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW (Loshchilov & Hutter 2019) with each parameter's own weight decay and rate.

    The matrices that `config.muon` names take Muon's direction (Jordan et al. 2024) in place of Adam's. It is scaled to
    the usual size of Adam's (Liu et al. 2025, arXiv 2502.16982, eq. 4), so that both share learning rate and decay.

    Args:
        config: the config's key `optimizer`.
        steps: of the run.
        trained: the trained parameters, or their shapes.
        rules: by parameter name.

    Raises:
        UserError: as `learning_rate`, or rows of `muon` that do not fit the parameters.
    """
    if config.rounding == "stochastic":
        # What is stored is widened for the update, and nothing is to be rounded inside (`update`).
        wide = ConfigDict({**config, "mu_dtype": "float32", "rounding": "nearest"})
        narrow = ConfigDict({**config, "rounding": "nearest"})
        return optax.GradientTransformation(
            make_optimizer(narrow, steps, trained, rules).init, make_optimizer(wide, steps, trained, rules).update
        )
    flat = flatten(trained)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=jnp.dtype(config.mu_dtype))
    matrices = _muon_axes(config.muon, flat)
    if matrices:
        kinds = unflatten({k: "muon" if k in matrices else "adam" for k in flat})
        adam = optax.partition({"adam": adam, "muon": _muon(matrices, config)}, kinds)
    decay = unflatten({k: rules[k].weight_decay for k in flat})
    multiple = unflatten({k: rules[k].multiple for k in flat})
    clip = optax.clip_by_global_norm(config.clip) if config.clip else optax.identity()
    return optax.chain(
        clip,
        adam,
        _per_parameter(decay, lambda u, p, d: u + d * p.astype(u.dtype)),
        _per_parameter(multiple, lambda u, p, m: m * u),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
    )


def update(
    tx: optax.GradientTransformation, rounding: str, gradients: Any, state: Any, params: Any, key: jax.Array
) -> tuple[Any, Any, Any]:
    """The new parameters and state of the optimizer, and the change of the parameters.

    With `rounding` "stochastic" everything is computed in float32 and what is stored in bfloat16 is rounded up or down
    at random (`rounded`), so that changes too small for bfloat16 add up in the mean (Zamirai et al. 2020, arXiv
    2010.06192).
    """
    if rounding == "nearest":
        changes, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, changes
    wide = jax.tree.map(_widened, (gradients, state, params))
    changes, after = tx.update(*wide)
    new, after = rounded((optax.apply_updates(wide[2], changes), after), (params, state), key)
    return new, after, changes


def rounded(tree: Any, like: Any, key: jax.Array) -> Any:
    """The arrays of a float32 tree in the dtypes of `like`; to bfloat16, each number goes to one of its two neighbours,
    to the nearer one more often, so that its mean is the number itself.

    The random bits belong to the number's place in its array, however the array is sharded.
    """
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    stored = (_rounded(x, old.dtype, k) for x, old, k in zip(leaves, jax.tree.leaves(like), keys, strict=True))
    return jax.tree.unflatten(structure, stored)


def _rounded(x: jax.Array, dtype: Any, key: jax.Array) -> jax.Array:
    if dtype != jnp.bfloat16 or x.dtype != jnp.float32:
        return x.astype(dtype)
    # bfloat16 is the upper half of float32: what is added to the lower half carries with its own probability.
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + (jax.random.bits(key, x.shape) & 0xFFFF)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(dtype)


def _widened(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
