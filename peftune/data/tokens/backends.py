"""Which engine turns texts into ids: the tokenizer's own, or tiktoken where that is proven to give the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np

from peftune.data.tokens.tiktoken_encoder import FastEncoder, agrees, fast_encoder

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_SAMPLE = 100_000  # characters of the corpus on which both engines are compared


@dataclass
class TokenizerBackends:
    """The engines of one tokenizer; `reason` says why `fast` is there or not."""

    vocabulary: int
    own: Tokenizer
    fast: FastEncoder | None = None
    reason: str = "tiktoken was not tried: its proof takes longer than a small corpus"
    tried: bool = False

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another (n,) and how many each has (len(texts),), by whichever engine can."""
        found = self.fast.encode(texts) if self.fast and texts else None
        if found is not None:
            return found
        encodings = [encoding.ids for encoding in self.own.encode_batch_fast(list(texts), add_special_tokens=False)]
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        return np.fromiter((i for ids in encodings for i in ids), np.uint32, int(counts.sum())), counts

    def choose(self, texts: Sequence[str]) -> None:
        """Take the fast engine if there is one and it agrees on these texts (the first 100,000 characters)."""
        if not self.tried:
            found = fast_encoder(self.own)
            self.fast = found if isinstance(found, FastEncoder) else None
            self.reason = found if isinstance(found, str) else "tiktoken gives the same ids"
            self.tried = True
        if self.fast is not None and not agrees(self.fast, self.own, _sample(texts)):
            self.fast, self.reason = None, "its ids differ from those of tiktoken on this corpus"


# A copy of each tokenizer's engine with special tokens off, made again when the vocabulary has grown.
_engines: WeakKeyDictionary[PreTrainedTokenizerFast, TokenizerBackends] = WeakKeyDictionary()


def backends_of(tokenizer: PreTrainedTokenizerFast) -> TokenizerBackends:
    """The engines for a tokenizer as it is now: nothing added, nothing cut, no special token recognised."""
    known = _engines.get(tokenizer)
    if known is None or known.vocabulary != len(tokenizer):
        from tokenizers import Tokenizer

        own = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
        own.encode_special_tokens = True
        own.no_truncation()
        own.no_padding()
        known = _engines[tokenizer] = TokenizerBackends(len(tokenizer), own)
    return known


def _sample(texts: Sequence[str]) -> list[str]:
    """The first texts, the last of them cut, up to `_SAMPLE` characters."""
    sample: list[str] = []
    left = _SAMPLE
    for text in texts:
        sample.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return sample
