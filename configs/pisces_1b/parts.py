"""What the runs of Pisces 1B share. This is no config itself.

LLaMA-3.2-1B-Instruct, SigLIP-so400m at 384 px, CLIP ViT-L/14 at 336 px.
Learning rates, batch sizes and what is frozen are ours, since the paper gives none. They start from its closest
documented siblings, MetaMorph (LLaMA-3.1-8B and SigLIP) and Emu2's decoder.
Published folders lie below PISCES_WEIGHTS (default `weights`), docs/weights.md; data sets below PISCES_DATA (default
`data`), docs/data.md.
"""

import os

from pisces_jax.weights.sizes import (
    CLIP_L_14_336,
    LLAMA_3_2_1B,
    SDXL_AUTOENCODER,
    SIGLIP_SO400M_384,
    latent_decoder,
    settings,
)


def _below(variable: str, default: str, path: str) -> str:
    return os.path.join(os.environ.get(variable, default), path)


# Published weights.
LANGUAGE_FOLDER = _below("PISCES_WEIGHTS", "weights", "Llama-3.2-1B-Instruct")
UNDERSTANDING_FOLDER = _below("PISCES_WEIGHTS", "weights", "siglip-so400m-patch14-384")
GENERATION_FOLDER = _below("PISCES_WEIGHTS", "weights", "clip-vit-large-patch14-336")
AUTOENCODER_FOLDER = _below("PISCES_WEIGHTS", "weights", "sdxl-vae")

# Data sets: pictures with a short caption in the `.txt`; with a detailed one in the `.json` too; instructions to draw;
# conversations about pictures, in LLaVA's layout.
CAPTIONS = dict(kind="webdataset", path=_below("PISCES_DATA", "data", "captions/*.tar"))
DETAILED = dict(kind="webdataset", path=_below("PISCES_DATA", "data", "detailed/*.tar"), detailed_format="{detailed}")
INSTRUCTIONS = dict(kind="webdataset", path=_below("PISCES_DATA", "data", "instructions/*.tar"))
CONVERSATIONS = dict(
    kind="json", path=_below("PISCES_DATA", "data", "instructions/conversations.json"),
    image_root=_below("PISCES_DATA", "data", "instructions/images"), cut=True,
)  # fmt: skip

# Parts of the model. Image tokens are appended to the vocabulary, whose rows are a multiple of 256 so that they shard.
LANGUAGE_MODEL = settings(LLAMA_3_2_1B, vocab_multiple=256, remat="full")
UNDERSTANDING_ENCODER = settings(SIGLIP_SO400M_384)
GENERATION_ENCODER = settings(CLIP_L_14_336)
POOL = 3  # the generation encoder's 24×24 vectors to 8×8
AUTOENCODER = settings(SDXL_AUTOENCODER)
DECODER = settings(latent_decoder(CLIP_L_14_336, POOL, SDXL_AUTOENCODER))
HIDDEN = dict(projector=2048, vector_head=2048)  # the language model's width
# What a stage trains and the next one goes on from.
TRAINED = ("language_model", "understanding_projector", "generation_projector", "vector_head")

# A row of `optimizer.param_groups`: no weight decay on norms, biases, gates and embeddings.
NO_DECAY = (".*/(scale|bias|gate|class_token|[a-z_]*embedding)", 1.0, 0.0)


def train_and_evaluate(**sources: dict) -> dict:
    """Sources to train on, and what is held out of each."""
    return {
        part: {name: dict(source, split=split) for name, source in sources.items()}
        for part, split in (("train", "train"), ("evaluate", "val"))
    }
