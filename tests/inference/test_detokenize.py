"""Ids to text that may be shown: no half characters, no stop strings."""

from __future__ import annotations

import random

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from peftune.data.tokens.encode import encode_texts
from peftune.inference.detokenize import Detokenizer, StopFilter, decode_plain, whole_characters
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


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama's: a word begins with ▁, and a character without a piece is three bytes."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"abcdehikngou",
        "▁the",
        "\ufffd",
    ]
    engine = Tokenizer(models.BPE({p: n for n, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    engine.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_ids(tokenizer: PreTrainedTokenizerFast, data: bytes) -> list[int]:
    return [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_character_that_the_prompt_only_begins_is_part_of_the_text(
    kind: str, cut: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whole, streamed, and where nothing completes it."""
    if kind == "sentencepiece":
        tokenizer = sentencepiece()
    make = byte_ids if kind == "byte-level" else sentencepiece_ids
    long = "東京東京東京"
    prompt, rest = make(tokenizer, long.encode() + "😀".encode()[:cut]), make(tokenizer, "😀".encode()[cut:] + b" ok")
    assert whole_characters(tokenizer, prompt) == long
    detokenizer = Detokenizer(tokenizer, GenerationSettings(), [tokenizer.bos_token_id, *prompt])
    parts = [detokenizer.push(token, end=-1) for token in rest]
    assert parts == [""] * (3 - cut) + ["😀", " ", "o", "k"]
    assert "".join(parts) + detokenizer.finish("length") == "😀 ok"
    never = Detokenizer(tokenizer, GenerationSettings(), prompt)
    text = never.push(tokenizer.convert_tokens_to_ids("a"), end=-1) + never.finish("length")
    assert text.strip("\ufffd") == "a" and text != "a"


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece"])
def test_a_replacement_character_that_ends_the_prompt_is_not_part_of_the_text(
    kind: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    if kind == "sentencepiece":
        tokenizer = sentencepiece()
        prompt, more = tokenizer.convert_tokens_to_ids(["a", "\ufffd"]), tokenizer.convert_tokens_to_ids(["▁the"])
    else:
        prompt, more = byte_ids(tokenizer, "a\ufffd".encode()), byte_ids(tokenizer, b" the")
    assert whole_characters(tokenizer, prompt) == "a\ufffd"
    detokenizer = Detokenizer(tokenizer, GenerationSettings(), prompt)
    assert "".join([*(detokenizer.push(token, end=-1) for token in more), detokenizer.finish("length")]) == " the"


def test_texts_continue_any_prompt_wherever_it_is_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    """What the prompt shows and what its continuation shows join to what decoding both together gives."""
    chance, llama = random.Random(2), sentencepiece()
    words = [llama.convert_tokens_to_ids([piece]) for piece in ("▁the", "▁", "a", "b", "h", "\ufffd")]
    words += [sentencepiece_ids(llama, character.encode()) for character in "é東😀x"]
    for used in (tokenizer, llama):
        for _ in range(200):
            ids = [chance.randrange(1, len(tokenizer)) for _ in range(16)]
            if used is llama:
                ids = [token for _ in range(16) for token in chance.choice(words)]
            at = chance.randrange(len(ids) + 1)
            detokenizer = Detokenizer(used, GenerationSettings(), ids[:at])
            parts = [*(detokenizer.push(token, end=-1) for token in ids[at:]), detokenizer.finish("length")]
            assert whole_characters(used, ids[:at]) + "".join(parts) == decode_plain(used, ids)


def test_bytes_that_are_no_character_end_nothing_but_themselves() -> None:
    """tokenizers' own stream fails at such a byte, and with it all texts of a step would."""
    llama, chance = sentencepiece(), random.Random(3)
    detokenizer = Detokenizer(llama, GenerationSettings(), llama.convert_tokens_to_ids(["▁the"]))
    ids = [*sentencepiece_ids(llama, "東".encode() + b"\xad"), *llama.convert_tokens_to_ids(["▁the", "a"])]
    assert [detokenizer.push(token, end=-1) for token in ids] == ["", "", "東", "\ufffd", " the", "a"]
    for _ in range(100):
        detokenizer = Detokenizer(llama, GenerationSettings(max_new_tokens=99))
        for token in (chance.randrange(3, len(llama)) for _ in range(30)):
            detokenizer.push(token, end=-1)


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
