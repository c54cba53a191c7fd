"""What is printed when many adapters were trained in one run: a line for each, then how many were delivered."""

from __future__ import annotations

from collections.abc import Sequence

from peftune.cli.output.text_output import echo
from peftune.config.fleet import names_of
from peftune.config.recipe import Recipe
from peftune.errors import PeftuneError, ReportedElsewhere
from peftune.training.export.adapter import Delivery


def print_results(recipes: Sequence[Recipe], results: Sequence[object], speaks: bool) -> None:
    """Print what became of each adapter, on the rank that `speaks`: those delivered to stdout, failures to stderr.

    Where some failed, PeftuneError with the exit code of the first of them; other ranks leave with it in silence.
    """
    named = list(zip(names_of(recipes), results, strict=True))
    failed = {name: result for name, result in named if isinstance(result, PeftuneError)}
    for name, result in named if speaks else ():
        if isinstance(result, Delivery):
            echo(result.summary())
        elif len(failed) > 1:  # the last line has the reason of a single one
            echo(f"peftune: {name}: {' '.join(str(result).split())}", err=True)
    if not failed:
        return
    name, first = next(iter(failed.items()))
    delivered = len(results) - len(failed)
    text = f"{delivered} of {len(results)} adapters {'is' if delivered == 1 else 'are'} delivered"
    text += f"; {name}: {first}" if len(failed) == 1 else f"; not: {', '.join(failed)}"
    if not speaks:
        raise ReportedElsewhere(first.exit_code, text)
    error = PeftuneError(text)
    error.exit_code = first.exit_code
    raise error
