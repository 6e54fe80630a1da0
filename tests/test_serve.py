"""The server as clients meet it: OpenAI's client, raw sockets, many at once, and everything that can be wrong."""

import base64
import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openai
import pytest
import tiny
import uvicorn
from PIL import Image

from pisces_jax.data.example import Picture, Text
from pisces_jax.data.images import png
from pisces_jax.inference.engine import Engine
from pisces_jax.inference.requests import Limits

ROOT = Path(__file__).resolve().parent.parent
LIMITS = Limits(upload=200_000, pixels=10_000, pictures=2, tokens=40, seconds=2.0)
DRAWING = dict(
    describe=False, max_tokens=8, temperature=1.0, guidance=None, steps=None, solver=None,
    vector_guidance=None, turn_ends=True
)  # fmt: skip


class Served:
    def __init__(self, model):
        from pisces_jax.inference.server import Server

        self.model, self.engine = model, Engine(model, rows=3, slots=128, queue=32)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        app = Server(self.engine, "letters", LIMITS, DRAWING).app()
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=120))
        self.thread = threading.Thread(target=self.uvicorn.run, args=([self.socket],), daemon=True)
        self.thread.start()
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", max_retries=0)
        while not self.uvicorn.started:
            time.sleep(0.01)

    def end(self):
        self.uvicorn.should_exit = True
        self.thread.join(130)

    def send(self, body, path="/v1/chat/completions", method="POST"):
        """(status, JSON or text of the answer) of a raw request."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, body if isinstance(body, bytes | None) else json.dumps(body))
            answer = connection.getresponse()
            content = answer.read().decode()
        return answer.status, json.loads(content) if content.startswith("{") else content


@pytest.fixture(scope="module")
def served():
    made = Served(tiny.ready_model())
    yield made
    made.end()


def data_url(image):
    return "data:image/png;base64," + base64.b64encode(png(image)).decode()


def asked(text, image=None, **how):
    content = text if image is None else [
        {"type": "image_url", "image_url": {"url": data_url(image)}}, {"type": "text", "text": text}
    ]  # fmt: skip
    return dict(model="letters", messages=[{"role": "user", "content": content}], **how)


PICTURE = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
QUESTIONS = [("abc", None), ("x", PICTURE), ("hello", None), ("pq", PICTURE[::-1]), ("longer" * 5, None), ("d", None)]


def parts_of(text, image):
    return (*([Picture(image, "read")] if image is not None else []), Text(text))


def test_many_at_once_get_what_the_command_gives_each(served):
    """More clients than rows, with settings of their own: rows are joined and left while others are written."""
    hows = [dict(max_tokens=20 + 3 * i) | (dict(temperature=2.0, seed=i) if i % 2 else {}) for i in range(6)]
    with ThreadPoolExecutor(12) as pool:
        answers = [
            pool.submit(served.client.chat.completions.create, **asked(*question, **how))
            for question, how in [*zip(QUESTIONS, hows, strict=True)] * 2
        ]
    for i, answer in enumerate(answers):
        question, how = QUESTIONS[i % 6], hows[i % 6]
        expected = served.model.answer(
            [parts_of(*question)], max_tokens=how["max_tokens"], temperature=how.get("temperature", 0.0),
            seeds=[how.get("seed", 0)],
        )  # fmt: skip
        made = answer.result()
        assert [made.choices[0].message.content] == expected
        assert made.choices[0].finish_reason in ("stop", "length") and made.model == "letters"
        assert made.usage.completion_tokens <= how["max_tokens"] and made.usage.prompt_tokens > 1


def test_a_stream_is_the_answer_in_pieces(served):
    whole = served.client.chat.completions.create(**asked("abc", max_tokens=30)).choices[0]
    pieces = list(
        served.client.chat.completions.create(
            **asked("abc", max_tokens=30), stream=True, stream_options={"include_usage": True}
        )
    )
    said = [piece.choices[0].delta.content or "" for piece in pieces if piece.choices]
    assert "".join(said) == whole.message.content and sum(map(bool, said)) > 1
    assert [p.choices[0].finish_reason for p in pieces if p.choices][-1] == whole.finish_reason
    assert pieces[-1].usage.completion_tokens == 30 or whole.finish_reason == "stop"


def test_stop_texts_number_and_conversation(served):
    free = served.client.chat.completions.create(**asked("abc", max_tokens=30)).choices[0].message.content
    stopped = served.client.chat.completions.create(**asked("abc", max_tokens=30, stop=[free[4:6]])).choices[0]
    assert stopped.message.content == free[: free.index(free[4:6])] and stopped.finish_reason == "stop"
    streamed = served.client.chat.completions.create(**asked("abc", max_tokens=30, stop=free[4:6]), stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in streamed) == stopped.message.content
    three = served.client.chat.completions.create(**asked("abc", n=3, temperature=3.0, seed=5)).choices
    alone = [served.client.chat.completions.create(**asked("abc", temperature=3.0, seed=5 + i)) for i in range(3)]
    assert [c.message.content for c in three] == [a.choices[0].message.content for a in alone]
    assert len({c.message.content for c in three}) > 1
    talk = [
        {"role": "system", "content": "be"}, {"role": "user", "content": "abc"},
        {"role": "assistant", "content": "no"}, {"role": "user", "content": "abc"},
    ]  # fmt: skip
    again = served.client.chat.completions.create(model="letters", messages=talk, max_tokens=30)
    assert again.choices[0].message.content != free


def test_pictures_are_drawn_together_and_each_as_alone(served):
    with ThreadPoolExecutor(4) as pool:
        made = [
            pool.submit(served.client.images.generate, model="letters", prompt=prompt, n=n, extra_body={"seed": seed})
            for prompt, n, seed in (("ab", 2, 4), ("cd", 1, 0), ("ab", 1, 5), ("ef", 2, 9))
        ]
    pictures = [[Image.open(io.BytesIO(base64.b64decode(one.b64_json))) for one in m.result().data] for m in made]
    assert [len(p) for p in pictures] == [2, 1, 1, 2] and pictures[0][0].size == (16, 16)
    for prompt, n, seed, own in (("ab", 2, 4, pictures[0]), ("cd", 1, 0, pictures[1]), ("ef", 2, 9, pictures[3])):
        expected = served.model.draw([(Text("draw" + prompt),)] * n, describe=False, seeds=[*range(seed, seed + n)])
        for drawing, picture in zip(expected, own, strict=True):
            np.testing.assert_allclose(drawing.image.astype(int), np.asarray(picture).astype(int), atol=1)
    url = served.send(dict(prompt="ab", response_format="url", seed=4), "/v1/images/generations")[1]["data"][0]["url"]
    assert url.startswith("data:image/png;base64,")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


HEADER = struct.pack(">IIBBBBB", 11_000, 11_000, 8, 2, 0, 0, 0)  # PIL itself refuses twice as many
BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", HEADER) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
WRONG = {
    "no JSON": (b"{", 400, "the body is no JSON"),
    "no object": (b"[1]", 400, "the body is no JSON object"),
    "deep": (b"[" * 50_000, 400, "the body is no JSON"),
    "not UTF-8": (b"\xff\xfe", 400, "the body is no JSON"),
    "large": (b'{"a": "' + b"x" * 300_000 + b'"}', 413, "larger than 0.190735 MiB"),
    "no messages": (dict(), 400, "messages is no list"),
    "another model": (asked("a") | dict(model="gpt"), 404, "there is no model 'gpt': this server has 'letters'"),
    "role": (dict(messages=[dict(role="robot", content="a")]), 400, "messages[0] has no role of"),
    "content": (dict(messages=[dict(role="user", content=3)]), 400, "is neither a text nor a list of parts"),
    "empty": (asked(" "), 400, "the last message has no text"),
    "last": (dict(messages=[dict(role="assistant", content="a")]), 400, "the last message is not the user's"),
    "part": (dict(messages=[dict(role="user", content=[dict(type="audio")])]), 400, "neither text nor image_url"),
    "surrogate": (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "half a character"),
    "temperature": (asked("a", temperature="hot"), 400, "temperature is 'hot': give a number"),
    "NaN": (b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}', 400, "temperature is 'nan'"),
    "top_p": (asked("a", top_p=0), 400, "top_p 0.0 is not above 0"),
    "n": (asked("a", n=99), 400, "n is '99': give a whole number from 1 to 8"),
    "max_tokens": (asked("a", max_tokens=41), 400, "a whole number from 1 to 40"),
    "seed": (asked("a", seed=-1), 400, "seed is '-1'"),
    "stop": (asked("a", stop=[1]), 400, "stop is neither a text nor"),
    "stream": (asked("a", stream="yes"), 400, "stream is 'yes': give true or false"),
    "long": (asked("a" * 120, max_tokens=40), 400, "shorten the prompt, or set max_tokens lower"),
    "long stream": (asked("a" * 120, stream=True), 400, "shorten the prompt"),
    "web picture": (
        dict(messages=[dict(role="user", content=[dict(type="image_url", image_url=dict(url="http://a/b.png"))])]),
        400, "is no data URL",
    ),
    "pixels": (asked("a", np.zeros((200, 100, 3), np.uint8)), 400, "100 x 200, above the limit of 0.01 megapixels"),
}  # fmt: skip


def with_picture(data):
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    part = dict(type="image_url", image_url=dict(url=url))
    return dict(messages=[dict(role="user", content=[part, dict(type="text", text="a")])])


WRONG |= {
    "bomb": (with_picture(BOMB), 400, "above the limit of 0.01 megapixels"),
    "cut off": (with_picture(png(PICTURE)[:-30]), 400, "cannot be read"),
    "no picture": (with_picture(b"hello"), 400, "cannot be read"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_requests_are_answered_in_a_sentence(served, name):
    body, status, words = WRONG[name]
    got, answer = served.send(body)
    assert got == status and words in answer["error"]["message"] and "\n" not in answer["error"]["message"]
    assert served.send(None, "/health", "GET") == (200, {"status": "ok", "model": "letters"})


@pytest.mark.parametrize(
    "body, words",
    [
        (dict(), "prompt is no text"),
        (dict(prompt=" "), "an empty one"),
        (dict(prompt="a", n=3), "from 1 to 2"),
        (dict(prompt="a", size="1024x1024"), "ask for 16x16"),
        (dict(prompt="a", response_format="gif"), "neither b64_json nor url"),
        (dict(prompt="a", vector_guidance=2), "this model's head is regression"),
    ],
)
def test_wrong_wishes_for_pictures(served, body, words):
    status, answer = served.send(body, "/v1/images/generations")
    assert status == 400 and words in answer["error"]["message"]


def test_paths_and_methods(served):
    assert served.send({}, "/v1/nothing")[0] == 404 and served.send(None, method="GET")[0] == 405
    assert served.client.models.list().data[0].id == "letters"


def test_metrics_count(served):
    def count(line):
        page = served.send(None, "/metrics", "GET")[1]
        return sum(float(row.split()[-1]) for row in page.splitlines() if row.startswith(line))

    line = 'pisces_requests_total{path="/v1/chat/completions",status="200"}'
    before, tokens = count(line), count("pisces_tokens_total")
    served.send(asked("ab", max_tokens=5))
    served.send({})
    assert count(line) == before + 1 and 0 < count("pisces_tokens_total") - tokens <= 5
    assert count('pisces_requests_total{path="/v1/chat/completions",status="400"}') > 0
    assert count("pisces_waiting") == 0 and count("pisces_request_seconds_count") > 0


def test_a_full_queue_says_busy(served, monkeypatch):
    monkeypatch.setattr(served.engine, "_most", 0)
    with pytest.raises(openai.InternalServerError, match="busy: 0 requests wait already") as error:
        served.client.chat.completions.create(**asked("a"))
    assert error.value.status_code == 503 and error.value.response.headers["retry-after"] == "1"


def test_a_request_that_fails_harms_no_other(served, monkeypatch):
    texts, draw = served.engine._texts, type(served.model).draw
    join, advance = texts.join, texts.advance
    expected = served.send(asked("abc"))[1]["choices"][0]["message"]["content"]

    def refuse(parts, how, seed):
        if parts[0].text == "bad":
            raise RuntimeError("a bug")
        return join(parts, how, seed)

    monkeypatch.setattr(texts, "join", refuse)
    with ThreadPoolExecutor(4) as pool:
        answers = [*pool.map(served.send, [asked(text) for text in ("abc", "bad", "abc", "bad")])]
    assert [status for status, _ in answers] == [200, 500, 200, 500] and "a bug" not in str(answers)
    assert {a["choices"][0]["message"]["content"] for s, a in answers if s == 200} == {expected}
    # A failure in the middle of the batch fails those that are in it, and no later one.
    monkeypatch.setattr(texts, "advance", lambda: 1 / 0)
    assert served.send(asked("abc"))[0] == 500
    monkeypatch.setattr(texts, "advance", advance)
    assert served.send(asked("abc"))[1]["choices"][0]["message"]["content"] == expected

    def spoilt(self, prompts, **how):
        if any("bad" in parts[0].text for parts in prompts):
            raise RuntimeError("a bug")
        return draw(self, prompts, **how)

    monkeypatch.setattr(type(served.model), "draw", spoilt)
    with ThreadPoolExecutor(4) as pool:
        wishes = [dict(prompt=p, seed=0) for p in ("ab", "bad", "cd")]
        statuses = [s for s, _ in pool.map(lambda wish: served.send(wish, "/v1/images/generations"), wishes)]
    assert statuses == [200, 500, 200]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_row(served, monkeypatch, stream):
    advance = served.engine._texts.advance
    monkeypatch.setattr(served.engine._texts, "advance", lambda: (time.sleep(0.1), advance())[1])
    body = json.dumps(asked("hello", max_tokens=40, stream=stream)).encode()
    with socket.create_connection(("127.0.0.1", served.port)) as raw:
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        while not served.engine.writing:
            time.sleep(0.005)
    until = time.monotonic() + 60
    while served.engine.writing and time.monotonic() < until:
        time.sleep(0.02)
    assert not served.engine.writing and served.engine._texts.free == 3
    with socket.create_connection(("127.0.0.1", served.port)) as raw:  # in the middle of its body
        raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n{")
    assert served.send(None, "/health", "GET")[0] == 200


def test_malformed_requests_leave_it_answering(served):
    rng = random.Random(0)
    good = json.dumps(asked("abc", PICTURE, max_tokens=1)).encode()
    values = [None, True, -1, 1e308, 10**30, "", "a", [], {}, [[]], "\u2028", {"type": "text"}]

    def malformed():
        kind = rng.randrange(4)
        if kind == 0:
            return rng.randbytes(rng.randrange(200))
        if kind == 1:
            return good[: rng.randrange(len(good))]
        if kind == 2:
            broken = bytearray(good)
            for _ in range(rng.randrange(1, 6)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            return bytes(broken)
        body = {
            k: rng.choice(values) for k in ("messages", "n", "stop", "seed", "stream", "top_p") if rng.random() < 0.7
        }
        return json.dumps({"messages": [{"role": "user", "content": rng.choice(values)}], **body}).encode()

    number = 10_000 if os.environ.get("PISCES_LONG_TESTS") else 300
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=120)
    statuses = set()
    for _ in range(number):
        connection.request("POST", rng.choice(["/v1/chat/completions", "/v1/images/generations"]), malformed())
        answer = connection.getresponse()
        answer.read()
        statuses.add(answer.status)
    connection.close()
    assert statuses <= {200, 400, 404} and 400 in statuses
    assert served.send(asked("abc", max_tokens=3))[0] == 200


def test_it_finishes_what_it_has_and_ends():
    made = Served(tiny.ready_model())
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(made.send, asked("abc", max_tokens=40)) for _ in range(5)]
        while len(made.uvicorn.server_state.connections) < 5:
            time.sleep(0.005)
        time.sleep(0.3)
        made.end()
    assert not made.thread.is_alive() and not made.engine._thread.is_alive()
    assert [answer.result()[0] for answer in answers] == [200] * 5


@pytest.mark.slow
def test_the_command_serves_the_example_of_the_docs_and_ends_at_sigterm(trained, tmp_path, monkeypatch):
    command = [sys.executable, "-m", "pisces_jax.serve", f"--workdir={trained}/run", "--port=0", "--rows=2"]
    process = subprocess.Popen(
        [*command, "--name=shapes"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        assert "shapes is at http://127.0.0.1:" in line, process.stderr.read()
        (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/inference.md").read_text(), re.S)
        monkeypatch.chdir(tmp_path)
        exec(example.replace("http://127.0.0.1:8000/v1", line.split()[3]), {})
        assert Image.open(tmp_path / "circle.png").size == (16, 16)
        process.send_signal(signal.SIGTERM)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 0 and "all requests were answered" in out, error
    finally:
        process.kill()
