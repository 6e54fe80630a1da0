"""Drawing in the shapes world: GenEval's six kinds of prompts, judged by its rules on what the detector finds."""

import functools
import itertools
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pisces_jax.data.example import Text
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.evaluation.geneval import Judged, Metadata, judge, score
from pisces_jax.evaluation.task import Amount, Model, Outcome
from pisces_jax.shapes_world.detector import ShapesDetector
from pisces_jax.shapes_world.scene import render
from pisces_jax.shapes_world.text import geneval_prompts, metadata, named, prompt_space, scene_for
from pisces_jax.shapes_world.wordings import PROMPT


def run(model: Model, amount: Amount, how: Mapping[str, Any]) -> Outcome:
    """Task "geneval": `how["describe"]` is the way that is scored; with `amount.both` the other way is scored too."""

    def drawn(describe: bool, per_task: int, **more: Any) -> list[Judged]:
        settings = {**how, "describe": describe, "seed": amount.seed, **more}
        return draw(model, per_task=per_task, images=amount.images, **settings)

    name = {True: "described", False: "direct"}
    chosen = how["describe"]
    judged = {name[chosen]: drawn(chosen, amount.per_task)}
    if amount.held_out:
        judged["held_out"] = drawn(chosen, amount.held_out, held_out=True)
    if amount.other_words:
        judged["other_words"] = drawn(chosen, amount.per_task, other_words=amount.other_words)
    scores = score(judged[name[chosen]], judged.get("held_out", ()), judged.get("other_words", ()))
    scores["drawn"] = name[chosen]
    if amount.both:
        judged[name[not chosen]] = drawn(not chosen, amount.per_task)
        for way in name.values():
            scores[way] = score(judged[way])
    return Outcome(scores, drawn=judged)


def draw(
    model: Model,
    *,
    per_task: int,
    images: int,
    describe: bool,
    seed: int = 0,
    held_out: bool = False,
    other_words: int = 0,
    **how: Any,
) -> list[Judged]:
    """Draws `images` pictures for each of `per_task` prompts of each kind; `how` goes to `model.draw`.

    The pictures of a prompt follow one another. With `held_out` every prompt names what is held out of training. With
    `other_words` at most so many of each kind's same prompts are drawn, in wordings that training never uses.
    """
    detector = ShapesDetector()
    lines = geneval_prompts(per_task, seed, held_out)
    asked = [line["prompt"] for line in lines]
    if other_words:
        lines = [line for _, own in itertools.groupby(lines, lambda x: x["tag"]) for line in list(own)[:other_words]]
        asked = [PROMPT.unseen_one(i).format(what=named(line)) for i, line in enumerate(lines)]
    pairs = [pair for pair in zip(lines, asked, strict=True) for _ in range(images)]
    prompts = [(Text(draw_instruction(prompt)),) for _, prompt in pairs]
    drawings = model.draw(prompts, describe=describe, seed=seed, **how)
    judged = []
    for (line, prompt), drawing in zip(pairs, drawings, strict=True):
        verdict = judge(detector.detect(drawing.image), line)
        truth = true_picture(line, drawing.image.shape[0])
        worded = {**line, "prompt": prompt}
        judged.append(Judged(worded, drawing.description, drawing.image, verdict.correct, verdict.reason, truth))
    return judged


def true_picture(line: Metadata, size: int, seed: int = 0) -> UInt8[np.ndarray, "S S 3"]:
    """A picture of the world that the prompt is true of."""
    known = _known_prompts(line["tag"])
    if line["prompt"] not in known:
        raise ValueError(f"{line['prompt']!r} is not a prompt of the shapes world")
    arguments, held_out = known[line["prompt"]]
    rng = random.Random(f"true picture/{seed}/{line['prompt']}")
    return render(scene_for(rng, line["tag"], arguments, keep_allowed=not held_out), size)


@functools.cache
def _known_prompts(tag: str) -> dict[str, tuple[tuple, bool]]:
    """(arguments, whether they are held out) of all prompts of this kind, by their text."""
    return {
        metadata(tag, *arguments)["prompt"]: (arguments, held_out)
        for held_out in (False, True)
        for arguments in prompt_space(tag, held_out)
    }
