"""A request in its slot: what the model has read of it, and how a row of logits becomes its next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from peftune.inference.decode import Row, slide
from peftune.inference.request import RequestHandle, RequestOutput, TokenLogprob
from peftune.inference.sampling import next_tokens
from peftune.model.decode.batch import ModelVariant

CHUNK = 256  # tokens of a prompt that are read at a time: others wait no longer than that takes
_FINE, _COARSE = 16, 64  # widths that prompts are padded to, up to _COARSE and beyond


@dataclass(eq=False)
class RunningSequence:
    """One row of the batch. `read` tokens of `text.window` are in the cache, padding reached up to `touched`.

    `began` is when it got its slot, on the monotonic clock.
    """

    ticket: RequestHandle
    function: ModelVariant
    text: Row
    read: int = 0
    touched: int = 0
    began: float = 0.0
    prompt: list[TokenLogprob] = field(default_factory=list)
    seen: torch.Tensor | None = None

    @property
    def writes(self) -> bool:
        """All but the last token of the window has been read: the next forward is one token."""
        return 0 < self.read == len(self.text.window) - 1

    @property
    def wants_prompt(self) -> bool:
        """Log-probabilities of the prompt are asked for, and not complete."""
        request = self.ticket.request
        return request.echo and request.logprobs is not None and not self.text.ids

    def chunk(self) -> list[int]:
        """The tokens to be read next."""
        return self.text.window[self.read : self.read + CHUNK]

    def width(self, positions: int) -> int:
        """What the next chunk is padded to: it depends on this row alone, so that its numbers do."""
        length = len(self.chunk())
        step = _FINE if length <= _COARSE else _COARSE
        return min(-(-length // step) * step, positions - self.read)

    def score_prompt(self, logits: torch.Tensor) -> None:
        """Take the logits (T, V) of the tokens just read; each says how likely the token after it was."""
        ids, count = self.text.window, self.ticket.request.logprobs or 0
        if not self.prompt:
            self.prompt.append(TokenLogprob(ids[0], None))
        following = ids[self.read + 1 : self.read + 1 + len(logits)]
        nats = logits[: len(following)].log_softmax(-1)
        self.prompt += [logprob(row, token, count) for row, token in zip(nats, following, strict=True)]

    def accept(self, token: int, logits: torch.Tensor, end: int, positions: int) -> RequestOutput:
        """The next token has been chosen; what there is to tell of it."""
        request, text = self.ticket.request, self.text
        ended = token == end
        piece = text.accept(token, end, request.settings.max_new_tokens)
        if text.finish_reason is None and len(text.window) > positions:
            if request.slide:
                text.window, self.read = slide(text.window, positions), 0
            else:
                text.finish_reason = "length"
                piece += text.close()
        ids = () if ended else (token,)
        logprobs: tuple[TokenLogprob, ...] = ()
        if request.logprobs is not None and not ended:
            logprobs = (logprob(logits.log_softmax(-1), token, request.logprobs),)
        if self.seen is not None:
            self.seen[token] = True
        prompt, self.prompt = tuple(self.prompt), []
        return RequestOutput(piece, ids, logprobs, prompt, text.finish_reason)


def logprob(nats_V: torch.Tensor, token: int, count: int) -> TokenLogprob:
    """A token's log-probability with the `count` likeliest beside it."""
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = nats_V.topk(min(count, len(nats_V)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(nats_V[token]), top)


def choose(rows: Sequence[RunningSequence], logits_RV: torch.Tensor) -> list[int]:
    """The next token of every row, each by its own settings and from its own random stream."""
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for i, row in enumerate(rows):
        s = row.ticket.request.settings
        groups.setdefault((s.sampling_temperature, s.top_k, s.top_p, s.repetition_penalty), []).append(i)
    chosen = [0] * len(rows)
    for (temperature, top_k, top_p, penalty), members in groups.items():
        tokens = next_tokens(
            logits_RV if len(members) == len(rows) else logits_RV[members],
            [rows[i].text.generator for i in members],
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=penalty,
            seen_BV=_seen([rows[i] for i in members], logits_RV) if penalty != 1 else None,
        )
        for i, token in zip(members, tokens.tolist(), strict=True):
            chosen[i] = token
    return chosen


def _seen(rows: Sequence[RunningSequence], logits_RV: torch.Tensor) -> torch.Tensor:
    for row in rows:
        if row.seen is None:
            row.seen = torch.zeros(logits_RV.shape[1], dtype=torch.bool, device=logits_RV.device)
            row.seen[row.text.context] = True
    return torch.stack([row.seen for row in rows if row.seen is not None])
