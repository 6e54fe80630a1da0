"""The `config.json` of language models (transformers): LLaMA, and Qwen2 with the text part of Qwen2.5-VL; and the
`adapter_config.json` of their adapters (PEFT).

BLIP3-o's checkpoints are the latter with two parts more (`weights/blip3o.py`).
"""

from typing import Any

from pisces_jax.models.lora import LoRA
from pisces_jax.models.transformer import RopeScaling, TransformerConfig
from pisces_jax.weights.families import PROJECTIONS
from pisces_jax.weights.fields import Json, Refuse, ours, require, theirs

DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": dict(
        vocab_size=32_000, hidden_size=4096, intermediate_size=11_008, num_hidden_layers=32, num_attention_heads=32,
        hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False, attention_bias=False, mlp_bias=False,
        max_position_embeddings=2048,
    ),
    "qwen2": dict(
        vocab_size=151_936, hidden_size=4096, intermediate_size=22_016, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, hidden_act="silu", rms_norm_eps=1e-6, tie_word_embeddings=False,
        use_sliding_window=False,
    ),
}  # fmt: skip
# What the text part of Qwen2.5-VL takes in place of these.
QWEN_VL: dict[str, Any] = dict(
    vocab_size=152_064, hidden_size=8192, intermediate_size=29_568, num_hidden_layers=80, num_attention_heads=64,
    num_key_value_heads=8, rms_norm_eps=1e-5,
)  # fmt: skip
# Our field -> theirs, where both hold the same value.
_FIELDS = dict(
    vocab_size="vocab_size", width="hidden_size", mlp_hidden="intermediate_size", layers="num_hidden_layers",
    heads="num_attention_heads", eps="rms_norm_eps", tied_embedding="tie_word_embeddings",
)  # fmt: skip
# What every supported model says; another value is another model.
_LLAMA_FIXED = dict(hidden_act="silu", attention_bias=False, mlp_bias=False)
_QWEN_FIXED = dict(hidden_act="silu", use_sliding_window=False)
# The kinds of model whose text part is Qwen2's, by `model_type`; names that begin with "blip3o_qwen" are BLIP3-o's.
QWEN_KINDS = ("qwen2", "qwen2_5_vl", "qwen2_5_vl_text", "blip3o_qwen")


def _rope(values: Json, theta: float) -> dict[str, Any]:
    # transformers 5 writes rope_parameters; before, rope_theta and rope_scaling.
    scaled = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return {"rope_theta": values.get("rope_theta", theta), **scaled}


def read_llama(values: Json, refuse: Refuse) -> TransformerConfig:
    v = {**DEFAULTS["llama"], **values}
    rope = _rope(v, 10_000.0)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise refuse(f"rotary embeddings of rope_type {kind!r}", "the supported ones are default and llama3")
    require(v, _LLAMA_FIXED, refuse, "a LLaMA", "take one without biases and with silu")
    scaling = None
    if kind == "llama3":
        # transformers takes the key beside these first, and without any the length that the config says.
        key = "original_max_position_embeddings"
        original = v.get(key) or rope.get(key) or v["max_position_embeddings"]
        scaling = RopeScaling(
            float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]), int(original)
        )
    heads = v["num_attention_heads"]
    return TransformerConfig(
        **ours(_FIELDS, v), kv_heads=v.get("num_key_value_heads") or heads,
        head_dim=v.get("head_dim") or v["hidden_size"] // heads, rope_theta=float(rope["rope_theta"]),
        rope_scaling=scaling,
    )  # fmt: skip


def write_llama(c: TransformerConfig) -> dict[str, Any]:
    rope: dict[str, Any] = {"rope_theta": c.rope_theta, "rope_type": "default"}
    longer = {}
    if (s := c.rope_scaling) is not None:
        rope |= dict(
            rope_type="llama3", factor=s.factor, low_freq_factor=s.low_freq_factor,
            high_freq_factor=s.high_freq_factor, original_max_position_embeddings=s.original_max_position,
        )  # fmt: skip
        # What every published model with this scaling says; transformers' own default is shorter.
        longer = {"max_position_embeddings": 131_072}
    scaling = {k: v for k, v in rope.items() if k != "rope_theta"} if c.rope_scaling else None
    return dict(
        architectures=["LlamaForCausalLM"], model_type="llama", **theirs(_FIELDS, c), **_LLAMA_FIXED, **longer,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim,
        rope_parameters=rope, rope_theta=c.rope_theta, rope_scaling=scaling,  # of transformers 5, and of 4
    )  # fmt: skip


def read_qwen2(values: Json, refuse: Refuse) -> TransformerConfig:
    """Text alone: the three numbers of a position in Qwen2.5-VL's rotary embedding are then one and the same.

    transformers 5 writes the text part by itself (`text_config`), but whether the embedding is tied beside it.
    """
    text = values.get("text_config") or {}
    kind = values.get("model_type", "qwen2")
    v = {**DEFAULTS["qwen2"], **(QWEN_VL if kind != "qwen2" else {}), **values, **text}
    v["tie_word_embeddings"] = values.get("tie_word_embeddings", v["tie_word_embeddings"])
    rope = _rope(v, 10_000.0)
    kinds = {rope.get("rope_type", "default"), rope.get("type", "default")}
    if not kinds <= {"default", "mrope"}:
        found = ", ".join(sorted(kinds - {"default", "mrope"}))
        raise refuse(f"rotary embeddings of rope_type {found}", "the supported ones are default and mrope")
    require(v, _QWEN_FIXED, refuse, "a Qwen2", "take one with silu and without a sliding window")
    heads = v["num_attention_heads"]
    return TransformerConfig(
        **ours(_FIELDS, v), kv_heads=v["num_key_value_heads"] or heads,
        head_dim=v.get("head_dim") or v["hidden_size"] // heads, rope_theta=float(rope["rope_theta"]), qkv_bias=True,
    )  # fmt: skip


def write_qwen2(c: TransformerConfig) -> dict[str, Any]:
    rope = {"rope_theta": c.rope_theta, "rope_type": "default"}
    return dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", **theirs(_FIELDS, c), **_QWEN_FIXED,
        num_key_value_heads=c.kv_heads, head_dim=c.head_dim, max_position_embeddings=32_768,
        rope_parameters=rope, rope_theta=c.rope_theta,
    )  # fmt: skip


# Variants that compute otherwise, or whose base is not as it was published.
_PEFT_FIXED: dict[str, Any] = dict(
    peft_type="LORA", bias="none", fan_in_fan_out=False, use_rslora=False, use_dora=False, lora_bias=False,
    use_qalora=False, rank_pattern={}, alpha_pattern={}, modules_to_save=None, layers_to_transform=None,
    layers_pattern=None, target_parameters=None, trainable_token_indices=None, layer_replication=None,
    alora_invocation_tokens=None,
)  # fmt: skip
_PEFT_STARTS = (None, True, False, "gaussian", "orthogonal")
_TARGETS = {theirs.rpartition(".")[2]: ours.rpartition("/")[2] for ours, (theirs, _) in PROJECTIONS.items()}


def read_peft(values: Json, refuse: Refuse) -> LoRA:
    require(values, _PEFT_FIXED, refuse, "adapters", "take plain LoRA, of matrices of the blocks alone")
    if values.get("init_lora_weights") not in _PEFT_STARTS:
        start = values["init_lora_weights"]
        raise refuse(f"adapters with init_lora_weights {start!r}, which changes the base", "convert them to plain LoRA")
    given = values["target_modules"]
    # PEFT writes last names, or whole ones, layer by layer: which tensors are there is checked when they are read.
    named = {given} if isinstance(given, str) else {name.rpartition(".")[2] for name in given}
    if unknown := sorted(named - set(_TARGETS)):
        raise refuse(f"adapters of {unknown[0]!r}", f"the supported target_modules are {', '.join(_TARGETS)}")
    return LoRA(values["r"], float(values["lora_alpha"]), tuple(_TARGETS[name] for name in named))


def write_peft(c: LoRA) -> dict[str, Any]:
    named = [name for name, target in _TARGETS.items() if target in c.targets]
    alpha = int(c.alpha) if c.alpha == int(c.alpha) else c.alpha
    return dict(
        peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=None, inference_mode=True, r=c.rank,
        lora_alpha=alpha, lora_dropout=0.0, target_modules=named, bias="none", fan_in_fan_out=False,
        use_rslora=False, use_dora=False,
    )  # fmt: skip
