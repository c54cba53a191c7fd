"""A working directory with a text, adapters and bases, small enough for every verb."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from recorded_runs import Make, events_of, lines_of


@pytest.fixture
def here(tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A text, adapters `a` and `b`, `zero` that changes nothing, a fine-tune, and a base with a NaN in it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file, save_file
    from transformers import GPT2LMHeadModel

    from peftune.model.lora import quiet_peft

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


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """`make(name, events)`: the directory of a run, in the working directory."""
    monkeypatch.chdir(tmp_path)

    def run(name: str = "a", events: list[dict[str, Any]] | None = None, **provenance: Any) -> Path:
        Path(name).mkdir(parents=True)
        (Path(name) / "metrics.jsonl").write_text(lines_of(events_of() if events is None else events))
        if provenance:
            (Path(name) / "peftune.json").write_text(json.dumps(provenance))
        return Path(name)

    return run
