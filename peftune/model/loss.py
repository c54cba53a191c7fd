"""The loss that is trained and measured: summed cross entropy of a batch, in nats.

`LossModel` is the reference through Transformers and PEFT; `model.train.forward` computes the same faster. Both end in
`summed_nats`, which never holds all logits.

Legend: B rows, T columns, N scored positions, D hidden width, V vocabulary, C rows of one chunk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn import functional as F
from transformers import GPT2LMHeadModel

from peftune.model.train import cross_entropy


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
        """Summed loss in nats (float64 scalar) over the positions with a target ≥ 0; all arguments (B, T) int64.

        Without `segments` each row is one document: no mask, and SDPA's causal kernel (flash attention on a GPU).
        """
        hidden = self.hidden(ids, positions, segments).flatten(0, 1)
        (scored,) = torch.nonzero(targets.flatten() >= 0, as_tuple=True)  # host sync here, instead of one a mask
        smoothing = self.smoothing if self.training else 0.0
        return summed_nats(hidden[scored], self.causal().lm_head, targets.flatten()[scored], smoothing)

    def hidden(self, ids: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor | None) -> torch.Tensor:
        """What the head reads, (B, T, D); arguments as in `forward`."""
        core = self.causal()
        return core.transformer(  # type: ignore[no-any-return]
            inputs_embeds=self._embedded(core, ids, segments),
            position_ids=positions,
            attention_mask=None if segments is None else document_mask(segments),
            use_cache=False,
        ).last_hidden_state

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


def document_mask(segments: torch.Tensor) -> torch.Tensor:
    """Attention mask (B, 1, T, T), True where row i may look at column j: j ≤ i and both of one document.

    `segments` (B, T) numbers the documents of a row. Positions without a document (-1) see each other, so that no
    row of the mask is empty and softmax stays finite; they are never scored. Restarted positions alone do not
    separate documents in GPT-2, only a mask does.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    return (segments[:, None, :, None] == segments[:, None, None, :]) & causal


def add_neftune_noise(
    embedded: torch.Tensor, lengths: torch.Tensor, strength: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """NEFTune (Jain et al., 2310.05914): embeddings (…, D) with uniform noise in ±strength / sqrt(n·D).

    `lengths` (…) holds n, the tokens of the document that each is in, not of the row, so that packing does not matter.
    """
    bound = strength / torch.sqrt(lengths * float(embedded.shape[-1]))
    noise = torch.empty_like(embedded).uniform_(-1, 1, generator=generator)
    return embedded + noise * bound[..., None].to(embedded.dtype)


def summed_nats(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Sum over N of -log p(target): float64 scalar, differentiable in `hidden` (N, D) and in a trainable head.

    With `smoothing` each target's probability is 1 - smoothing, and smoothing is spread evenly over the vocabulary
    (Szegedy et al., 1512.00567).
    """
    return nats_of_parts(hidden, head, targets, [len(targets)], [smoothing]).squeeze(0)


def nats_of_parts(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, counts: list[int], smoothing: Sequence[float]
) -> torch.Tensor:
    """`summed_nats` of each part of the rows, `counts` of them one after another: (parts,) float64.

    A plain frozen `nn.Linear` head takes the short way: its gradient with respect to `hidden` is computed in the
    forward, chunk by chunk, so that logits are made once (4VD instead of 6VD operations a position) and dropped at
    once.
    """
    if is_frozen(head):
        return _FrozenHead.apply(hidden, head.weight, targets, counts, smoothing)  # type: ignore[no-any-return,no-untyped-call]
    return torch.stack(
        [
            _nats_of(rows, head, wanted, share)
            for rows, wanted, share in zip(
                torch.split(hidden, counts), torch.split(targets, counts), smoothing, strict=True
            )
        ]
    )


def is_frozen(head: nn.Module) -> bool:
    """Whether a head is a plain product with weights that are not trained."""
    return type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad


def _nats_of(hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor, smoothing: float) -> torch.Tensor:
    chunk = chunk_rows(hidden.device)
    parts = [
        F.cross_entropy(head(rows).float(), wanted, reduction="sum", label_smoothing=smoothing).double()
        for rows, wanted in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
    ]
    return torch.stack(parts).sum() if parts else hidden.sum().double() * 0.0


@torch.no_grad()
def nats_and_likeliest(
    hidden: torch.Tensor, head: nn.Module, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """-log p(target), (N,) float64, and whether the target is the likeliest token, (N,) bool, for `hidden` (N, D)."""
    nats = torch.empty(len(targets), dtype=torch.float64, device=hidden.device)
    likeliest = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    chunk = chunk_rows(hidden.device)
    for first in range(0, len(targets), chunk):
        wanted, part = targets[first : first + chunk], slice(first, first + chunk)
        logits = head(hidden[part]).float()
        nats[part] = F.cross_entropy(logits, wanted, reduction="none")
        likeliest[part] = logits.argmax(dim=1) == wanted
    return nats, likeliest


def chunk_rows(device: torch.device) -> int:
    """Rows of logits at a time: 128 x 50,257 in fp32 are 26 MB, about a CPU's cache; a GPU wants larger products."""
    return 128 if device.type == "cpu" else 1024


def _for_products(like: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A matrix (rows, columns) to be filled; on a GPU, in 16 bits, each row begins at a multiple of 64 numbers.

    Rows of 50,257 numbers begin at odd addresses, which keeps matrix products off the GPU's fast kernels.
    """
    aligned = like.device.type == "cuda" and like.dtype.itemsize == 2
    width = -(-columns // 64) * 64 if aligned else columns
    return like.new_empty(rows, width)[:, :columns]


def _in_place_for(logits: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor, Any, torch.Tensor, bool], None]:
    """What computes the same as `cross_entropy.by_kernel`, of logits like these, of as many rows at most."""
    if logits.device.type == "cuda" and not cross_entropy.reason_against(logits.device, logits.dtype):
        return cross_entropy.by_kernel
    fits = logits.dtype == torch.float32 and logits.is_contiguous()
    return partial(by_torch, None if fits else torch.empty_like(logits, dtype=torch.float32))


def by_torch(
    room: torch.Tensor | None, logits: torch.Tensor, targets: torch.Tensor, share: cross_entropy.Share,
    nats: torch.Tensor, wanted: bool,
) -> None:  # fmt: skip
    """The same by torch's operations, with `room` (C, V) in fp32 for probabilities, or in the place of fp32 logits."""
    p, chosen = logits if room is None else room[: len(logits)], targets[:, None]
    smoothed = isinstance(share, torch.Tensor) or share != 0
    top, picked = logits.amax(dim=1, keepdim=True).float(), logits.gather(1, chosen).float()
    mean = logits.mean(dim=1, keepdim=True, dtype=torch.float32) if smoothed else picked
    torch.softmax(p if room is None else p.copy_(logits), dim=1, out=p)
    log_z = top - p.amax(dim=1, keepdim=True).log()  # the largest probability is exp(top - log z)
    torch.sub(log_z - (1 - share) * picked, share * mean, out=nats)
    if wanted:
        p.scatter_add_(1, chosen, share - 1 if isinstance(share, torch.Tensor) else torch.full_like(top, share - 1))
        p.sub_(share / logits.shape[1]) if smoothed else None
        logits.copy_(p) if room is not None else None


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, counts: list[int],
        smoothing: Sequence[float],
    ) -> torch.Tensor:  # fmt: skip
        weight = weight.to(hidden.dtype)
        shares: Any = smoothing[0] if len({*smoothing}) == 1 else _each(hidden, counts, smoothing)
        nats = torch.empty(len(hidden), 1, dtype=torch.float32, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype  # scaled only in the backward
        gradient = torch.empty_like(hidden, dtype=dtype) if wanted else None
        chunk = max(1, min(chunk_rows(hidden.device), len(hidden)))
        logits_CV = _for_products(hidden, chunk, len(weight))  # made once: fresh memory costs more than the softmax
        in_place = _in_place_for(logits_CV)
        for here in _chunks(counts, chunk, hidden.device):
            logits = torch.mm(hidden[here], weight.T, out=logits_CV[: here.stop - here.start])
            share = shares[here] if torch.is_tensor(shares) else shares
            in_place(logits, targets[here], share, nats[here], wanted)
            if gradient is not None:
                gradient[here] = logits @ weight
        ctx.save_for_backward(gradient)
        ctx.dtype, ctx.counts = hidden.dtype, counts
        return torch.stack([part.sum(dtype=torch.float64) for part in torch.split(nats, counts)])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        scale = upstream.to(torch.float32)
        if len(scale) > 1:
            scale = torch.cat([one.expand(count) for one, count in zip(scale, ctx.counts, strict=True)])[:, None]
        return (gradient * scale).to(ctx.dtype), None, None, None, None


def _chunks(counts: Sequence[int], most: int, device: torch.device) -> Iterator[slice]:
    """Rows that are multiplied at once.

    On a CPU those of one part, so that they are as they would be without the others: how a product of few rows is
    rounded depends on how many there are.
    """
    parts = counts if device.type == "cpu" else [sum(counts)]
    for begin, count in zip(itertools.accumulate(parts, initial=0), parts, strict=False):
        for first in range(begin, begin + count, most):
            yield slice(first, min(first + most, begin + count))


def _each(like: torch.Tensor, counts: list[int], values: Sequence[float]) -> torch.Tensor:
    """A column with the value of each part in its rows, (N, 1) float32."""
    parts = [like.new_full((count, 1), value, dtype=torch.float32) for count, value in zip(counts, values, strict=True)]
    return torch.cat(parts)
