"""What all endpoints share while a server runs: the bank, its engine, the counters; and which model a name means."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request

from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Busy, Engine
from peftune.serve.metrics import Metrics
from peftune.serve.openai.errors import ApiError, draining
from peftune.serve.openai.token_text import TokenText
from peftune.serve.settings import ServeSettings

AUTO = "auto"
BASE = "base"


@dataclass(frozen=True)
class Chosen:
    """The model that answers: an adapter, or None for the base; `routing` tells how `auto` found it."""

    adapter: str | None
    shown: str
    routing: dict[str, Any] | None = None


@dataclass
class Service:
    """A server's state; only the event loop's thread changes it."""

    bank: AdapterBank
    engine: Engine
    settings: ServeSettings
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)

    def __post_init__(self) -> None:
        self.spelling = TokenText(self.bank.tokenizer)
        self._routes = 0

    @property
    def base(self) -> str:
        """The base's name as a model."""
        return self.bank.base.name

    def label(self, model: str | None) -> str:
        """A model as a label of metrics: one that is there now, or nothing."""
        return model if model is not None and (model == self.base or model in self.bank.names) else ""

    async def choose(self, model: str, ids: Sequence[Sequence[int]], among: Sequence[str] | None = None) -> Chosen:
        """The model of a request; `ids` are its prompts, for `auto`, which chooses `among` some adapters.

        Raises ApiError 404 for a name that nothing has: the base never stands in for it.
        """
        if model == AUTO:
            if len(ids) != 1:
                raise ApiError(400, f"model auto chooses for one prompt, found {len(ids)}; send one each", "prompt")
            return await self._route(ids[0], among)
        name = self.named(model)
        return Chosen(name, name or self.base)

    def named(self, model: str) -> str | None:
        """The adapter that a model's name means, None for the base; ApiError 404 where nothing has this name."""
        if model in (self.base, BASE):
            return None
        if model not in self.bank.names:
            raise ApiError(404, f"the model {model!a} does not exist", "model", "model_not_found")
        return model

    async def _route(self, ids: Sequence[int], among: Sequence[str] | None) -> Chosen:
        """`auto`; where only some adapters may answer, the best of them does: the base may not."""
        if self.draining:
            raise draining()
        if self._routes >= self.settings.queue:
            raise ApiError(429, "too many prompts wait to be routed", code="queue_full", headers={"Retry-After": "1"})
        names = tuple(self.bank.names if among is None else among)
        threshold = self.settings.routing_threshold if among is None else None
        self._routes += 1
        try:
            found = await asyncio.wrap_future(
                self.engine.route(tuple(ids), names, -math.inf if threshold is None else threshold)
            )
        except Busy:
            raise draining() from None
        except UserError as error:  # an adapter that went away meanwhile
            raise ApiError(409, str(error), "model") from None
        finally:
            self._routes -= 1
        shown = found.name if found.name is not None else self.base
        return Chosen(found.name, shown, {"model": shown, "scores": found.scores, "threshold": threshold})


def service_of(request: Request) -> Service:
    """The service that the application was built with."""
    service: Service = request.app.state.service
    return service


def is_inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a path without links lies below one of the roots (or is one)."""
    return any(path == root or root in path.parents for root in roots)
