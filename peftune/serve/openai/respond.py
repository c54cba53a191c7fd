"""The way of a request: choices into the engine, chunks out of it, as one JSON object or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from peftune.errors import UserError
from peftune.inference.engine import Busy
from peftune.inference.request import OnOutput, RequestHandle, RequestOutput
from peftune.inference.request import Request as EngineRequest
from peftune.serve.openai.chunks import ChoiceFormatter, Chunk, join
from peftune.serve.openai.errors import ApiError, internal_error, queue_full
from peftune.serve.openai.prompts import Prompt, max_new_tokens
from peftune.serve.openai.schema import SamplingRequest
from peftune.serve.service import service_of, while_connected

_log = logging.getLogger("peftune.serve")
_KEEP_ALIVE_SECONDS = 15.0  # of silence, after which a stream sends a comment so that no proxy closes it


@dataclass(frozen=True)
class ResponseFormat:
    """How an endpoint's response looks: the object's name, in full and in a stream, and a choice in each.

    A choice gets its index and its chunk; `more` is what the object of a full response has besides, from its first
    choice. A text that begins with `lead` loses it.
    """

    object: str
    chunk_object: str
    id_prefix: str
    choice: Callable[[int, Chunk], dict[str, Any]]
    stream_choice: Callable[[int, Chunk], dict[str, Any]]
    more: Callable[[Chunk], dict[str, Any]] = lambda _: {}
    lead: str = ""


@dataclass
class PendingResponse:
    """A completion to be generated: every prompt is continued `n` times with the model that the body names.

    `max_tokens` None leaves it to `default_max_tokens`, or to what fits into the model's positions. `logprobs` is how
    many of the likeliest tokens to name. `candidates` are the adapters among which the model `auto` chooses.
    `warnings` are lines for the client.
    """

    http: Request
    body: SamplingRequest
    prompts: Sequence[Prompt]
    format: ResponseFormat
    max_tokens: int | None
    default_max_tokens: int = 1 << 31
    logprobs: int | None = None
    echo: bool = False
    stop: tuple[str, ...] = ()
    candidates: Sequence[str] | None = None
    warnings: Sequence[str] = ()

    def __post_init__(self) -> None:
        self._service = service_of(self.http)
        self._outputs: asyncio.Queue[tuple[int, list[RequestOutput]]] = asyncio.Queue()
        self._unfinished: dict[int, RequestHandle] = {}
        self._metadata: dict[str, Any] = {"warnings": list(self.warnings)} if self.warnings else {}
        self._first_token: float | None = None  # when the first token of all was generated, on the monotonic clock
        self._prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)  # each prompt once, whatever `n` is

    async def generate(self) -> ASGIApp:
        """One JSON object, or server-sent events.

        Raises ApiError for a prompt that does not fit, an unknown model, and where the engine's queue is full.
        """
        n_positions, token_text = self._service.bank.config.n_positions, self._service.token_text
        limits = [max_new_tokens(p, self.max_tokens, self.default_max_tokens, n_positions) for p in self.prompts]
        try:
            settings = [self.body.settings(limit, n, self.stop) for limit in limits for n in range(self.body.n)]
        except UserError as error:
            raise _refused(error) from None
        input_ids = [prompt.input_ids for prompt in self.prompts]
        resolving = self._service.resolve(self.body.model, input_ids, self.candidates)
        adapter, routing = await while_connected(self.http, resolving)
        self._metadata |= routing
        self._model = self.http.state.model = adapter or self._service.bank.base.name
        asked = [count for count in (self.logprobs, self.body.prompt_logprobs) if count is not None]
        scores_prompt = self.echo or self.body.prompt_logprobs is not None
        requests: list[EngineRequest] = []
        self._formatters: list[ChoiceFormatter] = []
        for number, chosen in enumerate(settings):
            prompt, limit = self.prompts[number // self.body.n], limits[number // self.body.n]
            choice = prompt.input_ids, adapter, chosen, max(asked, default=None), scores_prompt
            requests.append(EngineRequest(*choice, only_score=limit == 0))
            wanted = self.format.lead, self.logprobs, self.body.prompt_logprobs
            self._formatters.append(ChoiceFormatter(token_text, prompt.text, prompt.ids, self.echo, *wanted))
        self._submit(requests)
        return self._stream if self.body.stream else await self._full()

    def _submit(self, requests: Sequence[EngineRequest]) -> None:
        """All or none: ApiError 429 where the queue has no room for all, 400 for what the engine refuses."""
        self._service.refuse_when_down()
        self._service.adapter_named(self._model)  # it may have been unloaded since it was resolved
        try:
            for index, request in enumerate(requests):
                self._unfinished[index] = self._service.engine.submit(request, self._forward(index))
        except (Busy, UserError) as error:
            for handle in self._unfinished.values():
                handle.cancel()
            if isinstance(error, Busy):
                raise queue_full("the server's queue is full; try again later", error.retry_after) from None
            raise _refused(error) from None
        self._service.metrics.prompt_tokens.labels(self._label).inc(self._prompt_tokens)

    def _forward(self, index: int) -> OnOutput:
        """What the engine calls, in its own thread, with the outputs of a choice.

        Without a stream they are forwarded at the end: waking the event loop for every token takes time from the
        engine. However slowly they are taken, no more outputs wait than tokens were asked for.
        """
        loop = asyncio.get_running_loop()
        inter_token = self._service.metrics.inter_token.labels(self._label)
        pending: list[RequestOutput] = []
        last: float | None = None

        def on_output(output: RequestOutput) -> None:
            nonlocal last
            if output.ids:
                now = time.monotonic()
                self._first_token = self._first_token or now
                if last is not None:
                    inter_token.observe(now - last)
                last = now
            pending.append(output)
            if output.finish_reason is not None or self.body.stream:
                loop.call_soon_threadsafe(self._outputs.put_nowait, (index, pending.copy()))
                pending.clear()

        return on_output

    def _close(self) -> None:
        """Cancel what has not finished."""
        metrics = self._service.metrics
        for handle in self._unfinished.values():
            handle.cancel()
            metrics.cancelled.labels(self._label).inc()
        self._unfinished.clear()
        if self._first_token is not None:
            seconds = self._first_token - self.http.state.arrived
            metrics.first_token.labels(self.http.url.path, self._label).observe(seconds)

    async def _chunks(self, timeout: float | None) -> AsyncIterator[tuple[int, Chunk]]:
        """(index of the choice, chunk) until all have finished; an empty chunk after `timeout` seconds of silence.

        Raises ApiError where the engine gave a choice up.
        """
        while self._unfinished:
            try:
                index, outputs = await asyncio.wait_for(self._outputs.get(), timeout)
            except asyncio.TimeoutError:
                yield 0, Chunk()
                continue
            if outputs[-1].finish_reason is not None and (handle := self._unfinished.pop(index, None)) is not None:
                waited = (handle.started or time.monotonic()) - handle.submitted
                self._service.metrics.queue_time.labels(self._label).observe(waited)
            for output in outputs:
                self._service.metrics.generation_tokens.labels(self._label).inc(len(output.ids))
                if output.finish_reason == "error":
                    _log.error("the engine gave a request up: %s", output.error)
                    raise internal_error()
                if output.finish_reason == "cancelled":  # not by us: we would not be listening
                    raise self._service.down()
                yield index, self._formatters[index].format(output)

    async def _full(self) -> Response:
        """One JSON object; generation stops once the client has disconnected."""
        try:
            joined = await while_connected(self.http, self._joined())
        finally:
            self._close()
        choices = [self.format.choice(index, chunk) for index, chunk in enumerate(joined)]
        usage = self._usage(sum(len(chunk.ids) for chunk in joined))
        more = self.format.more(joined[0]) | self._metadata
        return JSONResponse(self._object(self.format.object, choices) | more | {"usage": usage})

    async def _joined(self) -> list[Chunk]:
        chunks: list[list[Chunk]] = [[] for _ in self._formatters]
        async for index, chunk in self._chunks(timeout=None):
            chunks[index].append(chunk)
        return [join(of_choice) for of_choice in chunks]

    async def _stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Server-sent events, as an ASGI application.

        Not sse-starlette: it replaces `uvicorn.Server.handle_exit` for the whole process, ends streams at SIGTERM,
        pings in the midst of a busy stream, and takes 6 to 13 µs an event where this takes 1.
        """
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx must not buffer
        try:
            response = StreamingResponse(self._events(), headers=headers, media_type="text/event-stream")
            await response(scope, receive, send)
        finally:
            self._close()

    async def _events(self) -> AsyncIterator[bytes]:
        event = self._object(self.format.chunk_object, [])
        include_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        usage: dict[str, Any] = {"usage": None} if include_usage else {}
        metadata, completion_tokens = self._metadata, 0
        try:
            async for index, chunk in self._chunks(_KEEP_ALIVE_SECONDS):
                completion_tokens += len(chunk.ids)
                if chunk.is_empty:
                    yield b": waiting\n\n"
                    continue
                yield _encode(event | {"choices": [self.format.stream_choice(index, chunk)]} | usage | metadata)
                metadata = {}  # only in the first event
        except ApiError as error:
            yield _encode(error.body)
            return
        if include_usage:
            yield _encode(event | {"usage": self._usage(completion_tokens)})
        yield b"data: [DONE]\n\n"

    @property
    def _label(self) -> str:
        return self._service.metrics_label(self._model)

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        id = f"{self.format.id_prefix}-{secrets.token_hex(12)}"
        return {"id": id, "object": name, "created": int(time.time()), "model": self._model, "choices": choices}

    def _usage(self, completion_tokens: int) -> dict[str, int]:
        total = self._prompt_tokens + completion_tokens
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}


def _refused(error: UserError) -> ApiError:
    """400 for settings that do not go together, or that the engine refuses."""
    message = str(error).removeprefix("generation settings: ").replace("min_new_tokens", "min_tokens")
    field = message.split()[0].rstrip(":")
    return ApiError(400, message, field if field in SamplingRequest.model_fields else None)


def _encode(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
