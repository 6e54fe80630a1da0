"""Published folders in and out, without the reference implementations (`test_parity.py` has those)."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec
from safetensors.numpy import load_file, save_file

from pisces_jax.models.autoencoder import AutoencoderConfig
from pisces_jax.models.dit import DiTConfig
from pisces_jax.models.transformer import TransformerConfig
from pisces_jax.models.vit import ViTConfig
from pisces_jax.sharding import make_mesh
from pisces_jax.training.config import part_settings
from pisces_jax.training.config_files import load_stages
from pisces_jax.utils.errors import UserError
from pisces_jax.weights import sizes as published
from pisces_jax.weights import tensors
from pisces_jax.weights.architecture import differences
from pisces_jax.weights.config_json import READERS, WRITERS, family_of
from pisces_jax.weights.export import export_part, import_folder, new_folder
from pisces_jax.weights.folder import Folder, View, part_shapes, read_part, read_source
from pisces_jax.weights.layout import Entry
from pisces_jax.weights.sources import TOKENIZER, is_folder, resolve

LLAMA = TransformerConfig(
    vocab_size=37, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, mlp_hidden=24,
    rope_scaling=published.LLAMA_3_1_8B.rope_scaling,
)  # fmt: skip
SIZES = dict(image_size=12, patch_size=4, width=16, layers=2, heads=2, mlp_hidden=24)
PARTS = {
    "llama": LLAMA,
    "tied": dataclasses.replace(LLAMA, tied_embedding=True),
    "siglip": dataclasses.replace(published.SIGLIP_BASE_224, **SIZES),
    "clip": dataclasses.replace(published.CLIP_L_14, **SIZES),
    "eva": dataclasses.replace(published.EVA_CLIP_E_PLUS_448, **SIZES),
    "autoencoder": AutoencoderConfig(4, channels=(8, 16), blocks=1, groups=4, scale=0.13, shift=0.06),
    "encoder of ours": ViTConfig(**SIZES, norm="post", output_dim=6),
    "encoder with a stem": ViTConfig(**SIZES, stem=(4, 8), positions="sines"),  # as in configs/shapes.py
    "decoder": DiTConfig(
        size=8, patch_size=2, channels=3, width=16, layers=2, heads=2, mlp_hidden=24, condition_width=6,
        condition_vectors=4,
    ),
}  # fmt: skip


def filled(settings, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    tokens = getattr(settings, "vocab_size", None)

    def fill(path, leaf):
        x = rng.standard_normal(leaf.shape).astype(dtype)
        if tokens and path[0].key in ("embedding", "head"):
            x[tokens:] = 0  # padding
        return x

    return jax.tree_util.tree_map_with_path(fill, part_shapes(settings))


def write(folder, name="llama", **kwargs):
    params = filled(PARTS[name], **kwargs)
    family = export_part(folder, "part", PARTS[name], params)
    return family, params


def read(folder, settings):
    return read_source(f"{folder}/", settings, "part")


def assert_same(got, expected):
    got, expected = flatten_dict(got, sep="/"), flatten_dict(expected, sep="/")
    assert set(got) == set(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


# --- layouts


def test_a_pattern_is_read_in_both_directions():
    theirs = np.arange(2 * 3 * 5).reshape(6, 5)  # (heads × width of a head), in
    entry = Entry("ours", "theirs", "(N H) D -> D N H")
    ours = entry.to_ours(theirs, (5, 2, 3))
    for n, h, d in np.ndindex(2, 3, 5):
        assert ours[d, n, h] == theirs[3 * n + h, d]
    assert np.shares_memory(ours, theirs)  # a view: nothing is read until it is used
    assert entry.published_shape((5, 2, 3)) == (6, 5)
    np.testing.assert_array_equal(entry.to_theirs(ours), theirs)

    fused = np.arange(3 * 2 * 4).reshape(6, 4)
    second = Entry("ours", "theirs", "O I -> I O", part=(1, 3))
    np.testing.assert_array_equal(second.to_ours(fused, (4, 2)), fused[2:4].T)
    assert second.published_shape((4, 2)) == (6, 4)

    conv = np.arange(7 * 3 * 2 * 2).reshape(7, 3, 2, 2)
    patch = Entry("ours", "theirs", "O C P Q -> (P Q C) O", {"P": 2, "Q": 2, "C": 3})
    got = patch.to_ours(conv, (12, 7))
    for o, c, p, q in np.ndindex(7, 3, 2, 2):
        assert got[(2 * p + q) * 3 + c, o] == conv[o, c, p, q]
    np.testing.assert_array_equal(patch.to_theirs(got), conv)


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_what_was_written_is_read(tmp_path, name, dtype):
    family, params = write(tmp_path / "a", name, dtype=dtype)
    ours = ("encoder of ours", "encoder with a stem", "decoder")
    assert family == {"tied": "llama", **dict.fromkeys(ours, "pisces_jax")}.get(name, name)
    assert_same(read(tmp_path / "a", PARTS[name]), params)


@pytest.mark.parametrize("name", PARTS)
def test_import_after_export_gives_back_the_same_bytes(tmp_path, name):
    """Published layout -> ours -> published layout: the files are equal, and so is what a config reads."""
    _, params = write(tmp_path / "a", name, dtype=jnp.bfloat16)
    folder, count = import_folder(f"{tmp_path}/a", tmp_path / "ours")
    assert count == sum(x.size for x in jax.tree.leaves(params))
    assert json.loads((tmp_path / "ours/config.json").read_text())["model_type"] == "pisces_jax"
    assert_same(read(tmp_path / "ours", PARTS[name]), params)
    export_part(tmp_path / "b", "part", PARTS[name], read(tmp_path / "ours", PARTS[name]))
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == sorted(p.name for p in (tmp_path / "b").iterdir())
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_projectors_have_no_settings(tmp_path):
    params = {"up": {"kernel": np.ones((3, 4), np.float32), "bias": np.zeros(4, np.float32)}}
    assert export_part(tmp_path / "p", "vector_head", None, params) == "pisces_jax"
    assert_same(read(tmp_path / "p", None), params)


def test_every_tensor_keeps_its_dtype(tmp_path):
    """bfloat16 matrices with float32 norms, as half-precision training saves them."""
    _, params = write(tmp_path / "a", dtype=jnp.bfloat16)
    flat = flatten_dict(params, sep="/")
    mixed = {k: x.astype(np.float32) * 1.001 if "norm" in k else x for k, x in flat.items()}
    export_part(tmp_path / "b", "part", LLAMA, unflatten_dict(mixed, sep="/"))
    assert json.loads((tmp_path / "b/config.json").read_text())["dtype"] == "bfloat16"
    assert_same(read(tmp_path / "b", LLAMA), unflatten_dict(mixed, sep="/"))
    import_folder(f"{tmp_path}/b", tmp_path / "ours")
    assert_same(read(tmp_path / "ours", LLAMA), unflatten_dict(mixed, sep="/"))
    import_folder(f"{tmp_path}/b", tmp_path / "narrow", "bfloat16")
    assert {x.dtype for x in jax.tree.leaves(read(tmp_path / "narrow", LLAMA))} == {np.dtype(jnp.bfloat16)}


def test_the_config_json_of_every_part_of_every_config_says_what_the_part_is():
    """Written and read again; the tensors of every kind of part are those of `PARTS`."""
    seen = 0
    root = Path(__file__).parents[1] / "configs"
    for path in sorted(root.glob("**/*.py")):
        stages = load_stages(str(path), {}) if "get_config" in path.read_text() else {}
        for config in stages.values():
            for part in config.model:
                if (settings := part_settings(config, part, 1000)) is None:
                    continue
                family = family_of(settings)
                got = READERS[family](json.loads(json.dumps(WRITERS[family](settings))), lambda *said: UserError(said))
                if isinstance(settings, ViTConfig):
                    got = dataclasses.replace(got, mean=settings.mean, std=settings.std)  # in another file
                # Said by no published file: how the values began.
                told = [said for said in differences(got, settings) if not said.startswith("positions")]
                assert not told, (path, part)
                seen += 1
    assert seen > 30


# --- reading


def save(folder, change, name="model.safetensors"):
    """Rewrites a file with `change` made to its tensors."""
    path = folder / name
    save_file(change(load_file(path)), path)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "language_model.", "model.language_model."])
def test_a_prefix_of_all_names_is_left_out(tmp_path, prefix, caplog):
    _, params = write(tmp_path / "a")
    others = {"vision_tower.layers.0.weight": np.zeros(3, np.float32)}
    save(tmp_path / "a", lambda w: {**{prefix + name: x for name, x in w.items()}, **others})
    assert_same(read(tmp_path / "a", LLAMA), params)
    assert prefix in caplog.text
    save(tmp_path / "a", lambda w: {**w, **{f"ema.{name}": x for name, x in w.items()}})
    with pytest.raises(UserError, match="several times, as .*ema"):
        read(tmp_path / "a", LLAMA)


def test_long_lists_of_wrong_tensors_are_cut(tmp_path):
    write(tmp_path / "a")
    save(tmp_path / "a", lambda w: {f"other.{name}.x": x for name, x in w.items()})
    with pytest.raises(UserError, match="missing model.embed_tokens.weight .* more$") as error:
        read(tmp_path / "a", LLAMA)
    assert len(str(error.value)) < 1000


def test_bfloat16_and_float16_in_one_file(tmp_path):
    """Each parameter has its dtype; where layers differ, one that holds both."""
    _, params = write(tmp_path / "a", dtype=jnp.bfloat16)

    def change(weights):
        half = ("embed_tokens", "layers.1.mlp.up_proj")
        return {k: x.astype(np.float16) if any(h in k for h in half) else x for k, x in weights.items()}

    save(tmp_path / "a", change)
    got = read(tmp_path / "a", LLAMA)
    assert got["embedding"].dtype == np.float16 and got["head"].dtype == jnp.bfloat16
    up = got["layers"]["mlp"]["up"]["kernel"]
    assert up.dtype == np.float32
    np.testing.assert_allclose(up, params["layers"]["mlp"]["up"]["kernel"].astype(np.float32), atol=1e-7)
    import_folder(f"{tmp_path}/a", tmp_path / "ours")
    assert_same(read(tmp_path / "ours", LLAMA), got)


def test_a_single_file_beside_an_index_is_read_as_its_library_does(tmp_path, monkeypatch):
    """transformers takes the file, diffusers the index."""
    for name, single in (("llama", True), ("autoencoder", False)):
        folder = tmp_path / name
        monkeypatch.setattr(tensors, "SHARD_BYTES", 30_000)
        _, sharded = write(folder, name)
        assert len(list(folder.glob("*.safetensors"))) > 1
        monkeypatch.undo()
        _, whole = write(tmp_path / f"{name} whole", name, seed=1)
        file = next((tmp_path / f"{name} whole").glob("*.safetensors"))
        file.rename(folder / file.name)
        assert_same(read(folder, PARTS[name]), whole if single else sharded)


def test_a_head_that_is_not_the_tied_embedding_is_kept(tmp_path):
    """As transformers does from 5 on, whatever config.json says; an equal one is the embedding."""
    _, params = write(tmp_path / "a")
    change(tmp_path / "a", tie_word_embeddings=True)
    assert_same(read(tmp_path / "a", LLAMA), params)
    with pytest.raises(UserError, match=r"set tied_embedding \(False there, True in the config\)"):
        read(tmp_path / "a", PARTS["tied"])
    save(tmp_path / "a", lambda w: {**w, "lm_head.weight": w["model.embed_tokens.weight"]})
    del params["head"]
    assert_same(read(tmp_path / "a", PARTS["tied"]), params)


def test_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "SHARD_BYTES", 4000)
    _, params = write(tmp_path / "a")
    index = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert len(names) > 3 and names[0] == f"model-00001-of-{len(names):05d}.safetensors"
    assert_same(read(tmp_path / "a", LLAMA), params)
    # The library of safetensors reads them as well.
    assert sum(len(load_file(tmp_path / "a" / name)) for name in names) == len(index["weight_map"])
    (tmp_path / "a" / names[1]).unlink()
    with pytest.raises(UserError, match=f"lacks {names[1]}"):
        Folder.open(f"{tmp_path}/a")


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=4), dict(data=4, fsdp=2)])
def test_shards_are_read_alone(tmp_path, sizes, monkeypatch):
    """Values and places are those of the whole array; for a shard no more than that shard is asked of a file."""
    _, params = write(tmp_path / "a")
    mesh = make_mesh(**sizes)
    shapes = part_shapes(LLAMA)

    def sharding(leaf):
        axes = [("fsdp", "fsdp_inner") if n % 8 == 0 and i == len(leaf.shape) - 1 else None
                for i, n in enumerate(leaf.shape)]  # fmt: skip
        return NamedSharding(mesh, PartitionSpec(*axes))

    shardings = jax.tree.map(sharding, shapes)
    asked = []
    real = View.__getitem__

    def ask(view, index):
        piece = real(view, index)
        asked.append((view.shape, piece.shape))
        return piece

    monkeypatch.setattr(View, "__getitem__", ask)
    got = read_part(Folder.open(f"{tmp_path}/a"), shapes, vocab_size=37, shardings=shardings)
    assert_same(got, params)
    wanted = {
        (leaf.shape, where.shard_shape(leaf.shape))
        for leaf, where in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    }
    assert set(asked) == wanted and any(whole != shard for whole, shard in wanted)
    for leaf, where in zip(jax.tree.leaves(got), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding == where


def test_a_longer_vocabulary_begins_at_the_mean_and_ends_in_zeros(tmp_path):
    _, params = write(tmp_path / "a")
    longer = dataclasses.replace(LLAMA, vocab_size=41, vocab_multiple=16)
    got = read(tmp_path / "a", longer)
    for name in ("embedding", "head"):
        assert got[name].shape == (48, 16)
        np.testing.assert_array_equal(got[name][:37], params[name])
        mean = params[name].astype(np.float64).mean(0)
        np.testing.assert_allclose(got[name][37:41], np.tile(mean, (4, 1)), rtol=1e-6)
        assert not got[name][41:].any()
    # The same rows whatever shard they fall into.
    view = Folder.open(f"{tmp_path}/a").views(flatten_dict(part_shapes(longer), sep="/"), 41)["embedding"]
    for first, last in ((0, 36), (30, 40), (37, 39), (38, 48), (41, 48)):
        np.testing.assert_array_equal(view[first:last], got["embedding"][first:last])
        np.testing.assert_array_equal(view[first:last, 3:5], got["embedding"][first:last, 3:5])


def test_older_and_foreign_names(tmp_path):
    """EVA-CLIP as open_clip, EVA-CLIP and Emu2 wrap it; an autoencoder with the old names of its attention."""
    for i, prefix in enumerate(("visual.trunk.", "visual.", "model.visual.")):
        _, params = write(tmp_path / str(i), "eva")
        path = tmp_path / str(i) / "model.safetensors"
        renamed = {prefix + name: x for name, x in load_file(path).items()}
        others = {"text.embedding.weight": np.zeros(3, np.float32), "model.decoder.layers.0": np.zeros(3, np.float32)}
        save_file({**renamed, **others, prefix + "head.weight": np.zeros((2, 16), np.float32)}, path)
        assert_same(read(tmp_path / str(i), PARTS["eva"]), params)
    _, params = write(tmp_path / "old", "autoencoder")
    path = tmp_path / "old/diffusion_pytorch_model.safetensors"
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = load_file(path)
    for new, name in old.items():
        weights = {k.replace(f"attentions.0.{new}", f"attentions.0.{name}"): v for k, v in weights.items()}
    save_file(weights, path)
    assert_same(read(tmp_path / "old", PARTS["autoencoder"]), params)


def test_a_variant_with_an_index(tmp_path, monkeypatch):
    """The names that transformers gives to files saved with variant="bf16"."""
    monkeypatch.setattr(tensors, "SHARD_BYTES", 4000)
    _, params = write(tmp_path / "a")
    folder = tmp_path / "a"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    (folder / "model.safetensors.index.json").unlink()
    index["weight_map"] = {k: v.replace("model-", "model.bf16-") for k, v in index["weight_map"].items()}
    for path in folder.glob("model-*.safetensors"):
        path.rename(folder / path.name.replace("model-", "model.bf16-"))
    (folder / "model.safetensors.index.bf16.json").write_text(json.dumps(index))
    assert len(set(index["weight_map"].values())) > 1
    assert_same(read(folder, LLAMA), params)


def test_a_grown_vocabulary_is_read_by_columns():
    """A shard of some columns takes those alone, and has the new rows that the whole has."""
    rows = np.random.default_rng(0).standard_normal((37, 8)).astype(np.float32)
    taken = []

    class Recorder:
        shape, dtype = rows.shape, rows.dtype

        def __getitem__(self, index):
            taken.append(rows[index].size)
            return rows[index]

    view = View((48, 8), rows.dtype, False, [Recorder], tokens=41)
    got = view[:, 2:4]
    assert max(taken) <= 37 * 2 and got.shape == (48, 2)
    np.testing.assert_array_equal(got[:37], rows[:, 2:4])
    np.testing.assert_allclose(got[37:41], np.broadcast_to(rows[:, 2:4].mean(0), (4, 2)), rtol=1e-5)
    np.testing.assert_array_equal(got[41:], 0)
    np.testing.assert_array_equal(view[30:45, 2:4], got[30:45])


def test_timm_and_open_clip_configs(tmp_path):
    write(tmp_path / "a", "eva")
    arguments = dict(img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5)
    timm = dict(architecture="eva02_enormous_patch14_clip_224", model_args=arguments)
    (tmp_path / "a/config.json").write_text(json.dumps(timm))
    read(tmp_path / "a", PARTS["eva"])
    (tmp_path / "a/config.json").unlink()
    (tmp_path / "a/preprocessor_config.json").unlink()  # of 12 pixels
    tower = dict(timm_model_name="eva02_enormous_patch14_clip_224", image_size=224)
    (tmp_path / "a/open_clip_config.json").write_text(json.dumps(dict(model_cfg=dict(vision_cfg=tower))))
    assert Folder.open(f"{tmp_path}/a").settings == published.EVA_CLIP_E_PLUS_224


def test_sources():
    assert not is_folder("stage1")
    for source in ("./weights", "/data/llama/", "weights/llama", "hf://org/name", "hf://org/name/vae@main"):
        assert is_folder(source)
    with pytest.raises(UserError, match="is not a directory"):
        resolve("./nowhere")
    with pytest.raises(UserError, match="does not name a repository: write hf://ORGANISATION/NAME"):
        resolve("hf://name")


def test_repositories_of_the_hub(tmp_path, monkeypatch):
    """What is asked for and nothing else is downloaded; one that has pickles alone is told how to go on."""
    files = {"vae/config.json", "vae/diffusion_pytorch_model.bin", "pytorch_model.bin", "tokenizer.model"}
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda name, revision: sorted(files))
    with pytest.raises(UserError, match=r"hf://org/name/vae@r1 has only pickles \(diffusion_pytorch_model.bin\)"):
        resolve("hf://org/name/vae@r1")
    assert asked == [("org/name", "r1", ["vae/*.json", "vae/*.safetensors"])]
    assert resolve("hf://org/name", TOKENIZER) == tmp_path
    assert asked[1] == ("org/name", None, ["*.json", "tokenizer.model", "merges.txt"])
    (tmp_path / "model.safetensors").touch()
    assert resolve("hf://org/name") == tmp_path


# --- what is refused


def change(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1.0, factor=2.0)), "rope_type 'yarn'"),
        (dict(rope_parameters=None, rope_scaling=dict(type="linear", factor=2.0)), "rope_type 'linear'"),
        (dict(quantization_config=dict(quant_method="bitsandbytes")), "a quantized model"),
        (dict(attention_bias=True), "attention_bias True"),
        (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
        (dict(hidden_act=None), "hidden_act None"),
        (dict(num_attention_heads=0, head_dim=None), "download it again"),
        (dict(model_type="mamba"), "'mamba'"),
        (dict(rope_parameters=dict(rope_type="llama3", rope_theta=1.0)), "factor"),
        (dict(hidden_size="16"), "download it again"),
    ],
)
def test_unsupported_architectures_are_refused_in_one_sentence(tmp_path, values, said):
    write(tmp_path / "a")
    change(tmp_path / "a", **values)
    with pytest.raises(UserError, match=said) as error:
        import_folder(f"{tmp_path}/a", tmp_path / "out")
    assert "config.json" in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_what_configs_leave_out_in_other_ways(tmp_path):
    """A null in place of nothing; the rotary base beside rope_parameters, as between transformers 4 and 5."""
    write(tmp_path / "a")
    change(tmp_path / "a", quantization_config=None, rope_parameters=dict(rope_type="default"), rope_theta=1234.0)
    path = tmp_path / "a/config.json"
    path.write_text(path.read_text(), "utf-8-sig")  # a byte order mark, as some editors write
    opened = Folder.open(f"{tmp_path}/a").settings
    assert opened.rope_theta == 1234.0 and opened.rope_scaling is None


@pytest.mark.parametrize(
    "values, said",
    [
        (dict(resample=2), "resampling 2"),
        (dict(do_normalize=False), "do_normalize false"),
        (dict(rescale_factor=1.0), "a rescale_factor of 1.0"),
        (dict(size=dict(height=99, width=99)), "pictures of 12"),
        (dict(image_mean=0.5), "download it again"),
        (dict(image_std=[0.5]), "download it again"),
    ],
)
def test_other_preprocessing_is_refused(tmp_path, values, said):
    write(tmp_path / "a", "siglip")
    path = tmp_path / "a/preprocessor_config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps(dict(given, image_mean=[0.1, 0.2, 0.3], image_std=None, resample=None)))
    opened = Folder.open(f"{tmp_path}/a").settings
    assert opened.mean == (0.1, 0.2, 0.3) and opened.std == PARTS["siglip"].std
    path.write_text(json.dumps({**given, **values}))
    with pytest.raises(UserError, match=said) as error:
        Folder.open(f"{tmp_path}/a")
    assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)


def test_eva_with_another_activation_is_exported_in_our_layout(tmp_path):
    """EVA's files do not name it: read back, it would be the exact GELU."""
    settings = dataclasses.replace(PARTS["eva"], activation="gelu_tanh")
    assert export_part(tmp_path / "a", "generation_encoder", settings, filled(settings)) == "pisces_jax"
    assert Folder.open(f"{tmp_path}/a").settings == settings


def test_the_tokenizer_must_be_that_of_the_weights(tmp_path):
    write(tmp_path / "a")  # 37 tokens
    folder = Folder.open(f"{tmp_path}/a")
    for tokens in (37, 41):
        folder.check(dataclasses.replace(LLAMA, vocab_size=tokens), "model.language_model")
    for tokens in (36, 42, 128_260):
        with pytest.raises(UserError, match=f"has 37 tokens and the tokenizer {tokens}.*data.tokenizer"):
            folder.check(dataclasses.replace(LLAMA, vocab_size=tokens), "model.language_model")


def test_rows_without_a_token_are_padding_or_refused(tmp_path):
    """37 tokens of the tokenizer's own: 40 and 64 rows are multiples of a power of two, 41 are somebody's tokens."""
    for rows in (40, 64):
        settings = dataclasses.replace(LLAMA, vocab_size=rows)
        params = filled(settings)
        export_part(tmp_path / str(rows), "part", settings, params)
        for multiple in (1, 8):
            wanted = dataclasses.replace(LLAMA, vocab_size=41, vocab_multiple=multiple)
            got = read_source(f"{tmp_path}/{rows}", wanted, "part", own_tokens=37)
            for name in ("embedding", "head"):
                np.testing.assert_array_equal(got[name][:37], params[name][:37])
                mean = params[name][:37].astype(np.float64).mean(0)  # not a row of the padding
                np.testing.assert_allclose(got[name][37:41], np.tile(mean, (4, 1)), rtol=1e-5)
                assert not got[name][41:].any()
    settings = dataclasses.replace(LLAMA, vocab_size=41)
    export_part(tmp_path / "added", "part", settings, filled(settings))
    folder = Folder.open(f"{tmp_path}/added")
    folder.check(settings, "model.language_model", 41)  # our own run, with the tokenizer that was exported beside it
    with pytest.raises(UserError, match="rows for 41 tokens and the tokenizer's file has 37: set data.tokenizer"):
        folder.check(settings, "model.language_model", 37)


def test_a_config_with_another_vocabulary_than_the_files_is_refused(tmp_path):
    write(tmp_path / "a")
    change(tmp_path / "a", vocab_size=40)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight is \(37, 16\) and must be \(40, 16\)"):
        read(tmp_path / "a", dataclasses.replace(LLAMA, vocab_size=40))


@pytest.mark.parametrize("name", ["processor", "open_clip", "timm"])
def test_every_file_about_preprocessing_is_read(tmp_path, name):
    """processor_config.json of transformers 5, preprocess_cfg of open_clip, pretrained_cfg of timm."""
    folder = tmp_path / "a"
    write(folder, "siglip" if name == "processor" else "eva")
    own = folder / "preprocessor_config.json"
    if name == "processor":  # it comes before the older file
        file, key, size, values = "processor_config.json", "image_processor", "size", dict(json.loads(own.read_text()))
        mean, std, resample, refused = "image_mean", "image_std", "resample", 2
    else:
        own.unlink()
        arguments = dict(img_size=12, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_ratio=1.5)
        timm = dict(architecture="eva02_enormous_patch14_clip_224", model_args=arguments)
        (folder / "config.json").write_text(json.dumps(timm))
        mean, std, resample, refused = "mean", "std", "interpolation", "bilinear"
        file, key, size = "open_clip_config.json", "preprocess_cfg", "size"
        if name == "timm":
            file, key, size = "config.json", "pretrained_cfg", "input_size"
        values = {resample: "bicubic", size: [3, 12, 12] if name == "timm" else 12}
    values |= {mean: [0.1, 0.2, 0.3], std: [0.5, 0.25, 0.125]}
    rest = timm if file == "config.json" else {}

    def opened(**changes):
        (folder / file).write_text(json.dumps({**rest, key: {**values, **changes}}))
        return Folder.open(f"{folder}").settings

    assert (opened().mean, opened().std) == ((0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    for changes, said in (
        ({resample: refused}, f"resampling {refused}"),
        ({size: [3, 14, 14] if name == "timm" else 14}, "for pictures of 12"),
        (dict(crop_pct=0.9), "crop_pct of 0.9"),
        (dict(resize_mode="longest"), "resizing by 'longest'"),
    ):
        if name == "processor" and "crop_pct" in changes:
            break
        with pytest.raises(UserError, match=f"{file} describes .*{said}"):
            opened(**changes)


def test_an_attention_backend_is_no_other_model(tmp_path):
    write(tmp_path / "a")
    Folder.open(f"{tmp_path}/a").check(dataclasses.replace(LLAMA, attention="xla"), "model.language_model")
    settings = dataclasses.replace(PARTS["siglip"], attention="xla")
    assert export_part(tmp_path / "b", "part", settings, filled(settings)) == "siglip"


def test_other_towers_of_eva_are_refused(tmp_path):
    write(tmp_path / "a", "eva")
    for key, value in (("rope", True), ("naiveswiglu", True), ("postnorm", False), ("subln", True)):
        tower = json.loads((tmp_path / "a/config.json").read_text())["vision_config"]
        (tmp_path / "b.json").write_text(json.dumps(dict(vision_config={**tower, key: value})))
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c/config.json").write_text((tmp_path / "b.json").read_text())
        with pytest.raises(UserError, match=key):
            Folder.open(f"{tmp_path}/c")


def test_every_wrong_tensor_is_listed_in_one_error(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    weights["model.layers.2.self_attn.q_proj.weight"] = np.zeros((31, 16), np.float32)
    weights["model.extra.weight"] = np.zeros(5, np.float32)
    weights["model.embed_tokens.weight"] = np.zeros((37, 15), np.float32)
    save_file(weights, path)
    with pytest.raises(UserError) as error:
        import_folder(f"{tmp_path}/a", tmp_path / "out")
    for said in (
        "missing model.layers.1.mlp.up_proj.weight (24, 16)",
        "model.layers.2.self_attn.q_proj.weight is (31, 16) and must be (32, 16)",
        "surplus model.extra.weight (5,)",
        "model.embed_tokens.weight is (37, 15) and must be (37, 16)",
    ):
        assert said in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_settings_that_differ_are_listed(tmp_path):
    write(tmp_path / "a")
    other = dataclasses.replace(LLAMA, eps=1e-6, rope_theta=10_000.0, remat="full", vocab_multiple=64)
    with pytest.raises(UserError, match="model.language_model does not fit") as error:
        Folder.open(f"{tmp_path}/a").check(other, "model.language_model")
    assert "eps (1e-05 there, 1e-06 in the config)" in str(error.value)
    assert "rope_theta" in str(error.value) and "remat" not in str(error.value)


@pytest.mark.parametrize("cut", [0, 5, 100, -1, -4096])
def test_truncated_files_are_named(tmp_path, cut):
    write(tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    least = f"{len(whole):,}" if len(whole[:cut]) > 4000 else "at least [0-9,]*"  # of a whole header the size is known
    said = rf"model.safetensors is truncated \(it has {len(whole[:cut]):,} of {least} bytes\)"
    with pytest.raises(UserError, match=said) as error:
        import_folder(f"{tmp_path}/a", tmp_path / "out")
    assert "download it again" in str(error.value) and "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_headers_that_point_nowhere_are_refused(tmp_path):
    write(tmp_path / "a")
    for entry in (
        dict(shape=[2, 2], data_offsets=[-16, 0]),
        dict(shape=[2, 2], data_offsets=[32, 16]),
        dict(shape=[-2, -2], data_offsets=[0, 16]),
    ):
        header = json.dumps({"x": dict(entry, dtype="F32")}).encode()
        content = len(header).to_bytes(8, "little") + header + 64 * b"\0"
        (tmp_path / "a/model.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="not a safetensors file .*(invalid offset|invalid value)"):
            Folder.open(f"{tmp_path}/a")


def test_files_that_are_no_safetensors(tmp_path):
    write(tmp_path / "a")
    path = tmp_path / "a/model.safetensors"
    header = json.dumps({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}).encode()
    wrong_size = len(header).to_bytes(8, "little") + header + 4 * b"\0"
    for content, said in (
        (b"x" * 100, "damaged or not a safetensors file"),
        (b"\x08" + 7 * b"\0" + b"not json", "damaged or not a safetensors file"),
        (wrong_size, "damaged or not a safetensors file"),
        (b"PK\x03\x04" + b"x" * 100, "is a zip archive .*, not safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a git-lfs pointer .*git lfs pull"),
        (b"\x1f\x8b" + b"x" * 100, "compressed by gzip"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=said):
            Folder.open(f"{tmp_path}/a")
    (tmp_path / "a/config.json").write_text("{}", "utf-16")
    with pytest.raises(UserError, match="config.json is text in UTF-16"):
        Folder.open(f"{tmp_path}/a")


def test_pickles_and_quantized_tensors_are_refused(tmp_path):
    folder = tmp_path / "a"
    write(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickles \(pytorch_model.bin\).*save_file"):
        Folder.open(f"{folder}/")
    write(tmp_path / "b")
    weights = load_file(tmp_path / "b/model.safetensors")
    weights["model.norm.weight"] = np.zeros(16, np.int8)
    save_file(weights, tmp_path / "b/model.safetensors")
    with pytest.raises(UserError, match=r"has quantized values \(I8\)"):
        import_folder(f"{tmp_path}/b", tmp_path / "out")
    for i in range(2):
        save_file(weights, tmp_path / f"b/part{i}.safetensors")
    (tmp_path / "b/model.safetensors").unlink()
    with pytest.raises(UserError, match="several sets of weights"):
        Folder.open(f"{tmp_path}/b")


def test_nothing_that_looks_finished_is_left_by_a_killed_import(tmp_path):
    """SIGKILL while the tensors are written."""
    write(tmp_path / "a")
    code = (
        "import os, signal, sys\n"
        "from pisces_jax.weights import tensors\n"
        "real = tensors._write_file\n"
        "def write(path, pending, progress):\n"
        "    real(path, pending[:1], progress)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "tensors._write_file = write\n"
        "from pathlib import Path\n"
        "from pisces_jax.weights.export import import_folder\n"
        "import_folder(sys.argv[1], Path(sys.argv[2]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, f"{tmp_path}/a", f"{tmp_path}/out"], env=dict(os.environ))
    assert done.returncode == -9
    assert not (tmp_path / "out").exists()
    left = [p for p in tmp_path.iterdir() if p.name != "a"]
    assert all(p.name.startswith(".out.writing-") and not (p / "config.json").exists() for p in left)
    import_folder(f"{tmp_path}/a", tmp_path / "out")
    assert_same(read(tmp_path / "out", LLAMA), read(tmp_path / "a", LLAMA))
    assert {p.name for p in tmp_path.iterdir()} == {"a", "out"}
    with pytest.raises(UserError, match="exists already"):
        import_folder(f"{tmp_path}/a", tmp_path / "out")


def test_what_another_process_still_writes_is_left_alone(tmp_path):
    with new_folder(tmp_path / "out") as first:
        (first / "config.json").write_text("{}")
        with new_folder(tmp_path / "out") as second:
            assert first.exists() and second.exists()
            second.joinpath("config.json").write_text("{}")
        (tmp_path / "out").rename(tmp_path / "other")
    assert (tmp_path / "out/config.json").exists() and not list(tmp_path.glob(".out*"))
    plain = tmp_path / "plain"
    plain.mkdir()
    assert (tmp_path / "out").stat().st_mode == plain.stat().st_mode


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
@pytest.mark.slow
def test_importing_takes_no_more_memory_than_a_tensor(tmp_path):
    """A file set of 540 MB under a limit of 300 MB above what the process has at its start."""
    wide = dataclasses.replace(
        LLAMA, vocab_size=4096, width=1024, layers=12, heads=8, kv_heads=8, head_dim=128, mlp_hidden=4096
    )
    shapes = part_shapes(wide)
    zeros = jax.tree.map(lambda s: np.zeros(s.shape, jnp.bfloat16), shapes)
    assert sum(x.nbytes for x in jax.tree.leaves(zeros)) > 4e8
    export_part(tmp_path / "a", "part", wide, zeros)
    code = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from pisces_jax.weights.export import import_folder\n"
        "from pisces_jax.weights.folder import Folder, part_shapes\n"
        "part_shapes(Folder.open(sys.argv[1]).settings)\n"  # what JAX itself takes
        "data = int(next(l for l in open('/proc/self/status') if l.startswith('VmData')).split()[1]) * 1024\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (data + 300 * 2**20,) * 2)\n"
        "import_folder(sys.argv[1], Path(sys.argv[2]))\n"
    )
    subprocess.run([sys.executable, "-c", code, f"{tmp_path}/a", f"{tmp_path}/out"], check=True)
