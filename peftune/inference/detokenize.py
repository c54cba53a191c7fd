"""From token ids to text as it may be shown: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def decode_plain(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    """The text of `ids`, nothing skipped and no space tidied; bytes that are not UTF-8 become U+FFFD."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Decoder:
    """Token ids in, pieces of text out; the pieces of a whole stream join to `decode_plain` of all its ids.

    Bytes of a character that is not complete yet wait for the tokens that complete it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []  # the last complete piece (some decoders look back at it), then what came since
        self._shown = 0  # characters of these ids' text that are out already

    def push(self, token: int) -> str:
        """The text that is complete now that `token` has come; often "", never half a character."""
        self._ids.append(token)
        text = decode_plain(self._tokenizer, self._ids)
        complete = text.rstrip(_INCOMPLETE)
        piece = complete[self._shown :]
        self._shown = max(self._shown, len(complete))
        if piece and complete == text:
            self._ids = [token]
            self._shown = len(decode_plain(self._tokenizer, self._ids))
        return piece

    def flush(self) -> str:
        """What still waits: at the end of a stream an incomplete character shows as U+FFFD."""
        text = decode_plain(self._tokenizer, self._ids)
        piece, self._shown = text[self._shown :], len(text)
        return piece


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
            return waiting[: min(found)[1]]  # the one that is complete first, however the text was cut into pieces
        keep = len(waiting) - self._beginning(waiting)
        self._waiting = waiting[keep:]
        return waiting[:keep]

    def flush(self) -> str:
        """What still waits: the stream has ended, so it begins no stop string."""
        waiting, self._waiting = self._waiting, ""
        return waiting

    def _beginning(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(len(text), max((len(stop) - 1 for stop in self._stop), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self._stop)), 0)
