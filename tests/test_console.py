"""Tables that people read."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from peftune.console import change, matrix_table


@pytest.mark.parametrize(
    ("value", "base", "told"),
    [(30.0, 40.0, "-25 %"), (50.0, 40.0, "+25 %"), (399.0, 40.0, "+898 %"), (4000.0, 40.0, "100 times")],
)
def test_a_change_is_a_percentage_or_a_factor(value: float, base: float, told: str) -> None:
    assert change(value, base) == told


def test_the_matrix_names_every_row_and_compares_with_the_base() -> None:
    rows = {"base": {"docs": {"perplexity": 40.0}}, "poems": {"docs": {"perplexity": 30.0}}}
    console = Console(file=io.StringIO(), width=80)
    console.print(matrix_table(rows))
    told = console.file.getvalue()  # type: ignore[attr-defined]
    assert "base" in told and "40.00" in told and "30.00 (-25 %)" in told
