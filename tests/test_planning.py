"""Plans: collectives against programs whose traffic is known, memory and FLOPs in closed form, tiny TPU programs."""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pisces_jax import plan as plan_command
from pisces_jax import xla_flags
from pisces_jax.models.vit import ViTConfig
from pisces_jax.planning import compiled, compilers, hlo, inference, memory, report, roofline, search, slices
from pisces_jax.planning.advice import advise
from pisces_jax.planning.compiled import abstract_trainer, compile_step, make_plan, memory_asked_for, plan_trainer
from pisces_jax.sharding import MESH_AXES, make_mesh, user_mesh
from pisces_jax.training import flops
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.base import check_batch
from pisces_jax.utils.chips import CHIPS, count_chips, find_chip
from pisces_jax.utils.errors import UserError, run_command

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: it is for Linux on x86-64 alone"
)


# --- collectives


def found_in(function, mesh, *shapes):
    """The collectives of a function over shards, compiled for the fake CPU devices."""
    arguments = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in shapes]
    text = jax.jit(function).lower(*arguments).compile().as_text()
    return {(c.kind, c.axis, c.bytes): c.executions for c in hlo.collectives(text, dict(mesh.shape))}


def sharded(mesh, in_specs, out_specs):
    return functools.partial(jax.shard_map, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def test_collectives_by_kind_axis_and_bytes():
    """A ring over n devices: (n-1)/n of the larger side, twice that for an all-reduce."""
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def local(x):
        whole = jax.lax.all_gather(x, "tensor", tiled=True)  # [16, 8]: 512 bytes
        total = jax.lax.psum(x, ("data", "fsdp"))  # 256 bytes over 4
        part = jax.lax.psum_scatter(whole, "data", tiled=True)  # 512 bytes over 2
        return whole.sum() + total.sum() + part.sum() + jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0)]).sum()

    run = sharded(mesh, P("tensor"), P())(local)
    got = found_in(run, mesh, ((16, 8), P("tensor")))
    assert got["all-gather", "tensor", 512 / 2] == 1
    assert got["all-reduce", "data+fsdp", 2 * 256 * 3 / 4] == 1
    assert got["reduce-scatter", "data", 512 / 2] == 1
    assert got["collective-permute", "fsdp", 256] == 1


def test_collectives_in_loops_count_every_trip():
    mesh = make_mesh(fsdp=8, devices=jax.devices())

    def local(x):
        def inner(c, _):
            return jax.lax.psum(c, "fsdp") * 0.5, None

        def outer(c, _):
            return jax.lax.all_gather(jax.lax.scan(inner, c, length=3)[0], "fsdp_inner", tiled=True)[:4], None

        return jax.lax.scan(outer, x, length=5)[0]

    run = sharded(mesh, P(("fsdp", "fsdp_inner")), P(("fsdp", "fsdp_inner")))(local)
    got = found_in(run, mesh, ((32,), P(("fsdp", "fsdp_inner"))))
    assert got["all-reduce", "fsdp", 2 * 16 / 2] == 15
    assert got["all-gather", "fsdp_inner", 64 * 3 / 4] == 5


@pytest.mark.parametrize(
    "attributes, expected",
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups={}", list(range(8))),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=(0,4,1,5,2,6,3,7) {'a'}", [0, 2]),
        # 0 to 7 as four pairs, transposed: 0, 2, 4, 6 and 1, 3, 5, 7.
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a'}", [0, 1]),
        ("replica_groups=mesh['a'=2,'b'=4], device_ids=([8]) {'b'}", [0, 1, 2, 3]),
    ],
)
def test_replica_groups(attributes, expected):
    assert hlo._group(attributes, "all-reduce", {"x": 2, "y": 4}) == expected


def test_replica_groups_of_an_unknown_form_are_not_taken_for_all():
    for attributes in ("replica_groups=something new", "replica_groups=mesh['a'=2], device_ids=(2..3) {'a'}"):
        with pytest.raises(ValueError, match="unknown form"):
            hlo._group(attributes, "all-reduce", {"x": 2})


def test_a_fused_reduce_scatter_counts_as_one():
    """How the TPU compiler writes it: an all-reduce and a slice in a computation of that name."""
    text = """HloModule m

%all-reduce-scatter.1 (p: bf16[8,128]) -> bf16[2,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,128]{1,0} all-reduce(%p), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = bf16[2,128]{1,0} dynamic-slice(%all-reduce.1, %c, %c), dynamic_slice_sizes={2,128}
}

ENTRY %main (a: bf16[8,128]) -> bf16[2,128] {
  %a = bf16[8,128]{1,0} parameter(0)
  ROOT %f = bf16[2,128]{1,0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    (one,) = hlo.collectives(text, {"x": 4})
    assert (one.kind, one.axis, one.bytes, one.executions) == ("reduce-scatter", "x", 8 * 128 * 2 * 3 / 4, 1)


# --- slices


def test_names_of_slices():
    assert slices.read_name("v5p:4x4x4") == ("v5p", "4x4x4")
    assert slices.read_name("v4-128") == ("v4", "4x4x4")  # counted in cores, two a chip
    assert slices.read_name("v5e-256") == ("v5e", "16x16")
    assert slices.read_name("cpu:8") == ("cpu", "8")
    assert slices.read_name("h100:8") == ("h100", "8")
    assert slices.read_name("h200:2x8") == ("h200", "2x8")
    wrong = ("v5p", "v5p:4x4", "v7:4x4", "v4-100", "v5p:8", "cpu:0", "cpu-8", "gpu:8", "", ":", "v4:", "v4-")
    for name in (*wrong, "h100", "h100:0", "h100:16", "h100:0x8", "h100:2x0", "h100:1x2x8", "h100-8", "H100:8"):
        with pytest.raises(UserError, match="write it like v5p:4x4x4, v5p-128, v5e:16x16, h100:8, h100:2x8"):
            slices.read_name(name)
    for name, chip in CHIPS.items():
        assert all(slices.read_name(f"{name}:{shape}") == (name, shape) for shape in chip.shapes)
        assert [count_chips(s) for s in chip.shapes] == sorted(count_chips(s) for s in chip.shapes)


@pytest.mark.parametrize(
    "name, sparse_tflops, gigabytes, terabytes_a_second, nvlink, adapter",
    [
        # NVIDIA's data sheets: TFLOP/s with sparsity, GB, TB/s, NVLink in GB/s for both directions; and the Gb/s of
        # each GPU's network adapter in a DGX.
        ("a100", 624, 80, 2.039, 600, 200),
        ("h100", 1979, 80, 3.35, 900, 400),
        ("h200", 1979, 141, 4.8, 900, 400),
        ("rtx4090", 330.4, 24, 1.008, 64, 10),  # PCI Express in place of NVLink, and no DGX
        ("rtx6000ada", 728.5, 48, 0.96, 64, 10),
    ],
)
def test_gpus_are_as_on_their_data_sheets(name, sparse_tflops, gigabytes, terabytes_a_second, nvlink, adapter):
    chip = CHIPS[name]
    assert chip.flops == pytest.approx(sparse_tflops / 2 * 1e12, rel=1e-3)
    assert 0.98 * gigabytes * 2**30 < chip.hbm_bytes <= gigabytes * 2**30  # the driver keeps some
    assert chip.hbm_bandwidth == pytest.approx(terabytes_a_second * 1e12)
    assert chip.link_bandwidth == nvlink / 2 * 1e9 and chip.dcn_bandwidth == adapter / 8 * 1e9
    assert find_chip(chip.description) is chip and not chip.calibrated


def test_the_share_of_jaxs_pool(monkeypatch):
    """A flag, or what JAX reads; and no word of it for chips that have no pool."""
    monkeypatch.setattr(compilers, "devices", lambda chip, shape, slices: ())
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    assert slices.find_slice("h100:8").chip.pool == 0.75
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".5")
    assert slices.find_slice("h100:8").chip.pool == 0.5
    assert slices.find_slice("h100:8", mem_fraction="0.95").chip.pool == 0.95
    assert slices.of_shape(slices.find_slice("h100:2x8"), "1") == slices.Slice(
        "h100:1", (), dataclasses.replace(CHIPS["h100"], pool=0.5), 1
    )
    for wrong in ("0", "1.5", "-1", "nan", "most"):
        with pytest.raises(UserError, match="--mem_fraction=.*: write a share of the memory"):
            slices.find_slice("h100:8", mem_fraction=wrong)
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match="XLA_PYTHON_CLIENT_MEM_FRACTION=.*: write a share of the memory"):
            slices.find_slice("h200:1")
    for name in ("v5e:2x2", "cpu:2"):
        with pytest.raises(UserError, match="--mem_fraction is for GPU topologies: leave it out"):
            slices.find_slice(name, mem_fraction="0.9")
    for name in ("h100:8", "cpu:2"):
        with pytest.raises(UserError, match="--slices is for TPU topologies: leave it out"):
            slices.find_slice(name, 2)


@pytest.mark.parametrize(
    "installed, words",
    [
        ({}, "compiling for NVIDIA GPUs needs their compiler, which runs on any machine: pip install"),
        ({"jax-cuda12-plugin": "0.4.1"}, rf"\(jax-cuda12-plugin\) is of release 0.4.1 and JAX of {jax.__version__}"),
        ({"jax-cuda12-plugin": jax.__version__}, "needs their assembler, ptxas, which is not here"),
        ({"jax-cuda12-plugin": "0.4.1", "jax-cuda13-plugin": jax.__version__, "nvidia-cuda-nvcc": "13.0"}, None),
    ],
    ids=["none", "old", "no assembler", "one of two"],
)
def test_a_missing_or_old_compiler_for_gpus(installed, words, monkeypatch):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(compilers.shutil, "which", lambda name, path=None: None)  # this machine may have CUDA
    if words is None:
        compilers.check_gpu_plugin()
        return
    with pytest.raises(UserError, match=words) as raised:
        slices.find_slice("h100:8")
    assert "pip install -e '.[plan-gpu]'" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "device_kind, name",
    [
        ("TPU v4", "v4"), ("TPU v5 lite", "v5e"), ("TPU v5e", "v5e"), ("TPU v5p", "v5p"), ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"), ("NVIDIA A100-SXM4-40GB", "A100"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H200", "H200"), ("NVIDIA GeForce RTX 4090", "RTX4090"),
    ],
)  # fmt: skip
def test_chips_by_the_names_of_their_devices(device_kind, name):
    assert find_chip(device_kind).name == name
    assert find_chip("cpu") is None


def test_more_cpus_than_there_are():
    with pytest.raises(UserError, match="JAX has 8 CPU devices here: set XLA_FLAGS"):
        slices.find_slice("cpu:16")


# --- a plan


def test_a_plan_of_drawing(released_config_of_tiny):
    """Two phases for CPUs: parameters by part, and the peaks with all of them there and with one phase's at a time."""
    config, decoder = released_config_of_tiny
    plan = inference.make_inference_plan(config, slices.find_slice("cpu:2"), 0, pictures=2, dtype="float32")
    by_part = plan.parameters
    assert set(by_part) == {"language_model", "queries", "generator", "decoder", "autoencoder"}
    assert by_part["queries"] == 4 * 24 * 4 // 2  # sharded over fsdp=2
    own = sum(n for part, n in by_part.items() if part not in decoder.parts)
    assert plan.peaks["vectors"] >= own and plan.in_turn == max(plan.peaks.values())
    assert plan.resident >= plan.in_turn + min(own, sum(by_part.values()) - own)
    assert plan.size == 16 and plan.fits and plan.cache == 2 * 2 * 2 * (128 + 4 + 2) * 2 * 6 * 4
    assert "cache" in inference.describe(plan) and plan.to_json()["fits_in_turn"]
    config.decoder = "nowhere/diffusion-decoder"
    with pytest.raises(UserError, match="draws from vectors of 1792 numbers and .*'s have 16"):
        inference.make_inference_plan(config, slices.find_slice("cpu:2"))


@pytest.fixture
def released_config_of_tiny(tmp_path):
    import blip3o_folder

    from pisces_jax.inference.released import decoder_of_folder, released_config

    blip3o_folder.write(tmp_path / "m")
    config = released_config(tmp_path / "m")
    config.data.tokenizer_vocabulary = 300
    return config, decoder_of_folder(config.decoder, config)[0]


def unified(**changes):
    data = dict(row_length=32, rows_per_pool=2, read_slots=3, draw_slots=3, train={"a": {}})
    config = tiny.config(program="unified", batch_size=16, model=tiny.model_settings(32), data=data)
    config.optimizer.param_groups = (("generation_encoder/.*", 0.0, 0.0), (".*", 1.0, 0.0))
    for key, value in changes.items():
        config[key].update(value)
    return config


def test_the_planned_batch_is_what_packing_makes():
    config = unified()
    trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 32)
    made = tiny.batch(*[tiny.pack([[tiny.CAPTION], [tiny.DRAW]])] * 8)
    check_batch(trainer.program.batch_spec(config), made, 1)


def test_the_planned_batch_has_features_where_they_are_cached():
    """As `PackedGroups.empty` and `Pairs.empty` have them; and the encoder, which does not run, costs nothing."""
    config = unified()
    config.data.features = "features"
    trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 32)
    spec = trainer.program.batch_spec(config)
    assert "draw_images" not in spec
    assert spec["draw_features"] == jax.ShapeDtypeStruct((8, config.data.draw_slots, 4, 16), jnp.float32)
    cost = flops.step_flops_by_part(trainer.program, spec, {"language_model"})
    assert cost["generation_encoder"] == 0 < cost["language_model"]
    decoder = tiny.config(
        program="decoder", batch_size=8, model=tiny.model_settings(32), data=dict(text_length=12, features="features")
    )  # fmt: skip
    program = make_program(decoder, 32)
    assert program.batch_spec(decoder)["features"] == jax.ShapeDtypeStruct((8, 4, 16), jnp.float32)


@pytest.fixture(scope="module")
def plan():
    return make_plan(unified(mesh=dict(fsdp=4, tensor=2)), slices.find_slice("cpu:8"), 32)


def test_a_plan_for_cpus(plan):
    """Arguments that the compiler counts are the parameters, moments, batch and the step that the formulas count."""
    assert plan.fits and plan.hbm_bytes is None and plan.predicted_step_seconds is None
    assert plan.mesh == dict(data=1, fsdp=4, tensor=2) and plan.devices == 8 and plan.rows_per_device == 2
    held = sum(v for k, v in plan.memory.items() if k.partition("/")[0] in ("parameters", "optimizer", "batch"))
    # Frozen parts and the rest; the counters of the step and of the optimizer are left out of the formulas.
    assert plan.compiler["arguments"] == pytest.approx(held, abs=2048)
    assert plan.wire_bytes_per_step == pytest.approx(sum(c["bytes"] * c["executions"] for c in plan.collectives))
    assert {"fsdp", "fsdp_inner", "tensor"} <= {a for c in plan.collectives for a in c["axis"].split("+")}
    assert plan.model_flops_per_step == pytest.approx(sum(plan.model_flops_by_part.values()))
    frozen = plan.model_flops_by_part["generation_encoder"]
    assert plan.model_flops_per_step_trained == pytest.approx(plan.model_flops_per_step - frozen)
    text = report.describe(plan)
    assert "mesh fsdp=4,tensor=2" in text and "reduce-scatter" in text
    names = {"fits", "peak_bytes", "hbm_bytes", "memory", "collectives", "wire_bytes_per_step", "model_flops_per_step"}
    names |= {"predicted_step_seconds", "predicted_mfu", "compile_seconds"}
    assert names <= json.loads(json.dumps(plan.to_json())).keys()


def test_parts_of_the_flops_sum_to_the_step():
    config = unified()
    trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 32)
    spec = trainer.program.batch_spec(config)
    trained = set(trainer.shardings.trained)
    parts = flops.step_flops_by_part(trainer.program, spec, trained)
    assert flops.step_flops(trainer.program, spec, trained) == sum(parts.values())
    c = trainer.program.model.config.language_model
    weights = c.layers * (c.width * c.head_dim * 2 * (c.heads + c.kv_heads) + 3 * c.width * c.mlp_hidden)
    products = 2 * 32 * (weights + c.width * c.vocab_size) + 2 * 32**2 * c.heads * c.head_dim * c.layers
    assert parts["language_model"] == pytest.approx(3 * 16 * products)


def test_flops_of_words_as_labels():
    """A product of each of four vectors of 16 with the vocabulary, and its gradients; pictures as one encoder's."""
    model = {k: v for k, v in tiny.model_settings().items() if k not in ("generation_encoder", "decoder")}
    config = tiny.config(program="pretrain", batch_size=8, model=model, loss=dict(words=0.5))
    program = make_program(config, 32)
    spec = program.batch_spec(config)
    assert spec["image"].shape == (8, 8, 8, 3)
    parts = flops.step_flops_by_part(program, spec, {"understanding_encoder", "text_tower", "words"})
    assert parts.keys() == {"understanding_encoder", "text_tower", "words"}
    assert parts["words"] == 3 * 8 * 2 * 4 * 16 * 32


def test_flops_of_a_stem_of_convolutions():
    """Pixels halved twice: 9 products of 3 × 8 channels for each of 8 × 8, of 8 × 16 for each of 4 × 4."""
    plain = ViTConfig(image_size=16, patch_size=4, width=8, layers=1, heads=1, mlp_hidden=8)
    stem = dataclasses.replace(plain, stem=(8, 16))
    patches = 2 * 16 * 8 * (16 - 3 * 16)  # a patch is 16 channels of one pixel in place of 3 of 16
    assert flops.vit(stem) - flops.vit(plain) == 2 * 9 * (3 * 8 * 64 + 8 * 16 * 16) + patches


def test_memory_by_formula():
    mesh = make_mesh(fsdp=4, tensor=2)
    assert memory.shard_bytes((64, 48), jnp.bfloat16, NamedSharding(mesh, P(("fsdp", "fsdp_inner"), "tensor"))) == 768
    # A layer that saves its input: positions × width × bytes, for each position of this device's rows.
    config = unified(mesh=dict(fsdp=4, tensor=2))
    config.model.language_model.remat = "full"
    trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 32)
    c = trainer.program.model.config.language_model
    positions = 8 // 4 * 2 * 32
    assert memory.saved_activations(trainer)["language_model"] == c.layers * positions * c.width * 4 // 2


def test_bandwidth_of_a_mesh_axis():
    """A dimension of the torus that is closed to a ring gives two links; v5p's are closed from four chips on."""

    class Device:
        def __init__(self, *coords):
            self.coords = coords

    chip = CHIPS["v5p"]
    devices = np.array([[Device(x, y, 0) for y in range(2)] for x in range(4)])
    mesh = SimpleNamespace(devices=devices, shape=dict(fsdp=4, tensor=2))
    assert roofline.axis_bandwidth(chip, mesh, "fsdp") == 2 * chip.link_bandwidth
    assert roofline.axis_bandwidth(chip, mesh, "tensor") == chip.link_bandwidth
    assert roofline.axis_bandwidth(chip, mesh, "fsdp+tensor") == 3 * chip.link_bandwidth


def test_bandwidth_between_gpus():
    """NVLink inside a host; between two, the adapters of the group's GPUs on one of them."""
    devices = [SimpleNamespace(platform="cuda", process_index=i // 8) for i in range(16)]
    found = {
        (axis, *mesh.devices.shape): roofline.axis_bandwidth(CHIPS["h100"], mesh, axis) / 1e9
        for mesh in (
            SimpleNamespace(devices=np.array(devices).reshape(shape), shape=dict(zip(MESH_AXES, shape, strict=True)))
            for shape in ((1, 4, 4, 1), (2, 2, 4, 1))
        )
        for axis in ("fsdp_inner", "fsdp", "fsdp+fsdp_inner", "data")
    }
    whole, split = (1, 4, 4, 1), (2, 2, 4, 1)
    assert found["fsdp_inner", *whole] == found["fsdp_inner", *split] == 450
    assert found["fsdp", *whole] == 2 * 50 and found["fsdp+fsdp_inner", *whole] == 8 * 50
    assert found["fsdp", *split] == found["fsdp+fsdp_inner", *split] == 450 and found["data", *split] == 50


@pytest.mark.parametrize(
    "name, published, predicted",
    [
        # MFU as published; by hand: the median of the executed shares is the 52B run's, 0.589 x 4/3 = 0.785, of which a
        # run that computes every block again shows 3/4, and one that computes nothing again shows all.
        ("v5e-256, MaxText 16B", 0.611, 0.589),
        ("v5e-256, MaxText 32B", 0.669, 0.589),
        ("v4-384 x 2, MaxText 52B", 0.589, 0.589),
        ("v5p-128, MaxText 32B", 0.715, 0.785),
        ("v6e-256, MaxText Llama-3.1-8B", 0.455, 0.589),
    ],
)
def test_the_prediction_is_calibrated_on_published_runs(name, published, predicted):
    run = next(run for run in roofline.PUBLISHED if run.name == name)
    assert run.mfu == published
    # A step of 3e12 model FLOPs on a chip of 1e12 FLOP/s that only products hold up.
    executed = roofline.executed_flops({"language_model": 3e12, "frozen": 0.0}, {"language_model": run.remat})
    seconds = roofline.Roofline(compute=executed / 1e12, hbm=0.0, interconnect=0.0).predicted
    assert 3.0 / seconds == pytest.approx(predicted, abs=1e-3)
    assert abs(3.0 / seconds / published - 1) < 0.30


def test_wire_by_formula_is_near_what_compilers_make():
    """fsdp and data: the collectives that the CPU compiler makes."""
    for mesh in dict(fsdp=8), dict(data=2, fsdp=4):
        config = tiny_text(**mesh)
        config.compute_dtype = "float32"
        trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 512)
        found = hlo.collectives(compile_step(trainer).as_text(), dict(trainer.mesh.shape))
        between = hlo.wire_bytes([c for c in found if c.axis == "data"])
        by_formula = search.wire_by_formula(trainer)
        assert by_formula["data"] == pytest.approx(between, rel=0.01) and not by_formula["tensor"]
        assert by_formula["fsdp+fsdp_inner"] == pytest.approx(hlo.wire_bytes(found) - between, rel=0.2)


@needs_libtpu
@pytest.mark.slow
def test_wire_by_formula_over_tensor_is_near_what_the_tpu_compiler_makes():
    config = tiny_text(fsdp=2, tensor=4)
    trainer = abstract_trainer(config, slices.find_slice("v5e:2x4"), 512)
    found = hlo.collectives(compile_step(trainer).as_text(), dict(trainer.mesh.shape))
    over_tensor = hlo.wire_bytes([c for c in found if c.axis == "tensor"])
    assert search.wire_by_formula(trainer)["tensor"] == pytest.approx(over_tensor, rel=0.25)


def test_the_search_tries_the_fastest_first():
    """Bound by products: less is computed again; bound by the network: fewer parts, which each gather all weights."""

    def order(flops, accumulate, remat, tensor=1):
        config = unified(mesh=dict(fsdp=8 // tensor, tensor=tensor))
        config.optimizer.grad_accum_steps, config.batch_size = accumulate, 64
        config.model.language_model.remat = remat
        trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 32)
        chip = dataclasses.replace(CHIPS["v5e"], flops=flops, link_bandwidth=1.0, dimensions=0)
        devices = SimpleNamespace(coords=(0,))
        mesh = SimpleNamespace(shape=trainer.mesh.shape, devices=np.full(trainer.mesh.devices.shape, devices, object))
        return search.cost(dataclasses.replace(trainer, mesh=mesh), SimpleNamespace(chip=chip))

    slow, fast = 1e-3, 1e30
    assert order(slow, 4, "dots") < order(slow, 1, "full")
    assert order(slow, 1, "dots") < order(slow, 1, "dots", tensor=2)  # as fast, and simpler
    assert order(fast, 1, "full") < order(fast, 4, "dots")


def test_advice_says_what_each_change_saves():
    """On a mesh of 2 × 4: half of what is replicated, half of float32 moments, half of float32 frozen weights."""
    config = unified(mesh=dict(data=2, fsdp=4))
    trainer = abstract_trainer(config, slices.find_slice("cpu:8"), 32)
    by_part = memory.memory_by_part(trainer)
    trained = sum(v for k, v in by_part.items() if k.startswith("parameters/") and k != "parameters/generation_encoder")
    frozen = by_part["parameters/generation_encoder"]
    gigabytes = {k: v * 2**20 for k, v in by_part.items()}  # so that the small model's sizes can be read in GiB
    lines = advise(trainer, gigabytes, 33 * 2**30, 16 * 2**30)
    assert [line.partition(":")[0].partition("=")[0] for line in lines[:-1]] == [
        "config.model.language_model.remat", "--mesh", "config.optimizer.mu_dtype",
        "config.param_dtype.generation_encoder",
    ]  # fmt: skip
    assert lines[1].startswith("--mesh=data=1,fsdp=8,tensor=1:")
    saved = [float(re.search(r"([\d.]+) GiB", line).group(1)) for line in lines[1:4]]
    counters = 16 / 2**10  # the optimizer's own, in "GiB"
    assert saved[0] == pytest.approx((3 * trained + frozen) / 2 / 2**10, abs=counters)
    assert saved[1] == pytest.approx(trained / 2 / 2**10, abs=counters)
    assert saved[2] == pytest.approx(frozen / 2 / 2**10, abs=counters)
    assert lines[-1] == "at least 3 times as many chips: 17.00 GiB per device are missing"


def test_what_does_not_fit_is_told_from_other_errors():
    """Both forms in which the compiler refuses."""
    said = "Ran out of memory on HBM, the total required for HLO temporaries (33.13G) exceeds available HBM (30.75G)"
    assert memory_asked_for(said) == int(33.13 * 2**30)
    assert memory_asked_for("Ran out of memory in memory space hbm. Used 512.5M of 15.75G hbm.") == int(512.5 * 2**20)
    assert memory_asked_for("INVALID_ARGUMENT: no such flag") == 0


@pytest.mark.parametrize("share, fits", [(0.75, False), (0.9, True)])
def test_a_step_on_gpus_must_fit_into_jaxs_pool(share, fits, monkeypatch):
    """60 GiB of 79.1, which the compiler does not refuse: too much for 75% less 4 GiB, and not for 90%."""
    sizes = ("argument_size", "output_size", "alias_size", "temp_size", "host_temp_size", "host_argument_size")
    analysis = dict.fromkeys((*sizes, "host_output_size", "host_alias_size"), 0) | {"peak_memory": 60 * 2**30}
    step = SimpleNamespace(
        memory_analysis=lambda: SimpleNamespace(**{f"{name}_in_bytes": size for name, size in analysis.items()}),
        as_text=lambda: "HloModule m\n\nENTRY %main (a: f32[]) -> f32[] {\n  ROOT %a = f32[] parameter(0)\n}\n",
    )
    monkeypatch.setattr(compiled, "compile_step", lambda trainer: step)
    chip = dataclasses.replace(CHIPS["h100"], pool=share)
    where = slices.Slice("h100:8", tuple(jax.devices()), chip, 1)
    made = plan_trainer(abstract_trainer(unified(), where, 32), where)
    usable = int(84_929_347_584 * share) - 4 * 2**30
    assert (made.fits, made.hbm_bytes, made.usable_bytes) == (fits, 84_929_347_584, usable)
    assert made.spare_bytes == usable - 60 * 2**30
    text = report.describe(made)
    assert f"JAX's pool, {share:.0%} of 79.10 GiB, less 4.00 GiB kept spare" in text
    larger = "XLA_PYTHON_CLIENT_MEM_FRACTION=0.9 when it runs: JAX's pool is 11.86 GiB larger"
    assert (made.advice[:1] == [larger]) is not fits
    # Seconds are predicted from runs on TPUs alone; bounds need no such runs.
    assert made.predicted_step_seconds is None and made.predicted_mfu is None
    assert ("predicted nothing" in text) is fits and (made.bound_seconds is not None) is fits


def test_candidates_keep_the_batch():
    config = unified()
    tried = list(search.candidates(config, 8))
    assert {(c.mesh.fsdp, c.mesh.tensor) for c in tried} == {(8, 1), (4, 2), (2, 4), (1, 8)}
    assert all(c.batch_size == config.batch_size for c in tried)
    assert config.model.language_model.get("remat") is None  # the config itself stays


# --- the command, and TPUs that are not there


@pytest.mark.slow
def test_the_command(tmp_path, monkeypatch, capsys):
    """In this process, which has the devices: `test_no_accelerator_of_this_machine_is_touched` starts one."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # which the command sets too

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["plan", *arguments])
        try:
            run_command(plan_command.main)
        except SystemExit as end:
            return end.code, *capsys.readouterr()
        return 0, *capsys.readouterr()

    out = tmp_path / "plan.json"
    config = "--config=tests/tiny_config.py:decoder"
    status, printed, error = command(config, "--topology=cpu:4", "--mesh=fsdp=2,tensor=2", f"--json={out}")
    assert status == 0, error
    made = json.loads(out.read_text())
    assert made["devices"] == 4 and made["mesh"] == dict(data=1, fsdp=2, tensor=2)
    assert f"{made['wire_bytes_per_step'] / 1e9:.2f} GB" in printed
    for arguments, words in (
        (["--config=tests/tiny_config.py", "--topology=cpu:4"], "has several stages: name one"),
        (["--config=tests/tiny_config.py:unified", "--topology=v5p"], "write it like v5p:4x4x4"),
        (["--config=tests/tiny_config.py:unified", "--topology=cpu:4", "--mesh=fsdp:2"], "write it like data=2"),
    ):
        status, _, error = command(*arguments)
        assert status == 1 and words in error and error.count("\n") == 1, error


def test_no_accelerator_of_this_machine_is_touched():
    """What JAX finds when it is first imported, where the user's environment names an accelerator."""
    code = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            print(os.environ["JAX_PLATFORMS"], os.environ["CUDA_VISIBLE_DEVICES"], os.environ["XLA_FLAGS"])
            sys.exit()  # the rest takes seconds
sys.meta_path.insert(0, Watch())
sys.argv = ["plan", "--config=no_such_file.py", "--topology=cpu:3"]
from pisces_jax import plan
assert "jax" not in sys.modules
plan.main()
"""
    environment = {**os.environ, "JAX_PLATFORMS": "tpu", "XLA_FLAGS": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout == "cpu -1 --xla_force_host_platform_device_count=3\n", done.stderr


def tiny_text(**mesh):
    config = tiny.config(batch_size=8, compute_dtype="bfloat16", mesh=mesh)
    config.model = dict(
        language_model=dict(width=256, layers=2, heads=4, kv_heads=2, head_dim=128, mlp_hidden=512, remat="full")
    )
    config.data.row_length = 512
    config.data.train = {"a": {}}
    config.loss.chunk = 256
    return config


@needs_libtpu
@pytest.mark.parametrize("count", [2, 3])
def test_what_goes_between_slices_is_counted(count):
    """The compiler hands it to the hosts: no collective of its own stands in the program."""
    where = slices.find_slice("v5e:2x2", count)
    mesh = make_mesh(data=count, fsdp=4, devices=where.devices)

    def local(x):  # [8, 512] float32 on each device: 16,384 bytes
        total = jax.lax.psum(x, "data")
        whole = jax.lax.all_gather(x[:4], "data", tiled=True)
        swapped = jax.lax.ppermute(x[:2], "data", [(0, 1), (1, 0)])
        return total, jax.lax.psum(whole, ("fsdp", "fsdp_inner")), swapped

    shards = P(("data", "fsdp", "fsdp_inner"))
    run = sharded(mesh, shards, (P(("fsdp", "fsdp_inner")), P(), shards))(local)
    got = found_in(run, mesh, ((8 * 4 * count, 512), shards))
    between = {key: times for key, times in got.items() if key[1] == "data"}
    share = (count - 1) / count
    assert between == {
        ("all-reduce", "data", 2 * 16_384 * share): 1,
        ("all-gather", "data", 8192 * count * share): 1,
        ("collective-permute", "data", 4096): 1,
    }
    assert got["all-reduce", "fsdp+fsdp_inner", 2 * 8192 * count * 3 / 4] == 1


@needs_libtpu
@pytest.mark.parametrize("name", [n for n, g in xla_flags.GROUPS.items() if g.variable == "LIBTPU_INIT_ARGS"])
def test_the_tpu_compiler_knows_every_flag(name):
    """Any program will do: it reads its options before it compiles."""
    mesh = make_mesh(fsdp=4, devices=slices.find_slice("v5e:2x2").devices)
    x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=NamedSharding(mesh, P(("fsdp", "fsdp_inner"))))
    lowered = jax.jit(lambda x: x @ x.T).lower(x)
    lowered.compile(compiler_options=xla_flags.GROUPS[name].flags)
    with pytest.raises(Exception, match="xla_tpu_no_such_flag"):
        lowered.compile(compiler_options={"xla_tpu_no_such_flag": "true"})


@pytest.fixture(scope="module")
def tpu_step():
    """A step that offloads, compiled for 16 chips that are not here."""
    config = tiny_text(fsdp=16)
    config.batch_size, config.model.language_model.remat = 16, "offload"
    trainer = abstract_trainer(config, slices.find_slice("v5e:4x4"), 512)
    return trainer, compile_step(trainer)


@needs_libtpu
@pytest.mark.slow
def test_a_tpu_step_reduce_scatters_and_runs_splash(tpu_step):
    """Every gradient that counts travels as a reduce-scatter."""
    trainer, compiled = tpu_step
    text = compiled.as_text()
    assert "tpu_custom_call" in text
    found = hlo.collectives(text, dict(trainer.mesh.shape))
    scattered = sum(c.bytes * c.executions for c in found if c.kind == "reduce-scatter")
    reduced = sum(c.bytes * c.executions for c in found if c.kind == "all-reduce")
    parameters = sum(x.size for x in jax.tree.leaves(trainer.abstract.trained))
    assert scattered + reduced < 1.3 * 2 * parameters  # bfloat16, once
    assert user_mesh(trainer.mesh) == dict(data=1, fsdp=16, tensor=1)


@needs_libtpu
@pytest.mark.slow
def test_offloading_leaves_the_device(tpu_step):
    """What the blocks save waits in the host's memory: their input and attention's result, in bfloat16."""
    trainer, compiled = tpu_step
    analysis, language = compiled.memory_analysis(), trainer.config.model.language_model
    saved = language.layers * 512 * (language.width + language.heads * language.head_dim) * 2
    peak, host = memory.peak_and_host(analysis)
    assert host == analysis.host_temp_size_in_bytes >= saved
    assert analysis.argument_size_in_bytes <= peak == analysis.peak_memory_in_bytes - host


def test_the_hosts_memory_is_no_part_of_the_devices_peak():
    sizes = dict(peak_memory=900, argument_size=300, output_size=310, alias_size=290, host_temp_size=400)
    names = ("host_argument_size", "host_output_size", "host_alias_size")

    def analysis(**more):
        made = {**dict.fromkeys(names, 0), **sizes, **more}
        return SimpleNamespace(**{f"{name}_in_bytes": size for name, size in made.items()})

    assert memory.peak_and_host(analysis()) == (500, 400)
    assert memory.peak_and_host(analysis(host_temp_size=0)) == (900, 0)
    assert memory.peak_and_host(analysis(host_temp_size=700)) == (320, 700)  # at some other time than the peak
    assert memory.peak_and_host(analysis(host_argument_size=50, host_output_size=50, host_alias_size=50))[1] == 450


@needs_libtpu
def test_slices_lie_along_data():
    """Gradients alone cross the network between slices."""
    where = slices.find_slice("v5p:2x2x1", 2)
    mesh = make_mesh(data=2, fsdp=4, devices=where.devices)
    for i in range(2):
        assert {d.slice_index for d in mesh.devices[i].reshape(-1)} == {i}
    with pytest.raises(UserError, match="mesh data=1 over 2 slices: make data a multiple of 2"):
        make_mesh(fsdp=8, devices=where.devices)
    assert roofline.axis_bandwidth(where.chip, mesh, "data") == where.chip.dcn_bandwidth
