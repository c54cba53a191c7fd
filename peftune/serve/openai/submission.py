"""The choices of one HTTP request in the engine: submitted together, cancelled together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence

from peftune.errors import UserError
from peftune.inference.engine import Busy, Engine
from peftune.inference.request import OnOutput, Request, RequestHandle, RequestOutput
from peftune.serve.openai.errors import ApiError, queue_full


class Submission:
    """Requests in the engine; `close` cancels those that have not finished, and must be called in any case.

    With `at_end` the outputs of a choice arrive when it has finished: waking the event loop for every token takes time
    from the engine. `first_token` is when the first token of all was generated, on the monotonic clock.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], at_end: bool) -> None:
        self._engine, self._requests, self._at_end = engine, requests, at_end
        self._outputs: asyncio.Queue[tuple[int, list[RequestOutput]]] = asyncio.Queue()
        self._handles: dict[int, RequestHandle] = {}
        self.first_token: float | None = None

    def submit(self) -> None:
        """All or none: ApiError 429 where the queue has no room for all, 400 for what the engine refuses."""
        loop = asyncio.get_running_loop()
        try:
            for index, request in enumerate(self._requests):
                self._handles[index] = self._engine.submit(request, self._forward(index, loop))
        except Busy as busy:
            self.close()
            raise queue_full("the server's queue is full; try again later", busy.retry_after) from None
        except UserError as error:
            self.close()
            raise ApiError(400, str(error)) from None

    async def outputs(self, timeout: float | None = None) -> AsyncIterator[tuple[int, RequestOutput] | None]:
        """(index of the choice, output) until all have finished; None when nothing came for `timeout` seconds.

        However slowly they are taken, no more outputs wait here than tokens were asked for.
        """
        while self._handles:
            try:
                index, outputs = await asyncio.wait_for(self._outputs.get(), timeout)
            except asyncio.TimeoutError:
                yield None
                continue
            if outputs[-1].finish_reason is not None:
                self._handles.pop(index, None)
            for output in outputs:
                yield index, output

    def close(self) -> int:
        """Cancel what has not finished; how many these were."""
        unfinished = len(self._handles)
        for handle in self._handles.values():
            handle.cancel()
        self._handles.clear()
        return unfinished

    def _forward(self, index: int, loop: asyncio.AbstractEventLoop) -> OnOutput:
        """What the engine calls, in its own thread, with the outputs of a choice."""
        pending: list[RequestOutput] = []

        def on_output(output: RequestOutput) -> None:
            if output.ids and self.first_token is None:
                self.first_token = time.monotonic()
            pending.append(output)
            if output.finish_reason is not None or not self._at_end:
                loop.call_soon_threadsafe(self._outputs.put_nowait, (index, pending.copy()))
                pending.clear()

        return on_output
