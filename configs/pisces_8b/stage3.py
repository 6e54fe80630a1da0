"""Pisces 8B, stage 3, instructions for both tasks.

LLaMA-3.1-8B-Instruct, SigLIP-so400m at 384 px, EVA-CLIP-E-plus at 448 px;
the folders of published weights are in docs/weights.md.
For a TPU slice (docs/scale.md) after stage2.py; never run at this size yet.
Planned as stage 1, whose step it is: peak a device and seconds a step (a prediction): v4-128 17.8 GiB, 9.88 s;
v5p-128 17.6 GiB, 5.92 s; v5e-256 5.0 GiB, 3.45 s; v6e-256 5.0 GiB, 0.74 s.
Where memory is to spare, a quarter faster by the plan: docs/scale.md, "Faster where memory is to spare".

    python -m pisces_jax.train --config=configs/pisces_8b/stage3.py --workdir=runs/pisces_8b
"""

from ml_collections import ConfigDict

from pisces_jax.training.full import PISCES_8B, stage


def get_config() -> ConfigDict:
    return stage(3, PISCES_8B)
