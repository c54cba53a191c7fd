"""Every verb that writes JSON writes what any parser reads, or ends with exit code 4 and writes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from peftune.cli import main
from peftune.files import parse_json
from peftune.model.lora import quiet_peft


@pytest.fixture
def here(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text, adapters `a` and `b`, `zero` that changes nothing, a fine-tune, and a base with a NaN in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.jsonl").write_text("".join(json.dumps({"text": f"the cat {n} sat on a mat"}) + "\n" for n in range(9)))
    for seed, name in enumerate(("zero", "a", "b")):
        torch.manual_seed(seed)
        with quiet_peft():
            config = LoraConfig(r=2, target_modules=["attn.c_attn"], fan_in_fan_out=True)
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(tiny_base), config)
            for parameter_name, parameter in model.named_parameters():
                if "lora_B" in parameter_name:
                    parameter.data += 0.1 * seed * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / name)
    for name, value in (("tuned", 1.5), ("broken", torch.nan)):
        shutil.copytree(tiny_base, tmp_path / name)
        weights = {key: tensor.clone() for key, tensor in load_file(tiny_base / "model.safetensors").items()}
        weights["transformer.h.0.attn.c_attn.weight"][0, 0] = value
        save_file(weights, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


VERBS = {
    "data": "data text.jsonl --base BASE",
    "eval": "eval --base BASE --adapter a --data x=text.jsonl",
    "routing": "eval --routing --base BASE --adapter a --adapter b --data a=text.jsonl",
    "generate": "generate --base BASE --adapter a --prompt the --max-new-tokens 3",
    "list": "adapters list .",
    "show": "adapters show a --base BASE",
    "show zero": "adapters show zero --base BASE",
    "compare": "adapters compare a b",
    "compare zero": "adapters compare a zero",
    "compare zeros": "adapters compare zero zero",
    "combine": "adapters combine a b --weights 0.5,0.5 --out new --base BASE",
    "combine zero": "adapters combine zero zero --weights 1,1 --out new --base BASE",
    "extract": "adapters extract --base BASE --tuned tuned --rank 2 --out new",
}


@pytest.mark.parametrize("verb", VERBS)
def test_json_is_strict(here: Path, tiny_base: Path, verb: str) -> None:
    code = main.run([*VERBS[verb].replace("BASE", str(tiny_base)).split(), "--json", "f.json"])
    assert code in ((0, 2) if "zero" in verb else (0,))
    if code == 0:
        assert parse_json(Path("f.json").read_bytes())


@pytest.mark.parametrize("verb", ["eval", "routing", "generate", "show", "combine", "extract"])
def test_on_a_base_that_is_not_finite_nothing_is_called_a_result(
    here: Path, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    code = main.run([*VERBS[verb].replace("BASE", "broken").split(), "--json", "f.json"])
    assert "Traceback" not in capsys.readouterr().err
    if code == 0:
        assert verb in ("show", "combine") and parse_json(Path("f.json").read_bytes())
    else:
        assert code in (2, 4) and not Path("f.json").exists() and not Path("new").exists()
