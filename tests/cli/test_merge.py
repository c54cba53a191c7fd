"""What `peftune merge` says of its result: what it costs, on which text, and whether anything was merged at all."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2LMHeadModel

from peftune.cli import main
from peftune.model.lora import quiet_peft


@pytest.fixture
def adapter(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An adapter, and beside it `zero`, which changes nothing, and a text."""
    monkeypatch.chdir(tmp_path)
    Path("text.csv").write_text("story\n" + "".join(f"the cat {number} sat on a mat\n" for number in range(9)))
    torch.manual_seed(0)
    for name, size in (("zero", 0.0), ("adapter", 0.3)):
        with quiet_peft():
            config = LoraConfig(r=2, target_modules=["attn.c_attn", "mlp.c_fc"], fan_in_fan_out=True)
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base), config)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.data += size * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / name)
    return tmp_path / "adapter"


def test_the_cost_of_rounding_is_measured_on_the_users_text_and_else_named_by_its_probe(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--base", str(tiny_base), "--dtype", "bfloat16", "--data", "text.csv", "--column", "text=story"]
    assert main.run(["merge", str(adapter), "--out", "merged", *settings]) == 0
    said = capsys.readouterr().out
    assert re.search(r"rounding to bfloat16 moved the predictions for \d+ tokens of a probe text by \S+ nats", said)
    assert "costs" not in said
    losses = {name: float(loss) for name, loss in re.findall(r"(base|adapter|merged)\s+│\s+(\d+\.\d{4})", said)}
    assert main.run(["eval", *settings[:2], "--adapter", str(adapter), "--data", "x=text.csv", *settings[-2:],
                     "--json", "base.json"]) == 0  # fmt: skip
    assert main.run(["eval", "--base", "merged", "--data", "x=text.csv", *settings[-2:], "--json", "m.json"]) == 0
    rows, merged = (json.loads(Path(name).read_text())["rows"] for name in ("base.json", "m.json"))
    wanted = {"base": rows["base"], "adapter": rows["adapter"], "merged": merged["base"]}
    assert losses == {name: pytest.approx(of["x"]["loss"], abs=6e-5) for name, of in wanted.items()}
    assert f"{merged['base']['x']['loss'] - rows['adapter']['x']['loss']:+.4f}" in said


def test_a_text_that_cannot_be_read_is_refused_before_anything_is_merged(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.run(["merge", str(adapter), "--out", "merged", "--base", str(tiny_base), "--data", "text2.csv"]) == 2
    assert "did you mean text.csv?" in capsys.readouterr().err and not Path("merged").exists()


def test_an_adapter_that_changes_nothing_is_told(
    adapter: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, changes_nothing in (("zero", True), ("adapter", False)):
        assert main.run(["merge", name, "--out", f"of-{name}", "--base", str(tiny_base)]) == 0
        said = capsys.readouterr().out
        assert ("warning: the adapter changes no weight, so the merged model is the base" in said) is changes_nothing
        assert json.loads(Path(f"of-{name}/merge.json").read_text())["changes_nothing"] is changes_nothing
