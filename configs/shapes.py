"""The shapes world, from nothing: every stage of the method in a few minutes on two CPU cores.

make demo
python -m pisces_jax.train --config=configs/shapes.py --workdir=runs/shapes          # all stages in order
python -m pisces_jax.train --config=configs/shapes.py:stage1 --workdir=runs/shapes   # one of them
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.training.small import SHARP, picture_run, rates, shapes_data, unified_run

SIZE = 32
EXAMPLES = 16_000  # of the commonest task of a stage, which sees none more than twice
READER = dict(SHARP, layers=1)  # what a vector shows stays where it is
LOG = dict(every=25, evaluate_every=200, evaluate_batches=3, checkpoint_every=400, samples_every=750)


def data(*slots: int, **weights: Any) -> dict[str, Any]:
    return shapes_data(SIZE, EXAMPLES, *slots, **weights)


def unified(name: str, start: str, data: Mapping[str, Any], steps: int, **changes: Any) -> ConfigDict:
    return unified_run(
        name, start, SIZE, data, steps=steps, reader=READER, frozen_reader="reader",
        language_model=dict(heads=6, kv_heads=3, head_dim=32), **{"log": LOG, **changes},
    )  # fmt: skip


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    no_samples = dict(LOG, samples_every=0)  # of what draws nothing
    stages = (
        # Features that are easily predicted: of single objects, by the names of their shapes.
        picture_run(
            "pretrain", "pretrain", SIZE, data(most_objects=1, pair_shapes=1.0) | dict(text_length=8), steps=360,
            batch_size=32, reader=READER, only="generation", loss=dict(contrast="softmax", same_text=True),
            optimizer=rates(5e-3, 30), log=LOG,
        ),
        # Contrast stops at colours where these tell pictures apart; words as labels teach shapes, and where they are.
        picture_run(
            "reader", "pretrain", SIZE, shapes_data(SIZE, 2 * EXAMPLES, pair=1.0) | dict(text_length=40),
            steps=1400, batch_size=32, reader=READER, only="understanding", text_layers=1,
            loss=dict(words=0.1, contrastive=0.01), optimizer=rates(8e-3, 30), log=no_samples,
        ),
        picture_run(
            "decoder", "decoder", SIZE, data(pair=1.0), steps=200, reader=READER, loss=dict(feature_noise=0.05),
            optimizer=rates(3e-3, 20, ema=0.99), log=LOG,
        ),
        # Short captions, and detailed ones of single objects: what a word looks like, before what goes with what.
        unified(
            "stage1", "", data(11, 29, most_objects=1, caption=0.7, draw_caption=0.2, draw_details=1.5), 150,
            optimizer=rates(3e-3, 30, 1.0),
        ),
        # To find what is asked for: by its colour first, as "is there a red circle?" is noise until it can be found.
        unified(
            "colours", "stage1", data(29, 1, conversation=1.0, question_kinds=("colour",)), 200,
            optimizer=rates(3e-3, 20, 1.0), log=no_samples,
        ),
        unified(
            "questions", "colours", data(29, 1, conversation=1.0, question_kinds=("colour", "existence")), 200,
            optimizer=rates(3e-3, 0, 0.8), log=no_samples,
        ),
        unified(
            "stage2", "questions",
            data(10, 15, most_objects=2, describe=0.5, conversation=0.65, draw_details=1.25, draw_described=0.8),
            850, optimizer=rates(3e-3, 0, 0.8),
        ),
        unified(
            "stage3", "stage2", data(6, 16, describe=0.2, conversation=0.7, draw_details=0.3, draw_described=2.2),
            1050, decode=True, optimizer=rates(2.4e-3, 0), sampling=dict(describe=True, temperature=0.7),
        ),
    )  # fmt: skip
    runs = {config.name: config for config in stages}
    return runs[stage] if stage else ConfigDict(dict(stages=runs))
