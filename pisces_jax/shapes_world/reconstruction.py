"""What the decoder makes of true visual vectors, beside what it makes of the model's own: where errors come from.

Both decode to pictures of the same scenes: true vectors are the generation encoder's features of the true picture;
predicted ones are the model's for the detailed caption, which leaves nothing open but the ground and some shades. So
the first tells what encoder and decoder lose, and the second what the prediction loses on top.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from pisces_jax.data.example import Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation.geneval import THRESHOLD
from pisces_jax.shapes_world.detector import Detector, ShapesDetector
from pisces_jax.shapes_world.drawing import Drawer
from pisces_jax.shapes_world.source import Scene, detailed_caption, render, sample_scene


class Reconstructor(Drawer, Protocol):
    """What is needed of a model: `inference.model.Model` has it."""

    def features(self, images: np.ndarray) -> np.ndarray: ...
    def decode(self, vectors: Any, *, seed: int = 0) -> np.ndarray: ...


Pictures = UInt8[np.ndarray, "N S S 3"]


def scenes(number: int, seed: int = 0) -> list[Scene]:
    """Unseen scenes, never those of a `ShapesSource`."""
    return [sample_scene(random.Random(f"reconstruction/{seed}/{i}"), "val") for i in range(number)]


def reconstruct(
    model: Reconstructor, *, pictures: int, size: int, seed: int = 0, detector: Detector | None = None
) -> tuple[dict[str, Any], dict[str, Pictures]]:
    """Scores, and the pictures `true`, `true_vectors` (decoded) and `predicted_vectors` (decoded).

    A picture counts as right if just the scene's objects are found, each with its shape and colour: a strict share.
    """
    detector = detector or ShapesDetector()
    shown = scenes(pictures, seed)
    made = {"true": np.stack([render(scene, size) for scene in shown])}
    made["true_vectors"] = model.decode(model.features(made["true"]), seed=seed)
    prompts = [(Text(draw_instruction(detailed_caption(scene))),) for scene in shown]
    made["predicted_vectors"] = np.stack([d.image for d in model.draw(prompts, describe=False, seed=seed)])
    scores: dict[str, Any] = {}
    for kind in ("true_vectors", "predicted_vectors", "true"):
        right = [holds(image, scene, detector) for image, scene in zip(made[kind], shown, strict=True)]
        scores["true_pictures" if kind == "true" else kind] = float(np.mean(right))
    scores["true_vectors_pixel_error"] = pixel_error(made["true"], made["true_vectors"])
    scores["mean_picture_pixel_error"] = pixel_error(made["true"], mean_picture(made["true"]))
    scores["pictures"] = pictures
    return scores, made


def holds(image: UInt8[np.ndarray, "S S 3"], scene: Scene, detector: Detector) -> bool:
    """Whether just the scene's objects are found in the picture, by shape and colour."""
    found = Counter((d.label, d.color) for d in detector.detect(image) if d.score > THRESHOLD)
    return found == Counter((o.shape, o.color) for o in scene.objects)


def pixel_error(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared difference of pixels that run from 0 to 1."""
    return float(np.mean(np.square((a.astype(np.float32) - b.astype(np.float32)) / 255)))


def mean_picture(images: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """float32 [S, S, 3]: what has the least error of all that ignore what is shown."""
    return np.mean(np.asarray(images, np.float32), axis=0)
