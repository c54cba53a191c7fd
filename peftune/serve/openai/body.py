"""A request's body: read within bounds of size and time, parsed as strict JSON."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any, NoReturn

from starlette.requests import Request

from peftune.serve.openai.errors import ApiError
from peftune.serve.openai.schema import B, validate
from peftune.serve.service import service_of

_CLOSE = {"Connection": "close"}  # the rest of the body is not read, so no request can follow it
_LINGER_BYTES = 8 << 20


async def read_body(http: Request, schema: type[B]) -> B:
    """The request's body as `schema`; its model, where it names one, is noted for the metrics.

    Raises ApiError: 400 for what the schema refuses, and as `read_json`.
    """
    settings = service_of(http).settings
    body = validate(schema, await read_json(http, settings.max_body, settings.body_seconds))
    http.state.model = getattr(body, "model", None)
    return body


async def read_json(request: Request, limit: int, seconds: float) -> dict[str, Any]:
    """The JSON object in the body.

    Raises ApiError: 400 for what is not UTF-8 or not strict JSON (NaN, a lone surrogate, a name given twice), 408
    where it does not arrive within `seconds`, 413 above `limit` bytes, with and without Content-Length, 415 for
    another type: a page of another origin can send a form unasked, JSON only if the server consents.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {kind or 'missing'}, expected application/json", headers=_CLOSE)
    too_large = ApiError(413, f"the body has more than {limit} bytes", code="body_too_large", headers=_CLOSE)
    if "expect" in request.headers and int(request.headers.get("content-length", 0)) > limit:
        raise too_large  # the client waits for permission, and has sent nothing yet
    try:
        raw = await asyncio.wait_for(_read(request, limit), seconds)
    except asyncio.TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds", headers=_CLOSE) from None
    if raw is None:
        raise too_large
    return parse(bytes(raw))


def parse(raw: bytes) -> dict[str, Any]:
    """Strict JSON: by itself Python's parser accepts NaN, lone surrogates, and the last of two equal names."""
    try:
        value = json.loads(
            raw.decode("utf-8"), parse_constant=_refuse_constant, parse_float=_finite, object_pairs_hook=_unique_names
        )
        if b"\\u" in raw:  # only an escape can be a lone surrogate, UTF-8 has none
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise ApiError(400, r"the body holds half a character (a lone surrogate such as \ud800)") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at line {error.lineno} column {error.colno}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON that can be read: {ascii(str(error))[1:-1][:200]}") from None
    if not isinstance(value, dict):
        raise ApiError(400, f"the body holds {type(value).__name__}, expected an object")
    return value


async def _read(request: Request, limit: int) -> bytearray | None:
    """The body, or None above `limit`. A little more is read then: a client still sending would lose the response."""
    raw, seen = bytearray(), 0
    async for chunk in request.stream():
        seen += len(chunk)
        if seen <= limit:
            raw += chunk
        elif seen > limit + _LINGER_BYTES:
            break
    return raw if seen <= limit else None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"{text[:20]} is too large")
    return value


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique: dict[str, Any] = {}
    for name, value in pairs:
        if name in unique:
            raise ValueError(f"{name} is given twice")
        unique[name] = value
    return unique
