"""Pisces 8B, the flow-matching decoder, from frozen generation features to latents.

LLaMA-3.1-8B-Instruct, SigLIP-so400m at 384 px, EVA-CLIP-E-plus at 448 px;
the folders of published weights are in docs/weights.md.
For a TPU slice (docs/scale.md); never run at this size yet.
Planned, peak a device and seconds a step (a prediction): v4-128 17.5 GiB, 0.71 s; v5p-128 17.5 GiB, 0.43 s;
v5e-256 4.3 GiB, 0.25 s; v6e-256 4.3 GiB, 0.07 s.

    python -m pisces_jax.train --config=configs/pisces_8b/decoder.py --workdir=runs/pisces_8b
"""

from ml_collections import ConfigDict

from pisces_jax.training.full import PISCES_8B, decoder_run


def get_config() -> ConfigDict:
    config = decoder_run(PISCES_8B)
    # In two parts the outputs of all projections fit, on v4-128 too: nothing but attention and norms is done again.
    config.optimizer.grad_accum_steps = 2
    config.model.decoder.remat = "dots"
    return config
