"""The shapes world, the full small run: under two hours on two CPU cores.

The stages of configs/shapes.py with a language model of five layers and 1.9 million parameters in place of four and
1.2, up to four objects from stage 2 on in every picture that no prompt asks for, more questions, and six times the
steps: what it draws and reads is in README.md. An interrupted run is continued by the same command. Not run on a
GPU yet.

    python -m pisces_jax.demo --config=configs/shapes_full.py --workdir=runs/shapes_full
"""

from typing import Any

from ml_collections import ConfigDict

from pisces_jax.training.small import SHARP, picture_run, rates, shapes_data, unified_run

SIZE = 32
EXAMPLES = 100_000  # of each task and stage
LOG = dict(every=50, evaluate_every=500, evaluate_batches=6, checkpoint_every=500, samples_every=1500)
LANGUAGE_MODEL = dict(layers=5, heads=6, kv_heads=3, head_dim=32, mlp_hidden=384)


def data(*slots: int, **weights: Any) -> dict[str, Any]:
    return shapes_data(SIZE, EXAMPLES, *slots, **weights)


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    stages = (
        # What sets shapes apart, by their names alone: where colours tell pictures apart, no shape is learned.
        picture_run(
            "pretrain", "pretrain", SIZE, data(most_objects=1, pair_shapes=1.0), steps=1200, batch_size=32,
            reader=SHARP, loss=dict(contrast="softmax", same_text=True), optimizer=rates(5e-3, 30), log=LOG,
        ),
        picture_run(
            "decoder", "decoder", SIZE, data(pair=1.0), steps=600, reader=SHARP, loss=dict(feature_noise=0.05),
            optimizer=rates(3e-3, 20, ema=0.99), log=LOG,
        ),
        unified_run(
            "stage1", "", SIZE, data(11, 29, most_objects=1, caption=0.7, draw_caption=0.2, draw_details=1.5),
            steps=200, reader=SHARP, optimizer=rates(3e-3, 30, 1.0), language_model=LANGUAGE_MODEL, log=LOG,
        ),
        unified_run(
            "stage2", "stage1", SIZE,
            data(9, 11, describe=0.6, conversation=1.0, draw_details=1.2, draw_described=0.8),
            steps=3400, reader=SHARP, optimizer=rates(3e-3, 0, 0.8), language_model=LANGUAGE_MODEL, log=LOG,
        ),
        unified_run(
            "stage3", "stage2", SIZE,
            data(8, 10, describe=0.3, conversation=1.3, draw_details=0.3, draw_described=1.7),
            steps=6400, reader=SHARP, decode=True, optimizer=rates(2.4e-3, 0),
            sampling=dict(describe=True, temperature=0.7), language_model=LANGUAGE_MODEL, log=LOG,
        ),
    )  # fmt: skip
    runs = {config.name: config for config in stages}
    return runs[stage] if stage else ConfigDict(dict(stages=runs))
