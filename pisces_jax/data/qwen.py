"""Qwen2's tokenizer and chat template, as BLIP3-o was trained with them."""

import json
from pathlib import Path
from typing import ClassVar

import tokenizers

from pisces_jax.data.example import Speaker
from pisces_jax.data.tokenizers import BEGIN_IMAGE, END_IMAGE, IMAGE, LlamaTokenizer, describe

_TURN, _TURN_END, _END = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
QWEN_SYSTEM = "You are a helpful assistant."
QWEN_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n" + QWEN_SYSTEM + "<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Qwen2 splits text before its merges: contractions, words with one sign before them, single digits, signs, spaces.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def is_qwen(path: Path) -> bool:
    """Whether a folder, or a `tokenizer.json` by its tokens, has Qwen2's tokenizer."""
    try:
        return path.is_dir() or _TURN in path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False  # who reads it will say what it is


class QwenTokenizer(LlamaTokenizer):
    """Qwen2's tokenizer with its chat template: a `tokenizer.json`, or a folder with `vocab.json` and `merges.txt`.

    There is no token before a text; a conversation begins with the system's turn. `[IMG]`, `[/IMG]` and `<image>` come
    after Qwen2.5-VL's tokens (151,665 to 151,667), as in BLIP3-o, and padding is `<|endoftext|>`.

    BLIP3-o trained with the assistant's turn already closed before a picture: its template wrote an empty answer with
    its end. So do we (`before_picture`).
    """

    family: ClassVar[str] = "Qwen2"
    names: ClassVar[tuple[str, ...]] = (_END, BEGIN_IMAGE, END_IMAGE, IMAGE)

    @staticmethod
    def _text_of(path: Path) -> str:
        return _qwen_json(path) if path.is_dir() else path.read_text("utf-8-sig")

    def _set_turns(self) -> None:
        turn, end = self._id(_TURN), self._id(_TURN_END)
        self.bos = self.pad  # never written: nothing stands before a text
        self.eos = self.end_of_turn = end
        line = self.encode("\n")
        self.opening = [turn, *self.encode(f"system\n{QWEN_SYSTEM}"), end]
        speakers: tuple[Speaker, ...] = ("user", "assistant")
        self._headers = {s: [*line, turn, *self.encode(f"{s}\n")] for s in speakers}
        self.before_picture = [end, *line]

    def _describe(self, folder: Path) -> None:
        describe(folder, _END, _TURN_END, _END, chat_template=QWEN_TEMPLATE)


def _qwen_json(folder: Path) -> str:
    """The `tokenizer.json` of a folder that has only the files of the slow tokenizer."""
    model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    made = tokenizers.Tokenizer(model)
    made.normalizer = tokenizers.normalizers.NFC()
    words = tokenizers.pre_tokenizers.Split(tokenizers.Regex(_QWEN_WORDS), "isolated")
    letters = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([words, letters])
    made.decoder = tokenizers.decoders.ByteLevel()
    described = folder / "tokenizer_config.json"
    values = json.loads(described.read_text()).get("added_tokens_decoder", {}) if described.exists() else {}
    for i, token in sorted((int(i), token) for i, token in values.items()):
        own = tokenizers.AddedToken(token["content"], special=token.get("special", True), normalized=False)
        made.add_tokens([own]) if not own.special else made.add_special_tokens([own])
        if made.token_to_id(token["content"]) != i:
            raise ValueError(f"{token['content']} is token {made.token_to_id(token['content'])} and must be {i}")
    return made.to_str()
