"""The process of an engine as the server sees it: what it was asked for, and what becomes of that when it ends."""

from __future__ import annotations

import atexit
import itertools
import logging
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import resource_tracker
from typing import Any

from peftune.inference.engine import EngineLoad
from peftune.inference.request import RequestHandle, RequestOutput
from peftune.inference.routing.route import Route
from peftune.serve.engines.channel import Channel
from peftune.serve.engines.child import run
from peftune.serve.engines.messages import Assignment, Call, EngineLost, Loaded, Reply

_log = logging.getLogger(__name__)
_CONTEXT = multiprocessing.get_context("spawn")  # a fork would share what CUDA and threads do not survive
_SIGNALS = {number: f"signal {number}" for number in range(1, 65)} | {s.value: s.name for s in signal.Signals}
_PATIENCE = 10.0  # seconds for a process that has closed its pipe to be gone


class EngineProcess:
    """One engine; `texts` and `routes` are what it has not answered yet. `on_end` gets how it ended, once."""

    def __init__(self, name: str, assignment: Assignment, on_end: Callable[[str], object]) -> None:
        self._on_end, self._slots = on_end, assignment.slots
        self._numbers, self._lock = itertools.count(), threading.Lock()
        self.texts: dict[int, RequestHandle] = {}
        self.routes: set[Future[Route]] = set()
        self._calls: dict[int, Future[Any]] = {}
        self._told: EngineLoad | None = None
        self.alive = True
        here, there = _CONTEXT.Pipe()
        self._process = _CONTEXT.Process(target=run, args=[there], name=name, daemon=True)
        atexit.register(self._process.kill)  # multiprocessing would ask it to end, which it ignores, and wait
        with _signals_blocked():
            self._process.start()
        there.close()
        self._channel = Channel(here, self._answered, self._ended)
        self.started: Future[Loaded] = self.call("start", assignment)

    @property
    def unfinished(self) -> int:
        """Texts and routes that it has to answer."""
        return len(self.texts) + len(self.routes)

    @property
    def load(self) -> EngineLoad:
        """What it has to do now; what it has done, as of the last text that ended."""
        told = self._told or EngineLoad(0, 0, 0, self._slots, 0, 0, 0)
        if not self.alive:
            return replace(told, running=0, waiting=0, routing=0, slots=0, engines=0)
        texts, routing = len(self.texts), len(self.routes)
        running = min(texts, self._slots)
        return replace(told, running=running, waiting=texts - running + routing, routing=routing)

    def submit(self, handle: RequestHandle) -> None:
        """Have it write a text; EngineLost where it has ended."""
        settings = replace(handle.request.settings, seed=handle.seed)
        number = self._ask(self.texts, handle, "submit", replace(handle.request, settings=settings))
        handle.on_cancel = lambda: self._channel.send(Call(number, "cancel"))

    def route(self, ids: Sequence[int], names: Sequence[str] | None, threshold: float | None) -> Future[Route]:
        """Have it route a prompt; EngineLost where it has ended."""
        future: Future[Route] = Future()
        number = self._ask(self._calls, future, "route", ids, names, threshold)
        self.routes.add(future)
        future.add_done_callback(lambda _: self._routed(number, future))
        return future

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Another method of `EngineWorker`; the future has EngineLost where the process has ended."""
        future: Future[Any] = Future()
        try:
            self._ask(self._calls, future, method, *arguments)
        except EngineLost as error:
            future.set_exception(error)
        return future

    def stop(self, drain_seconds: float) -> None:
        """Have it end, once what it has to answer is answered or so long has passed."""
        self._channel.send(Call(next(self._numbers), "stop", (drain_seconds,)))

    def wait(self, seconds: float) -> None:
        """Until the process has ended and all its answers have come; it is killed after so long."""
        if not self._channel.join(seconds):
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._channel.join(_PATIENCE)

    def _ask(self, table: dict[int, Any], answer: RequestHandle | Future[Any], method: str, *arguments: Any) -> int:
        with self._lock:
            if not self.alive:
                raise EngineLost(f"{self._process.name} has ended")
            number = next(self._numbers)
            table[number] = answer
        self._channel.send(Call(number, method, arguments))
        return number

    def _routed(self, number: int, future: Future[Route]) -> None:
        self.routes.discard(future)
        if future.cancelled():
            self._calls.pop(number, None)
            self._channel.send(Call(number, "cancel"))

    def _answered(self, reply: Reply) -> None:
        """In the thread that reads the pipe."""
        self._told = reply.load or self._told
        handle = self.texts.get(reply.number)
        if handle is None:
            _settle(self._calls.pop(reply.number, None), reply.value, reply.error)
            return
        output = reply.value
        if reply.error is not None:
            output = RequestOutput(finish_reason="error", error=str(reply.error))
        if output.finish_reason is not None:
            del self.texts[reply.number]
            handle.started = reply.started
        _tell(handle, output)

    def _ended(self) -> None:
        with self._lock:
            self.alive = False
        self._process.join(_PATIENCE)
        atexit.unregister(self._process.kill)
        code = self._process.exitcode or 0
        how = f"{self._process.name} " + (f"was killed by {_SIGNALS[-code]}" if code < 0 else f"ended with code {code}")
        self._on_end(how)
        texts, calls = self.texts.copy(), self._calls.copy()
        self.texts.clear()
        self._calls.clear()
        for handle in texts.values():
            _tell(handle, RequestOutput(finish_reason="error", error=how))
        for future in calls.values():
            _settle(future, None, EngineLost(how))


def _tell(handle: RequestHandle, output: RequestOutput) -> None:
    """A listener that fails takes nobody else down."""
    try:
        handle.on_output(output)
    except Exception:
        _log.exception("a listener of an engine failed")


def _settle(future: Future[Any] | None, value: object, error: Exception | None) -> None:
    if future is None or not future.set_running_or_notify_cancel():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(value)


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """What starts meanwhile is born deaf to Ctrl-C, and needs no time to become so; ours wait for the end of this."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # multiprocessing would start it, and unblock these, in the midst
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
