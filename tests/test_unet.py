"""The U-Net of SDXL with visual vectors, its sampler and its files, against diffusers."""

import contextlib
import dataclasses
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import parity
import pytest
import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

from pisces_jax.losses.diffusion import DiffusionConfig, denoise, guided_noise
from pisces_jax.utils.errors import UserError
from pisces_jax.weights import config_json
from pisces_jax.weights.architecture import config_json as config_of
from pisces_jax.weights.architecture import read_architecture
from pisces_jax.weights.export import export_part
from pisces_jax.weights.families import FAMILIES
from pisces_jax.weights.folder import part_shapes
from pisces_jax.weights.sizes import EMU2_UNET

CASE = parity.unet("tiny", 8, 5, **parity.TINY_UNET)
SCHEDULER = dict(  # SDXL's scheduler_config.json
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000, steps_offset=1,
    timestep_spacing="leading", prediction_type="epsilon", interpolation_type="linear", use_karras_sigmas=False,
)  # fmt: skip


@contextlib.contextmanager
def lifted():
    """As `parity.lifted`, for a scheduler, which computes in NumPy too."""
    with parity.lifted(), mock.patch.object(np, "float32", np.float64):
        yield


# --- the network


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(the folder of the reference, its exact output, our settings, our parameters, our compiled function)."""
    folder = tmp_path_factory.mktemp("unet") / "m"
    expected = CASE.reference(CASE.write(folder), "float64")
    with jax.enable_x64(True):
        settings, params = CASE.params(folder)
        run = jax.jit(lambda p, x: CASE.ours(settings, p, x, jnp.float64))
    return folder, expected, settings, params, run


def flat_change(name, function):
    def change(params):
        flat = flatten_dict(params, sep="/")
        flat[name] = function(np.asarray(flat[name]))
        return unflatten_dict(flat, sep="/")

    return change


def exchange(one, other):
    def change(params):
        flat = flatten_dict(params, sep="/")
        flat[one], flat[other] = flat[other], flat[one]
        return unflatten_dict(flat, sep="/")

    return change


TRANSFORMER = "down_1_attention_0/layers"
WRONG_PARAMS = {
    "sines of the time before its cosines": flat_change("time_up/kernel", lambda k: np.roll(k, 8, axis=0)),
    "sines of the sizes before their cosines": flat_change(
        "size_up/kernel", lambda k: np.concatenate([k[:24], k[24:].reshape(6, 2, 4, -1)[:, ::-1].reshape(48, -1)])
    ),
    "sizes before the mean of the condition": flat_change("size_up/kernel", lambda k: np.roll(k, 48, axis=0)),
    "mean of the condition left out": flat_change("size_up/kernel", lambda k: k * (np.arange(72) >= 24)[:, None]),
    "bias of attention's output left out": flat_change(f"{TRANSFORMER}/cross_attention/out/bias", np.zeros_like),
    "bias of the gate left out": flat_change(f"{TRANSFORMER}/mlp/gate/bias", np.zeros_like),
    "bias of the time in a residual block left out": flat_change("up_0_block_2/time/bias", np.zeros_like),
    "gate and value exchanged": exchange(f"{TRANSFORMER}/mlp/up/kernel", f"{TRANSFORMER}/mlp/gate/kernel"),
    "self-attention and cross-attention's outputs exchanged": exchange(
        f"{TRANSFORMER}/self_attention/out/kernel", f"{TRANSFORMER}/cross_attention/out/kernel"
    ),
    "layers of a transformer in reverse": flat_change("middle_attention_0/layers/norm1/scale", lambda k: k[::-1]),
    "channels of a skip before those of the block": flat_change(
        "up_1_block_0/shortcut/kernel", lambda k: np.roll(k, 32, axis=2)
    ),
}  # fmt: skip
WRONG_INPUTS = {
    "original size and wanted size exchanged": lambda x, t, v, s: (x, t, v, s[:, [4, 5, 2, 3, 0, 1]]),
    "height and width exchanged": lambda x, t, v, s: (x, t, v, s[:, [1, 0, 2, 3, 4, 5]]),
    "corner of the crop exchanged": lambda x, t, v, s: (x, t, v, s[:, [0, 1, 3, 2, 4, 5]]),
    "times counted from one": lambda x, t, v, s: (x, t + 1, v, s),
    "times in 0..1": lambda x, t, v, s: (x, t / 1000, v, s),
    "rows and columns exchanged": lambda x, t, v, s: (x.swapaxes(1, 2), t, v, s),
}  # fmt: skip


def same(settings):
    return settings


@pytest.mark.parametrize("name", ["nothing", *WRONG_PARAMS, *WRONG_INPUTS])
def test_wrong_parameters_and_inputs_are_seen(name, written):
    _, expected, _, params, run = written
    with jax.enable_x64(True):
        params = WRONG_PARAMS.get(name, same)(params)
        error = parity.relative(run(params, WRONG_INPUTS.get(name, lambda *a: a)(*CASE.inputs)), expected)
    assert error < 1e-9 if name == "nothing" else error > 1e-6


def test_at_its_true_size_every_tensor_is_that_of_diffusers():
    """Names, shapes and number of parameters: SDXL's U-Net with a condition of 1,792; nothing is allocated."""
    with torch.device("meta"):
        model = UNet2DConditionModel(**parity.UNET)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = flatten_dict(part_shapes(EMU2_UNET), sep="/")
    got = {}
    for entry in FAMILIES["unet"].table(EMU2_UNET):
        shape = shapes[entry.ours].shape
        for i in range(shape[0] if entry.stacked else 1):
            got[entry.theirs.format(i=i)] = entry.published_shape(shape[1:] if entry.stacked else shape)
    assert got == expected
    count = sum(x.size for x in shapes.values())
    assert count == sum(p.numel() for p in model.parameters())
    assert 2 * count == pytest.approx(5.05e9, rel=1e-3)  # bytes of the published file, in bfloat16


# --- the sampler


@pytest.mark.parametrize("steps", [1, 3, 7, 30, 50, 999, 1000])
def test_times_and_sigmas_are_those_of_the_reference(steps):
    with lifted():
        reference = EulerDiscreteScheduler(**SCHEDULER)
        reference.set_timesteps(steps)
    times, sigmas = DiffusionConfig(steps=steps).schedule()
    assert times.shape == (steps,) and sigmas.shape == (steps + 1,)
    np.testing.assert_array_equal(times, reference.timesteps.numpy())
    np.testing.assert_allclose(sigmas, reference.sigmas.numpy(), rtol=1e-9, atol=0)
    narrow = EulerDiscreteScheduler(**SCHEDULER)  # as it is used, in float32
    narrow.set_timesteps(steps)
    np.testing.assert_allclose(sigmas, narrow.sigmas.numpy(), rtol=1e-4)


def network(np_or_torch, x, t, condition):
    """A network of a few lines that both sides can run."""
    shape = (-1, 1, 1, 1)
    return np_or_torch.tanh(3 * x + condition.reshape(shape)) + 0.3 * np_or_torch.cos(t / 200).reshape(shape) * x


def reference_loop(predict, noise, condition, null, steps, guidance):
    """The pipeline of Emu2-Gen: [condition, unconditional], scaled input, guidance, Euler step."""
    scheduler = EulerDiscreteScheduler(**SCHEDULER)
    scheduler.set_timesteps(steps)
    latents = torch.as_tensor(noise) * scheduler.init_noise_sigma
    both = torch.cat([torch.as_tensor(condition), torch.as_tensor(null)])
    for t in scheduler.timesteps:
        inputs = scheduler.scale_model_input(torch.cat([latents] * 2), t)
        conditional, unconditional = predict(inputs, t.expand(len(inputs)), both).chunk(2)
        predicted = unconditional + guidance * (conditional - unconditional)
        latents = scheduler.step(predicted, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("steps, guidance", [(50, 3.0), (7, 1.0)])
def test_the_sampler_is_that_of_the_reference(steps, guidance):
    rng = np.random.default_rng(0)
    noise, condition, null = rng.standard_normal((2, 3, 3, 4)), np.array([0.4, -1.0]), np.array([0.1, 0.1])
    with lifted(), torch.no_grad():
        expected = reference_loop(lambda *a: network(torch, *a), noise, condition, null, steps, guidance).numpy()
    config = DiffusionConfig(steps=steps, guidance=guidance)
    with jax.enable_x64(True):
        field = guided_noise(lambda *a: network(jnp, *a), jnp.asarray(condition), jnp.asarray(null), config.guidance)
        got = denoise(field, jnp.asarray(noise), config)
        swapped = guided_noise(lambda *a: network(jnp, *a), jnp.asarray(null), jnp.asarray(condition), 3.0)
        assert parity.relative(denoise(swapped, jnp.asarray(noise), config), expected) > 1e-2
        for change in (dict(offset=0), dict(beta_end=0.02), dict(steps=steps + 1)):
            other = denoise(field, jnp.asarray(noise), dataclasses.replace(config, **change))
            assert parity.relative(other, expected) > 1e-6, change
    assert parity.relative(got, expected) < 1e-9


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_sampler_takes_no_more_steps_than_there_are(steps):
    with pytest.raises(ValueError, match="1 to 1000 steps"):
        DiffusionConfig(steps=steps)


def test_latents_keep_their_dtype():
    for dtype in (jnp.float32, jnp.bfloat16):
        made = denoise(lambda x, t: x.astype(jnp.float32), jnp.ones((2, 3), dtype), DiffusionConfig(steps=2))
        assert made.dtype == dtype and made.shape == (2, 3)


# --- files


def test_an_exported_network_opens_in_diffusers(written, tmp_path):
    folder, _, settings, params, _ = written
    assert export_part(tmp_path / "out", "decoder", settings, params, dtype="float32") == "unet"
    theirs, ours = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (folder, tmp_path / "out"))
    assert set(theirs) == set(ours)
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(tensor, ours[name], err_msg=name)
    _, loading = UNet2DConditionModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    config = json.loads((tmp_path / "out/config.json").read_text())
    written_by_them = json.loads((folder / "config.json").read_text())
    assert all(written_by_them[key] == value for key, value in config.items() if key != "dtype")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(projection_class_embeddings_input_dim=2816, cross_attention_dim=2048), "input_dim 2816"),  # SDXL itself
        (dict(addition_embed_type=None), "addition_embed_type None"),
        (dict(use_linear_projection=False), "use_linear_projection False"),
        (dict(flip_sin_to_cos=False), "flip_sin_to_cos False"),
        (dict(resnet_time_scale_shift="scale_shift"), "resnet_time_scale_shift 'scale_shift'"),
        (dict(out_channels=8), "out_channels 8"),
        (dict(class_embed_type="timestep"), "class_embed_type 'timestep'"),
        (dict(up_block_types=["UpBlock2D"] * 3), "up_block_types"),
    ],
)
def test_other_networks_are_refused(change, said, tmp_path):
    values = {"_class_name": "UNet2DConditionModel", **parity.UNET, **change}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=f"a U-Net with .*{said}.*: take that of Emu2-Gen or BLIP3-o"):
        read_architecture(tmp_path)


def test_the_settings_of_emu2_gen(tmp_path):
    """From its config.json, which also leaves out what equals a default; ours is read as the same."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DConditionModel", **parity.UNET}))
    assert read_architecture(tmp_path) == ("unet", EMU2_UNET)
    (tmp_path / "config.json").write_text(json.dumps(config_of("unet", EMU2_UNET, "decoder", "float32")))
    assert read_architecture(tmp_path) == ("unet", EMU2_UNET)
    with torch.device("meta"):
        assert UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(tmp_path))


def test_what_files_leave_out_is_what_diffusers_takes():
    import inspect

    theirs = inspect.signature(UNet2DConditionModel.__init__).parameters
    for key, value in config_json.DEFAULTS["unet"].items():
        assert theirs[key].default == value, key
    fixed = {key: theirs[key].default for key in config_json.UNET_FIXED}
    named = config_json.DEFAULTS["unet"]
    for key, value in config_json.UNET_FIXED.items():
        assert key in named or fixed[key] == value, key


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(heads=(5, 10)), "are not as many"),
        (dict(depths=(1, 1, 0)), "last level"),
        (dict(groups=7), "multiples of the 7 groups"),
        (dict(heads=(5, 7, 20)), "multiples of the heads"),
        (dict(size=126), "multiple of 4"),
    ],
)
def test_settings_that_do_not_fit(change, said):
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(EMU2_UNET, **change)
