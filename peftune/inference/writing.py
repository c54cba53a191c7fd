"""Prompts in, continuations out, through an engine of one's own: what `AdapterBank.generate` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from peftune.errors import CheckFailed, UserError
from peftune.inference.engine import Engine
from peftune.inference.generate import Generation
from peftune.inference.request import OnOutput, Request, RequestOutput
from peftune.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from peftune.inference.bank import AdapterBank


def write(
    bank: AdapterBank,
    prompts: Sequence[str],
    settings: GenerationSettings,
    adapters: Sequence[str | None],
    on_text: Callable[[int, str], None] | None = None,
    slots: int = 8,
) -> list[Generation]:
    """Continue prompt i with `adapters[i]`; a full window slides on."""
    if settings.beams > 1:
        raise UserError("beams: a bank writes with sampling or greedily; use peftune generate for beam search")
    engine = Engine(bank, slots=min(slots, max(1, len(prompts))), queue=max(1, len(prompts)))
    updates: list[list[RequestOutput]] = [[] for _ in prompts]
    tickets = []
    for index, (prompt, name) in enumerate(zip(prompts, adapters, strict=True)):
        request = Request(tuple(bank.encode(prompt)), name, settings, slide=True)
        tickets.append(engine.submit(request, _listener(index, updates[index], on_text)))
    while engine.step():
        pass
    results = []
    for prompt, ticket, got in zip(prompts, tickets, updates, strict=True):
        last = got[-1]
        if last.finish_reason == "error":
            raise CheckFailed(last.error)
        assert last.finish_reason in ("stop", "length", "end"), last
        seed = ticket.seed if settings.sampling_temperature > 0 else None
        text, ids = "".join(update.text for update in got), tuple(i for update in got for i in update.ids)
        results.append(Generation(prompt, text, ids, last.finish_reason, len(ticket.request.ids), seed))
    return results


def _listener(index: int, updates: list[RequestOutput], on_text: Callable[[int, str], None] | None) -> OnOutput:
    def listen(update: RequestOutput) -> None:
        updates.append(update)
        if update.text and on_text is not None:
            on_text(index, update.text)

    return listen
