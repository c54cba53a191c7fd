"""What stands before every endpoint: who may ask, under which name, and how the answer is counted."""

from __future__ import annotations

import hmac
import ipaddress
import logging
import time

from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from peftune.serve.http.static import PREFIX
from peftune.serve.openai.errors import ApiError, broken, draining
from peftune.serve.service import Service

_log = logging.getLogger("peftune.serve")
_FOLDERS = ("/v1/models/", PREFIX)
_OPEN = ("/", "/health")  # without a key: a page without secrets, and a load balancer's question
_ENDPOINTS = frozenset(
    {
        "/", "/health", "/metrics", "/v1/completions", "/v1/chat/completions", "/v1/models", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)  # fmt: skip


class Guard:
    """ASGI middleware: refuses or lets through, turns what is raised into an answer, counts."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        request = Request(scope, receive)
        try:
            await self._answer(request, watched)
        except ClientDisconnect:
            status = 499
        except ApiError as refusal:
            await _refuse(refusal, bool(status), request, watched)
        except Exception:  # a bug: the log has all of it, the client one line
            _log.exception("%s %s failed", request.method, ascii(request.url.path))
            await _refuse(broken(), bool(status), request, watched)
        finally:
            self._count(request, status or 499, time.monotonic() - began)

    async def _answer(self, request: Request, send: Send) -> None:
        settings = self._service.settings
        if settings.api_key is None:
            check_host(request.headers.get("host", ""), (settings.host, *settings.allowed_hosts))
        elif request.url.path not in _OPEN and not request.url.path.startswith(PREFIX):
            check_key(request.headers.get("authorization", ""), settings.api_key)
        if self._service.draining and request.method == "POST":
            raise draining()
        await self._app(request.scope, request.receive, send)

    def _count(self, request: Request, status: int, seconds: float) -> None:
        path, metrics = request.url.path, self._service.metrics
        known = path if path in _ENDPOINTS else next((part for part in _FOLDERS if path.startswith(part)), "other")
        model = self._service.label(getattr(request.state, "model", None))
        metrics.requests.add(1, known, model, str(status))
        metrics.duration.observe(seconds, known)


def check_key(header: str, key: str) -> None:
    """ApiError 401 unless the header is `Bearer KEY`; takes as long for a key that is nearly right."""
    scheme, _, sent = header.partition(" ")
    equal = hmac.compare_digest(sent.strip().encode("utf-8", "surrogateescape"), key.encode())
    if scheme.lower() != "bearer" or not equal:
        told = "a wrong API key" if header else "no API key; send it as Authorization: Bearer KEY"
        raise ApiError(401, told, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def check_host(host: str, allowed: tuple[str, ...]) -> None:
    """ApiError 403 for a name that anybody may point at this machine (DNS rebinding): a web page could then read all.

    An address, localhost and the operator's own names pass.
    """
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        if name.lower() not in ("localhost", *(one.lower() for one in allowed)):
            raise ApiError(
                403, f"this server is not known as {name!a}; start it with --allowed-host, or with a key"
            ) from None


async def _refuse(refusal: ApiError, started: bool, request: Request, send: Send) -> None:
    """The refusal as the answer; one that has begun already stays unfinished: uvicorn closes the connection."""
    if not started:
        await refusal.response()(request.scope, request.receive, send)


async def on_http_exception(request: Request, error: Exception) -> object:
    """The router's 404 and 405 in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    told = {404: "there is no such path here", 405: f"{request.method} is not allowed here"}
    return ApiError(error.status_code, told.get(error.status_code, error.detail), headers=error.headers).response()
