"""Pisces 8B, stage 1 with LoRA: adapters of a frozen language model, for one GPU.

    python -m pisces_jax.train --config=configs/pisces_8b/stage1_lora.py --workdir=runs/pisces_8b

As stage1.py, with the language model in bfloat16 as it was published; adapters, projectors and the vector head train.
docs/gpu.md says how adapters go to PEFT and back, and how they are merged.

Hardware: meant for one H100 of 80 GB; not run yet. Planned (`plan --topology=h100:1`):
peak 45.39 GiB of the 55.32 GiB that a step may use.
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
        batch_size=64,
        optimizer=dict(
            learning_rate=2e-4,
            grad_accum_steps=8,
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
