"""The shapes world in the form of the Pisces paper: regression, true vectors fed in training, nothing else.

    python -m pisces_jax.demo --config=configs/shapes_pisces.py --workdir=runs/shapes_pisces

The stages, data, steps and sizes of configs/shapes.py; the vector head alone is another. Drawn vectors are fed in, each
predicts the next, the loss is their squared error, and no place embedding helps. The encoders and the decoder are those
of configs/shapes.py: copy its runs pretrain, reader and decoder into the work directory to save the time.

Hardware: two CPU cores. Not run to its end yet.
"""

import shapes
import small_parts as parts
from ml_collections import ConfigDict

HEAD = dict(hidden=dict(projector=256, vector_head=256))
MODEL = dict(HEAD, language_model=shapes.LANGUAGE_MODEL, **shapes.ENCODERS)
LOSS = dict(vectors=200.0)  # a vector's error is about a hundredth of a token's: brought to the same size


def get_config() -> ConfigDict:
    config = shapes.get_config()
    before = ""
    for name in ("stage1", "colours", "questions", "stage2", "stage3"):
        run = config.stages[name]
        run.model = ConfigDict(MODEL)
        run.loss.update(LOSS)
        run.init_from = ConfigDict(
            shapes.FROZEN | dict.fromkeys(parts.REGRESSION_TRAINED, before) if before else shapes.FROZEN
        )
        before = name
    return config
