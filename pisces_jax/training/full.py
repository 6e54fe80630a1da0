"""The runs of full-size Pisces from published weights: what `configs/pisces_8b` and `configs/pisces_1b` share.

Published folders lie below `PISCES_WEIGHTS` (default `weights`), docs/weights.md; data below `PISCES_DATA` (default
`data`), docs/data.md.
Learning rates, batch sizes and what is frozen are ours: the paper gives none. They start from its closest documented
siblings, MetaMorph (the same language model and SigLIP) and Emu2's decoder.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.training.config import merge, run_config
from pisces_jax.weights import sizes as published
from pisces_jax.weights.sizes import latent_decoder, settings

# No weight decay on norms, biases, gates and embeddings.
PLAIN = r".*/(scale|bias|gate|class_token|[a-z_]*embedding)"
TRAINED = ("language_model", "understanding_projector", "generation_projector", "vector_head")


def weights(name: str) -> str:
    return os.path.join(os.environ.get("PISCES_WEIGHTS", "weights"), name)


def data(name: str) -> str:
    return os.path.join(os.environ.get("PISCES_DATA", "data"), name)


@dataclasses.dataclass(frozen=True)
class Family:
    """The published parts of a model, each with its folder's name below `PISCES_WEIGHTS`; `pool` gives 8×8 vectors."""

    language_model: TransformerConfig
    language_folder: str
    understanding_encoder: ViTConfig
    understanding_folder: str
    generation_encoder: ViTConfig
    generation_folder: str
    pool: int
    autoencoder: AutoencoderConfig
    autoencoder_folder: str

    def encoder(self) -> dict[str, Any]:
        return dict(generation_encoder=settings(self.generation_encoder), pool=self.pool)


PISCES_8B = Family(
    published.LLAMA_3_1_8B, "Llama-3.1-8B-Instruct", published.SIGLIP_SO400M_384, "siglip-so400m-patch14-384",
    published.EVA_CLIP_E_PLUS_448, "Emu2-Gen/multimodal_encoder", 4, published.SDXL_AUTOENCODER, "sdxl-vae",
)  # fmt: skip
PISCES_1B = Family(
    published.LLAMA_3_2_1B, "Llama-3.2-1B-Instruct", published.SIGLIP_SO400M_384, "siglip-so400m-patch14-384",
    published.CLIP_L_14_336, "clip-vit-large-patch14-336", 3, published.SDXL_AUTOENCODER, "sdxl-vae",
)  # fmt: skip


def shards(folder: str, *recipes: str, **settings: Any) -> dict[str, dict[str, Any]]:
    """The same tar shards under several recipes."""
    common = dict(kind="webdataset", path=data(f"{folder}/*.tar"), **settings)
    return {recipe: dict(common, recipe=recipe) for recipe in recipes}


def detailed(*recipes: str) -> dict[str, dict[str, Any]]:
    """Pictures with a short caption in the `.txt` and a detailed one in the `.json`."""
    return shards("detailed", *recipes, detailed_format="{detailed}")


def conversations() -> dict[str, dict[str, Any]]:
    """Conversations about pictures, in LLaVA's layout."""
    source = dict(
        kind="json", path=data("instructions/conversations.json"), image_root=data("instructions/images"),
        recipe="conversation", cut=True,
    )  # fmt: skip
    return dict(conversation=source)


def splits(sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Sources for training, and what is held out of each."""
    return {
        part: {name: dict(source, split=split) for name, source in sources.items()}
        for part, split in (("train", "train"), ("evaluate", "val"))
    }


def decoder_run(family: Family, **changes: Any) -> ConfigDict:
    """The flow-matching decoder, from the frozen, pooled features to the autoencoder's latents."""
    config = run_config(name="decoder", program="decoder", batch_size=2048, compute_dtype="bfloat16", steps=100_000)
    decoder = settings(latent_decoder(family.generation_encoder, family.pool, family.autoencoder), remat="full")
    autoencoder = settings(family.autoencoder)
    config.model = ConfigDict(dict(family.encoder(), decoder=decoder, autoencoder=autoencoder))
    config.init_from = ConfigDict(
        dict(generation_encoder=weights(family.generation_folder), autoencoder=weights(family.autoencoder_folder))
    )
    config.param_dtype = ConfigDict(dict(generation_encoder="bfloat16", autoencoder="bfloat16"))
    merge(config, dict(
        data=dict(
            tokenizer=weights(family.language_folder), text_length=128, features="features",
            **splits(shards("captions", "pair")),
        ),
        flow=dict(times="logit_normal", drop=0.1, steps=30, guidance=3.0),
        optimizer=dict(
            learning_rate=1e-4, warmup_steps=1000, final_rate=0.1, b2=0.999, ema=0.9999,
            param_groups=(
                ("generation_encoder/.*", 0.0, 0.0), ("autoencoder/.*", 0.0, 0.0), (PLAIN, 1.0, 0.0), (".*", 1.0, 0.01)
            ),
        ),
        log=dict(every=50, evaluate_every=2000, checkpoint_every=1000, samples_every=5000),
    ))  # fmt: skip
    merge(config, changes)
    return config


def unified_run(name: str, family: Family, start: str = "", **changes: Any) -> ConfigDict:
    """A Pisces stage: both encoders frozen, language model, projectors and vector head trained.

    `start` is the stage that it goes on from; "" is the published language model with new projectors.
    """
    config = run_config(name=name, program="unified", decoder="decoder", compute_dtype="bfloat16")
    width = family.language_model.width
    # The image tokens are appended, and the vocabulary's rows are a multiple of 256 so that they shard.
    language = settings(family.language_model, vocab_multiple=256, remat="full")
    config.model = ConfigDict(dict(
        family.encoder(), language_model=language, understanding_encoder=settings(family.understanding_encoder),
        hidden=dict(projector=width, vector_head=width),
    ))  # fmt: skip
    config.init_from = ConfigDict(dict(
        understanding_encoder=weights(family.understanding_folder), generation_encoder=weights(family.generation_folder)
    ))  # fmt: skip
    begins = dict.fromkeys(TRAINED, start) if start else dict(language_model=weights(family.language_folder))
    config.init_from.update(begins)
    config.param_dtype = ConfigDict(dict(understanding_encoder="bfloat16", generation_encoder="bfloat16"))
    frozen = (("(understanding|generation)_encoder/.*", 0.0, 0.0),)
    merge(config, dict(
        data=dict(
            tokenizer=weights(family.language_folder), row_length=4096, rows=1, read_slots=4, draw_slots=12,
            features="features", read_stretch=True,  # SigLIP's preprocessing
        ),
        loss=dict(chunk=16_384),
        optimizer=dict(
            warmup_steps=500, final_rate=0.1, b2=0.95, param_groups=(*frozen, (PLAIN, 1.0, 0.0), (".*", 1.0, 0.05))
        ),
        log=dict(every=20, evaluate_every=1000, checkpoint_every=500, keep=2),
    ))  # fmt: skip
    merge(config, changes)
    return config


def stage(number: int, family: Family, **changes: Any) -> ConfigDict:
    """Stage 1 learns from short captions, 2 from detailed ones, 3 from instructions for both tasks; in 2 and 3 the
    model also learns to write a detailed caption before it draws from a short one."""
    given: Mapping[int, Any] = {
        1: dict(steps=40_000, learning_rate=7e-5, data=shards("captions", "caption", "draw_caption")),
        2: dict(steps=20_000, learning_rate=5e-5, data=detailed("describe", "draw_details", "draw_described")),
        3: dict(
            steps=8_000, learning_rate=2e-5,
            data=conversations() | shards("instructions", "draw_caption") | detailed("draw_described"),
        ),
    }  # fmt: skip
    values = given[number]
    config = unified_run(
        f"stage{number}", family, f"stage{number - 1}" if number > 1 else "", steps=values["steps"],
        batch_size=512, data=splits(values["data"]), optimizer=dict(learning_rate=values["learning_rate"]),
    )  # fmt: skip
    merge(config, changes)
    return config
