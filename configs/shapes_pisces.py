"""The shapes world in the form of the Pisces paper: regression, true vectors fed in training, nothing else.

    python -m pisces_jax.demo --config=configs/shapes_pisces.py --workdir=runs/shapes_pisces

The stages, data, steps and sizes of configs/shapes.py. Drawn vectors are fed in, each predicts the next, the loss is
their squared error; there is no place embedding, and the decoder stays as it learned from true vectors. The encoders
and the decoder are those of configs/shapes.py: copy its runs pretrain, reader and decoder into the work directory to
save the time.

Hardware: two CPU cores. Not run to its end yet.
"""

import shapes
from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = shapes.get_config()
    for run in config.stages.values():
        if run.program == "unified":
            run.model.update(place_embedding=False, fed_vectors=True)
    last = config.stages.stage3
    last.train_decoder = False
    del last.model.decoder, last.init_from.decoder
    return config
