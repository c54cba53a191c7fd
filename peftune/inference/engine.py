"""Continuous batching: between two steps texts join the batch, get one token each, and leave it.

One step computes a part of the prompts that are to be read or routed, as much as fits into a pause of a twentieth of a
second, then one token of every other text. `Engine.step` is plain and synchronous; `start` runs it in a thread of its
own.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial

from peftune.errors import PeftuneError, UserError
from peftune.inference.detokenize import Detokenizer
from peftune.inference.fair_queue import FairQueue
from peftune.inference.pace import Pace, chunk_tokens
from peftune.inference.request import ModelProvider, OnOutput, Request, RequestHandle, slide
from peftune.inference.routing.route import THRESHOLD, Route, Routing, advance
from peftune.inference.running_batch import RunningBatch
from peftune.inference.sequence import RunningSequence
from peftune.inference.settings import FinishReason

_log = logging.getLogger(__name__)


class Busy(PeftuneError):
    """The queue is full, or the engine is stopping; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[Busy], tuple[str, float]]:
        return type(self), (str(self), self.retry_after)  # it may come from another process


class Stopping(Busy):
    """The engine takes nothing more: it is stopping, or it has failed."""


@dataclass(frozen=True)
class EngineLoad:
    """What an engine does now, and what it has done since it was made.

    `waiting` have no slot yet; those of them whose prompt is being routed first count as `routing` too.
    `seconds_a_text` is a moving average, of a text's time in its slot. `engines` are added up in these numbers.
    """

    running: int
    waiting: int
    routing: int
    slots: int
    prompt_tokens: int
    tokens_written: int
    steps: int
    seconds_a_text: float = 1.0
    engines: int = 1

    def refuse_when_full(self, queue: int) -> None:
        """Busy where as many wait as may, `queue`."""
        if self.waiting >= queue:
            turns = self.waiting / self.slots / 4  # until the queue will be shorter by a few
            raise Busy(f"{self.waiting} requests are waiting already", max(1.0, turns * self.seconds_a_text))


class Engine:
    """Up to `slots` texts at a time, up to `queue` more waiting.

    Memory is bounded by `slots` times the cache of a full context. On a CPU a seeded request gets the same text
    whatever else runs beside it; on a GPU but for near ties.
    """

    def __init__(self, models: ModelProvider, slots: int = 8, queue: int = 256) -> None:
        if slots < 1 or queue < 1:
            raise UserError(f"slots is {slots} and queue is {queue}, expected 1 or more of each")
        self._models, self._spec = models, models.spec
        self._positions, self._chunk = models.spec.config.n_positions, chunk_tokens(models.spec.device)
        self._queue = queue
        self._batch = RunningBatch(models, slots)
        self._waiting: FairQueue[RunningSequence] = FairQueue()
        self._routings: deque[tuple[Future[Route], Routing]] = deque()
        self._routing_pace, self._routes_next = Pace(self._chunk), True
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._stopped = False
        self._prompt_tokens = self._steps = 0
        self.failed = False

    def submit(self, request: Request, on_output: OnOutput) -> RequestHandle:
        """Put a request into the queue; `on_output` is called in the engine's thread.

        Raises Busy where the queue is full or the engine stops, UserError for an adapter that is not there, ids that
        the model does not know, and a prompt that leaves no position to write to.
        """
        variant = self._models.variant(request.adapter)
        tokenizer = self._models.tokenizer_of(request.adapter)
        request.check(variant.model.vocabulary, len(tokenizer), self._positions)
        handle = RequestHandle(request, on_output)
        output = Detokenizer(tokenizer, request.settings, request.ids)
        window = slide(list(request.ids), self._positions) if request.slide else list(request.ids)
        row = RunningSequence(handle, variant, output, window, self._chunk, len(tokenizer))
        with self._changed:
            self._refuse_when_full()
            self._waiting.push(request.adapter, row)
            self._changed.notify_all()
        return handle

    def route(
        self, ids: Sequence[int], names: Sequence[str] | None = None, threshold: float | None = THRESHOLD
    ) -> Future[Route]:
        """Which adapter a prompt is likeliest under; computed in parts, between the tokens of the texts that run.

        Cancelling the future drops it. Raises Busy as `submit` does, UserError as `routing.route.route` does; once the
        engine stops, what is not routed yet ends with Stopping.
        """
        future: Future[Route] = Future()
        routing = Routing(self._models, ids, names, threshold)
        with self._changed:
            self._refuse_when_full()
            self._routings.append((future, routing))
            self._changed.notify_all()
        return future

    @property
    def load(self) -> EngineLoad:
        """Running and waiting requests now; tokens and steps so far."""
        batch, routing = self._batch, len(self._routings)
        so_far = self._prompt_tokens, batch.tokens_written, self._steps, batch.seconds_a_text
        return EngineLoad(len(batch.rows), len(self._waiting) + routing, routing, batch.slots, *so_far)

    def step(self) -> bool:
        """Bring every running text one token further; False where nothing is left to do."""
        self._schedule()
        if not (self._batch.rows or self._routings):
            return False
        routes = bool(self._routings) and (self._routes_next or not self._batch.is_prefilling)
        self._routes_next = not routes  # prompts to be routed and prompts to be read take turns
        if routes:
            self._route_some()
        self._batch.step(prefill=not routes)
        self._steps += 1
        return self._has_work

    def start(self) -> None:
        """Step in a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let those that are here end for up to `drain_seconds`, cancel the rest."""
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        while time.monotonic() < until and self._has_work:
            time.sleep(0.02)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self.join()

    def join(self) -> None:
        """Wait until it takes no more steps: it was stopped, or it has failed."""
        assert self._thread is not None, "only an engine that was started ends"
        self._thread.join()

    @property
    def _has_work(self) -> bool:
        return bool(self._batch.rows or len(self._waiting) or self._routings)

    def _refuse_when_full(self) -> None:
        if self._closing:
            raise self._stopping()
        self.load.refuse_when_full(self._queue)

    def _stopping(self) -> Stopping:
        return Stopping("the engine has failed; start it again" if self.failed else "the engine is stopping", 5.0)

    def _run(self) -> None:
        """Step while there is work, until `stop`, or until an error after which nothing can be computed."""
        while self._wait_for_work():
            error = _attempt(self.step)
            if error is None:
                continue
            self._end(self._batch.rows, "error", f"{error} in the engine")  # a bug or no memory; others go on
            if _attempt(self._batch.reset):
                self.failed = True
                break
        with self._changed:
            self._closing = True
            left = [*self._batch.rows, *self._waiting.take(lambda _: True)]
            self._batch.rows.clear()
        self._end(left, "cancelled")
        self._drop_routings()

    def _wait_for_work(self) -> bool:
        """False once the engine is to stop."""
        with self._changed:
            while not (self._stopped or self._has_work):
                self._changed.wait()
            return not self._stopped

    def _end(self, rows: Sequence[RunningSequence], reason: FinishReason, error: str = "") -> None:
        """End texts, also where the listener of one fails."""
        for row in rows:
            if row.finish_reason is None:
                _attempt(partial(row.finish, reason, error))

    def _schedule(self) -> None:
        """Cancelled requests leave, waiting ones get the free slots."""
        with self._changed:
            dropped = self._waiting.take(lambda row: row.handle.cancelled)
            for routing in [routing for routing in self._routings if routing[0].cancelled()]:
                self._routings.remove(routing)
        for row in dropped:
            row.finish("cancelled")
        if self._closing:
            self._drop_routings()
        self._batch.drop_cancelled()
        with self._changed:
            while len(self._batch.rows) < self._batch.slots and len(self._waiting):
                row = self._waiting.pop()
                self._prompt_tokens += len(row.handle.request.ids)
                self._batch.admit(row)

    def _drop_routings(self) -> None:
        """Nothing could be generated any more with what they would tell."""
        while self._routings:
            future, _ = self._routings.popleft()
            if future.set_running_or_notify_cancel():
                future.set_exception(self._stopping())

    def _route_some(self) -> None:
        """Some forwards of the prompts that are routed, in turns."""
        left = most = self._routing_pace.tokens
        while self._routings and (left == most or self._routings[0][1].width <= left):
            future, routing = self._routings[0]
            error: Exception | None = None
            try:
                left -= advance(routing, self._routing_pace, left) if not routing.is_done else 1
            except Exception as raised:  # raised again where the result is awaited
                error = raised
            with self._changed:
                self._routings.popleft()
                if error is None and not routing.is_done:
                    self._routings.append((future, routing))
                    continue
            if future.set_running_or_notify_cancel():
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(routing.result())
            if error is not None and not isinstance(error, PeftuneError):
                self._batch.check_device()  # else all prompts that are routed would fail, and the engine seem well


def _attempt(what: Callable[[], object]) -> str | None:
    """Do it; where it fails, log that and return the error's name.

    Neither the log nor the caller gets the traceback itself: it would keep all tensors of the step alive.
    """
    try:
        what()
    except Exception as error:
        _log.error("a step of the engine failed\n%s", traceback.format_exc())
        return type(error).__name__
    return None
