"""Text to token ids and back, and the special tokens of the unified model.

Text never becomes a special token: a user who writes "[IMG]" gets the pieces of those five characters. The special
tokens that a published tokenizer lacks are appended to its vocabulary: with LLaMA 3, `<pad>` is 128256, `[IMG]` 128257,
`[/IMG]` 128258 and `<image>` 128259.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import sentencepiece
import tokenizers

from pisces_jax.data.example import Speaker
from pisces_jax.data.sentencepiece_json import as_tokenizer_json
from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import SNIFFED, sniff, write_atomic

PAD, BEGIN_IMAGE, END_IMAGE, IMAGE = "<pad>", "[IMG]", "[/IMG]", "<image>"
APPENDED = (PAD, BEGIN_IMAGE, END_IMAGE, IMAGE)


@runtime_checkable
class Tokenizer(Protocol):
    """What data and inference need of a tokenizer.

    `image` stands for one visual vector; `begin_image` and `end_image` enclose those of a drawn picture.
    `fingerprint` changes whenever the ids of some text may change. `opening` begins every sequence: `bos`, or the words
    with which a chat template begins. `end_of_turn` ends a turn of a conversation, except the last; it is None if the
    tokenizer has no turns. `before_picture` stands between the header of a turn and a picture with which it begins.
    `special` are the ids that never come from text. The first `own_size` tokens are those of its file; special tokens
    that the file lacks follow.
    """

    vocab_size: int
    own_size: int
    pad: int
    bos: int
    eos: int
    begin_image: int
    end_image: int
    image: int
    fingerprint: str
    opening: Sequence[int]
    end_of_turn: int | None
    before_picture: Sequence[int]
    special: frozenset[int]

    def header(self, speaker: Speaker) -> list[int]:
        """The ids that open a turn of `speaker`; empty if the tokenizer has no turns."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without special tokens."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens."""
        ...

    def save(self, folder: Path) -> None:
        """Writes its files into `folder`."""
        ...


def open_tokenizer(path: Path) -> "Tokenizer":
    """A tokenizer from its file, or from a published folder that holds it.

    Raises:
        UserError: there is no readable tokenizer.
    """
    if not path.is_dir():
        return _chat_tokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    described, model = path / "tokenizer.json", path / "tokenizer.model"
    if not described.exists() and (path / "vocab.json").exists() and (path / "merges.txt").exists():
        return _chat_tokenizer(path)
    if described.exists():
        try:
            return _chat_tokenizer(described)
        except UserError:  # LLaMA 2's folders hold both
            if not model.exists():
                raise
    elif not model.exists():
        raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model: give a folder that has one")
    return SentencePieceTokenizer(model)


def _chat_tokenizer(path: Path) -> "LlamaTokenizer":
    """LLaMA 3's or Qwen2's, whichever the file's tokens say."""
    from pisces_jax.data import qwen

    return qwen.QwenTokenizer(path) if qwen.is_qwen(path) else LlamaTokenizer(path)


_BOS, _EOS = "<|begin_of_text|>", "<|eot_id|>"
# LLaMA 3's turns, for transformers.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _found(path: str | os.PathLike) -> str:
    """What a file is that cannot be read, for a message; "" if that is not seen."""
    try:
        with open(path, "rb") as file:
            meaning = sniff(file.read(SNIFFED))
    except OSError:
        return ""
    return f"is {meaning}, no tokenizer" if meaning else ""


def describe(folder: Path, bos: str, eos: str, pad: str, **more: Any) -> None:
    """Writes the `tokenizer_config.json` that transformers needs beside a `tokenizer.json`."""
    described = dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=bos, eos_token=eos, pad_token=pad,
        clean_up_tokenization_spaces=False, **more,
    )  # fmt: skip
    write_atomic(folder / "tokenizer_config.json", json.dumps(described, indent=1) + "\n")


class LlamaTokenizer:
    """LLaMA 3's `tokenizer.json` with its chat template, in which learned texts and drawn pictures are the assistant's.

    Raises:
        UserError: `path` is missing, is not such a file, or lacks LLaMA 3's special tokens.
    """

    family: ClassVar[str] = "LLaMA 3"
    names: ClassVar[tuple[str, ...]] = APPENDED  # of padding, the two ends of a picture and a vector

    def __init__(self, path: str | os.PathLike):
        try:
            self._load(self._text_of(Path(path)))
        except KeyError as error:
            raise UserError(f"{path} has no token {error.args[0]}: give the tokenizer.json of {self.family}") from error
        except Exception as error:  # the library raises bare Exceptions
            found = _found(path) or f"cannot be read as a tokenizer ({error})"
            raise UserError(f"{path} {found}: give {self.family}'s tokenizer.json") from error

    @staticmethod
    def _text_of(path: Path) -> str:
        return path.read_text("utf-8-sig")

    def _load(self, text: str) -> None:
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        if self._tokenizer.truncation or self._tokenizer.padding:  # what some program did last with the file
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            text = self._tokenizer.to_str()  # another fingerprint than that of cut texts
        self._text = text
        self.own_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in self.names])
        self._tokenizer.encode_special_tokens = True  # within text they are ordinary characters
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.pad, self.begin_image, self.end_image, self.image = map(self._id, self.names)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
        self.before_picture: Sequence[int] = ()
        self._set_turns()

    def _set_turns(self) -> None:
        self.bos, self.eos = self._id(_BOS), self._id(_EOS)
        self.opening: Sequence[int] = [self.bos]
        self.end_of_turn: int | None = self.eos
        opened, closed = self._id("<|start_header_id|>"), self._id("<|end_header_id|>")
        speakers: tuple[Speaker, ...] = ("user", "assistant")
        self._headers = {s: [opened, *self.encode(s), closed, *self.encode("\n\n")] for s in speakers}

    def _id(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def header(self, speaker: Speaker) -> list[int]:
        return self._headers[speaker]

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.json` with the appended tokens, and the `tokenizer_config.json` that transformers needs."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        self._describe(folder)

    def _describe(self, folder: Path) -> None:
        describe(folder, _BOS, _EOS, PAD, chat_template=CHAT_TEMPLATE)

    def __getstate__(self) -> str:
        return self._text

    def __setstate__(self, text: str) -> None:
        self._load(text)


class SentencePieceTokenizer:
    """A SentencePiece model, made by `train_sentencepiece` or published, such as LLaMA 2's.

    Raises:
        UserError: `path` is missing, or not a SentencePiece model with begin and end of sequence.
    """

    end_of_turn: int | None = None
    before_picture: Sequence[int] = ()

    def __init__(self, path: str | os.PathLike):
        try:
            self._load(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            found = _found(path) or "cannot be read as a SentencePiece model"
            raise UserError(f"{path} {found}: give another path") from error
        except KeyError as error:
            raise UserError(
                f"the SentencePiece model {path} has no control symbol {error.args[0]}: "
                "give one that has it, or train one with pisces_jax.data.tokenizers.train_sentencepiece"
            ) from error

    def _load(self, model: bytes) -> None:
        self._model = model
        self._processor = sentencepiece.SentencePieceProcessor()
        self._processor.LoadFromSerializedProto(model)
        self.fingerprint = hashlib.blake2b(model, digest_size=16).hexdigest()
        self.own_size = self.vocab_size = self._processor.GetPieceSize()
        self.bos, self.eos = self._control("<s>"), self._control("</s>")
        self.opening: Sequence[int] = [self.bos]
        self.pad, self.begin_image, self.end_image, self.image = map(self._special, APPENDED)
        controls = [i for i in range(self.own_size) if self._processor.IsControl(i)]
        self.special = frozenset([*controls, *range(self.own_size, self.vocab_size)])

    def _control(self, piece: str) -> int:
        i = self._processor.PieceToId(piece)
        if not self._processor.IsControl(i):  # an unknown piece gets the id of <unk>, which is not a control symbol
            raise KeyError(piece)
        return i

    def _special(self, piece: str) -> int:
        """The model's own id, or else the next one after its pieces."""
        try:
            return self._control(piece)
        except KeyError:
            self.vocab_size += 1
            return self.vocab_size - 1

    def header(self, speaker: Speaker) -> list[int]:
        return []

    def encode(self, text: str) -> list[int]:
        return self._processor.EncodeAsIds(text)

    def decode(self, ids: Sequence[int]) -> str:
        pieces = [i for i in map(int, ids) if i < self.own_size]
        return self._processor.DecodeIds([i for i in pieces if not self._processor.IsControl(i)])

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model` as it was read and, where that has the same ids, the `tokenizer.json` that
        transformers reads. Text has no special tokens there either, since there are no turns to write with them.
        """
        write_atomic(folder / "tokenizer.model", self._model)
        controls = [self._processor.IdToPiece(i) for i in range(self.own_size) if self._processor.IsControl(i)]
        appended = [name for name in APPENDED if name not in controls]
        made = as_tokenizer_json(self._model, "<s>", [*controls, *appended])
        if made is not None:
            made.save(str(folder / "tokenizer.json"))
            unknown = self._processor.IdToPiece(self._processor.unk_id())
            describe(folder, "<s>", "</s>", PAD, unk_token=unknown, split_special_tokens=True)

    # For data workers: SentencePiece does not promise that its processor can be pickled.
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
    casefold: bool = False,
) -> SentencePieceTokenizer:
    """Trains a tokenizer on `texts`, writes it to `path` (atomically) and returns it.

    The same texts in the same order give the same file. `vocab_size` is an upper limit. With "bpe", every word of a
    small closed language becomes a single piece if the limit allows. With `byte_fallback` (256 of the pieces), any
    text survives encoding and decoding, except for repeated spaces. With `casefold` capitals, and other forms of the
    same characters (Unicode's NFKC), are taken for the plain ones: for models that learn from small letters alone.

    Raises:
        UserError: there are no texts, or `vocab_size` is too small for their characters.
    """
    seen = False

    def lines() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            # SentencePiece ends a sentence at a line break.
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
            normalization_rule_name="nfkc_cf" if casefold else "identity",
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            control_symbols=[BEGIN_IMAGE, END_IMAGE, IMAGE],
            num_threads=1,
            minloglevel=3,
        )
    except RuntimeError as error:
        if not seen:
            raise UserError("no text to train a tokenizer on: give a source that holds text") from error
        raise UserError(f"vocab_size={vocab_size} does not suit these texts ({error}): change it") from error
    write_atomic(Path(path), model.getvalue())
    return SentencePieceTokenizer(path)
