"""What several tests share: a tokenizer of letters, a layout of tiny rows, and the obvious way to pack examples."""

import numpy as np

from pisces_jax.data.example import Example, Picture, Text
from pisces_jax.data.packing.layout import Layout, lay_out
from pisces_jax.models.pisces import PiscesConfig
from pisces_jax.models.transformer import RopeScaling, TransformerConfig
from pisces_jax.models.vit import ViTConfig

LAYOUT = Layout(
    read_vectors=4, draw_vectors=4, length=32, rows=2, read_slots=3, draw_slots=3, read_size=8, draw_size=16
)
PISCES = PiscesConfig(
    language_model=TransformerConfig(
        vocab_size=32, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_hidden=48, rope_theta=1000.0,
        rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64),
    ),
    understanding_encoder=ViTConfig(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_hidden=24),
    generation_encoder=ViTConfig(
        image_size=16, patch_size=4, width=16, layers=1, heads=2, mlp_hidden=24, norm="post", class_token=True,
        final_norm=False, biases="qv", activation="gelu",
    ),
    pool=2,
    projector_hidden=24,
    vector_head_hidden=24,
    place_embedding=True,
)  # fmt: skip


class Letters:
    """A tokenizer of the letters a to z."""

    pad, bos, eos, begin_image, end_image, image = range(6)
    vocab_size, fingerprint, end_of_turn = 32, "letters", None
    opening, before_picture = (bos,), ()
    special = frozenset(range(6))

    def header(self, speaker):
        return []

    def encode(self, text):
        return [ord(c) - ord("a") + 6 for c in text]

    def decode(self, ids):
        return "".join(chr(i - 6 + ord("a")) for i in map(int, ids) if i >= 6)


class Listed(list):
    """A list of examples as a source."""

    draws, remote, fingerprint, pictures_fingerprint = True, False, "", None


def picture(role, seed):
    size = LAYOUT.read_size if role == "read" else LAYOUT.draw_size
    return Picture(np.random.default_rng(seed).integers(0, 256, (size, size, 3)).astype(np.uint8), role)


CAPTION = Example((picture("read", 1), Text("ab"), Text("cdefg", learn=True)), "caption")
DRAW = Example((Text("hi"), picture("draw", 2)), "draw")
EDIT = Example((picture("read", 3), Text("jk"), Text("lm", learn=True), picture("draw", 4)), "edit")
CHAT = Example((Text("nop"), Text("qrs", learn=True), Text("t"), Text("uvw", learn=True)), "chat")
TWO = Example((Text("xy", learn=True), picture("draw", 5), Text("z", learn=True), picture("draw", 6)), "two")


def pack(rows, layout=LAYOUT, idle=0):
    """One group with the examples of `rows` where they are put; `idle` seeds what idle slots hold (0: nothing)."""
    rng = np.random.default_rng(idle)
    assert len(rows) <= layout.rows
    shape = (layout.rows, layout.length)
    group = {name: np.zeros(shape, np.int32) for name in ("tokens", "segment_ids", "positions", "source")}
    group["loss_mask"] = np.zeros(shape, bool)
    for role, slots, size in (
        ("read", layout.read_slots, layout.read_size),
        ("draw", layout.draw_slots, layout.draw_size),
    ):
        group[f"{role}_images"] = rng.integers(0, 256, (slots, size, size, 3)).astype(np.uint8) * bool(idle)
        group[f"{role}_row"] = rng.integers(0, layout.rows, slots).astype(np.int32) * bool(idle)
        group[f"{role}_start"] = rng.integers(0, layout.length - 4, slots).astype(np.int32) * bool(idle)
        group[f"{role}_valid"] = np.zeros(slots, bool)
        group[f"{role}_source"] = np.zeros(slots, np.int32)
        group[f"{role}_id"] = np.zeros((slots, 2), np.uint32)
    taken = {"read": 0, "draw": 0}
    for r, examples in enumerate(rows):
        at = 0
        for number, example in enumerate(examples, 1):
            laid = lay_out(example, Letters(), layout)
            span = slice(at, at + len(laid.tokens))
            assert span.stop <= layout.length
            group["tokens"][r, span], group["loss_mask"][r, span] = laid.tokens, laid.loss_mask
            group["segment_ids"][r, span], group["positions"][r, span] = number, np.arange(len(laid.tokens))
            for placed in laid.pictures:
                slot = taken[placed.role]
                taken[placed.role] += 1
                group[f"{placed.role}_images"][slot] = placed.picture.array()
                group[f"{placed.role}_row"][slot], group[f"{placed.role}_start"][slot] = r, at + placed.start
                group[f"{placed.role}_valid"][slot] = True
            at = span.stop
    return group


def batch(*groups):
    return {name: np.stack([group[name] for group in groups]) for name in groups[0]}


def model_settings(width=32):
    """A config's `model` with all parts; sizes that two, four and eight divide, or (36) do not."""
    odd = width != 32
    encoder = dict(width=width // 2, layers=1, heads=2, mlp_hidden=26 if odd else 24)
    return dict(
        language_model=dict(
            width=width, layers=1, heads=3 if odd else 4, kv_heads=1 if odd else 2, head_dim=8, rope_theta=1000.0,
            mlp_hidden=50 if odd else 48,
        ),
        understanding_encoder=dict(encoder, image_size=8, patch_size=4),
        generation_encoder=dict(
            encoder, image_size=16, patch_size=4, norm="post", class_token=True, final_norm=False, biases="qv",
            activation="gelu",
        ),
        decoder=dict(
            size=16, patch_size=4, channels=3, width=16, layers=1, heads=2, mlp_hidden=24, local_condition=True
        ),
        text_tower=dict(width=16, layers=1, heads=2, mlp_hidden=24),
        pool=2,
        hidden=dict(projector=24, vector_head=24),
    )  # fmt: skip


def config(**changes):
    from pisces_jax.training.config import run_config

    return run_config(**{"name": "run", "steps": 10, **changes})


def random_params(pisces):
    """Parameters of a `Pisces` with which every choice of a token is far from a tie."""
    import jax
    import jax.numpy as jnp
    import plain
    from flax import linen as nn

    inputs = jnp.zeros((1, 8, 8, 3), jnp.uint8), jnp.zeros((1, 16, 16, 3), jnp.uint8), jnp.zeros((1, 4), jnp.int32)
    init = jax.eval_shape(lambda: pisces.init(jax.random.key(0), *inputs, method="init_all"))
    p = plain.randomised(nn.unbox(init)["params"], seed=2, sharpen=("query", "key"))
    p["language_model"]["head"] *= 4
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), p)


class Painted:
    """A decoder whose pictures show the first vector: what it draws depends on everything before it."""

    parts, size, takes_null = (), 16, False

    def decode(self, params, vectors, keys, how, null=None):
        import jax.numpy as jnp

        grey = jnp.clip(128 + 40 * vectors[:, 0, :3], 0, 255).astype(jnp.uint8)
        return jnp.broadcast_to(grey[:, None, None], (len(vectors), 16, 16, 3))


def ready_model(batch_size=2):
    """A model that reads, writes letters and paints, with random parameters."""
    from pisces_jax.inference.model import Model
    from pisces_jax.losses.flow import FlowConfig
    from pisces_jax.models.pisces import Pisces
    from pisces_jax.training.config import pisces_config

    made = config(program="unified", model=model_settings(), data=dict(row_length=128), compute_dtype="float32")
    made.sampling.instruction = "draw{}"
    params = random_params(Pisces(pisces_config(made, Letters.vocab_size)))
    return Model(made, Letters(), params, Painted(), {}, FlowConfig(), batch_size)


def llama_tokenizer(path):
    """A small byte-level `tokenizer.json` with LLaMA 3's special tokens; returns the bare tokenizer of the library."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
        special_tokens=[f"<|{name}|>" for name in names],
    )  # fmt: skip
    tokenizer.train_from_iterator(["user assistant a red circle left of a blue square"] * 4, trainer)
    tokenizer.save(str(path))
    return tokenizer
