"""Served texts of a base whose tokens carry their spaces as sentencepiece's do, and that spells characters in bytes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.inference.settings import GenerationSettings

WORDS = ["▁the", "▁king", "▁house", "▁User:", "▁Assistant:", "s", "▁of"]
NO_BYTES = {str(number): -100 for number in range(3, 259)}  # where they are no character, others change with them
COMMON = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "logit_bias": NO_BYTES}


@pytest.fixture(scope="module")
def served(
    start: Callable[..., Any], make: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """Llama's kind of tokenizer on a random GPT-2, and an adapter that says it was trained on chat."""
    base = tmp_path_factory.mktemp("word-marks")
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [*sorted(set("".join(WORDS)) - {"▁", "s"}), *WORDS]
    number = {piece: n for n, piece in enumerate(pieces)}
    merges, known = [], set(pieces)
    for word in sorted(WORDS, key=len):  # letter by letter from the left
        for at in range(1, len(word)):
            left, joined = word[:at], word[: at + 1]
            if joined not in known:
                known.add(joined)
                number[joined] = len(number)
            merges.append((left, word[at]))
    engine = Tokenizer(models.BPE(number, list(dict.fromkeys(merges)), unk_token="<unk>", byte_fallback=True))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=engine, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    tokenizer.save_pretrained(base)
    torch.manual_seed(2)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=256, n_layer=2, n_head=4, initializer_range=0.3,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(base)
    adapter = make(base / "chat", 1, chat=True)
    with start({"chat": adapter}, str(base)) as running:
        yield running


def decoded(served: Any, ids: list[int]) -> str:
    return str(served.bank.tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def streamed(served: Any, path: str, **body: Any) -> list[dict[str, Any]]:
    lines = served.post(path, stream=True, **body).text.split("\n\n")
    return [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("prompt", ["the king", "the king of", ""])
def test_prompt_and_text_join_to_what_decoding_both_gives(served: Any, prompt: str) -> None:
    body = {"model": "base", "prompt": prompt, "return_token_ids": True} | COMMON
    (choice,) = served.post("/v1/completions", **body).json()["choices"]
    whole = decoded(served, [*choice["prompt_token_ids"], *choice["token_ids"]])
    assert prompt + choice["text"] == whole and whole.startswith(prompt)
    (echoed,) = served.post("/v1/completions", echo=True, **body).json()["choices"]
    assert echoed["text"] == whole
    for echo in (False, True):
        parts = streamed(served, "/v1/completions", echo=echo, **body)
        assert ("" if echo else prompt) + "".join(part["text"] for part in parts) == whole


def test_the_space_at_the_seam_is_there_in_every_way(served: Any) -> None:
    """A bias that leaves one word to choose: the text is known."""
    house = served.bank.tokenizer.convert_tokens_to_ids("▁house")
    body = {"model": "base", "prompt": "the king", "max_tokens": 2, "temperature": 0, "logit_bias": {str(house): 100}}
    assert served.post("/v1/completions", **body).json()["choices"][0]["text"] == " house house"
    assert "".join(part["text"] for part in streamed(served, "/v1/completions", **body)) == " house house"
    settings = GenerationSettings(max_new_tokens=2, temperature=0, logit_bias=((house, 100.0),))
    assert served.bank.generate(["the king"], settings)[0].text == " house house"
    chat = {key: value for key, value in body.items() if key != "prompt"}
    chat |= {"model": "chat", "messages": [{"role": "user", "content": "the king"}]}
    (choice,) = served.post("/v1/chat/completions", **chat).json()["choices"]
    assert choice["message"]["content"] == "house house", "the template's space after the colon is not the answer's"
    parts = streamed(served, "/v1/chat/completions", **chat)
    assert "".join(part["delta"].get("content", "") for part in parts) == "house house"


@pytest.mark.parametrize("cut", [1, 2])
def test_a_character_that_token_ids_only_begin_is_part_of_the_text(served: Any, cut: int) -> None:
    token = served.bank.tokenizer.convert_tokens_to_ids
    character = [token(f"<0x{byte:02X}>") for byte in "東".encode()]
    prompt = [token("▁the"), *character, *character[:cut]]
    bias = {str(character[cut]): 100}
    body = {"model": "base", "prompt": prompt, "max_tokens": 1, "temperature": 0, "logit_bias": bias}
    (choice,) = served.post("/v1/completions", echo=True, **body).json()["choices"]
    (alone,) = served.post("/v1/completions", **body).json()["choices"]
    assert choice["text"] == "the東" + alone["text"]
    assert alone["text"] == ("東" if cut == 2 else "\ufffd\ufffd")
    (scored,) = served.post("/v1/completions", **body | {"echo": True, "max_tokens": 0, "logprobs": 0}).json()[
        "choices"
    ]
    assert scored["text"] == "the東" + "\ufffd" * cut


def test_offsets_count_the_characters_of_the_text(served: Any) -> None:
    body = {"model": "base", "prompt": "the king of", "max_tokens": 0, "echo": True, "logprobs": 0}
    (choice,) = served.post("/v1/completions", **body).json()["choices"]
    assert choice["logprobs"]["tokens"] == [" the", " king", " of"]
    assert choice["logprobs"]["text_offset"] == [0, 3, 8]
    house = served.bank.tokenizer.convert_tokens_to_ids("▁house")
    body |= {"echo": False, "max_tokens": 2, "temperature": 0, "logit_bias": {str(house): 100}}
    (choice,) = served.post("/v1/completions", **body).json()["choices"]
    assert choice["logprobs"]["text_offset"] == [11, 17]
