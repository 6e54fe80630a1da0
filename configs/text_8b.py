"""LLaMA-3.1-8B on packed rows of text alone: the unified step with pictures turned off, to compare with MaxText.

python -m pisces_jax.plan --config=configs/text_8b.py --topology=v5p:4x4x4 --vocab_size=128256

256 rows of 2,048 tokens: 4 a device on 64 chips, mesh fsdp 64. The figures, and MaxText's, are in docs/scale.md.
"""

from ml_collections import ConfigDict

from pisces_jax.training.config import run_config
from pisces_jax.weights.sizes import LLAMA_3_1_8B, settings


def get_config(stage: str = "") -> ConfigDict:
    texts = dict(kind="json", path="data/text.jsonl", recipe="conversation")
    return run_config(
        name="text_8b",
        program="text",
        steps=1000,
        batch_size=256,
        compute_dtype="bfloat16",
        model=dict(language_model=settings(LLAMA_3_1_8B, remat="full")),
        data=dict(row_length=2048, rows=1, train=dict(texts=texts)),
        loss=dict(chunk=16_384),
        optimizer=dict(learning_rate=3e-5, warmup_steps=100, b2=0.95, clip=1.0),
    )
