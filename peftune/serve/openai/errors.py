"""Error responses in the format of OpenAI's API."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from peftune.errors import PeftuneError

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


@dataclass(eq=False)
class ApiError(PeftuneError):
    """A status code with one line for the client, all of it printable; `param` names the field at fault."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] | None = None

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(self.message.split()))
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """The HTTP response, in ASCII: a lone surrogate quoted from the request cannot break it."""
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")


def queue_full(message: str, retry_after: float) -> ApiError:
    """429: as many requests are waiting as may."""
    return ApiError(429, message, code="queue_full", headers={"Retry-After": str(max(1, round(retry_after)))})


def draining() -> ApiError:
    """503: the server is about to stop."""
    return ApiError(503, "the server is stopping; try again later", code="draining", headers={"Retry-After": "5"})


def engine_failed() -> ApiError:
    """503: after an error there was no memory to go on with; only a new process helps."""
    return ApiError(503, "the engine has failed; the server must be started again", code="engine_failed")


def internal_error() -> ApiError:
    """500: a bug of ours; the log has the traceback, the client nothing of it."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")
