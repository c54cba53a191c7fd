"""`<|title|>` in a text: text or the token, as the recipe says, and said aloud."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from peftune.config.data_section import DataSection, Source
from peftune.data.sources.read import identity
from peftune.data.summary import summarize
from peftune.data.tokens.encode import encode_texts, end_of_text_id, rules_of
from peftune.data.tokens.entry import FORMAT
from peftune.data.tokens.store import prepare

TEXT = "<|title|>Cats\nthe cat <|title|> sat\n\n  a dog<|endoftext|> ran"


@pytest.fixture
def titled(tokenizer: Any) -> Any:
    """The tokenizer with a control token of its own."""
    from copy import deepcopy

    other = deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|title|>"]})
    return other


def test_parsed_ids_are_those_of_transformers(titled: Any) -> None:
    texts = ["<|title|>Cats", " <|title|> ", "a<|endoftext|><|title|>b", "<|title|", "", "plain"]
    assert encode_texts(texts, titled, parse=True) == [titled(text)["input_ids"] for text in texts]
    title = titled.convert_tokens_to_ids("<|title|>")
    plain = encode_texts(texts, titled)
    assert not any(title in ids or end_of_text_id(titled) in ids for ids in plain)
    assert [titled.decode(ids) for ids in plain] == texts


def test_each_way_has_its_own_entry_and_that_of_text_keeps_its_name(titled: Any, tmp_path: Path, write: Any) -> None:
    source = Source(path=str(write("a.txt", TEXT)))
    stores = {
        way: prepare([source], titled, "t", " ", "blank-line", tmp_path / "cache", way) for way in ("text", "parse")
    }
    title = titled.convert_tokens_to_ids("<|title|>")
    counts = {way: sum(int((store.ids(i) == title).sum()) for i in range(2)) for way, store in stores.items()}
    assert counts == {"text": 0, "parse": 2}
    rules = [FORMAT, ["t", rules_of(titled), end_of_text_id(titled)], " ", "blank-line", [identity(source)]]
    key = hashlib.sha256(json.dumps(rules).encode()).hexdigest()[:40]
    entries = {path.name for path in (tmp_path / "cache" / "tokens").iterdir() if len(path.name) == 40}
    assert key in entries and len(entries) == 2


def test_the_summary_says_where_tokens_are_spelt_out(titled: Any, tmp_path: Path, write: Any) -> None:
    source = Source(path=str(write("a.txt", TEXT)))

    def found(way: str) -> list[tuple[str, int, str]]:
        summary = summarize(
            DataSection(train=[source], split_on="blank-line", special_tokens=way), titled, "t", 64, tmp_path / "cache"
        )
        return [(one["what"], one["documents"], one["advice"]) for one in summary["findings"][:-1]]

    for _ in range(2):  # tokenised, and from the cache
        (end, documents, advice), (what, count, title) = found("text")
        assert (end, documents, what, count) == ("<|endoftext|> inside a text", 1, "<|title|> inside a text", 1)
        assert "split the documents" in advice and "data.special_tokens: parse" in title
    ((what, count, advice),) = found("parse")
    assert what == "<|endoftext|> inside a text" and "begins or ends a text" in advice
