"""What the runs of BLIP3-o 8B share (arXiv 2505.09568). This is no config itself.

The language model of Qwen2.5-VL-7B, 64 learned queries, and a diffusion transformer that makes the 8×8 map of
EVA-CLIP-E-plus features at 448 px. Training is sequential: the language model is frozen, so what it understands stays
as it is. It reads text alone here: Qwen2.5-VL's own vision tower is not part of this project.
Published folders lie below PISCES_WEIGHTS (default `weights`), docs/weights.md; data sets below PISCES_DATA (default
`data`), docs/data.md.
"""

import os

from pisces_jax.data.instructions import BLIP3O_INSTRUCTION
from pisces_jax.weights.sizes import EVA_CLIP_E_PLUS_448, FEATURE_GENERATOR, QWEN_2_5_VL_7B, settings


def _below(variable: str, default: str, path: str) -> str:
    return os.path.join(os.environ.get(variable, default), path)


LANGUAGE_FOLDER = _below("PISCES_WEIGHTS", "weights", "Qwen2.5-VL-7B-Instruct")
RELEASED_FOLDER = _below("PISCES_WEIGHTS", "weights", "BLIP3o-Model-8B")
GENERATION_FOLDER = _below("PISCES_WEIGHTS", "weights", "Emu2-Gen/multimodal_encoder")

# Pictures with a short caption in the `.txt` and a detailed one in the `.json`; instructions to draw.
CAPTIONS = dict(kind="webdataset", path=_below("PISCES_DATA", "data", "captions/*.tar"))
DETAILED = dict(kind="webdataset", path=_below("PISCES_DATA", "data", "detailed/*.tar"), detailed_format="{detailed}")
INSTRUCTIONS = dict(kind="webdataset", path=_below("PISCES_DATA", "data", "instructions/*.tar"))

MODEL = dict(
    language_model=settings(QWEN_2_5_VL_7B, vocab_multiple=256, remat="full"),
    generation_encoder=settings(EVA_CLIP_E_PLUS_448),
    pool=4,  # the encoder's 32×32 vectors to 8×8
    generator=dict(FEATURE_GENERATOR, remat="full"),
    fed_vectors=False,
)
FROZEN = dict(language_model=LANGUAGE_FOLDER, generation_encoder=GENERATION_FOLDER)
RELEASED = dict(
    language_model=RELEASED_FOLDER, queries=RELEASED_FOLDER, generator=RELEASED_FOLDER,
    generation_encoder=GENERATION_FOLDER,
)  # fmt: skip
# The released decoder draws from the vectors of any of these runs.
DECODER = os.path.join(RELEASED_FOLDER, "diffusion-decoder")
# The words that the released models were trained with.
WORDS = dict(instruction=BLIP3O_INSTRUCTION)
PARAM_DTYPE = dict(language_model="bfloat16", generation_encoder="bfloat16")
# Uniform times on a grid of 1,000, raw features, the condition dropped in a tenth; 30 steps with guidance 3 to draw.
VECTOR_FLOW = dict(grid=1000, drop=0.1, steps=30, guidance=3.0)
# Rows of `optimizer.param_groups`: queries and generator train, without weight decay.
GROUPS = (("(language_model|generation_encoder)/.*", 0.0, 0.0), (".*", 1.0, 0.0))


def train_and_evaluate(**sources: dict) -> dict:
    """Sources to train on, and what is held out of each."""
    return {
        part: {name: dict(source, split=split) for name, source in sources.items()}
        for part, split in (("train", "train"), ("evaluate", "val"))
    }
