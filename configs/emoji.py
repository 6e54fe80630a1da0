"""Emoji of seven styles, 64 pixels, with names, groups and tags: encoders, decoder and a unified model.

    python -m pisces_jax.train --config=configs/emoji.py --workdir=runs/emoji
    python -m pisces_jax.evaluate --workdir=runs/emoji --task=judge --sets=evaluate --judge=runs/emoji_judge
    python -m pisces_jax.evaluate --workdir=runs/emoji --task=judge --sets=val,new_names --judge=runs/emoji_judge

The model draws from "NAME, STYLE" and from tags with a style; it reads the name, the style, the group and the tags.
The data set is a folder of tar shards, `emoji` below PISCES_DATA; docs/data.md says how to make it. Of `train` every
twentieth picture is kept for evaluation while settings are chosen. `val` (styles of names that are trained on) and
`new_names` (names of which nothing is) are for the final scores alone.

Hardware: two CPU cores. Not run to its end yet; meant for at most 30 minutes.
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

SHARDS = f"{parts.DATA}/emoji"
PICTURES = dict(kind="webdataset", path=f"{SHARDS}/train-*.tar", split="train", val_share=0.05)
HELD_OUT = dict(split="val", crop=0.0)
NAME = "{label}, {style}"
# What is read is cropped, never mirrored: names say "left" and "right".
READ = dict(PICTURES, crop=0.15)
PAIR = dict(READ, recipe="pair", caption_format=NAME)
SOURCES = dict(
    caption=dict(READ, recipe="caption", caption_format="{label}", weight=2.0),
    draw=dict(PICTURES, recipe="draw_caption", caption_format=NAME, weight=3.0),
    draw_tags=dict(PICTURES, recipe="draw_caption", caption_format="{tags}; {style}", weight=0.5),
    group=dict(READ, recipe="question", question_format="which group?", answer_format="{group}", weight=0.5),
    style=dict(READ, recipe="question", question_format="which style?", answer_format="{style}", weight=0.5),
    tags=dict(READ, recipe="question", question_format="which tags?", answer_format="{tags}", weight=0.5),
)
JUDGED = {
    name: dict(SOURCES["draw"], path=f"{SHARDS}/{name}-*.tar", split="all") for name in ("val", "new_names")
}  # fmt: skip
TOKENIZER = dict(tokenizer_vocabulary=1536, tokenizer_sources=SOURCES, examples_per_epoch=10_000)
# The parts of small_parts.py in as many patches, of twice the side.
READER = dict(parts.SHARP_ENCODER, image_size=96, patch_size=16, layers=2)
GENERATION_ENCODER = dict(parts.GENERATION_ENCODER, image_size=64, patch_size=8, output_dim=48)
DECODER = dict(parts.DECODER, size=64, patch_size=16)
ENCODERS = dict(understanding_encoder=READER, generation_encoder=GENERATION_ENCODER, pool=2)
LOG = dict(every=20, evaluate_every=200, checkpoint_every=200, samples_every=400)
LOG_WITHOUT_SAMPLES = dict(LOG, samples_every=0)


def get_config() -> ConfigDict:
    # Narrow vectors with much noise on them: the decoder forgives what a flow gets wrong.
    pretrain = run_config(
        name="pretrain", program="pretrain", steps=1500, batch_size=32, plain_products=True, log=LOG,
        model=dict(
            generation_encoder=GENERATION_ENCODER, pool=2, decoder=DECODER, text_tower=dict(parts.TEXT_TOWER, layers=1)
        ),
        data=dict(TOKENIZER, text_length=32, **parts.train_and_evaluate(HELD_OUT, pair=dict(PAIR, crop=0.0))),
        loss=dict(contrastive=0.03, contrast="softmax", same_text=True, reconstruction=100.0, feature_noise=0.07),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=4e-3, warmup_steps=40, final_rate=0.05, ema=0.99,
            param_groups=(parts.SLOW_READER, *parts.GROUPS),
        ),
    )  # fmt: skip
    reader = run_config(
        name="reader", program="pretrain", steps=1200, batch_size=32, plain_products=True, log=LOG_WITHOUT_SAMPLES,
        model=dict(understanding_encoder=READER, text_tower=dict(parts.TEXT_TOWER, layers=1)),
        data=dict(TOKENIZER, text_length=32, **parts.train_and_evaluate(HELD_OUT, pair=PAIR)),
        loss=dict(words=0.1, contrastive=0.03, contrast="softmax", same_text=True),
        optimizer=dict(
            learning_rate=8e-3, warmup_steps=30, final_rate=0.05, param_groups=(parts.SLOW_READER, *parts.GROUPS)
        ),
    )  # fmt: skip
    stage1 = run_config(
        name="stage1", program="unified", steps=1600, batch_size=16, plain_products=True, log=LOG,
        model=dict(parts.DENOISER_HEAD, language_model=dict(parts.LANGUAGE_MODEL, width=256, heads=4), **ENCODERS),
        init_from=dict(understanding_encoder="reader", generation_encoder="pretrain"), decoder="pretrain",
        data=dict(
            TOKENIZER, row_length=160, rows_per_pool=8, read_slots=18, draw_slots=18,
            **parts.train_and_evaluate(HELD_OUT, **SOURCES), judge=JUDGED,
        ),
        loss=dict(flow_samples=4, fed_noise=0.05), vector_flow=parts.DENOISER_FLOW,
        optimizer=dict(
            learning_rate=3e-3, warmup_steps=30, final_rate=0.05, muon=parts.MUON,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    return ConfigDict(dict(stages=dict(pretrain=pretrain, reader=reader, stage1=stage1)))
