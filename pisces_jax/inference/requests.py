"""Bodies of requests in OpenAI's forms, checked: what is wrong with one is said in a sentence."""

import asyncio
import base64
import binascii
import dataclasses
import json
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from pisces_jax.data.example import Part
from pisces_jax.inference.conversation import Message, as_parts, open_upload
from pisces_jax.inference.sampling import TextSampling
from pisces_jax.utils.errors import cut


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may hold: bytes of its body, pixels of a picture, pictures that it sends or wants, tokens of an
    answer; and the seconds in which its body must come."""

    upload: int = 20 * 2**20
    pixels: int = 32_000_000
    pictures: int = 16
    tokens: int = 1024
    seconds: float = 60.0


class Refused(Exception):
    """A request that is not served: the status, a sentence, and OpenAI's code for it, if there is one."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclasses.dataclass(frozen=True)
class Chat:
    """A text that is wanted after `parts`, once for each seed."""

    parts: tuple[Part, ...]
    how: TextSampling
    seeds: Sequence[int]
    stream: bool
    usage: bool


@dataclasses.dataclass(frozen=True)
class Images:
    """Pictures of a prompt, one for each seed."""

    prompt: str
    how: Mapping[str, Any]
    seeds: Sequence[int]
    url: bool


async def read_body(request: Any, limits: Limits) -> dict[str, Any]:
    """The JSON object that a request holds.

    Raises:
        Refused: it is too large, too slow, or no JSON object.
    """
    content = bytearray()
    try:
        async with asyncio.timeout(limits.seconds):
            async for chunk in request.stream():
                content += chunk
                if len(content) > limits.upload:
                    raise Refused(413, f"the body is larger than {limits.upload / 2**20:g} MiB: send less")
    except TimeoutError:
        raise Refused(408, f"the body did not come within {limits.seconds:g} seconds: send it again") from None
    try:
        body = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is no JSON ({cut(error, 100)}): send a JSON object") from None
    if not isinstance(body, dict):
        raise Refused(400, "the body is no JSON object: send one, with { and }")
    return body


def check_model(body: Mapping[str, Any], name: str) -> None:
    """
    Raises:
        Refused: the request is for another model. One that names none is for this.
    """
    if body.get("model") not in (None, name):
        raise Refused(
            404, f"there is no model {cut(body['model'], 100)!r}: this server has {name!r}", "model_not_found"
        )


def chat(body: Mapping[str, Any], limits: Limits) -> Chat:
    """The body of a chat completion; pictures are decoded.

    Raises:
        Refused: it is not of OpenAI's form, or above the limits.
        UserError: a picture cannot be read, or a setting is out of its range.
    """
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages is no list of messages: send at least one")
    pictures: list[str] = []
    said = [_message(message, i, pictures, limits) for i, message in enumerate(messages)]
    if said[-1].role != "user":
        raise Refused(400, "the last message is not the user's: end with what is asked")
    if not any(isinstance(part, str) and part.strip() for part in said[-1].content):
        raise Refused(400, "the last message has no text: ask something")
    n, seed = _whole(body, "n", 1, 1, 8), _seed(body)
    stop = body.get("stop") or ()
    stop = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stop, list | tuple) or len(stop) > 4 or not all(isinstance(text, str) for text in stop):
        raise Refused(400, "stop is neither a text nor up to four texts: give one of these")
    longest = min(256, limits.tokens)
    most = _whole(
        body, "max_tokens", _whole(body, "max_completion_tokens", longest, 1, limits.tokens), 1, limits.tokens
    )
    how = TextSampling(
        most, _number(body, "temperature", 0.0), _whole(body, "top_k", 0, 0, 2**31 - 1), _number(body, "top_p", 1.0),
        _number(body, "repetition_penalty", 1.0), tuple(stop),
    )  # fmt: skip
    options = body.get("stream_options")
    usage = isinstance(options, dict) and options.get("include_usage") is True
    return Chat(as_parts(said), how, [(seed + i) % 2**31 for i in range(n)], _flag(body, "stream", False), usage)


def images(body: Mapping[str, Any], limits: Limits, size: int, drawing: Mapping[str, Any]) -> Images:
    """The body of a wish for pictures.

    Args:
        size: side of the pictures that the model draws.
        drawing: how they are drawn unless the request says otherwise.

    Raises:
        Refused: it is not of OpenAI's form, or above the limits.
    """
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise Refused(400, "prompt is no text, or an empty one: say what to draw")
    own = f"{size}x{size}"
    if body.get("size") not in (None, "auto", own):
        raise Refused(400, f"size {cut(body['size'], 40)!r} is not the model's: leave it out, or ask for {own}")
    if (form := body.get("response_format")) not in (None, "b64_json", "url"):
        raise Refused(400, f"response_format {cut(form, 40)!r} is neither b64_json nor url: take one of these")
    how = {**drawing, "describe": _flag(body, "describe", drawing["describe"])}
    for name in ("temperature", "guidance", "vector_guidance"):
        how[name] = _number(body, name, how[name])
    n, seed = _whole(body, "n", 1, 1, limits.pictures), _seed(body)
    prompt = " ".join(_sound(prompt).split())
    return Images(prompt, how, [(seed + i) % 2**31 for i in range(n)], form == "url")


def _message(message: Any, number: int, pictures: list[str], limits: Limits) -> Message:
    where = f"messages[{number}]"
    roles = {"developer": "system", "system": "system", "user": "user", "assistant": "assistant"}
    if not isinstance(message, dict) or not isinstance(message.get("role"), str) or message["role"] not in roles:
        raise Refused(400, f"{where} has no role of {', '.join(roles)}: give it one")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refused(400, f"{where}.content is neither a text nor a list of parts: give one of these")
    said: list[Any] = []
    for part in parts:
        part = part if isinstance(part, dict) else {}
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            said += [_sound(part["text"])] if part["text"] else []
        elif kind == "image_url":
            pictures.append(where)
            if len(pictures) > limits.pictures:
                raise Refused(400, f"there are more than {limits.pictures} pictures: send fewer")
            said.append(open_upload(_data_of(part.get("image_url"), where), f"in {where}", limits.pixels))
        else:
            raise Refused(400, f"{where} has a part that is neither text nor image_url: send these alone")
    return Message(roles[message["role"]], tuple(said))  # type: ignore[arg-type]


def _data_of(image: Any, where: str) -> bytes:
    """The bytes of a data URL. Pictures are not fetched: a server that fetched would reach what its clients cannot."""
    url = image.get("url") if isinstance(image, dict) else image
    url = url if isinstance(url, str) else ""
    found = re.match(r"data:[\w/+.-]*(?:;[\w=.-]+)*;base64,", url)
    if not found:
        raise Refused(400, f"a picture in {where} is no data URL: send it as data:image/png;base64,...")
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (ValueError, binascii.Error):
        raise Refused(400, f"a picture in {where} is no base64: encode it again") from None


def _sound(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refused(400, "a text holds half a character (a lone surrogate): repair it") from None
    return text


def _number(body: Mapping[str, Any], name: str, default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    try:
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0:
            return float(value)
    except OverflowError:
        pass
    raise Refused(400, f"{name} is {cut(value, 40)!r}: give a number of at least 0")


def _whole(body: Mapping[str, Any], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise Refused(400, f"{name} is {cut(value, 40)!r}: give a whole number from {least} to {most}")
    return value


def _seed(body: Mapping[str, Any]) -> int:
    """Of the request; without one it is drawn."""
    return _whole(body, "seed", secrets.randbelow(2**31), 0, 2**31 - 1)


def _flag(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} is {cut(value, 40)!r}: give true or false")
    return default if value is None else value
