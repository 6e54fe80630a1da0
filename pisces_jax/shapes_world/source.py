"""The shapes world as a source of training examples, rendered on the fly."""

import functools
import operator
import random
from collections.abc import Iterator, Sequence

from pisces_jax.data.example import Example, Part, Picture, Role, Text
from pisces_jax.data.instructions import CAPTION_INSTRUCTION, DESCRIBE_INSTRUCTION, draw_instruction
from pisces_jax.shapes_world.questions import (
    QUESTION_KINDS,
    Question,
    possible_kinds,
    sample_conversation,
    sample_question,
)
from pisces_jax.shapes_world.scene import MAX_OBJECTS, SPLITS, Scene, render, sample_scene
from pisces_jax.shapes_world.text import detailed_caption, named, sample_for_prompt, short_caption
from pisces_jax.shapes_world.wordings import CAPTION, FINGERPRINT, PROMPT, Wordings
from pisces_jax.utils.errors import UserError

TASKS = (
    "caption",
    "describe",
    "question",
    "conversation",
    "draw_caption",
    "draw_details",
    "draw_prompt",
    "draw_described",
    "pair",
    "pair_shapes",
)


class ShapesSource:
    """Examples of one task, by index; the same for the same (task, split, seed, index), on any machine.

    Descriptions name the objects in reading order, except that those of "draw_described" follow the order of the short
    text before them, and those of "draw_details" are in random order.

    Args:
        task: one of `TASKS`.
        split: "train" and "val" come from the same distribution with different random numbers; every example of
            "held_out" holds something that neither of them does.
        size: side of the pictures in pixels; they are rendered only when asked for.
        most_objects: how many objects a scene has at most; a prompt may ask for more.
        prompts: share of the short texts of "draw_described" that are in GenEval's words; the others are captions.
        question_kinds: what "question" and "conversation" ask.
        other_words: share of the questions and of the short texts to draw that are not in their standard wording.

    Raises:
        UserError: a value that the world does not have.
    """

    def __init__(
        self,
        task: str,
        split: str = "train",
        num_examples: int = 1_000_000,
        seed: int | str = 0,
        size: int = 32,
        most_objects: int = MAX_OBJECTS,
        prompts: float = 0.5,
        question_kinds: Sequence[str] = QUESTION_KINDS,
        other_words: float = 0.5,
    ):
        if task not in TASKS:
            raise UserError(f"the shapes world has no task {task!r}: choose one of {', '.join(TASKS)}")
        if split not in SPLITS:
            raise UserError(f"the shapes world has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if not 1 <= most_objects <= MAX_OBJECTS:
            raise UserError(f"the shapes world has scenes of 1 to {MAX_OBJECTS} objects, not of {most_objects}")
        if not 0 <= prompts <= 1:
            raise UserError(f"prompts is a share of the shapes world's examples, from 0 to 1, not {prompts}")
        if not 0 <= other_words <= 1:
            raise UserError(f"other_words is a share of the shapes world's texts, from 0 to 1, not {other_words}")
        if unknown := [kind for kind in question_kinds if kind not in QUESTION_KINDS]:
            raise UserError(f"question_kinds: {unknown[0]!r} is none of {', '.join(QUESTION_KINDS)}")
        if not possible_kinds(split, most_objects, question_kinds):
            raise UserError(
                f"question_kinds: split {split!r} with up to {most_objects} objects needs at least one of "
                f"{', '.join(possible_kinds(split, most_objects))}"
            )
        self.task, self.split, self.num_examples, self.seed, self.size = task, split, num_examples, seed, size
        self.most_objects, self.prompts, self.question_kinds = most_objects, prompts, tuple(question_kinds)
        self.other_words = other_words
        # What neither keys nor texts show.
        self.fingerprint = f"{size}/{most_objects}/{prompts}/{self.question_kinds}/{other_words}/{FINGERPRINT}"
        self.remote, self.pictures_fingerprint = False, None

    def __len__(self) -> int:
        return self.num_examples

    @property
    def draws(self) -> bool:
        return self.task.startswith("draw")

    def __getitem__(self, index: int) -> Example:
        index = operator.index(index)
        if not 0 <= index < self.num_examples:
            raise IndexError(f"example {index} of {self.num_examples}")
        key = f"shapes/{self.split}/{self.seed}/{self.task}/{index}"
        return Example(self._parts(random.Random(key)), key)

    def _parts(self, rng: random.Random) -> tuple[Part, ...]:
        if self.task == "question":
            kind = rng.choice(possible_kinds(self.split, self.most_objects, self.question_kinds))
            scene, _, question = sample_question(rng, self.split, kind, self.most_objects)
            return self._picture(scene, "read"), *self._asked(rng, question)
        if self.task == "conversation":
            scene, questions = sample_conversation(rng, self.split, self.most_objects, among=self.question_kinds)
            return self._picture(scene, "read"), *(part for q in questions for part in self._asked(rng, q))
        if self.task == "draw_prompt":
            line, scene = sample_for_prompt(rng, self.split)
            return self._to_draw(rng, PROMPT, named(line)), self._picture(scene, "draw")
        if self.task == "draw_described":
            if rng.random() < self.prompts:
                line, scene = sample_for_prompt(rng, self.split)
                wordings, what, objects = PROMPT, named(line), list(scene.objects)  # these are in the prompt's order
            else:
                scene = sample_scene(rng, self.split, self.most_objects)
                wordings, what = CAPTION, short_caption(scene, rng)
                objects = sorted(scene.objects, key=lambda o: what.index(f"{o.color} {o.shape}"))
            description = Text(detailed_caption(scene, objects), learn=True)
            return self._to_draw(rng, wordings, what), description, self._picture(scene, "draw")
        scene = sample_scene(rng, self.split, self.most_objects)
        if self.task == "caption":
            caption = Text(short_caption(scene, rng), learn=True)
            return self._picture(scene, "read"), Text(CAPTION_INSTRUCTION), caption
        if self.task == "describe":
            description = Text(detailed_caption(scene), learn=True)
            return self._picture(scene, "read"), Text(DESCRIBE_INSTRUCTION), description
        if self.task == "draw_caption":
            return self._to_draw(rng, CAPTION, short_caption(scene, rng)), self._picture(scene, "draw")
        if self.task == "draw_details":
            objects = rng.sample(scene.objects, len(scene.objects))
            return Text(draw_instruction(detailed_caption(scene, objects))), self._picture(scene, "draw")
        if self.task == "pair_shapes":
            return self._picture(scene, "read"), Text(short_caption(scene, rng, colors=False))
        detailed = rng.random() < 0.5  # "pair"
        return self._picture(scene, "read"), Text(detailed_caption(scene) if detailed else short_caption(scene, rng))

    def _asked(self, rng: random.Random, question: Question) -> tuple[Text, Text]:
        return Text(question.sample(rng, self.other_words)), Text(question.answer, learn=True)

    def _to_draw(self, rng: random.Random, wordings: Wordings, what: str) -> Text:
        return Text(draw_instruction(wordings.sample(rng, self.other_words).format(what=what)))

    def _picture(self, scene: Scene, role: Role) -> Picture:
        return Picture(functools.partial(render, scene, self.size), role)


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """`n` texts as training sees them, from all tasks in turn, to train a small tokenizer on."""
    sources = [ShapesSource(task, "train", n, f"corpus-{seed}") for task in TASKS if not task.startswith("pair")]
    made = 0
    for index in range(n):
        for part in sources[index % len(sources)][index].parts:
            if isinstance(part, Text):
                if made == n:
                    return
                made += 1
                yield part.text
