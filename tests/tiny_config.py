"""The stages of the shapes world at sizes that train in seconds and learn nothing: to run the commands on."""

from ml_collections import ConfigDict

from pisces_jax.training.config import run_config

ENCODER = dict(image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_hidden=32)
MODEL = dict(
    understanding_encoder=ENCODER,
    generation_encoder=dict(ENCODER, norm="post", output_dim=8),
    pool=2,
)
DECODER = dict(size=16, patch_size=4, channels=3, width=16, layers=1, heads=2, mlp_hidden=32)
TOWER = dict(width=16, layers=1, heads=2, mlp_hidden=32)
LANGUAGE = dict(width=16, layers=1, heads=2, kv_heads=1, head_dim=8, mlp_hidden=32)
GENERATOR = dict(width=16, layers=1, heads=2, mlp_hidden=32)
FROZEN = (("generation_encoder/.*", 0.0, 0.0), (".*", 1.0, 0.0))


def data(*tasks: str) -> dict:
    def source(task: str, split: str) -> dict:
        return dict(kind="shapes", task=task, num_examples=64, split=split, size=16)

    return dict(
        tokenizer_vocabulary=300,
        tokenizer_examples=64,
        text_length=128,
        row_length=128,
        rows_per_pool=2,
        read_slots=2,
        draw_slots=2,
        train={task: source(task, "train") for task in tasks},
        evaluate={task: source(task, "val") for task in tasks},
    )


def run(name: str, program: str, *tasks: str, model: dict, batch_size: int = 8, **more: object) -> ConfigDict:
    return run_config(
        name=name, program=program, steps=2, batch_size=batch_size, data=data(*tasks), model={**MODEL, **model},
        flow=dict(steps=2), vector_flow=dict(steps=2), **more,
    )  # fmt: skip


def get_config(stage: str = "") -> ConfigDict:
    log = dict(every=1, evaluate_every=2, evaluate_batches=1, samples_every=2, samples=2)
    pretrained = dict(generation_encoder="pretrain", understanding_encoder="pretrain")
    stages = dict(
        pretrain=run("pretrain", "pretrain", "pair", model=dict(decoder=DECODER, text_tower=TOWER), log=log),
        decoder=run(
            "decoder", "decoder", "pair", model=dict(decoder=DECODER),
            init_from=dict(generation_encoder="pretrain", decoder="pretrain"),
            optimizer=dict(param_groups=FROZEN, ema=0.9),
        ),
        unified=run(
            "unified", "unified", "question", "draw_described", batch_size=16, decoder="decoder", train_decoder=True,
            init_from=dict(pretrained, decoder="decoder"),
            model=dict(
                language_model=LANGUAGE, hidden=dict(projector=16), generator=GENERATOR, standardise=True,
                decoder=DECODER,
            ),
            optimizer=dict(param_groups=FROZEN), sampling=dict(describe=True, max_tokens=16), log=log,
        ),
    )  # fmt: skip
    return stages[stage] if stage else ConfigDict(dict(stages=stages))
