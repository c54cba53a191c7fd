"""Adapters on the tiny base as PEFT saves them, and the base in every layout that the hub knows."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from peftune.model.lora import quiet_peft

LAYOUTS = [f"{keys}-{files}" for keys in ("prefixed", "bare") for files in ("one", "shards", "bin", "bin-shards")]
TEXTS = ["the cat sat on the mat and the dog sat on the log", "naïve café, 東京 and a tab\there"]
PROBE = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(3))
MakeAdapter = Callable[..., Path]


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The functions below, for tests that cannot import from here."""
    return SimpleNamespace(
        texts=TEXTS,
        lay_out=lay_out,
        edit_config=edit_config,
        logits_of=logits_of,
        logits_with_peft=logits_with_peft,
        with_peft=with_peft,
    )


@pytest.fixture(scope="session")
def layouts(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny base under each of `LAYOUTS`: the same weights, other names and files."""
    root = tmp_path_factory.mktemp("layouts")
    return {name: lay_out(tiny_base, root / name, name) for name in LAYOUTS}


@pytest.fixture
def make_adapter(tiny_base: Path, tmp_path: Path) -> MakeAdapter:
    """A function that trains (random values) and saves a plain PEFT adapter; keywords go to LoraConfig."""

    def make(name: str = "adapter", base: Path = tiny_base, **settings: Any) -> Path:
        torch.manual_seed(1)
        config = LoraConfig(
            **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 6, "target_modules": ["attn.c_attn"], **settings}
        )
        with quiet_peft(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def lay_out(base: Path, directory: Path, layout: str) -> Path:
    """Copy a one-file safetensors base into another layout; bare keys come with the mask buffers of old checkpoints."""
    keys, _, files = layout.partition("-")
    shutil.copytree(base, directory)
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    if keys == "bare":
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
        tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
        tensors["h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if files == "one":
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    elif files == "bin":
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        stem, suffix = ("pytorch_model", "bin") if files == "bin-shards" else ("model", "safetensors")
        names = sorted(tensors)
        index = {}
        for number in range(3):
            file = f"{stem}-{number + 1:05d}-of-00003.{suffix}"
            part = {name: tensors[name] for name in names[number::3]}
            torch.save(part, directory / file) if suffix == "bin" else save_file(part, directory / file)
            index.update(dict.fromkeys(part, file))
        content = {"metadata": {"total_size": 0}, "weight_map": index}
        (directory / f"{stem}.{suffix}.index.json").write_text(json.dumps(content))
    return directory


def with_peft(base: Path, adapter: Path) -> PeftModel:
    """The base with the adapter in memory, as PEFT loads it."""
    with quiet_peft():
        return PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(base), adapter).eval()


def logits_with_peft(base: Path, adapter: Path) -> torch.Tensor:
    """What PEFT itself computes, float32."""
    with torch.no_grad():
        return with_peft(base, adapter)(PROBE).logits


def logits_of(directory: Path) -> torch.Tensor:
    """What an ordinary checkpoint computes, float32."""
    with torch.no_grad():
        return GPT2LMHeadModel.from_pretrained(directory, dtype=torch.float32).eval()(PROBE).logits


def edit_config(adapter: Path, **values: Any) -> None:
    """Change entries of adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
