"""A request's body: read within bounds of size and time, parsed as JSON, checked against a schema."""

from __future__ import annotations

import asyncio
import json
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from peftune.config.messages import validation_messages
from peftune.files import parse_json
from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.neutral import NeutralChatFields, OpenAIBaseModel, StreamOptions
from peftune.serve.openai.schema import ChatMessage
from peftune.serve.service import service_of

_CLOSE = {"Connection": "close"}  # the rest of the body is not read, so no request can follow it
_LINGER_BYTES = 8 << 20

_OBJECTS: dict[str, type[OpenAIBaseModel]] = {"messages": ChatMessage, "stream_options": StreamOptions}

Body = TypeVar("Body", bound=OpenAIBaseModel)


async def read_body(http: Request, schema: type[Body]) -> Body:
    """The request's body as `schema`; its model, where it names one, is noted for the metrics.

    Raises ApiError: 400 for what is no JSON object or what the schema refuses (at most ten problems, the first one as
    `param`), 408 where it does not arrive in time, 413 above the limit, with and without Content-Length, 415 for
    another type: a page of another origin can send a form unasked, JSON only if the server consents.
    """
    limit, seconds = service_of(http).settings.max_body, service_of(http).settings.body_seconds
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"Content-Type is {content_type or 'missing'}, expected application/json", headers=_CLOSE)
    try:
        raw = await asyncio.wait_for(_read(http, limit), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers=_CLOSE) from None
    value = _parse(raw)
    try:
        body = schema.model_validate(value)
    except ValidationError as error:
        loc = error.errors(include_url=False)[0]["loc"]
        messages = "; ".join(validation_messages(error, _known_fields(schema, error))[:10])
        messages = messages.replace("a section with keys of its own", "an object")
        raise ApiError(400, messages, str(loc[0])[:100] if loc else None) from None
    http.state.model = getattr(body, "model", None)
    return body


def _known_fields(schema: type[OpenAIBaseModel], error: ValidationError) -> dict[str, list[str]]:
    """The fields that have an effect, of the body and of each object in it that has an unknown one."""
    known = {"": _fields(schema)}
    for item in error.errors(include_url=False, include_input=False):
        path = [str(part) for part in item["loc"][:-1]]
        if path and path[0] in _OBJECTS and item["type"] == "extra_forbidden":
            known[".".join(path[:2])] = _fields(_OBJECTS[path[0]])
    return known


def _fields(schema: type[OpenAIBaseModel]) -> list[str]:
    neutral = NeutralChatFields.model_fields
    return [n for n, field in schema.model_fields.items() if field.annotation is not Any and n not in neutral]


async def _read(http: Request, limit: int) -> bytes:
    too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large", headers=_CLOSE)
    if "expect" in http.headers and int(http.headers.get("content-length", 0)) > limit:
        raise too_large  # the client waits for permission, and has sent nothing yet
    raw, seen = bytearray(), 0
    async for chunk in http.stream():
        seen += len(chunk)
        raw += chunk[: max(0, limit - len(raw))]
        if seen > limit + _LINGER_BYTES:  # until then it is read: a client still sending would lose the response
            break
    if seen > limit:
        raise too_large
    return bytes(raw)


def _parse(raw: bytes) -> dict[str, Any]:
    """A JSON object; Python's parser accepts lone surrogates."""
    try:
        value = parse_json(raw.decode("utf-8"))
        if b"\\u" in raw:  # only an escape can be a lone surrogate, UTF-8 has none
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON in UTF-8: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body holds {type(value).__name__}, expected an object")
    return value
