"""From a prompt as clients send it to what the model reads."""

from __future__ import annotations

import asyncio
import re
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


async def encode_prompts(
    bank: AdapterBank, given: Sequence[str | list[int]], split_special_tokens: bool = True
) -> list[Prompt]:
    """Every prompt encoded, in a thread: long texts take a while. ApiError 400 for ids that the model does not know.

    `split_special_tokens` as in Transformers: `<|endoftext|>` in a text is text; false makes it the token.
    """
    return await asyncio.to_thread(lambda: [_encode(bank, prompt, split_special_tokens) for prompt in given])


def special_tokens_in(bank: AdapterBank, given: Sequence[str | list[int]]) -> list[str]:
    """A line for each special token that a prompt spells out: there it is text, which somebody may not expect."""
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    found = [token for token in bank.tokenizer.all_special_tokens if any(token in text for text in texts)]
    return [f"{token} in a prompt was read as text; split_special_tokens: false reads the token" for token in found]


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


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """ApiError 400 for a token id that a model of so many does not know."""
    unknown = next((id for id in ids if not 0 <= id < vocabulary), None)
    if unknown is not None:
        raise ApiError(400, f"token id {str(unknown)[:40]}: the model knows ids 0 to {vocabulary - 1}", param)


def text_ids(bank: AdapterBank, text: str, split_special_tokens: bool) -> list[int]:
    """The ids of a text, without the context token."""
    if split_special_tokens:
        return bank.encode(text)[1:]
    special = dict(zip(bank.tokenizer.all_special_tokens, bank.tokenizer.all_special_ids, strict=True))
    parts = re.split("(" + "|".join(map(re.escape, special)) + ")", text)
    return [id for part in parts for id in ([special[part]] if part in special else bank.encode(part)[1:])]


def _encode(bank: AdapterBank, given: str | list[int], split_special_tokens: bool) -> Prompt:
    n_positions, vocab_size = bank.config.n_positions, bank.config.vocab_size
    if isinstance(given, str):
        size = len(given.encode())
        if size > n_positions * _MAX_TOKEN_BYTES:  # too long in any case: it is not even encoded
            raise _too_long(n_positions, f"a prompt of {size} bytes has more tokens; shorten it")
        ids = text_ids(bank, given, split_special_tokens)
    elif len(given) > n_positions:
        raise _too_long(n_positions, f"the prompt has {len(given)} tokens; shorten it")
    else:
        ids = given
    check_ids(ids, vocab_size, "prompt")
    text = given if isinstance(given, str) else decode_plain(bank.tokenizer, ids)
    own = isinstance(given, list) or not split_special_tokens
    context = () if own and ids[:1] == [bank.begin] else (bank.begin,)
    return Prompt(text, tuple(ids), (*context, *ids))


def _too_long(n_positions: int, reason: str, param: str = "prompt") -> ApiError:
    return ApiError(400, f"this model has {n_positions} positions: {reason}", param, "context_length_exceeded")
