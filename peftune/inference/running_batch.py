"""The texts that are being generated: one forward gives each its next token, whatever their adapters.

Row i of the batch is slot i of the cache; when a text ends, the last row moves into its slot.
"""

from __future__ import annotations

import time

import torch

from peftune.inference.pace import Pace, chunk_tokens
from peftune.inference.request import ModelProvider, TokenLogprob
from peftune.inference.sequence import RunningSequence, sample, token_logprobs
from peftune.model.decode.batch import DecodeBatch, rows_of
from peftune.model.train.layers import to_device

_Hidden = tuple[list[RunningSequence], torch.Tensor]
"""Rows that need their next token, with the last hidden state of each (R, D)."""


class RunningBatch:
    """Up to `slots` texts, each in a slot of the cache; memory is `slots` times the cache of a full context."""

    def __init__(self, models: ModelProvider, slots: int) -> None:
        self._models, self._spec = models, models.spec
        self._positions = models.spec.config.n_positions
        self._pace, self._turn = Pace(chunk_tokens(models.spec.device)), 0
        self.slots = slots
        self.rows: list[RunningSequence] = []
        self._allocate()
        self.tokens_written = 0
        self.seconds_a_text = 1.0  # moving average

    @property
    def is_prefilling(self) -> bool:
        """Whether a prompt waits to be read."""
        return any(not row.is_decoding for row in self.rows)

    def admit(self, row: RunningSequence) -> None:
        """Give a text the next slot."""
        assert len(self.rows) < self.slots, "there is a free slot"
        row.started, row.turn = time.monotonic(), self._turn
        self.rows.append(row)

    def reset(self) -> None:
        """Forget all texts and begin with an empty cache; the old one goes first, since memory may be short.

        Raises what the device raises where it gives no memory, or computes nothing any more.
        """
        self.rows.clear()
        del self._batch, self._cache
        self._allocate()
        self.check_device()

    def check_device(self) -> None:
        """Raise what the device raises to every kernel since an error of CUDA; its memory can be had all the same."""
        torch.ones(1, device=self._spec.device).sum().item()

    def _allocate(self) -> None:
        self._cache = self._spec.kv_cache(self.slots)
        self._batch = DecodeBatch(self.slots, self._cache)

    def drop_cancelled(self) -> None:
        """Texts that nobody wants any more leave."""
        for row in self.rows:
            if row.handle.cancelled:
                row.finish("cancelled")
        self._release()

    def step(self, prefill: bool) -> None:
        """One token of every text whose prompt is read; with `prefill` also a part of the prompts that are not."""
        decoding = [slot for slot, row in enumerate(self.rows) if row.is_decoding]  # before prefilling makes it more
        self._choose([*(self._prefill() if prefill else ()), *([self._decode(decoding)] if decoding else ())])
        self._release()

    def _prefill(self) -> list[_Hidden]:
        """The next chunks of prompts, those first that waited longest; returns the rows whose prompt is complete.

        Rows of one width and position go together.
        """
        groups: dict[tuple[int, int], list[int]] = {}
        for slot in sorted(range(len(self.rows)), key=lambda slot: self.rows[slot].turn):
            row = self.rows[slot]
            if not row.is_decoding:
                groups.setdefault((row.computed, row.width(self._positions)), []).append(slot)
        complete: list[_Hidden] = []
        left = self._pace.tokens
        for number, ((start, width), slots) in enumerate(groups.items()):
            if number and left < width:
                break
            slots = sorted(slots[: max(1, left // width)])
            left -= len(slots) * width
            began = time.perf_counter()
            complete += self._prefill_rows(slots, start, width)
            self._pace.took(len(slots) * width, time.perf_counter() - began)
        return complete

    def _prefill_rows(self, slots: list[int], start: int, width: int) -> list[_Hidden]:
        rows = [self.rows[slot] for slot in slots]
        chunks = [row.chunk() for row in rows]
        padded = [chunk + [0] * (width - len(chunk)) for chunk in chunks]
        ids = to_device(torch.tensor(padded), self._spec.device)
        hidden = self._batch.prefill([row.variant for row in rows], slots, ids, start)
        complete: list[tuple[RunningSequence, torch.Tensor]] = []
        self._turn += 1
        for row, chunk, states in zip(rows, chunks, hidden, strict=True):
            row.turn = self._turn
            request = row.handle.request
            if request.echo and request.logprobs is not None and not row.output.ids:  # the prompt's are missing
                row.score_prompt(self._batch.logits([row.variant], states[None, : len(chunk)])[0])
            row.add_computed(len(chunk), width)
            if row.computed == len(row.window):
                complete.append((row, states[len(chunk) - 1]))
        return [([row for row, _ in complete], torch.stack([last for _, last in complete]))] if complete else []

    def _decode(self, slots: list[int]) -> _Hidden:
        """One token of each row in these slots, which hold what comes before it."""
        rows = [self.rows[slot] for slot in slots]
        ids, positions = [row.window[-1] for row in rows], [row.computed for row in rows]
        hidden = self._batch.decode([row.variant for row in rows], slots, ids, positions)
        for row in rows:
            row.add_computed(1, 1)
        return rows, hidden

    def _choose(self, complete: list[_Hidden]) -> None:
        """One more token for each row whose window is in the cache."""
        rows = [row for each, _ in complete for row in each]
        groups: dict[tuple[int, int], list[int]] = {}
        for number, row in enumerate(rows):
            if row.handle.request.only_score:
                row.finish_scored()
            else:
                groups.setdefault((row.known_tokens, row.variant.model.vocabulary), []).append(number)
        if groups:
            hidden = torch.cat([states for _, states in complete]) if len(complete) > 1 else complete[0][1]
        for (known, _), numbers in groups.items():
            self._choose_of([rows[number] for number in numbers], rows_of(hidden, numbers), known)

    def _choose_of(self, rows: list[RunningSequence], hidden: torch.Tensor, known: int) -> None:
        """The same for rows whose models have equally many tokens, `known` of them to the tokenizer."""
        logits = self._batch.logits([row.variant for row in rows], hidden)
        finite = logits.sum(-1).isfinite()
        tokens = sample(rows, logits.where(finite[:, None], 0.0)[:, :known], self._models.end)
        chosen = torch.stack([tokens, finite.to(tokens.dtype)]).tolist()  # host sync here, the only one of a token
        scored = self._score(rows, chosen[0], logits)
        for row, token, good in zip(rows, *chosen, strict=True):
            if good:
                self.tokens_written += 1
                row.accept(token, scored.get(row), self._models.end, self._positions)
            else:
                row.finish("error", f"the model's logits are not finite in {self._spec.dtype}; try fp32")

    def _score(
        self, rows: list[RunningSequence], tokens: list[int], logits: torch.Tensor
    ) -> dict[RunningSequence, TokenLogprob]:
        """The token of each row that asks for its log-probability: on a GPU all that name as many others at once."""
        groups: dict[tuple[int, int], list[int]] = {}
        for number, row in enumerate(rows):
            if (count := row.handle.request.logprobs) is not None:
                alone = number if logits.device.type == "cpu" else 0  # last bits are its own
                groups.setdefault((count, alone), []).append(number)
        found: dict[RunningSequence, TokenLogprob] = {}
        for (count, _), numbers in groups.items():
            nats = rows_of(logits, numbers).log_softmax(-1)
            each = token_logprobs(nats, [tokens[number] for number in numbers], count)
            found |= zip((rows[number] for number in numbers), each, strict=True)
        return found

    def _release(self) -> None:
        """Free the slots of what has ended; the last rows move into them."""
        for slot in reversed(range(len(self.rows))):
            row = self.rows[slot]
            if row.finish_reason is None:
                continue
            self.seconds_a_text += 0.1 * (time.monotonic() - row.started - self.seconds_a_text)
            self._cache.free(slot, row.cache_length)
            last = self.rows.pop()
            if slot < len(self.rows):
                self._cache.move(len(self.rows), slot, last.cache_length)
                self.rows[slot] = last
