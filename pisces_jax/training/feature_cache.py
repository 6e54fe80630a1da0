"""Writes the outputs of frozen encoders for a config's pictures, to train on in place of the pictures."""

import concurrent.futures
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from tqdm import tqdm

from pisces_jax.data.example import TRANSIENT, BrokenExample, reason_of
from pisces_jax.data.feature_cache import DTYPES, SHARD, FeatureCache, cached_picture
from pisces_jax.data.images import UnreadablePicture
from pisces_jax.data.packing.items import LEAST_SEEN
from pisces_jax.data.packing.layout import Entry
from pisces_jax.models.autoencoder import Autoencoder
from pisces_jax.models.layers import apply
from pisces_jax.models.vit import ViT, pooled_features
from pisces_jax.training import config as settings
from pisces_jax.training.checkpoints import load_part, part_mark
from pisces_jax.training.programs import program_class
from pisces_jax.training.programs.base import CachedInput
from pisces_jax.training.programs.reconstruction import to_signal
from pisces_jax.utils import processes
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import local_path
from pisces_jax.weights.folder import read_source
from pisces_jax.weights.sources import is_folder


def encoder_of(config: ConfigDict, workdir: Path, kind: CachedInput) -> dict[str, Any]:
    """What cached features come from: the encoder's run or published folder, its weights and settings, the pooling."""
    start = config.init_from.get(kind.part, "")
    if not start:
        raise UserError(
            f"config key init_from.{kind.part} is not set: name the trained encoder whose features are cached"
        )
    return {
        "start": start,
        "weights": part_mark(workdir, start, kind.part),
        "settings": dataclasses.asdict(settings.part_settings(config, kind.part, vocab_size=0)),
        **kind.depends_on,
    }


def _caches(
    config: ConfigDict, workdir: Path, kind: CachedInput, entries: Sequence[Entry]
) -> list[FeatureCache | None]:
    """One cache per entry; None for an entry whose pictures the program does not need features of."""
    folder = workdir / local_path(config.data.features or "features") / kind.folder
    encoder = encoder_of(config, workdir, kind)
    every = not program_class(config).draws_only
    return [FeatureCache(folder, entry, encoder) if every or entry.source.draws else None for entry in entries]


def open_caches(config: ConfigDict, workdir: Path, entries: Sequence[Entry]) -> dict[str, list[FeatureCache | None]]:
    """The caches that a config reads, by the name of the cached input, one per entry (None where it needs none); empty
    where the config reads pictures.

    Raises:
        UserError: one is missing or unfinished, or no source draws.
    """
    if not config.data.features:
        return {}
    opened = {
        name: _caches(config, workdir, kind, entries)
        for name, kind in program_class(config).cached_inputs(config).items()
    }
    if not any(cache is not None for cache in opened["features"]):
        raise UserError("data.features is set, and no source of the config draws pictures: leave it empty")
    return {name: [None if cache is None else cache.open() for cache in caches] for name, caches in opened.items()}


def cache_features(
    config: ConfigDict,
    workdir: Path,
    entries: list[Entry],
    dtype: str,
    batch_size: int,
    threads: int = 2,
    share: tuple[int, int] = (0, 1),
) -> Mapping[str, int]:
    """Writes the missing shards of every source; returns how many pictures could not be read, by source, in all its
    shards. A source that needs no features is left out.

    Shards that are there are compared with their checksums; damaged ones are set aside and made anew.
    Every process writes its `share` of the shards (part i of n) on its own devices. An interruption leaves complete
    shards, and the same call continues with the others. It returns when all processes are done.

    Raises:
        UserError: the storage fails, or more than `data.max_broken` of a source's pictures cannot be read. The current
            shard is not kept.
    """
    if dtype not in DTYPES:
        raise UserError(f"features cannot be stored as {dtype!r}: choose one of {', '.join(DTYPES)}")
    kinds = program_class(config).cached_inputs(config)
    needed = {}
    for name, kind in kinds.items():
        caches = zip(entries, _caches(config, workdir, kind, entries), strict=True)
        needed[name] = [(entry, cache) for entry, cache in caches if cache is not None]
    for pairs in needed.values():
        for cache in {cache.folder: cache for _, cache in pairs}.values():
            cache.set_damaged_aside(*share)
    processes.barrier("features checked")
    work = {}
    for name, pairs in needed.items():
        once = {cache.folder: (entry, cache) for entry, cache in pairs}.values()
        work[name] = [(entry, cache, cache.todo(*share)) for entry, cache in once if cache.todo(0, 1)]
    processes.barrier("features to write")  # the weights are read by all processes or by none
    for name, todo in work.items():  # one encoder at a time in memory
        if todo:
            _write(config, workdir, kinds[name], todo, dtype, batch_size, threads)
    processes.barrier("features written")
    return {entry.name: cache.empty() for entry, cache in needed["features"]}


def _write(
    config: ConfigDict,
    workdir: Path,
    kind: CachedInput,
    caches: Sequence[tuple[Entry, FeatureCache, Sequence[int]]],
    dtype: str,
    batch_size: int,
    threads: int,
) -> None:
    encode, size = _encoder(config, workdir, kind, dtype)
    devices = jax.local_device_count()
    batch_size = -(-batch_size // devices) * devices
    bar = tqdm(
        total=sum(len(work) for _, _, work in caches), desc=kind.folder or "features", unit="shard", mininterval=1.0,
        disable=not processes.primary(),
    )  # fmt: skip
    with bar, concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for entry, cache, work in caches:

            def load(i: int, entry: Entry = entry) -> np.ndarray | None:
                try:
                    example = entry.source[i]
                    return cached_picture(example).square(size)
                except (BrokenExample, UnreadablePicture) as error:
                    if reason_of(error) in TRANSIENT:
                        raise UserError(f"source {entry.name}: {error}: run the same command again") from error
                    return None

            broken = cache.empty()
            for shard in work:
                records: list[bytes] = []
                numbers = range(shard * SHARD, min((shard + 1) * SHARD, cache.count))
                for start in range(0, len(numbers), batch_size):
                    images = list(pool.map(load, numbers[start : start + batch_size]))
                    blank = np.zeros((size, size, 3), np.uint8)
                    filled = [blank if image is None else image for image in images]
                    features = encode(np.stack(filled + [blank] * (batch_size - len(filled))))
                    if not records:
                        cache.describe(features.shape[1:], dtype)
                    broken += sum(image is None for image in images)
                    _check_broken(cache, broken, config.data.max_broken)
                    pairs = zip(images, features[: len(images)], strict=True)
                    records += [b"" if image is None else each.tobytes() for image, each in pairs]
                cache.write(shard, records)
                bar.update()


def _check_broken(cache: FeatureCache, broken: int, limit: float) -> None:
    if broken > limit * max(cache.count, LEAST_SEEN):
        raise UserError(
            f"source {cache.name}: {broken} of {cache.count} pictures cannot be read so far, more than {limit:.2%}: "
            "fix them or raise data.max_broken"
        )


def _encoder(config: ConfigDict, workdir: Path, kind: CachedInput, dtype: str) -> tuple[Any, int]:
    """(a function from uint8 pictures [B, S, S, 3] to their features as they are stored [B, ...], S)."""
    of, compute = settings.part_settings(config, kind.part, vocab_size=0), jnp.dtype(config.compute_dtype)
    size = settings.vit_config(config, "generation_encoder").image_size
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    whole, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("data",)))
    storage = jnp.dtype(config.param_dtype.get(kind.part, "float32"))
    start = config.init_from[kind.part]
    params = read_source(start, of, kind.part) if is_folder(start) else load_part(workdir, start, kind.part)
    params = jax.device_put(jax.tree.map(lambda x: x.astype(storage), params), whole)

    @jax.jit
    def features(params: Any, images: jax.Array) -> jax.Array:
        if kind.part == "autoencoder":
            made = apply(Autoencoder(of, compute), params, to_signal(images), method="encode")
        else:
            made = pooled_features(apply(ViT(of, compute), params, images), config.model.pool)
        return made.astype(jnp.dtype(dtype))

    def encode(images: np.ndarray) -> np.ndarray:
        return np.asarray(features(params, jax.device_put(images, split))).view(DTYPES[dtype])

    return encode, size
