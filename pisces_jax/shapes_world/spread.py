"""How much the pictures of one prompt differ in what the prompt leaves open, beside how much the world's own do.

A regression that answers an open prompt with one picture has no spread, and one that writes a description first has
the spread of its descriptions. The world's own pictures of the same prompts, judged by the same detector, say how
much there is to be had.
"""

import math
import random
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pisces_jax.data.example import Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation.geneval import THRESHOLD
from pisces_jax.shapes_world.detector import Detector, ShapesDetector
from pisces_jax.shapes_world.drawing import Drawer
from pisces_jax.shapes_world.scene import CANVAS
from pisces_jax.shapes_world.source import render
from pisces_jax.shapes_world.text import detailed_caption, metadata, prompt_space, scene_for

OPEN_TAGS = ("single_object", "two_object", "counting", "position")  # colours are left open
Pictures = UInt8[np.ndarray, "N S S 3"]


def spread(
    model: Drawer, *, prompts: int, images: int, size: int, seed: int = 0, detector: Detector | None = None, **how: Any
) -> dict[str, Any]:
    """Means over `prompts` prompts, whose kinds take turns, of what `images` pictures of each are like.

    Returns:
        `model` and `world`, each with:
        `descriptions`: of two descriptions of one prompt, the mean share of words that they do not have in common.
        `places`: standard deviation of the centres of all objects found, the mean of both axes, in canvas units of 32.
        `colours`: entropy of the colours of all objects found, in bits.
        `pixels`: root mean square difference of two pictures of one prompt, of pixels that run from 0 to 1.
        Objects are those that the detector is sure of; a prompt without any does not count (None if none has any).
    """
    detector = detector or ShapesDetector()
    asked, worlds = [], []
    for i in range(prompts):
        rng = random.Random(f"spread/{seed}/{i}")
        tag = OPEN_TAGS[i % len(OPEN_TAGS)]
        arguments = rng.choice(prompt_space(tag, held_out=False))
        asked.append(draw_instruction(metadata(tag, *arguments)["prompt"]))
        worlds.append([scene_for(rng, tag, arguments) for _ in range(images)])
    texts = [(Text(prompt),) for prompt in asked for _ in range(images)]
    drawn = model.draw(texts, seed=seed, **how)
    of_model, of_world = [], []
    for i in range(prompts):
        own = drawn[i * images : (i + 1) * images]
        of_model.append(_measure(np.stack([d.image for d in own]), [d.description for d in own], detector))
        true = np.stack([render(scene, size) for scene in worlds[i]])
        of_world.append(_measure(true, [detailed_caption(scene) for scene in worlds[i]], detector))
    return {"model": _means(of_model), "world": _means(of_world), "prompts": prompts, "images": images}


def _measure(images: Pictures, descriptions: Sequence[str], detector: Detector) -> dict[str, float]:
    found = [d for image in images for d in detector.detect(image) if d.score > THRESHOLD]
    pairs = list(combinations(range(len(images)), 2))
    pixels = images.astype(np.float64) / 255
    measured = {"pixels": float(np.mean([np.sqrt(np.mean((pixels[a] - pixels[b]) ** 2)) for a, b in pairs]))}
    if any(descriptions):
        measured["descriptions"] = float(np.mean([_apart(descriptions[a], descriptions[b]) for a, b in pairs]))
    if found:
        unit = CANVAS / images.shape[1]
        centres = np.array([((d.box[0] + d.box[2]) / 2, (d.box[1] + d.box[3]) / 2) for d in found]) * unit
        measured["places"] = float(centres.std(0).mean())
        counts = Counter(d.color for d in found)
        shares = [n / counts.total() for n in counts.values()]
        measured["colours"] = sum(-s * math.log2(s) for s in shares)
    return measured


def _apart(a: str, b: str) -> float:
    words, others = Counter(a.replace(",", " ").split()), Counter(b.replace(",", " ").split())
    return 1 - 2 * (words & others).total() / max(words.total() + others.total(), 1)


def _means(measured: Sequence[dict[str, float]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("descriptions", "places", "colours", "pixels"):
        values = [m[name] for m in measured if name in m]
        means[name] = float(np.mean(values)) if values else None
    return means
