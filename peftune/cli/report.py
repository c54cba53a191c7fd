"""The verbs `report` and `watch`: runs as a page, and a run in progress in the terminal."""

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
from peftune.files import read_object, write_text

_LEAST = 1.0  # seconds between looks at a run, at least
_PATIENT = 10.0  # times as long as a look takes


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Directories of runs (run.out), finished or not.")
    ],
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
    from peftune.training.report.recorded import read_runs

    figures = None if evaluated is None else read_object(evaluated)
    while True:
        found = read_runs(runs)
        goes_on = every is not None and any(run.goes_on for run in found)
        write_text(out, build_page(found, figures, every if goes_on else None))
        if not goes_on or every is None:
            break
        time.sleep(every)
    echo(f"{out}: {', '.join(f'{run.name} ({run.state()})' for run in found)}")


def watch(run: Annotated[Path, typer.Argument(metavar="RUN", help="Directory of a run (run.out).")]) -> None:
    """Show a run while it goes on, until it ends or Ctrl-C, which leaves the run alone.

    Example:  peftune watch adapters/poems
    """
    from rich.live import Live

    from peftune.cli.output.watch import LineWatcher, view_of
    from peftune.training.report.recorded import read_run

    lines, live = LineWatcher(echo), Live(console=results(), auto_refresh=False)
    answer = signal.signal(signal.SIGINT, signal.default_int_handler)  # it is how one leaves
    try:
        with suppress(KeyboardInterrupt), live if sys.stdout.isatty() else nullcontext():
            while True:
                began = time.monotonic()
                found = read_run(run)
                if sys.stdout.isatty():
                    live.update(view_of(found), refresh=True)
                else:
                    lines.show(found)
                    sys.stdout.flush()
                if not found.goes_on:
                    break
                time.sleep(max(_LEAST, _PATIENT * (time.monotonic() - began)))
    finally:
        signal.signal(signal.SIGINT, answer)
