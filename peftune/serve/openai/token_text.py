"""How a single token is shown: its text, or its bytes where it is only a part of a character."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from peftune.data.tokens.tiktoken_encoder import byte_letters
from peftune.model.tokenizer_rules import is_byte_level

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class TokenText:
    """Tokens of one tokenizer as bytes and as text."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer
        self._byte_of = {letter: byte for byte, letter in enumerate(byte_letters())}
        self._special = set(tokenizer.all_special_ids)
        self._byte_level = is_byte_level(tokenizer.backend_tokenizer)
        self.bytes_of = functools.cache(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        """The bytes that the token stands for; those of its name for a special one, none for one without a name."""
        name = str(self._tokenizer.convert_ids_to_tokens(token) or "")
        if not self._byte_level and token not in self._special:
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
