"""A progress line on stderr for what takes more than two seconds, and nothing where nobody watches."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

_PATIENCE = 2.0  # seconds


class Tell(Protocol):
    def __call__(self, documents: int, tokens: int) -> None: ...


@contextmanager
def progress(doing: str) -> Iterator[Tell]:
    """A function that shows counts so far, from the moment on that the work has taken two seconds."""
    with ExitStack() as stack:
        began = time.monotonic()
        shown: list[Tell] = []

        def tell(documents: int, tokens: int) -> None:
            if not shown and sys.stderr.isatty() and time.monotonic() - began > _PATIENCE:
                shown.append(_show(stack, doing))
            for show in shown:
                show(documents, tokens)

        yield tell


def _show(stack: ExitStack, doing: str) -> Tell:
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    bar = stack.enter_context(Progress(*columns, console=Console(stderr=True), transient=True))
    task = bar.add_task(doing, total=None)

    def show(documents: int, tokens: int) -> None:
        bar.update(task, description=f"{doing}: {documents:,} documents, {tokens:,} tokens")

    return show
