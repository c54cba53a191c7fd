"""A merged model in Transformers' pipeline writes what peftune writes: its tokenizer begins texts as training did."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, pipeline

from peftune.adapters.merge.merge import merge
from peftune.cli.main import run
from peftune.inference.generate import generate
from peftune.inference.perplexity import evaluate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base, open_base

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0)
# PEFT asks Transformers under a deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def without_tokenizer_json(base: Path) -> None:
    """As old uploads are: vocab.json and merges.txt alone."""
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    (base / "vocab.json").write_text(json.dumps(model["vocab"] | {"<|endoftext|>": len(model["vocab"])}))
    (base / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()


def beginning_already(base: Path) -> None:
    """As a merge of peftune's, or whoever sets Transformers' flag, leaves it."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_bos_token = True
    tokenizer.save_pretrained(base)


@pytest.mark.parametrize("change", [lambda base: None, without_tokenizer_json, beginning_already])
def test_a_pipeline_writes_what_peftune_writes(
    change: Any, make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_base, tmp_path / "base")
    change(tmp_path / "base")
    adapter = make_adapter(base=tmp_path / "base", target_modules=["c_attn", "c_fc"])
    report = merge(adapter, tmp_path / "out", tmp_path / "base", texts=tools.texts)
    assert report.tokenizer_begins_texts and report.begin_of_text == "<|endoftext|>"
    writer = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    for prompt in ("the cat", "naïve 東京"):
        options = {"do_sample": False, "max_new_tokens": 12, "max_length": None}
        (ids,) = writer(prompt, return_tensors=True, **options)
        (own,) = generate(prompt, tmp_path / "base", adapter, GREEDY)
        assert tuple(ids["generated_token_ids"][-len(own.ids) :]) == own.ids
        (shown,) = writer(prompt, return_full_text=False, **options)
        assert shown["generated_text"] == own.text
        assert generate(prompt, tmp_path / "out", settings=GREEDY) == [own]


def test_peftune_itself_adds_the_token_once_on_a_merged_model(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    """In prompts, in what is scored, in what is trained on, and in a merge on a merge."""
    first, second = make_adapter(), tmp_path / "second"
    merge(first, tmp_path / "out", tiny_base, texts=tools.texts)
    merged = open_base(tmp_path / "out")
    assert merged.tokenizer_fingerprint == Base(tiny_base).tokenizer_fingerprint
    (tmp_path / "t.txt").write_text("\n\n".join(tools.texts))
    scored = [
        evaluate(base, {"t": tmp_path / "t.txt"}, adapters)
        for base, adapters in ((tiny_base, {"a": first}), (merged, {}))
    ]
    assert scored[0]["domains"] == scored[1]["domains"]
    assert scored[1]["rows"]["base"]["t"]["loss"] == pytest.approx(scored[0]["rows"]["a"]["t"]["loss"], abs=1e-5)
    make_adapter("second", tmp_path / "out")
    merge(second, tmp_path / "again", tmp_path / "out", texts=tools.texts)
    ids = [
        AutoTokenizer.from_pretrained(path)("the cat")["input_ids"] for path in (tmp_path / "out", tmp_path / "again")
    ]
    assert (
        ids[0]
        == ids[1]
        == [merged.tokenizer.eos_token_id, *AutoTokenizer.from_pretrained(tiny_base)("the cat")["input_ids"]]
    )


def test_the_merge_says_how_to_call_it(
    make_adapter: Any, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["merge", str(make_adapter()), "--base", str(tiny_base), "--out", str(tmp_path / "out"), "--no-verify"])
    assert code == 0
    assert "its tokenizer puts <|endoftext|> before a text" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "merge.json").read_text())["tokenizer_begins_texts"] is True
