"""How to generate: typed and validated, every problem listed at once."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from peftune.errors import UserError

FinishReason = Literal["stop", "length", "end", "cancelled", "error"]
"""A stop string came, as many tokens as asked for, `<|endoftext|>`; or the request was given up, or failed."""

DEFAULT_TEMPERATURE = 0.8
_SEEDS = 2**63


@dataclass(frozen=True)
class GenerationSettings:
    """How much to generate and how tokens are chosen; an instance is valid, or UserError names every problem.

    `max_new_tokens`       at most so many tokens a prompt
    `temperature`          0 = greedy; None = 0.8, or 0 with beams
    `top_k`                sample among the k likeliest tokens; 0 = all
    `top_p`                sample among the fewest tokens that hold this much probability, in (0, 1]; 1 = all
    `repetition_penalty`   > 0; above 1 makes what the prompt or the text holds already less likely; 1 = off
    `beams`                beam search with so many beams, without sampling; 1 = off
    `seed`                 of every prompt's own random stream; None = another text each time
    `stop`                 the text ends before the first of these strings, which is not part of it
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    beams: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = list(self._problems())
        if problems:
            raise UserError("generation settings: " + "; ".join(problems))

    @property
    def sampling_temperature(self) -> float:
        """The temperature with its default filled in; 0 means that the likeliest token is taken."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.beams > 1 else DEFAULT_TEMPERATURE

    def _problems(self) -> Iterator[str]:
        if self.max_new_tokens < 1:
            yield f"max_new_tokens is {self.max_new_tokens}, expected 1 or more"
        if self.temperature is not None and not 0 <= self.temperature < math.inf:
            yield f"temperature is {self.temperature}, expected 0 (greedy) or more"
        if self.top_k < 0:
            yield f"top_k is {self.top_k}, expected 0 (all tokens) or more"
        if not 0 < self.top_p <= 1:
            yield f"top_p is {self.top_p}, expected more than 0 and at most 1"
        if not 0 < self.repetition_penalty < math.inf:
            yield f"repetition_penalty is {self.repetition_penalty}, expected more than 0 (1 = off)"
        if self.seed is not None and not 0 <= self.seed < _SEEDS:
            yield f"seed is {self.seed}, expected 0 to {_SEEDS - 1}"
        if "" in self.stop:
            yield "a stop string is empty, expected at least one character"
        yield from self._beam_problems()

    def _beam_problems(self) -> Iterator[str]:
        if self.beams < 1:
            yield f"beams is {self.beams}, expected 1 (off) or more"
        if self.beams > 1 and self.temperature:
            yield f"beams is {self.beams} with temperature {self.temperature}: beam search does not sample; drop one"
        if self.beams > 1 and self.top_k:
            yield f"beams is {self.beams} with top_k {self.top_k}: beam search does not sample; drop one"
