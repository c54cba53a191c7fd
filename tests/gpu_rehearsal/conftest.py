"""A pretended GPU, which a run of Accelerate finds too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelerate.state import AcceleratorState, PartialState
from pretended_cuda import PretendedCUDA, pretend


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What Accelerate remembers of this process, its device among it, is forgotten before and after a test."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


@pytest.fixture
def cuda(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendedCUDA]:
    """Everything in the test runs with one GPU, pretended."""
    with pretend(monkeypatch) as entered:
        yield entered
