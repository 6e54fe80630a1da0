"""Pisces 1B, the flow-matching decoder, from the frozen, pooled features to the autoencoder's latents.

    python -m pisces_jax.train --config=configs/pisces_1b/decoder.py --workdir=runs/pisces_1b

The first run of a work directory.
LLaMA-3.2-1B-Instruct, SigLIP-so400m at 384 px, CLIP ViT-L/14 at 336 px;
published weights are in docs/weights.md, data in docs/data.md.

Hardware: planned for one host of 8 GPUs, not run yet.
"""

import parts
from ml_collections import ConfigDict

from pisces_jax.training.config import run_config


def get_config() -> ConfigDict:
    return run_config(
        name="decoder",
        program="decoder",
        steps=100_000,
        batch_size=512,
        compute_dtype="bfloat16",
        model=dict(
            generation_encoder=parts.GENERATION_ENCODER,
            pool=parts.POOL,
            decoder=dict(parts.DECODER, remat="full"),
            autoencoder=parts.AUTOENCODER,
        ),
        init_from=dict(generation_encoder=parts.GENERATION_FOLDER, autoencoder=parts.AUTOENCODER_FOLDER),
        param_dtype=dict(generation_encoder="bfloat16", autoencoder="bfloat16"),
        data=dict(
            tokenizer=parts.LANGUAGE_FOLDER,
            text_length=128,
            features="features",
            **parts.train_and_evaluate(pair=dict(parts.CAPTIONS, recipe="pair")),
        ),
        flow=dict(times="logit_normal", drop=0.1, steps=30, guidance=3.0),
        optimizer=dict(
            learning_rate=1e-4,
            warmup_steps=1000,
            final_rate=0.1,
            b2=0.999,
            ema=0.9999,
            param_groups=(
                ("generation_encoder/.*", 0.0, 0.0),
                ("autoencoder/.*", 0.0, 0.0),
                parts.NO_DECAY,
                (".*", 1.0, 0.01),
            ),
        ),
        log=dict(every=50, evaluate_every=2000, checkpoint_every=1000, samples_every=5000),
    )
