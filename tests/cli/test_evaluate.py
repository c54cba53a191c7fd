"""The tables of `peftune eval`."""

from __future__ import annotations

import pytest

from peftune.cli.output.evaluate import print_matrix


def test_the_matrix_names_every_row_and_compares_with_the_base(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"base": {"docs": {"perplexity": 40.0}}, "poems": {"docs": {"perplexity": 30.0}}}
    print_matrix(rows)
    shown = capsys.readouterr().out
    assert "base" in shown and "40.00" in shown and "30.00 (-25 %)" in shown
