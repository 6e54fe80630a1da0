"""The shapes world with a flow of each vector, so that prompts can be drawn directly; in several wordings.

    python -m pisces_jax.demo --config=configs/shapes_flow.py --workdir=runs/shapes_flow

The language model makes one vector after the other from noise (`model.denoiser`). The encoder for drawing gives 32
numbers for a vector in place of 96, and learns with noise on them. The encoder for reading is that of `shapes.py`.
A picture is sampled: another seed, another picture.

Hardware: two cores of an AMD EPYC. Time: 2 h 28 min for all stages, with other work beside them. Result, seed 0, 300
pictures by GenEval's rules: 0.363 drawn directly (0.342 in wordings that training never uses, 240 pictures), 0.403
described first; reading 0.824 (1,000 questions). Without the last stage, so 61 min earlier, it was 0.23 drawn directly,
on other prompts. Sampling settings were chosen on prompts of another seed (docs/small_runs.md).
"""

import shapes
import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

GENERATION_ENCODER = dict(parts.GENERATION_ENCODER, output_dim=32)
ENCODERS = dict(shapes.ENCODERS, generation_encoder=GENERATION_ENCODER)
MODEL = dict(parts.DENOISER_HEAD, language_model=shapes.LANGUAGE_MODEL, **ENCODERS)
FROZEN = dict(understanding_encoder="reader", generation_encoder="autoencoder")
OPTIMIZER, ROWS, LOG = shapes.OPTIMIZER, shapes.ROWS, shapes.LOG
STAGE = dict(
    program="unified", batch_size=16, decoder="autoencoder", loss=dict(flow_samples=4, fed_noise=0.05),
    vector_flow=parts.DENOISER_FLOW, plain_products=True,
)  # fmt: skip
ONE, FOUR, TWO_WORDED, FOUR_WORDED = shapes.ONE, shapes.FOUR, shapes.TWO_WORDED, shapes.FOUR_WORDED
# Narrow vectors with much noise on them: the decoder forgives what a flow gets wrong.
AUTOENCODER = dict(
    program="pretrain", batch_size=32, plain_products=True, flow=parts.FLOW,
    model=dict(
        generation_encoder=GENERATION_ENCODER, pool=2, decoder=parts.DECODER,
        text_tower=dict(parts.TEXT_TOWER, layers=1),
    ),
    log=dict(LOG, every=50, samples_every=0),
)  # fmt: skip


def get_config() -> ConfigDict:
    reader = shapes.get_config().stages.reader
    # Single objects, by the names of their shapes; then all pictures.
    pretrain = run_config(
        **AUTOENCODER, name="pretrain", steps=360,
        data=dict(shapes.TOKENIZER, examples_per_epoch=32_000, text_length=8, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair=dict(ONE, task="pair_shapes", num_examples=32_000)
        )),
        loss=dict(contrastive=0.1, contrast="softmax", same_text=True, reconstruction=100.0, feature_noise=0.1),
        optimizer=dict(
            learning_rate=5e-3, warmup_steps=30, final_rate=0.3, ema=0.99,
            param_groups=(parts.SLOW_READER, *parts.GROUPS),
        ),
    )  # fmt: skip
    autoencoder = run_config(
        **AUTOENCODER, name="autoencoder", steps=1200,
        init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
        data=dict(shapes.TOKENIZER, examples_per_epoch=32_000, text_length=8, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT, pair=dict(FOUR, task="pair_shapes", num_examples=32_000)
        )),
        loss=dict(contrastive=0.01, contrast="softmax", same_text=True, reconstruction=100.0, feature_noise=0.1),
        optimizer=dict(
            learning_rate=4e-3, warmup_steps=30, final_rate=0.05, ema=0.99,
            param_groups=(parts.SLOW_READER, *parts.GROUPS),
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
        init_from=FROZEN | dict.fromkeys(parts.DENOISER_TRAINED, "stage1"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour",), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, warmup_steps=20, final_rate=1.0), log=shapes.LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    questions = run_config(
        **STAGE, name="questions", steps=200, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.DENOISER_TRAINED, "colours"),
        data=dict(ROWS, read_slots=29, draw_slots=1, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR, task="conversation", question_kinds=("colour", "existence"), num_examples=16_000),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=shapes.LOG_WITHOUT_SAMPLES,
    )  # fmt: skip
    # Detailed captions, prompts, and questions of all kinds.
    stage2 = run_config(
        **STAGE, name="stage2", steps=800, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.DENOISER_TRAINED, "questions"),
        data=dict(ROWS, read_slots=10, draw_slots=17, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(TWO_WORDED, task="describe", weight=0.4, num_examples=5120),
            conversation=dict(TWO_WORDED, task="conversation", weight=0.65, num_examples=8320),
            draw_details=dict(TWO_WORDED, task="draw_details", weight=0.6, num_examples=7680),
            draw_prompt=dict(TWO_WORDED, task="draw_prompt", weight=1.25, num_examples=16_000),
            draw_described=dict(TWO_WORDED, task="draw_described", weight=0.6, num_examples=7680),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.8), log=LOG,
    )  # fmt: skip
    # Prompts, drawn directly and after a description.
    stage3 = run_config(
        **STAGE, name="stage3", steps=1600, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.DENOISER_TRAINED, "stage2"),
        data=dict(ROWS, read_slots=6, draw_slots=18, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            describe=dict(FOUR_WORDED, task="describe", weight=0.1, num_examples=1000),
            conversation=dict(FOUR_WORDED, task="conversation", weight=0.7, num_examples=7000),
            draw_prompt=dict(FOUR_WORDED, task="draw_prompt", weight=1.6, num_examples=16_000),
            draw_described=dict(FOUR_WORDED, task="draw_described", weight=1.2, num_examples=12_000),
        )),
        optimizer=dict(OPTIMIZER, learning_rate=2.4e-3, final_rate=0.05), log=LOG,
        sampling=dict(describe=False, temperature=0.7),
    )  # fmt: skip
    # Prompts again, most of them drawn directly: shapes become sharp.
    stage4 = run_config(
        **STAGE, name="stage4", steps=2600, model=MODEL,
        init_from=FROZEN | dict.fromkeys(parts.DENOISER_TRAINED, "stage3"),
        data=dict(ROWS, read_slots=3, draw_slots=32, **parts.train_and_evaluate(
            parts.SHAPES_HELD_OUT,
            conversation=dict(FOUR_WORDED, task="conversation", weight=0.25, num_examples=2500),
            draw_prompt=dict(FOUR_WORDED, task="draw_prompt", weight=3.0, num_examples=30_000),
            draw_described=dict(FOUR_WORDED, task="draw_described", weight=0.3, num_examples=3000),
        )),
        optimizer=dict(OPTIMIZER, final_rate=0.03, ema=0.995), log=dict(LOG, samples_every=0),
        sampling=dict(describe=False, temperature=0.7),
    )  # fmt: skip
    runs = (pretrain, autoencoder, reader, stage1, colours, questions, stage2, stage3, stage4)
    return ConfigDict(dict(stages={run.name: run for run in runs}))
