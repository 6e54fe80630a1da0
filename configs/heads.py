"""The vector heads side by side: the same data, steps and sizes on three sets; only the head differs.

    python benchmarks/heads.py --workdir=runs/heads            # trains this, scores it, writes the table
    python -m pisces_jax.train --config=configs/heads.py --workdir=runs/heads/seed0

The stages are those of shapes_flow.py, cifar10.py and emoji.py, each named SET_STAGE. Encoders and decoder are trained
once for a set; the unified stages once for every head, as SET_HEAD_STAGE:

- `mse`, `cosine`: regression with a place embedding and no vectors fed, as in shapes.py
- `map`: flow of the map of all vectors (BLIP3-o)
- `vector`: flow of each vector, given those before it

Hardware: two CPU cores. Not run to its end yet.
"""

import cifar10
import emoji
import shapes_flow
import small_parts as parts
from ml_collections import ConfigDict

SETS = dict(shapes=shapes_flow, cifar10=cifar10, emoji=emoji)
# What a head sets: parts of the model, of the loss, of its flow; and the name of the part that is the head. The vectors
# of these encoders have variances near 0.1, so their squared error is brought to the size of a flow's.
HEADS = dict(
    mse=(parts.REGRESSION_HEAD, dict(vectors=10.0), {}, "vector_head"),
    cosine=(parts.REGRESSION_HEAD, dict(vector_error="cosine"), {}, "vector_head"),
    map=(parts.FLOW_HEAD, dict(flow_samples=4), parts.VECTOR_FLOW, "generator"),
    vector=(parts.DENOISER_HEAD, dict(flow_samples=4, fed_noise=0.05), parts.DENOISER_FLOW, "denoiser"),
)
# Parts of the model that are no part of a head.
COMMON = "language_model", "understanding_encoder", "generation_encoder", "pool"


def get_config() -> ConfigDict:
    stages = {}
    for name, config in SETS.items():
        runs = config.get_config().stages
        for run in runs.values():
            run.data.tokenizer = f"{name}.model"  # each set has words of its own
            heads = HEADS if run.program == "unified" else {"": None}
            for head in heads:
                stage = _of(name, head, run, runs)
                stages[stage.name] = stage
    return ConfigDict(dict(stages=stages))


def _of(name: str, head: str, run: ConfigDict, runs: ConfigDict) -> ConfigDict:
    """A stage of a set, with this head."""

    def named(stage: str) -> str:
        return f"{name}_{head}_{stage}" if runs[stage].program == "unified" else f"{name}_{stage}"

    run = run.copy_and_resolve_references()
    first = {part: named(stage) for part, stage in run.init_from.items()}
    run.name = named(run.name)
    if head:
        model, loss, flow, part = HEADS[head]
        run.decoder = named(run.decoder)
        run.model = ConfigDict({key: run.model[key] for key in COMMON} | model)
        run.loss.update(dict(flow_samples=1, fed_noise=0.0) | loss)
        run.vector_flow.update(flow)
        if "denoiser" in first:  # a later stage: the head, and what belongs to it alone
            own = {part: first.pop("denoiser")}
            has = {"feature_statistics": "standardise" in model, "generation_projector": part != "generator"}
            first = {key: stage for key, stage in first.items() if has.get(key, True)} | own
    run.init_from = ConfigDict(first)
    return run
