"""Prompts in, continuations out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from peftune.data.tokens.encode import encode_texts, end_of_text_id
from peftune.errors import UserError
from peftune.inference.beam_search import search
from peftune.inference.decode import FinishReason, Row, decode, row_of, slide
from peftune.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from peftune.inference.decode import Model

__all__ = ["Generation", "GenerationSettings", "context_ids", "generate"]


@dataclass(frozen=True)
class Generation:
    """What one prompt led to.

    `text` continues `prompt` and holds nothing of a stop string. `ids` are all tokens that the model wrote, those of
    the stop string too, without the `<|endoftext|>` that ended them. `finish_reason`: "stop" (a stop string came),
    "end" (`<|endoftext|>` came), "length" (`max_new_tokens` written). `prompt_tokens` counts the context token too.
    `seed` gives the same text again; None where nothing was drawn.
    """

    prompt: str
    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    seed: int | None


def generate(
    model: Model,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    settings: GenerationSettings,
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continue every prompt; all run as one batch, and each gets the text that it would get alone.

    `on_text(i, piece)` is called with prompt i's text as it comes: whole characters, nothing of a stop string, no
    empty pieces; they join to that prompt's `text`. A model in training mode is put into evaluation mode meanwhile.

    **Context.** As in training, a document begins with `<|endoftext|>`: its id stands before the prompt at position
    0. The prompt is plain text (`<|endoftext|>` written in it is 13 characters), so it never stands there already; an
    empty prompt begins a new document.

    **Sliding window.** Whenever the model would read more than n_positions tokens (context token, prompt and what it
    has written), it reads only the last n_positions - n_positions // 4 of them: the oldest quarter is dropped,
    positions restart at 0 and the cache is computed anew. A longer prompt is cut by the same rule.

    **Random numbers.** Every prompt has a generator of its own, seeded with `settings.seed` (None: a new seed each):
    its text does not depend on its neighbours, and equal prompts of a seeded call get equal texts.

    Beam search is Transformers', one prompt after the other, without a sliding window; a stop string cuts its result,
    and `on_text` gets all of it at once. A repetition penalty also counts the context token, as in Transformers.
    Raises UserError where a prompt does not fit the model, CheckFailed where the logits are not finite.
    """
    end = end_of_text_id(tokenizer)
    rows = [_row(i, context_ids(tokenizer, prompt), tokenizer, model, settings) for i, prompt in enumerate(prompts)]

    def show(index: int, piece: str) -> None:
        if piece and on_text is not None:
            on_text(index, piece)

    with _evaluating(model), torch.no_grad():
        if settings.beams > 1:
            _search_all(model, rows, end, settings, show)
        else:
            decode(model, rows, len(tokenizer), end, settings, show)
    return [_result(prompt, row, settings) for prompt, row in zip(prompts, rows, strict=True)]


def context_ids(tokenizer: PreTrainedTokenizerFast, prompt: str) -> list[int]:
    """What the model reads for a prompt: the context `<|endoftext|>`, then the prompt as plain text."""
    return [end_of_text_id(tokenizer), *encode_texts([prompt], tokenizer)[0]]


def _row(
    index: int, context: list[int], tokenizer: PreTrainedTokenizerFast, model: Model, settings: GenerationSettings
) -> Row:
    config, number, most = model.config, index + 1, settings.max_new_tokens
    if max(context) >= config.vocab_size:
        raise UserError(
            f"prompt {number}: the tokenizer gives id {max(context)}, the model knows {config.vocab_size} tokens; "
            "expected the tokenizer that belongs to the model"
        )
    if settings.beams > 1 and len(context) + most > config.n_positions:
        raise UserError(
            f"prompt {number}: {len(context)} tokens and max_new_tokens {most} exceed the model's {config.n_positions} "
            "positions, and beam search has no sliding window; shorten one, or use beams 1"
        )
    return row_of(index, context, slide(list(context), config.n_positions), tokenizer, settings)


def _search_all(
    model: Model, rows: list[Row], end: int, settings: GenerationSettings, show: Callable[[int, str], None]
) -> None:
    for row in rows:
        written = iter(search(model, row.context, end, settings))
        while row.finish_reason is None:
            row.accept(next(written), end, settings.max_new_tokens)
        show(row.index, "".join(row.pieces))


@contextmanager
def _evaluating(model: Model) -> Iterator[None]:
    """Dropout off meanwhile; the mode as it was afterwards, also when `on_text` raises."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _result(prompt: str, row: Row, settings: GenerationSettings) -> Generation:
    assert row.finish_reason is not None, "decoding ends with every row finished"
    seed = row.generator.initial_seed() if settings.sampling_temperature > 0 else None
    return Generation(prompt, "".join(row.pieces), tuple(row.ids), row.finish_reason, len(row.context), seed)
