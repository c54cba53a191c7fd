"""The function that is trained: a batch in, summed nats out. One module, so that every engine can wrap it."""

from __future__ import annotations

import math

import torch
from peft import PeftModel
from torch import nn
from transformers import GPT2LMHeadModel

from peftune.model.attention import document_mask
from peftune.model.loss import summed_nats
from peftune.model.neftune import add_neftune_noise


class LossModel(nn.Module):
    """Scores batches with a GPT-2, with or without an adapter.

    In training mode `neftune` is the strength of the noise on embeddings (`add_neftune_noise`), and `smoothing` the
    share of each target's probability that is spread over the vocabulary.
    """

    def __init__(self, model: PeftModel | GPT2LMHeadModel, neftune: float = 0.0, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.neftune, self.smoothing = neftune, smoothing

    def forward(
        self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor, segments: torch.Tensor | None
    ) -> torch.Tensor:
        """Summed loss in nats (float64 scalar) over the places with a target ≥ 0; all arguments (B, T) int64.

        Without `segments` each row is one document: no mask, and SDPA's causal kernel (flash attention on a GPU).
        """
        core = self.causal()
        hidden = core.transformer(
            inputs_embeds=self._embedded(core, ids, segments),
            position_ids=positions,
            attention_mask=None if segments is None else document_mask(segments),
            use_cache=False,
        ).last_hidden_state
        scored = targets >= 0
        smoothing = self.smoothing if self.training else 0.0
        return summed_nats(hidden[scored], core.lm_head, targets[scored], smoothing)

    def causal(self) -> GPT2LMHeadModel:
        """The GPT-2 inside, adapters (if any) in place."""
        return self.model.base_model.model if isinstance(self.model, PeftModel) else self.model  # type: ignore[return-value]

    def _embedded(self, core: GPT2LMHeadModel, ids: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
        embedded = core.transformer.wte(ids)
        if not (self.training and self.neftune):
            return embedded  # type: ignore[no-any-return]
        if segments is None:
            segments = torch.zeros_like(ids)
        lengths = (segments[:, :, None] == segments[:, None, :]).sum(dim=2)
        return add_neftune_noise(embedded, lengths, self.neftune)


def nats_to_perplexity(nats_per_token: float) -> float:
    """exp of a mean loss, infinite where that does not fit."""
    return math.exp(nats_per_token) if nats_per_token < 700 else math.inf
