"""What the process of an engine does: it loads, computes what the server asks for, and replies."""

from __future__ import annotations

import gc
import logging
import os
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

from peftune import console
from peftune.device import device_name, is_out_of_memory
from peftune.errors import PeftuneError, first_line
from peftune.inference.bank import AdapterBank, AdapterInfo, LoadedAdapter
from peftune.inference.engine import Engine
from peftune.inference.request import Request, RequestHandle, RequestOutput
from peftune.inference.routing.route import Route
from peftune.model.base import Base
from peftune.serve.engines.channel import Channel
from peftune.serve.engines.messages import Assignment, Call, Loaded, Reply

_log = logging.getLogger(__name__)


def answer_calls(number: int, assignment: Assignment, next_call: Callable[[], Call], channel: Channel) -> None:
    """Load what is assigned and reply under that number, then answer calls; the process ends with its engine."""
    try:
        bank = _load(assignment)
        worker = EngineWorker(bank, assignment, channel)
    except Exception as error:
        channel.send(Reply(number, error=_portable(error)))
        channel.flush()
        os._exit(1)
    gc.collect()
    gc.freeze()
    adapters = tuple(_info(bank.get(name)) for name in bank.names)
    channel.send(Reply(number, Loaded(adapters, bank.precision, device_name(bank.spec.device))))
    while True:
        worker.answer(next_call())


def _load(assignment: Assignment) -> AdapterBank:
    console.verbosity = assignment.verbosity
    if assignment.gpu is None:
        torch.set_num_threads(assignment.threads)
    bank = AdapterBank(Base(*assignment.base), assignment.precision, "cpu" if assignment.gpu is None else "cuda")
    for name, directory in assignment.adapters:
        bank.add(name, directory, new_tokens=False)
    return bank


class EngineWorker:
    """Bank and engine behind a pipe; the methods that begin with `do_` are what the server calls."""

    def __init__(self, bank: AdapterBank, assignment: Assignment, channel: Channel) -> None:
        self._bank, self._channel = bank, channel
        self._engine = Engine(bank, assignment.slots, assignment.queue)
        self._texts: dict[int, RequestHandle] = {}
        self._routes: dict[int, Future[Route]] = {}
        self._submitting = threading.Lock()
        self._reader = ThreadPoolExecutor(1)
        self._read: LoadedAdapter | None = None
        self._engine.start()
        threading.Thread(target=self._end_with_engine, name="end", daemon=True).start()

    def answer(self, call: Call) -> None:
        """Do what is asked for, or begin it; an adapter is read while other calls are answered."""
        if call.method == "read":
            self._reader.submit(self._answer, call)
        else:
            self._answer(call)

    def _answer(self, call: Call) -> None:
        try:
            getattr(self, f"do_{call.method}")(call.number, *call.arguments)
        except Exception as error:
            self._reply(call.number, error=_portable(error))

    def do_submit(self, number: int, request: Request) -> None:
        """Every output is a reply."""
        with self._submitting:  # its first output may come before its handle
            self._texts[number] = self._engine.submit(request, partial(self._output, number))

    def do_route(self, number: int, ids: tuple[int, ...], names: tuple[str, ...], threshold: float | None) -> None:
        """One reply, unless it is cancelled."""
        self._routes[number] = self._engine.route(ids, names, threshold)
        self._routes[number].add_done_callback(partial(self._routed, number))

    def do_cancel(self, number: int) -> None:
        """Of a text or a route; one that has just ended is no more."""
        text, route = self._texts.get(number), self._routes.get(number)
        if text is not None:
            text.cancel()
        if route is not None:
            route.cancel()

    def do_read(self, number: int, name: str, directory: Path, replace: bool, new_tokens: bool) -> None:
        """Read an adapter that is to be put, or dropped, once all processes have read it."""
        self._read = self._bank.read(name, directory, replace, new_tokens)
        self._reply(number, _info(self._read))

    def do_put(self, number: int) -> None:
        """The name means what was read from here on."""
        assert self._read is not None, "an adapter was read"
        self._bank.put(self._read)
        self.do_drop(number)

    def do_drop(self, number: int) -> None:
        """Forget what was read."""
        self._read = None
        self._reply(number)

    def do_remove(self, number: int, name: str) -> None:
        """Unload an adapter."""
        self._bank.remove(name)
        self._reply(number)

    def do_stop(self, number: int, drain_seconds: float) -> None:
        """Let what is here end, then end the process."""
        threading.Thread(target=self._engine.stop, args=[drain_seconds], name="stop", daemon=True).start()

    def _output(self, number: int, output: RequestOutput) -> None:
        """In the engine's thread. What a failed engine cancels ends with the process, and the server says so."""
        if output.finish_reason is None:
            self._reply(number, output)
        elif not (self._engine.failed and output.finish_reason == "cancelled"):
            with self._submitting:
                handle = self._texts.pop(number)
            self._reply(number, output, started=handle.started)

    def _routed(self, number: int, future: Future[Route]) -> None:
        del self._routes[number]
        if not (future.cancelled() or self._engine.failed):
            error = future.exception()
            self._reply(number, None if error else future.result(), error=_portable(error) if error else None)

    def _reply(
        self, number: int, value: object = None, error: Exception | None = None, started: float | None = None
    ) -> None:
        goes_on = isinstance(value, RequestOutput) and value.finish_reason is None
        self._channel.send(Reply(number, value, error, started, None if goes_on else self._engine.load))

    def _end_with_engine(self) -> None:
        self._engine.join()
        self._channel.flush()
        os._exit(self._engine.failed)


def _info(adapter: LoadedAdapter) -> AdapterInfo:
    return AdapterInfo(adapter.name, adapter.directory, adapter.provenance, adapter.rank)


def _portable(error: BaseException) -> Exception:
    """The same for another process; what was not raised on purpose is logged here, where its traceback is."""
    if isinstance(error, PeftuneError):
        return error
    if is_out_of_memory(error):
        return MemoryError(first_line(error))
    _log.error("a call failed in an engine's process\n%s", "".join(traceback.format_exception(error)))
    return PeftuneError(f"{type(error).__name__}: {first_line(error)}")
