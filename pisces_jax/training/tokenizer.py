"""The tokenizer of a config, and the sources that one can be trained on."""

import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from pisces_jax.data.example import Text
from pisces_jax.data.packing.layout import Entry
from pisces_jax.data.sources import make_source
from pisces_jax.data.tokenizers import Tokenizer, open_tokenizer, train_sentencepiece
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import checksum_of, is_as_written, local_path, write_checksum
from pisces_jax.utils.processes import primary_first
from pisces_jax.weights.sources import HUB, TOKENIZER, is_folder, resolve

log = logging.getLogger(__name__)


def load_tokenizer(config: ConfigDict, workdir: Path) -> Tokenizer:
    """The config's tokenizer: a published folder or file (a name with a path separator), or one in the work directory,
    trained first on the sources that the config names for it if it is not there.

    Raises:
        UserError: it is not there and the config does not say how large a vocabulary to train; or it is damaged, and
            there are runs that were trained with it.
    """
    if is_folder(config.data.tokenizer):
        if config.data.tokenizer.startswith(HUB) or not (path := local_path(config.data.tokenizer)).is_file():
            path = resolve(config.data.tokenizer, TOKENIZER)
        return open_tokenizer(path)
    path = workdir / config.data.tokenizer
    with primary_first("tokenizer"):
        if path.exists() and not is_as_written(path):
            if not config.data.tokenizer_vocabulary or any(workdir.glob("*/checkpoints/*")):
                beside = checksum_of(path).name
                raise UserError(
                    f"{path} is not what was written (by the checksum in {beside}), and runs were trained with it: put "
                    f"the right file there, or remove {beside} if you have replaced it yourself"
                )
            log.warning("%s is damaged: it is made anew", path)
            path.unlink()
        if not path.exists():
            if not config.data.tokenizer_vocabulary:
                raise UserError(
                    f"{path} does not exist: put a SentencePiece model there, or set data.tokenizer_vocabulary"
                )
            workdir.mkdir(parents=True, exist_ok=True)
            data = config.data
            made = path.with_name(f".{path.name}.made")
            train_sentencepiece(_texts(config), made, data.tokenizer_vocabulary, casefold=data.tokenizer_casefold)
            write_checksum(made, path)
            os.replace(made, path)
    return open_tokenizer(path)


def _texts(config: ConfigDict) -> Any:
    for name, spec in (config.data.tokenizer_sources or config.data.train).items():
        source = open_entry(name, spec).source
        # Spread over the source, since files are often sorted.
        for i in np.unique(np.linspace(0, len(source) - 1, config.data.tokenizer_examples).astype(int)):
            try:
                parts = source[int(i)].parts
            except UserError:
                continue  # broken examples are counted where lengths are read
            yield from (part.text for part in parts if isinstance(part, Text))


def open_entry(name: str, spec: ConfigDict) -> Entry:
    return make_source({"name": name, **spec})


def entries_of(sources: ConfigDict) -> list[Entry]:
    return [open_entry(name, spec) for name, spec in sources.items()]
