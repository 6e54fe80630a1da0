"""LLaMA-3.1-8B on packed rows of text alone: the unified step without pictures, to compare with MaxText.

    python -m pisces_jax.plan --config=configs/text_8b.py --topology=v5p:4x4x4 --vocab_size=128256

Hardware: planned for TPU slices, not run yet. 256 rows of 2,048 tokens are 4 rows per device on the 64 chips of
v5p:4x4x4, mesh fsdp 64. By the plan a device needs 5.86 GiB and sends 45.6 GB per step; MaxText's needs 8.57 GiB and
sends 58.2 GB (docs/scale.md, "Against MaxText").
"""

from ml_collections import ConfigDict

from pisces_jax.training.config import run_config
from pisces_jax.weights.sizes import LLAMA_3_1_8B, settings


def get_config() -> ConfigDict:
    return run_config(
        name="text_8b",
        program="unified",
        steps=1000,
        batch_size=256,
        compute_dtype="bfloat16",
        model=dict(language_model=settings(LLAMA_3_1_8B, remat="full")),
        data=dict(
            row_length=2048,
            rows_per_pool=1,
            train=dict(texts=dict(kind="json", path="data/text.jsonl", recipe="conversation")),
        ),
        loss=dict(chunk=16_384),
        optimizer=dict(learning_rate=3e-5, warmup_steps=100, b2=0.95, clip=1.0),
    )
