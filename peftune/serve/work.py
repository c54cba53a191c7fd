"""The choices of one HTTP request in the engine: submitted together, told as they come, given up together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from peftune.errors import UserError
from peftune.inference.engine import Busy, Engine
from peftune.inference.request import Request, Ticket, Update
from peftune.serve.refusal import Refusal, full


class Work:
    """Requests in the engine; `close` gives up those that have not ended, and is to be called in any case."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self._engine, self._requests = engine, requests
        self._updates: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._tickets: dict[int, Ticket] = {}

    def submit(self) -> None:
        """All of them or none: Refusal 429 where the queue has no room for all, 400 for what the engine refuses."""
        loop = asyncio.get_running_loop()
        for index, request in enumerate(self._requests):

            def tell(update: Update, index: int = index) -> None:
                loop.call_soon_threadsafe(self._updates.put_nowait, (index, update))

            try:
                self._tickets[index] = self._engine.submit(request, tell)
            except Busy as busy:
                self.close()
                raise full(busy.retry_after) from None
            except UserError as error:
                self.close()
                raise Refusal(400, str(error)) from None

    async def updates(self, silence: float | None = None) -> AsyncIterator[tuple[int, Update] | None]:
        """(which, update) as the engine writes, until all have ended; None when nothing came for `silence` seconds.

        No more updates wait here than tokens were asked for, however slowly they are taken.
        """
        while self._tickets:
            try:
                index, update = await asyncio.wait_for(self._updates.get(), silence)
            except asyncio.TimeoutError:
                yield None
                continue
            if update.finish_reason is not None:
                self._tickets.pop(index, None)
            yield index, update

    def close(self) -> int:
        """Cancel what has not ended; how many these were."""
        given_up = len(self._tickets)
        for ticket in self._tickets.values():
            ticket.cancel()
        self._tickets.clear()
        return given_up
