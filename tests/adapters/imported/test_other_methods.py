"""PEFT adapters of other methods become LoRAs with the same logits, or are refused with PEFT's reason."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from peftune.cli import main
from peftune.model.lora import quiet_peft

METHODS: dict[str, dict[str, Any]] = {
    "VeraConfig": {"r": 8, "target_modules": ["c_attn"]},
    "AdaLoraConfig": {"target_r": 2, "init_r": 5, "total_step": 10, "target_modules": ["c_attn", "mlp.c_proj"]},
    "VBLoRAConfig": {"vector_length": 16, "target_modules": ["c_fc"]},
    "RandLoraConfig": {"r": 4, "target_modules": ["attn.c_proj"]},
    "GraloraConfig": {"r": 4, "gralora_k": 2, "target_modules": ["c_attn"]},
    "TinyLoraConfig": {"target_modules": ["c_fc"]},
    "UniLoraConfig": {"target_modules": ["c_attn"]},
}
Captured = pytest.CaptureFixture[str]


def write(name: str, settings: dict[str, Any], base: Path, out: Path) -> Path:
    if not hasattr(peft, name):
        pytest.skip(f"this PEFT has no {name}")
    torch.manual_seed(0)
    with quiet_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, name)(task_type="CAUSAL_LM", **settings)
        model = peft.get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        model.save_pretrained(out)
    return out


@pytest.mark.parametrize("name", METHODS)
def test_a_converted_adapter_has_the_logits_of_the_original(
    name: str, tiny_base: Path, tools: SimpleNamespace, tmp_path: Path, capsys: Captured
) -> None:
    source = write(name, METHODS[name], tiny_base, tmp_path / "source")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = tools.logits_with_peft(tiny_base, source)
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    assert main.run(["adapters", "import", str(source), "--out", str(out), "--json", str(figures)]) == 0
    found = tools.logits_with_peft(tiny_base, out)
    assert (found - wanted).abs().max() <= 3e-5 < 1e-2 < (wanted - tools.logits_of(tiny_base)).abs().max()
    told = json.loads(figures.read_text())
    assert told["relative_error"] < 2e-6
    assert max(module["relative_error"] for module in told["modules"].values()) < 2e-6
    assert main.run(["adapters", "show", str(out), "--base", str(tiny_base)]) == 0


def test_a_cut_conversion_states_its_error(tiny_base: Path, tmp_path: Path, capsys: Captured) -> None:
    source = write("VeraConfig", METHODS["VeraConfig"], tiny_base, tmp_path / "source")
    figures = tmp_path / "figures.json"
    asked = [str(source), "--rank", "3", "--out", str(tmp_path / "out"), "--json", str(figures)]
    assert main.run(["adapters", "import", *asked]) == 0
    told = json.loads(figures.read_text())
    assert {module["rank"] for module in told["modules"].values()} == {3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: Any = peft.PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), source)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, module in told["modules"].items():
        exact = model.base_model.model.get_submodule(name).get_delta_weight("default").detach().double().T
        a, b = (stored[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        assert float((exact - b @ a).norm() / exact.norm()) == pytest.approx(module["relative_error"], rel=1e-6)
    assert "relative error" in capsys.readouterr().out


def test_what_peft_cannot_convert_is_refused(tiny_base: Path, tmp_path: Path, capsys: Captured) -> None:
    source = write("IA3Config", {"target_modules": ["c_attn"], "feedforward_modules": []}, tiny_base, tmp_path / "s")
    assert main.run(["adapters", "import", str(source), "--out", str(tmp_path / "out")]) == 2
    assert "peft_type IA3 cannot be converted" in capsys.readouterr().err
    assert main.run(["adapters", "show", str(source)]) == 2
    assert "peftune adapters import converts some" in capsys.readouterr().err


def test_an_older_peft_is_told_apart(
    tiny_base: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("VeraConfig", METHODS["VeraConfig"], tiny_base, tmp_path / "s")
    monkeypatch.delattr(peft, "convert_to_lora")
    assert main.run(["adapters", "import", str(source), "--out", str(tmp_path / "out")]) == 2
    assert f"PEFT {peft.__version__} does not have; install a newer peft" in capsys.readouterr().err


def _without_a_tensor(source: Path) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    del tensors[next(iter(tensors))]
    save_file(tensors, source / "adapter_model.safetensors")


def _not_finite(source: Path) -> None:
    tensors = load_file(source / "adapter_model.safetensors")
    next(iter(tensors.values())).fill_(float("inf"))
    save_file(tensors, source / "adapter_model.safetensors")


def _setting(**values: Any) -> Any:
    def edit(source: Path) -> None:
        path = source / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        _without_a_tensor,
        _not_finite,
        _setting(r=10**9),
        _setting(target_modules="(a+)+" * 300),
        _setting(target_modules=["nothing"]),
        _setting(modules_to_save=["ln_f"]),
        _setting(bias="all"),
        _setting(r="four"),
        _setting(peft_type=["VERA"]),
        _setting(base_model_name_or_path=None),
    ],
)
def test_damaged_adapters_are_refused_in_one_line(
    damage: Any, tiny_base: Path, tmp_path: Path, capsys: Captured
) -> None:
    source = write("VeraConfig", METHODS["VeraConfig"], tiny_base, tmp_path / "source")
    damage(source)
    capsys.readouterr()
    assert main.run(["adapters", "import", str(source), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("peftune: adapter ") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
