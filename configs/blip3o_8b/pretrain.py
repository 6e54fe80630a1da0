"""BLIP3-o 8B, pretraining on captions: queries and generator train, the language model is frozen.

    python -m pisces_jax.train --config=configs/blip3o_8b/pretrain.py --workdir=runs/blip3o_8b

Run it first. Cache the features once with `python -m pisces_jax.cache`.
Published: 512 pictures a step, AdamW, learning rate 1e-4 falling to 1e-5 along a cosine, warm-up of 0.3 % of the
steps, no weight decay, clipping at 1, at least 150,000 steps. Taken at four pictures with their texts in a row of
1,024 tokens: 128 rows a step.

Hardware: not run. Planned for eight H100
(`plan --topology=h100:8 --vocab_size=151936`): a peak of 12.33 GiB per GPU (docs/scale.md).
"""

import parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config


def get_config() -> ConfigDict:
    return run_config(
        name="pretrain",
        program="unified",
        steps=150_000,
        batch_size=128,
        compute_dtype="bfloat16",
        model=parts.MODEL,
        init_from=parts.FROZEN,
        param_dtype=parts.PARAM_DTYPE,
        data=dict(
            tokenizer=parts.LANGUAGE_FOLDER,
            row_length=1024,
            draw_slots=5,
            features="features",
            **parts.train_and_evaluate(
                draw_caption=dict(parts.CAPTIONS, recipe="draw_caption"),
                draw_details=dict(parts.DETAILED, recipe="draw_details"),
            ),
        ),
        loss=dict(text=0.0, chunk=16_384),
        vector_flow=parts.VECTOR_FLOW,
        optimizer=dict(learning_rate=1e-4, warmup_steps=450, final_rate=0.1, b2=0.95, param_groups=parts.GROUPS),
        log=dict(every=20, evaluate_every=1000, checkpoint_every=500, keep=2),
    )
