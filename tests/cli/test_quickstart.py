"""The first command that a newcomer types, as they type it, with a file of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from peftune.cli.quickstart import quickstart
from peftune.config.data_section import Source
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.routing.accuracy import measure_routing
from peftune.inference.routing.route import route


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("newcomer")
    own = folder / "tides.txt"
    lines = [
        f"On day {day} the tide at the old pier stood {2 + day % 5} feet above the lower mark." for day in range(400)
    ]
    own.write_text("\n\n".join(lines), encoding="utf-8")
    command = [sys.executable, "-m", "peftune", "quickstart", "--out", str(folder / "out"), str(own)]
    return folder / "out", subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
def test_every_adapter_is_clearly_better_on_its_own_domain(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = made
    assert process.returncode == 0, process.stderr
    facts = json.loads((out / "quickstart.json").read_text(encoding="utf-8"))
    assert set(facts["domains"]) == {"code", "docs", "unicode", "tides"}
    for name in ("docs", "unicode", "tides"):
        assert facts["rows"][name][name]["perplexity"] < 0.75 * facts["rows"]["base"][name]["perplexity"]
    assert facts["merge"]["modules_applied"] == facts["merge"]["modules_in_adapter"] == 24
    assert facts["merge"]["max_abs_logit_difference"] < 1e-3


@pytest.mark.slow
def test_it_says_what_it_made_and_what_to_do_next(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, process = made
    for word in ("Perplexity", "modules applied", "adapter unicode", "Next:", "peftune generate"):
        assert word in process.stdout, process.stdout
    assert (out / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert "Traceback" not in process.stderr and "Warning" not in process.stderr, process.stderr


@pytest.mark.slow
def test_the_samples_read_like_the_domain(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    samples = {
        s["adapter"]: s for s in json.loads((made[0] / "quickstart.json").read_text(encoding="utf-8"))["samples"]
    }
    letters = [c for c in samples["unicode"]["text"] if c.isalpha()]
    assert sum(c.isupper() for c in letters) > 0.95 * len(letters) > 0
    assert len(set(samples["unicode"]["text"].splitlines())) >= 4 and "LETTER" in samples["unicode"]["text"]
    assert "tide" in samples["tides"]["text"]


@pytest.mark.slow
def test_the_merged_directory_is_an_ordinary_gpt2(made: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    merged = made[0] / "merged-docs"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
    assert model.config.model_type == "gpt2" and not hasattr(model, "peft_config")
    written = model.generate(**tokenizer("The", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert written.shape[1] > 1


@pytest.mark.slow
def test_prompts_of_the_three_built_in_domains_find_their_adapter(
    made: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    """The base learnt code and nothing else, so code is its domain."""
    adapters = {name: made[0] / "adapters" / name for name in ("docs", "unicode")}
    domains = {"base": "code", "docs": "docs", "unicode": "unicode"}
    data = {name: [Source(path=f"builtin:{domain}/heldout")] for name, domain in domains.items()}
    found = measure_routing("builtin:small", data, adapters, prompt_tokens=64, max_prompts=60)
    for domain, facts in found["routing"].items():
        assert facts["right"] > 0.85 * facts["prompts"], (domain, facts)
    assert max(found["errors"].values()) < 0.1
    bank = AdapterBank("builtin:small")
    for name, directory in adapters.items():
        bank.add(name, directory)
    for prompt in ("", " ", "Hello", "I love pizza"):
        assert route(bank, bank.encode(prompt)).name is None, prompt


def test_another_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(UserError, match="was not made by quickstart"):
        quickstart(tmp_path, [])
    assert (tmp_path / "mine").read_text() == "keep"


def test_a_single_document_cannot_be_held_out(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("only one line")
    with pytest.raises(UserError, match="one document only"):
        quickstart(tmp_path / "out", [tmp_path / "one.txt"])
