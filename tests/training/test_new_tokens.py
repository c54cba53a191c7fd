"""`data.new_tokens`: their rows are learnt, merged and reproducible, and nothing else of the embedding moves."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.gguf.vocabulary import gguf_vocabulary
from peftune.adapters.inspect.describe import describe
from peftune.adapters.merge.merge import merge
from peftune.config.recipe import Recipe
from peftune.data.tokens.encode import encode_texts
from peftune.errors import Interrupted, UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.generate import generate
from peftune.inference.perplexity import evaluate
from peftune.inference.settings import GenerationSettings
from peftune.model.base import open_base
from peftune.model.lora import quiet_peft
from peftune.model.tokenizer import with_new_tokens
from peftune.training.distributed.zero import refuse_for_zero3
from peftune.training.metrics import read_metrics
from peftune.training.run import train

NAMES = 'data.new_tokens=["<|name|>", "<|scene|>"]'
TEXT = "<|scene|> the cat sat <|name|> on a mat"


@pytest.fixture
def tagged(recipe: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """A recipe over texts with two new tokens in them."""
    data = tmp_path / "tagged.jsonl"
    data.write_text("".join(json.dumps({"text": f"{TEXT} {n}"}) + "\n" for n in range(20)), encoding="utf-8")
    return lambda *overrides: recipe(f"data.train={data}", NAMES, *overrides)


def with_peft(base: Path, adapter: Path, rows: int) -> torch.nn.Module:
    model = GPT2LMHeadModel.from_pretrained(base)
    if rows > model.config.vocab_size:
        model.resize_token_embeddings(rows, mean_resizing=False)
    with quiet_peft():
        return PeftModel.from_pretrained(model, adapter).eval()


@pytest.mark.parametrize("case", ["tied", "untied", "padded"])
def test_only_rows_of_new_tokens_are_learnt_and_merged(
    case: str, tagged: Callable[..., Recipe], tiny_base: Path, tmp_path: Path
) -> None:
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "merged"
    shutil.copytree(tiny_base, base)
    known = GPT2Config.from_pretrained(tiny_base).vocab_size
    if case != "tied":
        padded, tied = known + (20 if case == "padded" else 0), case == "padded"
        torch.manual_seed(3)
        GPT2LMHeadModel(
            GPT2Config.from_pretrained(tiny_base, vocab_size=padded, tie_word_embeddings=tied)
        ).save_pretrained(base)
    train(tagged(f"base={base}", "optim.steps=2", "run.samples=['<|name|>']"))
    ids = [known, known + 1]
    stored = load_file(adapter / "adapter_model.safetensors")
    rows = {name: tensor for name, tensor in stored.items() if "tokens_delta" in name}
    assert len(rows) == (2 if case == "untied" else 1) and {tuple(r.shape) for r in rows.values()} == {(2, 32)}
    assert not any(name.endswith(("wte.weight", "lm_head.weight")) for name in stored)

    tokenizer = AutoTokenizer.from_pretrained(adapter)
    encoded = encode_texts([TEXT], tokenizer)[0]
    assert encoded[0] == known + 1 and known in encoded and tokenizer.decode(encoded) == TEXT
    merge(adapter, out, str(base), texts=[TEXT])
    assert AutoTokenizer.from_pretrained(out).convert_tokens_to_ids("<|scene|>") == known + 1
    merged, model = load_file(out / "model.safetensors"), with_peft(base, adapter, known + 2)
    with torch.no_grad():
        logits = model(torch.tensor([encoded])).logits
        assert (
            GPT2LMHeadModel.from_pretrained(out).eval()(torch.tensor([encoded])).logits - logits
        ).abs().max() <= 1e-5
    for name, before in load_file(base / "model.safetensors").items():
        if name in ("transformer.wte.weight", "lm_head.weight"):
            old = [row for row in range(len(before)) if row not in ids]
            assert torch.equal(merged[name][old], before[old])
            assert not torch.equal(merged[name][known], merged[name][known + 1]), "both began as the same mean"
    bank = AdapterBank(str(out), device="cpu")
    assert bank.encode(TEXT)[1:] == encoded
    check_unmerged(base, adapter, out, tmp_path, model)


def check_unmerged(base: Path, adapter: Path, merged: Path, folder: Path, model: torch.nn.Module) -> None:
    """Without a merge it is asked and scored as PEFT computes it, in any company; a server refuses it."""
    settings = GenerationSettings(max_new_tokens=6, temperature=0.0, ignore_eos=True)
    bank, ids = AdapterBank(str(base), device="cpu"), AdapterBank(str(merged), device="cpu").encode(TEXT)
    alone = bank.generate([TEXT, "the cat"], settings)
    bank.add("new", adapter)
    found = bank.generate([TEXT, TEXT, "the cat"], settings, ["new", None, None])
    written = list(ids)
    with torch.no_grad():
        for _ in range(6):
            known = len(bank.tokenizer_of("new"))
            written.append(int(model(torch.tensor([written])).logits[0, -1, :known].argmax()))
    assert bank.encode(TEXT, "new") == ids and list(found[0].ids) == written[len(ids) :]
    assert found[1:] == alone and len(bank.encode(TEXT)) > len(ids)
    assert found[0] == generate(TEXT, str(base), adapter, settings)[0]
    beams = dataclasses.replace(settings, beams=2, ignore_eos=False)
    assert generate(TEXT, str(base), adapter, beams)[0].ids == generate(TEXT, str(merged), None, beams)[0].ids
    path = folder / "scored.jsonl"
    path.write_text(json.dumps({"text": TEXT}) + "\n")
    both = (
        evaluate(str(base), {"t": path}, {"new": adapter})["rows"]["new"]["t"],
        evaluate(str(merged), {"t": path})["rows"]["base"]["t"],
    )
    assert both[0] == pytest.approx(both[1], rel=1e-5)
    assert describe(adapter, str(base)).rows.keys() >= {"transformer.wte.weight"}
    with pytest.raises(UserError, match="fold it in with peftune merge first"):
        bank.add("served", adapter, new_tokens=False)


def test_new_tokens_go_with_parsed_special_tokens(
    tagged: Callable[..., Recipe], tiny_base: Path, tmp_path: Path
) -> None:
    data, end = tmp_path / "both.jsonl", GPT2Config.from_pretrained(tiny_base).eos_token_id
    text = f"a<|endoftext|>b {TEXT}"
    data.write_text(json.dumps({"text": text}) + "\n")
    for way, ends in (("parse", 1), ("text", 0)):
        adapter = tmp_path / way
        train(tagged(f"data.train={data}", "data.validation=0", f"data.special_tokens={way}", "optim.steps=1",
                     f"run.out={adapter}"))  # fmt: skip
        merge(adapter, tmp_path / f"{way}-merged", texts=[TEXT])
        bank = AdapterBank(str(tiny_base), device="cpu")
        bank.add("new", adapter)
        ids = bank.encode(text, "new")[1:]
        assert ids.count(end) == ends and {300, 301} <= set(ids)
        assert AdapterBank(str(tmp_path / f"{way}-merged"), device="cpu").encode(text)[1:] == ids


def test_rows_without_a_fitting_tokenizer_are_refused(
    tagged: Callable[..., Recipe], tiny_base: Path, tmp_path: Path
) -> None:
    adapter = train(tagged("optim.steps=1")).out
    path = adapter / "tokenizer.json"
    stored = json.loads(path.read_text())
    words = stored["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    path.write_text(json.dumps(stored))
    (adapter / "peftune.json").unlink()  # which has its hash
    bank = AdapterBank(str(tiny_base), device="cpu")
    with pytest.raises(UserError, match=r"in its tokenizer '.' is not token"):
        bank.add("new", adapter)
    path.write_text("{}")
    with pytest.raises(UserError, match=f"adapter {adapter}: the tokenizer"):
        bank.add("new", adapter)
    path.unlink()
    (adapter / "vocab.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="has 302 tokens, the base has 300; fold it in with peftune merge first"):
        bank.add("new", adapter)


def test_a_resumed_run_gives_the_same_rows(
    tagged: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(tagged(f"run.out={tmp_path / 'whole'}")).out
    from peftune.training import run

    step = run.train_step

    def stop_after_one(learner: Any, accelerator: Any, stop: Any, console: Any) -> Any:
        if learner.state.step == 1:
            stop.name = "SIGTERM"
            raise run.StopNow
        return step(learner, accelerator, stop, console)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(run, "train_step", stop_after_one)
        train(tagged())
    cut = train(tagged()).out
    first, second = (load_file(out / "adapter_model.safetensors") for out in (whole, cut))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert "more is trained than A and B" in read_metrics(cut / "metrics.jsonl")[0]["function"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['data.new_tokens=["the"]'], "the is a token of the base already"),
        (['data.new_tokens=["<|a|>", "<|a|>"]'], "named twice"),
        (['data.new_tokens=[" a"]'], "white space at an end"),
        (
            ['data.new_tokens=["&"]'],
            "data.new_tokens.0: expected a name of 2 to 100 characters like <|name|>, found '&'",
        ),
        (['data.new_tokens=["a\\nb"]'], "control character"),
        (["lora.modules_to_save=[wte]"], "leave wte out of lora"),
        (["lora.targets=[c_attn, lm_head]"], "leave lm_head out of lora"),
        (["quantize=int8"], "cannot be learnt with quantize int8"),
    ],
    ids=str,
)
def test_new_tokens_that_cannot_be_learnt_are_refused(
    overrides: list[str], message: str, tagged: Callable[..., Recipe]
) -> None:
    with pytest.raises(UserError, match=message):
        train(tagged(*overrides))


def test_zero3_refuses_new_tokens(tagged: Callable[..., Recipe]) -> None:
    with pytest.raises(UserError, match=r"data\.new_tokens"):
        refuse_for_zero3(tagged())


def test_the_base_knows_nothing_of_the_new_tokens(tagged: Callable[..., Recipe], tiny_base: Path) -> None:
    found = open_base(str(tiny_base))
    size = len(found.tokenizer)
    delivery = train(tagged("optim.steps=1"))
    assert len(found.tokenizer) == size
    written = json.loads((delivery.out / "peftune.json").read_text())
    assert written["tokenizer_fingerprint"] == found.tokenizer_fingerprint


@pytest.mark.parametrize(
    ("names", "problem"), [(["<|name|>", "<|scene|>"], ""), (["<|a", "a|>"], "'<|a' ends as 'a|>' begins")]
)
def test_gguf_has_new_tokens_where_llama_cpp_cuts_them_out_as_we_do(
    names: list[str], problem: str, tokenizer: PreTrainedTokenizerFast
) -> None:
    grown = with_new_tokens(tokenizer, names)
    if problem:
        with pytest.raises(UserError, match=re.escape(problem)):
            gguf_vocabulary(grown, len(grown))
        return
    found = gguf_vocabulary(grown, len(grown))
    assert found.tokens[-2:] == names and found.kinds[-2:] == [4, 4]
    assert found.tokens[:-2] == gguf_vocabulary(tokenizer, len(tokenizer)).tokens
