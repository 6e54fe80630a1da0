"""What the small configs share: parts that two CPU cores train from scratch. This is no config itself.

A config takes what it needs and writes its own values over it: `dict(LANGUAGE_MODEL, layers=5)`.
The two encoders differ. The one for reading has SigLIP's form and gives 36 vectors; the one for drawing has
EVA-CLIP's and is pooled to 16 vectors of 96 numbers.

Some settings serve only models as small as these on CPUs; nothing at full size needs them:

- `unroll`: layers are written out instead of scanned: longer to compile, faster on CPUs
- `stem`, `positions="sines"`: an encoder that learns from few pictures to tell shapes apart and where they are
- `output_dim`, `post_scale`: the encoder for drawing gives narrow vectors, easily predicted
- `local_condition`: each patch of the decoder sees the vector of its own place
- `zero_share`: share of the pictures at which the decoder starts from pure noise
- `standardise`: vectors of mean 0 and deviation 1 for the flow head; the encoders here give small ones
- `place_embedding`, `fed_vectors=False`: the language model is fed each drawn vector's place, not the vector
- `plain_products` (in the configs): XLA's own matrix products, faster on CPUs
- `loss.words`, `loss.feature_noise`, `loss.true_vectors` (in the configs): see `training/config.py`
"""

import os

# Real data sets for the small runs (docs/data.md).
DATA = os.environ.get("PISCES_DATA", "../shared/data")

# Parts of the model, for pictures of 32 pixels.
UNDERSTANDING_ENCODER = dict(image_size=48, patch_size=8, width=128, layers=3, heads=2, mlp_hidden=384, unroll=True)
SHARP_ENCODER = dict(UNDERSTANDING_ENCODER, stem=(24, 48, 96), positions="sines")
GENERATION_ENCODER = dict(
    image_size=32, patch_size=4, width=128, layers=3, heads=2, mlp_hidden=384, unroll=True, norm="post",
    final_norm=False, class_token=True, biases="qv", activation="gelu", output_dim=96, post_scale=0.1,
)  # fmt: skip
DECODER = dict(
    size=32, patch_size=8, channels=3, width=192, layers=3, heads=3, mlp_hidden=512, local_condition=True, unroll=True
)
TEXT_TOWER = dict(width=128, layers=2, heads=2, mlp_hidden=384, unroll=True)
LANGUAGE_MODEL = dict(
    width=192, layers=4, heads=3, kv_heads=1, head_dim=64, mlp_hidden=256, rope_theta=10_000.0, unroll=True
)
# The vector heads: flow of the map (BLIP3-o), flow of each vector, regression (Pisces).
FLOW_HEAD = dict(
    hidden=dict(projector=256), fed_vectors=False, standardise=True,
    generator=dict(width=192, layers=3, heads=3, mlp_hidden=384, local_condition=True, unroll=True),
)  # fmt: skip
DENOISER_HEAD = dict(
    hidden=dict(projector=256), place_embedding=True, standardise=True,
    denoiser=dict(width=192, layers=3, unroll=True),
)  # fmt: skip
REGRESSION_HEAD = dict(hidden=dict(projector=256, vector_head=256), place_embedding=True, fed_vectors=False)
UNIFIED = dict(FLOW_HEAD, language_model=LANGUAGE_MODEL)
# What a unified stage trains and the next one goes on from, beside the encoders.
DENOISER_TRAINED = (
    "language_model", "understanding_projector", "generation_projector", "denoiser", "feature_statistics",
)  # fmt: skip
REGRESSION_TRAINED = ("language_model", "understanding_projector", "generation_projector", "vector_head")

# The decoder predicts the picture itself: strongly conditioned, it need not pass the noise through.
FLOW = dict(prediction="data", weight="data", zero_share=0.6, drop=0.0, steps=8)

# How the flow head is trained and sampled.
VECTOR_FLOW = dict(drop=0.1, steps=20, guidance=2.0)
DENOISER_FLOW = dict(
    prediction="preconditioned", times="logit_normal", drop=0.1, steps=20, guidance=2.0, temperature=0.5
)

# Rows of `optimizer.param_groups`: (pattern, multiple of the learning rate, weight decay); the first match applies.
FROZEN_GENERATION_ENCODER = ("generation_encoder/.*", 0.0, 0.0)
FROZEN_ENCODERS = ("(understanding|generation)_encoder/.*", 0.0, 0.0)
SLOW_READER = ("(understanding_encoder|text_tower|contrastive|words)/.*", 0.3, 0.0)  # for SHARP_ENCODER
GROUPS = ((".*/(scale|bias|gate|log_scale|class_token|[a-z_]*embedding)", 1.0, 0.0), (".*", 1.0, 0.01))

# The matrices inside the blocks: Muon learns in fewer steps than AdamW and costs a tenth more time at these sizes.
MUON = (
    ("(?!decoder/).*/attention/(query|key|value)/kernel", 1, 2),
    ("(?!decoder/).*/attention/out/kernel", 2, 1),
    ("(?!decoder/).*/mlp/(gate|up|down)/kernel", 1, 1),
)

# The shapes world. 85 % of the short texts of "draw_described" are prompts, most of one or two objects; all other
# pictures have up to `most_objects`. Half of the questions and prompts are in other words than the standard ones. What
# is held out comes from other random numbers.
SHAPES = dict(
    kind="shapes", split="train", size=32, weight=1.0, prompts=0.85, most_objects=4,
    question_kinds=("colour", "count", "relation", "existence", "comparison"), other_words=0.5,
)  # fmt: skip
SHAPES_HELD_OUT = dict(split="val", num_examples=64)
TASKS = (
    "caption", "describe", "question", "conversation", "draw_caption", "draw_details", "draw_prompt", "draw_described",
)  # fmt: skip


def tokenizer(shapes: dict) -> dict:
    """The tokenizer of the texts of a shapes world, which all stages of a work directory share."""
    sources = {task: dict(shapes, task=task, num_examples=2000) for task in TASKS}
    return dict(tokenizer_vocabulary=512, tokenizer_casefold=True, tokenizer_sources=sources)


def train_and_evaluate(held_out: dict, **sources: dict) -> dict:
    """Sources to train on, and the same with the values `held_out` over theirs to evaluate on."""
    return dict(train=sources, evaluate={name: source | held_out for name, source in sources.items()})
