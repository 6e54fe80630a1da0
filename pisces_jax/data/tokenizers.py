"""Text to token ids and back, and the special tokens of the unified model.

Special tokens can never come out of text: a user who writes "[IMG]" gets the pieces of those five characters. What a
published tokenizer lacks of them is appended behind its vocabulary: for LLaMA 3 `<pad>` is 128256, `[IMG]` 128257,
`[/IMG]` 128258 and `<image>` 128259.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import sentencepiece
import tokenizers

from pisces_jax.utils.errors import UserError
from pisces_jax.utils.files import write_atomic

PAD, BEGIN_IMAGE, END_IMAGE, IMAGE = "<pad>", "[IMG]", "[/IMG]", "<image>"
APPENDED = (PAD, BEGIN_IMAGE, END_IMAGE, IMAGE)
Speaker = Literal["user", "assistant"]


@runtime_checkable
class Tokenizer(Protocol):
    """What the data layer and inference need of a tokenizer.

    `image` stands for one visual vector; `begin_image` and `end_image` enclose those of a drawn picture.
    `fingerprint` changes whenever the ids of some text may change. `end_of_turn` ends a turn of a conversation that
    another one follows; None where there are no turns. `special` are the ids that no text has.
    """

    vocab_size: int
    pad: int
    bos: int
    eos: int
    begin_image: int
    end_image: int
    image: int
    fingerprint: str
    end_of_turn: int | None
    special: frozenset[int]

    def header(self, speaker: Speaker) -> list[int]:
        """The ids that open a turn; none where there are no turns."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of `text`: no special tokens are added, and none can occur in the result."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; special tokens are left out."""
        ...

    def save(self, folder: Path) -> None:
        """Writes its files into `folder`."""
        ...


def open_tokenizer(path: Path) -> "Tokenizer":
    """A tokenizer from its file, or from a published folder that holds it.

    Raises:
        UserError: there is none that can be read.
    """
    if not path.is_dir():
        return LlamaTokenizer(path) if path.suffix == ".json" else SentencePieceTokenizer(path)
    described, model = path / "tokenizer.json", path / "tokenizer.model"
    if described.exists():
        try:
            return LlamaTokenizer(described)
        except UserError:  # LLaMA 2's folders hold both
            if not model.exists():
                raise
    elif not model.exists():
        raise UserError(f"{path} holds neither tokenizer.json nor tokenizer.model: give a folder that has one")
    return SentencePieceTokenizer(model)


# LLaMA 3's turns as transformers writes them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


class LlamaTokenizer:
    """LLaMA 3's `tokenizer.json`, with its chat template: what is learned or drawn is the assistant's turn.

    Raises `UserError` if `path` is missing, is no such file, or lacks LLaMA 3's special tokens.
    """

    def __init__(self, path: str | os.PathLike):
        try:
            self._load(Path(path).read_text("utf-8"))
        except KeyError as error:
            raise UserError(f"{path} has no token {error.args[0]}: give the tokenizer.json of LLaMA 3") from error
        except Exception as error:  # the library raises bare Exceptions
            raise UserError(f"{path} cannot be read as a tokenizer ({error}): give LLaMA 3's tokenizer.json") from error

    def _load(self, text: str) -> None:
        self._text = text
        self._tokenizer = tokenizers.Tokenizer.from_str(text)
        self._tokenizer.add_special_tokens([tokenizers.AddedToken(name, special=True) for name in APPENDED])
        self._tokenizer.encode_special_tokens = True  # in a text they are ordinary characters
        self.fingerprint = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        self.vocab_size = self._tokenizer.get_vocab_size(with_added_tokens=True)
        self.pad, self.begin_image, self.end_image, self.image = map(self._id, APPENDED)
        self.bos, self.eos = self._id("<|begin_of_text|>"), self._id("<|eot_id|>")
        self.end_of_turn: int | None = self.eos
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(i for i, token in added.items() if token.special)
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
        """Writes `tokenizer.json` with the appended tokens, and what transformers needs to know of it."""
        self._tokenizer.save(str(folder / "tokenizer.json"))
        bos, eos, pad = map(self._tokenizer.id_to_token, (self.bos, self.eos, self.pad))
        described = dict(
            tokenizer_class="PreTrainedTokenizerFast", bos_token=bos, eos_token=eos, pad_token=pad,
            chat_template=CHAT_TEMPLATE,
        )  # fmt: skip
        write_atomic(folder / "tokenizer_config.json", json.dumps(described, indent=1) + "\n")

    def __getstate__(self) -> str:
        return self._text

    def __setstate__(self, text: str) -> None:
        self._load(text)


class SentencePieceTokenizer:
    """A SentencePiece model: one made by `train_sentencepiece`, or a published one such as LLaMA 2's.

    Raises `UserError` if `path` is missing or is no SentencePiece model with begin and end of sequence.
    """

    end_of_turn: int | None = None

    def __init__(self, path: str | os.PathLike):
        try:
            self._load(Path(path).read_bytes())
        except (OSError, RuntimeError) as error:
            raise UserError(f"{path} cannot be read as a SentencePiece model: give another path") from error
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
        self._pieces = self.vocab_size = self._processor.GetPieceSize()
        self.bos, self.eos = self._control("<s>"), self._control("</s>")
        self.pad, self.begin_image, self.end_image, self.image = map(self._special, APPENDED)
        controls = [i for i in range(self._pieces) if self._processor.IsControl(i)]
        self.special = frozenset([*controls, *range(self._pieces, self.vocab_size)])

    def _control(self, piece: str) -> int:
        i = self._processor.PieceToId(piece)
        if not self._processor.IsControl(i):  # an unknown piece gets the id of <unk>, which is no control symbol
            raise KeyError(piece)
        return i

    def _special(self, piece: str) -> int:
        """The model's own, or else the next one behind its pieces."""
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
        pieces = [i for i in map(int, ids) if i < self._pieces]
        return self._processor.DecodeIds([i for i in pieces if not self._processor.IsControl(i)])

    def save(self, folder: Path) -> None:
        """Writes `tokenizer.model` as it was read."""
        write_atomic(folder / "tokenizer.model", self._model)

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
            pad_piece=PAD,
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
