"""LoRA: adapters against the full model's gradients, against merged weights, and against PEFT."""

import dataclasses
import json
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import tiny_config
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForCausalLM, Qwen2ForCausalLM

from pisces_jax.inference.export import export_run
from pisces_jax.models.layers import apply
from pisces_jax.models.lora import TARGETS, LoRA, attach, detach, merge
from pisces_jax.models.pisces import Pisces, PiscesConfig
from pisces_jax.models.transformer import Transformer, TransformerConfig
from pisces_jax.sharding import make_mesh
from pisces_jax.training.checkpoints import load_part
from pisces_jax.training.config_files import load_stages
from pisces_jax.training.flops import step_flops_by_part
from pisces_jax.training.loop import train
from pisces_jax.training.optimizer import flatten
from pisces_jax.training.programs import make_program
from pisces_jax.training.step import make_trainer
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.export import export_part, import_folder
from pisces_jax.weights.folder import Folder, part_shapes, read_part, read_source
from pisces_jax.weights.language_json import read_llama, read_qwen2
from pisces_jax.weights.sizes import settings as published

ROOT = pathlib.Path(__file__).resolve().parent.parent

LANGUAGE = TransformerConfig(vocab_size=37, width=16, layers=2, heads=4, kv_heads=2, head_dim=8, mlp_hidden=24)
ADAPTERS = LoRA(rank=3, alpha=6.0, base=LANGUAGE)
TOKENS = np.arange(14).reshape(2, 7) % 37


def filled(settings, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0, 0.3, s.shape).astype(np.float32), part_shapes(settings))


def logits(params, lora, settings=LANGUAGE, tokens=TOKENS):
    model = Pisces(PiscesConfig(dataclasses.replace(settings, lora=lora)))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = apply(model, params, apply(model, params, tokens, method="embed"), positions, method="run")
    return apply(model, params, hidden, method="logits")


def test_merged_equals_unmerged_and_a_new_adapter_changes_nothing():
    base, adapters = filled(LANGUAGE), filled(ADAPTERS, 1)
    unmerged = logits({"language_model": base, "lora": adapters}, ADAPTERS)
    merged = logits({"language_model": merge(base, adapters, ADAPTERS)}, None)
    plain = logits({"language_model": base}, None)
    np.testing.assert_allclose(unmerged, merged, rtol=1e-4, atol=1e-5)
    assert np.abs(unmerged - plain).max() > 0.1
    start = detach({"language_model": Transformer(dataclasses.replace(LANGUAGE, lora=ADAPTERS)).init(
        jax.random.key(0), TOKENS, method="init_all")["params"]})["lora"]  # fmt: skip
    new = jax.tree.map(lambda x: x.value, start, is_leaf=lambda x: hasattr(x, "value"))
    np.testing.assert_array_equal(logits({"language_model": base, "lora": new}, ADAPTERS), plain)


def test_gradients_are_those_of_the_full_model_projected():
    """dA = α/r · dW Bᵀ and dB = α/r · Aᵀ dW, with dW the gradient of the merged matrix."""
    base, adapters = filled(LANGUAGE), filled(ADAPTERS, 1)

    def loss(base, adapters, lora):
        params = {"language_model": base} | ({"lora": adapters} if lora else {})
        return jnp.square(logits(params, lora)).mean()

    got = flatten(jax.grad(loss, 1)(base, adapters, ADAPTERS))
    full = flatten(jax.grad(loss)(merge(base, adapters, ADAPTERS), None, None))
    factors = flatten(adapters)
    for name in [n.removesuffix("lora_a") for n in factors if n.endswith("lora_a")]:
        a, b = (factors[f"{name}lora_{x}"] for x in "ab")
        dw = full[f"{name}kernel"].reshape(2, np.prod(a.shape[1:-1]), -1)
        a, b = a.reshape(2, -1, 3), b.reshape(2, 3, -1)
        for x, expected in (("a", dw @ b.swapaxes(1, 2)), ("b", a.swapaxes(1, 2) @ dw)):
            actual = got[f"{name}lora_{x}"].reshape(expected.shape)
            np.testing.assert_allclose(actual, 2.0 * expected, rtol=2e-3, atol=1e-5, err_msg=name + x)


def test_parts_go_into_the_module_and_out_of_it():
    params = {"language_model": filled(LANGUAGE), "lora": filled(ADAPTERS, 1), "queries": {"x": np.ones(1)}}
    again = detach(attach(params))
    assert flatten(again).keys() == flatten(params).keys()
    assert attach({"language_model": {}}) == {"language_model": {}}


def config(**lora):
    language = dict(tiny_config.LANGUAGE, unroll=False)
    frozen = (("language_model/.*", 0.0, 0.0), (".*", 1.0, 0.0))
    return tiny_config.run(
        "adapted", "unified", "draw", batch_size=16, param_dtype=dict(language_model="bfloat16"),
        model=dict(language_model=language, hidden=dict(projector=16, vector_head=16), lora=lora),
        optimizer=dict(param_groups=frozen),
    )  # fmt: skip


def test_only_adapters_have_gradients_moments_and_float32(tmp_path):
    c = config(rank=4, alpha=4, targets=("query", "down"))
    trainer = make_trainer(make_program(c, 300), c, make_mesh(fsdp=4, tensor=2))
    state, where = trainer.abstract, trainer.shardings
    assert {x.dtype.name for x in jax.tree.leaves(state.frozen["language_model"])} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(state.trained["lora"])} == {"float32"}
    flops = trainer.program.forward_flops(trainer.program.batch_spec(c))["language_model"]
    work = step_flops_by_part(trainer.program, trainer.program.batch_spec(c), set(state.trained))
    assert work["language_model"] == 2 * flops and work["vector_head"] > 0
    assert "language_model" not in state.trained and not any("language_model" in n for n in names(state.optimizer))
    specs = {k: tuple(s.spec) for k, s in flatten(where.trained["lora"]).items()}
    assert specs == {
        "layers/attention/query/lora_a": (None, ("fsdp", "fsdp_inner")),
        "layers/attention/query/lora_b": (None, ("fsdp", "fsdp_inner"), "tensor"),
        "layers/mlp/down/lora_a": (None, "tensor", ("fsdp", "fsdp_inner")),
        "layers/mlp/down/lora_b": (None, None, ("fsdp", "fsdp_inner")),
    }


def names(tree):
    return [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


@pytest.mark.parametrize("lora, said", [
    (dict(rank=0, alpha=1), "config model.lora: a rank of 0 adapts nothing: set rank to at least 1"),
    (dict(rank=2, alpha=1, targets=("q_proj",)), "config model.lora: targets name 'q_proj': choose of query, key"),
    (dict(rank=2, alpha=1, targets=()), "config model.lora: targets name nothing: choose of query"),
    (dict(rank=2), "config key model.lora.alpha is missing"),
    (dict(rank=2, alpha=1, target=("query",)), "config key model.lora.target does not exist: did you mean targets"),
], ids=["rank", "target", "none", "alpha", "key"])  # fmt: skip
def test_wrong_settings_are_one_sentence(lora, said):
    with pytest.raises(UserError, match=said):
        make_program(config(**lora), 300)


def test_an_adapted_matrix_must_be_frozen():
    c = config(rank=2, alpha=4)
    c.optimizer.param_groups = ((".*", 1.0, 0.0),)
    with pytest.raises(UserError, match=r"adapts language_model/layers/attention/\w+/kernel, which trains too: freeze"):
        make_trainer(make_program(c, 300), c, make_mesh(fsdp=8))


# PEFT

FAMILIES = {"llama": (LlamaForCausalLM, read_llama), "qwen2": (Qwen2ForCausalLM, read_qwen2)}


def reference(family, vocab_size=37):
    """A tiny model of transformers, and its settings as ours."""
    sizes = dict(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    kind, read = FAMILIES[family]
    model = kind(kind.config_class(**sizes, attn_implementation="eager")).eval()
    parity.fill(model)
    return model, read(model.config.to_dict(), lambda *words: UserError(str(words)))


def theirs(model):
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.mark.parametrize("family, targets", [("llama", TARGETS), ("qwen2", ("query", "value", "out", "up"))])
def test_an_adapter_made_here_opens_in_peft(tmp_path, family, targets):
    model, settings = reference(family)
    lora = LoRA(rank=3, alpha=6.0, targets=targets, base=settings)
    model.save_pretrained(tmp_path / "base")
    base, adapters = read_source(f"{tmp_path}/base", settings, "language_model"), filled(lora, 1)
    assert export_part(tmp_path / "lora", "lora", lora, adapters) == "peft"
    opened = PeftModel.from_pretrained(model, tmp_path / "lora").eval()
    ours = logits({"language_model": base, "lora": adapters}, lora, settings)
    np.testing.assert_allclose(ours, theirs(opened), rtol=1e-3, atol=1e-4)
    read = read_source(f"{tmp_path}/lora", lora, "lora")
    jax.tree.map(np.testing.assert_array_equal, read, adapters)


@pytest.mark.parametrize("family, names", [("llama", ["q_proj", "v_proj"]), ("qwen2", "all-linear")])
def test_an_adapter_made_by_peft_opens_here(tmp_path, family, names):
    model, settings = reference(family)
    model.save_pretrained(tmp_path / "base")
    base = read_source(f"{tmp_path}/base", settings, "language_model")
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=2, target_modules=names)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, x in adapted.named_parameters():
        if "lora_" in name:
            x.data = torch.randn(x.shape, generator=generator) * 0.3
    adapted.save_pretrained(tmp_path / "lora")
    folder = Folder.open(f"{tmp_path}/lora", "lora")
    lora = dataclasses.replace(folder.settings, base=settings)
    assert (lora.rank, lora.alpha) == (4, 2.0)
    assert lora.targets == (("query", "value") if family == "llama" else TARGETS)
    folder.check(lora, "model.lora")
    ours = logits({"language_model": base, "lora": read_part(folder, part_shapes(lora))}, lora, settings)
    np.testing.assert_allclose(ours, theirs(adapted), rtol=1e-3, atol=1e-4)
    with pytest.raises(UserError, match="does not fit the weights of .*: set rank .4 there, 8 in the config. as there"):
        folder.check(dataclasses.replace(lora, rank=8), "model.lora")
    with pytest.raises(UserError, match="shapes of their language model: name their folder in a config's init_from.lo"):
        import_folder(f"{tmp_path}/lora", tmp_path / "imported")


@pytest.mark.parametrize("values, said", [
    (dict(use_dora=True), "adapters with use_dora True"),
    (dict(bias="all"), "adapters with bias 'all'"),
    (dict(modules_to_save=["lm_head"]), "adapters with modules_to_save"),
    (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa', which changes the base"),
    (dict(target_modules=["lm_head", "q_proj"]), "adapters of 'lm_head'"),
    (dict(target_modules=".*q_proj"), "adapters of '.*q_proj'"),
    (dict(r=None), "has a missing or invalid value"),
], ids=["dora", "bias", "modules", "pissa", "head", "pattern", "rank"])  # fmt: skip
def test_other_adapters_are_refused(tmp_path, values, said):
    export_part(tmp_path / "lora", "lora", ADAPTERS, filled(ADAPTERS))
    path = tmp_path / "lora/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    with pytest.raises(UserError) as caught:
        Folder.open(f"{tmp_path}/lora", "lora")
    assert said in str(caught.value)


def test_the_ten_lines_of_the_docs_train_and_open_in_peft(tmp_path, monkeypatch):
    """The config of docs/gpu.md with a tiny model: trained, exported, opened in PEFT and merged; equal logits."""
    page = (ROOT / "docs/gpu.md").read_text()
    (text,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.S) if "lora=" in block]
    monkeypatch.chdir(tmp_path)
    example = dict(__name__="lora")
    exec(compile(text, "docs/gpu.md", "exec"), example)
    config = example["get_config"]()
    assert config == load_stages(str(ROOT / "configs/lora.py"), {})["lora"]
    model, settings = reference("llama", vocab_size=300)
    model.save_pretrained(config.init_from.language_model)
    turns = [{"from": "human", "value": "count to four"}, {"from": "gpt", "value": "one two three four"}]
    with open("mine.jsonl", "w") as file:
        file.writelines(json.dumps(dict(id=str(i), conversations=turns)) + "\n" for i in range(40))
    config.model.language_model = published(settings, remat="full")
    config.data.update(tokenizer="tokenizer.model", tokenizer_vocabulary=300, row_length=64)
    config.update(steps=3, batch_size=8)
    config.compute_dtype, config.param_dtype.language_model = "float32", "float32"
    train(config, tmp_path / "runs")
    export_run(tmp_path / "runs", "lora", ["lora"], None, tmp_path / "adapters")
    export_run(tmp_path / "runs", "lora", ["language_model"], None, tmp_path / "merged", merged=True)

    plain = theirs(model)
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "merged/language_model", attn_implementation="eager").eval()
    adapted = theirs(PeftModel.from_pretrained(model, tmp_path / "adapters/lora").eval())
    params = {part: load_part(tmp_path / "runs", "lora", part) for part in ("language_model", "lora")}
    lora = Folder.open(f"{tmp_path}/adapters/lora", "lora").settings
    ours = np.asarray(logits(params, lora, settings))
    assert np.abs(adapted - plain).max() > 1e-4
    np.testing.assert_allclose(ours[..., :300], adapted, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(theirs(merged)[..., :300], adapted, rtol=1e-3, atol=1e-5)
