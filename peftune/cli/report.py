"""The verbs `report` and `watch`: runs as a page, and in the terminal while they go on."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.options import writable
from peftune.cli.output.text_output import echo, results
from peftune.console import name_some
from peftune.files import read_object, write_text

_LEAST = 1.0  # seconds between looks at a run, at least
_PATIENT = 10.0  # times as long as a look takes

_RUNS = Annotated[
    list[Path], typer.Argument(metavar="RUN...", help="Directories of runs (run.out), or one that holds such.")
]


def report(
    runs: _RUNS,
    out: Annotated[Path, typer.Option(help="HTML file to write.", callback=writable)] = Path("report.html"),
    evaluated: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Figures with intervals: of peftune eval --json FILE.")
    ] = None,
    every: Annotated[
        int | None, typer.Option(min=1, metavar="SECONDS", help="Write it anew until the runs end; it reloads itself.")
    ] = None,
) -> None:
    """Write one HTML file that shows a run, or several in the same curves; it loads nothing from elsewhere.

    Example:  peftune report adapters/slow adapters/fast --out report.html
    """
    from peftune.training.report.page import build_page
    from peftune.training.report.recorded import RunReader

    figures, reader = None if evaluated is None else read_object(evaluated), RunReader(runs)
    while True:
        found = reader.read()
        goes_on = every is not None and any(run.goes_on for run in found)
        write_text(out, build_page(found, figures, every if goes_on else None))
        if not goes_on or every is None:
            break
        time.sleep(every)
    echo(f"{out}: {name_some([f'{run.name} ({run.state()})' for run in found])}")


def watch(runs: _RUNS) -> None:
    """Show a run, or many on one screen, while they go on, until all have ended or Ctrl-C, which leaves them alone.

    Example:  peftune watch adapters/poems
    """
    from rich.live import Live

    from peftune.cli.output.fleet_screen import screen_of
    from peftune.cli.output.watch import LineWatcher, view_of
    from peftune.training.report.recorded import RunReader

    reader, live = RunReader(runs), Live(console=results(), auto_refresh=False)
    lines: dict[Path, LineWatcher] = {}
    answer = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is how one leaves
    try:
        with suppress(KeyboardInterrupt), live if sys.stdout.isatty() else nullcontext():
            while True:
                began, least = time.monotonic(), _LEAST
                found = reader.read()
                active = sum(run.goes_on for run in found)
                if sys.stdout.isatty():
                    size = live.console.size
                    view = view_of(found[0]) if len(found) == 1 else screen_of(found, size.width, size.height - 1)
                    live.update(view, refresh=True)
                else:
                    least *= active  # about a line a second
                    for run in found:
                        lines.setdefault(run.folder, LineWatcher(echo)).show(run, len(found) > 1)
                    sys.stdout.flush()
                if not active:
                    break
                time.sleep(max(least, _PATIENT * (time.monotonic() - began)))
    finally:
        signal.signal(signal.SIGINT, answer)
