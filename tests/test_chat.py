"""The conversation in the terminal, and pictures shown in it."""

import base64
import io
import re
import sys

import numpy as np
import pytest
import tiny
from PIL import Image

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.images import UnreadablePicture, png
from pisces_jax.inference.conversation import Message, as_parts, open_upload
from pisces_jax.inference.sampling import TextSampling
from pisces_jax.inference.talk import Talk, converse
from pisces_jax.inference.terminal import inline, kind_of
from pisces_jax.utils.errors import UserError

DRAWING = dict(
    describe=False,
    max_tokens=8,
    temperature=1.0,
    guidance=None,
    steps=None,
    solver=None,
    vector_guidance=None,
    turn_ends=True,
)
PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def model():
    return tiny.ready_model(1)


@pytest.fixture
def talk(model, tmp_path):
    said = []
    made = Talk(model, TextSampling(10), DRAWING, tmp_path / "drawn", 128, say=said.append)
    made.heard = said
    return made


def test_a_question_alone_is_what_answer_asks(talk, model, tmp_path):
    (tmp_path / "p.png").write_bytes(png(PICTURE))
    talk.answer(f"/image {tmp_path}/p.png")
    talk.answer("abc")
    expected = model.answer([(Picture(PICTURE, "read"), Text("abc"))], max_tokens=10)[0]
    assert "".join(talk.heard) == f"[8 x 8 pixels]\n{expected}\n"


def test_text_picture_text_picture(talk, model, tmp_path):
    """Each turn sees all before it: the answer after a drawn picture is that of the whole conversation."""
    for line in ("abc", "/draw  def ", "gh", "/draw i"):
        assert talk.answer(line)
    pictures = [np.asarray(Image.open(tmp_path / f"drawn/{n:04d}.png")) for n in range(2)]
    first, second = "".join(talk.heard).split("\n")[0], "".join(talk.heard).split("\n")[2]
    history = [
        Message("user", ("abc",)), Message("assistant", (first,)), Message("user", ("drawdef",)),
        Message("assistant", (pictures[0],)), Message("user", ("gh",)),
    ]  # fmt: skip
    assert model.answer([as_parts(history)], max_tokens=10) == [second]
    then = [*history, Message("assistant", (second,)), Message("user", ("drawi",))]
    (drawing,) = model.draw([as_parts(then)], describe=False, seeds=[1])
    np.testing.assert_array_equal(drawing.image, pictures[1])
    assert talk.answer("/new") and not talk._said


def test_what_cannot_be_done_is_said_and_the_talk_goes_on(talk, monkeypatch):
    lines = "/imagine x\n/image nowhere.png\n/draw\n" + "a" * 200 + "\n\n/help\nab\n/quit\nnever\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    converse(talk)
    heard = "".join(talk.heard)
    for words in ("there is no /imagine", "picture nowhere.png cannot be read", "/draw needs", "shorten the prompt"):
        assert words in heard
    assert "forget what was said" in heard and "never" not in heard and len(talk._said) == 2
    assert talk._texts.free == 1


def test_turns_of_a_conversation():
    parts = as_parts(
        [Message("system", ("be",)), Message("user", (PICTURE, "a")), Message("assistant", ("b", PICTURE))]
    )
    assert [(type(p).__name__, p.turn) for p in parts] == [
        ("Text", "user"), ("Picture", None), ("Text", None), ("Text", "assistant"), ("Picture", None),
    ]  # fmt: skip
    assert parts[1].role == "read" and parts[4].role == "draw" and parts[3].learn and not parts[2].learn
    assert as_parts([Message("user", ("a",))]) == (Text("a"),)


def test_an_upload_is_measured_before_it_is_decoded():
    np.testing.assert_array_equal(open_upload(png(PICTURE), "a", 64), PICTURE)
    with pytest.raises(UnreadablePicture, match="picture a is 8 x 8, above the limit of 6.3e-05 megapixels"):
        open_upload(png(PICTURE), "a", 63)
    with pytest.raises(UserError, match="cannot be read"):
        open_upload(b"nothing", "a", 64)


@pytest.mark.parametrize(
    "environment, kind",
    [
        (dict(TERM="xterm-kitty"), "kitty"),
        (dict(TERM="xterm-256color", TERM_PROGRAM="iTerm.app"), "iterm"),
        (dict(TERM="screen", LC_TERMINAL="iTerm2"), "iterm"),
        (dict(TERM="foot"), "sixel"),
        (dict(TERM="xterm-256color"), ""),
        ({}, ""),
    ],
)
def test_the_terminal_tells_what_it_takes(environment, kind):
    assert kind_of(environment) == kind


def test_pictures_arrive_in_kitty_and_iterm():
    big = PICTURE.repeat(32, axis=0).repeat(32, axis=1)
    shown = inline(PICTURE, "kitty")
    parts = re.findall(r"\x1b_G(.*?);(.*?)\x1b\\", shown)
    assert parts[0][0].startswith("a=T,f=100,") and [p[0][-3:] for p in parts] == ["m=1"] * (len(parts) - 1) + ["m=0"]
    assert all(len(p[1]) <= 4096 for p in parts) and "".join(f"\x1b_G{a};{b}\x1b\\" for a, b in parts) == shown
    found = re.fullmatch(r"\x1b\]1337;File=inline=1;size=(\d+);preserveAspectRatio=1:(.*)\a", inline(PICTURE, "iterm"))
    for data in ("".join(p[1] for p in parts), found[2]):
        np.testing.assert_array_equal(Image.open(io.BytesIO(base64.b64decode(data))), big)
    assert int(found[1]) == len(base64.b64decode(found[2]))


def test_pictures_arrive_in_sixel():
    """Read by a plain interpreter of the format: the colours are exact to a hundredth, as the format is."""
    shown = inline(PICTURE[:, :6], "sixel")
    body = re.fullmatch(r'\x1bPq"1;1;(\d+);(\d+)(.*)\x1b\\', shown, re.S)
    width, height = int(body[1]), int(body[2])
    canvas, palette, colour, x, top = np.zeros((height + 6, width, 3)), {}, None, 0, 0
    for token in re.findall(r"#\d+(?:;\d+)*|!\d+.|[$-]|.", body[3], re.S):
        if token[0] == "#":
            numbers = [*map(int, token[1:].split(";"))]
            colour = numbers[0]
            if len(numbers) > 1:
                palette[colour] = np.array(numbers[2:]) * 2.55
        elif token in "$-":
            x, top = 0, top + 6 * (token == "-")
        else:
            times, character = (int(token[1:-1]), token[-1]) if token[0] == "!" else (1, token)
            for bit in range(6):
                if (ord(character) - 63) >> bit & 1:
                    canvas[top + bit, x : x + times] = palette[colour]
            x += times
    expected = PICTURE[:, :6].repeat(height // 8, axis=0).repeat(width // 6, axis=1)
    assert np.abs(canvas[:height] - expected).max() < 2 and canvas[height:].sum() == 0
