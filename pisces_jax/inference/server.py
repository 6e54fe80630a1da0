"""A model behind HTTP, in the forms of OpenAI's API: chat completions with pictures, and pictures of prompts.

A request is checked here, in the event loop and its threads; the model's work is done by the engine. Whatever a client
sends gets an answer in one sentence with the right status, and harms no other client.
"""

import asyncio
import base64
import contextlib
import dataclasses
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import prometheus_client
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from pisces_jax.data.example import Text
from pisces_jax.data.images import png
from pisces_jax.data.instructions import draw_instruction
from pisces_jax.inference import requests as asked
from pisces_jax.inference.engine import Busy, Engine, Job, Progress
from pisces_jax.inference.requests import Limits, Refused
from pisces_jax.utils.errors import UserError, cut

Handler = Callable[[Request], Awaitable[Response]]


class _Gone(Exception):
    """The client has hung up."""


class Metrics:
    """What `/metrics` shows, in Prometheus' form."""

    def __init__(self, engine: Engine) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        how: Any = {"namespace": "pisces", "registry": self.registry}
        self.requests = prometheus_client.Counter("requests", "requests that were answered", ("path", "status"), **how)
        self.seconds = prometheus_client.Histogram(
            "request_seconds", "until an answer, or its first piece, was there", ("path",),
            buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120), **how,
        )  # fmt: skip
        self.tokens = prometheus_client.Counter("tokens", "tokens that were written", **how)
        self.pictures = prometheus_client.Counter("pictures", "pictures that were drawn", **how)
        for name, help_, value in (
            ("waiting", "requests that wait", lambda: engine.waiting),
            ("writing", "texts that are being written", lambda: engine.writing),
        ):
            prometheus_client.Gauge(name, help_, **how).set_function(value)


@dataclasses.dataclass
class Server:
    """The endpoints of one model, which clients call `name`.

    Attributes:
        drawing: how `Model.draw` draws unless a request says otherwise.
    """

    engine: Engine
    name: str
    limits: Limits
    drawing: Mapping[str, Any]

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.engine)

    def app(self) -> Starlette:
        """The ASGI application; when it ends, the engine finishes what it has."""

        @contextlib.asynccontextmanager
        async def life(app: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.engine.close)

        def post(path: str, handler: Handler) -> Route:
            return Route(path, self._answered(path, handler), methods=["POST"])

        async def health(request: Request) -> Response:
            return JSONResponse({"status": "ok", "model": self.name})

        async def metrics(request: Request) -> Response:
            page = prometheus_client.generate_latest(self.metrics.registry)
            return Response(page, media_type=prometheus_client.CONTENT_TYPE_LATEST)

        async def models(request: Request) -> Response:
            return JSONResponse({"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "you"}]})

        async def refused(request: Request, error: Any) -> Response:
            words = {404: f"there is nothing at {cut(request.url.path, 100)}", 405: f"{request.method} is not for here"}
            return _error(error.status_code, words.get(error.status_code, str(error.detail)))

        return Starlette(
            routes=[
                Route("/health", health), Route("/metrics", metrics), Route("/v1/models", models),
                post("/v1/chat/completions", self.chat), post("/v1/images/generations", self.images),
            ],
            exception_handlers={404: refused, 405: refused},
            lifespan=life,
        )  # fmt: skip

    def _answered(self, path: str, handler: Handler) -> Handler:
        """The handler with its exceptions as answers, counted."""

        async def answer(request: Request) -> Response:
            began = time.perf_counter()
            try:
                response = await handler(request)
            except (Refused, UserError, Busy) as error:
                response = _refusal(error)
            except (ClientDisconnect, _Gone):
                response = Response(status_code=499)  # nobody reads it
            except Exception as error:
                logging.getLogger(__name__).error("a request failed", exc_info=error)
                response = _refusal(error)
            self.metrics.requests.labels(path, response.status_code).inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - began)
            return response

        return answer

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        body = await asked.read_body(request, self.limits)
        asked.check_model(body, self.name)
        wanted = await asyncio.to_thread(asked.chat, body, self.limits)
        jobs = [Job(wanted.parts, wanted.how, [seed], print) for seed in wanted.seeds]
        events = self._events(request, jobs)
        first = await anext(events)  # what is wrong with the prompt shows here
        about = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}
        if wanted.stream:
            pieces = self._pieces(first, events, {**about, "object": "chat.completion.chunk"}, wanted.usage)
            return StreamingResponse(pieces, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        last: dict[int, Progress] = {first[0]: first[1]}
        async for number, progress in events:
            last[number] = progress
        choices = [
            {
                "index": i, "finish_reason": last[i].ended, "logprobs": None,
                "message": {"role": "assistant", "content": last[i].text, "refusal": None},
            }
            for i in range(len(jobs))
        ]  # fmt: skip
        usage = self._usage(last)
        return JSONResponse({**about, "object": "chat.completion", "choices": choices, "usage": usage})

    async def _pieces(self, first: Any, events: Any, about: dict[str, Any], usage: bool) -> AsyncIterator[str]:
        """The lines of a stream of server-sent events."""
        said: dict[int, Progress] = {}

        def piece(number: int, delta: dict[str, str], ended: str = "") -> str:
            choice = {"index": number, "delta": delta, "finish_reason": ended or None, "logprobs": None}
            return _event({**about, "choices": [choice]})

        async def all_events() -> AsyncIterator[Any]:
            yield first
            async for event in events:
                yield event

        try:
            async for number, progress in all_events():
                if number not in said:
                    yield piece(number, {"role": "assistant", "content": ""})
                before = said[number].text if number in said else ""
                said[number] = progress
                if new := progress.text[len(before) :]:
                    yield piece(number, {"content": new})
                if progress.ended:
                    yield piece(number, {}, progress.ended)
            usage_of_all = self._usage(said)
            if usage:
                yield _event({**about, "choices": [], "usage": usage_of_all})
            yield "data: [DONE]\n\n"
        except _Gone:
            return
        except Exception as error:  # the status was sent long ago
            yield _event(json.loads(bytes(_refusal(error).body)))
        finally:
            await events.aclose()

    def _usage(self, last: Mapping[int, Progress]) -> dict[str, int]:
        written, prompt = sum(p.tokens for p in last.values()), max(p.prompt_tokens for p in last.values())
        self.metrics.tokens.inc(written)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}

    async def images(self, request: Request) -> Response:
        """POST /v1/images/generations."""
        body = await asked.read_body(request, self.limits)
        asked.check_model(body, self.name)
        if not self.engine.model.picture_size:
            raise Refused(400, "this model has no decoder to draw with: ask it questions")
        wanted = asked.images(body, self.limits, self.engine.model.picture_size, self.drawing)
        form = self.engine.model.config.sampling.instruction
        job = Job((Text(draw_instruction(wanted.prompt, form)),), wanted.how, wanted.seeds, print)
        data = []
        async for _, drawings in self._events(request, [job]):
            self.metrics.pictures.inc(len(drawings))
            for drawing in drawings:
                picture = base64.b64encode(png(drawing.image)).decode()
                one = {"url": f"data:image/png;base64,{picture}"} if wanted.url else {"b64_json": picture}
                data.append({**one, "revised_prompt": drawing.description or wanted.prompt})
        return JSONResponse({"created": int(time.time()), "data": data, "output_format": "png"})

    async def _events(self, request: Request, jobs: list[Job]) -> AsyncIterator[tuple[int, Any]]:
        """What the engine tells of the jobs, with the job's number, until all have ended.

        Raises:
            Busy: the queue is full; then none of the jobs is done.
            _Gone: the client has hung up; then the jobs are dropped.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()

        def telling(number: int) -> Callable[[Any], None]:
            def tell(what: Any) -> None:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(queue.put_nowait, (number, what))

            return tell

        async def hangs_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        left, gone = len(jobs), asyncio.create_task(hangs_up())
        told: asyncio.Task[tuple[int, Any]] | None = None
        try:
            for number, job in enumerate(jobs):
                job.tell = telling(number)
                self.engine.submit(job)
            while left:
                told = asyncio.create_task(queue.get())
                await asyncio.wait({told, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not told.done():
                    raise _Gone
                number, what = told.result()
                if isinstance(what, Exception):
                    raise what
                left -= not isinstance(what, Progress) or bool(what.ended)
                yield number, what
        finally:
            for task in (told, gone):
                if task is not None:
                    task.cancel()
            for job in jobs:
                job.gone = True


def _event(what: dict[str, Any]) -> str:
    return f"data: {json.dumps(what)}\n\n"


def _refusal(error: Exception) -> Response:
    if isinstance(error, Refused):
        return _error(error.status, str(error), error.code)
    if isinstance(error, UserError):
        return _error(400, str(error))
    if isinstance(error, Busy):
        return _error(503, f"busy: {error}", "busy", {"Retry-After": "1"})
    return _error(500, "the server failed at this request: its log says why", "internal")


def _error(status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None) -> Response:
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status, headers)
