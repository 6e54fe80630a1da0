"""The shapes world, the full small run: under two hours on two CPU cores.

    python -m pisces_jax.demo --config=configs/shapes_full.py --workdir=runs/shapes_full

The stages of configs/shapes.py with a language model of five layers and 1.9 million parameters in place of four and
1.2, up to four objects from stage 2 on in every picture that no prompt asks for, more questions, and six times the
steps. It has no stages of its own for reading: its understanding encoder learns on in every stage. The same command
continues an interrupted run.

Hardware: two cores of an AMD EPYC. Time: 1 h 43 min. Result of seed 0: drawing 0.922 (GenEval's rules, 1,200 pictures),
reading 0.951 (5,000 questions), reconstruction from true vectors 0.983 (README.md; docs/small_runs.md, "The full small
run"). Not run on a GPU yet.
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

ENCODERS = dict(understanding_encoder=parts.SHARP_ENCODER, generation_encoder=parts.GENERATION_ENCODER, pool=2)
LANGUAGE_MODEL = dict(parts.LANGUAGE_MODEL, layers=5, heads=6, kv_heads=3, head_dim=32, mlp_hidden=384)
MODEL = dict(parts.REGRESSION_HEAD, language_model=LANGUAGE_MODEL, **ENCODERS)
PRETRAINED = dict(understanding_encoder="pretrain", generation_encoder="pretrain")
LEARNED = (*parts.REGRESSION_TRAINED, "understanding_encoder")  # which the next stage goes on from
# A vector's error is about a hundredth of a token's: brought to the same size.
STAGE = dict(program="unified", batch_size=16, decoder="decoder", loss=dict(vectors=200.0), plain_products=True)
OPTIMIZER = dict(
    learning_rate=3e-3,
    muon=parts.MUON,
    param_groups=(parts.SLOW_READER, parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
)
SHAPES = dict(parts.SHAPES, other_words=0.0)  # all texts are in the standard wording
DATA = dict(parts.tokenizer(SHAPES), examples_per_epoch=100_000)
ROWS = dict(DATA, row_length=160, rows_per_pool=8)
# Objects in a picture, at most.
ONE, FOUR = (dict(SHAPES, most_objects=n) for n in (1, 4))
LOG = dict(every=50, evaluate_every=500, evaluate_batches=6, checkpoint_every=500, samples_every=1500)


def get_config() -> ConfigDict:
    # What sets shapes apart, by their names alone: where colours tell pictures apart, no shape is learned.
    pretrain = run_config(
        name="pretrain", program="pretrain", steps=1200, batch_size=32, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER, text_tower=parts.TEXT_TOWER),
        data=dict(DATA, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair_shapes=dict(ONE, task="pair_shapes", num_examples=100_000)
        )),
        loss=dict(contrastive=0.1, contrast="softmax", same_text=True, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=5e-3, warmup_steps=30, final_rate=0.05, param_groups=(parts.SLOW_READER, *parts.GROUPS),
        ),
    )  # fmt: skip
    decoder = run_config(
        name="decoder", program="decoder", steps=600, batch_size=16, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER),
        init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
        data=dict(DATA, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair=dict(FOUR, task="pair", num_examples=100_000)
        )),
        loss=dict(contrastive=0.1, reconstruction=100.0, feature_noise=0.05),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=3e-3, warmup_steps=20, final_rate=0.05, ema=0.99,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    # Short captions, and detailed ones of single objects.
    stage1 = run_config(
        **STAGE, name="stage1", steps=200, model=MODEL, init_from=PRETRAINED,
        data=dict(ROWS, read_slots=11, draw_slots=29, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            caption=dict(ONE, task="caption", weight=0.7, num_examples=46_667),
            draw_caption=dict(ONE, task="draw_caption", weight=0.2, num_examples=13_333),
            draw_details=dict(ONE, task="draw_details", weight=1.5, num_examples=100_000),
        )),
        optimizer=dict(OPTIMIZER, warmup_steps=30, final_rate=1.0), log=LOG,
    )  # fmt: skip
    # Detailed captions, and questions of all kinds.
    stage2 = run_config(
        **STAGE, name="stage2", steps=3400, model=MODEL, init_from=PRETRAINED | dict.fromkeys(LEARNED, "stage1"),
        data=dict(ROWS, read_slots=9, draw_slots=11, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(FOUR, task="describe", weight=0.6, num_examples=50_000),
            conversation=dict(FOUR, task="conversation", num_examples=83_333),
            draw_details=dict(FOUR, task="draw_details", weight=1.2, num_examples=100_000),
            draw_described=dict(FOUR, task="draw_described", weight=0.8, num_examples=66_667),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=LOG,
    )  # fmt: skip
    # Prompts: described first, then drawn. The decoder learns on from the vectors as they are predicted.
    stage3 = run_config(
        **STAGE, name="stage3", steps=6400, model=dict(MODEL, decoder=parts.DECODER), train_decoder=True,
        init_from=dict(PRETRAINED, decoder="decoder") | dict.fromkeys(LEARNED, "stage2"),
        data=dict(ROWS, read_slots=8, draw_slots=10, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(FOUR, task="describe", weight=0.3, num_examples=17_647),
            conversation=dict(FOUR, task="conversation", weight=1.3, num_examples=76_471),
            draw_details=dict(FOUR, task="draw_details", weight=0.3, num_examples=17_647),
            draw_described=dict(FOUR, task="draw_described", weight=1.7, num_examples=100_000),
        )),
        optimizer=dict(OPTIMIZER, learning_rate=2.4e-3, final_rate=0.05), log=LOG,
        flow=parts.FLOW, sampling=dict(describe=True, temperature=0.7),
    )  # fmt: skip
    runs = (pretrain, decoder, stage1, stage2, stage3)
    return ConfigDict(dict(stages={run.name: run for run in runs}))
