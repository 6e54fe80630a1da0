"""A SentencePiece model in the form of a `tokenizer.json`, which transformers opens without guessing.

Opened from `tokenizer.model` alone, transformers 5 takes LLaMA 2's rules whatever the model says: other spaces, other
ids. Here the model's own rules are written out (https://github.com/google/sentencepiece: normalizer.cc, bpe_model.cc).
"""

import importlib
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, normalizers, processors

_SPACE = "▁"
_BPE = 2  # TrainerSpec.ModelType
_ALL = 2**16  # spaces


def as_tokenizer_json(model: bytes, bos: str, special: Sequence[str]) -> tokenizers.Tokenizer | None:
    """A tokenizer that gives the ids of the SentencePiece `model`, after a `bos`.

    Args:
        special: the special tokens; those that the model lacks are appended in this order.

    Returns:
        None where the library of tokenizers has other rules: for unigram models, for user-defined symbols, and for
        spaces at the ends of words.
    """
    # It takes protobuf, which encoding does not need.
    proto = importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(model)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    symbols = any(p.type == p.USER_DEFINED for p in proto.pieces)
    if trainer.model_type != _BPE or trainer.treat_whitespace_as_suffix or symbols:
        return None
    normal = {p.piece: p.score for p in proto.pieces if p.type == p.NORMAL}
    # Two neighbours are joined where that makes a piece, the likeliest piece first. Other pieces never come from text.
    joins = [(piece[:i], piece[i:]) for piece in sorted(normal, key=lambda p: -normal[p]) for i in range(1, len(piece))]
    made = tokenizers.Tokenizer(
        models.BPE(
            {p.piece: i for i, p in enumerate(proto.pieces)}, [(a, b) for a, b in joins if a in normal and b in normal],
            unk_token=proto.pieces[trainer.unk_id].piece, fuse_unk=True, byte_fallback=trainer.byte_fallback,
        )
    )  # fmt: skip
    made.normalizer = _normalizer(rules)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        steps.append(decoders.Strip(" ", _ALL if rules.remove_extra_whitespaces else 1, 0))
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens([tokenizers.AddedToken(name, normalized=False, special=True) for name in special])
    made.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, made.token_to_id(bos))]
    )
    return made


def _normalizer(rules: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", _SPACE))
    if rules.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(f"[ {_SPACE}]+\\z"), ""))
    return normalizers.Sequence(steps)
