"""From token ids to text as it may be shown: complete characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from peftune.inference.settings import FinishReason, GenerationSettings
from peftune.inference.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
_BEFORE, _MOST = 8, 24  # tokens that are decoded again: more than a character or a word's beginning needs


def decode_plain(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of `ids`, nothing skipped and no space tidied; bytes that are not UTF-8 become U+FFFD."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def whole_characters(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of `ids` without the bytes of a character that they end within: a continuation may complete it."""
    text = decode_plain(tokenizer, ids)
    if not text.endswith(_INCOMPLETE):
        return text
    tokens = TokenText(tokenizer)
    bytes_left = tokens.bytes_inside_character(ids)
    if tokens.byte_level or not bytes_left:
        return text.rstrip(_INCOMPLETE) if bytes_left else text
    return decode_plain(tokenizer, ids[:-bytes_left])  # a token each; with them what stands before is lost too


class TextStream:
    """The text that each further token completes, behind the tokens `before`.

    Not tokenizers' DecodeStream: a byte of sentencepiece's that is part of no character changes how those before it
    are decoded, and it fails there.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, before: Sequence[int]) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend_tokenizer
        self._context = self._tail(before)
        self._known = whole_characters(tokenizer, self._context)
        kept = len(self._context)
        while kept and self._decode(self._context[:kept]) != self._known:
            kept -= 1
        self._context, self._held = self._context[:kept], self._context[kept:]

    def push(self, token: int) -> str:
        """What is complete with one more token."""
        self._held.append(token)
        text = self._decode([*self._context, *self._held])
        if text.endswith(_INCOMPLETE) and self._tokens.bytes_inside_character([*self._context, *self._held]):
            return ""
        return self._take(text)

    def flush(self) -> str:
        """The rest, complete or not."""
        return self._take(self._decode([*self._context, *self._held]))

    def _take(self, text: str) -> str:
        good = text.startswith(self._known)
        new = text[len(self._known) :] if good else self._decode(self._held)
        ids = [*self._context, *self._held]
        cut = not good or len(ids) > _MOST
        self._context, self._held = self._tail(ids) if cut else ids, []
        self._known = self._decode(self._context) if cut else text
        return new

    def _tail(self, ids: Sequence[int]) -> list[int]:
        """The last tokens of `ids`, from the beginning of a character on."""
        first = max(0, len(ids) - _BEFORE)
        while first and self._decode(ids[first:]).startswith(_INCOMPLETE) and self._tokens.is_inside(ids[first]):
            first += 1
        return list(ids[first:])

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))

    @cached_property
    def _tokens(self) -> TokenText:
        return TokenText(self._tokenizer)


class StopFilter:
    """Text in, text out up to the first of the `stop` strings; what may begin one waits until that is decided."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._stop = tuple(stop)
        self._waiting = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the stream that may be shown now; sets `stopped` when a stop string has come."""
        waiting = self._waiting + text
        found = [(waiting.find(stop) + len(stop), waiting.find(stop)) for stop in self._stop if stop in waiting]
        if found:
            self.stopped, self._waiting = True, ""
            return waiting[: min(found)[1]]  # the one that is complete first, however the text was cut into chunks
        starts = range(max(0, len(waiting) + 1 - max(map(len, self._stop), default=0)), len(waiting))
        keep = next((at for at in starts if any(stop.startswith(waiting[at:]) for stop in self._stop)), len(waiting))
        self._waiting = waiting[keep:]
        return waiting[:keep]

    def flush(self) -> str:
        """The rest: the stream has ended, so it begins no stop string."""
        waiting, self._waiting = self._waiting, ""
        return waiting


class Detokenizer:
    """The text of one prompt as it grows: its token `ids`, and `finish_reason` once it has ended.

    The texts that are returned join to what `prompt` and all ids together decode to, less the `whole_characters` of
    `prompt`, up to a stop string, without `<|endoftext|>` where it is ignored. So a space between words is there though
    it depends on both, and a character that the prompt only begins is part of the text. Bytes of a character that is
    not complete yet wait for those that do.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings, prompt: Sequence[int] = ()
    ) -> None:
        begin = tokenizer.bos_token_id
        self.ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._stream = TextStream(tokenizer, [token for token in prompt if token != begin])
        self._stops, self._settings = StopFilter(settings.stop), settings

    def push(self, token: int, end: int) -> str:
        """Add the next token; returns what may be shown now. `end` is the id of `<|endoftext|>`.

        A token that ends the text is not part of it.
        """
        if token in self._settings.end_ids(end):
            return self.finish("end")
        self.ids.append(token)
        decoded = self._stream.push(token) if token != end else ""
        text = decoded if len(self.ids) <= self._settings.min_new_tokens else self._stops.push(decoded)
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif len(self.ids) == self._settings.max_new_tokens:
            text += self.finish("length")
        return text

    def finish(self, reason: FinishReason) -> str:
        """The text ends here, for `reason` unless its last characters complete a stop string; returns its rest.

        An incomplete character, which the stream keeps back, shows as U+FFFD.
        """
        text = self._stops.push(self._stream.flush()) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.stopped else reason
        return text
