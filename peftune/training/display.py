"""What a person sees while a run works: a progress bar on a terminal, a line per evaluation elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table


class Display:
    """Messages and progress on stderr; silent on every rank but the first."""

    def __init__(self, speaks: bool) -> None:
        self.console = Console(stderr=True, quiet=not speaks, highlight=False)
        self.progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("[cyan]{task.fields[note]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not (speaks and self.console.is_terminal),
            transient=True,
        )

    def say(self, text: str) -> None:
        """One line for the person."""
        self.console.print(text, soft_wrap=True, markup=False)

    def show(self, table: Table) -> None:
        """A table for the person."""
        self.console.print(table)
