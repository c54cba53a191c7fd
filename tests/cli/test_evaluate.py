"""The tables of `peftune eval`."""

from __future__ import annotations

import io

from rich.console import Console

from peftune.cli.output.evaluate import matrix_table


def test_the_matrix_names_every_row_and_compares_with_the_base() -> None:
    rows = {"base": {"docs": {"perplexity": 40.0}}, "poems": {"docs": {"perplexity": 30.0}}}
    console = Console(file=io.StringIO(), width=80)
    console.print(matrix_table(rows))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "base" in shown and "40.00" in shown and "30.00 (-25 %)" in shown
