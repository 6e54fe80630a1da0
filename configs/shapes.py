"""The shapes world, from nothing: every stage of the method on two CPU cores.

    make demo
    python -m pisces_jax.train --config=configs/shapes.py --workdir=runs/shapes          # all stages in order
    python -m pisces_jax.train --config=configs/shapes.py:stage1 --workdir=runs/shapes   # one of them

Questions and prompts come in one wording first, and in several in the last two stages.

Hardware: two cores of an AMD EPYC. Result, seed 0: drawing 0.590 (GenEval's rules, 300 pictures), 0.596 in wordings
that training never uses; reading 0.831 (1,000 questions) and 0.720; reconstruction from true vectors 0.969.
Time: 45 minutes, the first three stages and the last five apart, with other work beside them on a slow machine.
With one wording, so with the same stages and steps, `make demo` took 20 min 47 s alone on a faster one, and the mean of
seeds 0, 1, 2 was 0.696, 0.831 and 0.984 (docs/small_runs.md says how the stages came about).
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

READER = dict(parts.SHARP_ENCODER, layers=1)  # one layer: what a vector shows stays where it is
ENCODERS = dict(understanding_encoder=READER, generation_encoder=parts.GENERATION_ENCODER, pool=2)
LANGUAGE_MODEL = dict(parts.LANGUAGE_MODEL, heads=6, kv_heads=3, head_dim=32)
MODEL = dict(parts.REGRESSION_HEAD, language_model=LANGUAGE_MODEL, **ENCODERS)
FROZEN = dict(understanding_encoder="reader", generation_encoder="pretrain")
# A vector's error is about a hundredth of a token's: brought to the same size.
STAGE = dict(program="unified", batch_size=16, decoder="decoder", loss=dict(vectors=200.0), plain_products=True)
OPTIMIZER = dict(learning_rate=3e-3, muon=parts.MUON, param_groups=(parts.FROZEN_ENCODERS, *parts.GROUPS))
TOKENIZER = parts.tokenizer(parts.SHAPES)
DATA = dict(TOKENIZER, examples_per_epoch=16_000)
ROWS = dict(DATA, row_length=160, rows_per_pool=8)
# Objects in a picture, at most. Questions and prompts come in one wording first, and in several in the last two stages:
# what a question asks for is found sooner in one.
ONE, FOUR = (dict(parts.SHAPES, most_objects=n, other_words=0.0) for n in (1, 4))
TWO_WORDED, FOUR_WORDED = (dict(parts.SHAPES, most_objects=n, other_words=0.3) for n in (2, 4))
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
        **STAGE, name="colours", steps=200, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.REGRESSION_TRAINED, "stage1"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour",), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, warmup_steps=20, final_rate=1.0), log=LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    questions = run_config(
        **STAGE, name="questions", steps=200, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.REGRESSION_TRAINED, "colours"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour", "existence"), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    # Detailed captions, and questions of all kinds.
    stage2 = run_config(
        **STAGE, name="stage2", steps=850, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.REGRESSION_TRAINED, "questions"),
        data=dict(ROWS, read_slots=10, draw_slots=15, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(TWO_WORDED, task="describe", weight=0.5, num_examples=6400),
            conversation=dict(TWO_WORDED, task="conversation", weight=0.65, num_examples=8320),
            draw_details=dict(TWO_WORDED, task="draw_details", weight=1.25, num_examples=16_000),
            draw_described=dict(TWO_WORDED, task="draw_described", weight=0.8, num_examples=10_240),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=LOG,
    )  # fmt: skip
    # Prompts: described first, then drawn. The decoder learns on from the vectors as they are predicted.
    stage3 = run_config(
        **STAGE, name="stage3", steps=1050, model=dict(MODEL, decoder=parts.DECODER), train_decoder=True,
        init_from=dict(FROZEN, decoder="decoder") | dict.fromkeys(parts.REGRESSION_TRAINED, "stage2"),
        data=dict(ROWS, read_slots=6, draw_slots=16, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(FOUR_WORDED, task="describe", weight=0.2, num_examples=1455),
            conversation=dict(FOUR_WORDED, task="conversation", weight=0.7, num_examples=5091),
            draw_details=dict(FOUR_WORDED, task="draw_details", weight=0.3, num_examples=2182),
            draw_described=dict(FOUR_WORDED, task="draw_described", weight=2.2, num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, learning_rate=2.4e-3, final_rate=0.05), log=LOG,
        flow=parts.FLOW, sampling=dict(describe=True, temperature=0.7),
    )  # fmt: skip
    runs = (pretrain, reader, decoder, stage1, colours, questions, stage2, stage3)
    return ConfigDict(dict(stages={run.name: run for run in runs}))
