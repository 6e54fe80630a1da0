"""The shapes world as a source of training examples, drawn on the fly: the embedded default.

This is its public face; scenes and rendering are in `shapes_scene.py`, captions and prompts in
`shapes_text.py`, questions in `shapes_questions.py`.
"""

import functools
import operator
import random
from collections.abc import Iterator, Sequence

from pisces_jax.data.example import Example, Part, Picture, Role, Text
from pisces_jax.data.instructions import CAPTION_INSTRUCTION, DESCRIBE_INSTRUCTION, draw_instruction
from pisces_jax.shapes_world.questions import (
    HELD_OUT_QUESTION_KINDS,
    QUESTION_KINDS,
    possible_kinds,
    question_for,
    questions,
    sample_conversation,
    sample_question,
)
from pisces_jax.shapes_world.scene import (
    COLORS,
    HELD_OUT_COUNTS,
    HELD_OUT_PAIRS,
    HELD_OUT_RELATIONS,
    MAX_OBJECTS,
    SHAPES,
    SPLITS,
    Object,
    Scene,
    render,
    sample_scene,
    violates,
)
from pisces_jax.shapes_world.text import (
    HELD_OUT_TAGS,
    TAGS,
    detailed_caption,
    geneval_prompts,
    prompt_for,
    sample_for_prompt,
    short_caption,
)
from pisces_jax.utils.errors import UserError

__all__ = [
    "COLORS",
    "HELD_OUT_COUNTS",
    "HELD_OUT_PAIRS",
    "HELD_OUT_QUESTION_KINDS",
    "HELD_OUT_RELATIONS",
    "HELD_OUT_TAGS",
    "QUESTION_KINDS",
    "SHAPES",
    "SPLITS",
    "TAGS",
    "TASKS",
    "Object",
    "Scene",
    "ShapesSource",
    "corpus",
    "detailed_caption",
    "geneval_prompts",
    "prompt_for",
    "question_for",
    "questions",
    "render",
    "sample_for_prompt",
    "sample_question",
    "sample_scene",
    "short_caption",
    "violates",
]

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

    Pictures are rendered only when asked for, at `size` by `size`. Splits: "train" and "val" come from one
    distribution with other random numbers; every example of "held_out" holds something that neither of them
    does. Scenes have up to `most_objects` objects, but where a prompt asks for them; questions are of `question_kinds`.
    Of the short texts of "draw_described", the share `prompts` is in GenEval's words, the others are captions; its
    descriptions name the objects in the short text's order, those of "draw_details" in any, all others in reading
    order.

    Raises `UserError` for an unknown task, split or kind of question, a number of objects that the world does not have,
    or no share.
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
    ):
        if task not in TASKS:
            raise UserError(f"the shapes world has no task {task!r}: choose one of {', '.join(TASKS)}")
        if split not in SPLITS:
            raise UserError(f"the shapes world has no split {split!r}: choose one of {', '.join(SPLITS)}")
        if not 1 <= most_objects <= MAX_OBJECTS:
            raise UserError(f"the shapes world has scenes of 1 to {MAX_OBJECTS} objects, not of {most_objects}")
        if not 0 <= prompts <= 1:
            raise UserError(f"prompts is a share of the shapes world's examples, 0 to 1, not {prompts}")
        if unknown := [kind for kind in question_kinds if kind not in QUESTION_KINDS]:
            raise UserError(f"question_kinds: {unknown[0]!r} is none of {', '.join(QUESTION_KINDS)}")
        if not possible_kinds(split, most_objects, question_kinds):
            raise UserError(
                f"question_kinds: split {split!r} with up to {most_objects} objects needs at least one of "
                f"{', '.join(possible_kinds(split, most_objects))}"
            )
        self.task, self.split, self.num_examples, self.seed, self.size = task, split, num_examples, seed, size
        self.most_objects, self.prompts, self.question_kinds = most_objects, prompts, tuple(question_kinds)
        # What the keys do not show, and texts need not.
        self.fingerprint = f"{size}/{most_objects}/{prompts}/{self.question_kinds}"
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
            scene, _, question, answer = sample_question(rng, self.split, kind, self.most_objects)
            return self._picture(scene, "read"), Text(question), Text(answer, learn=True)
        if self.task == "conversation":
            scene, answered = sample_conversation(rng, self.split, self.most_objects, among=self.question_kinds)
            turns = [part for question, answer in answered for part in (Text(question), Text(answer, learn=True))]
            return self._picture(scene, "read"), *turns
        if self.task == "draw_prompt":
            line, scene = sample_for_prompt(rng, self.split)
            return Text(draw_instruction(line["prompt"])), self._picture(scene, "draw")
        if self.task == "draw_described":
            if rng.random() < self.prompts:
                line, scene = sample_for_prompt(rng, self.split)
                prompt, objects = line["prompt"], list(scene.objects)  # these are in the prompt's order
            else:
                scene = sample_scene(rng, self.split, self.most_objects)
                prompt = short_caption(scene, rng)
                objects = sorted(scene.objects, key=lambda o: prompt.index(f"{o.color} {o.shape}"))
            description = Text(detailed_caption(scene, objects), learn=True)
            return Text(draw_instruction(prompt)), description, self._picture(scene, "draw")
        scene = sample_scene(rng, self.split, self.most_objects)
        if self.task == "caption":
            caption = Text(short_caption(scene, rng), learn=True)
            return self._picture(scene, "read"), Text(CAPTION_INSTRUCTION), caption
        if self.task == "describe":
            description = Text(detailed_caption(scene), learn=True)
            return self._picture(scene, "read"), Text(DESCRIBE_INSTRUCTION), description
        if self.task == "draw_caption":
            return Text(draw_instruction(short_caption(scene, rng))), self._picture(scene, "draw")
        if self.task == "draw_details":
            objects = rng.sample(scene.objects, len(scene.objects))
            return Text(draw_instruction(detailed_caption(scene, objects))), self._picture(scene, "draw")
        if self.task == "pair_shapes":
            return self._picture(scene, "read"), Text(short_caption(scene, rng, colors=False))
        detailed = rng.random() < 0.5  # "pair"
        return self._picture(scene, "read"), Text(detailed_caption(scene) if detailed else short_caption(scene, rng))

    def _picture(self, scene: Scene, role: Role) -> Picture:
        return Picture(functools.partial(render, scene, self.size), role)


def corpus(n: int, seed: int = 0) -> Iterator[str]:
    """`n` texts as training sees them, all tasks in turn, to train a small tokenizer on."""
    sources = [ShapesSource(task, "train", n, f"corpus-{seed}") for task in TASKS if not task.startswith("pair")]
    made = 0
    for index in range(n):
        for part in sources[index % len(sources)][index].parts:
            if isinstance(part, Text):
                if made == n:
                    return
                made += 1
                yield part.text
