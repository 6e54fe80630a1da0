"""Where every parameter lies: for golden files, and for the notebook that draws it. Needs no devices at all."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.planning.compiled import VOCABULARY
from pisces_jax.sharding import abstract_mesh, spec_axes
from pisces_jax.training.optimizer import flatten
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import Trainer, make_trainer


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter on a mesh: `axes` has the mesh axes of each dimension, `bytes` are those of one device."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    trained: bool
    axes: tuple[tuple[str, ...], ...]
    bytes: int

    @property
    def part(self) -> str:
        return self.name.partition("/")[0]

    def __str__(self) -> str:
        where = ", ".join("+".join(axes) or "-" for axes in self.axes)
        kind = "trained" if self.trained else "frozen"
        return f"{self.name} {'x'.join(map(str, self.shape))} {self.dtype} {kind} [{where}]"


def trainer_without_devices(config: ConfigDict, mesh: Mapping[str, int], vocab_size: int = 0) -> Trainer:
    """A run's trainer on a mesh of those sizes that has no devices: shapes and shardings can be asked for.

    Raises:
        UserError: as `training.step.make_trainer`.
    """
    program = make_program(config, vocab_size or config.data.tokenizer_vocabulary or VOCABULARY)
    return make_trainer(program, config, abstract_mesh(**mesh))


def parameters(trainer: Trainer) -> list[Parameter]:
    """All parameters, by name."""
    found = []
    for tree, shardings, trained in (
        (trainer.abstract.trained, trainer.shardings.trained, True),
        (trainer.abstract.frozen, trainer.shardings.frozen, False),
    ):
        where = flatten(shardings)
        for name, leaf in flatten(tree).items():
            axes = tuple(spec_axes(where[name].spec, d) for d in range(len(leaf.shape)))
            shards = math.prod(trainer.mesh.shape[a] for d in axes for a in d)
            size = math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize // shards
            found.append(Parameter(name, tuple(leaf.shape), str(leaf.dtype), trained, axes, size))
    return sorted(found, key=lambda p: p.name)


def describe(trainer: Trainer) -> str:
    """A line for every parameter, then one for every dimension that does not divide: what the golden files hold."""
    lines = [str(p) for p in parameters(trainer)]
    count = sum(math.prod(x.shape) for x in jax.tree.leaves((trainer.abstract.trained, trainer.abstract.frozen)))
    return "\n".join([*lines, *(f"does not divide: {f}" for f in trainer.fallbacks), f"{count} parameters"])
