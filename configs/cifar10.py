"""CIFAR-10 photographs of 32 pixels with prompts that name their class: encoders, decoder and a unified model.

    python -m pisces_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
    python -m pisces_jax.evaluate --workdir=runs/cifar10 --task=pictures

The data set is a prepared folder of TensorFlow Datasets, read without TensorFlow: `tfds` below PISCES_DATA
(docs/data.md).

Hardware: two CPU cores. Time: 12 min 27 s, with other work beside it. Result of seed 0 on 128 unseen pictures: mean
square error of reconstruction 0.00014, reading 0.305 exact, 0.398 of the drawn pictures read as asked
(docs/small_runs.md, "Real pictures").
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

PICTURES = dict(
    kind="tfds",
    dataset="cifar10",
    data_dir=f"{parts.DATA}/tfds",
    split="train",
    caption_format="a photo of a {label}",
)
HELD_OUT = dict(split="test")
PAIR = dict(PICTURES, recipe="pair")
CAPTION = dict(PICTURES, recipe="caption")
DRAW = dict(PICTURES, recipe="draw_caption")
TOKENIZER = dict(tokenizer_vocabulary=384, tokenizer_sources=dict(caption=CAPTION, draw_caption=DRAW), text_length=16)
ENCODERS = dict(understanding_encoder=parts.UNDERSTANDING_ENCODER, generation_encoder=parts.GENERATION_ENCODER, pool=2)
LOG = dict(every=20, evaluate_every=100, checkpoint_every=200, samples_every=200)


def get_config() -> ConfigDict:
    pretrain = run_config(
        name="pretrain", program="pretrain", steps=900, batch_size=16, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER, text_tower=parts.TEXT_TOWER),
        data=dict(TOKENIZER, **parts.train_and_evaluate(HELD_OUT, pair=PAIR)),
        loss=dict(contrastive=0.1, same_text=True, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(learning_rate=4e-3, warmup_steps=40, final_rate=0.05, param_groups=parts.GROUPS),
    )  # fmt: skip
    decoder = run_config(
        name="decoder", program="decoder", steps=300, batch_size=16, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER),
        init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
        data=dict(TOKENIZER, **parts.train_and_evaluate(HELD_OUT, pair=PAIR)),
        loss=dict(contrastive=0.1, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=2e-3, warmup_steps=20, ema=0.99,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    stage1 = run_config(
        name="stage1", program="unified", steps=500, batch_size=16, plain_products=True, log=LOG,
        model=dict(parts.UNIFIED, **ENCODERS),
        init_from=dict(understanding_encoder="pretrain", generation_encoder="pretrain"), decoder="decoder",
        data=dict(
            TOKENIZER, row_length=160, rows_per_pool=8, read_slots=15, draw_slots=18,
            **parts.train_and_evaluate(HELD_OUT, caption=CAPTION, draw_caption=DRAW),
        ),
        loss=dict(vectors=200.0),  # a vector's error is about a hundredth of a token's: brought to the same size
        optimizer=dict(
            learning_rate=3e-3, warmup_steps=30, final_rate=0.05, muon=parts.MUON,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    return ConfigDict(dict(stages=dict(pretrain=pretrain, decoder=decoder, stage1=stage1)))
