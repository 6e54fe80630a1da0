"""The shapes world with the flow head (BLIP3-o), in several wordings: prompts are drawn directly.

    python -m pisces_jax.demo --config=configs/shapes_flow.py --workdir=runs/shapes_flow

The first three stages are those of configs/shapes.py. The others have queries and a generator in place of the
regression head, more prompts that are drawn at once, and half of all questions and prompts in other words than the
standard ones. A picture is sampled: another seed, another picture.

Hardware: two cores of an AMD EPYC. Trained once, seed 0, beside other work, so its time is not known. Result: drawing
0.000 of 192 pictures, directly and after a description: number, places and most colours are right, shapes are not
sharp. Reading 0.760 of 200 questions, 0.590 of the same in wordings that were held out (docs/small_runs.md).
"""

import shapes
import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

MODEL = dict(parts.UNIFIED, language_model=shapes.LANGUAGE_MODEL, **shapes.ENCODERS)
FROZEN, OPTIMIZER, ROWS, LOG = shapes.FROZEN, shapes.OPTIMIZER, shapes.ROWS, shapes.LOG
STAGE = dict(
    program="unified", batch_size=16, decoder="decoder", loss=dict(flow_samples=2), vector_flow=parts.VECTOR_FLOW,
    plain_products=True,
)  # fmt: skip
# Objects in a picture, at most; half of all questions and prompts in other words.
ONE, TWO, FOUR = (dict(parts.SHAPES, most_objects=n) for n in (1, 2, 4))


def get_config() -> ConfigDict:
    before = shapes.get_config().stages  # the encoders and the decoder: they know no head
    # Short captions, and detailed ones of single objects: what a word looks like, before what goes with what.
    stage1 = run_config(
        **STAGE, name="stage1", steps=150, model=MODEL, init_from=FROZEN,
        data=dict(ROWS, read_slots=11, draw_slots=29, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            caption=dict(ONE, task="caption", weight=0.7, num_examples=7467),
            draw_caption=dict(ONE, task="draw_caption", weight=0.2, num_examples=2133),
            draw_details=dict(ONE, task="draw_details", weight=1.5, num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, warmup_steps=30, final_rate=1.0), log=LOG,
    )  # fmt: skip
    # To find what is asked for: by its colour first, since "is there a red circle?" is noise until it can be found.
    colours = run_config(
        **STAGE, name="colours", steps=200, model=MODEL, init_from=FROZEN | dict.fromkeys(parts.TRAINED, "stage1"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour",), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, warmup_steps=20, final_rate=1.0), log=shapes.LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    questions = run_config(
        **STAGE, name="questions", steps=200, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.TRAINED, "colours"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour", "existence"), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=shapes.LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    # Detailed captions, prompts, and questions of all kinds.
    stage2 = run_config(
        **STAGE, name="stage2", steps=800, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.TRAINED, "questions"),
        data=dict(ROWS, read_slots=10, draw_slots=17, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(TWO, task="describe", weight=0.4, num_examples=5120),
            conversation=dict(TWO, task="conversation", weight=0.65, num_examples=8320),
            draw_details=dict(TWO, task="draw_details", weight=0.6, num_examples=7680),
            draw_prompt=dict(TWO, task="draw_prompt", weight=1.25, num_examples=16_000),
            draw_described=dict(TWO, task="draw_described", weight=0.6, num_examples=7680),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=LOG,
    )  # fmt: skip
    # Prompts, drawn directly and after a description.
    stage3 = run_config(
        **STAGE, name="stage3", steps=900, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.TRAINED, "stage2"),
        data=dict(ROWS, read_slots=6, draw_slots=18, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(FOUR, task="describe", weight=0.1, num_examples=1000),
            conversation=dict(FOUR, task="conversation", weight=0.7, num_examples=7000),
            draw_prompt=dict(FOUR, task="draw_prompt", weight=1.6, num_examples=16_000),
            draw_described=dict(FOUR, task="draw_described", weight=1.2, num_examples=12_000),
        )),
        optimizer=dict(OPTIMIZER, learning_rate=2.4e-3, final_rate=0.05), log=LOG,
        sampling=dict(describe=False, temperature=0.7),
    )  # fmt: skip
    runs = (before.pretrain, before.reader, before.decoder, stage1, colours, questions, stage2, stage3)
    return ConfigDict(dict(stages={run.name: run for run in runs}))
