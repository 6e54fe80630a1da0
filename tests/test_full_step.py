"""What the full-size step adds, at tiny sizes: rematerialisation, text alone, dtypes of gradients and storage."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from pisces_jax.models.layers import REMAT_POLICIES
from pisces_jax.models.transformer import Transformer, TransformerConfig
from pisces_jax.sharding import make_mesh
from pisces_jax.training.optimizer import flatten
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import make_trainer

LANGUAGE = dict(width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_hidden=48, rope_theta=1000.0)
IDS = jnp.asarray([[1] * 9 + [2] * 20 + [0] * 3, [1] * 32])
POSITIONS = jnp.asarray([[*range(9), *range(20), 0, 1, 2], [*range(32)]])


@functools.cache
def gradients(remat, attention="xla"):
    """Of a loss over packed rows, with the same parameters whatever the policy; and the compiled temporaries."""
    model = Transformer(TransformerConfig(vocab_size=32, **LANGUAGE, remat=remat, attention=attention))
    tokens = jax.random.randint(jax.random.key(0), (2, 32), 0, 32)
    params = model.init(jax.random.key(1), tokens, method="init_all")

    def loss(params):
        x = model.apply(params, tokens, method="embed")
        hidden, _ = model.apply(params, x, POSITIONS, IDS)
        return (hidden**2 * jnp.arange(32)).sum()

    return jax.jit(jax.grad(loss))(params)


@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name != "none"])
def test_rematerialisation_changes_no_gradient(remat):
    for a, b in zip(jax.tree.leaves(gradients(remat)), jax.tree.leaves(gradients("none")), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * float(jnp.abs(b).max()))


def test_saved_context_runs_attention_forward_once():
    """The forward pass of blockwise attention, found by its running maximum, is in the backward pass of "full"
    and not in that of "attention"."""

    def loops(remat):
        model = Transformer(TransformerConfig(vocab_size=32, **LANGUAGE, remat=remat, attention="blockwise"))
        params = jax.eval_shape(
            functools.partial(model.init, method="init_all"), jax.random.key(0), jnp.zeros((2, 32), jnp.int32)
        )

        def loss(params, x):
            return model.apply(params, x, POSITIONS, IDS)[0].sum()

        x = jax.ShapeDtypeStruct((2, 32, 32), jnp.float32)
        return str(jax.make_jaxpr(jax.grad(loss))(params, x)).count("reduce_max")

    assert loops("full") == 2 * loops("attention")


def text_config(**optimizer):
    config = tiny.config(batch_size=4, model=dict(language_model=LANGUAGE), loss=dict(chunk=8))
    config.data.train = {"a": {}, "b": {}}
    config.optimizer.update({"b1": 0.9, "clip": 0.0, **optimizer})
    return config


def rows():
    """Four groups of rows without pictures."""
    return tiny.batch(*(tiny.pack([[tiny.CHAT, tiny.CHAT], [tiny.CHAT]]) for _ in range(4)))


def test_text_alone_is_the_unified_step_without_pictures():
    config = tiny.config(program="unified", batch_size=4, model=tiny.model_settings(32), loss=dict(chunk=8))
    config.data.train = {"a": {}, "b": {}}
    unified = make_program(config, 32)
    params = jax.jit(lambda k: unified.init(k))(jax.random.key(0))
    import flax.linen as nn

    params = nn.unbox(params)
    alone = text_config()
    alone.model = dict(language_model=tiny.model_settings(32)["language_model"])
    text = make_program(alone, 32)
    expected, _ = jax.jit(unified.losses)(params, rows(), jax.random.key(0))
    got, reported = jax.jit(text.losses)({"language_model": params["language_model"]}, rows(), jax.random.key(0))
    assert float(got["text"].total) == pytest.approx(float(expected["text"].total), rel=1e-6)
    assert float(got["text"].count) == float(expected["text"].count) == float(text.counts(rows())["text"])
    assert set(reported) == {"text/a", "text/b"}


def first_moments(config, sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[:4])
    trainer = make_trainer(make_program(config, 32), config, mesh)
    state, _ = trainer.train_step()(trainer.init(jax.random.key(0)), trainer.put(rows()))
    (adam,) = (s for s in state.optimizer if hasattr(s, "mu"))
    return trainer, state, flatten(jax.device_get(adam.mu))


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_in_bfloat16(accumulate):
    """They differ by bfloat16's rounding; the masters and moments stay what they are."""
    sizes = dict(fsdp=2, tensor=2)
    _, _, exact = first_moments(text_config(), sizes)
    trainer, state, rounded = first_moments(text_config(grad_dtype="bfloat16", grad_accum_steps=accumulate), sizes)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state.trained, state.optimizer)) if x.ndim)
    for name, truth in exact.items():
        distance = np.linalg.norm(rounded[name] - truth) / np.linalg.norm(truth)
        assert 1e-5 < distance < 0.05, (name, distance)
    assert trainer.config.optimizer.grad_accum_steps == accumulate
