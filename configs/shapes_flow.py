"""The shapes world with the flow head (BLIP3-o), in several wordings: prompts are drawn directly.

    python -m pisces_jax.demo --config=configs/shapes_flow.py --workdir=runs/shapes_flow

The stages of configs/shapes.py, with queries and a generator in place of the regression head, more prompts that are
drawn at once, and half of all questions and prompts in other words than the standard ones. A picture is sampled:
another seed, another picture.

Hardware: two cores of an AMD EPYC. Trained once, seed 0, beside other work, so its time is not known. Result: drawing
0.000 of 192 pictures, directly and after a description: number, places and most colours are right, shapes are not
sharp. Reading 0.760 of 200 questions, 0.590 of the same in wordings that were held out (docs/small_runs.md).
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

TOKENIZER = parts.tokenizer(parts.SHAPES)
READER = dict(parts.SHARP_ENCODER, layers=1)  # one layer: what a vector shows stays where it is
ENCODERS = dict(understanding_encoder=READER, generation_encoder=parts.GENERATION_ENCODER, pool=2)
LANGUAGE_MODEL = dict(parts.LANGUAGE_MODEL, heads=6, kv_heads=3, head_dim=32)
MODEL = dict(parts.UNIFIED, language_model=LANGUAGE_MODEL, **ENCODERS)
FROZEN = dict(understanding_encoder="reader", generation_encoder="pretrain")
STAGE = dict(
    program="unified", batch_size=16, decoder="decoder", loss=dict(flow_samples=2), vector_flow=parts.VECTOR_FLOW,
    plain_products=True,
)  # fmt: skip
OPTIMIZER = dict(learning_rate=3e-3, muon=parts.MUON, param_groups=(parts.FROZEN_ENCODERS, *parts.GROUPS))
DATA = dict(TOKENIZER, examples_per_epoch=16_000)
ROWS = dict(DATA, row_length=160, rows_per_pool=8)
# Objects in a picture, at most.
ONE, TWO, FOUR = (dict(parts.SHAPES, most_objects=n) for n in (1, 2, 4))
LOG = dict(every=25, evaluate_every=200, evaluate_batches=3, checkpoint_every=400, samples_every=750)
LOG_WITHOUT_SAMPLES = dict(LOG, samples_every=0)  # of what draws nothing


def get_config() -> ConfigDict:
    # Features that are easily predicted: of single objects, by the names of their shapes.
    pretrain = run_config(
        name="pretrain", program="pretrain", steps=360, batch_size=32, plain_products=True, log=LOG,
        model=dict(
            generation_encoder=parts.GENERATION_ENCODER, pool=2, decoder=parts.DECODER, text_tower=parts.TEXT_TOWER,
        ),
        data=dict(DATA, text_length=8, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair_shapes=dict(ONE, task="pair_shapes", num_examples=16_000)
        )),
        loss=dict(contrastive=0.1, contrast="softmax", same_text=True, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=5e-3, warmup_steps=30, final_rate=0.05, param_groups=(parts.SLOW_READER, *parts.GROUPS),
        ),
    )  # fmt: skip
    # Contrast stops at colours where these tell pictures apart; words as labels teach shapes, and where they are.
    reader = run_config(
        name="reader", program="pretrain", steps=1400, batch_size=32, plain_products=True, log=LOG_WITHOUT_SAMPLES,
        model=dict(understanding_encoder=READER, text_tower=dict(parts.TEXT_TOWER, layers=1)),
        data=dict(TOKENIZER, examples_per_epoch=32_000, text_length=40, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair=dict(FOUR, task="pair", num_examples=32_000)
        )),
        loss=dict(words=0.1, contrastive=0.01, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=8e-3, warmup_steps=30, final_rate=0.05, param_groups=(parts.SLOW_READER, *parts.GROUPS),
        ),
    )  # fmt: skip
    decoder = run_config(
        name="decoder", program="decoder", steps=200, batch_size=16, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER),
        init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
        data=dict(DATA, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair=dict(FOUR, task="pair", num_examples=16_000)
        )),
        loss=dict(contrastive=0.1, reconstruction=100.0, feature_noise=0.05),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=3e-3, warmup_steps=20, final_rate=0.05, ema=0.99,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
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
        optimizer=dict(OPTIMIZER, warmup_steps=20, final_rate=1.0), log=LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    questions = run_config(
        **STAGE, name="questions", steps=200, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.TRAINED, "colours"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour", "existence"), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=LOG_WITHOUT_SAMPLES,
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
    runs = (pretrain, reader, decoder, stage1, colours, questions, stage2, stage3)
    return ConfigDict(dict(stages={run.name: run for run in runs}))
