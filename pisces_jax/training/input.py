"""What a program reads: packed rows for the unified model, single pictures with their texts for the others."""

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pisces_jax.data import pipeline
from pisces_jax.data.example import Text
from pisces_jax.data.layout import Layout
from pisces_jax.data.packing import PackedGroups
from pisces_jax.data.pairs import Pairs
from pisces_jax.data.tokenizers import Tokenizer, open_tokenizer, train_sentencepiece
from pisces_jax.errors import UserError
from pisces_jax.processes import primary_first
from pisces_jax.training.config import vit_config
from pisces_jax.training.programs import TextProgram, UnifiedProgram
from pisces_jax.weights.folder import is_folder, resolve


def load_tokenizer(config: ConfigDict, workdir: Path) -> Tokenizer:
    """The config's tokenizer: of a published folder, or of the work directory, where it is trained on the config's own
    sources if it is not there yet.

    Raises:
        UserError: it is not there and the config does not say how large a vocabulary to train.
    """
    if is_folder(config.data.tokenizer):
        return open_tokenizer(resolve(config.data.tokenizer))
    path = workdir / config.data.tokenizer
    with primary_first("tokenizer"):
        if not path.exists():
            if not config.data.tokenizer_vocabulary:
                raise UserError(
                    f"{path} does not exist: put a SentencePiece model there, or set data.tokenizer_vocabulary"
                )
            workdir.mkdir(parents=True, exist_ok=True)
            train_sentencepiece(_texts(config), path, config.data.tokenizer_vocabulary)
    return open_tokenizer(path)


def _texts(config: ConfigDict) -> Any:
    for name, spec in config.data.train.items():
        source = _entry(name, spec).source
        # Spread over the source: files are often sorted.
        for i in np.unique(np.linspace(0, len(source) - 1, config.data.tokenizer_examples).astype(int)):
            yield from (part.text for part in source[int(i)].parts if isinstance(part, Text))


def _entry(name: str, spec: ConfigDict) -> pipeline.Entry:
    return pipeline.make_source({"name": name, **spec})


def _items(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, sources: ConfigDict, **kwargs: Any
) -> Any:
    if not sources:
        raise UserError("config key data.train names no source: give at least one")
    entries = [_entry(name, spec) for name, spec in sources.items()]
    d = config.data
    if isinstance(program, TextProgram):
        layout = Layout(0, 0, d.row_length, rows=d.rows, read_slots=0, draw_slots=0, read_size=0, draw_size=0)
        return PackedGroups(entries, tokenizer, layout, config.seed, **kwargs)
    if not isinstance(program, UnifiedProgram):
        size = vit_config(config, "generation_encoder").image_size
        return Pairs(entries, tokenizer, d.text_length, size, config.seed, **kwargs)
    c = program.model.config
    layout = Layout(
        c.read_vectors, c.draw_vectors, d.row_length, rows=d.rows, read_slots=d.read_slots, draw_slots=d.draw_slots,
        read_size=c.understanding_encoder.image_size, draw_size=c.generation_encoder.image_size,
        read_stretch=d.read_stretch,
    )  # fmt: skip
    return PackedGroups(entries, tokenizer, layout, config.seed, **kwargs)


def _iterator(items: Any, config: ConfigDict, share: tuple[int, int], **kwargs: Any) -> pipeline.BatchIterator:
    make = pipeline.pairs_iterator if isinstance(items, Pairs) else pipeline.packed_iterator
    return make(
        items, config.batch_size, process_index=share[0], process_count=share[1], **kwargs
    )  # fmt: skip


def train_iterator(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, share: tuple[int, int] = (0, 1)
) -> pipeline.BatchIterator:
    """This process's `share` of the batches: part i of n (`sharding.batch_share`)."""
    per_epoch = config.data.examples_per_epoch or None
    items = _items(config, tokenizer, program, workdir, config.data.train, examples_per_epoch=per_epoch)
    return _iterator(items, config, share, threads=config.data.threads, workers=config.data.workers)


def evaluate_iterator(
    config: ConfigDict, tokenizer: Tokenizer, program: Any, workdir: Path, share: tuple[int, int] = (0, 1)
) -> pipeline.BatchIterator:
    """The same batches in the same order at every evaluation."""
    if tuple(config.data.evaluate) != tuple(config.data.train):
        raise UserError("data.evaluate and data.train must name the same sources in the same order")
    items = _items(config, tokenizer, program, workdir, config.data.evaluate, shuffle=False)
    batches = config.log.evaluate_batches
    return _iterator(items, config, share, one_pass=True, num_batches=batches, threads=config.data.threads)


def evaluation_sources(config: ConfigDict) -> list[Any]:
    if not config.data.evaluate:
        raise UserError("config key data.evaluate names no source: give at least one")
    return [_entry(name, spec).source for name, spec in config.data.evaluate.items()]


def examples(batch: dict[str, np.ndarray]) -> int:
    """How many examples a batch of this process holds."""
    if "image" in batch:
        return int(batch["valid"].sum())
    return int(batch["segment_ids"].max(axis=-1).sum())
