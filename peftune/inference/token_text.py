"""How a single token is shown: its text, or its bytes where it is only a part of a character."""

from __future__ import annotations

import codecs
import functools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from peftune.data.tokens.tiktoken_encoder import byte_letters
from peftune.model.tokenizer_rules import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_BYTE = re.compile("<0x([0-9A-F]{2})>")
_LONGEST = 4  # bytes of a character in UTF-8, and so the most tokens that it is spread over


class TokenText:
    """Tokens of one tokenizer as bytes and as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self._byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        self._special = set(tokenizer.all_special_ids)
        self.byte_level = is_byte_level(tokenizer.backend_tokenizer)
        self.bytes_of = functools.cache(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that the token stands for; those of its name for a special one, none for one without a name."""
        name = str(self.tokenizer.convert_ids_to_tokens(token) or "")
        if not self.byte_level and token not in self._special:
            if of_byte := _BYTE.fullmatch(name):  # sentencepiece's, of a character that it has no piece for
                return bytes([int(of_byte[1], 16)])
            return name.removeprefix("##").replace("▁", " ").encode()  # WordPiece's and sentencepiece's marks
        plain = token not in self._special and all(letter in self._byte_of for letter in name)
        return bytes(self._byte_of[letter] for letter in name) if plain else name.encode()

    def text_of(self, token: int) -> str:
        r"""The token's text; `bytes:\xe2\x80` for one that is no complete character, as OpenAI writes it."""
        raw = self.bytes_of(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(rf"\x{byte:02x}" for byte in raw)

    def bytes_inside_character(self, ids: Sequence[int]) -> int:
        """How many of the last bytes of these tokens begin a character that they do not complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(b"".join(map(self.bytes_of, ids[-_LONGEST:])))
        return len(decoder.getstate()[0])

    def is_inside(self, token: int) -> bool:
        """Whether the token's first byte is not the first of a character."""
        return self.bytes_of(token)[:1].ljust(1)[0] & 0xC0 == 0x80
