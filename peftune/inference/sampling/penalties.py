"""What a text's own tokens, and its settings, change in its logits before a token is chosen. V vocabulary entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from peftune.inference.settings import GenerationSettings
from peftune.model.train.layers import to_device


def penalise_repetition(logits_BV: Tensor, seen_BV: Tensor, penalty: float) -> Tensor:
    """Make the tokens marked in `seen_BV` (bool) less likely: positive logits divided, negative ones multiplied.

    `penalty` 1 changes nothing. Source: CTRL (https://arxiv.org/abs/1909.05858), eq. in section 4.1; Transformers'
    `RepetitionPenaltyLogitsProcessor` computes the same.
    """
    penalised = torch.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return torch.where(seen_BV, penalised, logits_BV)


def penalise_presence(logits_V: Tensor, counts_V: Tensor, presence: float, frequency: float) -> Tensor:
    """Subtract `frequency` for each time that the text holds a token, and `presence` once if it does.

    `counts_V` is how often. Source: https://platform.openai.com/docs/api-reference, under both names.
    """
    return logits_V - frequency * counts_V - presence * (counts_V > 0)


def completing(ids: Sequence[int], size: int) -> list[int]:
    """The tokens that would make the last of `ids` a run of `size` tokens that is among them already.

    Source: fairseq's and Transformers' `no_repeat_ngram_size`, which count the prompt too.
    """
    last = list(ids[len(ids) + 1 - size :])
    return [ids[at + size - 1] for at in range(len(ids) + 1 - size) if list(ids[at : at + size - 1]) == last]


class LogitAdjuster:
    """Adjusts the logits of one text as it grows.

    Bias, repetition, presence and frequency penalty, runs of tokens that may not come again, and the tokens that may
    not end the text yet, in this order. `prompt` are the ids before the text: repetition alone counts them. `end` is
    the id of `<|endoftext|>`.
    """

    def __init__(self, settings: GenerationSettings, prompt: Sequence[int], end: int) -> None:
        self._settings, self._prompt = settings, prompt
        self._ends = sorted(settings.end_ids(end))
        self._counted = settings.presence_penalty != 0 or settings.frequency_penalty != 0
        self._written: list[int] = []
        self._seen: Tensor | None = None
        self._counts: Tensor | None = None

    def add(self, token: int) -> None:
        """The text holds one more token."""
        self._written.append(token)
        if self._seen is not None:
            self._seen[token].fill_(True)  # what is assigned would be copied there, for which the host waits
        if self._counts is not None:
            self._counts[token].add_(1)

    @property
    def is_needed(self) -> bool:
        """Whether anything would change now."""
        chosen = self._settings
        repeats = chosen.repetition_penalty != 1 or chosen.no_repeat_ngram_size > 0
        return self._must_go_on or repeats or self._counted or bool(chosen.logit_bias)

    @property
    def _must_go_on(self) -> bool:
        return len(self._written) < self._settings.min_new_tokens

    def adjust(self, logits_V: Tensor) -> Tensor:
        """The logits, as float32, by which the next token is chosen."""
        chosen, logits_V = self._settings, logits_V.float()
        if chosen.logit_bias:
            ids, values = zip(*chosen.logit_bias, strict=True)
            at, more = torch.tensor(ids), torch.tensor(values, dtype=torch.float32)
            logits_V = logits_V.index_add(0, *(to_device(tensor, logits_V.device) for tensor in (at, more)))
        if chosen.repetition_penalty != 1:
            if self._seen is None:
                seen = to_device(torch.tensor([*self._prompt, *self._written], dtype=torch.int64), logits_V.device)
                self._seen = torch.zeros_like(logits_V, dtype=torch.bool).index_fill_(0, seen, True)
            logits_V = penalise_repetition(logits_V, self._seen, chosen.repetition_penalty)
        if self._counted:
            if self._counts is None:
                written = to_device(torch.tensor(self._written, dtype=torch.int64), logits_V.device)
                once = torch.ones_like(written, dtype=torch.float32)
                self._counts = torch.zeros_like(logits_V).index_add_(0, written, once)
            logits_V = penalise_presence(logits_V, self._counts, chosen.presence_penalty, chosen.frequency_penalty)
        barred = self._ends if self._must_go_on else []
        if chosen.no_repeat_ngram_size:
            before = [] if chosen.repeat_prompt else self._prompt
            barred = barred + completing([*before, *self._written], chosen.no_repeat_ngram_size)
        if 0 < len(set(barred)) < len(logits_V):  # something must come
            logits_V = logits_V.index_fill(0, to_device(torch.tensor(barred), logits_V.device), -torch.inf)
        return logits_V
