"""Reading in the shapes world: questions about unseen pictures, equally many of each kind."""

from collections.abc import Mapping
from typing import Any

from pisces_jax.data.example import Picture, Text
from pisces_jax.evaluation.answers import Answered, score
from pisces_jax.evaluation.task import Amount, Model, Outcome
from pisces_jax.shapes_world.questions import questions
from pisces_jax.shapes_world.scene import render


def run(model: Model, amount: Amount, how: Mapping[str, Any]) -> Outcome:
    """Task "reading"."""
    size, seed = model.read_size, amount.seed
    asked = ask(model, per_kind=amount.per_kind, size=size, seed=seed)
    held_out = ask(model, per_kind=amount.held_out, size=size, seed=seed, held_out=True) if amount.held_out else []
    return Outcome(score(asked, held_out), asked=asked)


def ask(
    model: Model, *, per_kind: int, size: int, seed: int = 0, held_out: bool = False, max_tokens: int = 8
) -> list[Answered]:
    """`per_kind` questions of each kind about pictures of `size`; with `held_out`, about what is held out."""
    asked = questions(per_kind, seed, held_out)
    images = [render(scene, size) for scene, *_ in asked]
    prompts = [(Picture(i, "read"), Text(question)) for i, (_, _, question, _) in zip(images, asked, strict=True)]
    answers = model.answer(prompts, max_tokens=max_tokens)
    return [
        Answered(image, kind, question, truth, answer)
        for image, (_, kind, question, truth), answer in zip(images, asked, answers, strict=True)
    ]
