"""Where generated text goes: a terminal, a file or pipe, and JSON."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from peftune.errors import UserError
from peftune.inference.generate import Generation

_PROMPT, _CONTINUATION, _HEADER = "dim", "bold", "cyan"
# A model may write what a terminal would obey (ESC, BEL, the C1 set): show U+FFFD instead.
_CONTROLS = {code: "\N{REPLACEMENT CHARACTER}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class Printer:
    """Prints to stdout: prompt dim and continuation bright on a terminal, else the text and nothing more.

    When the reader of a pipe has gone (`| head`), BrokenPipeError is raised, or with `outlives_pipe` what is still to
    come is discarded.
    """

    def __init__(self, outlives_pipe: bool = False) -> None:
        self._out = sys.stdout  # kept: a progress bar puts its own stream in sys.stdout while it lives
        self.is_terminal = self._out.isatty()
        self._console = Console(file=self._out, highlight=False)
        self._outlives_pipe = outlives_pipe
        self._last = "\n"

    def header(self, number: int, count: int) -> None:
        """Which of several prompts comes now, set off by a blank line."""
        self._write(("" if number == 1 else "\n") + f"=== {number} of {count} ===\n", _HEADER)

    def prompt(self, text: str) -> None:
        """The text that the model was given."""
        self._write(text, _PROMPT)

    def continuation(self, text: str) -> None:
        """The text that the model wrote, or a piece of it."""
        self._write(text, _CONTINUATION)

    def end(self) -> None:
        """The text is complete: end its line."""
        if self._last != "\n":
            self._write("\n")

    def _write(self, text: str, style: str | None = None) -> None:
        if not text:
            return
        self._last = text[-1]
        encoding = self._out.encoding or "utf-8"
        text = text.encode(encoding, "replace").decode(encoding)  # a stdout that is not UTF-8 is no reason to stop
        try:
            if self.is_terminal:
                self._console.out(text.translate(_CONTROLS), style=style, highlight=False, end="")
            else:
                self._out.write(text)
            self._out.flush()
        except BrokenPipeError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._out.fileno())  # so that nothing is said about it at exit
            os.close(nowhere)
            if not self._outlives_pipe:
                raise


def check_writable(path: Path) -> None:
    """Refuse a --json file that cannot be written, before the work is done."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"--json {path}: cannot be written; expected a file in a directory that exists")


def write_json(path: Path, facts: dict[str, Any], generations: list[Generation]) -> None:
    """Write `facts` (base, adapter, settings) and one object a prompt, whole or not at all."""
    rows = [{**vars(generation), "ids": list(generation.ids)} for generation in generations]
    text = json.dumps({**facts, "generations": rows}, indent=2, ensure_ascii=False) + "\n"
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        if path.exists() and not path.is_file():  # /dev/stdout, a named pipe
            path.write_text(text, encoding="utf-8")
        else:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"--json {path}: cannot be written: {error.strerror or error}") from None
