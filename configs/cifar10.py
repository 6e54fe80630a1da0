"""CIFAR-10 photographs of 32 pixels with prompts that name their class: encoders, decoder and a unified model.

    python -m pisces_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
    python -m pisces_jax.evaluate --workdir=runs/cifar10 --task=pictures
    python -m pisces_jax.evaluate --workdir=runs/cifar10 --task=judge --sets=evaluate
    python -m pisces_jax.evaluate --workdir=runs/cifar10 --task=judge --sets=test

The model draws one of ten classes ("a photo of a cat") and reads the class, as a caption and when asked.

The data set is a prepared folder of TensorFlow Datasets, read without TensorFlow: `tfds` below PISCES_DATA
(docs/data.md). The last twentieth of `train` is for choosing settings, `test` for the final scores alone.

Hardware: two CPU cores. Not run to its end since its encoder for reading was changed; meant for at most 30 minutes.
With linear patches, seed 0, in 12 min 27 s: reading 0.305 exact (docs/small_runs.md, "Real pictures").
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

PICTURES = dict(
    kind="tfds",
    dataset="cifar10",
    data_dir=f"{parts.DATA}/tfds",
    split="train[:95%]",
    caption_format="a photo of a {label}",
    # Only what is read is mirrored and cropped, other pictures in every epoch.
    flip=True,
    crop=0.2,
)
HELD_OUT = dict(split="train[95%:]", flip=False, crop=0.0)
PAIR = dict(PICTURES, recipe="pair")
SOURCES = dict(
    caption=dict(PICTURES, recipe="caption"),
    draw_caption=dict(PICTURES, recipe="draw_caption"),
    question=dict(PICTURES, recipe="question", question_format="what is it?", answer_format="{label}"),
)
JUDGED = dict(test=dict(SOURCES["draw_caption"], split="test"))
TOKENIZER = dict(tokenizer_vocabulary=384, tokenizer_sources=SOURCES, text_length=16)
READER = dict(parts.SHARP_ENCODER, layers=2)
ENCODERS = dict(understanding_encoder=READER, generation_encoder=parts.GENERATION_ENCODER, pool=2)
LOG = dict(every=20, evaluate_every=100, checkpoint_every=200, samples_every=200)


def get_config() -> ConfigDict:
    pretrain = run_config(
        name="pretrain", program="pretrain", steps=900, batch_size=16, plain_products=True, log=LOG,
        model=dict(
            generation_encoder=parts.GENERATION_ENCODER, pool=2, decoder=parts.DECODER, text_tower=parts.TEXT_TOWER
        ),
        data=dict(TOKENIZER, **parts.train_and_evaluate(HELD_OUT, pair=dict(PAIR, crop=0.0))),
        loss=dict(contrastive=0.1, same_text=True, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(learning_rate=4e-3, warmup_steps=40, final_rate=0.05, param_groups=parts.GROUPS),
    )  # fmt: skip
    # Mirrored and cropped pictures with words as labels: the class, whatever else is in the picture.
    reader = run_config(
        name="reader", program="pretrain", steps=1800, batch_size=32, plain_products=True,
        log=dict(LOG, samples_every=0),
        model=dict(understanding_encoder=READER, text_tower=dict(parts.TEXT_TOWER, layers=1)),
        data=dict(TOKENIZER, **parts.train_and_evaluate(HELD_OUT, pair=PAIR)),
        loss=dict(words=0.1, contrastive=0.03, contrast="softmax", same_text=True),
        optimizer=dict(
            learning_rate=8e-3, warmup_steps=30, final_rate=0.05, param_groups=(parts.SLOW_READER, *parts.GROUPS)
        ),
    )  # fmt: skip
    decoder = run_config(
        name="decoder", program="decoder", steps=300, batch_size=16, plain_products=True, log=LOG,
        model=dict(generation_encoder=parts.GENERATION_ENCODER, pool=2, decoder=parts.DECODER),
        init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
        data=dict(TOKENIZER, **parts.train_and_evaluate(HELD_OUT, pair=dict(PAIR, crop=0.0))),
        loss=dict(reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=2e-3, warmup_steps=20, ema=0.99,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    stage1 = run_config(
        name="stage1", program="unified", steps=500, batch_size=16, plain_products=True, log=LOG,
        model=dict(parts.UNIFIED, **ENCODERS),
        init_from=dict(understanding_encoder="reader", generation_encoder="pretrain"), decoder="decoder",
        data=dict(
            TOKENIZER, row_length=160, rows_per_pool=8, read_slots=15, draw_slots=18,
            **parts.train_and_evaluate(HELD_OUT, **SOURCES), judge=JUDGED,
        ),
        loss=dict(flow_samples=4), vector_flow=parts.VECTOR_FLOW,
        optimizer=dict(
            learning_rate=3e-3, warmup_steps=30, final_rate=0.05, muon=parts.MUON,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    return ConfigDict(dict(stages=dict(pretrain=pretrain, reader=reader, decoder=decoder, stage1=stage1)))
