"""From token ids to text as it may be shown: complete characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tokenizers.decoders import DecodeStream

from peftune.inference.settings import FinishReason, GenerationSettings
from peftune.model.tokenizer_rules import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BEFORE = 8  # tokens of the prompt, more than a character or a word's beginning needs


def decode_plain(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of `ids`, nothing skipped and no space tidied; bytes that are not UTF-8 become U+FFFD."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


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

    The texts that are returned join to `decode_plain` of all ids, up to a stop string, without `<|endoftext|>` where it
    is ignored. Where a token's text depends on those before it (a space between words), `prompt` is what stands there:
    the texts continue what it decodes to. Bytes of a character that is not complete yet wait for those that do.
    Raises UserError for settings that name a token which the tokenizer does not have.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, settings: GenerationSettings, prompt: Sequence[int] = ()
    ) -> None:
        settings.check_ids(len(tokenizer))
        begin = tokenizer.bos_token_id
        before = [] if is_byte_level(tokenizer.backend_tokenizer) else [i for i in prompt if i != begin][-_BEFORE:]
        self._before, self._length_before = before, len(decode_plain(tokenizer, before))
        self.ids: list[int] = []
        self._shown: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer, self._stream = tokenizer, DecodeStream(before, skip_special_tokens=False)
        self._decoded = 0  # characters that the stream has given
        self._stops, self._settings = StopFilter(settings.stop), settings

    def push(self, token: int, end: int) -> str:
        """Add the next token; returns what may be shown now. `end` is the id of `<|endoftext|>`.

        A token that ends the text is not part of it.
        """
        if token in self._settings.end_ids(end):
            return self.finish("end")
        self.ids.append(token)
        decoded = ""
        if token != end:
            self._shown.append(token)
            decoded = self._stream.step(self._tokenizer.backend_tokenizer, token) or ""
            self._decoded += len(decoded)
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
        whole = decode_plain(self._tokenizer, [*self._before, *self._shown])
        text = self._stops.push(whole[self._length_before + self._decoded :]) + self._stops.flush()
        self.finish_reason = "stop" if self._stops.stopped else reason
        return text
