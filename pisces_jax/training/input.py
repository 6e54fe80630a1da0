"""The input of a run: its program's dataset over the config's sources, and this process's share of the batches."""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from pisces_jax.data.example import Text
from pisces_jax.data.formats.records import Examples
from pisces_jax.data.packing import pipeline
from pisces_jax.data.packing.items import Items
from pisces_jax.data.tokenizers import Tokenizer
from pisces_jax.training.feature_cache import open_caches
from pisces_jax.training.programs import make_program
from pisces_jax.training.programs.base import Program
from pisces_jax.training.tokenizer import entries_of, load_tokenizer
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.processes import all_agree, primary_first


def items(
    config: ConfigDict, tokenizer: Tokenizer, program: Program, workdir: Path, sources: ConfigDict, **kwargs: Any
) -> Items:
    """The program's dataset over these sources. Lengths are kept in `folder`, by default below `workdir`, where every
    stage and worker finds them.

    With several processes the first one indexes shards and reads lengths, and the others find them.

    Raises:
        UserError: no source, or one that cannot be used.
    """
    if not sources:
        raise UserError("config key data.train names no source: give at least one")
    with primary_first("items"):
        return _items(config, tokenizer, program, workdir, sources, **kwargs)


def open_items(config: ConfigDict, workdir: Path, evaluate: bool = False) -> Items:
    """What a run of this config reads, outside a run: the sources of training, or those that are held out.

    Raises:
        UserError: as `items` does.
    """
    sources = config.data.evaluate if evaluate else config.data.train
    if not sources:
        raise UserError(f"data.{'evaluate' if evaluate else 'train'} names no source: give at least one")
    tokenizer = load_tokenizer(config, workdir)
    program = make_program(config, tokenizer.vocab_size)
    per_epoch = None if evaluate else config.data.examples_per_epoch or None
    return items(config, tokenizer, program, workdir, sources, examples_per_epoch=per_epoch, shuffle=not evaluate)


def _items(
    config: ConfigDict, tokenizer: Tokenizer, program: Program, workdir: Path, sources: ConfigDict, **kwargs: Any
) -> Items:
    entries = entries_of(sources)
    d = config.data
    how = dict(folder=workdir / "lengths", scaled_jpeg=d.scaled_jpeg, max_broken=d.max_broken) | kwargs
    return program.dataset(config, entries, tokenizer, open_caches(config, workdir, entries), **how)


def _iterator(
    made: Items, config: ConfigDict, program: Program, share: tuple[int, int], **kwargs: Any
) -> pipeline.BatchIterator:
    iterator = pipeline.batches(
        made, program.batch_items(config), process_index=share[0], process_count=share[1],
        max_broken=config.data.max_broken, **kwargs,
    )  # fmt: skip
    # Processes that pack different examples would silently lose some and repeat others.
    if not all_agree(iterator.digest):
        raise UserError(
            "the processes of this run find different examples, or can read different ones of them: make sure that "
            "all hosts see the same data, and start again"
        )
    return iterator


def train_iterator(
    config: ConfigDict, tokenizer: Tokenizer, program: Program, workdir: Path, share: tuple[int, int] = (0, 1),
    **kwargs: Any,
) -> pipeline.BatchIterator:  # fmt: skip
    """This process's `share` of the batches: part i of n (`sharding.batch_share`); `kwargs` are for `items`."""
    per_epoch = config.data.examples_per_epoch or None
    made = items(config, tokenizer, program, workdir, config.data.train, examples_per_epoch=per_epoch, **kwargs)
    return _iterator(made, config, program, share, threads=config.data.threads, workers=config.data.workers)


def evaluate_iterator(
    config: ConfigDict, tokenizer: Tokenizer, program: Program, workdir: Path, share: tuple[int, int] = (0, 1)
) -> pipeline.BatchIterator:
    """The same batches in the same order at every evaluation."""
    if tuple(config.data.evaluate) != tuple(config.data.train):
        raise UserError("data.evaluate and data.train must name the same sources in the same order")
    made = items(config, tokenizer, program, workdir, config.data.evaluate, shuffle=False)
    batches = config.log.evaluate_batches
    return _iterator(made, config, program, share, one_pass=True, num_batches=batches, threads=config.data.threads)


def evaluation_sources(config: ConfigDict) -> list[Any]:
    if not config.data.evaluate:
        raise UserError("config key data.evaluate names no source: give at least one")
    return [entry.source for entry in entries_of(config.data.evaluate)]


def training_sources(config: ConfigDict) -> list[Any]:
    return [entry.source for entry in entries_of(config.data.train)]


def judged_sources(config: ConfigDict) -> tuple[Any, dict[str, Any]]:
    """The source of captioned pictures (`Examples`) that a run learns to draw from, and held-out ones by name: that of
    `data.evaluate` ("evaluate") and those of `data.judge`. Of several, it is the first by name.

    Raises:
        UserError: the run draws from no prompts of files.
    """
    train = {entry.name: entry.source for entry in entries_of(config.data.train)}
    evaluate = {entry.name: entry.source for entry in entries_of(config.data.evaluate)}
    for name in sorted(set(train) & set(evaluate)):
        source = evaluate[name]
        if isinstance(source, Examples) and source.draws and isinstance(source[0].parts[0], Text):
            more = {entry.name: entry.source for entry in entries_of(config.data.judge)}
            return train[name], {"evaluate": source, **more}
    raise UserError("no source in both data.train and data.evaluate draws from a caption: the task judge needs one")
