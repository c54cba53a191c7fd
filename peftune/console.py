"""Messages and progress bars on stderr; results go to stdout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich import progress
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from peftune.errors import printable

_PROGRESS_DELAY = 2.0  # seconds; shorter work shows no bar


class SafeConsole(RichConsole):
    """Rich's console, on which no text of anybody's becomes a command to the terminal (`errors.printable`)."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is shown, piece by piece; Rich's own controls are pieces of another kind."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


class Console:
    """Messages and progress on stderr; bars only on a terminal; silent on every rank but the first."""

    def __init__(self, speaks: bool = True) -> None:
        self.console = SafeConsole(stderr=True, quiet=not speaks, highlight=False)
        self.progress = self._bar(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("[cyan]{task.fields[note]}"),
            progress.TimeRemainingColumn(),
        )

    def say(self, text: str) -> None:
        """One line for the person."""
        self.console.print(text, soft_wrap=True, markup=False)

    def stage(self, text: str) -> None:
        """A heading: what comes next."""
        self.console.print(Text(f"▸ {text}", style="bold cyan"), soft_wrap=True)

    @contextmanager
    def reading(self, description: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """A function that shows bytes read of `total` and counts so far, once the work has taken two seconds.

        Without a total (a source that is not a file) it shows the time elapsed.
        """
        columns: list[progress.ProgressColumn] = [progress.TimeElapsedColumn()]
        if total is not None:
            columns = [progress.BarColumn(24), progress.DownloadColumn(), progress.TransferSpeedColumn()]
            columns.append(progress.TimeRemainingColumn())
        bar = self._bar(progress.TextColumn("{task.description}"), *columns)
        task = bar.add_task(description, total=total)
        began = time.monotonic()

        def update(bytes_read: int, counts: str) -> None:
            if time.monotonic() - began > _PROGRESS_DELAY:
                bar.start()
            bar.update(task, completed=bytes_read, description=f"{description}: {counts}")

        try:
            yield update
        finally:
            bar.stop()

    def _bar(self, *columns: progress.ProgressColumn) -> progress.Progress:
        silent = self.console.quiet or not self.console.is_terminal
        return progress.Progress(*columns, console=self.console, disable=silent, transient=True)


def change(value: float, base: float) -> str:
    """How `value` compares with `base`: in percent, from ten times up as a factor."""
    ratio = value / base
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{100 * (ratio - 1):+.0f} %"
