"""Continuous batching: between two steps texts join the batch, get one token each, and leave it.

One step prefills new prompts (a bounded number of tokens), then decodes one token of every other text in one forward,
whatever their adapters. Row i of the batch is slot i of the cache; when a text ends, the last row moves into its slot.
`Engine.step` is plain and synchronous; `start` runs it in a thread of its own.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from peftune.errors import PeftuneError, UserError
from peftune.inference.detokenize import Detokenizer
from peftune.inference.fair_queue import FairQueue
from peftune.inference.request import ModelProvider, OnOutput, Request, RequestHandle, slide
from peftune.inference.routing import THRESHOLD, Route, route
from peftune.inference.sequence import RunningSequence, sample
from peftune.model.decode.batch import DecodeBatch

_PREFILL_TOKENS = 512  # of prompts in a step, so that texts being generated wait little
_log = logging.getLogger(__name__)
_Hidden = list[tuple[RunningSequence, torch.Tensor]]
"""Rows that need their next token, each with its last hidden state (D,)."""


class Busy(PeftuneError):
    """The queue is full, or the engine is stopping; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class EngineLoad:
    """What an engine does now, and what it has done since it was made."""

    running: int
    waiting: int
    slots: int
    prompt_tokens: int
    tokens_written: int
    steps: int


class Engine:
    """Up to `slots` texts at a time, up to `queue` more waiting.

    Memory is bounded by `slots` times the cache of a full context. A seeded request gets the same text whatever else
    runs beside it.
    """

    def __init__(self, models: ModelProvider, slots: int = 8, queue: int = 256) -> None:
        if slots < 1 or queue < 1:
            raise UserError(f"slots is {slots} and queue is {queue}, expected 1 or more of each")
        self._models, self._spec = models, models.spec
        self._positions = models.spec.config.n_positions
        self._slots, self._queue = slots, queue
        self._cache = models.spec.kv_cache(slots)
        self._batch = DecodeBatch(slots, self._cache)
        self._rows: list[RunningSequence] = []
        self._waiting: FairQueue[RunningSequence] = FairQueue()
        self._jobs: deque[tuple[Future[Route], Callable[[], Route]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._stopped = False
        self._prompt_tokens = self._tokens_written = self._steps = 0
        self._seconds_a_text = 1.0  # moving average

    def submit(self, request: Request, on_output: OnOutput) -> RequestHandle:
        """Put a request into the queue; `on_output` is called in the engine's thread.

        Raises Busy where the queue is full or the engine stops, UserError for an adapter that is not there, ids that
        the model does not know, and a prompt that leaves no position to write to.
        """
        variant = self._models.variant(request.adapter)
        ids, seed, vocabulary = list(request.ids), request.settings.seed, self._spec.config.vocab_size
        if request.settings.beams > 1:
            raise UserError("beams: a bank samples or takes the likeliest token; beam search is generate.generate's")
        if not ids or min(ids) < 0 or max(ids) >= vocabulary:
            raise UserError(f"token ids must lie in 0 to {vocabulary - 1}, at least one of them")
        new = 0 if request.only_score else request.settings.max_new_tokens
        if not request.slide and len(ids) + new > self._positions:
            found = f"{len(ids)} tokens of the prompt and {new} to write"
            raise UserError(f"{found} exceed the model's {self._positions} positions")
        handle = RequestHandle(request, on_output, secrets.randbelow(2**32) if seed is None else seed)
        output = Detokenizer(self._models.tokenizer, request.settings)
        row = RunningSequence(handle, variant, output, slide(ids, self._positions) if request.slide else ids)
        with self._changed:
            self._refuse_when_closing()
            if len(self._waiting) >= self._queue:
                turns = len(self._waiting) / self._slots / 4  # until the queue will be shorter by a few
                raise Busy(f"{len(self._waiting)} requests are waiting already", max(1.0, turns * self._seconds_a_text))
            self._waiting.push(request.adapter, row)
            self._changed.notify_all()
        return handle

    def route(
        self, ids: Sequence[int], names: Sequence[str] | None = None, threshold: float = THRESHOLD
    ) -> Future[Route]:
        """Which adapter a prompt is likeliest under; computed between two steps. Raises Busy once the engine stops."""
        future: Future[Route] = Future()
        with self._changed:
            self._refuse_when_closing()
            self._jobs.append((future, lambda: route(self._models, ids, names, threshold)))
            self._changed.notify_all()
        return future

    @property
    def load(self) -> EngineLoad:
        """Running and waiting requests now; tokens and steps so far."""
        so_far = self._prompt_tokens, self._tokens_written, self._steps
        return EngineLoad(len(self._rows), len(self._waiting), self._slots, *so_far)

    def step(self) -> bool:
        """Bring every running text one token further; False where nothing is left to do."""
        self._do_jobs()
        self._schedule()
        if not self._rows:
            return False
        decoding = [slot for slot, row in enumerate(self._rows) if row.is_decoding]  # before prefilling makes it more
        self._choose([*self._prefill(), *self._decode(decoding)])
        self._release()
        self._steps += 1
        return self._has_rows

    def start(self) -> None:
        """Step in a thread of its own until `stop`."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let those that are here end for up to `drain_seconds`, cancel the rest."""
        assert self._thread is not None, "only an engine that was started is stopped"
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        while time.monotonic() < until and (self._has_rows or self._jobs):
            time.sleep(0.02)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    @property
    def _has_rows(self) -> bool:
        return bool(self._rows or len(self._waiting))

    def _refuse_when_closing(self) -> None:
        if self._closing:
            raise Busy("the engine is stopping", 5.0)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopped or self._has_rows or self._jobs):
                    self._changed.wait()
                if self._stopped:
                    break
            try:
                self.step()
            except Exception as error:  # a bug or no memory: requests in the batch fail, the others go on
                _log.exception("a step of the engine failed")
                for row in self._rows:
                    row.finish("error", f"{type(error).__name__} in the engine")
                self._rows.clear()
                self._cache = self._spec.kv_cache(self._slots)
                self._batch = DecodeBatch(self._slots, self._cache)
        for row in [*self._rows, *self._waiting.take(lambda _: True)]:
            row.finish("cancelled")
        self._rows.clear()
        for future, _ in self._jobs:
            future.set_exception(Busy("the engine is stopping", 5.0))

    def _do_jobs(self) -> None:
        while self._jobs:
            future, job = self._jobs.popleft()
            try:
                future.set_result(job())
            except Exception as error:  # raised again where the result is awaited
                future.set_exception(error)

    def _schedule(self) -> None:
        """Cancelled requests leave, waiting ones get the free slots."""
        with self._changed:
            dropped = self._waiting.take(lambda row: row.handle.cancelled)
        for row in [*dropped, *(row for row in self._rows if row.handle.cancelled)]:
            row.finish("cancelled")
        self._release()
        with self._changed:
            while len(self._rows) < self._slots and len(self._waiting):
                row = self._waiting.pop()
                row.started = time.monotonic()
                self._prompt_tokens += len(row.handle.request.ids)
                self._rows.append(row)

    def _prefill(self) -> _Hidden:
        """The next chunk of prompts, rows of one width and position together; returns those that are complete."""
        groups: dict[tuple[int, int], list[int]] = {}
        for slot, row in enumerate(self._rows):
            if not row.is_decoding:
                groups.setdefault((row.computed, row.width(self._positions)), []).append(slot)
        complete: _Hidden = []
        budget = _PREFILL_TOKENS
        for (start, width), slots in groups.items():
            if budget <= 0:
                break
            slots = slots[: max(1, budget // width)]
            budget -= len(slots) * width
            rows = [self._rows[slot] for slot in slots]
            chunks = [row.chunk() for row in rows]
            ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self._spec.device)
            hidden = self._batch.prefill([row.variant for row in rows], slots, ids, start)
            for row, chunk, states in zip(rows, chunks, hidden, strict=True):
                request = row.handle.request
                if request.echo and request.logprobs is not None and not row.output.ids:  # the prompt's are missing
                    row.score_prompt(self._batch.logits([row.variant], states[None, : len(chunk)])[0])
                row.add_computed(len(chunk), width)
                if row.computed == len(row.window):
                    complete.append((row, states[len(chunk) - 1]))
        return complete

    def _decode(self, slots: list[int]) -> _Hidden:
        """One token of each row in these slots, which hold what comes before it."""
        if not slots:
            return []
        rows = [self._rows[slot] for slot in slots]
        ids = torch.tensor([row.window[-1] for row in rows], device=self._spec.device)
        hidden = self._batch.decode([row.variant for row in rows], slots, ids, [row.computed for row in rows])
        for row in rows:
            row.add_computed(1, 1)
        return list(zip(rows, hidden, strict=True))

    def _choose(self, complete: _Hidden) -> None:
        """One more token for each row whose window is in the cache."""
        for row, _ in complete:
            if row.handle.request.only_score:
                row.finish("length", prompt=tuple(row.prompt))
        complete = [(row, states) for row, states in complete if row.finish_reason is None]
        if not complete:
            return
        rows, hidden = [row for row, _ in complete], torch.stack([states for _, states in complete])
        logits = self._batch.logits([row.variant for row in rows], hidden)
        finite = logits.sum(-1).isfinite().tolist()  # host sync, as reading the tokens is
        tokens = sample(rows, (logits if all(finite) else logits.nan_to_num())[:, : len(self._models.tokenizer)])
        for row, token, row_logits, good in zip(rows, tokens, logits, finite, strict=True):
            if good:
                self._tokens_written += 1
                row.accept(token, row_logits, self._models.end, self._positions)
            else:
                row.finish("error", f"the model's logits are not finite in {self._spec.dtype}; try fp32")

    def _release(self) -> None:
        """Free the slots of what has ended; the last rows move into them."""
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.finish_reason is None:
                continue
            self._seconds_a_text += 0.1 * (time.monotonic() - row.started - self._seconds_a_text)
            self._cache.free(slot, row.cache_length)
            last = self._rows.pop()
            if slot < len(self._rows):
                self._cache.move(len(self._rows), slot, last.cache_length)
                self._rows[slot] = last
