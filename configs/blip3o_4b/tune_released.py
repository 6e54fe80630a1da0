"""BLIP3-o 4B, tuned further from its released folder: queries and generator train, the language model is frozen.

    python -m pisces_jax.train --config=configs/blip3o_4b/tune_released.py --workdir=runs/blip3o_4b

Nothing goes before it: the folder has all three parts and the decoder (docs/blip3o.md). Prompts are worded as in its
own training. Cache the features once with `python -m pisces_jax.cache`.
Published: 128 pictures a step, AdamW, learning rate 1e-4 falling to 1e-5 along a cosine, warm-up of 0.3 % of the
steps, no weight decay, clipping at 1, at least 10,000 steps. Taken at four pictures with their texts in a row of
1,024 tokens: 32 rows a step.

Hardware: not run. Planned for one H100: a peak of 44.31 of 55.32 GiB (docs/blip3o.md).
"""

import parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config


def get_config() -> ConfigDict:
    return run_config(
        name="tune_released",
        program="unified",
        steps=10_000,
        batch_size=32,
        compute_dtype="bfloat16",
        model=parts.MODEL,
        init_from=parts.RELEASED,
        decoder=parts.DECODER,
        param_dtype=parts.PARAM_DTYPE,
        data=dict(
            tokenizer=parts.RELEASED_FOLDER,
            row_length=1024,
            draw_slots=5,
            features="features",
            **parts.train_and_evaluate(
                instructions=dict(parts.INSTRUCTIONS, recipe="draw_caption", **parts.WORDS),
            ),
        ),
        loss=dict(text=0.0, chunk=16_384),
        vector_flow=parts.VECTOR_FLOW,
        sampling=parts.WORDS,
        optimizer=dict(learning_rate=1e-4, warmup_steps=30, final_rate=0.1, b2=0.95, param_groups=parts.GROUPS),
        log=dict(every=20, evaluate_every=1000, checkpoint_every=500, keep=2),
    )
