"""How much the pictures of one prompt differ in what the prompt leaves open, beside how much the world's own differ.

A regression that answers an open prompt with one picture has no spread; one that writes a description first has the
spread of its descriptions. The world's own pictures of the same prompts, judged by the same detector, show how much
spread is possible.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from pisces_jax.data.example import Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation.geneval import THRESHOLD, Detector
from pisces_jax.evaluation.task import Amount, Model, Outcome, Pictures
from pisces_jax.shapes_world.detector import ShapesDetector
from pisces_jax.shapes_world.scene import CANVAS, render
from pisces_jax.shapes_world.text import detailed_caption, metadata, prompt_space, scene_for

OPEN_TAGS = ("single_object", "two_object", "counting", "position")  # colours are left open
IMAGES = 8  # per prompt


def run(model: Model, amount: Amount, how: Mapping[str, Any]) -> Outcome | None:
    """Task "spread"; None if the amount asks for no prompts."""
    if not amount.spread:
        return None
    settings = {**how, "seed": amount.seed}
    return Outcome(spread(model, prompts=amount.spread, images=IMAGES, size=model.drawn_size, **settings))


def spread(model: Model, *, prompts: int, images: int, size: int, seed: int = 0, **how: Any) -> dict[str, Any]:
    """Means over `prompts` prompts, of `OPEN_TAGS` in turn, of how much `images` pictures of each differ.

    Returns:
        `model` and `world`, each with these values, or None where no prompt has one:
        `descriptions`: the share of words that two descriptions of a prompt do not have in common, averaged over pairs.
        `places`: standard deviation of the centres of the objects found, mean of both axes, in canvas units of 32.
        `colours`: entropy of the colours of the objects found, in bits.
        `pixels`: root mean square difference of two pictures of a prompt, with pixels in 0..1, averaged over pairs.
        Objects found are those above GenEval's threshold.
    """
    detector = ShapesDetector()
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
