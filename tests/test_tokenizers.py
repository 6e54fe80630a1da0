"""Tokenizers: specials never come out of text, any text survives, training is deterministic."""

import io
import pickle

import pytest
import sentencepiece
import tokenizers
from tiny import LAYOUT, llama_tokenizer, picture

from pisces_jax.data.example import Example, Text
from pisces_jax.data.packing.layout import lay_out
from pisces_jax.data.tokenizers import (
    LlamaTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    open_tokenizer,
    train_sentencepiece,
)
from pisces_jax.utils.errors import UserError

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


@pytest.mark.parametrize("text", ["a red circle", "Größe, 大きさ, 🙂", "two\nlines\tand a tab", "", "(x_1)^2 != 0"])
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


# --- LLaMA 3's tokenizer.json


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    bare = llama_tokenizer(folder / "tokenizer.json")
    return open_tokenizer(folder), bare


def test_image_tokens_are_appended(llama):
    tokenizer, bare = llama
    assert isinstance(tokenizer, Tokenizer) and isinstance(tokenizer, LlamaTokenizer)
    size = bare.get_vocab_size()
    assert [tokenizer.pad, tokenizer.begin_image, tokenizer.end_image, tokenizer.image] == list(range(size, size + 4))
    assert tokenizer.vocab_size == size + 4
    assert (tokenizer.bos, tokenizer.eos) == (bare.token_to_id("<|begin_of_text|>"), bare.token_to_id("<|eot_id|>"))


def test_every_special_token_is_known(llama, tokenizer):
    """None of them may be sampled in an answer but the one that ends it."""
    ours, bare = llama
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    appended = {ours.pad, ours.begin_image, ours.end_image, ours.image}
    assert ours.special == {*appended, *(bare.token_to_id(f"<|{name}|>") for name in names)}
    assert tokenizer.special == set(specials(tokenizer))


def test_a_saved_tokenizer_opens_in_transformers(llama, tmp_path):
    """With its special tokens and its chat template, which gives the ids that training sees."""
    from transformers import AutoTokenizer

    ours, _ = llama
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    turns = [Text("what is it?"), Text("a red circle", learn=True), Text("where?")]
    messages = [dict(role="assistant" if turn.learn else "user", content=turn.text) for turn in turns]
    got = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert got == lay_out(Example(tuple(turns), "chat"), ours, LAYOUT, prompt=True).tokens.tolist()
    got = theirs.apply_chat_template(messages[:2], return_dict=False)
    assert got == lay_out(Example(tuple(turns[:2]), "chat"), ours, LAYOUT).tokens.tolist()
    # Consecutive turns of one speaker.
    said = [("user", "be short."), ("user", "what is it?"), ("assistant", "a red"), ("assistant", "circle")]
    messages = [dict(role=speaker, content=text) for speaker, text in said]
    turns = [Text(text, learn=speaker == "assistant", turn=speaker) for speaker, text in said]
    laid = lay_out(Example(tuple(turns), "chat"), ours, LAYOUT)
    assert laid.tokens.tolist() == theirs.apply_chat_template(messages, return_dict=False)
    assert theirs.decode(laid.tokens[laid.loss_mask]) == "a red<|eot_id|>circle<|eot_id|>"


# Spaces, special tokens, bytes, letters that normalisation changes.
WRITTEN = [
    *TEXTS, "", " ", "  a  red   circle ", "\ta\n\nb", "▁a ▁▁", "[IMG] <s></s><image> <pad> <unk> <0x41>",
    "é 大きさ 🙂",
    "ﬁ Ⅳ １２", "redredcirclestarstar", "a\u2028b\u3000c", "aaaaaaa",
]  # fmt: skip


@pytest.mark.parametrize("rules", [None, {}, dict(add_dummy_prefix=False), dict(remove_extra_whitespaces=False)])
def test_a_saved_sentencepiece_tokenizer_opens_in_transformers(tokenizer, tmp_path, rules):
    """Ours, and published ones of several rules: the ids that training sees, after a bos."""
    from transformers import AutoTokenizer

    if rules is not None:
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.Train(
            sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=320, model_type="bpe", byte_fallback=True,
            hard_vocab_limit=False, minloglevel=3, **rules,
        )  # fmt: skip
        (tmp_path / "given.model").write_bytes(model.getvalue())
    ours = tokenizer if rules is None else SentencePieceTokenizer(tmp_path / "given.model")
    ours.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')  # transformers looks at it
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    names = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, len(theirs))
    assert names == (ours.bos, ours.eos, ours.pad, ours.vocab_size)
    assert theirs.convert_tokens_to_ids(["[IMG]", "[/IMG]", "<image>"]) == [
        ours.begin_image,
        ours.end_image,
        ours.image,
    ]
    for text in WRITTEN:
        ids = [ours.bos, *ours.encode(text)]
        assert theirs(text)["input_ids"] == ids, text
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), text
    assert open_tokenizer(tmp_path).fingerprint == ours.fingerprint


def test_truncation_and_padding_of_a_file_are_turned_off(llama, tmp_path):
    """What a program that filled batches has saved into it."""
    ours, bare = llama
    text, path = "a red circle left of a blue square", tmp_path / "tokenizer.json"
    for spoil in (lambda t: t.enable_truncation(5), lambda t: t.enable_padding(length=64)):
        spoiled = tokenizers.Tokenizer.from_str(bare.to_str())
        spoil(spoiled)
        spoiled.save(str(path))
        opened = LlamaTokenizer(path)
        for each in (opened, pickle.loads(pickle.dumps(opened))):
            assert each.encode(text) == ours.encode(text) and each.header("user") == ours.header("user")
    path.write_text("\ufeff" + bare.to_str(), "utf-8")  # as some editors save
    assert LlamaTokenizer(path).encode(text) == ours.encode(text)


@pytest.mark.parametrize("text", ["[IMG]", "<|eot_id|> and <image>", "<|start_header_id|>x<|end_header_id|>", "é 大"])
def test_special_tokens_of_a_text_are_characters(llama, text):
    tokenizer, bare = llama
    ids = tokenizer.encode(text)
    special = {bare.token_to_id(f"<|{n}|>") for n in ("begin_of_text", "eot_id", "start_header_id", "end_header_id")}
    assert not set(ids) & {*specials(tokenizer), *special}
    assert tokenizer.decode([tokenizer.bos, *ids, tokenizer.image, tokenizer.eos]) == text
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode(text) == ids and again.fingerprint == tokenizer.fingerprint


def test_training_and_inference_see_the_chat_template_of_llama_3(llama):
    """The string as Meta documents it, tokenised by the library with special tokens recognised."""
    tokenizer, bare = llama

    def header(speaker):
        return f"<|start_header_id|>{speaker}<|end_header_id|>\n\n"

    given, made, asked = Text("what is it?"), Text("a red circle", learn=True), Text("where?")
    string = f"<|begin_of_text|>{header('user')}what is it?<|eot_id|>{header('assistant')}a red circle<|eot_id|>"
    laid = lay_out(Example((given, made), "chat"), tokenizer, LAYOUT)
    assert laid.tokens.tolist() == bare.encode(string).ids
    learned = laid.tokens[laid.loss_mask].tolist()
    assert learned == bare.encode("a red circle<|eot_id|>").ids

    longer = string + f"{header('user')}where?<|eot_id|>{header('assistant')}"
    prompt = lay_out(Example((given, made, asked), "prompt"), tokenizer, LAYOUT, prompt=True)
    assert prompt.tokens.tolist() == bare.encode(longer).ids
    # What inference begins with is what training had before the answer.
    answered = lay_out(Example((given, made, asked, Text("left", learn=True)), "chat"), tokenizer, LAYOUT)
    assert answered.tokens[: len(prompt.tokens)].tolist() == prompt.tokens.tolist()


def test_pictures_stand_in_their_speakers_turns(llama):
    tokenizer, _ = llama
    read = lay_out(Example((picture("read", 0), Text("what?")), "x"), tokenizer, LAYOUT, prompt=True)
    user = tokenizer.header("user")
    at = 1 + len(user)
    assert read.pictures[0].start == at
    assert read.tokens[at : at + LAYOUT.read_vectors].tolist() == [tokenizer.image] * LAYOUT.read_vectors
    # A picture that the model's turn shows is in that turn, which ends once.
    said = (Text("what?", turn="user"), Text("this", learn=True, turn="assistant"), picture("read", 0), Text("a", True))
    shown = lay_out(Example(said, "x"), tokenizer, LAYOUT).tokens.tolist()
    seen = [tokenizer.image] * LAYOUT.read_vectors
    ends = [*tokenizer.encode("this"), *seen, *tokenizer.encode("a"), tokenizer.eos]
    assert shown[-len(ends) :] == ends and shown.count(tokenizer.eos) == 2
    drawn = lay_out(Example((Text("draw"), picture("draw", 0)), "x"), tokenizer, LAYOUT)
    prompt = lay_out(Example((Text("draw"),), "x"), tokenizer, LAYOUT, prompt=True).tokens
    assert drawn.tokens[: len(prompt)].tolist() == prompt.tolist()
    assert drawn.tokens[len(prompt)] == tokenizer.begin_image and drawn.tokens[-1] == tokenizer.eos


def test_published_sentencepiece_models_get_the_image_tokens(tmp_path):
    """Such as LLaMA 2's, which have neither padding nor image tokens."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, model_type="bpe", byte_fallback=True,
        hard_vocab_limit=False, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = open_tokenizer(tmp_path)
    size = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).GetPieceSize()
    assert [tokenizer.pad, tokenizer.begin_image, tokenizer.end_image, tokenizer.image] == list(range(size, size + 4))
    assert tokenizer.decode([tokenizer.bos, *tokenizer.encode("a red star"), tokenizer.image]) == "a red star"
    assert tokenizer.special == {tokenizer.bos, tokenizer.eos, *range(size, size + 4)}
    # LLaMA 2's folders hold the same as a tokenizer.json too, which has none of LLaMA 3's tokens.
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    assert open_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_folders_without_a_tokenizer_are_named(tmp_path):
    with pytest.raises(UserError, match="neither tokenizer.json nor tokenizer.model"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json cannot be read"):
        open_tokenizer(tmp_path)
    for name in ("tokenizer.json", "tokenizer.model"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(UserError, match=f"{name} is a git-lfs pointer"):
            open_tokenizer(tmp_path / name)


def test_capitals_are_small_letters_where_the_config_says_so(tmp_path):
    """The same pieces for small letters with and without; in transformers too."""
    from transformers import AutoTokenizer

    plain, folded = (
        train_sentencepiece(TEXTS, tmp_path / f"{fold}.model", 512, casefold=fold) for fold in (False, True)
    )
    small = "a red circle is left of a blue square."
    assert folded.encode(small) == plain.encode(small)
    assert folded.encode("A RED Circle is Left of a BLUE square.") == folded.encode(small)
    assert plain.encode("RED") != plain.encode("red")
    folded.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.encode("A RED Circle")[1:] == folded.encode("a red circle")
