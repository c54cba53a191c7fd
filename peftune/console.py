"""What a person sees: messages and progress bars on stderr; results go to stdout."""

from __future__ import annotations

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.text import Text


class Console:
    """Messages and progress on stderr; bars only on a terminal; silent on every rank but the first."""

    def __init__(self, speaks: bool = True) -> None:
        self.console = RichConsole(stderr=True, quiet=not speaks, highlight=False)
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

    def stage(self, text: str) -> None:
        """A heading: what comes next."""
        self.console.print(Text(f"▸ {text}", style="bold cyan"), soft_wrap=True)


def change(value: float, base: float) -> str:
    """How `value` compares with `base`: in percent, from ten times up as a factor."""
    ratio = value / base
    return f"{ratio:,.0f} times" if ratio >= 10 else f"{100 * (ratio - 1):+.0f} %"
