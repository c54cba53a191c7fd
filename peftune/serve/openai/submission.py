"""The choices of one HTTP request in the engine: submitted together, told as they come, given up together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from peftune.errors import UserError
from peftune.inference.engine import Busy, Engine
from peftune.inference.request import Request, RequestHandle, RequestOutput
from peftune.serve.openai.errors import ApiError, full


class Work:
    """Requests in the engine; `close` gives up those that have not ended, and is to be called in any case.

    With `at_end` updates come once a choice has ended: waking the event loop for every token takes the engine's time.
    `first_token` is when the first token of all was written, on the monotonic clock.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], at_end: bool) -> None:
        self._engine, self._requests, self.at_end = engine, requests, at_end
        self._told: asyncio.Queue[tuple[int, list[RequestOutput]]] = asyncio.Queue()
        self._tickets: dict[int, RequestHandle] = {}
        self.first_token: float | None = None

    def submit(self) -> None:
        """All of them or none: ApiError 429 where the queue has no room for all, 400 for what the engine refuses."""
        loop = asyncio.get_running_loop()
        for index, request in enumerate(self._requests):
            try:
                self._tickets[index] = self._engine.submit(request, _Listener(self, index, loop).hear)
            except Busy as busy:
                self.close()
                raise full(busy.retry_after) from None
            except UserError as error:
                self.close()
                raise ApiError(400, str(error)) from None

    def tell(self, index: int, updates: list[RequestOutput]) -> None:
        """Updates of a choice have come; called in the event loop."""
        self._told.put_nowait((index, updates))

    async def updates(self, silence: float | None = None) -> AsyncIterator[tuple[int, RequestOutput] | None]:
        """(which, update) as the engine writes, until all have ended; None when nothing came for `silence` seconds.

        No more updates wait here than tokens were asked for, however slowly they are taken.
        """
        while self._tickets:
            try:
                index, updates = await asyncio.wait_for(self._told.get(), silence)
            except asyncio.TimeoutError:
                yield None
                continue
            if updates[-1].finish_reason is not None:
                self._tickets.pop(index, None)
            for update in updates:
                yield index, update

    def close(self) -> int:
        """Cancel what has not ended; how many these were."""
        given_up = len(self._tickets)
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()
        return given_up


class _Listener:
    """Hears of one choice in the engine's thread."""

    def __init__(self, work: Work, index: int, loop: asyncio.AbstractEventLoop) -> None:
        self._work, self._index, self._loop = work, index, loop
        self._heard: list[RequestOutput] = []

    def hear(self, update: RequestOutput) -> None:
        if update.ids and self._work.first_token is None:
            self._work.first_token = time.monotonic()
        self._heard.append(update)
        if update.finish_reason is not None or not self._work.at_end:
            self._loop.call_soon_threadsafe(self._work.tell, self._index, self._heard)
            self._heard = []
