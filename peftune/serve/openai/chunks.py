"""From the engine's updates to what a client is told of one choice, piece by piece; all pieces join to the whole."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from peftune.inference.request import RequestOutput, TokenLogprob
from peftune.serve.openai.token_text import Offsets, TokenText

_LEAST = -9999.0  # OpenAI's for a token without probability: JSON has no infinity
_REASONS = {"stop": "stop", "end": "stop", "length": "length"}


@dataclass(frozen=True)
class Spelled:
    """A token as text and bytes with its log-probability."""

    text: str
    raw: bytes
    logprob: float | None


@dataclass(frozen=True)
class Scored:
    """A token at its place in the text, with the likeliest ones there; `top` may lack the token itself."""

    token: Spelled
    top: tuple[Spelled, ...]
    offset: int


@dataclass(frozen=True)
class Chunk:
    """What is new of one choice: `ids` written, `scored` ones (with echo the prompt's too), OpenAI's finish reason."""

    text: str = ""
    ids: tuple[int, ...] = ()
    scored: tuple[Scored, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    finish_reason: str | None = None

    @property
    def is_empty(self) -> bool:
        """Nothing that anybody waits for."""
        return not (self.text or self.scored or self.ids or self.finish_reason)


def join(pieces: Iterable[Chunk]) -> Chunk:
    """All pieces of a choice as one."""
    pieces = list(pieces)
    return Chunk(
        "".join(piece.text for piece in pieces),
        tuple(id for piece in pieces for id in piece.ids),
        tuple(scored for piece in pieces for scored in piece.scored),
        next((piece.prompt_ids for piece in pieces if piece.prompt_ids is not None), None),
        pieces[-1].finish_reason if pieces else None,
    )


class ChoiceFormatter:
    """One choice as it is written.

    `prompt` is the prompt's text and `ids` its tokens as the client counts them; with `echo` it is told first. Places
    count from the prompt's beginning, told or not. `lead` is left out where the text begins with it.
    """

    def __init__(self, spelling: TokenText, prompt: str, ids: Sequence[int], echo: bool, lead: str = "") -> None:
        self._spelling = spelling
        self._offsets = Offsets(spelling, 0 if echo else len(prompt))
        self._echo = prompt if echo else ""
        self._prompt_ids: tuple[int, ...] | None = tuple(ids)
        self._lead = lead

    def tell(self, update: RequestOutput) -> Chunk:
        """The piece that an update makes; the first one brings the prompt."""
        told = update.prompt[-len(self._prompt_ids or ()) :] if self._prompt_ids else ()
        scored = (*map(self._scored, told), *map(self._scored, update.logprobs))
        text, self._echo = self._echo + self._without_lead(update.text), ""
        ids, self._prompt_ids = self._prompt_ids, None
        reason = _REASONS[update.finish_reason] if update.finish_reason is not None else None
        return Chunk(text, update.ids, scored, ids, reason)

    def _scored(self, found: TokenLogprob) -> Scored:
        top = tuple(self._spelled(token, nats) for token, nats in found.top)
        return Scored(self._spelled(found.id, found.logprob), top, self._offsets.push(found.id))

    def _spelled(self, token: int, nats: float | None) -> Spelled:
        logprob = None if nats is None else max(nats, _LEAST)
        return Spelled(self._spelling.text_of(token), self._spelling.bytes_of(token), logprob)

    def _without_lead(self, text: str) -> str:
        if text and self._lead:
            text, self._lead = text.removeprefix(self._lead), ""
        return text
