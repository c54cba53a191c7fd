"""A progress line on stderr for what takes more than two seconds, and nothing where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

_PATIENCE = 2.0  # seconds


class Tell(Protocol):
    def __call__(self, bytes_read: int, counts: str) -> None: ...


@contextmanager
def progress(doing: str, total: int | None) -> Iterator[Tell]:
    """A function that shows bytes read of `total` and counts so far, once the work has taken two seconds."""
    with ExitStack() as stack:
        began = time.monotonic()
        shown: list[Tell] = []

        def tell(bytes_read: int, counts: str) -> None:
            if not shown and sys.stderr.isatty() and time.monotonic() - began > _PATIENCE:
                shown.append(_show(stack, doing, total))
            for show in shown:
                show(bytes_read, counts)

        yield tell


def _show(stack: ExitStack, doing: str, total: int | None) -> Tell:
    from rich import progress as rich
    from rich.console import Console

    columns: list[rich.ProgressColumn] = [rich.TextColumn("{task.description}"), rich.TimeElapsedColumn()]
    if total is not None:
        columns[1:] = [
            rich.BarColumn(24),
            rich.DownloadColumn(),
            rich.TransferSpeedColumn(),
            rich.TimeRemainingColumn(),
        ]
    bar = stack.enter_context(rich.Progress(*columns, console=Console(stderr=True), transient=True))
    task = bar.add_task(doing, total=total)

    def show(bytes_read: int, counts: str) -> None:
        bar.update(task, completed=bytes_read, description=f"{doing}: {counts}")

    return show
