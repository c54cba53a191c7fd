"""What all endpoints share while a server runs: the bank, its engine, the metrics; and which model a name means."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.requests import Request

from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Busy, Engine
from peftune.serve.metrics import Metrics
from peftune.serve.openai.errors import ApiError, draining, queue_full
from peftune.serve.openai.token_text import TokenText
from peftune.serve.settings import ServeSettings

AUTO = "auto"
BASE = "base"


@dataclass
class Service:
    """A server's state; only the event loop's thread changes it."""

    bank: AdapterBank
    engine: Engine
    settings: ServeSettings
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.token_text = TokenText(self.bank.tokenizer)
        self.metrics = Metrics(self.bank, self.engine)
        self._routing = 0  # prompts that are being routed

    def metrics_label(self, model: str | None) -> str:
        """The model as a label of metrics: the base or an adapter that is loaded, else empty."""
        return model if model is not None and model in (self.bank.base.name, *self.bank.names) else ""

    async def resolve(
        self, model: str, ids: Sequence[Sequence[int]], candidates: Sequence[str] | None = None
    ) -> tuple[str | None, dict[str, Any]]:
        """The adapter that answers a request (None: the base), and what `auto` adds to the response.

        `ids` are the request's prompts, for `auto`, which chooses among the `candidates`.
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
        if self._routing >= self.settings.queue:
            raise queue_full("too many prompts wait to be routed", 1)
        names = tuple(self.bank.names if candidates is None else candidates)
        threshold = self.settings.routing_threshold if candidates is None else None
        self._routing += 1
        try:
            route = await asyncio.wrap_future(
                self.engine.route(tuple(ids), names, -math.inf if threshold is None else threshold)
            )
        except Busy:
            raise draining() from None
        except UserError as error:  # an adapter that was unloaded meanwhile
            raise ApiError(409, str(error), "model") from None
        finally:
            self._routing -= 1
        routing = {"model": route.name or self.bank.base.name, "scores": route.scores, "threshold": threshold}
        return route.name, {"routing": routing}


def service_of(request: Request) -> Service:
    """The service that the application was built with."""
    return cast(Service, request.app.state.service)
