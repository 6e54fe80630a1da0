"""Tokenizers: specials never come out of text, any text survives, training is deterministic."""

import pickle

import pytest

from pisces_jax.data.tokenizers import SentencePieceTokenizer, Tokenizer, train_sentencepiece
from pisces_jax.errors import UserError

COLOURS = ("red", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle")
TEXTS = [f"draw: a {a} {s} left of a {b} star" for a in COLOURS for s in SHAPES for b in COLOURS]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_sentencepiece(TEXTS, tmp_path_factory.mktemp("tokenizer") / "t.model", vocab_size=512)


def specials(tokenizer):
    names = ("pad", "bos", "eos", "begin_image", "end_image", "image")
    return [getattr(tokenizer, name) for name in names]


def test_is_a_tokenizer(tokenizer):
    assert isinstance(tokenizer, Tokenizer)
    ids = specials(tokenizer)
    assert len(set(ids)) == 6 and all(0 <= i < tokenizer.vocab_size for i in ids)


@pytest.mark.parametrize("model_type", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "text",
    ["[IMG]", "a [/IMG] b", "<image><image>", "<pad> <s> </s>", "</s>", "[IMG]<image>[/IMG]", "<0x41>"],
)
def test_text_never_becomes_a_special_token(tmp_path, text, model_type):
    # Also when the training text itself is full of them.
    tokenizer = train_sentencepiece([*TEXTS, text] * 3, tmp_path / "t.model", 600, model_type)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(specials(tokenizer))
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(
    "text", ["a red circle", "Größe, 大きさ, 🙂", "two\nlines\tand a tab", "", "(x_1)^2 != 0"]
)
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_decode_drops_specials(tokenizer):
    ids = [tokenizer.bos, *tokenizer.encode("a red"), tokenizer.begin_image, tokenizer.image, tokenizer.eos]
    assert tokenizer.decode(ids) == "a red"


def test_words_of_a_small_language_are_single_pieces(tokenizer):
    assert len(tokenizer.encode("a purple triangle left of a green star")) == 8


def test_training_is_deterministic(tokenizer, tmp_path):
    again = train_sentencepiece(iter(TEXTS), tmp_path / "t.model", vocab_size=512)
    assert again.fingerprint == tokenizer.fingerprint
    other = train_sentencepiece(TEXTS[:20], tmp_path / "u.model", vocab_size=512)
    assert other.fingerprint != tokenizer.fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "t.model",
        "u.model",
    ]  # no temporary file is left


def test_pickles(tokenizer):
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(TEXTS[5]) == tokenizer.encode(TEXTS[5]) and again.image == tokenizer.image


def test_mistakes_are_named(tmp_path):
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece([" ", ""], tmp_path / "t.model", 300)
    with pytest.raises(UserError, match="vocab_size=20"):
        train_sentencepiece(TEXTS, tmp_path / "t.model", 20)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="missing.model"):
        SentencePieceTokenizer(tmp_path / "missing.model")
    (tmp_path / "text.model").write_text("no model")
    with pytest.raises(UserError, match="text.model"):
        SentencePieceTokenizer(tmp_path / "text.model")
