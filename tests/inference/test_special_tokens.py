"""Prompts are read as their adapter was trained: bank, generate, eval, merge and combine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftune.adapters.edit.combine import combine
from peftune.adapters.merge.merge import merge
from peftune.config.recipe import recipe_from
from peftune.data.tokens.encode import encode_texts
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.generate import generate
from peftune.inference.perplexity import evaluate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base
from peftune.training.run import train

PROMPT = "<|title|> the cat"
GREEDY = GenerationSettings(max_new_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A base with `<|title|>`, and an adapter of each kind, trained on a text that spells it out."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("titled")
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_base), GPT2LMHeadModel.from_pretrained(tiny_base)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|title|>"]})
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "t.txt").write_text("<|title|>the cat sat\n\n<|title|>a dog ran to my log\n")
    for way in ("parse", "text"):
        values = {
            "base": str(folder / "base"), "lora": {"rank": 2, "targets": "attention"}, "optim": {"steps": 3, "lr": 0.1},
            "data": {"train": str(folder / "t.txt"), "validation": 0, "special_tokens": way},
            "batch": {"global_size": 1}, "run": {"out": str(folder / way), "precision": "fp32", "samples": [PROMPT]},
        }  # fmt: skip
        train(recipe_from(values, []))
    yield folder


def test_a_prompt_is_read_as_its_adapter_was_trained(folder: Path) -> None:
    bank = AdapterBank(str(folder / "base"))
    for way in ("parse", "text"):
        bank.add(way, folder / way)
    title, parsed = bank.tokenizer.convert_tokens_to_ids("<|title|>"), bank.tokenizer(PROMPT)["input_ids"]
    assert bank.encode(PROMPT, "parse") == [bank.begin, *parsed] and title in parsed
    plain = [bank.begin, *encode_texts([PROMPT], bank.tokenizer)[0]]
    assert bank.encode(PROMPT, "text") == bank.encode(PROMPT) == plain and title not in plain
    texts = bank.generate([PROMPT] * 3, GREEDY, ["parse", "text", None])
    assert [found.prompt_tokens for found in texts] == [1 + len(parsed), len(plain), len(plain)]
    (beams,) = generate(
        PROMPT, str(folder / "base"), folder / "parse", GenerationSettings(max_new_tokens=2, temperature=0.0, beams=2)
    )
    assert beams.prompt_tokens == 1 + len(parsed)
    samples = [json.loads(line) for line in (folder / "parse" / "metrics.jsonl").read_text().splitlines()]
    assert any(one.get("prompt") == PROMPT for one in samples)


def test_a_merge_reads_prompts_the_same_and_a_combination_too(folder: Path, tmp_path: Path) -> None:
    report = merge(folder / "parse", tmp_path / "merged")
    assert report.special_tokens == "parse" and Base(tmp_path / "merged").parses_special_tokens
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["special_tokens"] == "parse"
    (one,) = generate(PROMPT, adapter=folder / "parse", settings=GREEDY)
    (other,) = generate(PROMPT, str(tmp_path / "merged"), settings=GREEDY)
    assert (one.ids, one.prompt_tokens) == (other.ids, other.prompt_tokens)
    assert not Base(folder / "base").parses_special_tokens
    combine([folder / "parse", folder / "text"], [0.5, 0.5], tmp_path / "both")
    (both,) = generate(PROMPT, adapter=tmp_path / "both", settings=GREEDY)
    assert both.prompt_tokens == one.prompt_tokens


def test_evaluation_reads_texts_as_the_adapters_do(folder: Path) -> None:
    data = {"titles": folder / "t.txt"}
    found = {way: evaluate(None, data, {way: folder / way}) for way in ("parse", "text")}
    tokens = {way: one["domains"]["titles"]["tokens"] for way, one in found.items()}
    assert tokens["text"] > tokens["parse"]
    with pytest.raises(UserError, match=r"trained with data\.special_tokens: parse, the others not"):
        evaluate(None, data, {way: folder / way for way in ("parse", "text")})


def test_training_says_that_a_token_was_read_as_text(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    values: dict[str, Any] = json.loads((folder / "text" / "peftune.json").read_text())["recipe"]
    train(recipe_from(values, [f"run.out={folder / 'again'}"]))
    said = " ".join(capfd.readouterr().err.split())
    assert "<|title|> inside a text: 2 documents, first " in said and "data.special_tokens: parse" in said
