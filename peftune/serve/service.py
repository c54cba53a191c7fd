"""What all endpoints share while a server runs: the bank, its engine, the metrics; and which model a name means."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from starlette.requests import ClientDisconnect, Request

from peftune.errors import UserError
from peftune.inference.engine import Busy, Stopping
from peftune.inference.token_text import TokenText
from peftune.serve.backend import ServedModels, TextEngine
from peftune.serve.engines.messages import EngineLost
from peftune.serve.metrics import Metrics
from peftune.serve.openai.errors import ApiError, draining, engine_failed, internal_error, queue_full
from peftune.serve.settings import ServeSettings

_log = logging.getLogger("peftune.serve")
AUTO = "auto"
BASE = "base"
Result = TypeVar("Result")


@dataclass
class Service:
    """A server's state; only the event loop's thread changes it. `computing` says in what and on what."""

    bank: ServedModels
    engine: TextEngine
    settings: ServeSettings
    computing: str = ""
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.token_text = TokenText(self.bank.tokenizer)
        self.metrics = Metrics(self.bank, self.engine)

    def refuse_when_down(self) -> None:
        """ApiError 503 where nothing would be answered any more: the server is stopping, or its engine has failed."""
        if self.draining or self.engine.failed:
            raise self.down()

    def down(self) -> ApiError:
        """Why nothing is answered any more."""
        return engine_failed() if self.engine.failed else draining()

    def metrics_label(self, model: str | None) -> str:
        """The model as a label of metrics: the base or an adapter that is loaded, else empty."""
        return model if model is not None and model in (self.bank.base.name, *self.bank.names) else ""

    async def resolve(
        self, model: str, ids: Sequence[Sequence[int]], candidates: Sequence[str] | None = None
    ) -> tuple[str | None, dict[str, Any]]:
        """The adapter that answers a request (None: the base), and what `auto` adds to the response.

        `ids` are the request's prompts, for `auto`, which chooses among the `candidates`. Cancelling drops its work.
        Raises ApiError 404 for an unknown name: the base never stands in for it.
        """
        if model == AUTO:
            if len(ids) != 1:
                raise ApiError(400, f"model auto chooses for one prompt, found {len(ids)}; send one each", "prompt")
            return await self._route(ids[0], candidates)
        return self.adapter_named(model), {}

    def adapter_named(self, model: str) -> str | None:
        """The adapter that a model's name means, None for the base; ApiError 404 for an unknown name."""
        if model in (self.bank.base.name, BASE):
            return None
        if model not in self.bank.names:
            raise ApiError(404, f"the model {model!a} does not exist", "model", "model_not_found")
        return model

    async def _route(self, ids: Sequence[int], candidates: Sequence[str] | None) -> tuple[str | None, dict[str, Any]]:
        """`auto`; with `candidates` the best of them answers, without a threshold: the base may not."""
        names = tuple(self.bank.names if candidates is None else candidates)
        threshold = self.settings.routing_threshold if candidates is None else None
        began = time.monotonic()
        try:
            route = await asyncio.wrap_future(self.engine.route(tuple(ids), names, threshold))
        except Stopping:
            raise self.down() from None
        except EngineLost as error:
            _log.error("a prompt could not be routed: %s", error)
            raise internal_error() from None
        except Busy as error:
            raise queue_full("the server's queue is full; try again later", error.retry_after) from None
        except UserError as error:  # an adapter that was unloaded meanwhile
            raise ApiError(409, str(error), "model") from None
        model = route.name or self.bank.base.name
        self.metrics.routed.labels(model).inc()
        self.metrics.routing.observe(time.monotonic() - began)
        routing = {"model": model, "adapter": route.name, "margin": route.margin, "threshold": threshold}
        reason = "the likeliest adapter" if route.name is not None else "none of the adapters"
        return route.name, {"routing": routing | {"reason": reason, "scores": route.scores, "tokens": route.tokens}}


async def while_connected(http: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns; it is cancelled, and ClientDisconnect raised, once the client has left."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def service_of(request: Request) -> Service:
    """The service that the application was built with."""
    return cast(Service, request.app.state.service)
