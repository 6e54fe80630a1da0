"""A judge that is not the model: a classifier of a set's true pictures, trained once and kept in a folder.

It learns every label field of the set with a head of its own, from pictures alone. `evaluation/judging.py` asks it what
a drawn picture shows.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float32, Int32, UInt8
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors
from tqdm import tqdm

from pisces_jax.evaluation import labelled
from pisces_jax.evaluation.labelled import Classes
from pisces_jax.models.classifier import Classifier, ClassifierConfig
from pisces_jax.models.layers import apply
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic

VERSION = 1  # of what is trained: another one trains anew
BATCH = 256  # pictures that it looks at in one go


@dataclasses.dataclass(frozen=True)
class JudgeSettings:
    """How the judge is trained. The defaults take a few minutes on two CPU cores for a set of ten thousand or more.

    Attributes:
        size: side of the pictures in pixels.
        flip: whether pictures may be mirrored, which labels such as "left arrow" do not allow.
        shift: how far pictures are moved, as a share of their side.
        seen: pictures that are seen in training, repeated ones included.
        passes: over the set, at most; small sets are done sooner.
        smoothing: of the labels.
    """

    size: int
    flip: bool = False
    shift: float = 0.125
    widths: tuple[int, ...] = ClassifierConfig.widths
    blocks: int = ClassifierConfig.blocks
    features: int = ClassifierConfig.features
    seen: int = 250_000
    passes: int = 40
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    smoothing: float = 0.1
    seed: int = 0

    def network(self, classes: Classes) -> Classifier:
        sizes = tuple(len(values) for values in classes.values())
        return Classifier(ClassifierConfig(sizes, self.widths, self.blocks, self.features))


class Seen(NamedTuple):
    """What the judge sees in N pictures.

    Attributes:
        features: the vectors before its heads.
        rank: of the asked class, per field: how many classes it finds likelier.
        said: the likeliest class of each field.
    """

    features: Float32[np.ndarray, "N D"]
    rank: Int32[np.ndarray, "N F"]
    said: Int32[np.ndarray, "N F"]


@dataclasses.dataclass(frozen=True)
class Judge:
    """A trained classifier: the values of each field that it knows, and how many pictures it was trained on."""

    settings: JudgeSettings
    classes: Classes
    params: Any
    pictures: int

    def look(self, images: UInt8[np.ndarray, "N S S 3"], asked: Int32[np.ndarray, "N F"]) -> Seen:
        """What it sees in pictures that were asked to show these classes."""
        network = self.settings.network(self.classes)
        parts = []
        for first in range(0, len(images), BATCH):
            some, wanted = (x[first : first + BATCH] for x in (images, asked))
            padding = [(0, BATCH - len(some))]
            padded = np.pad(some, padding + [(0, 0)] * 3), np.pad(wanted, [*padding, (0, 0)])
            parts.append([np.asarray(x)[: len(some)] for x in _look(network, self.params, *padded)])
        return Seen(*map(np.concatenate, zip(*parts, strict=True)))


@functools.partial(jax.jit, static_argnums=0)
def _look(network: Classifier, params: Any, images: Array, asked: Array) -> tuple[Array, Array, Array]:
    features, logits = apply(network, params, images)
    # Not "larger than": of logits that are no numbers none would be, and every picture would be right.
    rank = [(~(x <= x[jnp.arange(len(x)), a][:, None])).sum(1) for x, a in zip(logits, asked.T, strict=True)]
    return features, jnp.stack(rank, 1).astype(jnp.int32), jnp.stack([x.argmax(1) for x in logits], 1).astype(jnp.int32)


def train(
    images: UInt8[np.ndarray, "N S S 3"], labels: Int32[np.ndarray, "N F"], classes: Classes, settings: JudgeSettings
) -> Judge:
    """Trains a judge: AdamW on the mean cross-entropy of all heads, with pictures moved (and mirrored) at random."""
    network = settings.network(classes)
    key = jax.random.key(settings.seed)
    steps = max(1, min(settings.seen, settings.passes * len(images)) // settings.batch_size)
    rate = optax.warmup_cosine_decay_schedule(0.0, settings.learning_rate, max(1, steps // 20), steps + 1)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(rate, b2=0.98, weight_decay=settings.weight_decay, mask=_matrices)
    )
    params = nn.unbox(jax.jit(network.init)(key, images[:1])["params"])

    def loss(params: Any, x: Array, y: Array) -> Array:
        _, logits = apply(network, params, x)
        losses = []
        for head, wanted in zip(logits, y.T, strict=True):
            target = optax.smooth_labels(jax.nn.one_hot(wanted, head.shape[1]), settings.smoothing)
            losses.append(optax.softmax_cross_entropy(head, target).mean())
        return sum(losses) / len(losses)

    @jax.jit
    def step(params: Any, state: Any, number: Array, x: Array, y: Array) -> tuple[Any, Any]:
        x = moved(jax.random.fold_in(key, number), x, settings.shift, settings.flip)
        gradient = jax.grad(loss)(params, x, y)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.jit(optimizer.init)(params)
    chosen = _order(len(images), steps * settings.batch_size, settings.seed).reshape(steps, -1)
    for number, some in enumerate(tqdm(chosen, desc="judge", unit="step", leave=False, delay=3.0, mininterval=1.0)):
        params, state = step(params, state, jnp.int32(number), images[some], labels[some])
    params = jax.device_get(params)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves(params)):
        raise FloatingPointError(f"the training of the judge diverged with {settings}")
    return Judge(settings, classes, params, len(images))


def moved(key: Array, images: Array, shift: float, flip: bool) -> Array:
    """Each picture moved by up to `shift` of its side, with its border repeated, and with `flip` mirrored or not."""
    size = images.shape[1]
    by = round(shift * size)
    padded = jnp.pad(images, ((0, 0), (by, by), (by, by), (0, 0)), mode="edge")
    to, mirror = jax.random.split(key)
    places = jax.random.randint(to, (len(images), 2), 0, 2 * by + 1)
    cut = jax.vmap(lambda x, at: jax.lax.dynamic_slice(x, (at[0], at[1], 0), (size, size, 3)))(padded, places)
    if not flip:
        return cut
    return jnp.where(jax.random.bernoulli(mirror, shape=(len(images), 1, 1, 1)), cut[:, :, ::-1], cut)


def _matrices(params: Any) -> Any:
    """Weight decay is for kernels alone."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def _order(pictures: int, number: int, seed: int) -> np.ndarray:
    """Numbers of pictures: one permutation of all after the other."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.permutation(pictures) for _ in range(-(-number // pictures))])[:number]


def open_judge(
    folder: Path,
    images: UInt8[np.ndarray, "N S S 3"],
    labels: Sequence[tuple[str, ...]],
    classes: Classes,
    settings: JudgeSettings,
) -> Judge:
    """The judge of these pictures: read from `folder` if it was trained before with the same settings on the same
    pictures and labels, else trained and written there.

    Each judge has two files, `judge-HASH.safetensors` and, written last, `judge-HASH.json`.

    Raises:
        UserError: there is nothing to tell apart, or the folder cannot be written.
    """
    if not any(len(values) > 1 for values in classes.values()):
        raise UserError(f"the labels {', '.join(classes)} have one value each: name others with --labels")
    numbers = labelled.numbered(labels, classes)
    about = {
        "version": VERSION,
        "settings": dataclasses.asdict(settings) | {"widths": list(settings.widths)},
        "classes": {field: list(values) for field, values in classes.items()},
        "data": labelled.digest(images, numbers),
        "pictures": len(images),
    }
    name = f"judge-{labelled.digest(np.frombuffer(json.dumps(about).encode(), np.uint8), numbers[:0])[:12]}"
    weights, description = folder / f"{name}.safetensors", folder / f"{name}.json"
    if (params := _read(weights, description, about)) is not None:
        return Judge(settings, classes, params, len(images))
    judge = train(images, numbers, classes, settings)
    try:
        write_atomic(weights, save_tensors(flatten_dict(judge.params, sep="/")))
        write_atomic(description, json.dumps(about, indent=1, ensure_ascii=False))
    except OSError as error:
        raise UserError(f"the judge cannot be written to {folder} ({error.strerror}): name another --judge") from error
    return judge


def _read(weights: Path, description: Path, about: Mapping[str, Any]) -> Any:
    """The parameters; None if they are not there, belong to something else or are damaged."""
    try:
        if json.loads(description.read_text("utf-8")) != about:
            return None
        return unflatten_dict(load_tensors(weights.read_bytes()), sep="/")
    except (OSError, ValueError, SafetensorError):
        return None
