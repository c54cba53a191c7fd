"""From what a client sends to what the model reads, or a refusal that gives the numbers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from peftune.inference.bank import AdapterBank
from peftune.inference.detokenize import decode_plain
from peftune.serve.openai.errors import ApiError

_BYTES_A_TOKEN = 256  # no token of a GPT-2 vocabulary has more (the longest of gpt2: 128 spaces)


@dataclass(frozen=True)
class Prompt:
    """`ids` are what the client's usage counts, `read` what the model reads: with the context token before them."""

    text: str
    ids: tuple[int, ...]
    read: tuple[int, ...]


async def prompts_of(bank: AdapterBank, given: Sequence[str | list[int]]) -> list[Prompt]:
    """Every prompt encoded, in a thread: long texts take a while. ApiError 400 for ids that the model does not know."""
    return await asyncio.to_thread(lambda: [_prompt(bank, one) for one in given])


def room_for(prompt: Prompt, max_tokens: int | None, default: int | None, n_positions: int) -> int:
    """How many tokens may be written; where the client names no number `default` or what fits (None: all that fits).

    Raises ApiError 400 where they do not fit, or nothing does.
    """
    room = n_positions - len(prompt.read)
    wanted = max_tokens if max_tokens is not None else 1
    if wanted > room:
        raise ApiError(
            400,
            f"this model has {n_positions} positions: {len(prompt.read)} for the prompt (a context token stands before "
            f"it) and {wanted} to write are {len(prompt.read) + wanted}; shorten the prompt or max_tokens",
            "max_tokens" if room > 0 else "prompt",
            "context_length_exceeded",
        )
    return max_tokens if max_tokens is not None else room if default is None else min(default, room)


def _prompt(bank: AdapterBank, given: str | list[int]) -> Prompt:
    if isinstance(given, str):
        _refuse_endless(given, bank.config.n_positions)
        read = bank.encode(given)
        _check(read, bank.config.vocab_size)
        return Prompt(given, tuple(read[1:]), tuple(read))
    if len(given) > bank.config.n_positions:
        raise ApiError(
            400,
            f"this model has {bank.config.n_positions} positions: the prompt has {len(given)} tokens; shorten it",
            "prompt",
            "context_length_exceeded",
        )
    _check(given, bank.config.vocab_size)
    read = given if given[0] == bank.end else [bank.end, *given]
    return Prompt(decode_plain(bank.tokenizer, given), tuple(given), tuple(read))


def _refuse_endless(text: str, n_positions: int) -> None:
    """A text that can be no shorter than the context in tokens is not even encoded."""
    size = len(text.encode())
    if size > n_positions * _BYTES_A_TOKEN:
        raise ApiError(
            400,
            f"this model has {n_positions} positions: a prompt of {size} bytes has more tokens; shorten it",
            "prompt",
            "context_length_exceeded",
        )


def _check(ids: Sequence[int], vocab_size: int) -> None:
    wrong = next((id for id in ids if not 0 <= id < vocab_size), None)
    if wrong is not None:
        raise ApiError(400, f"token id {str(wrong)[:40]}: the model knows ids 0 to {vocab_size - 1}", "prompt")
