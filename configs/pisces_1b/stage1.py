"""Pisces 1B, stage 1: short captions, reading and drawing jointly.

    python -m pisces_jax.train --config=configs/pisces_1b/stage1.py --workdir=runs/pisces_1b

Run it after decoder.py, in the same work directory.
LLaMA-3.2-1B-Instruct, SigLIP-so400m at 384 px, CLIP ViT-L/14 at 336 px;
published weights are in docs/weights.md, data in docs/data.md.

Hardware: planned for one host of 8 GPUs, not run yet. By the plan for v5e:4x8, 32 TPU chips, the peak per device is
3.76 GiB and a step takes 1.23 s (docs/scale.md).
"""

import parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config


def get_config() -> ConfigDict:
    return run_config(
        name="stage1",
        program="unified",
        steps=40_000,
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
            language_model=parts.LANGUAGE_FOLDER,  # the projectors and the vector head are new
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
                caption=dict(parts.CAPTIONS, recipe="caption"),
                draw_caption=dict(parts.CAPTIONS, recipe="draw_caption"),
            ),
        ),
        loss=dict(chunk=16_384),
        optimizer=dict(
            learning_rate=7e-5,
            warmup_steps=500,
            final_rate=0.1,
            b2=0.95,
            param_groups=(("(understanding|generation)_encoder/.*", 0.0, 0.0), parts.NO_DECAY, (".*", 1.0, 0.05)),
        ),
        log=dict(every=20, evaluate_every=1000, checkpoint_every=500, keep=2),
    )
