"""Tokenizer files of other people: read or refused in one line and soon, and nothing in them is run."""

from __future__ import annotations

import json
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from fuzzing import damaged_bytes, damaged_json, deadline, fuzz, read_or_refuse
from hypothesis import given
from hypothesis import strategies as st

from peftune.data.sources.chat_template import render_chat
from peftune.data.tokens.encode import encode_texts
from peftune.errors import UserError
from peftune.model.base import Base
from peftune.model.tokenizer_rules import problem_of

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KNOWN = [
    GPT2,
    LLAMA3,
    O200K,
    " {2,}",
    " ?[^(\\s|[.,!?…\u3002\uff0c\u3001\u0964\u06d4\u060c])]+",
    r"(?=(\d{3})+(?!\d))",
    r"[[:alpha:]]+?",
    "a++|b{a}",
]
HOSTILE = [
    r"(a+)+$", r"(?:a|aa)*$", r"(.*.*)*(a+)+$", r"(\w?)*!", r"(?>a+)*", r"((a|b)c)+", r"(?:a{1,30}){1,30}", r"a+*",
    r"\s*\s*\s*x", r".{0,5000}.{0,5000}.{0,5000}x", r"(\w+)\1", r"(a|\g<1>b)", r"(?R)", r"(?x:(a+) +)", r"(?<n>a)\k<n>",
    r"(?~ab)", r"(?(1)a|b)", r"(?:[^)]+)*", r"([\])]+)*", r"(?=(a+)+)b", "x" * 30_000,
]  # fmt: skip


def copied(tiny_base: Path, folder: Path, **changes: Any) -> Path:
    """The base with `tokenizer.json` changed."""
    base = folder / "base"
    shutil.copytree(tiny_base, base, dirs_exist_ok=True)
    state = json.loads((base / "tokenizer.json").read_text())
    (base / "tokenizer.json").write_text(json.dumps(state | changes))
    return base


def splitting_at(pattern: str) -> dict[str, Any]:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]}}


@pytest.mark.parametrize("pattern", KNOWN)
def test_patterns_of_known_tokenizers_are_used(tiny_base: Path, tmp_path: Path, pattern: str) -> None:
    base = Base(copied(tiny_base, tmp_path, **splitting_at(pattern)))
    assert encode_texts(["the cat  sat"], base.tokenizer)


@pytest.mark.parametrize("pattern", HOSTILE, ids=lambda pattern: pattern[:20])
def test_a_pattern_that_may_take_for_ever_is_refused(tiny_base: Path, tmp_path: Path, pattern: str) -> None:
    with pytest.raises(
        UserError, match=r"tokenizer\.json: its pattern .* may take for ever on some texts; use another"
    ):
        assert Base(copied(tiny_base, tmp_path, **splitting_at(pattern))).tokenizer
    assert problem_of({"normalizer": {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}})


def test_a_pattern_that_gives_up_on_a_text_is_one_line(tiny_base: Path) -> None:
    from tokenizers import Regex, pre_tokenizers

    tokenizer = Base(tiny_base).tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    with pytest.raises(UserError, match="cannot cut a text into words"), deadline(60):
        encode_texts(["a" * 50 + "!"], tokenizer)


def replacing(count: int, pattern: dict[str, str], content: str) -> dict[str, Any]:
    step = {"type": "Replace", "pattern": pattern, "content": content}
    return {"normalizer": {"type": "Sequence", "normalizers": [step] * count}}


GROWING = [
    replacing(60, {"String": "a"}, "aa"),
    replacing(1, {"String": "a"}, "a" * 5000),
    replacing(9, {"Regex": ""}, "aaa"),
]


@pytest.mark.parametrize("change", GROWING)
def test_replacements_that_make_texts_grow_at_will_are_refused(
    tiny_base: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=r"its replacements may make a text .* times longer"):
        assert Base(copied(tiny_base, tmp_path, **change)).tokenizer
    assert Base(copied(tiny_base, tmp_path, **replacing(3, {"String": " "}, "▁"))).tokenizer


@pytest.mark.parametrize(
    "template", ["{% for i in range(10**9) %}{% endfor %}", "{{ 'a' * 10**10 }}", "{{ ''.__class__ }}"]
)
def test_a_chat_template_is_never_run(tiny_base: Path, tmp_path: Path, template: str) -> None:
    base = copied(tiny_base, tmp_path)
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    (base / "chat_template.jinja").write_text(template)
    with deadline(60):
        assert Base(base).tokenizer.chat_template == template
        assert render_chat([{"role": "user", "content": "hi"}]) == "User: hi\n\nAssistant:"


STATE: dict[str, Any] = {
    "version": "1.0", "truncation": None, "padding": None, "normalizer": {"type": "NFC"},
    "added_tokens": [{"id": 2, "content": "<|endoftext|>", "single_word": False, "lstrip": False, "rstrip": False,
                      "normalized": False, "special": True}],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "post_processor": None, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
    "model": {"type": "BPE", "dropout": None, "unk_token": None, "vocab": {"a": 0, "b": 1, "<|endoftext|>": 2, "ab": 3},
              "merges": [["a", "b"]]},
}  # fmt: skip
CONFIG = {
    "tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "bos_token": {"content": "<|endoftext|>"},
    "model_max_length": 64, "added_tokens_decoder": {"2": {"content": "<|endoftext|>", "special": True}},
    "chat_template": "x", "auto_map": {"AutoTokenizer": ["x.Y", None]},
}  # fmt: skip
VALID = {
    "tokenizer.json": STATE,
    "tokenizer_config.json": CONFIG,
    "special_tokens_map.json": {"eos_token": "<|endoftext|>"},
    "added_tokens.json": {"<x>": 4},
}


@fuzz(60)
@given(data=st.data(), name=st.sampled_from([*VALID, "vocab.json", "merges.txt"]))
def test_any_tokenizer_is_read_or_refused(
    data: st.DataObject, name: str, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = tmp_path_factory.getbasetemp() / "fuzzed-tokenizer"
    shutil.copytree(tiny_base, base, dirs_exist_ok=True)
    parts = {"vocab.json": STATE["model"]["vocab"], "merges.txt": "#version: 0.2\na b\n"}
    used = VALID | parts if name in parts else VALID
    for other, content in used.items():
        (base / other).write_text(content if isinstance(content, str) else json.dumps(content))
    if name in parts:
        (base / "tokenizer.json").unlink()
    broken = damaged_bytes(parts[name].encode()) if name == "merges.txt" else damaged_json(used[name])
    (base / name).write_bytes(data.draw(broken))

    def read() -> None:
        found = Base(base)
        assert found.tokenizer_fingerprint
        encode_texts(["ab  ba\n\nab"], found.tokenizer)

    with deadline():
        read_or_refuse(read)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_flipped_byte_is_found_or_harmless(tiny_base: Path, tmp_path: Path, name: str) -> None:
    """Refused, or another fingerprint, or the same ids."""
    base = copied(tiny_base, tmp_path)
    text, content = "the cat sat on it's  mat\n\nCafé 東京 12", (base / name).read_bytes()
    true, ids = Base(base).tokenizer_fingerprint, encode_texts([text], Base(base).tokenizer)
    for seed in range(25):
        dice = random.Random(seed)
        at = dice.randrange(len(content))
        (base / name).write_bytes(content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :])
        found = Base(base)
        try:
            same = found.tokenizer_fingerprint != true or encode_texts([text], found.tokenizer) == ids
        except UserError:
            continue
        assert same, seed


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tiny_base: Path, tmp_path: Path) -> None:
    import os

    base = copied(tiny_base, tmp_path)
    (base / "tokenizer_config.json").unlink()
    os.mkfifo(base / "tokenizer_config.json")
    started = time.monotonic()
    with pytest.raises(UserError, match="it is not a file"), deadline(60):
        assert Base(base).tokenizer
    assert time.monotonic() - started < 30
