"""What the decoder makes of true visual vectors, beside what it makes of the model's own: where errors come from.

Both are decoded to pictures of the same scenes. True vectors are the generation encoder's features of the true picture.
Predicted ones are the model's for the detailed caption, which leaves only the ground and some shades open. So the first
show what encoder and decoder lose, and the second what the prediction loses on top.
"""

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pisces_jax.data.example import Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation.geneval import THRESHOLD, Detector
from pisces_jax.evaluation.pictures import pixel_errors
from pisces_jax.evaluation.task import Amount, Model, Outcome
from pisces_jax.shapes_world.detector import ShapesDetector
from pisces_jax.shapes_world.scene import Scene, render, sample_scene
from pisces_jax.shapes_world.text import detailed_caption


def run(model: Model, amount: Amount, how: Mapping[str, Any]) -> Outcome:
    """Task "reconstruction". A picture is right if exactly the scene's objects are found, by shape and colour."""
    seed, detector = amount.seed, ShapesDetector()
    shown = scenes(amount.pictures, seed)
    truth = np.stack([render(scene, model.drawn_size) for scene in shown])
    decoded = model.decode(model.features(truth), seed=seed)
    prompts = [(Text(draw_instruction(detailed_caption(scene))),) for scene in shown]
    predicted = np.stack([d.image for d in model.draw(prompts, describe=False, seed=seed)])
    made = {"true_vectors": decoded, "predicted_vectors": predicted, "true_pictures": truth}
    scores: dict[str, Any] = {
        name: float(np.mean([holds(image, scene, detector) for image, scene in zip(images, shown, strict=True)]))
        for name, images in made.items()
    }
    scores |= {**pixel_errors(truth, decoded), "pictures": len(shown)}
    return Outcome(
        scores, rows={"true": truth, "decoded from true vectors": decoded, "from predicted vectors": predicted}
    )


def scenes(number: int, seed: int = 0) -> list[Scene]:
    """Unseen scenes, never those of a `ShapesSource`."""
    return [sample_scene(random.Random(f"reconstruction/{seed}/{i}"), "val") for i in range(number)]


def holds(image: UInt8[np.ndarray, "S S 3"], scene: Scene, detector: Detector) -> bool:
    """Whether exactly the scene's objects are found in the picture, by shape and colour."""
    found = Counter((d.label, d.color) for d in detector.detect(image) if d.score > THRESHOLD)
    return found == Counter((o.shape, o.color) for o in scene.objects)
