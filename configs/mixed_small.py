"""A mixture of CIFAR-10, OpenMoji and the shapes world, 4 : 3 : 3: encoders, decoder and a unified model.

    python -m pisces_jax.train --config=configs/mixed_small.py --workdir=runs/mixed
    python -m pisces_jax.data inspect --config=configs/mixed_small.py --out=rows.html

The two real data sets are `tfds` and `openmoji64` below PISCES_DATA (docs/data.md).

Hardware: two CPU cores. Not run to its end yet. Its rows use 95.3 % of their tokens (docs/data.md).
"""

import small_parts as parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

CIFAR10 = dict(
    kind="tfds",
    dataset="cifar10",
    data_dir=f"{parts.DATA}/tfds",
    split="train",
    weight=4,
    caption_format=("a photo of a {label}", "a {label}"),
)
OPENMOJI = dict(kind="image_folder", path=f"{parts.DATA}/openmoji64", split="train", weight=3, caption_format="{text}")
SHAPES = dict(kind="shapes", split="train", size=32, weight=3, num_examples=20_000)
HELD_OUT = dict(
    tfds=dict(split="test[:256]"), image_folder=dict(split="val"), shapes=dict(split="val", num_examples=64)
)
PAIRS = dict(
    cifar10_pair=dict(CIFAR10, recipe="pair"),
    openmoji_pair=dict(OPENMOJI, recipe="pair"),
    shapes_pair=dict(SHAPES, task="pair"),
)
READ_AND_DRAW = dict(
    cifar10_caption=dict(CIFAR10, recipe="caption"),
    openmoji_caption=dict(OPENMOJI, recipe="caption"),
    shapes_caption=dict(SHAPES, task="caption"),
    # A tenth of these pictures are drawn without their caption.
    cifar10_draw_caption=dict(CIFAR10, recipe="draw_caption", drop=0.1),
    openmoji_draw_caption=dict(OPENMOJI, recipe="draw_caption", drop=0.1),
    shapes_draw_caption=dict(SHAPES, task="draw_caption"),
)
TOKENIZER = dict(tokenizer_vocabulary=1024, tokenizer_sources=READ_AND_DRAW, examples_per_epoch=20_000)
ENCODERS = dict(understanding_encoder=parts.UNDERSTANDING_ENCODER, generation_encoder=parts.GENERATION_ENCODER, pool=2)
LOG = dict(every=20, evaluate_every=100, checkpoint_every=100)


def held_out(sources: dict) -> dict:
    return {name: source | HELD_OUT[source["kind"]] for name, source in sources.items()}


def get_config() -> ConfigDict:
    pretrain = run_config(
        name="pretrain", program="pretrain", steps=600, batch_size=16, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER, text_tower=parts.TEXT_TOWER),
        data=dict(TOKENIZER, train=PAIRS, evaluate=held_out(PAIRS)),
        loss=dict(contrastive=0.1, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(learning_rate=1e-3, warmup_steps=30, param_groups=parts.GROUPS),
    )  # fmt: skip
    decoder = run_config(
        name="decoder", program="decoder", steps=200, batch_size=16, plain_products=True, log=LOG,
        model=dict(ENCODERS, decoder=parts.DECODER),
        init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
        data=dict(TOKENIZER, train=PAIRS, evaluate=held_out(PAIRS)),
        loss=dict(contrastive=0.1, reconstruction=100.0, feature_noise=0.01),
        flow=parts.FLOW,
        optimizer=dict(
            learning_rate=1e-3, warmup_steps=30, ema=0.99,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    stage1 = run_config(
        name="stage1", program="unified", steps=300, batch_size=8, plain_products=True, log=LOG,
        model=dict(parts.UNIFIED, **ENCODERS),
        init_from=dict(understanding_encoder="pretrain", generation_encoder="pretrain"), decoder="decoder",
        data=dict(
            TOKENIZER, row_length=256, rows_per_pool=4, read_slots=15, draw_slots=15,
            train=READ_AND_DRAW, evaluate=held_out(READ_AND_DRAW),
        ),
        loss=dict(flow_samples=4), vector_flow=parts.VECTOR_FLOW,
        optimizer=dict(
            learning_rate=1e-3, warmup_steps=30, muon=parts.MUON,
            param_groups=(parts.FROZEN_GENERATION_ENCODER, *parts.GROUPS),
        ),
    )  # fmt: skip
    return ConfigDict(dict(stages=dict(pretrain=pretrain, decoder=decoder, stage1=stage1)))
