"""OpenMoji, 1,653 named emoji of 64 pixels, from nothing on two CPU cores: encoders, decoder and unified model.

An image folder with metadata.jsonl; a tenth of it, chosen by name, is held out (see docs/data.md for where it is from).

    python -m pisces_jax.train --config=configs/openmoji.py --workdir=runs/openmoji
    python -m pisces_jax.evaluate --workdir=runs/openmoji --task=pictures
"""

import os

from ml_collections import ConfigDict

from pisces_jax.training.small import named_picture_stages

SIZE = 64
FOLDER = os.environ.get("PISCES_DATA", "../shared/data") + "/openmoji64"
LOG = dict(every=20, evaluate_every=100, checkpoint_every=200, samples_every=200)


def data(*recipes: str) -> dict:
    def sources(split: str, *recipes: str) -> dict:
        common = dict(
            kind="image_folder", path=FOLDER, split=split, caption_format="{text}", detailed_format="{text}: {tags}"
        )
        return {recipe: dict(common, recipe=recipe) for recipe in recipes}

    return dict(
        tokenizer_vocabulary=1024, tokenizer_sources=sources("train", "caption", "describe", "draw_caption"),
        train=sources("train", *recipes), evaluate=sources("val", *recipes),
    )  # fmt: skip


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    return named_picture_stages(SIZE, data, LOG, stage)
