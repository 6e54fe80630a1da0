"""The trainer: its optimizer and step against numpy, runs that are stopped and resumed, and what it refuses."""

import collections
import dataclasses
import functools
import json
import math
import shutil
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tiny
from clu.metrics import Average
from flax.core import meta
from ml_collections import ConfigDict
from toy import Toy as Small

from pisces_jax.data.images import fit
from pisces_jax.inference.samples import make_sampler
from pisces_jax.models.vit import ViTConfig
from pisces_jax.sharding import make_mesh
from pisces_jax.training import checkpoints, loop, optimizer
from pisces_jax.training.config import build, flow_config, merge, run_config
from pisces_jax.training.metrics import Writer, check_finite, read_metrics
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.base import example_keys
from pisces_jax.training.programs.pretrain import resize
from pisces_jax.training.programs.reconstruction import to_pixels, to_signal
from pisces_jax.training.step import make_trainer
from pisces_jax.utils.errors import UserError

# --- the optimizer's table

NAMES = ["vit/layers/norm/scale", "vit/layers/mlp/kernel", "vit/layers/mlp/bias", "llm/embedding"]


def rules(*rows, names=tuple(NAMES)):
    return optimizer.match(optimizer.read_table(rows), names)


def test_first_row_that_matches_a_whole_name_holds():
    got = rules((r".*/(scale|bias)", 1.0, 0.0), (r"vit/.*", 0.5, 0.1), (r"(llm/)?embedding", 3.0, 0.3))
    assert {name: (rule.multiple, rule.weight_decay) for name, rule in got.items()} == {
        "vit/layers/norm/scale": (1.0, 0.0),
        "vit/layers/mlp/kernel": (0.5, 0.1),
        "vit/layers/mlp/bias": (1.0, 0.0),
        "llm/embedding": (3.0, 0.3),
    }
    with pytest.raises(UserError):  # a part of the name is no match
        rules((r"llm/embed", 1.0, 0.0), (".*", 1.0, 0.0))


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match="no row for parameter llm/embedding"):
        rules(("vit/.*", 1.0, 0.0))
    with pytest.raises(UserError, match="pattern 'vti/.*' matches no parameter: correct or delete it"):
        rules(("vti/.*", 0.0, 0.0), (".*", 1.0, 0.0))
    for table in (((".*", 1.0),), (("(", 1.0, 0.0),), ((".*", "fast", 0.0),)):
        with pytest.raises(UserError, match="rows are .pattern, multiple, weight decay."):
            optimizer.read_table(table)


def test_learning_rate_is_the_closed_form():
    config = ConfigDict(dict(learning_rate=0.2, warmup_steps=5, final_rate=0.1))
    schedule = optimizer.learning_rate(config, 25)
    for step in range(25):
        if step < 5:
            expected = 0.2 * step / 5
        else:
            expected = 0.02 + (0.2 - 0.02) * 0.5 * (1 + math.cos(math.pi * (step - 5) / 20))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5, abs=1e-9)
    config.warmup_steps = 0
    assert float(optimizer.learning_rate(config, 25)(0)) == pytest.approx(0.2)
    config.warmup_steps = 25
    with pytest.raises(UserError, match="warmup_steps 25 must be less than the 25 steps"):
        optimizer.learning_rate(config, 25)


# --- a step, on a program small enough to do by hand


@dataclasses.dataclass(frozen=True)
class Toy(Small):
    """Mean over the valid rows of |x w - y|² + |x v - 1|², with frozen u."""

    weights = {"fit": 2.0, "idle": 0.0}

    @classmethod
    def parts(cls, config):
        return ("a", "b")

    def init(self, key):
        part = {name: jnp.arange(1.0, 4.0) * scale for name, scale in (("w", 1.0), ("v", -0.5), ("scale", 2.0))}
        return {"a": part, "b": {"u": jnp.ones(2)}}

    def counts(self, batch):
        return {"fit": batch["valid"].sum().astype(jnp.float32), "idle": jnp.ones(())}

    def losses(self, params, batch, key):
        a, u = params["a"], params["b"]["u"]
        error = (batch["x"] @ (a["w"] * a["scale"]) - batch["y"]) ** 2 + (batch["x"] @ a["v"] * u[0] - 1) ** 2
        total = jnp.where(batch["valid"], error, 0).sum()
        return {"fit": Average(total=total, count=batch["valid"].sum().astype(jnp.float32))}, {}


OPTIMIZER = dict(
    learning_rate=0.1, warmup_steps=2, final_rate=0.5, b1=0.8, b2=0.9, eps=1e-6, clip=3.0, ema=0.7,
    param_groups=(("b/.*", 0.0, 0.0), (".*/scale", 0.5, 0.0), (".*", 1.0, 0.1)),
)  # fmt: skip


def toy(batch_size=4, **changes):
    config = run_config(name="toy", steps=8, batch_size=batch_size, optimizer={**OPTIMIZER, **changes})
    return config, make_trainer(Toy(), config, make_mesh(devices=jax.devices()[:1]))


def toy_batches(n):
    rng = np.random.default_rng(0)
    for i in range(n):
        valid = np.array([True, i % 2 == 0, False, False])
        x, y = 2 * rng.standard_normal((4, 3)), rng.standard_normal(4)
        yield dict(x=x.astype(np.float32), y=y.astype(np.float32), valid=valid)


def by_hand(batches, decay_of_average=0.7):
    """AdamW with clipping, rates and decays of their own, and the moving average: all in numpy and float64."""
    p = {name: np.arange(1.0, 4.0) * scale for name, scale in (("w", 1.0), ("v", -0.5), ("scale", 2.0))}
    average = {k: x.copy() for k, x in p.items()}
    mu, nu = ({k: np.zeros(3) for k in p} for _ in range(2))
    multiple, decay = {"w": 1, "v": 1, "scale": 0.5}, {"w": 0.1, "v": 0.1, "scale": 0.0}
    for step, batch in enumerate(batches):
        x, y = (batch[k][batch["valid"]].astype(float) for k in ("x", "y"))
        first, second = x @ (p["w"] * p["scale"]) - y, x @ p["v"] - 1
        g = {
            "w": 2 * (2 * first[:, None] * x * p["scale"]).mean(0),  # the loss's weight is 2
            "scale": 2 * (2 * first[:, None] * x * p["w"]).mean(0),
            "v": 2 * (2 * second[:, None] * x).mean(0),
        }
        norm = math.sqrt(sum((v**2).sum() for v in g.values()))
        g = {k: v * min(1, 3.0 / norm) for k, v in g.items()}
        rate = 0.1 * step / 2 if step < 2 else 0.05 + 0.05 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 6))
        for k in p:
            mu[k] = 0.8 * mu[k] + 0.2 * g[k]
            nu[k] = 0.9 * nu[k] + 0.1 * g[k] ** 2
            adam = mu[k] / (1 - 0.8 ** (step + 1)) / (np.sqrt(nu[k] / (1 - 0.9 ** (step + 1))) + 1e-6)
            p[k] = p[k] - rate * multiple[k] * (adam + decay[k] * p[k])
            d = min(decay_of_average, (1 + step) / (10 + step))
            average[k] = d * average[k] + (1 - d) * p[k]
        yield p, average, norm, rate


def test_steps_equal_adamw_by_hand():
    _, trainer = toy()
    state, step = trainer.init(jax.random.key(0)), trainer.train_step()
    batches = list(toy_batches(8))
    norms = []
    for batch, (p, average, norm, rate) in zip(batches, by_hand(batches), strict=True):
        state, metrics = step(state, trainer.put(batch))
        for k in p:
            np.testing.assert_allclose(state.trained["a"][k], p[k], rtol=2e-5)
            np.testing.assert_allclose(state.ema["a"][k], average[k], rtol=2e-5)
        values = {k: float(v.compute()) for k, v in metrics.items()}
        assert values["norm/gradient"] == pytest.approx(norm, rel=1e-4)
        assert values["norm/parameter"] == pytest.approx(math.sqrt(sum((x**2).sum() for x in p.values())), rel=1e-4)
        assert values["learning_rate"] == pytest.approx(rate, rel=1e-5, abs=1e-9)
        norms.append(norm)
    assert min(norms) < 3 < max(norms) or min(norms) > 3  # clipping was at work
    assert int(state.step) == 8


def orthogonal(g, steps=5):
    """Newton-Schulz of one matrix (Jordan et al. 2024), in float64: nearly U Vᵀ of its singular vectors."""
    x = g / np.linalg.norm(g)
    for _ in range(steps):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def test_matrices_of_the_muon_table_take_its_direction():
    """Each layer, and the heads of a projection as one matrix; what no row names stays with AdamW."""
    rng = np.random.default_rng(0)
    shapes = {"query": (2, 6, 2, 4), "out": (2, 2, 4, 6), "head": (6, 5)}
    params = {"lm": {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}}
    config = run_config(name="muon").optimizer
    config.learning_rate, config.clip, config.table = 0.1, 0.0, ((".*", 1.0, 0.5),)
    table = rules(*config.table, names=[f"lm/{k}" for k in shapes])
    plain = optimizer.make_optimizer(config, 10, params, table)
    config.muon = ((".*/query", 1, 2), (".*/out", 2, 1))
    tx = optimizer.make_optimizer(config, 10, params, table)
    state, plain_state, momentum = tx.init(params), plain.init(params), {k: np.zeros(s) for k, s in shapes.items()}
    update, update_plain = jax.jit(tx.update), jax.jit(plain.update)
    for step in range(3):
        grads = {"lm": {k: jnp.asarray(rng.standard_normal(s), jnp.float32) for k, s in shapes.items()}}
        updates, state = update(grads, state, params)
        expected, plain_state = update_plain(grads, plain_state, params)
        np.testing.assert_allclose(updates["lm"]["head"], expected["lm"]["head"], rtol=2e-5)
        rate = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 10))
        for k, matrix in (("query", (6, 8)), ("out", (8, 6))):
            g, p = (np.asarray(x["lm"][k], float).reshape(2, *matrix) for x in (grads, params))
            m = momentum[k] = 0.95 * momentum[k] + 0.05 * np.asarray(grads["lm"][k], float)
            # Nesterov's look-ahead, both terms without the bias of the zeros at the start.
            m = 0.95 * m.reshape(2, *matrix) / (1 - 0.95 ** (step + 2)) + 0.05 * g / (1 - 0.95 ** (step + 1))
            for layer in range(2):
                x = m[layer] if matrix[0] <= matrix[1] else m[layer].T
                x = orthogonal(x) if matrix[0] <= matrix[1] else orthogonal(x).T
                whole = -rate * (0.2 * math.sqrt(8) * x + 0.5 * p[layer])
                got = np.asarray(updates["lm"][k]).reshape(2, *matrix)[layer]
                np.testing.assert_allclose(got, whole, rtol=1e-4, atol=1e-6)


def test_muon_rows_that_do_not_fit_are_refused():
    params = {"lm": {"kernel": jnp.ones((3, 4))}}
    config = run_config(name="muon").optimizer
    table = rules((".*", 1.0, 0.0), names=["lm/kernel"])
    for row, message in (
        ((".*/kernal", 1, 1), "matches no trained parameter"), ((".*", 2, 1), "has 2 axes"), (("(", 1, 1), "rows are"),
        ((".*",), "rows are"),
    ):  # fmt: skip
        config.muon = (row,)
        with pytest.raises(UserError, match=message):
            optimizer.make_optimizer(config, 10, params, table)


def test_pictures_are_resized_as_the_pipeline_resizes_them():
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    ours = np.asarray(resize(jnp.asarray(picture)[None], 48))[0].astype(int)
    assert np.abs(ours - fit(picture, 48)).max() <= 1
    np.testing.assert_array_equal(resize(jnp.asarray(picture)[None], 32)[0], picture)


def test_frozen_parameters_have_no_optimizer_state():
    _, trainer = toy()
    state, step = trainer.init(jax.random.key(0)), trainer.train_step()
    assert set(state.trained) == {"a"} and set(state.frozen) == {"b"}
    (adam,) = (s for s in state.optimizer if hasattr(s, "mu"))
    assert set(adam.mu) == set(adam.nu) == {"a"} and set(state.ema) == {"a"}
    state, _ = step(state, trainer.put(next(toy_batches(1))))
    np.testing.assert_array_equal(state.frozen["b"]["u"], np.ones(2))
    with pytest.raises(UserError, match="freezes every parameter"):
        toy(param_groups=((".*", 0.0, 0.0),))


def test_evaluation_takes_the_averaged_weights():
    _, trainer = toy()
    state, step = trainer.init(jax.random.key(0)), trainer.train_step()
    for batch in toy_batches(4):
        state, _ = step(state, trainer.put(batch))
    x, y, valid = (batch[k] for k in ("x", "y", "valid"))

    def loss(p):
        a = {k: np.asarray(v, np.float64) for k, v in p["a"].items()}
        return ((x @ (a["w"] * a["scale"]) - y) ** 2 + (x @ a["v"] - 1) ** 2)[valid].mean()

    got = float(trainer.evaluate_step()(state, trainer.put(batch))["fit"].compute())
    assert got == pytest.approx(loss(state.ema), rel=1e-4)
    assert abs(loss(state.trained) / got - 1) > 1e-2


def test_accumulation_equals_the_whole_batch():
    """Also where a part of the batch holds nothing at all, and beside an empty pool."""
    batch = next(toy_batches(1)) | {"pool": np.zeros((4, 0, 2), np.float32)}
    results = []
    for parts in (1, 2, 4):
        _, trainer = toy(grad_accum_steps=parts, warmup_steps=0)
        state, metrics = trainer.train_step()(trainer.init(jax.random.key(0)), trainer.put(batch))
        results.append((jax.device_get(state.trained), {k: float(v.compute()) for k, v in metrics.items()}))
    for trained, metrics in results[1:]:
        assert metrics == pytest.approx(results[0][1], rel=1e-5)
        for k in ("w", "v", "scale"):
            np.testing.assert_allclose(trained["a"][k], results[0][0]["a"][k], rtol=1e-5)


@pytest.mark.parametrize(
    "program, read_slots, draw_slots",
    [("text", 0, 0), ("unified", 0, 0), ("unified", 2, 0), ("unified", 0, 2), ("decoder", 0, 0)],
)
def test_every_program_takes_its_batch_in_parts(program, read_slots, draw_slots):
    """Traced for two steps, whatever its pools hold; `test_sharding.py` compares their numbers."""
    config = tiny.config(batch_size=4, model=tiny.model_settings(), optimizer=dict(grad_accum_steps=2))
    merge(config.data, dict(train={"a": {}}, read_slots=read_slots, draw_slots=draw_slots))
    if program == "text":
        config.model = dict(language_model=tiny.model_settings()["language_model"])
    config.program = "unified" if program == "text" else program
    config.optimizer.param_groups = ((".*", 1.0, 0.0),)
    trainer = make_trainer(make_program(config, 32), config, make_mesh(devices=jax.devices()[:1]))
    state, metrics = jax.eval_shape(trainer.train_step().function, trainer.abstract, trainer.abstract_batch())
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, trainer.abstract)
    assert set(trainer.program.weights) <= set(metrics) | {k for k, w in trainer.program.weights.items() if not w}


def test_averages_of_bfloat16_parameters_are_float32():
    """In bfloat16 an average would stand still: 1 + 0.001 is 1 there."""
    config = run_config(name="toy", steps=8, batch_size=4, optimizer=OPTIMIZER, param_dtype=dict(a="bfloat16"))
    trainer = make_trainer(Toy(), config, make_mesh(devices=jax.devices()[:1]))
    state, step = trainer.init(jax.random.key(0)), trainer.train_step()
    dtypes = jax.tree.map(lambda x: x.dtype, state)
    for batch in toy_batches(2):
        state, _ = step(state, trainer.put(batch))
        assert jax.tree.map(lambda x: x.dtype, state) == dtypes
    assert state.trained["a"]["w"].dtype == jnp.bfloat16 and state.ema["a"]["w"].dtype == jnp.float32
    with pytest.raises(UserError, match="param_dtype.c: the model's parts are a, b"):
        make_trainer(Toy(), run_config(batch_size=4, param_dtype=dict(c="bfloat16")), trainer.mesh)


# --- what programs are made of


def test_pixels_come_back_from_the_decoders_range():
    pixels = jnp.arange(256, dtype=jnp.uint8)
    signal_ = to_signal(pixels)
    assert (float(signal_.min()), float(signal_.max())) == (-1.0, 1.0)
    np.testing.assert_array_equal(to_pixels(signal_), pixels)
    assert to_pixels(jnp.array([-3.0, 0.0, 5.0])).tolist() == [0, 128, 255]


def test_noise_is_keyed_by_both_words_of_the_identity_and_by_its_purpose():
    ids = jnp.array([[1, 2], [2, 1], [1, 3], [0, 0], [1, 2]], jnp.uint32)
    data = [jax.random.key_data(example_keys(jax.random.key(seed), ids, purpose)).tolist()
            for seed, purpose in ((0, "flow"), (0, "feature_noise"), (1, "flow"))]  # fmt: skip
    assert all(keys[0] == keys[4] for keys in data)
    assert len({tuple(key) for keys in data for key in keys}) == 3 * 4


# --- what a run measures


def test_numbers_that_are_not_finite_are_named_with_their_steps():
    check_finite({"text": 1.0}, 0, 5)
    with pytest.raises(UserError, match="vectors, norm/gradient became infinite or NaN between steps 40 and 50"):
        check_finite({"text": 1.0, "vectors": math.nan, "norm/gradient": math.inf}, 40, 50)


def test_metrics_of_a_killed_run_go_on_where_its_checkpoint_stands(tmp_path):
    writer = Writer(tmp_path, 0, tensorboard=False)
    for step in (1, 2, 3):
        writer.scalars(step, {"train/text": 1 / step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/te')  # cut off
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3]
    Writer(tmp_path, 2, tensorboard=False).scalars(3, {"train/text": 9.0})
    assert read_metrics(tmp_path) == [
        {"step": 1, "train/text": 1.0}, {"step": 2, "train/text": 0.5}, {"step": 3, "train/text": 9.0}
    ]  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# --- configs


def test_unknown_keys_name_their_nearest_neighbour():
    for changes, message in (
        (dict(stesp=3), "config key stesp does not exist: did you mean steps?"),
        (dict(optimizer=dict(learning_rat=1)), "config key optimizer.learning_rat does not exist: did you mean learn"),
        (dict(data=dict(row_lenght=1)), "config key data.row_lenght does not exist: did you mean row_length?"),
    ):
        with pytest.raises(UserError) as error:
            run_config(**changes)
        assert str(error.value).startswith(message)
    config = run_config()
    merge(config, dict(model=dict(anything=1), data=dict(train=dict(mine=dict(kind="x"))), init_from=dict(a="b")))
    assert (config.model.anything, config.data.train.mine.kind, config.init_from.a) == (1, "x", "b")
    # Sources are replaced, not added to: what a run reads can be seen in one place.
    merge(config, dict(data=dict(train=dict(other=dict(kind="y")))))
    assert config.data.train.to_dict() == dict(other=dict(kind="y"))


def test_settings_are_checked_by_what_they_are_for():
    good = dict(image_size=8, patch_size=4, width=8, layers=1, heads=2, mlp_hidden=8)
    assert build(ViTConfig, good | dict(mean=[0, 0, 0]), "model.x").mean == (0, 0, 0)
    for settings, message in (
        (good | dict(widht=8), "config key model.x.widht does not exist: did you mean width?"),
        ({k: v for k, v in good.items() if k != "heads"}, "config key model.x.heads is missing: set it"),
        (good | dict(norm="both"), "config model.x: norm 'both' is neither 'pre' nor 'post'"),
    ):
        with pytest.raises(UserError) as error:
            build(ViTConfig, settings, "model.x")
        assert str(error.value) == message
    with pytest.raises(UserError, match="config flow: flow.times 'sometimes' is not one of uniform, logit_normal"):
        flow_config(run_config(flow=dict(times="sometimes")))


# --- whole runs


def source(task, split="train"):
    return dict(kind="shapes", task=task, num_examples=24, split=split, size=16)


def data(*tasks):
    return dict(
        tokenizer_vocabulary=300, tokenizer_examples=24, text_length=160, row_length=160, read_slots=1,
        draw_slots=1, threads=1, train={t: source(t) for t in tasks}, evaluate={t: source(t, "val") for t in tasks},
    )  # fmt: skip


def decoder(**changes):
    return tiny.config(**{
        **dict(
            name="decoder", program="decoder", steps=6, batch_size=8, model=tiny.model_settings(), data=data("pair"),
            flow=dict(drop=0.3), loss=dict(feature_noise=0.1), optimizer=dict(ema=0.9, warmup_steps=1),
            log=dict(every=1, evaluate_every=3, evaluate_batches=1, checkpoint_every=2),
        ),
        **changes,
    })  # fmt: skip


def unified(**changes):
    return tiny.config(**{
        **dict(
            name="unified", program="unified", steps=6, batch_size=8, model=tiny.model_settings(),
            data=data("question", "draw_caption"), init_from=dict(generation_encoder="decoder"),
            optimizer=dict(warmup_steps=1, param_groups=(("generation_encoder/.*", 0.0, 0.0), (".*", 1.0, 0.01))),
            log=dict(every=1, evaluate_every=3, evaluate_batches=1, checkpoint_every=2),
        ),
        **changes,
    })  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def compiled_once():
    """Runs that differ in nothing but what befalls them share a trainer, and the steps that it has compiled."""
    made = {}

    def make_once(program, config, mesh):
        key = json.dumps({**json.loads(config.to_json()), "log": None}), mesh
        if key not in made:
            made[key] = trainer = make_trainer(program, config, mesh)
            vars(trainer).update({k: functools.cache(getattr(trainer, k)) for k in ("train_step", "evaluate_step")})
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_trainer", make_once)
        yield


class Killed(BaseException):
    pass


def saved(run):
    """All arrays of the latest checkpoint, and its step."""
    step = checkpoints.finished_step(run)
    tree = ocp.PyTreeCheckpointer().restore((run / "checkpoints" / str(step) / "state").absolute())
    iterator = json.loads((run / "checkpoints" / str(step) / "iterator" / "metadata").read_text())
    leaves = {jax.tree_util.keystr(k): np.asarray(v) for k, v in jax.tree_util.tree_leaves_with_path(tree)}
    return step, leaves, iterator


def assert_same_end(run, other):
    (step, arrays, iterator), (other_step, other_arrays, other_iterator) = saved(run), saved(other)
    assert step == other_step == iterator["next_batch"] and iterator == other_iterator
    assert arrays.keys() == other_arrays.keys() and len(arrays) > 20
    for name, value in arrays.items():
        np.testing.assert_array_equal(value, other_arrays[name], err_msg=name)

    def numbers(folder):
        """By (step, kind); what a clock says is left out."""
        found = {}
        for entry in read_metrics(folder):
            clocks = ("_per_step", "_per_second", "/mfu", "step", "goodput")
            values = {k: v for k, v in entry.items() if not k.endswith(clocks) and "lost/" not in k}
            key = (entry["step"], *{k.split("/")[0] for k in values})
            assert key not in found, f"{key} is there twice"
            found[key] = values
        return found

    assert numbers(run) == numbers(other)


@pytest.fixture(scope="module")
def finished(made_once):
    """A work directory with a decoder run and a unified run that nothing has disturbed."""

    def make(workdir):
        loop.train(decoder(), workdir)
        loop.train(unified(), workdir)

    return made_once("finished", make)


@pytest.fixture
def begun(finished, tmp_path):
    """A work directory with the tokenizer of the finished one, and its decoder run to take parts from."""
    shutil.copy(finished / "tokenizer.model", tmp_path)
    return tmp_path


@pytest.mark.slow
def test_run_that_was_killed_and_resumed_ends_the_same(finished, begun, monkeypatch):
    """Killed when its fifth and sixth step are logged and not yet saved."""
    save = checkpoints.Checkpoints.save

    def die(self, step, *args):
        if step == 6:
            raise Killed
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", die)
        with pytest.raises(Killed):
            loop.train(decoder(), begun)
    assert checkpoints.finished_step(begun / "decoder") == 4
    assert max(entry["step"] for entry in read_metrics(begun / "decoder")) == 6
    with pytest.raises(UserError, match=r"decoder is not finished .4 of 6 steps.: train it first"):
        loop.train(unified(), begun)
    assert not (begun / "unified").exists()
    loop.train(decoder(), begun)
    assert_same_end(begun / "decoder", finished / "decoder")


@pytest.mark.slow
def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(finished, begun, caplog):
    """One bit, although the run was finished: it is not, and ends as it would have."""
    run = begun / "decoder"
    shutil.copytree(finished / "decoder", run)
    data = max((run / "checkpoints/6").rglob("*"), key=lambda path: path.stat().st_size)
    held = bytearray(data.read_bytes())
    held[len(held) // 2] ^= 16
    data.write_bytes(bytes(held))
    loop.train(decoder(), begun)
    assert "6 is damaged" in caplog.text and "goes on from step 4" in caplog.text
    assert_same_end(run, finished / "decoder")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["4", "6", "damaged-6"]


@pytest.mark.slow
def test_run_that_was_asked_to_stop_saves_and_goes_on(finished, begun, monkeypatch):
    """A signal at the end of the third step: the run leaves its evaluation and saves; the same command makes it up."""
    shutil.copytree(finished / "decoder", begun / "decoder")
    config = unified()
    config.log.checkpoint_every = 0

    def ask(values, first, last):
        if last == 3 and "norm/gradient" in values:  # not after the evaluation: a second signal ends it at once
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "check_finite", ask)
        with pytest.raises(KeyboardInterrupt):
            loop.train(config, begun)
    assert checkpoints.finished_step(begun / "unified") == 3
    assert not any("val/text" in entry for entry in read_metrics(begun / "unified"))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    loop.train(config, begun)
    assert_same_end(begun / "unified", finished / "unified")
    arrays = saved(finished / "unified")[1]
    assert not any("generation_encoder" in name for name in arrays)  # frozen: it is in the decoder's run


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(finished, begun, monkeypatch):
    """Stopped after four steps on eight devices in fsdp, continued on fsdp 2 × tensor 2 of four: the same run, up to
    the order in which sums are taken."""
    save = checkpoints.Checkpoints.save

    def die(self, step, *args):
        if step == 6:
            raise Killed
        save(self, step, *args)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.Checkpoints, "save", die)
        with pytest.raises(Killed):
            loop.train(decoder(), begun)
    kept = saved(begun / "decoder")[1]
    make_all = loop.make_mesh
    with monkeypatch.context() as patch:
        patch.setattr(loop, "make_mesh", lambda **sizes: make_all(**sizes, devices=jax.devices()[:4]))
        loop.train(decoder(mesh=dict(fsdp=2, tensor=2)), begun)
    step, arrays, iterator = saved(begun / "decoder")
    expected_step, expected, expected_iterator = saved(finished / "decoder")
    assert step == expected_step == 6 and iterator == expected_iterator
    assert arrays.keys() == expected.keys() == kept.keys()
    moved = [name for name in kept if np.abs(expected[name] - kept[name]).max() > 1e-4]
    assert len(moved) > 20, "the last two steps change too little to tell"
    for name, value in expected.items():
        np.testing.assert_allclose(arrays[name], value, rtol=1e-3, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_finished_runs_are_left_alone(finished, capsys):
    before = {p: p.stat().st_mtime_ns for p in finished.rglob("*")}
    loop.train(decoder(log=dict(every=3)), finished)  # how often it logs is free to change
    assert "decoder: finished already (6 steps)" in capsys.readouterr().out
    for config, key in ((decoder(steps=7), "steps"), (decoder(optimizer=dict(b1=0.5)), "optimizer.")):
        with pytest.raises(UserError, match=f"holds a run with another config .*{key}"):
            loop.train(config, finished)
    assert {p: p.stat().st_mtime_ns for p in finished.rglob("*")} == before


@pytest.mark.slow
def test_parts_come_from_where_they_were_trained(finished):
    arrays = saved(finished / "decoder")[1]
    part = optimizer.flatten(checkpoints.load_part(finished, "decoder", "decoder"))
    for name, value in part.items():
        path = "".join(f"['{key}']" for key in ("average", "decoder", *name.split("/")))
        np.testing.assert_array_equal(value, arrays[path])
    # The unified run froze its generation encoder: it still is the decoder run's.
    through, direct = (
        optimizer.flatten(checkpoints.load_part(finished, run, "generation_encoder")) for run in ("unified", "decoder")
    )
    assert through.keys() == direct.keys()
    for name in direct:
        np.testing.assert_array_equal(through[name], direct[name])
    with pytest.raises(UserError, match="has no part 'text_tower'"):
        checkpoints.load_part(finished, "unified", "text_tower")
    with pytest.raises(UserError, match="nowhere is not a run: give the --workdir of a finished training"):
        checkpoints.load_part(finished, "nowhere", "decoder")


def files(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*"))


def test_encoders_are_pretrained_alone_as_together():
    """The losses of one encoder, from its share of the parameters of both."""

    def program(*left_out, words=0.3):
        model = {k: v for k, v in tiny.model_settings().items() if k not in left_out}
        loss = dict(words=words)
        return make_program(tiny.config(program="pretrain", batch_size=4, model=model, loss=loss), 32)

    rng = np.random.default_rng(0)
    length = np.array([3, 64, 9, 20])[:, None]
    batch = dict(
        image=rng.integers(0, 256, (4, 16, 16, 3), np.uint8), tokens=rng.integers(0, 32, (4, 64)),
        text_mask=np.arange(64) < length, id=rng.integers(0, 99, (4, 2)).astype(np.uint32), valid=np.arange(4) != 1,
    )  # fmt: skip
    params = meta.unbox(jax.jit(program().init)(jax.random.key(0)))
    together = jax.jit(program().losses)(params, batch, jax.random.key(1))[0]
    shares = {
        "understanding": ({"contrastive_understanding", "words"}, program("generation_encoder", "decoder"), 0),
        "generation": ({"contrastive_generation", "reconstruction"}, program("understanding_encoder", words=0.0), 1),
    }
    for name, (losses, alone, place) in shares.items():
        heads = {k: params["contrastive"][k] for k in ("text", name)}
        heads |= {k: v[place : place + 1] for k, v in params["contrastive"].items() if k in ("log_scale", "bias")}
        shapes = meta.unbox(jax.eval_shape(alone.init, jax.random.key(0)))
        own = {k: heads if k == "contrastive" else params[k] for k in shapes}
        assert jax.tree.map(jnp.shape, own) == jax.tree.map(jnp.shape, shapes)
        got = jax.jit(alone.losses)(own, batch, jax.random.key(1))[0]
        assert set(got) == set(alone.weights) == losses
        for loss, average in got.items():
            assert float(average.compute()) == pytest.approx(float(together[loss].compute()), rel=1e-6), loss
    with pytest.raises(UserError, match="give model.understanding_encoder, model.generation_encoder"):
        program("understanding_encoder", "generation_encoder", "decoder")
    with pytest.raises(UserError, match="loss.words trains model.understanding_encoder"):
        program("understanding_encoder")
    with pytest.raises(UserError, match="run run draws nothing: set it to 0"):
        config = tiny.config(program="pretrain", model=tiny.model_settings(), log=dict(samples_every=5))
        make_sampler(config, None, None, program("generation_encoder", "decoder"))


@pytest.mark.slow
def test_refusals_leave_no_run_behind(finished, begun):
    shutil.copytree(finished / "decoder", begun / "decoder")
    (begun / "foreign").mkdir()
    (begun / "foreign" / "notes.txt").write_text("mine")
    before = files(begun)
    other = tiny.model_settings()
    other["generation_encoder"]["width"] = 8
    with_encoder = dict(generation_encoder="decoder")
    for config, message in (
        (unified(name="foreign"), "holds files that are not a run: choose another --workdir"),
        (unified(init_from={}), "part generation_encoder is frozen and starts from random numbers: name the run"),
        (unified(init_from=dict(generation_encoder="stage9")), "stage9 is not a run"),
        (unified(init_from=dict(**with_encoder, texttower="decoder")), "init_from.texttower: the model's parts are"),
        (unified(model=other), r"decoder does not fit model.generation_encoder: .*\(16,\) for \(8,\)"),
        (unified(program="unify"), "'unify' is none of pretrain, decoder, unified"),
        (unified(model={}), "model.language_model is missing: program 'unified' needs that part"),
        (unified(mesh=dict(tensor=3)), "there are 8: try data=1,fsdp=8,tensor=1"),
        (unified(batch_size=6), "batch_size 6 must be a multiple of 8"),
        (unified(data=data()), "data.train names no source"),
        (
            decoder(name="d2", program="pretrain", optimizer=dict(grad_accum_steps=2)),
            "grad_accum_steps must be 1 in program pretr",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            loop.train(config, begun)
        assert "\n" not in str(error.value)
        assert files(begun) == before


@pytest.mark.slow
def test_full_disk_is_said_and_nothing_is_half_written(finished, begun, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(100, 99, 1))
        with pytest.raises(UserError, match="0.00 GiB free and a checkpoint takes .* free some space"):
            loop.train(decoder(), begun)
    assert files(begun / "decoder" / "checkpoints") == []
    loop.train(decoder(), begun)
    assert_same_end(begun / "decoder", finished / "decoder")


@pytest.mark.slow
def test_what_is_not_finite_never_replaces_a_good_checkpoint(begun):
    """The first step has a rate of zero and is saved; the second leaves float32, and is logged much later."""
    config = decoder(
        optimizer=dict(learning_rate=1e25, warmup_steps=2), log=dict(every=100, checkpoint_every=1, keep=1)
    )
    with pytest.raises(UserError, match=r"norm/\w+.* became infinite or NaN between steps 0 and 2: lower"):
        loop.train(config, begun)
    step, arrays, _ = saved(begun / "decoder")
    assert step == 1
    for name, value in arrays.items():
        assert np.isfinite(value).all(), name


@pytest.mark.slow
def test_losses_fall_and_all_is_measured(finished):
    """Six steps are enough for the text and the vectors to become less of a surprise."""
    entries = read_metrics(finished / "unified")
    train = [e for e in entries if "train/text" in e]
    assert [e["step"] for e in train] == [1, 2, 3, 4, 5, 6]
    assert train[-1]["train/text"] < train[0]["train/text"] < 1.2 * math.log(300)
    for name in ("vectors", "norm/gradient", "norm/parameter", "norm/update", "learning_rate", "seconds_per_step",
                 "examples_per_second", "mfu", "text/question", "vectors/draw_caption"):  # fmt: skip
        assert math.isfinite(train[0][f"train/{name}"]), name
    assert [e["step"] for e in entries if "val/text" in e] == [3, 6]
    assert "val/vectors" in entries[-1] and (finished / "unified" / "parameters.txt").read_text()


def test_abstract_state_is_what_is_made():
    """Shapes are known before anything is allocated."""
    _, trainer = toy()
    state = trainer.init(jax.random.key(0))
    same = jax.tree.map(lambda a, b: a.shape == b.shape and a.dtype == b.dtype, state, trainer.abstract)
    assert all(jax.tree.leaves(same))
    assert nn.unbox(trainer.program.init(jax.random.key(0)))["b"].keys() == state.frozen["b"].keys()
