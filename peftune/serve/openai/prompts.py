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


def max_new_tokens(prompt: Prompt, requested: int | None, default: int, n_positions: int) -> int:
    """How many tokens may be generated: the `requested` number, without one `default` or what fits.

    Raises ApiError 400 where they do not fit, or nothing does.
    """
    read, wanted = len(prompt.input_ids), 1 if requested is None else requested
    if read + wanted > n_positions:
        reason = f"{read} for the prompt (a context token stands before it) and {wanted} to write are {read + wanted}"
        param = "max_tokens" if read < n_positions else "prompt"
        raise _too_long(n_positions, f"{reason}; shorten the prompt or max_tokens", param)
    return min(default, n_positions - read) if requested is None else requested


def _encode(bank: AdapterBank, given: str | list[int]) -> Prompt:
    n_positions, vocab_size = bank.config.n_positions, bank.config.vocab_size
    if isinstance(given, str):
        size = len(given.encode())
        if size > n_positions * _MAX_TOKEN_BYTES:  # too long in any case: it is not even encoded
            raise _too_long(n_positions, f"a prompt of {size} bytes has more tokens; shorten it")
        ids = bank.encode(given)[1:]
    elif len(given) > n_positions:
        raise _too_long(n_positions, f"the prompt has {len(given)} tokens; shorten it")
    else:
        ids = given
    unknown = next((id for id in ids if not 0 <= id < vocab_size), None)
    if unknown is not None:
        raise ApiError(400, f"token id {str(unknown)[:40]}: the model knows ids 0 to {vocab_size - 1}", "prompt")
    text = given if isinstance(given, str) else decode_plain(bank.tokenizer, ids)
    context = () if isinstance(given, list) and ids[0] == bank.end else (bank.end,)
    return Prompt(text, tuple(ids), (*context, *ids))


def _too_long(n_positions: int, reason: str, param: str = "prompt") -> ApiError:
    return ApiError(400, f"this model has {n_positions} positions: {reason}", param, "context_length_exceeded")
