"""tiktoken's ids are the tokenizer's own, or tiktoken is not used."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models

from peftune.config.data_section import Source
from peftune.data.tokens import pipeline
from peftune.data.tokens.store import prepare
from peftune.data.tokens.tiktoken_encoder import (
    _EDGES,
    _SEAM,
    FastEncoder,
    TokenizerBackends,
    agrees,
    backends_of,
    fast_encoder,
)

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
WORDS = st.lists(st.sampled_from([*" \n\t'", "the", "cat", "sat", "'s", "'ll", "12", "é", "漢", "!", "\u00a0"])).map(
    "".join
)


@pytest.fixture(scope="module")
def engine(tokenizer) -> Tokenizer:
    return backends_of(tokenizer).own


@pytest.fixture(scope="module")
def fast(engine) -> FastEncoder:
    found = fast_encoder(engine)
    assert isinstance(found, FastEncoder), found
    return found


def changed(engine: Tokenizer, change) -> Tokenizer:
    state = json.loads(engine.to_str())
    change(state)
    return Tokenizer.from_str(json.dumps(state))


@given(texts=st.lists(ANY | WORDS, min_size=1, max_size=8))
def test_any_texts_get_the_tokenizers_ids(texts, fast, engine):
    if fast.encode(texts) is None:
        assert any(_SEAM in text for text in texts)
    else:
        assert agrees(fast, engine, texts)


@settings(max_examples=50)
@given(texts=st.lists(ANY | WORDS, min_size=1, max_size=8))
def test_any_texts_get_gpt2s_ids(texts, gpt2_fast, gpt2_tokenizer):
    assert agrees(gpt2_fast, backends_of(gpt2_tokenizer).own, texts)


@pytest.fixture(scope="module")
def gpt2_fast(gpt2_tokenizer) -> FastEncoder:
    found = fast_encoder(backends_of(gpt2_tokenizer).own)
    assert isinstance(found, FastEncoder), found
    return found


def test_a_text_that_holds_the_seam_is_left_to_the_tokenizer(fast, engine):
    assert fast.encode([_SEAM]) is None and fast.encode(["a", f"b{_SEAM}", "c"]) is None
    assert agrees(fast, engine, [_SEAM[:-1], _SEAM[1:], _SEAM[:4], _SEAM[4:]])
    ids, counts = TokenizerBackends(0, engine, fast).encode(["a", f"b{_SEAM}", "c"])
    assert len(ids) == counts.sum() == 11


def test_half_a_character_fails_as_the_tokenizer_fails(fast, engine):
    assert fast.encode(["a\ud800"]) is None
    with pytest.raises(TypeError):
        TokenizerBackends(0, engine, fast).encode(["a\ud800"])


@pytest.mark.parametrize("text", [" " * 1_000_000 + "x", "\n" * 1_000_000 + "x", "a" * 1_000_000, "!" * 1_000_000])
def test_a_very_long_run_does_not_hang(text, fast, engine):
    began = time.monotonic()
    ids, _ = TokenizerBackends(0, engine, fast).encode([text])
    assert len(ids) > 1000 and time.monotonic() - began < 20


def test_a_character_that_the_engines_class_differently_is_left_to_the_tokenizer(engine, monkeypatch):
    other = fast_encoder(engine)
    assert isinstance(other, FastEncoder)
    probe = other.characters.fast
    monkeypatch.setattr(other.characters, "fast", type("Other", (), {}))

    def encode_ordinary(text: str) -> list[int]:  # as if 'ж' were no letter there
        return list(probe.encode_ordinary(text.replace("ж", "!")))

    other.characters.fast.encode_ordinary = staticmethod(encode_ordinary)
    assert other.encode(["мир"]) is not None and other.encode(["жар"]) is None
    assert other.encode(["мир"]) is not None


def raise_ids(state) -> None:
    """The two tokens made last exchange their ids: merged in another order than tiktoken would."""
    vocabulary = state["model"]["vocab"]
    last, before = sorted(vocabulary, key=lambda token: -vocabulary[token])[:2]
    vocabulary[last], vocabulary[before] = vocabulary[before], vocabulary[last]


def unreachable_token(state) -> None:
    """`Ċa` + `b` is a merge whose first part nothing makes before `ab` is made."""
    model = state["model"]
    for first, second in (("q", "z"), ("z", "w"), ("qz", "w")):
        model["merges"].append([first, second])
        model["vocab"][first + second] = len(model["vocab"])
    model["merges"][-2:] = [["z", "w"], ["q", "zw"]]  # qzw has no merge from what its own bytes become: qz, w


CHANGES = {
    "its model sets dropout": lambda state: state["model"].update(dropout=0.1),
    "its model sets ignore_merges": lambda state: state["model"].update(ignore_merges=True),
    "it has a normalizer": lambda state: state.update(normalizer={"type": "NFC"}),
    "it does not cut words as GPT-2 does": lambda state: state["pre_tokenizer"].update(add_prefix_space=True),
    "it has the added token '<x>'": lambda state: state["added_tokens"].append(
        {**state["added_tokens"][0], "id": len(state["model"]["vocab"]), "content": "<x>", "special": False}
    ),
    "the ids of its tokens do not rise with its merges": raise_ids,
    "its token 'qzw' is not what its own bytes become": unreachable_token,
}


@pytest.mark.parametrize("reason", CHANGES)
def test_another_kind_of_tokenizer_keeps_its_own_engine(reason, engine):
    assert fast_encoder(changed(engine, CHANGES[reason])) == reason


def test_without_tiktoken_the_reason_is_told(engine, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    engines = TokenizerBackends(0, engine)
    engines.choose(["a"])
    assert engines.fast is None and engines.reason == "tiktoken is not installed"


def test_an_engine_that_differs_on_the_corpus_is_not_used(engine, fast, monkeypatch):
    engines = TokenizerBackends(0, engine, fast, tried=True)
    engines.choose(["The cat"])
    assert engines.fast is fast
    monkeypatch.setattr(fast, "encode", lambda texts: (np.zeros(len(texts), np.uint32), np.ones(len(texts), int)))
    engines.choose(["The cat"])
    assert engines.fast is None and "on this corpus" in engines.reason


def test_both_engines_write_the_same_store(tokenizer, write, tmp_path, monkeypatch):
    texts = [text for text in _EDGES if text.strip()] + ["The cat sat on the mat. " * n for n in range(1, 40)]
    rows = "\n".join(json.dumps({"prompt": "p", "completion": text}) for text in texts)
    sources = [Source(path=str(write("a.jsonl", rows)))]
    own = prepare(sources, tokenizer, "t", " ", "auto", tmp_path / "own")
    monkeypatch.setattr(pipeline, "_WORTH_A_PROOF", 0)
    fast = prepare(sources, tokenizer, "t", " ", "auto", tmp_path / "fast")
    assert backends_of(tokenizer).fast is not None
    assert own.fingerprint == fast.fingerprint and np.array_equal(own.digests, fast.digests)
    assert np.array_equal(own.supervised_bytes, fast.supervised_bytes)


def test_a_tokenizer_of_another_model_keeps_its_own_engine():
    assert fast_encoder(Tokenizer(models.Unigram([("a", 0.0)], 0))) == "its model is Unigram, not BPE"
