"""Pisces 8B, stage 3: instructions for both tasks.

    python -m pisces_jax.train --config=configs/pisces_8b/stage3.py --workdir=runs/pisces_8b

It goes on from stage2.py in the same work directory.
LLaMA-3.1-8B-Instruct, SigLIP-so400m at 384 px, EVA-CLIP-E-plus at 448 px;
published weights are in docs/weights.md, data in docs/data.md.

Hardware: planned for a TPU slice, not run yet. Peak memory per device and seconds per step by the plan (docs/scale.md):
v4-128 17.8 GiB, 9.88 s; v5p-128 17.6 GiB, 5.92 s; v5e-256 5.0 GiB, 3.45 s; v6e-256 5.0 GiB, 0.74 s. Where memory is to
spare it is a quarter faster by the plan: docs/scale.md, "Faster where memory is to spare".
"""

import parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config


def get_config() -> ConfigDict:
    return run_config(
        name="stage3",
        program="unified",
        steps=8000,
        batch_size=512,
        compute_dtype="bfloat16",
        model=dict(
            language_model=parts.LANGUAGE_MODEL,
            understanding_encoder=parts.UNDERSTANDING_ENCODER,
            generation_encoder=parts.GENERATION_ENCODER,
            pool=parts.POOL,
            hidden=parts.HIDDEN,
        ),
        init_from=dict(
            understanding_encoder=parts.UNDERSTANDING_FOLDER,
            generation_encoder=parts.GENERATION_FOLDER,
            **dict.fromkeys(parts.TRAINED, "stage2"),
        ),
        param_dtype=dict(understanding_encoder="bfloat16", generation_encoder="bfloat16"),
        decoder="decoder",
        data=dict(
            tokenizer=parts.LANGUAGE_FOLDER,
            row_length=4096,
            rows_per_pool=1,
            read_slots=4,
            draw_slots=12,
            features="features",
            read_stretch=True,  # SigLIP's preprocessing
            **parts.train_and_evaluate(
                conversation=dict(parts.CONVERSATIONS, recipe="conversation"),
                draw_caption=dict(parts.INSTRUCTIONS, recipe="draw_caption"),
                draw_described=dict(parts.DETAILED, recipe="draw_described"),
            ),
        ),
        loss=dict(chunk=16_384),
        optimizer=dict(
            learning_rate=2e-5,
            warmup_steps=500,
            final_rate=0.1,
            b2=0.95,
            param_groups=(("(understanding|generation)_encoder/.*", 0.0, 0.0), parts.NO_DECAY, (".*", 1.0, 0.05)),
        ),
        log=dict(every=20, evaluate_every=1000, checkpoint_every=500, keep=2),
    )
