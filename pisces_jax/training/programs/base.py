"""What a program is: everything that the rest of the package must know of an objective.

Loop, state, checkpoints, data commands and planner ask a program and know nothing else of it, so a new objective is one
new file beside this one and a line in `PROGRAMS`. Parameters are a dict from part to tree.
"""

import abc
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from clu.metrics import Average
from jaxtyping import Array
from ml_collections import ConfigDict

from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.losses import objectives

Params = Mapping[str, Any]
Batch = Mapping[str, Array]
Spec = dict[str, jax.ShapeDtypeStruct]
Losses = tuple[dict[str, Average], dict[str, Average]]
PURPOSES = ("flow", "feature_noise", "true_vectors", "vectors", "fed_noise")


@dataclasses.dataclass(frozen=True)
class CachedInput:
    """What is kept of every picture in its place: what `part` makes of it, in `folder` below that of `data.features`;
    `depends_on` names what the result depends on besides the part's weights and settings."""

    part: str
    folder: str
    depends_on: Mapping[str, Any]


class Program(abc.ABC):
    """An objective: its parts, batch, dataset, losses, FLOPs and sample pictures.

    Attributes:
        weights: the weight of each loss in the objective.
        divisible: whether a batch may be taken in gradient-accumulation steps; not where a loss compares its examples
            with one another.
        targets: parts whose output is what is predicted: they run forward once and take no gradient, trained or not.
        samples: which sample pictures `log.samples_every` makes (`inference/samples.py`): drawn from held-out prompts,
            reconstructed through the decoder, or none.
        draws_only: cached features are of drawn pictures alone; else of every example's picture.
    """

    weights: Mapping[str, float]
    divisible: ClassVar[bool] = True
    targets: ClassVar[tuple[str, ...]] = ()
    draws_only: ClassVar[bool] = False

    @property
    def samples(self) -> Literal["drawings", "reconstructions"] | None:
        return None

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config: ConfigDict, vocab_size: int) -> Self:
        """
        Raises:
            UserError: settings that are missing or do not fit together.
        """

    @classmethod
    @abc.abstractmethod
    def parts(cls, config: ConfigDict) -> tuple[str, ...]:
        """The parts of the trained model that a run of this config has, and that `convert export` writes."""

    @classmethod
    def cached_inputs(cls, config: ConfigDict) -> dict[str, CachedInput]:
        """By the name of the batch's array: what `python -m pisces_jax.cache` keeps of the pictures of this config."""
        return {}

    @classmethod
    def reads_and_draws(cls, config: ConfigDict) -> bool:
        """Whether a run of this config is a model that answers and draws (`inference.model.load_model`)."""
        return False

    @abc.abstractmethod
    def init(self, key: jax.Array) -> dict[str, Any]:
        """Boxed parameters by part."""

    @property
    def measured(self) -> tuple[str, ...]:
        """Parts that hold statistics of the data, never trained: a run takes them from `init_from`, or measures them
        before its first step (`measure`)."""
        return ()

    def measure(self, params: Params, batches: Iterable[Batch]) -> dict[str, Any]:
        """The parts `measured`, as host arrays, from a few batches and the parts that the run starts from.

        Raises:
            UserError: the batches hold nothing to measure.
        """
        raise NotImplementedError

    @abc.abstractmethod
    def batch_spec(self, config: ConfigDict) -> Spec:
        """Shape and dtype of every array of the global batch; the leading axis is sharded over the mesh's batch axes.

        The dataset makes such batches, `plan` compiles for them, and the loop checks them on arrival.

        Raises:
            UserError: a batch size that does not fit.
        """

    def batch_items(self, config: ConfigDict) -> int:
        """Length of the leading axis of a global batch."""
        return next(iter(self.batch_spec(config).values())).shape[0]

    @abc.abstractmethod
    def dataset(
        self, config: ConfigDict, entries: Sequence[Entry], tokenizer: Tokenizer, caches: Mapping[str, Any], **how: Any
    ) -> Any:
        """The items of a batch by number (`data.packing`): `PackedGroups` or `Pairs`.

        Args:
            caches: the cached inputs to read in place of pictures, by their names in `cached_inputs`.
            how: what both take: `examples_per_epoch`, `shuffle`, `folder`, `scaled_jpeg`, `max_broken`.
        """

    @abc.abstractmethod
    def counts(self, batch: Batch) -> dict[str, Array]:
        """How many items each loss is over in this batch: from the batch alone, before anything is computed."""

    @abc.abstractmethod
    def losses(self, params: Params, batch: Batch, key: jax.Array) -> Losses:
        """The losses (names as in `weights`), and further averages to report."""

    @abc.abstractmethod
    def forward_flops(self, spec: Spec) -> dict[str, float]:
        """Model FLOPs of one forward pass over a global batch, by part (`training.flops`)."""

    def block_positions(self, config: ConfigDict) -> dict[str, tuple[Any, int]]:
        """By part that is rematerialised: its settings, and how many positions its blocks see in a global batch.

        For the planner's formula of saved activations; parts that are left out are not estimated.
        """
        return {}

    @staticmethod
    def examples(batch: Mapping[str, np.ndarray]) -> int:
        """How many examples a batch of this process holds."""
        return int(batch["valid"].sum())


def check_batch(spec: Spec, batch: Mapping[str, np.ndarray], parts: int) -> None:
    """Holds a process's share of a batch, one of `parts` equal ones, against the program's specification.

    Raises:
        ValueError: an array that is missing, surplus, or of another shape or dtype: an error of the dataset's code.
    """
    wanted = {k: ((s.shape[0] // parts, *s.shape[1:]), jnp.dtype(s.dtype)) for k, s in spec.items()}
    got = {k: (v.shape, jnp.dtype(v.dtype)) for k, v in batch.items()}
    if wrong := {k: (got.get(k), wanted.get(k)) for k in {*wanted, *got} if got.get(k) != wanted.get(k)}:
        raise ValueError(f"the batch is not as its program specifies (name: got, specified): {wrong}")


def example_keys(key: jax.Array, ids: Array, purpose: str) -> Array:
    """One random key per example: ids uint32 [B, 2] -> keys [B].

    Noise comes from (seed, the example's identity, purpose): neither packing, nor the place in the batch, nor gradient
    accumulation changes it.
    """
    key = jax.random.fold_in(key, PURPOSES.index(purpose))
    return jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, i[0]), i[1]))(ids)


def by_source(values: Array, mask: Array, source: Array, names: tuple[str, ...], prefix: str) -> dict[str, Average]:
    """The average over each source of the mixture."""
    return {f"{prefix}/{name}": objectives.masked_average(values, mask & (source == i)) for i, name in enumerate(names)}
