"""What every request passes first: API key or Host header are checked, errors become responses, all is counted."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftune.serve.http.connection import MAX_HEAD_BYTES, head_too_large
from peftune.serve.http.static import PREFIX
from peftune.serve.openai.errors import ApiError, internal_error
from peftune.serve.service import Service

_log = logging.getLogger("peftune.serve")
_PREFIXES = ("/v1/models/", PREFIX)  # all paths below are one endpoint in the metrics
_PUBLIC = ("/", "/health", "/ping")  # without a key: a page without secrets, and what a load balancer asks


class GatewayMiddleware:
    """ASGI middleware: authorises, turns exceptions into error responses, counts requests and their duration.

    `endpoints` are the paths that metrics may name.
    """

    def __init__(self, app: ASGIApp, service: Service, endpoints: frozenset[str]) -> None:
        self._app, self._service, self._endpoints = app, service, endpoints

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request = Request(scope, receive)
        request.state.arrived = time.monotonic()
        try:
            check_head(scope)
            self._authorise(request)
            await self._app(scope, receive, send_and_note_status)
        except ClientDisconnect:
            status = 499
        except Exception as error:
            if not isinstance(error, ApiError):  # a bug: the log has the traceback, the client one line
                _log.exception("%s %s failed", request.method, ascii(request.url.path))
                error = internal_error()
            if not status:  # a response that has begun stays unfinished: uvicorn closes the connection
                await error.response()(scope, receive, send_and_note_status)
        finally:
            self._count(request, status or 499)

    def _authorise(self, request: Request) -> None:
        settings = self._service.settings
        if settings.api_key is None:
            host = request.headers.get("host")
            if host is not None:  # HTTP/1.0 may have none; a browser, whose page could be hostile, always sends it
                check_host(host, (settings.host, *settings.allowed_hosts))
        elif request.url.path not in _PUBLIC and not request.url.path.startswith(PREFIX):
            check_key(request.headers.get("authorization", ""), settings.api_key)
        if request.method == "POST":
            self._service.refuse_when_down()

    def _count(self, request: Request, status: int) -> None:
        path, metrics = request.url.path, self._service.metrics
        known = path if path in self._endpoints else "other"
        endpoint = next((prefix for prefix in _PREFIXES if path.startswith(prefix)), known)
        model = self._service.metrics_label(getattr(request.state, "model", None))
        metrics.requests.labels(endpoint, model, status).inc()
        metrics.duration.labels(endpoint).observe(time.monotonic() - request.state.arrived)


def check_head(scope: Scope) -> None:
    """ApiError 431 for a head that came at once and is larger than one that came in parts may be."""
    fields = sum(len(name) + len(value) + 4 for name, value in scope["headers"])  # with colon, space, line end
    if len(scope["raw_path"]) + len(scope["query_string"]) + fields > MAX_HEAD_BYTES:
        raise ApiError(431, head_too_large(), headers={"Connection": "close"})


def check_key(header: str, key: str) -> None:
    """ApiError 401 unless the header is `Bearer KEY`; a nearly right key takes as long as any other."""
    scheme, _, sent = header.partition(" ")
    equal = hmac.compare_digest(sent.strip().encode("utf-8", "surrogateescape"), key.encode())
    if scheme.lower() != "bearer" or not equal:
        message = "a wrong API key" if header else "no API key; send it as Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def check_host(host: str, allowed: tuple[str, ...]) -> None:
    """ApiError 403 for a name that anybody may point at this machine (DNS rebinding): a web page could then read all.

    An address, localhost and the operator's own names pass.
    """
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name.lower() not in ("localhost", *(other.lower() for other in allowed)):
            raise ApiError(
                403, f"this server is not known as {name!a}; its operator can allow this host, or set an API key"
            ) from None


def on_http_exception(request: Request, error: Exception) -> Response:
    """The router's 404 and 405 in OpenAI's format."""
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:200]}: {error.detail}"
    return ApiError(error.status_code, message, headers=error.headers).response()
