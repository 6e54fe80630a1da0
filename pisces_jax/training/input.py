"""What a program reads: packed rows for the unified model, single pictures with their texts for the others."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pisces_jax.data.packing import pipeline
from pisces_jax.data.packing.layout import Layout
from pisces_jax.data.packing.pairs import Pairs
from pisces_jax.data.packing.rows import PackedGroups
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.training.config import picture_size
from pisces_jax.training.feature_cache import open_caches
from pisces_jax.training.programs import TextProgram, UnifiedProgram
from pisces_jax.training.tokenizer import entries_of
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.processes import all_agree, primary_first


def items(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, sources: ConfigDict, **kwargs: Any
) -> Any:
    """Packed rows or pairs of these sources, as the program reads them; lengths are kept in `folder`, or below
    `workdir`, where every stage and every worker finds them.

    Of several processes the first one indexes shards and reads lengths, and the others find them.

    Raises:
        UserError: no source, or one that cannot be used.
    """
    if not sources:
        raise UserError("config key data.train names no source: give at least one")
    with primary_first("items"):
        return _items(config, tokenizer, program, workdir, sources, **kwargs)


def _items(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, sources: ConfigDict, **kwargs: Any
) -> Any:
    entries = entries_of(sources)
    d = config.data
    kwargs = dict(folder=workdir / "lengths", scaled_jpeg=d.scaled_jpeg, max_broken=d.max_broken) | kwargs
    if isinstance(program, TextProgram):
        layout = Layout(0, 0, d.row_length, rows=d.rows, read_slots=0, draw_slots=0, read_size=0, draw_size=0)
        return PackedGroups(entries, tokenizer, layout, config.seed, **kwargs)
    kwargs |= open_caches(config, workdir, entries)
    if not isinstance(program, UnifiedProgram):
        return Pairs(entries, tokenizer, d.text_length, picture_size(config), config.seed, **kwargs)
    c = program.model.config
    layout = Layout(
        c.read_vectors, c.draw_vectors, d.row_length, rows=d.rows, read_slots=d.read_slots, draw_slots=d.draw_slots,
        read_size=c.understanding_encoder.image_size, draw_size=c.generation_encoder.image_size,
        read_stretch=d.read_stretch,
    )  # fmt: skip
    return PackedGroups(entries, tokenizer, layout, config.seed, **kwargs)


def _iterator(made: Any, config: ConfigDict, share: tuple[int, int], **kwargs: Any) -> pipeline.BatchIterator:
    iterator = pipeline.batches(
        made, config.batch_size, process_index=share[0], process_count=share[1], max_broken=config.data.max_broken,
        **kwargs,
    )  # fmt: skip
    # Processes that pack different examples would lose some and repeat others, without an error.
    if not all_agree(iterator.digest):
        raise UserError(
            "the processes of this run do not find the same examples, or cannot read the same ones of them: see that "
            "all hosts reach the same data, and start again"
        )
    return iterator


def train_iterator(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, share: tuple[int, int] = (0, 1),
    **kwargs: Any,
) -> pipeline.BatchIterator:  # fmt: skip
    """This process's `share` of the batches: part i of n (`sharding.batch_share`); `kwargs` are for `items`."""
    per_epoch = config.data.examples_per_epoch or None
    made = items(config, tokenizer, program, workdir, config.data.train, examples_per_epoch=per_epoch, **kwargs)
    return _iterator(made, config, share, threads=config.data.threads, workers=config.data.workers)


def evaluate_iterator(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, share: tuple[int, int] = (0, 1)
) -> pipeline.BatchIterator:
    """The same batches in the same order at every evaluation."""
    if tuple(config.data.evaluate) != tuple(config.data.train):
        raise UserError("data.evaluate and data.train must name the same sources in the same order")
    made = items(config, tokenizer, program, workdir, config.data.evaluate, shuffle=False)
    batches = config.log.evaluate_batches
    return _iterator(made, config, share, one_pass=True, num_batches=batches, threads=config.data.threads)


def evaluation_sources(config: ConfigDict) -> list[Any]:
    if not config.data.evaluate:
        raise UserError("config key data.evaluate names no source: give at least one")
    return [entry.source for entry in entries_of(config.data.evaluate)]


def training_sources(config: ConfigDict) -> list[Any]:
    return [entry.source for entry in entries_of(config.data.train)]


def examples(batch: dict[str, np.ndarray]) -> int:
    """How many examples a batch of this process holds."""
    if "valid" in batch:
        return int(batch["valid"].sum())
    return int(batch["segment_ids"].max(axis=-1).sum())
