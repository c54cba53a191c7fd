"""What people read on stderr and in tables."""

from __future__ import annotations

import pytest

from peftune.console import change


@pytest.mark.parametrize(
    ("value", "base", "told"),
    [(30.0, 40.0, "-25 %"), (50.0, 40.0, "+25 %"), (399.0, 40.0, "+898 %"), (4000.0, 40.0, "100 times")],
)
def test_a_change_is_a_percentage_or_a_factor(value: float, base: float, told: str) -> None:
    assert change(value, base) == told
