"""SIGTERM, SIGINT and SIGHUP end a run at the next safe point."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class StopNow(BaseException):
    """A signal asked to stop; nothing of the step in progress counts. No `except Exception` of a library keeps it."""


class StopRequest:
    """Context in which the first signal sets `name`, and ends an `at_once` block; a second SIGINT interrupts."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._at_once = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            names = ("SIGTERM", "SIGINT", "SIGHUP")
            for number in [signal.Signals[name] for name in names if hasattr(signal, name)]:
                if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    @contextmanager
    def at_once(self, applies: bool = True) -> Iterator[None]:
        """Work that may be dropped in the middle: a signal that comes in this block, or came before, raises StopNow.

        Unless it is a collective of all ranks (`applies` is false), as those that have no signal take part in it.
        """
        self._at_once = applies
        try:
            if applies and self.name is not None:
                raise StopNow
            yield
        finally:
            self._at_once = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.name is None:
            self.name = signal.Signals(number).name
            if self._at_once:
                raise StopNow
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
