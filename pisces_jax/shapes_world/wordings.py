"""The words of questions and of prompts to draw: a standard wording of each, others for training, and unseen ones.

Training mixes the standard wording with the others, so that a model attends to what is asked for and not to one
sentence. No training text is in an unseen wording: evaluation measures with these how people who type freely are
understood. All are lower case, short and of few words, since small runs have a small vocabulary. Some texts in training
hold a made-up word that means nothing, so that the pieces of words that people may type are trained too, and ignored.
"""

import dataclasses
import random
import zlib

MADE_UP = 0.2  # share of the other wordings with a made-up word


@dataclasses.dataclass(frozen=True)
class Wordings:
    """Templates of one text, for `str.format`. GenEval's prompts and the main scores are in the standard wording."""

    standard: str
    others: tuple[str, ...]
    unseen: tuple[str, ...]

    def sample(self, rng: random.Random, others: float) -> str:
        """The standard wording or, with probability `others`, one of the others. At 0 nothing random is drawn."""
        if not others or rng.random() >= others:
            return self.standard
        words = rng.choice(self.others).split()
        if rng.random() < MADE_UP:
            words.insert(rng.randint(0, len(words)), made_up_word(rng))
        return " ".join(words)

    def unseen_one(self, number: int) -> str:
        """The unseen wordings in turn."""
        return self.unseen[number % len(self.unseen)]


def made_up_word(rng: random.Random) -> str:
    """Like "kade": syllables of two letters, which no shape, colour or relation consists of."""
    return "".join(rng.choice("bcdfghjklmnpqrstvwxyz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3)))


COLOUR = Wordings(
    "what colour is the {shape}?",
    (
        "which colour is the {shape}?",
        "what color is the {shape}",
        "what is the colour of the {shape}?",
        "the colour of the {shape}?",
        "tell me the colour of the {shape}.",
    ),
    ("which colour does the {shape} have?", "please say what color the {shape} is."),
)
COUNT = Wordings(
    "how many {things} are there?",
    (
        "how many {things} do you see?",
        "how many {things}",
        "count the {things}.",
        "the number of {things}?",
        "how many {things} does the picture show?",
    ),
    ("what is the number of {things}?", "can you count the {things}?"),
)
# `to` is the relation with "to the" where English has it: "to the left of", "above".
WHETHER_RELATED = Wordings(
    "is the {first} {relation} the {second}?",
    (
        "does the {first} lie {relation} the {second}?",
        "is the {first} {to} the {second}",
        "the {first} is {relation} the {second}?",
        "do you see the {first} {relation} the {second}?",
    ),
    ("would you say the {first} is {to} the {second}?", "tell me if the {first} lies {relation} the {second}."),
)
WHAT_IS_RELATED = Wordings(
    "what is {relation} the {second}?",
    (
        "what lies {relation} the {second}?",
        "what is {to} the {second}",
        "which object is {relation} the {second}?",
        "what do you see {relation} the {second}?",
        "name the object {relation} the {second}.",
    ),
    ("which object lies {to} the {second}?", "tell me what there is {relation} the {second}."),
)
EXISTENCE = Wordings(
    "is there {thing}?",
    (
        "do you see {thing}?",
        "is there {thing} here",
        "does the picture show {thing}?",
        "is {thing} there?",
        "there is {thing}?",
    ),
    ("can you see {thing}?", "is {thing} in the picture?"),
)
COMPARISON = Wordings(
    "which is larger, the {first} or the {second}?",
    (
        "what is larger, the {first} or the {second}?",
        "which one is bigger, the {first} or the {second}",
        "is the {first} or the {second} larger?",
        "name the larger one: the {first} or the {second}.",
    ),
    ("the {first} or the {second}, which is bigger?", "tell me which is larger, the {first} or the {second}."),
)
PROMPT = Wordings(
    "a photo of {what}",
    (
        "a picture of {what}",
        "please draw {what}",
        "draw {what}",
        "show me {what}.",
        "a picture with {what}",
        "please show {what}",
    ),
    ("could you make {what}?", "i would like to see {what}"),
)
CAPTION = dataclasses.replace(PROMPT, standard="{what}")

EVERY = (COLOUR, COUNT, WHETHER_RELATED, WHAT_IS_RELATED, EXISTENCE, COMPARISON, PROMPT, CAPTION)
FINGERPRINT = f"{zlib.crc32(repr((MADE_UP, EVERY)).encode()):08x}"
