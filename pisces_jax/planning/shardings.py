"""Where every parameter lies on a mesh, for the golden files and the notebook. It needs no devices."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
from ml_collections import ConfigDict

from pisces_jax.planning.compiled import planned_program
from pisces_jax.planning.roofline import count
from pisces_jax.sharding import abstract_mesh, spec_axes
from pisces_jax.training.optimizer import flatten
from pisces_jax.training.step import Trainer, make_trainer


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter on a mesh: the mesh axes of each dimension, and its bytes per device."""

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
    """A run's trainer on a mesh of those sizes that has no devices: shapes and shardings alone.

    Raises:
        UserError: as `training.step.make_trainer`.
    """
    return make_trainer(planned_program(config, vocab_size), config, abstract_mesh(**mesh))


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
    """The text of the golden files: a line per parameter, then one per dimension that does not divide."""
    lines = [str(p) for p in parameters(trainer)]
    lines += [f"does not divide: {f}" for f in trainer.fallbacks]
    return "\n".join([*lines, f"{count((trainer.abstract.trained, trainer.abstract.frozen))} parameters"])
