"""Messages and progress bars on stderr; results go to stdout."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal

from rich import progress
from rich.cells import cell_len, set_cell_size
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from peftune.errors import printable

Verbosity = Literal["quiet", "normal", "verbose"]
verbosity: Verbosity = "normal"
"""How much is said; decided once, by the command line, before any `Console` is made."""

_PROGRESS_DELAY = 2.0  # seconds; shorter work shows no bar
_LINE_EVERY = 30.0  # seconds between lines where there is no terminal
_LOOKS_BACK = 600.0  # seconds over which the time left is estimated


class SafeConsole(RichConsole):
    """Rich's console, on which no text of anybody's becomes a command to the terminal (`errors.printable`)."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is shown, piece by piece; Rich's own controls are pieces of another kind."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


class _LineProgress(progress.Progress):
    """Where there is no terminal, a line every half minute instead of a bar; it comes when a task advances."""

    def __init__(self, console: RichConsole, clock: Callable[[], float]) -> None:
        super().__init__(console=console, disable=True, get_time=clock, speed_estimate_period=_LOOKS_BACK)
        self._said = clock()

    def update(self, task_id: progress.TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self._report(task_id)

    def advance(self, task_id: progress.TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._report(task_id)

    def _report(self, task_id: progress.TaskID) -> None:
        now, task = self.get_time(), next(task for task in self.tasks if task.id == task_id)
        if now - self._said < _LINE_EVERY or task.finished:
            return
        self._said = now
        unit = task.fields.get("unit", 1)
        total = "" if task.total is None else f" of {task.total / unit:,.0f}"
        done = f"{task.description} {task.completed / unit:,.0f}{total}{task.fields.get('suffix', '')}"
        seconds = task.time_remaining
        left = "" if seconds is None else f"{timedelta(seconds=round(seconds))} left"
        told = ", ".join(filter(None, (done, *str(task.fields.get("note", "")).split("  "), left)))
        self.console.print(told, soft_wrap=True, markup=False)


class Console:
    """Messages and progress on stderr, bars on a terminal and lines elsewhere; silent on every rank but the first."""

    def __init__(self, speaks: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = SafeConsole(stderr=True, quiet=not speaks or verbosity == "quiet", highlight=False)
        self._clock, self.name, self._prefix = clock, "", ""
        self.progress = self._progress(
            progress.SpinnerColumn(),
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}", style="cyan", markup=False),
            progress.TimeRemainingColumn(),
        )

    def named(self, name: str) -> Console:
        """The same screen and progress, for one of several that work at once: what it says begins with its name."""
        member = copy.copy(self)
        member.name, member._prefix = name, f"{self._prefix}{name}: "
        return member

    def say(self, text: str) -> None:
        """One line for the person."""
        self.console.print(f"{self._prefix}{text}", soft_wrap=True, markup=False)

    def stage(self, text: str) -> None:
        """A heading: what comes next."""
        self.console.print(Text(f"▸ {self._prefix}{text}", style="bold cyan"), soft_wrap=True)

    @contextmanager
    def reading(self, description: str, total: int | None) -> Iterator[Callable[[int, str], None]]:
        """A function that shows bytes read of `total` and counts so far, once the work has taken two seconds.

        Without a total (a source that is not a file) it shows the time elapsed.
        """
        columns: list[progress.ProgressColumn] = [progress.TimeElapsedColumn()]
        if total is not None:
            columns = [progress.BarColumn(24), progress.DownloadColumn(), progress.TransferSpeedColumn()]
            columns.append(progress.TimeRemainingColumn())
        label = progress.TextColumn("{task.description}: {task.fields[note]}", markup=False)
        bar = self._progress(label, *columns)
        task = bar.add_task(f"{self._prefix}{description}", total=total, note="", unit=1e6, suffix=" MB")
        began = self._clock()

        def update(bytes_read: int, counts: str) -> None:
            if self._clock() - began > _PROGRESS_DELAY:
                bar.start()
            bar.update(task, completed=bytes_read, note=counts)

        try:
            yield update
        finally:
            bar.stop()

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """While something else works and shows a bar on terminals alone, say elsewhere that it goes on."""
        ended, began = threading.Event(), self._clock()

        def tell() -> None:
            while not ended.wait(_LINE_EVERY):
                self.say(f"{what}: {timedelta(seconds=round(self._clock() - began))} so far")

        if not self.console.is_terminal:
            threading.Thread(target=tell, daemon=True).start()
        try:
            yield
        finally:
            ended.set()

    def _progress(self, *columns: progress.ProgressColumn) -> progress.Progress:
        if not self.console.is_terminal:
            return _LineProgress(self.console, self._clock)
        return progress.Progress(*columns, console=self.console, disable=self.console.quiet, transient=True)


def change(value: float, base: float) -> str:
    """How `value` compares with `base`: in percent, from ten times up as a factor."""
    ratio = value / base
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{100 * (ratio - 1):+.0f} %"


def counted(number: int, noun: str) -> str:
    """`1 block`, `2,048 blocks`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def shortened(name: str, width: int) -> str:
    """A name on one line of so many columns: its beginning and its end, in which names of one kind differ."""
    name = " ".join(name.split())
    if cell_len(name) <= width:
        return name
    tail = (width - 1) // 2
    return set_cell_size(name, width - 1 - tail) + "…" + set_cell_size(name[::-1], tail)[::-1]


def name_some(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")
