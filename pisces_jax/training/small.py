"""Small runs from scratch on pictures of 64 patches: sizes and tables that the configs for two CPU cores share.

Two different encoders: SigLIP's form for reading, 36 vectors; EVA-CLIP's for drawing, pooled to 16 vectors of 96.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.shapes_world.source import QUESTION_KINDS, TASKS
from pisces_jax.training.config import merge, run_config

# No weight decay on norms, biases, gates and embeddings.
PLAIN = r".*/(scale|bias|gate|log_scale|class_token|[a-z_]*embedding)"
TABLE = ((PLAIN, 1.0, 0.0), (".*", 1.0, 0.01))
FROZEN_GENERATION = (("generation_encoder/.*", 0.0, 0.0), *TABLE)
FROZEN_ENCODERS = (("(understanding|generation)_encoder/.*", 0.0, 0.0), *TABLE)
# Settings of an understanding encoder that learns to tell shapes apart; its rate is a third of the others'.
SHARP = dict(stem=(24, 48, 96), positions="sines")
SLOW = (r"(understanding_encoder|text_tower|contrastive|words)/.*", 0.3, 0.0)
# The matrices inside the blocks: Muon learns in fewer steps than AdamW and costs a tenth more time at these sizes.
MUON = (
    (r"(?!decoder/).*/attention/(query|key|value)/kernel", 1, 2),
    (r"(?!decoder/).*/attention/out/kernel", 2, 1),
    (r"(?!decoder/).*/mlp/(gate|up|down)/kernel", 1, 1),
)
# Written-out layers compile longer and run faster on CPU.
BLOCK = dict(width=128, layers=3, heads=2, unroll=True)


def encoders(size: int, reader: Mapping[str, Any]) -> dict[str, Any]:
    vit = dict(image_size=size, patch_size=size // 8, mlp_hidden=384, **BLOCK)
    return dict(
        # Reads at half again the size, as SigLIP and CLIP see different sizes: 36 vectors.
        understanding_encoder=dict(vit, image_size=size * 3 // 2, patch_size=size // 4, **reader),
        generation_encoder=dict(
            vit, norm="post", final_norm=False, post_scale=0.1, class_token=True, biases="qv", activation="gelu",
            output_dim=96,
        ),
        pool=2,
    )  # fmt: skip


def pixel_decoder(size: int) -> dict[str, Any]:
    return dict(
        size=size, patch_size=size // 4, channels=3, width=192, layers=3, heads=3, mlp_hidden=512,
        local_condition=True, unroll=True,
    )  # fmt: skip


# The network gives the picture itself: strongly conditioned, it need not pass the noise through.
FLOW = dict(prediction="data", weight="data", zero_share=0.6, drop=0.0, steps=8)


def shapes_data(
    size: int, examples: int, read_slots: int = 0, draw_slots: int = 0, most_objects: int = 4,
    question_kinds: Sequence[str] = QUESTION_KINDS, **weights: float,
) -> dict[str, Any]:  # fmt: skip
    """The shapes world's tasks by weight, `examples` of the commonest and of the others in proportion; training and
    held-out pictures come from other random numbers.

    `most_objects` at the most are in a picture that no prompt asks for; most prompts name one or two.
    Conversations ask `question_kinds`.
    """

    def source(task: str, weight: float, examples: int, split: str) -> dict[str, Any]:
        return dict(
            kind="shapes", task=task, weight=weight, num_examples=examples, split=split, size=size,
            most_objects=most_objects, prompts=0.85, question_kinds=tuple(question_kinds),
        )  # fmt: skip

    commonest = max(weights.values())
    texts = [task for task in TASKS if not task.startswith("pair")]
    return dict(
        tokenizer_vocabulary=512,
        # The same for all stages, which share it.
        tokenizer_sources={
            t: source(t, 1.0, 2000, "train") | dict(most_objects=4, question_kinds=QUESTION_KINDS) for t in texts
        },
        train={
            task: source(task, weight, max(1000, round(examples * weight / commonest)), "train")
            for task, weight in weights.items()
        },
        evaluate={task: source(task, weight, 64, "val") for task, weight in weights.items()},
        examples_per_epoch=examples,
        read_slots=read_slots,
        draw_slots=draw_slots,
    )


def rates(rate: float, warmup: int, final: float = 0.05, average: float = 0.0) -> dict[str, Any]:
    return dict(learning_rate=rate, warmup_steps=warmup, final_rate=final, ema=average)


def picture_run(
    name: str, program: str, size: int, data: Mapping[str, Any],
    reader: Mapping[str, Any] = MappingProxyType({}), only: str = "", text_layers: int = 2,
    **changes: Any,
) -> ConfigDict:  # fmt: skip
    """Encoder pretraining or decoder training on `size`-pixel pictures, a pixel decoder with them.

    `reader` has the settings of the understanding encoder that differ from those here; with some, it learns slowly.
    `only` one of the encoders is pretrained, "understanding" or "generation", where it is given; the text tower of
    pretraining has `text_layers` blocks.
    """
    config = run_config(name=name, program=program, batch_size=16, plain_products=True, data=data)
    config.model = ConfigDict(dict(decoder=pixel_decoder(size), **encoders(size, reader)))
    if only:
        kept = {"understanding": ("understanding_encoder",), "generation": ("generation_encoder", "decoder", "pool")}
        config.model = ConfigDict({part: config.model[part] for part in kept[only]})
    if program == "pretrain":
        config.model.text_tower = ConfigDict(dict(BLOCK, layers=text_layers, mlp_hidden=384))
        config.optimizer.param_groups = (SLOW, *TABLE) if reader else TABLE
    else:
        config.init_from = ConfigDict(dict(generation_encoder="pretrain", decoder="pretrain"))
        config.optimizer.param_groups = FROZEN_GENERATION
    merge(config, dict(flow=FLOW, loss=dict(feature_noise=0.01, contrastive=0.1, reconstruction=100.0)))
    merge(config, changes)
    return config


def unified_run(
    name: str, start: str, size: int, data: Mapping[str, Any], decode: bool = False,
    language_model: Mapping[str, Any] = MappingProxyType({}), reader: Mapping[str, Any] = MappingProxyType({}),
    frozen_reader: str = "", **changes: Any,
) -> ConfigDict:  # fmt: skip
    """A unified stage that goes on from run `start` ("": a new language model on the pretrained encoders).

    With `decode` the decoder learns on beside it, from the vectors that the stage predicts. `language_model` has the
    settings of its own that differ from those here, `reader` the understanding encoder's as in `picture_run`. That
    encoder is pretrain's and learns on, or it is run `frozen_reader`'s and stays as it is.
    """
    config = run_config(name=name, program="unified", decoder="decoder", batch_size=2, plain_products=True)
    merge(config, dict(data=dict(row_length=160, rows=8, read_slots=15, draw_slots=18)))
    merge(config, dict(data=data))
    # A vector's error is about a hundredth of a token's: brought to the same size.
    config.loss.vectors = 200.0
    config.model = ConfigDict(dict(
        language_model={
            **dict(width=192, layers=4, heads=3, kv_heads=1, head_dim=64, mlp_hidden=256),
            **dict(rope_theta=10_000.0, unroll=True), **language_model,
        },
        hidden=dict(projector=256, vector_head=256),
        place_embedding=True, fed_vectors=False,
        **encoders(size, reader),
    ))  # fmt: skip
    config.init_from = ConfigDict(
        dict(generation_encoder="pretrain", understanding_encoder=frozen_reader or "pretrain")
    )
    if start:
        trained = ("language_model", "understanding_projector", "generation_projector", "vector_head")
        learned = trained if frozen_reader else (*trained, "understanding_encoder")
        config.init_from.update(dict.fromkeys(learned, start))
    slow = (SLOW,) if reader else ()
    config.optimizer.param_groups = FROZEN_ENCODERS if frozen_reader else (*slow, *FROZEN_GENERATION)
    config.optimizer.muon = MUON
    if decode:
        config.model.decoder = ConfigDict(pixel_decoder(size))
        config.init_from.decoder = "decoder"
        merge(config, dict(flow=FLOW))
    merge(config, changes)
    return config


def named_picture_stages(
    size: int, data: Callable[..., Mapping[str, Any]], log: Mapping[str, Any], stage: str = ""
) -> ConfigDict:
    """The stages for pictures that have a name each: encoders, decoder, and a unified model that names and draws them.

    `data` gives the sources of some recipes by their names; `stage` is one of the stages, "" all of them in order.
    """
    runs = (
        picture_run(
            "pretrain", "pretrain", size, data("pair"), steps=900, log=log, loss=dict(same_text=True),
            optimizer=dict(learning_rate=4e-3, warmup_steps=40, final_rate=0.05),
        ),
        picture_run(
            "decoder", "decoder", size, data("pair"), steps=300, log=log,
            optimizer=dict(learning_rate=2e-3, warmup_steps=20, ema=0.99),
        ),
        unified_run(
            "stage1", "", size, data("caption", "draw_caption"), steps=500, log=log,
            optimizer=dict(learning_rate=3e-3, warmup_steps=30, final_rate=0.05),
        ),
    )  # fmt: skip
    stages = {config.name: config for config in runs}
    return stages[stage] if stage else ConfigDict(dict(stages=stages))
