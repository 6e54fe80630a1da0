"""A mixture: CIFAR-10 (TensorFlow Datasets), OpenMoji (image folder) and the shapes world, 4 : 3 : 3, on two CPU cores.

The two real sets lie below the folder that PISCES_DATA names (docs/data.md says where they are from).

    python -m pisces_jax.train --config=configs/mixed_small.py --workdir=runs/mixed
    python -m pisces_jax.data inspect --config=configs/mixed_small.py --out=rows.html
"""

import os
from collections.abc import Sequence

from ml_collections import ConfigDict

from pisces_jax.training.small import picture_run, unified_run

SIZE = 32
DATA = os.environ.get("PISCES_DATA", "../shared/data")
LOG = dict(every=20, evaluate_every=100, checkpoint_every=100, samples_every=0)


def data(*tasks: str, **settings: object) -> dict:
    """Every task from all three sources, 4 : 3 : 3; `drop` leaves some drawn pictures without their caption."""

    def sources(cifar: str, emoji: str, shapes: dict, tasks: Sequence[str] = tasks) -> dict:
        each = {}
        for task in tasks:
            drop = dict(drop=0.1) if task.startswith("draw") else {}
            photographs = dict(kind="tfds", dataset="cifar10", data_dir=f"{DATA}/tfds", split=cifar, weight=4)
            named = dict(kind="image_folder", path=f"{DATA}/openmoji64", split=emoji, weight=3)
            each[f"cifar10_{task}"] = dict(
                photographs, recipe=task, caption_format=("a photo of a {label}", "a {label}"), **drop
            )
            each[f"openmoji_{task}"] = dict(named, recipe=task, caption_format="{text}", **drop)
            each[f"shapes_{task}"] = dict(kind="shapes", task=task, size=SIZE, weight=3, **shapes)
        return each

    made = dict(split="train", num_examples=20_000)
    return dict(
        tokenizer_vocabulary=1024,
        tokenizer_sources=sources("train", "train", made, ("caption", "draw_caption")),
        train=sources("train", "train", made),
        evaluate=sources("test[:256]", "val", dict(split="val", num_examples=64)),
        examples_per_epoch=20_000,
        **settings,
    )


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    rate = dict(learning_rate=1e-3, warmup_steps=30)
    stages = (
        picture_run("pretrain", "pretrain", SIZE, data("pair"), steps=600, log=LOG, optimizer=rate),
        picture_run("decoder", "decoder", SIZE, data("pair"), steps=200, log=LOG, optimizer=dict(rate, ema=0.99)),
        unified_run(
            "stage1", "", SIZE, data("caption", "draw_caption", rows=4, row_length=256, read_slots=15, draw_slots=15),
            steps=300, log=LOG, optimizer=rate,
        ),
    )  # fmt: skip
    runs = {config.name: config for config in stages}
    return runs[stage] if stage else ConfigDict(dict(stages=runs))
