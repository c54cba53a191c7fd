"""How to generate: typed and validated, every problem listed at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from peftune.errors import UserError, refuse_bare_string

FinishReason = Literal["stop", "length", "end", "cancelled", "error"]
"""A stop string came, as many tokens as asked for, a token that ends texts; or the request was given up, or failed."""

DEFAULT_TEMPERATURE = 0.8
_SEEDS = 2**63
_SAMPLED = ("temperature", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias")
"""What beam search does not have, nor Transformers' greedy search."""


@dataclass(frozen=True)
class GenerationSettings:
    """How much to generate and how tokens are chosen; an instance is valid, or UserError names every problem.

    `max_new_tokens`       at most so many tokens a prompt
    `min_new_tokens`       the text does not end before it has so many: not by a token, and by no stop string in them
    `temperature`          0 = greedy; None = 0.8, or 0 with beams
    `top_k`                sample among the k likeliest tokens; 0 = all
    `top_p`                sample among the fewest tokens that hold this much probability, in (0, 1]; 1 = all
    `min_p`                sample among the tokens at least this many times as likely as the likeliest; 0 = all
    `repetition_penalty`   > 0; above 1 makes what the prompt or the text holds already less likely; 1 = off
    `presence_penalty`     subtracted from the logit of each token that the text (not the prompt) holds already; 0 = off
    `frequency_penalty`    the same, as many times as the text holds the token; 0 = off
    `logit_bias`           (token id, what is added to its logit), each id once
    `beams`                beam search with so many beams, without sampling; 1 = off
    `length_penalty`       of beams: a text's score is the sum of its tokens' log-probabilities (nats), the one that
                           ended it included, by their number to this power; 0 = the plain sum, more = longer texts
    `no_repeat_ngram_size` no run of so many tokens, the prompt's included, comes twice; 0 = off
    `repeat_prompt`        runs of tokens of the prompt do not count there, so that a text may copy its names
    `num_return_sequences` texts for each prompt: the best of the beams, best first, or so many samples
    `seed`                 of every prompt's own random stream; None = another text each time
    `stop`                 the text ends before the first of these strings, which is not part of it
    `stop_token_ids`       tokens that end the text as `<|endoftext|>` does
    `ignore_eos`           `<|endoftext|>` does not end the text; it is among its tokens, and not shown
    """

    max_new_tokens: int = 128
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    beams: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    min_new_tokens: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    length_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    repeat_prompt: bool = False

    def __post_init__(self) -> None:
        refuse_bare_string(self.stop, "stop")
        expected = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "min_new_tokens": (
                0 <= self.min_new_tokens <= self.max_new_tokens,
                f"0 to {self.max_new_tokens}, the most",
            ),
            "temperature": (self.temperature is None or 0 <= self.temperature < math.inf, "0 (greedy) or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "more than 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "0 (all tokens) to 1"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number (0 = off)"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number (0 = off)"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "more than 0 (1 = off)"),
            "seed": (self.seed is None or 0 <= self.seed < _SEEDS, f"0 to {_SEEDS - 1}"),
            "beams": (self.beams >= 1, "1 (off) or more"),
            "length_penalty": (math.isfinite(self.length_penalty), "a finite number (0 = no normalisation)"),
            "no_repeat_ngram_size": (self.no_repeat_ngram_size >= 0, "0 (off) or more"),
            "num_return_sequences": (self.num_return_sequences >= 1, "1 or more"),
        }
        problems = [f"{k} is {getattr(self, k)}, expected {what}" for k, (valid, what) in expected.items() if not valid]
        if "" in self.stop:
            problems.append("a stop string is empty, expected at least one character")
        if not all(math.isfinite(bias) for _, bias in self.logit_bias):
            problems.append("logit_bias: expected finite numbers")
        if len({token for token, _ in self.logit_bias}) < len(self.logit_bias):
            problems.append("logit_bias names a token twice, expected each once")
        for key in _SAMPLED if self.beams > 1 else ():
            if getattr(self, key):
                found = f"beams is {self.beams} with {key} {getattr(self, key)}"
                problems.append(f"{found}: beam search does not sample; drop one")
        problems += self._problems_of_search()
        if problems:
            raise UserError("generation settings: " + "; ".join(problems))

    def _problems_of_search(self) -> list[str]:
        several = self.num_return_sequences
        if self.repeat_prompt and not self.no_repeat_ngram_size:
            return ["repeat_prompt without no_repeat_ngram_size changes nothing; give both"]
        if self.beams == 1 and self.length_penalty != 1:
            return [f"length_penalty is {self.length_penalty} without beams: only beam search has one; give beams too"]
        if self.beams > 1 and several > self.beams:
            return [f"num_return_sequences is {several} with beams {self.beams}: expected at most as many"]
        if several > 1 and self.beams == 1 and self.sampling_temperature == 0:
            return [f"num_return_sequences is {several} with temperature 0: all would be equal; sample, or give beams"]
        return []

    @property
    def sampling_temperature(self) -> float:
        """The temperature with its default filled in; 0 means that the likeliest token is taken."""
        if self.temperature is not None:
            return self.temperature
        return 0.0 if self.beams > 1 else DEFAULT_TEMPERATURE

    def refuse_sampling(self) -> None:
        """UserError for what a search does not have, greedy or with beams."""
        found = [f"{key} {value}" for key in _SAMPLED if (value := getattr(self, key))]
        if self.temperature is None and self.sampling_temperature:
            found = [f"temperature {DEFAULT_TEMPERATURE}, the default", *found]
        if found:
            raise UserError(f"generation settings: {found[0]} goes with sampling, which a bank does; set it to 0 here")

    def samples(self) -> list[GenerationSettings]:
        """The settings of each of `num_return_sequences` samples of a prompt: with seed, seed + 1, …."""
        seeds = [None if self.seed is None else (self.seed + i) % _SEEDS for i in range(self.num_return_sequences)]
        return [replace(self, seed=seed, num_return_sequences=1) for seed in seeds] if len(seeds) > 1 else [self]

    def end_ids(self, end: int) -> frozenset[int]:
        """The tokens that end a text; `end` is the id of `<|endoftext|>`."""
        return frozenset(self.stop_token_ids if self.ignore_eos else (end, *self.stop_token_ids))

    def check_ids(self, vocabulary: int) -> None:
        """UserError for a token id that a tokenizer of so many tokens does not have."""
        for key, ids in (("logit_bias", [id for id, _ in self.logit_bias]), ("stop_token_ids", self.stop_token_ids)):
            unknown = next((id for id in ids if not 0 <= id < vocabulary), None)
            if unknown is not None:
                raise UserError(f"{key}: token id {str(unknown)[:40]}, expected 0 to {vocabulary - 1}")
