"""The shapes world, from nothing: every stage of the method in a few minutes on two CPU cores.

make demo
python -m pisces_jax.train --config=configs/shapes.py --workdir=runs/shapes          # all stages in order
python -m pisces_jax.train --config=configs/shapes.py:stage1 --workdir=runs/shapes   # one of them
"""

from typing import Any

from ml_collections import ConfigDict

from pisces_jax.training.small import picture_run, rates, shapes_data, unified_run

SIZE = 32
EXAMPLES = 16_000  # of each task and stage: about as many as a stage sees of its commonest
HEADS = dict(heads=6, kv_heads=3, head_dim=32)
LOG = dict(every=25, evaluate_every=200, evaluate_batches=3, checkpoint_every=400, samples_every=750)


def data(*slots: int, **weights: Any) -> dict[str, Any]:
    return shapes_data(SIZE, EXAMPLES, *slots, **weights)


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    stages = (
        # What sets shapes apart, by their names alone: where colours tell pictures apart, no shape is learned.
        picture_run(
            "pretrain", "pretrain", SIZE, data(most_objects=1, pair_shapes=1.0), steps=360, batch_size=32, sharp=True,
            loss=dict(contrast="softmax", same_text=True), optimizer=rates(5e-3, 30), log=LOG,
        ),
        picture_run(
            "decoder", "decoder", SIZE, data(pair=1.0), steps=200, sharp=True, loss=dict(feature_noise=0.05),
            optimizer=rates(3e-3, 20, average=0.99), log=LOG,
        ),
        # Short captions, and detailed ones of single objects: what a word looks like, before what goes with what.
        unified_run(
            "stage1", "", SIZE, data(11, 29, most_objects=1, caption=0.7, draw_caption=0.2, draw_details=1.5),
            steps=150, sharp=True, language_model=HEADS, optimizer=rates(3e-3, 30, 1.0), log=LOG,
        ),
        unified_run(
            "stage2", "stage1", SIZE,
            data(
                10, 15, most_objects=2, describe=0.7, conversation=0.55, draw_details=1.25, draw_described=0.7
            ),
            steps=700, sharp=True, language_model=HEADS, optimizer=rates(3e-3, 0, 0.8), log=LOG,
        ),
        unified_run(
            "stage3", "stage2", SIZE,
            data(8, 13, describe=0.35, conversation=1.0, draw_details=0.25, draw_described=1.9),
            steps=780, sharp=True, decode=True, language_model=HEADS, optimizer=rates(2.4e-3, 0),
            sampling=dict(describe=True, temperature=0.7), log=LOG,
        ),
    )  # fmt: skip
    runs = {config.name: config for config in stages}
    return runs[stage] if stage else ConfigDict(dict(stages=runs))
