"""The mesh and its rules; the same losses and gradients on one device and on eight."""

import functools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import PartitionSpec as P

from pisces_jax.sharding import (
    BATCH_AXES,
    batch_sharding,
    batch_shards,
    constrain,
    make_mesh,
    partition_spec,
)
from pisces_jax.training.config import merge
from pisces_jax.training.optimizer import flatten
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import Trainer, make_trainer
from pisces_jax.utils.errors import UserError

MESHES = {
    "fsdp": dict(fsdp=8),
    "tensor": dict(fsdp=1, tensor=8),
    "more tensor": dict(fsdp=2, tensor=4),
    "fsdp and tensor": dict(fsdp=4, tensor=2),
    "all": dict(data=2, fsdp=2, tensor=2),
}
LONG = bool(os.environ.get("PISCES_LONG_TESTS"))
SHORT = "fsdp", "tensor", "all"  # each kind of sharding alone, and all at once


# --- rules


@pytest.mark.parametrize(
    "axes, shape, sizes, expected",
    [
        (("embed", "heads", "head_dim"), (64, 8, 16), dict(fsdp=8), P(("fsdp", "fsdp_inner"))),
        (("embed", "mlp"), (64, 8), dict(fsdp=4, tensor=2), P(("fsdp", "fsdp_inner"), "tensor")),
        (("heads", "head_dim", "embed"), (8, 16, 64), dict(fsdp=1, tensor=8), P("tensor")),
        (("vocab", "embed"), (64, 64), dict(fsdp=2, tensor=4), P("tensor", "fsdp")),
        ((None, "embed"), (3, 64), dict(fsdp=8), P(None, ("fsdp", "fsdp_inner"))),
        (("batch", "length", "width"), (16, 5, 7), dict(data=2, fsdp=4), P(("data", "fsdp", "fsdp_inner"))),
        ((), (), dict(fsdp=8), P()),
    ],
)
def test_where_arrays_lie(axes, shape, sizes, expected):
    fallbacks = []
    assert partition_spec(axes, shape, make_mesh(**sizes), fallbacks=fallbacks) == expected
    assert not fallbacks


def test_dimensions_that_do_not_divide_fall_back_to_a_part_of_the_axes():
    mesh = make_mesh(fsdp=8)  # fsdp 2 × fsdp_inner 4
    assert (mesh.shape["fsdp"], mesh.shape["fsdp_inner"]) == (2, 4)
    for size, expected, used in ((16, ("fsdp", "fsdp_inner"), None), (6, "fsdp", ("fsdp",)), (7, None, ())):
        fallbacks = []
        spec = partition_spec(("embed", "mlp"), (size, 3), mesh, name="a/kernel", fallbacks=fallbacks)
        assert spec == (P(expected) if expected else P())
        if used is None:
            assert not fallbacks
        else:
            (fallback,) = fallbacks
            assert (fallback.name, fallback.dimension, fallback.size) == ("a/kernel", 0, size)
            assert (fallback.wanted, fallback.used) == (("fsdp", "fsdp_inner"), used)
    # 12 is a multiple of 4, but not of 8: only the first axis is used, of size 2.
    assert partition_spec(("embed",), (12,), mesh) == P("fsdp")


def test_two_axes_on_one_mesh_axis_are_refused():
    with pytest.raises(ValueError, match="x/kernel: logical axes 'heads' and 'mlp' both want mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (8, 8), make_mesh(fsdp=1, tensor=8), name="x/kernel")
    # Also if the first of them does not divide.
    with pytest.raises(ValueError, match="both want mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (3, 8), make_mesh(fsdp=1, tensor=8))
    assert partition_spec(("heads", "mlp"), (8, 8), make_mesh(fsdp=8)) == P()


def test_unknown_axes_and_wrong_ranks_are_refused():
    mesh = make_mesh()
    with pytest.raises(ValueError, match="w: unknown logical axis 'embedd'; known: vocab, embed"):
        partition_spec(("embedd",), (8,), mesh, name="w")
    with pytest.raises(ValueError, match="do not name the dimensions"):
        partition_spec(("embed",), (8, 8), mesh)


# --- meshes


def test_fsdp_is_split_in_two():
    for devices, expected in ((1, (1, 1)), (2, (2, 1)), (3, (3, 1)), (4, (2, 2)), (6, (3, 2)), (8, (2, 4))):
        mesh = make_mesh(fsdp=devices, devices=jax.devices()[:devices])
        assert (mesh.shape["fsdp"], mesh.shape["fsdp_inner"]) == expected
        assert batch_shards(mesh) == devices
    assert make_mesh(data=2, tensor=2).shape == {"data": 2, "fsdp": 2, "fsdp_inner": 1, "tensor": 2}
    assert batch_sharding(make_mesh()).spec == P(BATCH_AXES)


def test_meshes_that_do_not_fit_name_one_that_does():
    def refusal(**sizes):
        with pytest.raises(UserError) as error:
            make_mesh(**sizes)
        assert "\n" not in str(error.value)
        return str(error.value)

    message = refusal(fsdp=64)
    assert "data=1,fsdp=64,tensor=1 takes 64 devices and there are 8: try data=1,fsdp=8,tensor=1" in message
    assert "takes a multiple of 3 devices and there are 8: try data=1,fsdp=8,tensor=1" in refusal(tensor=3)
    assert "try data=1,fsdp=4,tensor=2" in refusal(data=3, tensor=2)
    assert "takes 4 devices and there are 8" in refusal(fsdp=4)
    for sizes in (dict(fsdp=0), dict(tensor=-2), dict(data=-1, fsdp=-1)):
        assert "sizes are positive, and at most one of them is -1" in refusal(**sizes)
    # The sizes that a message names do fit.
    for sizes in (dict(fsdp=64), dict(tensor=3), dict(data=3, tensor=2), dict(tensor=6)):
        named = refusal(**sizes).split("try ")[1]
        make_mesh(**{k: int(v) for k, v in (word.split("=") for word in named.split(","))})


def test_constrain():
    x = jnp.ones((8, 4, 6))
    assert constrain(x, "batch", "length", "width") is x  # no mesh
    mesh = make_mesh(fsdp=4, tensor=2)
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "batch", "length", "mlp"))(x)
    assert y.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, P(("fsdp", "fsdp_inner"), None, "tensor")), 3)
    with jax.set_mesh(make_mesh(devices=jax.devices()[:1])):
        assert constrain(x, "batch", "length", "width") is x


# --- the same numbers everywhere


def unified(width, grad_accum_steps=1):
    """A config whose first train step leaves 0.1 of the gradient in the optimizer's first moments."""
    model = tiny.model_settings(width)
    return tiny.config(
        program="unified", batch_size=8, model=model, data=dict(train={"a": {}, "b": {}}), loss=dict(chunk=8),
        optimizer=dict(
            b1=0.9, clip=0.0, grad_accum_steps=grad_accum_steps,
            param_groups=(("generation_encoder/.*", 0.0, 0.0), (".*", 1.0, 0.0))
        ),
    )  # fmt: skip


GROUPS = [
    # Very different numbers of learned tokens and drawn pictures; some groups have none.
    [[tiny.CAPTION, tiny.CHAT], [tiny.CAPTION, tiny.CHAT]],
    [[tiny.DRAW]],
    [[tiny.TWO], [tiny.EDIT]],
    [[tiny.DRAW, tiny.DRAW], [tiny.DRAW]],
    [[tiny.EDIT, tiny.DRAW], [tiny.CHAT]],
    [[tiny.CHAT]],
    [[]],
    [[tiny.TWO, tiny.DRAW]],
]


def packed_batch():
    return tiny.batch(*(tiny.pack(rows, idle=1 + i) for i, rows in enumerate(GROUPS)))


def pairs_batch(size):
    rng = np.random.default_rng(0)
    tokens = rng.integers(6, 32, (8, 12)).astype(np.int32)
    tokens[5] = tokens[1]  # two pictures of one text
    return dict(
        image=rng.integers(0, 256, (8, size, size, 3)).astype(np.uint8),
        tokens=tokens,
        text_mask=np.arange(12) < rng.integers(3, 13, 8)[:, None],
        id=rng.integers(0, 2**32, (8, 2), np.uint64).astype(np.uint32),
        valid=np.array([1, 1, 0, 1, 1, 1, 0, 1], bool),
    )


class Step(NamedTuple):
    trainer: Trainer
    start: Any  # the state before the step, on the host
    losses: dict[str, float]
    gradient: dict[str, np.ndarray]


def one_step(config, mesh, batch, start=None):
    """The first step of a trainer with its real shardings, from `start` or a random initial state."""
    trainer = make_trainer(make_program(config, 32), config, mesh)
    if start is None:
        start = jax.device_get(trainer.init(jax.random.key(0)))
    state, metrics = trainer.train_step()(jax.device_put(start, trainer.shardings), trainer.put(batch))
    (adam,) = (s for s in state.optimizer if hasattr(s, "mu"))
    gradient = {k: np.asarray(mu, np.float64) / 0.1 for k, mu in flatten(jax.device_get(adam.mu)).items()}
    losses = {k: float(v.compute()) for k, v in metrics.items() if float(v.count)}
    return Step(trainer, start, losses, gradient)


def far_off(got, expected, tolerance=1e-5):
    """Parameters whose gradients differ by more than `tolerance`, relative to the norm of the expected gradient."""
    assert got.keys() == expected.keys()
    far = {}
    for name, truth in expected.items():
        if name.endswith("attention/key/bias"):
            # A bias of keys does not change the softmax, so its gradient is only rounding.
            assert np.linalg.norm(truth) < 1e-5 * np.linalg.norm(expected[name.replace("key", "query")])
            continue
        distance = np.linalg.norm(got[name] - truth) / np.linalg.norm(truth)
        if not distance < tolerance:
            far[name] = distance
    return far


def single_device():
    return make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def alone():
    """A step of the unified model of a given width on one device."""
    return functools.cache(lambda width: one_step(unified(width), single_device(), packed_batch()))


@pytest.mark.slow
@pytest.mark.parametrize("mesh, width", [*((mesh, 32) for mesh in MESHES if LONG or mesh in SHORT), ("all", 36)])
def test_unified_model_on_eight_devices(alone, mesh, width):
    expected = alone(width)
    got = one_step(unified(width), make_mesh(**MESHES[mesh]), packed_batch(), expected.start)
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert not far_off(got.gradient, expected.gradient)
    assert any(s.spec != P() for s in jax.tree.leaves(got.trainer.shardings.trained))
    # A width of 36 and three heads do not divide; nor do two key-value heads over four or eight devices.
    assert bool(got.trainer.fallbacks) == (width == 36 or MESHES[mesh].get("tensor", 1) > 2)


@pytest.mark.slow
@pytest.mark.parametrize("program", ["pretrain", "decoder"])
def test_picture_programs_on_eight_devices(program):
    """The contrastive loss sees the whole batch, and noise depends on the example, not on the device."""
    config = tiny.config(
        program=program, batch_size=8, model=tiny.model_settings(32), data=dict(text_length=12),
        flow=dict(drop=0.3, zero_share=0.2), loss=dict(feature_noise=0.1, same_text=True, words=0.3),
        # Adam's first update divides each gradient by its size; `eps` suppresses the rounding of tiny gradients.
        optimizer=dict(b1=0.9, eps=1e-3, clip=0.0, param_groups=((".*", 1.0, 0.0),)),
    )  # fmt: skip
    batch = pairs_batch(16)
    if program == "decoder":
        config.optimizer.param_groups = (("generation_encoder/.*", 0.0, 0.0), (".*", 1.0, 0.0))
    expected = one_step(config, single_device(), batch, random_start(config))
    mesh = make_mesh(**MESHES["all"])
    got = one_step(config, mesh, batch, expected.start)
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert not far_off(got.gradient, expected.gradient)


def random_start(config):
    """A state a little away from the initial one, where the output of the decoder and nearly all gradients are zero.

    Only a little: with biases as large as the weights, the gradients of query and key are small differences of large
    numbers, and rounding alone would be 1e-5 of them.
    """
    start = jax.device_get(make_trainer(make_program(config, 32), config, single_device()).init(jax.random.key(0)))
    rng = np.random.default_rng(0)
    moved = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), start.trained)
    return start.replace(trained=moved)


@pytest.mark.slow
def test_a_decoder_that_learns_on_is_the_same_on_eight_devices():
    """There with two accumulation steps: noise and the choice of true vectors depend on the picture only."""

    def config(accumulate):
        config = unified(32, accumulate)
        config.train_decoder = True
        merge(config, dict(flow=dict(drop=0.3, zero_share=0.2), loss=dict(true_vectors=0.5), optimizer=dict(eps=1e-3)))
        return config

    batch = packed_batch()
    batch["draw_id"] = np.random.default_rng(0).integers(0, 2**32, batch["draw_id"].shape, np.uint64).astype(np.uint32)
    expected = one_step(config(1), single_device(), batch, random_start(config(1)))
    assert expected.losses["reconstruction"] > 0 and any(k.startswith("decoder/") for k in expected.gradient)
    got = one_step(config(2), make_mesh(**MESHES["all"]), batch, expected.start)
    assert got.losses == pytest.approx(expected.losses, rel=1e-5)
    assert not far_off(got.gradient, expected.gradient)


@pytest.mark.slow
def test_random_start_does_not_depend_on_the_mesh(alone):
    """The initial state is created sharded."""
    config = unified(32)
    trainer = make_trainer(make_program(config, 32), config, make_mesh(**MESHES["all"]))
    state = trainer.init(jax.random.key(0))
    for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone(32).start), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "accumulate, devices, sizes",
    [
        (4, 1, dict()), (2, 8, dict(fsdp=4, tensor=2)),
        *([(2, 4, dict()), (4, 8, dict(fsdp=2, tensor=4)), (8, 8, dict(fsdp=1, tensor=8))] if LONG else []),
    ],
)  # fmt: skip
def test_accumulated_gradients_equal_whole_ones(alone, accumulate, devices, sizes):
    mesh = make_mesh(**sizes, devices=jax.devices()[:devices])
    got = one_step(unified(32, accumulate), mesh, packed_batch(), alone(32).start)
    assert got.losses == pytest.approx(alone(32).losses, rel=1e-5)
    assert not far_off(got.gradient, alone(32).gradient)


@pytest.mark.slow
def test_parts_normalised_each_by_itself_would_be_seen(alone):
    """The mean of the gradients of two halves, each divided by its own counts, is different."""
    trainer, start, _, gradient = alone(32)
    step = jax.jit(lambda state, batch: trainer._gradient(state, batch)[0])
    halves = [
        flatten(jax.device_get(step(start, {k: v[half::2] for k, v in packed_batch().items()}))) for half in range(2)
    ]
    wrong = {name: (halves[0][name] + halves[1][name]) / 2 for name in gradient}
    assert len(far_off(wrong, gradient, 1e-2)) > len(gradient) / 2


def test_batches_that_do_not_fit_the_mesh_are_refused():
    config = unified(32, grad_accum_steps=2)
    program = make_program(config, 32)
    message = "batch_size 8 must be a multiple of 16 .mesh shards 8 × optimizer.grad_accum_steps 2"
    with pytest.raises(UserError, match=message):
        make_trainer(program, config, make_mesh(fsdp=8))
