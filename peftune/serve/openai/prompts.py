"""From a prompt as clients send it to what the model reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from peftune.inference.bank import AdapterBank
from peftune.inference.detokenize import decode_plain
from peftune.serve.openai.errors import ApiError

_MAX_TOKEN_BYTES = 256  # no token of a GPT-2 vocabulary has more (the longest of gpt2: 128 spaces)


@dataclass(frozen=True)
class Prompt:
    """`ids` are what the client's usage counts; `input_ids`, what the model reads, begin with the context token."""

    text: str
    ids: tuple[int, ...]
    input_ids: tuple[int, ...]


async def encode_prompts(bank: AdapterBank, given: Sequence[str | list[int]]) -> list[Prompt]:
    """Every prompt encoded, in a thread: long texts take a while. ApiError 400 for ids that the model does not know."""
    return await asyncio.to_thread(lambda: [_encode(bank, prompt) for prompt in given])


def max_new_tokens(prompt: Prompt, requested: int | None, default: int | None, n_positions: int) -> int:
    """How many tokens may be generated; without a `requested` number `default` or what fits (None: all that fits).

    Raises ApiError 400 where they do not fit, or nothing does.
    """
    available, wanted = n_positions - len(prompt.input_ids), 1 if requested is None else requested
    if wanted > available:
        raise _too_long(
            n_positions,
            f"{len(prompt.input_ids)} for the prompt (a context token stands before it) and {wanted} to write are "
            f"{len(prompt.input_ids) + wanted}; shorten the prompt or max_tokens",
            "max_tokens" if available > 0 else "prompt",
        )
    if requested is not None:
        return requested
    return available if default is None else min(default, available)


def _encode(bank: AdapterBank, given: str | list[int]) -> Prompt:
    n_positions, vocab_size = bank.config.n_positions, bank.config.vocab_size
    if isinstance(given, str):
        size = len(given.encode())
        if size > n_positions * _MAX_TOKEN_BYTES:  # too long in any case: it is not even encoded
            raise _too_long(n_positions, f"a prompt of {size} bytes has more tokens; shorten it")
        input_ids = bank.encode(given)
        _check_ids(input_ids, vocab_size)
        return Prompt(given, tuple(input_ids[1:]), tuple(input_ids))
    if len(given) > n_positions:
        raise _too_long(n_positions, f"the prompt has {len(given)} tokens; shorten it")
    _check_ids(given, vocab_size)
    input_ids = given if given[0] == bank.end else [bank.end, *given]
    return Prompt(decode_plain(bank.tokenizer, given), tuple(given), tuple(input_ids))


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    unknown = next((id for id in ids if not 0 <= id < vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"token id {str(unknown)[:40]}: the model knows ids 0 to {vocab_size - 1}", "prompt")


def _too_long(n_positions: int, reason: str, param: str = "prompt") -> ApiError:
    return ApiError(400, f"this model has {n_positions} positions: {reason}", param, "context_length_exceeded")
