"""`peftune eval`: the figures are those of a plain loop over documents, whatever the batch, and the right ones."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2LMHeadModel

from peftune.adapters import directory
from peftune.cli import main
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

DOCUMENTS = {
    "animals": [
        "the cat sat on the mat",
        "a dog",
        "the cat and the dog and the cat sat on the log " * 30,
        "naïve 東京",
    ],
    "short": ["x", "😀", "on a mat"],
}
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two domains as JSON lines; one document is five times as long as the context."""
    folder = tmp_path_factory.mktemp("corpora")
    paths = {}
    for name, texts in DOCUMENTS.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return paths


@pytest.fixture(scope="module")
def adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain PEFT adapter with random values."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    with quiet_peft():
        config = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["attn.c_attn", "mlp.c_proj"])
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


@pytest.fixture
def evaluate(corpora: dict[str, Path], tiny_base: Path, tmp_path: Path) -> Evaluate:
    """`evaluate("--batch", "3")`: what the command writes as JSON for both domains."""

    def call(*options: str) -> dict[str, Any]:
        data = [option for name, path in corpora.items() for option in ("--data", f"{name}={path}")]
        arguments = ["eval", "--base", str(tiny_base), *data, "--json", str(tmp_path / "f.json"), *options]
        assert main.run(arguments) == 0
        found: dict[str, Any] = json.loads((tmp_path / "f.json").read_text())
        return found

    return call


def plain_loop(model: Any, tokenizer: Any, texts: list[str], context: int = 64) -> tuple[float, int]:
    """Summed nats in float64 and the number of scored tokens, one document at a time, windows overlapping by one."""
    model = model.double().eval()
    end, nats, tokens = tokenizer.eos_token_id, 0.0, 0
    for text in texts:
        ids = [end, *tokenizer(text, add_special_tokens=False)["input_ids"], end]
        for start in range(0, len(ids) - 1, context - 1):
            window = torch.tensor([ids[start : start + context]])
            with torch.no_grad():
                log_p = model(window).logits[0, :-1].log_softmax(-1)
            nats -= float(log_p.gather(1, window[0, 1:, None]).sum())
            tokens += window.shape[1] - 1
    return nats, tokens


def refusal(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main.run(["eval", *arguments]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("peftune: ")
    return line


def test_the_base_is_scored_as_a_plain_loop_over_documents_does(evaluate: Evaluate, tiny_base: Path) -> None:
    found, tokenizer = evaluate(), Base(tiny_base).tokenizer
    for name, texts in DOCUMENTS.items():
        nats, tokens = plain_loop(GPT2LMHeadModel.from_pretrained(tiny_base), tokenizer, texts)
        size = sum(len(text.encode()) for text in texts)
        assert max(len(tokenizer.encode(text)) for text in texts) > 3 * 64 or name == "short"
        assert found["domains"][name] == {"documents": len(texts), "tokens": tokens, "bytes": size}
        row = found["rows"]["base"][name]
        np.testing.assert_allclose(row["loss"], nats / tokens, rtol=1e-6)
        np.testing.assert_allclose(row["perplexity"], math.exp(nats / tokens), rtol=1e-5)
        np.testing.assert_allclose(row["bits_per_byte"], nats / math.log(2) / size, rtol=1e-6)


def test_an_adapter_is_scored_as_peft_computes_it(evaluate: Evaluate, tiny_base: Path, adapter: Path) -> None:
    found, tokenizer = evaluate("--adapter", f"mine={adapter}"), Base(tiny_base).tokenizer
    assert list(found["rows"]) == ["base", "mine"]
    for name, texts in DOCUMENTS.items():
        with quiet_peft():
            model = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), adapter)
        nats, tokens = plain_loop(model, tokenizer, texts)
        np.testing.assert_allclose(found["rows"]["mine"][name]["loss"], nats / tokens, rtol=1e-6)
        assert abs(found["rows"]["base"][name]["loss"] - nats / tokens) > 1e-3


def test_an_adapter_is_read_once(evaluate: Evaluate, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(directory, "read_provenance", lambda path: read.append(path))
    evaluate("--adapter", f"mine={adapter}", "--adapter", f"other={adapter}")
    assert read == [adapter, adapter]


def test_the_json_holds_what_the_design_says(evaluate: Evaluate, adapter: Path) -> None:
    found = evaluate("--adapter", f"mine={adapter}")
    assert found.keys() == {"domains", "rows", "intervals", "precision", "device"}
    assert (found["precision"], found["device"]) == ("fp32", "CPU") and found["domains"].keys() == DOCUMENTS.keys()
    for row in found["rows"].values():
        assert row.keys() == DOCUMENTS.keys()
        assert all(figures.keys() == {"loss", "perplexity", "bits_per_byte"} for figures in row.values())
    for domain, row in found["intervals"]["mine"].items():
        base, mine = (found["rows"][name][domain]["loss"] for name in ("base", "mine"))
        assert row.keys() == {"perplexity", "against_base"}
        np.testing.assert_allclose(row["against_base"]["loss"], mine - base, rtol=1e-9)
        assert row["against_base"]["interval"][0] <= mine - base <= row["against_base"]["interval"][1]
    assert found["intervals"]["base"]["short"].keys() == {"perplexity"}


@pytest.mark.parametrize("options", [("--batch", "1"), ("--batch", "3"), ("--block-size", "64"), ("--batch", "1000")])
def test_the_batch_changes_nothing(evaluate: Evaluate, adapter: Path, options: tuple[str, ...]) -> None:
    rows = ("--adapter", f"mine={adapter}")
    wanted, found = evaluate(*rows), evaluate(*rows, *options)
    assert found["domains"] == wanted["domains"]
    for name, row in wanted["rows"].items():
        for domain, figures in row.items():
            np.testing.assert_allclose(found["rows"][name][domain]["loss"], figures["loss"], rtol=1e-6)


def test_shorter_blocks_score_every_token_once(evaluate: Evaluate, tiny_base: Path) -> None:
    full, found = evaluate(), evaluate("--block-size", "16")
    assert found["domains"] == full["domains"]
    nats, tokens = plain_loop(
        GPT2LMHeadModel.from_pretrained(tiny_base), Base(tiny_base).tokenizer, DOCUMENTS["animals"], context=16
    )
    np.testing.assert_allclose(found["rows"]["base"]["animals"]["loss"], nats / tokens, rtol=1e-6)


def test_bf16_is_close_and_not_the_same(evaluate: Evaluate, adapter: Path) -> None:
    rows = ("--adapter", f"mine={adapter}")
    exact, rounded = evaluate(*rows)["rows"]["mine"], evaluate(*rows, "--precision", "bf16")["rows"]["mine"]
    for domain in DOCUMENTS:
        assert rounded[domain]["loss"] != exact[domain]["loss"]
        np.testing.assert_allclose(rounded[domain]["loss"], exact[domain]["loss"], rtol=2e-2)


def test_only_the_completion_is_scored(tiny_base: Path, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"q": "the cat", "a": "sat"}\n')
    columns = ["--column", "prompt=q", "--column", "completion=a"]
    call = ["eval", "--base", str(tiny_base), "--data", str(path), *columns, "--json", str(tmp_path / "f.json")]
    assert main.run(call) == 0
    facts = json.loads((tmp_path / "f.json").read_text())["domains"]["p"]
    assert facts == {"documents": 1, "tokens": len(Base(tiny_base).tokenizer.encode(" sat")) + 1, "bytes": 4}


def test_an_adapter_of_another_base_is_refused_with_both_fingerprints(
    tiny_base: Path, adapter: Path, corpora: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:

    other = shutil.copytree(tiny_base, tmp_path / "other")
    model = GPT2LMHeadModel.from_pretrained(other)
    model.transformer.wte.weight.data[0, 0] += 1
    model.save_pretrained(other)
    owned = shutil.copytree(adapter, tmp_path / "owned")
    (owned / "peftune.json").write_text(json.dumps(Base(tiny_base, str(tiny_base)).identity()))
    line = refusal(capfd, "--base", str(other), "--adapter", f"a={owned}", "--data", str(corpora["short"]))
    assert Base(tiny_base).fingerprint[:12] in line and Base(other).fingerprint[:12] in line
    assert main.run(["eval", "--adapter", f"a={owned}", "--data", str(corpora["short"])]) == 0


def test_names_that_cannot_be_are_refused(
    tiny_base: Path, adapter: Path, corpora: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    data = ["--base", str(tiny_base), "--data", str(corpora["short"])]
    assert "cannot be called base" in refusal(capfd, *data, "--adapter", f"base={adapter}")
    assert "a is given twice" in refusal(capfd, *data, "--adapter", f"a={adapter}", "--adapter", f"a={adapter}")
    assert "expected 8 to 64" in refusal(capfd, *data, "--block-size", "65")


@pytest.mark.parametrize("name", ["poems-v1.5", "h", "transformer", "lora_A", "default", "[bold]"])
def test_an_adapter_may_have_any_name(evaluate: Evaluate, adapter: Path, name: str) -> None:
    wanted = evaluate("--adapter", f"mine={adapter}")["rows"]["mine"]
    assert evaluate("--adapter", f"{name}={adapter}")["rows"][name] == wanted
