"""A tokenizer's ids at several times its speed: tiktoken, for tokenizers that compute the same function.

Both cut a text into words with a pattern, and merge pairs of bytes within a word, lowest rank first. They give equal
ids on every text if

1. each words its text alike: the pattern is GPT-2's in both, so only the tables of Unicode may differ. Whether a
   character is a letter, a number, white space or none of these is compared in both when it is first met;
2. each merges alike: tiktoken takes a token's id for its rank and merges any two neighbours that together are a token.
   So the ids must rise with the merges, one merge for each token, and the tokenizer must make each token from
   its own bytes: had tiktoken a merge that the tokenizer lacks, that token's own bytes would lead both to it.

Whatever fails one of these, or fails in tiktoken (a million spaces in a row), is left to the tokenizer itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from peftune.data.tokens.special_text import without_special
from peftune.errors import UserError, first_line

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

_SAMPLE = 100_000  # characters of the corpus on which both backends are compared
# GPT-2's pattern, written so that words are found without going back; only `\s+(?!\S)` ever must.
_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

# Between texts that are encoded in one call. No two characters are equal, so it cannot overlap with itself, and no
# text's end can be mistaken for its beginning; a text that holds all of it shows by the count.
_SEAM = "".join(map(chr, range(8)))

_EDGES = (
    *map(chr, range(256)),
    *("", " ", "  ", "   a", "a   ", " \n ", "\n\n\n", "\r\n", "a\r\n\r\nb", "\t\tx"),
    *("\x00", "a\x00b", "\u00a0\u00a0x"),
    *("I'm we're they'll he'd it's I've don't", "'S 'T 'LL ''s '", "\u2019s", " 's", "a'sb", "x''ll"),
    *("1234567890", "3.14 1,000", "½²Ⅷ٣", "abc123def", "a1b2 c3"),
    *("漢字仮名交じり文", "한국어", "ไทย", "हिन्दी", "العربية", "e\u0301a\u0308", "ﬁ ß İ"),
    *("👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽", "\u200b\u200d\ufeff", "\ue000\U0010ffff", "…—“”"),
    *("<|endoftext|>", "a<|endoftext|>b", "<|endoftext|", _SEAM[:-1], "http://a.b/c?d=e&f#g"),
    *("a" * 3000, " " * 3000, " " * 3000 + "x", "\n" * 3000, "!" * 3000, "漢" * 1000, "ab" * 3000, " \n" * 1500),
)


class FastEncoder:
    """tiktoken for one tokenizer; made by `fast_encoder`."""

    def __init__(self, vocabulary: dict[str, int]) -> None:
        self.seam = max(vocabulary.values()) + 1
        self.encoding = _encoding(vocabulary, {_SEAM: self.seam})
        self.characters = _Characters()

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
        """Ids of all texts one after another (n,) uint32 and how many each has, int64; None where it cannot say."""
        joined = _SEAM.join(texts)
        try:
            if not joined.isascii() and not self.characters.agree_on(joined):
                return None
            found = self.encoding.encode_to_numpy(joined, allowed_special={_SEAM}, disallowed_special=())
        except ValueError:  # half a character, or white space longer than the stack of the pattern matcher
            return None
        seams = np.flatnonzero(found == self.seam)
        if len(seams) != len(texts) - 1:
            return None
        counts = np.diff(seams, prepend=-1, append=len(found)) - 1
        return np.delete(found, seams), counts


def fast_encoder(tokenizer: Tokenizer) -> FastEncoder | str:
    """The fast encoder of a tokenizer, proven equal, or the reason why there is none.

    `tokenizer` takes special tokens for text. Costs 0.5 s for the 50,257 tokens of GPT-2.
    """
    state = json.loads(tokenizer.to_str())
    special = {token["content"] for token in state["added_tokens"]}  # no text becomes one
    known = tokenizer.get_vocab(with_added_tokens=False)
    vocabulary = {token: number for token, number in known.items() if token not in special}
    obstacle = next(_obstacles(tokenizer, state, vocabulary), None)
    if obstacle is not None:
        return obstacle
    fast = FastEncoder(vocabulary)
    return fast if agrees(fast, tokenizer, _EDGES) else "its ids differ from those of tiktoken on edge cases"


def agrees(fast: FastEncoder, tokenizer: Tokenizer, texts: Sequence[str]) -> bool:
    """Whether both give the same ids for each text."""
    found = fast.encode(texts)
    if found is None:
        return False
    return all(map(np.array_equal, found, TokenizerBackends(0, tokenizer).encode(texts)))


def _obstacles(tokenizer: Tokenizer, state: dict[str, Any], vocabulary: dict[str, int]) -> Iterator[str]:
    """Why tiktoken cannot stand in for a tokenizer with this `tokenizer.json`; each check relies on those before it."""
    if not find_spec("tiktoken"):
        yield "tiktoken is not installed"
    model, cutter = state["model"], state["pre_tokenizer"] or {}
    if model["type"] != "BPE":
        yield f"its model is {model['type']}, not BPE"
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")
    yield from (f"its model sets {name}" for name in options if model.get(name))
    if state["normalizer"] is not None:
        yield "it has a normalizer"
    if cutter.get("type") != "ByteLevel" or cutter.get("add_prefix_space") or not cutter.get("use_regex", True):
        yield "it does not cut words as GPT-2 does"
    yield from (f"it has the added token {t['content']!r}" for t in state["added_tokens"] if not t["special"])
    letters = set(byte_letters())
    if not letters.issuperset("".join(vocabulary)) or not letters <= vocabulary.keys():
        yield "its tokens are not written in the 256 byte letters, each a token of its own"
    made = [vocabulary.get(first + second, -1) for first, second in model["merges"]]
    if any(later <= earlier for earlier, later in pairwise([-1, *made])):
        yield "the ids of its tokens do not rise with its merges"
    if len(made) != len(vocabulary) - 256:
        yield "it has tokens that no merge makes"
    merger = type(tokenizer)(tokenizer.model)  # merges alone: nothing is cut into words
    for (token, number), encoded in zip(vocabulary.items(), merger.encode_batch_fast(list(vocabulary)), strict=True):
        if encoded.ids != [number]:
            yield f"its token {token!r} is not what its own bytes become"


class _Characters:
    """Which characters both backends put into the same class, found out when they first occur.

    A probe's only merges join `a`, `1` or `!` with a first byte, so its ids tell with which of these a character
    makes a word: it is a letter, a number, none of both, or white space.
    """

    def __init__(self) -> None:
        from tokenizers import Tokenizer, models, pre_tokenizers

        letters = byte_letters()
        merges = [(letters[ord(first)], second) for first in "a1!" for second in letters]
        tokens = [*letters, *(first + second for first, second in merges)]
        vocabulary = {token: number for number, token in enumerate(tokens)}
        self.fast = _encoding(vocabulary, {})
        self.reference = Tokenizer(models.BPE(vocabulary, merges))
        self.reference.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self.same, self.seen = np.zeros(0x110000, bool), np.zeros(0x110000, bool)

    def agree_on(self, text: str) -> bool:
        """Whether all characters of a text are in the same class; ValueError for half a character."""
        codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        new = np.unique(codes[~self.seen[codes]])
        probes = [f"a{character}1{character}!{character}\n" for character in map(chr, new)]
        self.same[new] = self._equal("".join(probes)) or [self._equal(probe) for probe in probes]
        self.seen[new] = True
        return bool(self.same[codes].all())

    def _equal(self, text: str) -> bool:
        return bool(self.reference.encode(text).ids == self.fast.encode_ordinary(text))


def _encoding(vocabulary: dict[str, int], special: dict[str, int]) -> Any:
    import tiktoken

    byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
    ranks = {bytes(map(byte_of.__getitem__, token)): number for token, number in vocabulary.items()}
    return tiktoken.Encoding("tokenizer", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=special)


def byte_letters() -> list[str]:
    """The character by which a byte-level vocabulary writes each byte: itself where it prints, else from U+0100 on."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in prints else next(others)) for byte in range(256)]


@dataclass
class TokenizerBackends:
    """The backends of one tokenizer; `reason` says why `fast` is there or not."""

    vocabulary: int
    own: Tokenizer
    fast: FastEncoder | None = None
    reason: str = "tiktoken was not tried: its proof takes longer than a small corpus"
    tried: bool = False

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts one after another (n,) and how many each has (len(texts),), by whichever backend can."""
        found = self.fast.encode(texts) if self.fast and texts else None
        if found is not None:
            return found
        encodings = self.own_ids(texts)
        counts = np.fromiter(map(len, encodings), np.int64, len(encodings))
        return np.fromiter((i for ids in encodings for i in ids), np.uint32, int(counts.sum())), counts

    def own_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text by the tokenizer itself; UserError where its rules give up on one (a panic of Rust)."""
        try:
            return [encoding.ids for encoding in self.own.encode_batch_fast(list(texts), add_special_tokens=False)]
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            raise UserError(f"the tokenizer cannot cut a text into words: {first_line(error)}") from None

    def choose(self, texts: Sequence[str]) -> None:
        """Take the fast backend if there is one and it agrees on these texts (the first 100,000 characters)."""
        if not self.tried:
            found = fast_encoder(self.own)
            self.fast = found if isinstance(found, FastEncoder) else None
            self.reason = found if isinstance(found, str) else "tiktoken gives the same ids"
            self.tried = True
        begins = accumulate(map(len, texts), initial=0)
        sample = [text[: _SAMPLE - begin] for text, begin in zip(texts, begins, strict=False) if begin < _SAMPLE]
        if self.fast is not None and not agrees(self.fast, self.own, sample):
            self.fast, self.reason = None, "its ids differ from those of tiktoken on this corpus"


# Copies of each tokenizer's backend, with special tokens off and on, made again when the vocabulary has grown.
_backends: WeakKeyDictionary[PreTrainedTokenizerFast, dict[bool, TokenizerBackends]] = WeakKeyDictionary()


def backends_of(tokenizer: PreTrainedTokenizerFast, parse: bool = False) -> TokenizerBackends:
    """The backends for a tokenizer as it is now: nothing added, nothing cut.

    A special token that a text spells out is text; with `parse` it is the token.
    """
    backends = _backends.setdefault(tokenizer, {})
    known = backends.get(parse)
    if known is None or known.vocabulary != len(tokenizer):
        from tokenizers import Tokenizer

        backend = tokenizer.backend_tokenizer
        own = Tokenizer.from_str(backend.to_str() if parse else without_special(backend))
        own.encode_special_tokens = not parse
        own.no_truncation()
        own.no_padding()
        known = backends[parse] = TokenizerBackends(len(tokenizer), own)
        if parse:
            known.tried, known.reason = True, "tiktoken is not used where special tokens are parsed"
    return known
