"""Pisces 1B, stage 2: detailed captions, which it also learns to write before it draws.

    python -m pisces_jax.train --config=configs/pisces_1b/stage2.py --workdir=runs/pisces_1b

It goes on from stage1.py in the same work directory.
LLaMA-3.2-1B-Instruct, SigLIP-so400m at 384 px, CLIP ViT-L/14 at 336 px;
published weights are in docs/weights.md, data in docs/data.md.

Hardware: planned for one host of 8 GPUs, not run yet.
"""

import parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config


def get_config() -> ConfigDict:
    return run_config(
        name="stage2",
        program="unified",
        steps=20_000,
        batch_size=128,
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
            **dict.fromkeys(parts.TRAINED, "stage1"),
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
                describe=dict(parts.DETAILED, recipe="describe"),
                draw_details=dict(parts.DETAILED, recipe="draw_details"),
                draw_described=dict(parts.DETAILED, recipe="draw_described"),
            ),
        ),
        loss=dict(chunk=16_384),
        optimizer=dict(
            learning_rate=5e-5,
            warmup_steps=500,
            final_rate=0.1,
            b2=0.95,
            param_groups=(("(understanding|generation)_encoder/.*", 0.0, 0.0), parts.NO_DECAY, (".*", 1.0, 0.05)),
        ),
        log=dict(every=20, evaluate_every=1000, checkpoint_every=500, keep=2),
    )
