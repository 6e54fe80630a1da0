"""LoRA of LLaMA-3.2-1B on conversations of your own (docs/gpu.md).

    python -m pisces_jax.train --config=configs/lora.py --workdir=runs

Hardware: meant for one card of 24 GB; not run yet. Planned (`plan --topology=rtx4090:1 --mem_fraction=0.9`):
peak 8.41 GiB of the 17.59 GiB that a step may use.
"""

from ml_collections import ConfigDict

from pisces_jax.training.config import run_config
from pisces_jax.weights.sizes import LLAMA_3_2_1B, settings

BASE = "weights/Llama-3.2-1B-Instruct"


def get_config() -> ConfigDict:
    return run_config(
        name="lora",
        steps=500,
        batch_size=16,
        compute_dtype="bfloat16",
        loss=dict(chunk=16_384),
        model=dict(language_model=settings(LLAMA_3_2_1B, remat="full"), lora=dict(rank=16, alpha=32.0)),
        init_from=dict(language_model=BASE),
        param_dtype=dict(language_model="bfloat16"),
        data=dict(
            tokenizer=BASE,
            row_length=2048,
            train=dict(mine=dict(kind="json", path="mine.jsonl", recipe="conversation")),
        ),
        optimizer=dict(learning_rate=2e-4, param_groups=(("language_model/.*", 0.0, 0.0), (".*", 1.0, 0.0))),
    )
