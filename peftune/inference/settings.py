"""How to generate: typed and validated, every problem listed at once."""

from __future__ import annotations

import math
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
        expected = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (self.temperature is None or 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0 (1 = off)"),
            "seed": (self.seed is None or 0 <= self.seed < _SEEDS, f"0 to {_SEEDS - 1}"),
            "beams": (self.beams >= 1, "1 (off) or more"),
        }
        problems = [f"{k} is {getattr(self, k)}, expected {what}" for k, (valid, what) in expected.items() if not valid]
        if "" in self.stop:
            problems.append("a stop string is empty, expected at least one character")
        for key in ("temperature", "top_k"):
            if self.beams > 1 and getattr(self, key):
                found = f"beams is {self.beams} with {key} {getattr(self, key)}"
                problems.append(f"{found}: beam search does not sample; drop one")
        if problems:
            raise UserError("generation settings: " + "; ".join(problems))

    @property
    def sampling_temperature(self) -> float:
        """The temperature with its default filled in; 0 means that the likeliest token is taken."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.beams > 1 else DEFAULT_TEMPERATURE
