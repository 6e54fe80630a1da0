"""Pisces 8B, stage 1 in full on one GPU: parameters and moments in bfloat16, rounded stochastically.

    python -m pisces_jax.train --config=configs/pisces_8b/stage1_1gpu.py --workdir=runs/pisces_8b

As stage1.py, without float32 masters: 8 bytes a parameter for the language model (itself, two moments, gradient) in
place of 16. Changes smaller than bfloat16 resolves are kept in the mean (docs/gpu.md).

Hardware: meant for one H200 of 141 GB; not run yet. Planned (`plan --topology=h200:1`):
peak 99.34 GiB of the 101.75 GiB that a step may use.
"""

import stage1
from ml_collections import ConfigDict

from pisces_jax.training.config import merge


def get_config() -> ConfigDict:
    config = stage1.get_config()
    config.param_dtype.language_model = "bfloat16"
    changes = dict(
        name="stage1_1gpu",
        batch_size=64,
        optimizer=dict(grad_accum_steps=8, mu_dtype="bfloat16", rounding="stochastic"),
    )
    merge(config, changes)
    return config
