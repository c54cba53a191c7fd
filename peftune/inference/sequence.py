"""A request in its slot: how much of it is in the cache, and how a row of logits becomes its next token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from peftune.inference.detokenize import Detokenizer
from peftune.inference.request import RequestHandle, RequestOutput, TokenLogprob, slide
from peftune.inference.sampling.next_token import next_tokens
from peftune.inference.sampling.penalties import LogitAdjuster
from peftune.inference.settings import FinishReason
from peftune.model.decode.batch import ModelVariant
from peftune.model.train.layers import to_device

_FINE, _COARSE = 16, 64  # widths that prompts are padded to, up to _COARSE and beyond


@dataclass(eq=False)
class RunningSequence:
    """One row of the batch.

    `window` is what the model sees of prompt and output, `computed` of its tokens are in the cache; padding reached up
    to `cache_length`. `started` is when it got its slot, on the monotonic clock. `chunk_tokens` of a prompt are read
    in one forward, the first `known_tokens` rows of the head are tokens, and `turn` counts the forwards of the batch
    before this row's last one, or before it came.
    """

    handle: RequestHandle
    variant: ModelVariant
    output: Detokenizer
    window: list[int]
    chunk_tokens: int
    known_tokens: int
    computed: int = 0
    cache_length: int = 0
    turn: int = 0
    finish_reason: FinishReason | None = None
    prompt: list[TokenLogprob] = field(default_factory=list)
    adjuster: LogitAdjuster | None = None

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.handle.seed)

    @property
    def started(self) -> float:
        """When it got its slot, on the monotonic clock; the request's own client may see it too."""
        assert self.handle.started is not None, "only a sequence with a slot is asked"
        return self.handle.started

    @started.setter
    def started(self, now: float) -> None:
        self.handle.started = now

    @property
    def is_decoding(self) -> bool:
        """All but the last token of the window are in the cache: the next forward is one token."""
        return 0 < self.computed == len(self.window) - 1

    def chunk(self) -> list[int]:
        """The next tokens to prefill."""
        return self.window[self.computed : self.computed + self.chunk_tokens]

    def width(self, positions: int) -> int:
        """What the next chunk is padded to: it depends on this row alone, so that its numbers do."""
        length = len(self.chunk())
        step = _FINE if length <= _COARSE else _COARSE
        return min(-(-length // step) * step, positions - self.computed)

    def add_computed(self, tokens: int, width: int) -> None:
        """So many more tokens are in the cache, with padding up to `width`."""
        self.cache_length = max(self.cache_length, self.computed + width)
        self.computed += tokens

    def score_prompt(self, logits: torch.Tensor) -> None:
        """Take the logits (T, V) of a chunk of the prompt; each says how likely the token after it was."""
        ids, count = self.window, self.handle.request.logprobs or 0
        if not self.prompt:
            self.prompt.append(TokenLogprob(ids[0], None))
        following = ids[self.computed + 1 : self.computed + 1 + len(logits)]
        nats = logits[: len(following)].log_softmax(-1)
        self.prompt += token_logprobs(nats, following, count)

    def accept(self, token: int, scored: TokenLogprob | None, end: int, positions: int) -> None:
        """Append the token that was chosen, and hand it to the request's listener, `scored` where asked for."""
        request, output = self.handle.request, self.output
        before, text = len(output.ids), output.push(token, end)
        ids = tuple(output.ids[before:])
        self.window += ids
        if output.finish_reason is None and len(self.window) > positions:
            if request.slide:
                self.window, self.computed = slide(self.window, positions), 0
            else:
                text += output.finish("length")
        logprobs = (scored,) if scored is not None and ids else ()
        if self.adjuster is not None and ids:
            self.adjuster.add(token)
        prompt, self.prompt = tuple(self.prompt), []
        self.finish_reason = output.finish_reason
        self.handle.on_output(RequestOutput(text, ids, logprobs, prompt, self.finish_reason))

    def finish_scored(self) -> None:
        """End a request of which nothing but the prompt was to be scored."""
        self.finish_reason = "length"
        text = self.output.finish("length")  # a character that the prompt begins and nothing completes
        self.handle.on_output(RequestOutput(text, prompt=tuple(self.prompt), finish_reason="length"))

    def finish(self, reason: FinishReason, error: str = "") -> None:
        """End the request without another token."""
        self.finish_reason = reason
        self.handle.on_output(RequestOutput(finish_reason=reason, error=error))


def token_logprobs(nats_TV: torch.Tensor, tokens: Sequence[int], count: int) -> list[TokenLogprob]:
    """Each token's log-probability and rank, with the `count` likeliest beside it."""
    own = nats_TV.gather(1, to_device(torch.tensor(tokens, dtype=torch.int64), nats_TV.device)[:, None])
    values, ids = nats_TV.topk(min(count, nats_TV.shape[1]))
    better = (nats_TV > own).sum(1, keepdim=True)
    rows = torch.cat([part.double() for part in (own, better, ids, values)], dim=1).tolist()  # host sync here
    k = ids.shape[1]
    return [
        TokenLogprob(token, own, tuple(zip(map(int, beside[:k]), beside[k:], strict=True)), int(better) + 1)
        for token, (own, better, *beside) in zip(tokens, rows, strict=True)
    ]


def sample(rows: Sequence[RunningSequence], logits_RV: torch.Tensor, end: int) -> torch.Tensor:
    """The next token of every row, (R,) int64, each by its own settings and from its own random stream.

    `end` is the id of `<|endoftext|>`.
    """
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    adjusted: list[torch.Tensor] | None = None
    for i, row in enumerate(rows):
        s = row.handle.request.settings
        groups.setdefault((s.sampling_temperature, s.top_k, s.top_p, s.min_p), []).append(i)
        if row.adjuster is None:
            row.adjuster = LogitAdjuster(s, row.handle.request.ids, end)
        if row.adjuster.is_needed:
            adjusted = adjusted or list(logits_RV.float())
            adjusted[i] = row.adjuster.adjust(logits_RV[i])
    logits_RV = logits_RV if adjusted is None else torch.stack(adjusted)
    if len(groups) == 1:
        return next_tokens(logits_RV, [row.generator for row in rows], *next(iter(groups)))
    chosen = torch.empty(len(rows), dtype=torch.int64, device=logits_RV.device)
    for filters, members in groups.items():
        at = to_device(torch.tensor(members), logits_RV.device)
        chosen[at] = next_tokens(logits_RV[at], [rows[i].generator for i in members], *filters)
    return chosen
