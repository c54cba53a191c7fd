"""From a prompt as clients send it to what the model reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftune.data.sources.chat_template import EOS_TURNS, contents_of, render_chat
from peftune.data.tokens.encode import encode_texts
from peftune.data.tokens.special_text import special_texts
from peftune.inference.detokenize import decode_plain, whole_characters
from peftune.inference.request import chat_ids
from peftune.serve.backend import ServedModels
from peftune.serve.openai.errors import ApiError

_MAX_TOKEN_BYTES = 256  # no token of a GPT-2 vocabulary has more (the longest of gpt2: 128 spaces)


@dataclass(frozen=True)
class Prompt:
    """`ids` are what the client's usage counts; `input_ids`, what the model reads, begin with the context token."""

    text: str
    ids: tuple[int, ...]
    input_ids: tuple[int, ...]


async def encode_prompts(
    bank: ServedModels, given: Sequence[str | list[int]], parse: bool = False, own_context: bool = False
) -> list[Prompt]:
    """Every prompt encoded, in a thread: long texts take a while. ApiError 400 for ids that the model does not know.

    `<|endoftext|>` and other special tokens in a text are text; with `parse` they are tokens, and with
    `own_context` one that begins texts is the context token where a prompt begins with it.
    """
    return await asyncio.to_thread(lambda: [_encode(bank, prompt, parse, own_context) for prompt in given])


async def encode_chat(bank: ServedModels, messages: Sequence[dict[str, Any]], chat: str, parse: bool) -> Prompt:
    """The conversation by the template `chat`, as `encode_prompts` encodes a text."""
    if chat != EOS_TURNS:
        return (await encode_prompts(bank, [render_chat(messages)], parse))[0]
    _refuse_too_long(bank, sum(len(content.encode()) for content in contents_of(messages)))
    ids = await asyncio.to_thread(chat_ids, bank.tokenizer, messages, chat)
    return Prompt(decode_plain(bank.tokenizer, ids), tuple(ids), tuple(ids))


def parses_special(
    bank: ServedModels,
    names: Sequence[str | None],
    given: Sequence[str | list[int]],
    split_special_tokens: bool | None = None,
) -> bool:
    """Whether special tokens in prompts are tokens: as the request says, else as the models it may go to say.

    ApiError 400 where these differ and a prompt has one: it is read before a model is chosen.
    """
    if split_special_tokens is not None:
        return not split_special_tokens
    ways = {bank.parses(name) for name in names}
    if len(ways) > 1 and special_tokens_in(bank, given):
        reason = "the adapters here were trained with different data.special_tokens; say how to read the prompt"
        raise ApiError(400, f"{reason}: split_special_tokens true or false", "split_special_tokens")
    return ways == {True}


def special_tokens_in(bank: ServedModels, given: Sequence[str | list[int]]) -> list[str]:
    """A line for each special token that a prompt spells out: there it is text, which somebody may not expect."""
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    found = [token for token in sorted(special_texts(bank.tokenizer)) if any(token in text for text in texts)]
    return [f"{token} in a prompt was read as text; split_special_tokens: false reads the token" for token in found]


def max_new_tokens(prompt: Prompt, requested: int | None, default: int, n_positions: int) -> int:
    """How many tokens may be generated: the `requested` number, without one `default` or what fits.

    Raises ApiError 400 where they do not fit, or nothing does.
    """
    read, wanted = len(prompt.input_ids), 1 if requested is None else requested
    if read + wanted > n_positions:
        context = " (a context token stands before it)" if read > len(prompt.ids) else ""
        reason = f"{read} for the prompt{context} and {wanted} to write are {read + wanted}"
        param = "max_tokens" if read < n_positions else "prompt"
        raise _too_long(n_positions, f"{reason}; shorten the prompt or max_tokens", param)
    return min(default, n_positions - read) if requested is None else requested


def check_ids(ids: Sequence[int], vocabulary: int, param: str) -> None:
    """ApiError 400 for a token id that a model of so many does not know."""
    unknown = next((id for id in ids if not 0 <= id < vocabulary), None)
    if unknown is not None:
        raise ApiError(400, f"token id {str(unknown)[:40]}: the model knows ids 0 to {vocabulary - 1}", param)


def text_ids(bank: ServedModels, text: str, parse: bool) -> list[int]:
    """The ids of a text, without the context token."""
    return encode_texts([text], bank.tokenizer, parse)[0]


def _encode(bank: ServedModels, given: str | list[int], parse: bool, own_context: bool) -> Prompt:
    n_positions, vocab_size = bank.config.n_positions, bank.config.vocab_size
    if isinstance(given, str):
        _refuse_too_long(bank, len(given.encode()))
        ids = text_ids(bank, given, parse)
    elif len(given) > n_positions:
        raise _too_long(n_positions, f"the prompt has {len(given)} tokens; shorten it")
    else:
        ids = given
    check_ids(ids, vocab_size, "prompt")
    text = given if isinstance(given, str) else whole_characters(bank.tokenizer, ids)
    own = isinstance(given, list) or own_context
    context = () if own and ids[:1] == [bank.begin] else (bank.begin,)
    return Prompt(text, tuple(ids), (*context, *ids))


def _refuse_too_long(bank: ServedModels, size: int) -> None:
    """ApiError 400 for bytes that are too many in any case: they are not even encoded."""
    if size > bank.config.n_positions * _MAX_TOKEN_BYTES:
        raise _too_long(bank.config.n_positions, f"a prompt of {size} bytes has more tokens; shorten it")


def _too_long(n_positions: int, reason: str, param: str = "prompt") -> ApiError:
    return ApiError(400, f"this model has {n_positions} positions: {reason}", param, "context_length_exceeded")
