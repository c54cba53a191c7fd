"""How much of prompts a step may compute, so that the texts being generated wait no longer than they may."""

from __future__ import annotations

import torch

PAUSE_SECONDS = 0.05  # between two tokens of a text, for prompts to be read or routed
_MOST = 512  # tokens, where they are quick


def chunk_tokens(device: torch.device) -> int:
    """Tokens of one prompt in one forward, the least that a step computes.

    It is the same at all times, because the last bits of a prompt's numbers depend on it. 32 tokens of GPT-2 small take
    40 ms on two cores; a GPU is no quicker with fewer than 256.
    """
    return 32 if device.type == "cpu" else 256


class Pace:
    """The number of tokens that fit into `PAUSE_SECONDS`, by what the last ones took."""

    def __init__(self, chunk: int) -> None:
        self._seconds_a_token = PAUSE_SECONDS / chunk

    @property
    def tokens(self) -> int:
        """How many may be computed now, at least one."""
        return min(_MOST, max(1, int(PAUSE_SECONDS / self._seconds_a_token)))

    def took(self, tokens: int, seconds: float) -> None:
        """So many were computed in so long: a moving average, so that one bad moment is soon forgotten."""
        self._seconds_a_token += 0.5 * (seconds / tokens - self._seconds_a_token)
