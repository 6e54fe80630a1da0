"""Pisces 1B, stage 1 with LoRA: adapters of a frozen language model, for one small GPU.

    python -m pisces_jax.train --config=configs/pisces_1b/stage1_lora.py --workdir=runs/pisces_1b

As stage1.py, with the language model in bfloat16 as it was published; adapters, projectors and the vector head train.

Hardware: meant for one card of 24 GB; not run yet. Planned (`plan --topology=rtx4090:1 --mem_fraction=0.9`):
peak 12.63 GiB of the 17.59 GiB that a step may use.
"""

import parts
import stage1
from ml_collections import ConfigDict

from pisces_jax.training.config import merge


def get_config() -> ConfigDict:
    config = stage1.get_config()
    config.model.lora = dict(rank=64, alpha=128.0)
    config.param_dtype.language_model = "bfloat16"
    changes = dict(
        name="stage1_lora",
        batch_size=128,
        optimizer=dict(
            learning_rate=2e-4,
            grad_accum_steps=16,
            param_groups=(
                ("(language_model|understanding_encoder|generation_encoder)/.*", 0.0, 0.0),
                ("lora/.*", 1.0, 0.0),
                parts.NO_DECAY,
                (".*", 1.0, 0.05),
            ),
        ),
    )
    merge(config, changes)
    return config
