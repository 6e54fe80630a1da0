"""CIFAR-10 photographs, class-named prompts, from nothing on two CPU cores: encoders, decoder and unified model.

The prepared TensorFlow Datasets folder is read without TensorFlow; name yours with DATA_DIR (see docs/data.md).

    python -m pisces_jax.train --config=configs/cifar10.py --workdir=runs/cifar10
    python -m pisces_jax.evaluate --workdir=runs/cifar10 --task=pictures
"""

import os

from ml_collections import ConfigDict

from pisces_jax.training.small import named_picture_stages

SIZE = 32
DATA_DIR = os.environ.get("PISCES_DATA", "../shared/data") + "/tfds"
LOG = dict(every=20, evaluate_every=100, checkpoint_every=200, samples_every=200)


def data(*recipes: str) -> dict:
    def sources(split: str, *recipes: str) -> dict:
        common = dict(
            kind="tfds", dataset="cifar10", data_dir=DATA_DIR, split=split, caption_format="a photo of a {label}"
        )
        return {recipe: dict(common, recipe=recipe) for recipe in recipes}

    return dict(
        tokenizer_vocabulary=384, tokenizer_sources=sources("train", "caption", "draw_caption"),
        train=sources("train", *recipes), evaluate=sources("test", *recipes), text_length=16,
    )  # fmt: skip


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    return named_picture_stages(SIZE, data, LOG, stage)
