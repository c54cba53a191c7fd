"""Ids to text that may be shown: no half characters, no stop strings."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from peftune.data.tokens.encode import encode_texts
from peftune.inference.detokenize import Detokenizer, StopFilter, decode_plain
from peftune.inference.settings import GenerationSettings

MIXED = "é東京😀 a\t\u200d👩‍👩‍👧‍👦 naïve\n\n  x"


def byte_ids(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    """One token a byte, the hardest case for a stream."""
    from tokenizers import pre_tokenizers

    ascii_and_rest = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in ascii_and_rest]
    letters = {byte: chr(byte) for byte in ascii_and_rest} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(letters.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [tokenizer.convert_tokens_to_ids(letters[byte]) for byte in data]


def stream(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, GenerationSettings(max_new_tokens=10_000))
    return [*(detokenizer.push(token, end=-1) for token in ids), detokenizer.finish("length")]


def test_no_half_character_is_ever_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    parts = stream(tokenizer, byte_ids(tokenizer, MIXED.encode()))
    assert "".join(parts) == MIXED
    assert not any("\ufffd" in part for part in parts)


def test_a_character_is_shown_as_soon_as_it_is_complete(tokenizer: PreTrainedTokenizerFast) -> None:
    assert stream(tokenizer, byte_ids(tokenizer, "a😀b".encode())) == ["a", "", "", "", "😀", "b", ""]


def test_an_incomplete_character_at_the_end_shows_as_in_decode(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_ids(tokenizer, "a😀".encode()[:-1])
    assert stream(tokenizer, ids)[-1] == "\ufffd"
    assert "".join(stream(tokenizer, ids)) == decode_plain(tokenizer, ids)


def test_parts_of_any_bytes_join_to_what_decode_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    chance = random.Random(0)
    for _ in range(100):
        ids = [chance.randrange(1, len(tokenizer)) for _ in range(40)]
        assert "".join(stream(tokenizer, ids)) == decode_plain(tokenizer, ids)


def test_a_replacement_character_in_the_text_itself_survives(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "a\ufffd\ufffdb\ufffd"
    assert "".join(stream(tokenizer, encode_texts([text], tokenizer)[0])) == text


def filtered(stop: tuple[str, ...], parts: list[str]) -> tuple[str, bool]:
    one, shown = StopFilter(stop), ""
    for part in parts:
        shown += one.push(part)
        if one.stopped:
            return shown, True
    return shown + one.flush(), False


@pytest.mark.parametrize("parts", [["abEN", "Dcd"], ["abENDcd"], list("abENDcd"), ["abE", "N", "D"]])
def test_a_stop_string_ends_the_text_however_it_is_split(parts: list[str]) -> None:
    assert filtered(("END",), parts) == ("ab", True)


def test_nothing_of_a_stop_string_is_shown_early() -> None:
    one = StopFilter(("\n\n",))
    assert [one.push(part) for part in ("a", "\n", "b", "\n", "\n")] == ["a", "", "\nb", "", ""]
    assert one.stopped


@pytest.mark.parametrize("parts", [["xENENDy"], list("xENENDy"), ["xEN", "EN", "D"]])
def test_a_stop_string_that_begins_twice_is_found(parts: list[str]) -> None:
    assert filtered(("END",), parts) == ("xEN", True)


@pytest.mark.parametrize("parts", [["abcd"], list("abcd"), ["ab", "cd"], ["a", "bcd"]])
def test_of_two_stop_strings_the_one_complete_first_counts(parts: list[str]) -> None:
    assert filtered(("abcd", "bc"), parts) == ("a", True)


def test_what_only_begins_a_stop_string_is_shown_at_the_end() -> None:
    assert filtered(("END",), ["abEN"]) == ("abEN", False)


def test_random_cuts_never_change_the_result() -> None:
    chance = random.Random(1)
    for _ in range(500):
        text = "".join(chance.choice("ab") for _ in range(20))
        stop = tuple("".join(chance.choice("ab") for _ in range(chance.randint(2, 5))) for _ in range(2))
        parts, rest = [], text
        while rest:
            size = chance.randint(1, 4)
            parts.append(rest[:size])
            rest = rest[size:]
        assert filtered(stop, parts) == filtered(stop, list(text)) == filtered(stop, [text])
