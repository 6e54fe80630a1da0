"""The weights of a model that reads and draws: from a run and the runs it started from, or from a released folder."""

import dataclasses
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.inference.decode import Decoder, PictureDecoder
from pisces_jax.inference.released import decoder_of_folder, is_released, is_released_config, released_config
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.dit import DiT
from pisces_jax.sharding import param_shardings
from pisces_jax.training import config as settings
from pisces_jax.training.checkpoints import load_part
from pisces_jax.training.programs import make_program, program_class
from pisces_jax.training.run_folder import is_finished, read_config
from pisces_jax.utils.errors import UserError
from pisces_jax.weights.diffusion_decoder import decoder_sources
from pisces_jax.weights.folder import Folder, boxed_shapes, read_part
from pisces_jax.weights.sources import is_folder


@dataclasses.dataclass(frozen=True)
class Waiting:
    """A parameter in the host's memory, and where it goes when it is needed."""

    value: np.ndarray
    where: Any


@dataclasses.dataclass(frozen=True)
class Places:
    """Where parameters go, and in which dtype.

    Attributes:
        mesh: None: the first device.
        dtype: to store them in; "": as files and runs hold them.
        stay: whether they go to the devices at once; else they wait in the host's memory (`Waiting`).
    """

    mesh: Mesh | None = None
    dtype: str = ""
    stay: bool = True

    def of(self, boxed: Any) -> Any:
        """The shardings of a tree of boxed shapes."""
        if self.mesh is not None:
            return param_shardings(boxed, self.mesh)
        device = SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: device, nn.unbox(boxed))

    def put(self, tree: Any, where: Any) -> Any:
        """Host arrays to their places."""

        def place(x: Any, sharding: Any) -> Any:
            x = np.asarray(x)
            if self.dtype and jnp.issubdtype(x.dtype, jnp.floating):
                x = x.astype(jnp.dtype(self.dtype), copy=False)
            return jax.device_put(x, sharding) if self.stay else Waiting(x, sharding)

        return jax.tree.map(place, tree, where)


def find_run(workdir: Path) -> str:
    """The finished unified run that no other run starts from; of several, the one that finished last.

    Raises:
        UserError: there is no finished unified run.
    """
    if not workdir.is_dir():
        raise UserError(f"--workdir={workdir} does not exist: give the folder of a finished training")
    runs = {}
    for path in sorted(workdir.glob("*/config.json")):
        config = read_config(path.parent)
        if program_class(config).reads_and_draws(config) and is_finished(path.parent):
            runs[path.parent.name] = config
    started_from = {source for config in runs.values() for source in config.init_from.values()}
    last = [name for name in runs if name not in started_from]
    if not last:
        raise UserError(f"--workdir={workdir} holds no finished unified run: train one there first")
    return max(last, key=lambda name: (workdir / name / "checkpoints").stat().st_mtime)


def open_config(workdir: Path, run: str) -> ConfigDict:
    """The config of a run (by default the last unified one), or of the released model in the folder `workdir`.

    Raises:
        UserError: there is neither, or the run is of another program.
    """
    if not run and workdir.is_dir() and is_released(workdir):
        return released_config(workdir)
    run = run or find_run(workdir)
    config = read_config(workdir / run)
    if not program_class(config).reads_and_draws(config):
        raise UserError(f"{workdir / run} is a {config.program} run: reading and drawing need a unified one")
    return config


def load_parts(workdir: Path, config: ConfigDict, tokenizer: Tokenizer, places: Places) -> dict[str, Any]:
    """The parameters of a model by part. A released model has no generation encoder: drawing does not need it.

    Raises:
        UserError: the run or the folder cannot be loaded.
    """
    if not is_released_config(config):
        names = settings.pisces_config(config, tokenizer.vocab_size).parts
        trees = {part: load_part(workdir, config.name, part) for part in names}
        if places == Places():
            return {part: jax.tree.map(jnp.asarray, tree) for part, tree in trees.items()}
        boxed = jax.eval_shape(make_program(config, tokenizer.vocab_size).init, jax.random.key(0))
        return {part: places.put(tree, places.of(boxed[part])) for part, tree in trees.items()}
    boxed = jax.eval_shape(make_program(config, tokenizer.vocab_size).init, jax.random.key(0))
    parts = {}
    for part, source in config.init_from.items():
        folder = Folder.open(source, part)
        folder.check(settings.part_settings(config, part, tokenizer.vocab_size), f"model.{part}", tokenizer.own_size)
        parts[part] = _read(folder, part, boxed[part], places, tokenizer)
    return parts


def _read(folder: Folder, part: str, boxed: Any, places: Places, tokenizer: Tokenizer | None = None) -> Any:
    """A part of a folder, straight to its places."""
    where = places.of(boxed)
    tokens, own = (None, None) if tokenizer is None else (tokenizer.vocab_size, tokenizer.own_size)
    tree = read_part(
        folder, nn.unbox(boxed), vocab_size=tokens if part == "language_model" else None, own_tokens=own,
        shardings=where if places.stay else None, dtype=places.dtype or None, doing=f"reading {part}",
    )  # fmt: skip
    return tree if places.stay else places.put(tree, where)


def make_decoder(workdir: Path, config: ConfigDict) -> tuple[Decoder | None, Any]:
    """The decoder of a unified run and how it samples, without its weights."""
    run = settings.decoder_run(config)
    if not run:
        return None, None
    if is_folder(run):
        return decoder_of_folder(run, config)
    decoder_config = config if run == config.name else read_config(workdir / run)
    dtype = jnp.dtype(decoder_config.compute_dtype)
    latent = settings.autoencoder_config(decoder_config)
    decoder = PictureDecoder(
        DiT(settings.dit_config(decoder_config), dtype), Autoencoder(latent, dtype) if latent else None
    )
    return decoder, settings.flow_config(decoder_config)


def load_decoder(workdir: Path, config: ConfigDict, places: Places = Places()) -> tuple[Decoder | None, Any, Any]:
    """The decoder of a unified run, its weights by part, and how it samples."""
    decoder, how = make_decoder(workdir, config)
    if decoder is None:
        return None, None, None
    run = settings.decoder_run(config)
    if is_folder(run):
        opened = {part: Folder.open(source) for part, source in decoder_sources(run).items()}
        boxed = {part: boxed_shapes(folder.settings) for part, folder in opened.items()}
        return decoder, {part: _read(opened[part], part, boxed[part], places) for part in decoder.parts}, how
    trees = {part: load_part(workdir, run, part) for part in decoder.parts}
    if places == Places():
        return decoder, {part: jax.tree.map(jnp.asarray, tree) for part, tree in trees.items()}, how
    held = config if run == config.name else read_config(workdir / run)
    boxed = {part: boxed_shapes(settings.part_settings(held, part, 0)) for part in decoder.parts}
    return decoder, {part: places.put(tree, places.of(boxed[part])) for part, tree in trees.items()}, how
