"""Where generated text goes: a terminal, a file or a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import typer
from rich.table import Table
from rich.text import Text

from peftune.console import SafeConsole
from peftune.errors import printable

PROMPT, CONTINUATION, HEADER = "dim", "bold", "cyan"  # styles
_UNLIMITED = 100_000  # columns


def echo(text: str, err: bool = False) -> None:
    """Print a text in which somebody else's words may stand."""
    typer.echo(printable(text), err=err)


def results() -> SafeConsole:
    """The console of tables and figures: stdout, as wide as they are where it is no terminal."""
    return SafeConsole(highlight=False, markup=False, width=None if sys.stdout.isatty() else _UNLIMITED)


def print_table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str | Text]], left: int = 1) -> None:
    """A table whose first `left` columns are words and whose others are figures; each cell is one line.

    The title stands above: as the table's own it would wrap at the table's width.
    """
    table, console = Table(header_style="bold", pad_edge=False), results()
    for number, name in enumerate(columns):
        table.add_column(Text(name), justify="left" if number < left or not name else "right", overflow="fold")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(" ".join(cell.split("\n"))) for cell in row))
    console.print(Text(title, style="bold"), soft_wrap=True)
    console.print(table)


class TextPrinter:
    """Prints to stdout: prompt dim and continuation bright on a terminal, else the text and nothing more.

    When the reader of a pipe has gone (`| head`), BrokenPipeError is raised, or with `outlives_pipe` what is still to
    come is discarded.
    """

    def __init__(self, outlives_pipe: bool = False) -> None:
        self._out = sys.stdout  # kept: a progress bar puts its own stream in sys.stdout while it lives
        self.is_terminal = self._out.isatty()
        self._console = SafeConsole(file=self._out, highlight=False)
        self._outlives_pipe = outlives_pipe
        self._last = "\n"

    def end(self) -> None:
        """The text is complete: end its line."""
        if self._last != "\n":
            self.write("\n")

    def write(self, text: str, style: str | None = None) -> None:
        """Show a text, or a part of one, at once."""
        if not text:
            return
        self._last = text[-1]
        encoding = self._out.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # a stdout that is not UTF-8 is no reason to stop
        try:
            if self.is_terminal:
                self._console.out(printable(text), style=style, highlight=False, end="")
            else:
                self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())  # so that nothing is said about it at exit
            if not self._outlives_pipe:
                raise
