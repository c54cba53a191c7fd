"""The decoding loop: a batch of rows, one cache, one forward a token. Shapes: B rows still writing, V vocabulary."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from peftune.errors import CheckFailed
from peftune.inference.detokenize import Decoder, StopFilter
from peftune.inference.sampling import next_tokens
from peftune.inference.settings import GenerationSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import Cache, GPT2LMHeadModel, PreTrainedTokenizerFast

    Model = GPT2LMHeadModel | PeftModel

FinishReason = Literal["stop", "length", "end"]
OnText = Callable[[int, str], None]


def slide(ids: list[int], n_positions: int) -> list[int]:
    """The tokens that the model reads of `ids`: all while they fit, else the last n_positions - n_positions // 4."""
    return ids if len(ids) <= n_positions else ids[n_positions // 4 - n_positions :]


@dataclass
class Row:
    """One prompt on its way: `context` as it began, `window` what the model reads, `ids` what it has written."""

    index: int
    context: list[int]
    window: list[int]
    decoder: Decoder
    stops: StopFilter
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def accept(self, token: int, end: int, max_new_tokens: int) -> str:
        """Take the model's next token; returns what may be shown now, and sets `finish_reason` at the end."""
        piece = ""
        if token == end:
            self.finish_reason = "end"
        else:
            self.ids.append(token)
            self.window.append(token)
            piece = self.stops.push(self.decoder.push(token))
            if len(self.ids) == max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason is not None:
            piece += self.close()
        if self.stops.stopped:
            self.finish_reason = "stop"
        self.pieces.append(piece)
        return piece

    def close(self) -> str:
        """The text ends here: what was held back, unless a stop string has ended it before."""
        return "" if self.stops.stopped else self.stops.push(self.decoder.flush()) + self.stops.flush()


def row_of(
    index: int, context: list[int], window: list[int], tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings
) -> Row:
    """A row that has written nothing; its random stream is of the settings' seed, or of a new one."""
    seed = secrets.randbelow(2**32) if settings.seed is None else settings.seed
    generator = torch.Generator().manual_seed(seed)
    return Row(index, context, window, Decoder(tokenizer), StopFilter(settings.stop), generator)


def decode(model: Model, rows: list[Row], known: int, end: int, settings: GenerationSettings, on_text: OnText) -> None:
    """Write all `rows` to their ends; of the vocabulary only the first `known` tokens are chosen, `end` ends a row.

    Rows that have ended leave the batch. A window that is full slides, and the cache of the batch is computed anew.
    """
    seen_BV = _seen(rows, model)
    cache: Cache | None = None
    while rows:
        logits_BV, cache = _read(model, rows, cache)
        tokens = next_tokens(
            logits_BV[:, :known],
            [row.generator for row in rows],
            temperature=settings.sampling_temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            seen_BV=seen_BV[:, :known],
        )
        seen_BV.scatter_(1, tokens[:, None], True)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            on_text(row.index, row.accept(token, end, settings.max_new_tokens))
        live = [i for i, row in enumerate(rows) if row.finish_reason is None]
        if len(live) < len(rows):
            rows = [rows[i] for i in live]
            kept = torch.tensor(live, dtype=torch.long, device=seen_BV.device)
            seen_BV = seen_BV[kept]
            cache.batch_select_indices(kept)
        if _slide_full(rows, model.config.n_positions):
            cache = None


def _seen(rows: list[Row], model: Model) -> Tensor:
    """Which tokens each row's context holds (B, V): what a repetition penalty looks at."""
    seen_BV = torch.zeros(len(rows), model.config.vocab_size, dtype=torch.bool)
    for i, row in enumerate(rows):
        seen_BV[i, row.context] = True
    return seen_BV.to(model.device)


def _slide_full(rows: list[Row], n_positions: int) -> bool:
    full = [row for row in rows if len(row.window) > n_positions]
    for row in full:
        row.window = slide(row.window, n_positions)
    return bool(full)


def _read(model: Model, rows: list[Row], cache: Cache | None) -> tuple[Tensor, Cache]:
    """The logits after every row's window (B, V) and the cache that holds it.

    Windows are padded on the left; positions count from each window's own beginning, and padding is masked.
    """
    lengths = torch.tensor([len(row.window) for row in rows])
    if cache is None:
        width = read = int(lengths.max())
    else:
        width, read = cache.get_seq_length() + 1, 1
    columns = torch.arange(width) - (width - lengths[:, None])  # position of each column in its row, < 0 = padding
    ids = torch.tensor([([0] * read + row.window)[-read:] for row in rows])
    output = model(
        input_ids=ids.to(model.device),
        attention_mask=(columns >= 0).long().to(model.device),
        position_ids=columns[:, -read:].clamp(min=0).to(model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    logits_BV = output.logits[:, -1].float()
    if not torch.isfinite(logits_BV).all():  # host sync, as reading the tokens is
        raise CheckFailed(f"the model's logits are not finite in {model.dtype}; try --precision fp32")
    return logits_BV, output.past_key_values
