"""Pisces 1B, stage 2, detailed captions.

LLaMA-3.2-1B-Instruct, SigLIP-so400m at 384 px, CLIP ViT-L/14 at 336 px;
the folders of published weights are in docs/weights.md.
For one host of 8 GPUs after stage1.py; never run at this size yet.

    python -m pisces_jax.train --config=configs/pisces_1b/stage2.py --workdir=runs/pisces_1b
"""

from ml_collections import ConfigDict

from pisces_jax.training.full import PISCES_1B, stage


def get_config() -> ConfigDict:
    return stage(2, PISCES_1B, batch_size=128)
