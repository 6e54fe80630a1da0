"""The state of a run and the two compiled functions over it: one step of training, one batch of evaluation."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from clu.metrics import Average
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from pisces_jax.models.lora import adapted
from pisces_jax.sharding import Fallback, batch_sharding, batch_shards, param_shardings
from pisces_jax.training import optimizer
from pisces_jax.training.programs.base import Batch, Program
from pisces_jax.utils.errors import UserError

Metrics = dict[str, Average]
SKIPPED = "skipped/"  # metrics of this prefix: for each loss and the gradient's norm, whether it was not finite


@flax.struct.dataclass
class State:
    """Everything that a run changes, and its frozen parts; trees by part.

    `ema` is the moving average of `trained` in float32, empty where the config asks for none.
    """

    step: Any  # int32 []
    trained: Any
    ema: Any
    optimizer: Any
    frozen: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """A jitted function of a state and a batch, run or lowered with its mesh in force."""

    function: Any
    mesh: Mesh

    def __call__(self, state: State, batch: Batch) -> Any:
        with jax.set_mesh(self.mesh):
            return self.function(state, batch)

    def lower(self, state: State, batch: Mapping[str, Any]) -> jax.stages.Lowered:
        with jax.set_mesh(self.mesh):
            return self.function.lower(state, batch)


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A program on a mesh: how its state is laid out there, and the functions that advance it."""

    program: Program
    config: ConfigDict
    mesh: Mesh
    rules: Mapping[str, optimizer.Rule]
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    abstract: State
    shardings: State
    fallbacks: tuple[Fallback, ...]
    items: int  # along the leading axis of the global batch

    def init(self, key: jax.Array, parts: Mapping[str, Any] | None = None) -> State:
        """A new state, made in place on the mesh; `parts` replaces the random start of whole parts."""
        parts = dict(parts or {})

        def create(key: jax.Array, given: Any) -> State:
            params = {**nn.unbox(self.program.init(key)), **given}
            return _fresh(params, self.rules, self.optimizer, self.config)

        given_shardings = {k: optimizer.join(self.shardings.trained, self.shardings.frozen)[k] for k in parts}
        parts = jax.device_put(parts, given_shardings)
        with jax.set_mesh(self.mesh):
            # The given parts are donated, so that there is no second copy of them.
            return jax.jit(create, out_shardings=self.shardings, donate_argnums=1)(key, parts)

    def on_mesh(self) -> State:
        """`abstract` with the shardings of its arrays."""
        return jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), self.abstract, self.shardings
        )

    def frozen(self, key: jax.Array, given: Mapping[str, Any]) -> Any:
        """The frozen parts that `init` would make of the same key: the parameters that are given, else random ones."""
        flat = optimizer.flatten(given)
        shardings = {k: s for k, s in optimizer.flatten(self.shardings.frozen).items() if k not in flat}

        def create(key: jax.Array) -> Any:
            params = optimizer.flatten(nn.unbox(self.program.init(key)))
            return {k: params[k].astype(self.config.param_dtype.get(k.split("/")[0], "float32")) for k in shardings}

        if shardings:
            with jax.set_mesh(self.mesh):
                flat |= jax.jit(create, out_shardings=shardings)(key)
        return optimizer.unflatten(flat)

    def put(self, batch: Mapping[str, Any]) -> Batch:
        """This process's share of a batch, on the mesh."""
        sharding, size, make = batch_sharding(self.mesh), self.items, jax.make_array_from_process_local_data
        # The copy that the training loop's transfer guard is to let through (JAX takes it for an implicit one).
        with jax.transfer_guard_host_to_device("allow"):
            return {k: make(sharding, v, (size, *v.shape[1:])) for k, v in batch.items()}

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch without its numbers, as it lies on the mesh."""
        sharding = batch_sharding(self.mesh)
        spec = self.program.batch_spec(self.config)
        return {name: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for name, s in spec.items()}

    def train_step(self) -> Step:
        """(state, batch) -> (state, metrics); the state is donated."""
        return self._jit(self._train, donate_argnums=0, out=(self.shardings, None))

    def evaluate_step(self) -> Step:
        """(state, batch) -> losses, with the averaged weights where there are any."""
        return self._jit(self._evaluate, out=None)

    def forward(self, state: State, batch: Batch) -> Metrics:
        """The losses of a batch with the weights that train, traced anew (`find_nan`)."""
        counts = self.program.counts(batch)
        return jax.jit(lambda s, b: self._objective(s.trained, s.frozen, b, counts)[1])(state, batch)

    def gradient(self, state: State, batch: Batch) -> Any:
        """The gradient of a batch, as the step takes it."""
        return jax.jit(lambda s, b: self._gradient(s, b)[0], out_shardings=self.shardings.trained)(state, batch)

    def _jit(self, function: Any, out: Any, **kwargs: Any) -> Step:
        replicated = NamedSharding(self.mesh, PartitionSpec())
        out = jax.tree.map(lambda s: replicated if s is None else s, out, is_leaf=lambda s: s is None)
        plain = self.config.plain_products
        compiled = jax.jit(
            function, in_shardings=(self.shardings, batch_sharding(self.mesh)), out_shardings=out,
            compiler_options=_plain_products(self.mesh.devices.flat[0].platform) if plain else None,
            **kwargs,
        )  # fmt: skip

        return Step(compiled, self.mesh)

    @property
    def _key(self) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), 1)

    def _objective(
        self, trained: Any, frozen: Any, batch: Batch, counts: Mapping[str, Array]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Σ_k weight_k · total_k / count_k; the counts are the whole batch's, also in a gradient-accumulation step."""
        losses, reported = self.program.losses(optimizer.join(trained, frozen), batch, self._key)
        weights = self.program.weights
        loss = sum(weights[k] * losses[k].total / jnp.maximum(counts[k], 1) for k in weights if weights[k])
        return jnp.asarray(loss), {**losses, **reported}

    def _gradient(self, state: State, batch: Batch) -> tuple[Any, Metrics]:
        counts = self.program.counts(batch)
        gradient = jax.grad(self._objective, has_aux=True)
        steps = self.config.optimizer.grad_accum_steps
        trained = state.trained
        if self.config.optimizer.grad_dtype:
            # Gradients have the dtype of what they are taken of; sums over steps and the optimizer are in the masters'.
            trained = jax.tree.map(lambda p: p.astype(self.config.optimizer.grad_dtype), trained)
        if steps == 1:
            gradients, metrics = gradient(trained, state.frozen, batch, counts)
            return jax.tree.map(lambda g, p: g.astype(p.dtype), gradients, state.trained), metrics

        # Each step takes every steps-th element, so that its part lies on the devices as the whole batch does.
        micro = {k: v.reshape(v.shape[0] // steps, steps, *v.shape[1:]).swapaxes(0, 1) for k, v in batch.items()}

        def add(total: Any, part: Batch) -> tuple[Any, None]:
            more = gradient(trained, state.frozen, part, counts)
            return jax.tree.map(lambda t, x: t + x.astype(t.dtype), total, more), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = state.trained, jax.eval_shape(gradient, trained, state.frozen, first, counts)[1]
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        return jax.lax.scan(add, zeros, micro)[0]

    def _train(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        """One update. Where a loss or the gradient is not finite, the state stays as it was, bit for bit and its step
        too, and the metrics say so (`SKIPPED`) and nothing else.
        """
        gradients, metrics = self._gradient(state, batch)
        with jax.named_scope("optimizer"):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(self.config.seed), 2), state.step)
            rounding = self.config.optimizer.rounding
            trained, opt, updates = optimizer.update(
                self.optimizer, rounding, gradients, state.optimizer, state.trained, key
            )
            decay = self.config.optimizer.ema
            # The first steps average over less than 1/(1 - decay) steps, to forget the random start.
            decay = jnp.minimum(decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, state.ema, trained if state.ema else {})
        for name, tree in (("gradient", gradients), ("parameter", trained), ("update", updates)):
            metrics[f"norm/{name}"] = _value(optax.global_norm(tree))
        metrics["learning_rate"] = _value(self.schedule(state.step))

        # All of these are sums over the whole batch already: no further collective.
        decisive = [*(k for k, weight in self.program.weights.items() if weight), "norm/gradient"]
        finite = {k: jnp.isfinite(metrics[k].total) for k in decisive}
        good = jnp.stack(list(finite.values())).all()
        before = state.step, state.trained, state.ema, state.optimizer
        after = state.step + 1, trained, ema, opt
        step, trained, ema, opt = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, before)
        metrics = jax.tree.map(lambda x: jnp.where(good, x, 0), metrics)  # averages of nothing
        metrics |= {f"{SKIPPED}{k}": _value(~ok) for k, ok in finite.items()}
        return dataclasses.replace(state, step=step, trained=trained, ema=ema, optimizer=opt), metrics

    def _evaluate(self, state: State, batch: Batch) -> Metrics:
        trained = state.ema if state.ema else state.trained
        return self._objective(trained, state.frozen, batch, self.program.counts(batch))[1]


@functools.cache
def _plain_products(platform: str) -> dict[str, str] | None:
    """The compiler option behind config key `plain_products`; None where the compiler does not know it."""
    if platform != "cpu":
        return None
    options = {"xla_cpu_experimental_ynn_fusion_type": ""}
    try:
        jax.jit(lambda: jnp.zeros(()), compiler_options=options).lower().compile()
    except jax.errors.JaxRuntimeError:
        return None
    return options


def _masked(x: Any) -> bool:
    """Whether x stands in an optimizer's state for a parameter that another optimizer updates."""
    return isinstance(x, optax.MaskedNode)


def _value(x: Any) -> Average:
    return Average(total=jnp.asarray(x, jnp.float32), count=jnp.ones((), jnp.float32))


def _fresh(params: Any, rules: Any, tx: optax.GradientTransformation, config: ConfigDict) -> State:
    flat = optimizer.flatten(params)
    stored = {k: v.astype(config.param_dtype.get(k.split("/")[0], "float32")) for k, v in flat.items()}
    trained, frozen = optimizer.split(optimizer.unflatten(stored), rules)
    # In float32 whatever the parameters' dtype: what a step adds to the average is small.
    ema = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained) if config.optimizer.ema else {}
    return State(jnp.zeros((), jnp.int32), trained, ema, tx.init(trained), frozen)


def make_trainer(program: Program, config: ConfigDict, mesh: Any) -> Trainer:
    """Shapes first, then shardings from shapes; nothing is allocated. An abstract mesh is enough for that.

    Raises:
        UserError: parameter groups, dtypes or a batch size that do not fit the model or the mesh.
    """
    boxed = jax.eval_shape(program.init, jax.random.key(0))
    fallbacks: list[Fallback] = []
    shardings = param_shardings(boxed, mesh, fallbacks)
    params = nn.unbox(boxed)
    for part in config.param_dtype:
        if part not in params:
            raise UserError(f"config key param_dtype.{part}: the model's parts are {', '.join(params)}")
    rules = optimizer.match(optimizer.read_table(config.optimizer.param_groups), list(optimizer.flatten(params)))
    rules |= {k: dataclasses.replace(r, multiple=0.0) for k, r in rules.items() if k.split("/")[0] in program.measured}
    for matrix in adapted(rules).values():
        if rules[matrix].multiple:
            raise UserError(
                f"model.lora adapts {matrix}, which trains too: freeze it with a row ('language_model/.*', 0.0, 0.0) "
                "at the start of optimizer.param_groups"
            )
    trained, _ = optimizer.split(params, rules)
    if not trained:
        raise UserError("optimizer.param_groups freezes every parameter: leave some with a multiple above 0")
    items = program.batch_items(config)
    shards = batch_shards(mesh) * config.optimizer.grad_accum_steps
    if items % shards:
        raise UserError(
            f"batch_size {config.batch_size} must be a multiple of {config.batch_size // items * shards} "
            f"(mesh shards {batch_shards(mesh)} × optimizer.grad_accum_steps {config.optimizer.grad_accum_steps}"
            f"{f' × data.rows_per_pool {config.batch_size // items}' if config.batch_size > items else ''})"
        )
    tx = optimizer.make_optimizer(config.optimizer, config.steps, trained, rules)
    abstract = jax.eval_shape(lambda p: _fresh(p, rules, tx, config), params)
    trained_shardings, frozen_shardings = optimizer.split(shardings, rules)
    replicated = NamedSharding(mesh, PartitionSpec())
    state_shardings = State(
        step=replicated,
        trained=trained_shardings,
        ema=trained_shardings if abstract.ema else {},
        optimizer=optax.tree_map_params(
            tx,
            lambda x, s: x if _masked(x) else s,
            abstract.optimizer,
            trained_shardings,
            transform_non_params=lambda _: replicated,
            is_leaf=_masked,
        ),  # fmt: skip
        frozen=frozen_shardings,
    )
    schedule = optimizer.learning_rate(config.optimizer, config.steps)
    return Trainer(program, config, mesh, rules, tx, schedule, abstract, state_shardings, tuple(fallbacks), items)
