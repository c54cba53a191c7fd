"""Continuous batching: at every token boundary texts join the batch, get one token each, and leave it.

One step reads what new prompts need (a bounded number of tokens), then writes one token of every other text in one
forward, whatever their adapters. Row i of the batch is slot i of the cache; when a text ends, the last row moves into
its place. `Engine.step` is plain and synchronous; `start` runs it in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftune.errors import PeftuneError, UserError
from peftune.inference.decode import row_of, slide
from peftune.inference.fair_queue import FairQueue
from peftune.inference.request import OnOutput, Request, RequestHandle, RequestOutput
from peftune.inference.routing import THRESHOLD, Route, route
from peftune.inference.sequence import RunningSequence, choose
from peftune.model.decode.batch import DecodeBatch

if TYPE_CHECKING:
    from peftune.inference.bank import AdapterBank

_READ = 512  # tokens of prompts a step, so that texts being written wait little
_log = logging.getLogger(__name__)


class Busy(PeftuneError):
    """The queue is full, or the engine is stopping; try again after `retry_after` seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Load:
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

    def __init__(self, bank: AdapterBank, slots: int = 8, queue: int = 256) -> None:
        if slots < 1 or queue < 1:
            raise UserError(f"slots is {slots} and queue is {queue}, expected 1 or more of each")
        self.bank = bank
        self._slots, self._queue = slots, queue
        self._batch = DecodeBatch(bank.plan, slots)
        self._rows: list[RunningSequence] = []
        self._waiting: FairQueue[RunningSequence] = FairQueue()
        self._jobs: deque[tuple[Future[Route], Callable[[], Route]]] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closing = self._stopped = False
        self._prompt_tokens = self._tokens_written = self._steps = 0
        self._seconds_a_text = 1.0  # of late

    def submit(self, request: Request, on_output: OnOutput) -> RequestHandle:
        """Put a request into the queue; `on_output` is called in the engine's thread.

        Raises Busy where the queue is full or the engine stops, UserError for an adapter that is not there, ids that
        the model does not know, and a prompt that leaves no position to write to.
        """
        self._check(request)
        window = slide(list(request.ids), self.bank.config.n_positions) if request.slide else list(request.ids)
        text = row_of(0, list(request.ids), window, self.bank.tokenizer, request.settings)
        ticket = RequestHandle(request, on_output, text.generator.initial_seed())
        running = RunningSequence(ticket, self.bank.function(request.adapter), text)
        with self._changed:
            if self._closing:
                raise Busy("the engine is stopping", 5.0)
            if len(self._waiting) >= self._queue:
                raise Busy(f"{len(self._waiting)} requests are waiting already", self._retry_after())
            self._waiting.push(request.adapter, running)
            self._changed.notify_all()
        return ticket

    def route(
        self, ids: tuple[int, ...], names: tuple[str, ...] | None = None, threshold: float = THRESHOLD
    ) -> Future[Route]:
        """Which adapter a prompt is likeliest under; computed between two steps. Raises Busy once the engine stops."""
        future: Future[Route] = Future()
        with self._changed:
            if self._closing:
                raise Busy("the engine is stopping", 5.0)
            self._jobs.append((future, lambda: route(self.bank, ids, names, threshold)))
            self._changed.notify_all()
        return future

    @property
    def load(self) -> Load:
        """RunningSequence and waiting now; tokens and steps so far."""
        return Load(
            len(self._rows), len(self._waiting), self._slots, self._prompt_tokens, self._tokens_written, self._steps
        )

    def step(self) -> bool:
        """Bring every running text one token further; False where nothing is left to do."""
        self._do_jobs()
        self._drop_cancelled()
        self._admit()
        if not self._rows:
            return False
        ready = [row for row in self._rows if row.writes]
        fresh = [*self._read_prompts(), *self._write_tokens(ready)]
        if fresh:
            self._choose(fresh)
        self._release()
        self._steps += 1
        return bool(self._rows or len(self._waiting))

    def start(self) -> None:
        """Step in a thread of its own until `stop`."""
        assert self._thread is None, "an engine starts once"
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def stop(self, drain_seconds: float) -> None:
        """Take no more requests, let those that are here end for up to `drain_seconds`, cancel what is left."""
        assert self._thread is not None, "only an engine that was started is stopped"
        until = time.monotonic() + drain_seconds
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        while time.monotonic() < until and (self._rows or len(self._waiting) or self._jobs):
            time.sleep(0.02)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _check(self, request: Request) -> None:
        ids, most, positions = request.ids, request.settings.max_new_tokens, self.bank.config.n_positions
        if request.adapter is not None:
            self.bank.get(request.adapter)
        if request.settings.beams > 1:
            raise UserError("beams: an engine samples or takes the likeliest token; it has no beam search")
        if not ids or min(ids) < 0 or max(ids) >= self.bank.config.vocab_size:
            raise UserError(f"token ids must lie in 0 to {self.bank.config.vocab_size - 1}, at least one of them")
        needed = len(ids) + (0 if request.only_score else most)
        if not request.slide and needed > positions:
            found = f"{len(ids)} tokens of the prompt and {needed - len(ids)} to write"
            raise UserError(f"{found} exceed the model's {positions} positions")

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._stopped or self._rows or len(self._waiting) or self._jobs):
                    self._changed.wait()
                if self._stopped:
                    break
            try:
                self.step()
            except Exception as error:  # a bug or no memory: those in the batch are told, the others go on
                _log.exception("a step of the engine failed")
                for row in self._rows:
                    row.ticket.on_output(
                        RequestOutput(finish_reason="error", error=f"{type(error).__name__} in the engine")
                    )
                self._rows.clear()
                self._batch = DecodeBatch(self.bank.plan, self._slots)
        for row in [*self._rows, *self._waiting.take(lambda _: True)]:
            row.ticket.on_output(RequestOutput(finish_reason="cancelled"))
        self._rows.clear()
        for future, _ in self._jobs:
            future.set_exception(Busy("the engine is stopping", 5.0))

    def _do_jobs(self) -> None:
        while self._jobs:
            future, job = self._jobs.popleft()
            try:
                future.set_result(job())
            except Exception as error:  # whoever waits for it raises it
                future.set_exception(error)

    def _drop_cancelled(self) -> None:
        with self._changed:
            dropped = self._waiting.take(lambda row: row.ticket.cancelled)
        for row in dropped:
            row.ticket.on_output(RequestOutput(finish_reason="cancelled"))
        for row in self._rows:
            if row.ticket.cancelled:
                row.text.finish_reason = row.text.finish_reason or "length"
                row.ticket.on_output(RequestOutput(finish_reason="cancelled"))
        self._release()

    def _admit(self) -> None:
        with self._changed:
            while len(self._rows) < self._slots and len(self._waiting):
                row = self._waiting.pop()
                row.began = time.monotonic()
                self._prompt_tokens += len(row.ticket.request.ids)
                self._rows.append(row)

    def _read_prompts(self) -> list[tuple[RunningSequence, torch.Tensor]]:
        """Read the next chunk of prompts, rows of one width and place together; the last hidden states of the done."""
        positions = self.bank.config.n_positions
        groups: dict[tuple[int, int], list[int]] = {}
        for slot, row in enumerate(self._rows):
            if not row.writes:
                groups.setdefault((row.read, row.width(positions)), []).append(slot)
        done: list[tuple[RunningSequence, torch.Tensor]] = []
        budget = _READ
        for (start, width), slots in groups.items():
            take = slots[: max(1, budget // width)]
            budget -= len(take) * width
            done += self._read(take, start, width)
            if budget <= 0:
                break
        return done

    def _read(self, slots: list[int], start: int, width: int) -> list[tuple[RunningSequence, torch.Tensor]]:
        rows = [self._rows[slot] for slot in slots]
        chunks = [row.chunk() for row in rows]
        ids = torch.tensor([chunk + [0] * (width - len(chunk)) for chunk in chunks], device=self.bank.plan.device)
        hidden = self._batch.prefill([row.function for row in rows], slots, ids, start)
        done = []
        for row, chunk, states in zip(rows, chunks, hidden, strict=True):
            row.touched = max(row.touched, start + width)
            if row.wants_prompt:
                row.score_prompt(self._batch.logits([row.function] * len(chunk), states[: len(chunk)]))
            row.read += len(chunk)
            if row.read == len(row.text.window):
                done.append((row, states[len(chunk) - 1]))
        return done

    def _write_tokens(self, ready: list[RunningSequence]) -> list[tuple[RunningSequence, torch.Tensor]]:
        if not ready:
            return []
        slots = [slot for slot, row in enumerate(self._rows) if row in ready]
        ids = torch.tensor([row.text.window[-1] for row in ready], device=self.bank.plan.device)
        hidden = self._batch.decode([row.function for row in ready], slots, ids, [row.read for row in ready])
        for row in ready:
            row.read += 1
            row.touched = max(row.touched, row.read)
        return list(zip(ready, hidden, strict=True))

    def _choose(self, fresh: list[tuple[RunningSequence, torch.Tensor]]) -> None:
        """One more token for each row whose window has been read, from its last hidden state (D,)."""
        scored = [row for row, _ in fresh if row.ticket.request.only_score]
        for row in scored:
            row.text.finish_reason = "length"
            row.ticket.on_output(RequestOutput(prompt=tuple(row.prompt), finish_reason="length"))
        fresh = [(row, states) for row, states in fresh if not row.ticket.request.only_score]
        if not fresh:
            return
        rows = [row for row, _ in fresh]
        logits = self._batch.logits([row.function for row in rows], torch.stack([states for _, states in fresh]))
        finite = logits.sum(-1).isfinite().tolist()  # host sync, as reading the tokens is
        tokens = choose(rows, (logits if all(finite) else logits.nan_to_num())[:, : len(self.bank.tokenizer)])
        for row, token, row_logits, good in zip(rows, tokens, logits, finite, strict=True):
            if not good:
                row.text.finish_reason = "length"
                error = f"the model's logits are not finite in {self.bank.plan.dtype}; try --precision fp32"
                row.ticket.on_output(RequestOutput(finish_reason="error", error=error))
                continue
            self._tokens_written += 1
            row.ticket.on_output(row.accept(token, row_logits, self.bank.end, self.bank.config.n_positions))

    def _release(self) -> None:
        """Free the slots of what has ended; the last rows move into them."""
        for slot in reversed(range(len(self._rows))):
            row = self._rows[slot]
            if row.text.finish_reason is None:
                continue
            self._seconds_a_text += 0.1 * (time.monotonic() - row.began - self._seconds_a_text)
            self._batch.forget(slot, row.touched)
            last = self._rows.pop()
            if slot < len(self._rows):
                self._batch.move(len(self._rows), slot, last.touched)
                self._rows[slot] = last

    def _retry_after(self) -> float:
        """Seconds until the queue will be shorter by a few, from how long texts took of late."""
        return max(1.0, self._seconds_a_text * len(self._waiting) / self._slots / 4)
