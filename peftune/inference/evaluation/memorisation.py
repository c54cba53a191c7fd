"""How much of its training text a model has learnt by heart.

A window counts as memorised where greedy decoding, given its first tokens, continues with exactly the rest (Carlini et
al., 2202.07646: extractable with k tokens of context). It does so where the true next token is the likeliest at every
place, so one forward pass over the true text decides. One window is drawn from a document, so that windows are
independent; the share of the base is what can be guessed without the training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from peftune.data.tokens.store import TokenStore
from peftune.errors import UserError
from peftune.inference.evaluation.bootstrap import wilson
from peftune.model.loss import LossModel, nats_and_likeliest


@dataclass(frozen=True)
class Window:
    """`prompt` tokens are given, and the `continued` ones after them must come; at most `most` documents are drawn."""

    prompt: int = 32
    continued: int = 32
    most: int = 1000

    @property
    def tokens(self) -> int:
        """Length of a window."""
        return self.prompt + self.continued


def windows_of(store: TokenStore, name: str, window: Window, n_positions: int) -> torch.Tensor:
    """One window (W, window.tokens) int64 of each of at most `window.most` documents, always the same ones.

    All of the continued tokens are scored in training. Raises UserError where no document has such a window.
    """
    if window.tokens > n_positions:
        raise UserError(
            f"windows of {window.prompt} + {window.continued} tokens, the base has {n_positions} positions; take fewer"
        )
    random, found = np.random.default_rng(0), []
    for document in random.permutation(np.flatnonzero(store.supervised_counts >= window.continued)):
        ids, scored = store.window(int(document), 0, int(store.lengths[document]))
        unscored = np.concatenate([[0], np.cumsum(~scored)])
        begins = np.arange(len(ids) - window.tokens + 1)  # of windows
        begins = begins[unscored[begins + window.tokens] == unscored[begins + window.prompt]]
        if len(begins):
            begin = random.choice(begins)
            found.append(ids[begin : begin + window.tokens])
            if len(found) == window.most:
                break
    if not found:
        raise UserError(
            f"{name}: no document has {window.continued} scored tokens after {window.prompt} others; take fewer"
        )
    return torch.from_numpy(np.stack(found))


@torch.no_grad()
def share_reproduced(
    scorer: LossModel, windows: torch.Tensor, window: Window, micro_size: int, device: torch.device
) -> dict[str, Any]:
    """`reproduced` of how many `windows` (W, T), their `share` and its 95 % interval."""
    scorer.eval()
    found = []
    for ids in torch.split(windows.to(device), micro_size):
        positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
        hidden = scorer.hidden(ids, positions, None)[:, window.prompt - 1 : -1]
        targets = ids[:, window.prompt :]
        _, likeliest = nats_and_likeliest(hidden.flatten(0, 1), scorer.causal().lm_head, targets.flatten())
        found.append(likeliest.view(targets.shape).all(dim=1))
    reproduced, total = int(torch.cat(found).sum()), len(windows)
    return {
        "windows": total,
        "reproduced": reproduced,
        "share": reproduced / total,
        "interval": wilson(reproduced, total),
    }
