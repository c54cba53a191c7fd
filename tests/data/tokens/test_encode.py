"""Which tokens a document becomes, and which of them are scored."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftune.data.documents import Document
from peftune.data.tokens.encode import encode_texts

TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
E = "<|endoftext|>"


def scored_text(example, tokenizer):
    return tokenizer.decode(example.ids[example.supervised])


def test_a_text_begins_with_unscored_context_and_its_end_is_learnt(tokenize_document, tokenizer):
    example = tokenize_document(Document("The cat."), tokenizer, " ")
    assert example.ids[0] == example.ids[-1] == tokenizer.eos_token_id
    assert example.supervised.tolist() == [False] + [True] * (len(example.ids) - 1)
    assert example.supervised_bytes == len("The cat.")


@pytest.mark.parametrize(
    ("prompt", "completion", "join", "scored"),
    [
        ("cat", "sat", " ", " sat"),
        ("cat ", "sat", " ", "sat"),
        ("cat\n", "sat", " ", "sat"),
        ("cat", " sat", " ", " sat"),
        ("cat", "\nsat", " ", "\nsat"),
        ("cat\u00a0", "sat", " ", "sat"),
        ("cat", "sat", "", "sat"),
        ("", "sat", " ", "sat"),
    ],
)
def test_one_space_joins_prompt_and_completion_unless_white_space_is_there(
    tokenize_document, prompt, completion, join, scored, tokenizer
):
    example = tokenize_document(Document(completion, prompt=prompt), tokenizer, join)
    assert scored_text(example, tokenizer) == scored + E
    assert example.supervised_bytes == len(scored)
    assert tokenizer.decode(example.ids) == E + prompt + scored + E


@given(prompt=TEXT, completion=TEXT)
def test_prompt_and_completion_are_tokenised_separately(tokenize_document, prompt, completion, tokenizer):
    example = tokenize_document(Document(completion, prompt=prompt), tokenizer, "")
    first, second = encode_texts([prompt, completion], tokenizer)
    assert example.ids[1:-1].tolist() == first + second
    assert example.supervised.sum() == len(second) + 1
    assert example.supervised_bytes == len(completion.encode())


@given(text=TEXT)
def test_every_text_comes_back_from_its_tokens(tokenize_document, text, tokenizer):
    example = tokenize_document(Document(text), tokenizer, " ")
    assert tokenizer.decode(example.ids[1:-1]) == text


@pytest.mark.parametrize("prompt", [None, f"p{E}"])
def test_a_special_token_written_in_a_text_stays_text(tokenize_document, prompt, tokenizer):
    example = tokenize_document(Document(f"a{E}b", prompt=prompt), tokenizer, " ")
    assert (example.ids == tokenizer.eos_token_id).sum() == 2
    assert f"a{E}b" in tokenizer.decode(example.ids[1:-1])
    assert tokenizer.encode(f"a{E}b").count(tokenizer.eos_token_id) == 1  # the tokenizer itself is left as it was


def test_gpt2_reads_a_written_special_token_as_text(gpt2_tokenizer):
    assert encode_texts([f"a{E}"], gpt2_tokenizer) == [[64, 27, 91, 437, 1659, 5239, 91, 29]]


def test_a_token_added_later_is_known(tokenizer):
    import copy

    own = copy.deepcopy(tokenizer)
    before = encode_texts(["a<x>"], own)
    own.add_tokens(["<x>"])
    assert encode_texts(["a<x>"], own) == [[before[0][0], len(own) - 1]]


def test_a_text_longer_than_the_model_is_neither_cut_nor_warned_about(tokenize_document, tokenizer, caplog):
    tokenizer("a", truncation=True, max_length=4)  # leaves truncation switched on in the engine
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        example = tokenize_document(Document("cat " * 5000), tokenizer, " ")
    assert len(example.ids) > 5000 and not caplog.records


def test_many_at_once_equal_one_by_one(tokenize_document, tokenize_documents, tokenizer):
    documents = [Document("a"), Document("b c", prompt="p"), Document("", turns=(("User: u", False), (" a", True)))]
    for one, many in zip(
        [tokenize_document(d, tokenizer, " ") for d in documents],
        tokenize_documents(documents, tokenizer, " "),
        strict=True,
    ):
        assert np.array_equal(one.ids, many.ids) and np.array_equal(one.supervised, many.supervised)
        assert one.supervised_bytes == many.supervised_bytes
    assert tokenize_documents([], tokenizer, " ") == []
