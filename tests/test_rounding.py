"""Stochastic rounding to bfloat16: right in the mean, the same on any mesh, and what it is for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from pisces_jax.sharding import make_mesh
from pisces_jax.training import optimizer
from pisces_jax.training.config import check_names, run_config
from pisces_jax.utils.errors import UserError


def rounded(x, seed=0):
    like = jax.ShapeDtypeStruct(x.shape, jnp.bfloat16)
    return jax.jit(lambda x, k: optimizer.rounded([x], [like], k))(x, jax.random.key(seed))[0]


@pytest.mark.parametrize("x", [1.001, -1.001, 3e-39, 0.3333, -700.5])
def test_the_mean_of_many_roundings_is_the_number(x):
    n = 2**16
    got = np.asarray(rounded(jnp.full(n, x, jnp.float32)), np.float64)
    low, high = np.unique(got)  # two neighbours, x between them
    assert low < np.float32(x) < high and high - low <= 2**-7 * max(abs(x), 2.0**-126)
    assert abs(got.mean() - np.float32(x)) < 5 * got.std() / n**0.5


def test_what_bfloat16_holds_stays():
    exact = np.asarray([0.0, -0.0, 1.0, -2.5, 2.0**-126, 3.3895314e38, np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(np.asarray(rounded(jnp.asarray(exact)), np.float32), exact)


def test_rounding_does_not_depend_on_the_devices():
    x = np.random.default_rng(0).normal(size=(64, 24)).astype(np.float32)
    mesh = make_mesh(fsdp=4, tensor=2)
    for spec in (PartitionSpec(("fsdp", "fsdp_inner"), "tensor"), PartitionSpec(None, "tensor")):
        sharded = jax.device_put(x, NamedSharding(mesh, spec))
        np.testing.assert_array_equal(*(np.asarray(rounded(a), np.float32) for a in (jnp.asarray(x), sharded)))
    assert (np.asarray(rounded(jnp.asarray(x), 1)) != np.asarray(rounded(jnp.asarray(x)))).any()


def test_small_changes_add_up_and_state_stays_narrow():
    """AdamW on float32 masters, on bfloat16 rounded to nearest, which never moves, and rounded stochastically."""
    steps, wide = 40, {"lm": {"kernel": jnp.ones(4096)}}
    ends = {}
    for name, dtype in (("nearest", jnp.float32), ("nearest", jnp.bfloat16), ("stochastic", jnp.bfloat16)):
        config = run_config(
            name="r", optimizer=dict(learning_rate=2e-4, mu_dtype=dtype.__name__, rounding=name)
        ).optimizer
        params = jax.tree.map(lambda x, d=dtype: x.astype(d), wide)
        rules = optimizer.match(optimizer.read_table(((".*", 1.0, 0.0),)), ["lm/kernel"])
        tx = optimizer.make_optimizer(config, steps, params, rules)
        state, dtypes = tx.init(params), [x.dtype for x in jax.tree.leaves(tx.init(params))]

        @jax.jit
        def step(params, state, key, tx=tx, name=name):
            gradients = jax.tree.map(lambda p: 0.01 * p, params)
            return optimizer.update(tx, name, gradients, state, params, key)[:2]

        for i in range(steps):
            params, state = step(params, state, jax.random.key(i))
        assert [x.dtype for x in jax.tree.leaves(state)] == dtypes and params["lm"]["kernel"].dtype == dtype
        ends[name, dtype.__name__] = np.asarray(params["lm"]["kernel"], np.float64)
    right, stuck, kept = ends.values()
    assert right.max() < 0.997 and (stuck == 1).all()
    assert abs(kept.mean() - right.mean()) < 0.1 * (1 - right.mean())


def test_an_unknown_rounding_is_refused():
    with pytest.raises(UserError, match="optimizer.rounding: 'up' is none of nearest, stochastic"):
        check_names(run_config(name="r", optimizer=dict(rounding="up")))
