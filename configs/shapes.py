"""The shapes world, from nothing: every stage of the method in a few minutes on two CPU cores.

    make demo
    python -m pisces_jax.train --config=configs/shapes.py --workdir=runs/shapes          # all stages in order
    python -m pisces_jax.train --config=configs/shapes.py:stage1 --workdir=runs/shapes   # one of them
"""

from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

STAGES = ("pretrain", "decoder", "stage1", "stage2", "stage3")
SIZE = 32

# Two different encoders: SigLIP's form for reading, 64 vectors; EVA-CLIP's for drawing, pooled to 16 vectors of 32.
UNDERSTANDING = dict(image_size=SIZE, patch_size=4, width=128, layers=3, heads=2, mlp_hidden=384, unroll=True)
GENERATION = dict(
    image_size=SIZE, patch_size=4, width=128, layers=3, heads=2, mlp_hidden=384, norm="post", class_token=True,
    biases="qv", activation="gelu", output_dim=32, unroll=True,
)  # fmt: skip
DECODER = dict(
    size=SIZE, patch_size=4, channels=3, width=128, layers=3, heads=2, mlp_hidden=320, local_condition=True, unroll=True
)
LANGUAGE = dict(width=192, layers=4, heads=3, kv_heads=1, head_dim=64, mlp_hidden=512, rotary_base=10_000.0, unroll=True)
FLOW = dict(prediction="data", times="uniform", zero_share=0.25, drop=0.1, floor=0.1, weight="none", steps=8, guidance=1.0)

NORMS = r".*/(scale|bias|gate|log_scale|[a-z_]*embedding)"


def shapes(task: str, weight: float = 1.0, examples: int = 40_000, split: str = "train") -> dict:
    return dict(kind="shapes", task=task, weight=weight, num_examples=examples, split=split, size=SIZE)


def mixture(**weights: float) -> dict:
    return dict(
        train={task: shapes(task, weight) for task, weight in weights.items()},
        evaluate={task: shapes(task, weight, 64, "val") for task, weight in weights.items()},
    )


def common(name: str) -> dict:
    return dict(
        name=name,
        data=dict(tokenizer_vocabulary=512, examples_per_epoch=40_000),
        log=dict(every=20, evaluate_every=100, checkpoint_every=200),
    )


def pictures(name: str) -> ConfigDict:
    config = run_config(**common(name))
    config.batch_size = 64
    config.model = ConfigDict(dict(
        generation_encoder=GENERATION, decoder=DECODER, pool=2, understanding_encoder=UNDERSTANDING,
        text_tower=dict(width=128, layers=2, heads=2, mlp_hidden=384, unroll=True),
    ))  # fmt: skip
    config.flow.update(FLOW)
    config.data.update(mixture(pair=1.0))
    config.log.samples_every = 200
    return config


def pretrain() -> ConfigDict:
    config = pictures("pretrain")
    config.program = "pretrain"
    config.steps = 500
    config.loss.update(contrastive=0.1, feature_noise=0.1)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=40, final_rate=0.1, table=((NORMS, 1.0, 0.0), (".*", 1.0, 0.01)))
    return config


def decoder() -> ConfigDict:
    config = pictures("decoder")
    config.program = "decoder"
    config.steps = 300
    config.parts = ConfigDict(dict(generation_encoder="pretrain", decoder="pretrain"))
    config.loss.update(feature_noise=0.1)
    config.optimizer.update(
        learning_rate=1e-3, warmup_steps=20, average=0.99,
        table=(("generation_encoder/.*", 0.0, 0.0), (NORMS, 1.0, 0.0), (".*", 1.0, 0.01)),
    )  # fmt: skip
    return config


def unified(name: str, start: str, steps: int, rate: float, **weights: float) -> ConfigDict:
    config = run_config(**common(name))
    config.program = "unified"
    config.steps = steps
    config.batch_size = 4
    config.decoder = "decoder"
    config.model = ConfigDict(dict(
        language_model=LANGUAGE, understanding_encoder=UNDERSTANDING, generation_encoder=GENERATION, pool=2,
        hidden=dict(projector=256, vector_head=256),
    ))  # fmt: skip
    config.parts = ConfigDict(dict(generation_encoder="pretrain", understanding_encoder="pretrain"))
    trained = ("language_model", "understanding_projector", "generation_projector", "vector_head", "understanding_encoder")
    if start:
        config.parts.update({part: start for part in trained})
    config.data.update(
        row_length=128, rows=10, read_slots=8, draw_slots=10, **mixture(**weights)
    )
    config.optimizer.update(
        learning_rate=rate, warmup_steps=20, final_rate=0.1,
        table=(("generation_encoder/.*", 0.0, 0.0), (NORMS, 1.0, 0.0), (".*", 1.0, 0.01)),
    )  # fmt: skip
    config.log.samples_every = 200
    return config


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    configs = dict(
        pretrain=pretrain(),
        decoder=decoder(),
        stage1=unified("stage1", "", 200, 2e-3, caption=1.0, draw_caption=1.0),
        stage2=unified("stage2", "stage1", 400, 2e-3, describe=1.0, draw_details=1.0, draw_described=1.0),
        stage3=unified(
            "stage3", "stage2", 300, 1e-3, question=2.0, caption=0.5, describe=0.5, draw_prompt=0.5, draw_described=2.0
        ),
    )  # fmt: skip
    return configs[stage] if stage else ConfigDict(dict(stages=configs))
