"""Text to token ids and back, and the special tokens of the unified model.

Special tokens can never come out of text: a user who writes "[IMG]" gets the pieces of those five characters.
"""

import hashlib
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import sentencepiece

from pisces_jax.errors import UserError
from pisces_jax.files import write_atomic

BEGIN_IMAGE, END_IMAGE, IMAGE = "[IMG]", "[/IMG]", "<image>"


@runtime_checkable
class Tokenizer(Protocol):
    """What the data layer and inference need of a tokenizer.

    `image` stands for one visual vector; `begin_image` and `end_image` enclose those of a drawn picture.
    `fingerprint` changes whenever the ids of some text may change.
    """

    vocab_size: int
    pad: int
    bos: int
    eos: int
    begin_image: int
    end_image: int
    image: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: no special tokens are added, and none can occur in the result."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        ...


class SentencePieceTokenizer:
    """A SentencePiece model made by `train_sentencepiece`.

    Raises `UserError` if `path` is missing, is no SentencePiece model, or lacks the special tokens.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            self._load(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read as a SentencePiece model: give another path") from error
        except KeyError as error:
            raise UserError(
                f"the SentencePiece model {path} has no control symbol {error.args[0]}: "
                "train it with pisces_jax.data.tokenizers.train_sentencepiece"
            ) from error

    def _load(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        self.vocab_size = self._processor.GetPieceSize()
        self.pad = self._special("<pad>")
        self.bos = self._special("<s>")
        self.eos = self._special("</s>")
        self.begin_image = self._special(BEGIN_IMAGE)
        self.end_image = self._special(END_IMAGE)
        self.image = self._special(IMAGE)

    def _special(self, piece: str) -> int:
        i = self._processor.PieceToId(piece)
        if not self._processor.IsControl(
            i
        ):  # an unknown piece gets the id of <unk>, which is no control symbol
            raise KeyError(piece)
        return i

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        return self._processor.DecodeIds([i for i in map(int, ids) if not self._processor.IsControl(i)])

    # The processor's own pickling is not promised by SentencePiece; data workers need ours.
    def __getstate__(self) -> bytes:
        return self._model

    def __setstate__(self, model: bytes) -> None:
        self._load(model)


def train_sentencepiece(
    texts: Iterable[str],
    path: str | os.PathLike,
    vocab_size: int,
    model_type: Literal["bpe", "unigram"] = "bpe",
    byte_fallback: bool = True,
) -> SentencePieceTokenizer:
    """Trains a tokenizer on `texts`, writes it to `path` (atomically) and returns it.

    The same texts in the same order give the same file. With "bpe" a small closed language ends with every
    word a single piece, as long as `vocab_size` allows; it is an upper limit, fewer pieces are no error. With
    `byte_fallback` (256 of the pieces) any text survives encoding and decoding, except for repeated spaces.

    Raises `UserError` when there are no texts or `vocab_size` is too small for the characters in them.
    """
    seen = False

    def lines() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            # SentencePiece takes a line break for the end of a sentence.
            for line in text.splitlines():
                if line.strip():
                    seen = True
                    yield line

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(lines()),
            model_writer=model,
            vocab_size=vocab_size,
            model_type=model_type,
            byte_fallback=byte_fallback,
            hard_vocab_limit=False,
            character_coverage=1.0 if not byte_fallback else 0.9995,
            normalization_rule_name="identity",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece="<pad>",
            control_symbols=[BEGIN_IMAGE, END_IMAGE, IMAGE],
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        if not seen:
            raise UserError("no text to train a tokenizer on: give a source that holds text") from error
        raise UserError(f"vocab_size={vocab_size} does not fit these texts ({error}): change it") from error
    write_atomic(Path(path), model.getvalue())
    return SentencePieceTokenizer(path)
