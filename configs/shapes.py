"""The shapes world, from nothing: every stage of the method in a few minutes on two CPU cores.

make demo
python -m pisces_jax.train --config=configs/shapes.py --workdir=runs/shapes          # all stages in order
python -m pisces_jax.train --config=configs/shapes.py:stage1 --workdir=runs/shapes   # one of them
"""

from ml_collections import ConfigDict

from pisces_jax.data.shapes import TASKS
from pisces_jax.training.small import picture_run, unified_run

SIZE = 32
EXAMPLES = 16_000  # of each task and stage: about as many as a stage sees of its commonest
LOG = dict(every=25, evaluate_every=200, evaluate_batches=3, checkpoint_every=400, samples_every=750)


def data(read_slots: int = 0, draw_slots: int = 0, most_drawn: int = 4, **weights: float) -> dict:
    """The shapes world's tasks by weight; training and held-out pictures come from other random numbers.

    `most_drawn` objects at the most are in a picture to draw that no prompt asks for; most prompts name one or two.
    """

    def source(task: str, weight: float, examples: int, split: str) -> dict:
        drawn = dict(most_objects=most_drawn, prompts=0.85) if task.startswith("draw") else {}
        return dict(kind="shapes", task=task, weight=weight, num_examples=examples, split=split, size=SIZE, **drawn)

    return dict(
        tokenizer_vocabulary=512,
        tokenizer_sources={task: source(task, 1.0, 2000, "train") for task in TASKS if task != "pair"},
        train={task: source(task, weight, EXAMPLES, "train") for task, weight in weights.items()},
        evaluate={task: source(task, weight, 64, "val") for task, weight in weights.items()},
        examples_per_epoch=EXAMPLES,
        read_slots=read_slots,
        draw_slots=draw_slots,
    )


def optimizer(rate: float, warmup: int, final: float = 0.05, average: float = 0.0) -> dict:
    return dict(learning_rate=rate, warmup_steps=warmup, final_rate=final, average=average)


def get_config(stage: str = "") -> ConfigDict:
    """One stage, or with no name all of them in order."""
    pairs = data(pair=1.0)
    stages = (
        picture_run("pretrain", "pretrain", SIZE, pairs, steps=600, optimizer=optimizer(6e-3, 40), log=LOG),
        picture_run(
            "decoder", "decoder", SIZE, pairs, steps=200, loss=dict(feature_noise=0.05),
            optimizer=optimizer(3e-3, 20, average=0.99), log=LOG,
        ),
        # Short captions, and detailed ones of single objects: what a word looks like, before what goes with what.
        unified_run(
            "stage1", "", SIZE, data(6, 33, most_drawn=1, caption=0.3, draw_caption=0.2, draw_details=1.6), steps=150,
            optimizer=optimizer(3e-3, 30, 1.0), log=LOG,
        ),
        unified_run(
            "stage2", "stage1", SIZE,
            data(11, 14, most_drawn=2, describe=0.55, conversation=0.9, draw_details=1.25, draw_described=0.5),
            steps=780, optimizer=optimizer(3e-3, 0, 0.8), log=LOG,
        ),
        unified_run(
            "stage3", "stage2", SIZE,
            data(10, 12, conversation=1.45, caption=0.05, describe=0.2, draw_details=0.2, draw_described=1.7),
            steps=960, decode=True, optimizer=optimizer(2.4e-3, 0),
            sampling=dict(describe=True, temperature=0.7), log=LOG,
        ),
    )  # fmt: skip
    runs = {config.name: config for config in stages}
    return runs[stage] if stage else ConfigDict(dict(stages=runs))
