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
    same: dict[str, Any] = {"size": model.read_size, "seed": amount.seed}
    asked = ask(model, per_kind=amount.per_kind, **same)
    held_out = ask(model, per_kind=amount.held_out, held_out=True, **same) if amount.held_out else []
    number = min(amount.other_words, amount.per_kind)
    other_words = ask(model, per_kind=number, other_words=True, **same) if number else []
    return Outcome(score(asked, held_out, other_words), asked=asked, asked_in_other_words=other_words)


def ask(
    model: Model,
    *,
    per_kind: int,
    size: int,
    seed: int = 0,
    held_out: bool = False,
    other_words: bool = False,
    max_tokens: int = 8,
) -> list[Answered]:
    """`per_kind` questions of each kind about pictures of `size`; with `held_out`, about what is held out.

    With `other_words` the same are asked in wordings that training never uses.
    """
    asked = questions(per_kind, seed, held_out, other_words)
    images = [render(scene, size) for scene, *_ in asked]
    prompts = [(Picture(i, "read"), Text(question)) for i, (_, _, question, _) in zip(images, asked, strict=True)]
    answers = model.answer(prompts, max_tokens=max_tokens)
    return [
        Answered(image, kind, question, truth, answer)
        for image, (_, kind, question, truth), answer in zip(images, asked, answers, strict=True)
    ]
