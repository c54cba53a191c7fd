"""llama.cpp writes what `AdapterBank` writes: the base, and adapters of every rank and target, greedily in float32.

Set PEFTUNE_LLAMA_PYTHON to a Python that has llama-cpp-python (pip builds it from source, in minutes):

    python -m venv llama && llama/bin/pip install llama-cpp-python
    PEFTUNE_LLAMA_PYTHON=llama/bin/python python -m pytest tests/adapters/test_llama_cpp.py
"""

from __future__ import annotations

import json
import os
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

import peftune
from peftune.adapters.gguf.write_gguf import export_gguf
from peftune.data.sources.builtin import documents
from peftune.inference.bank import AdapterBank
from peftune.model.base import open_base
from peftune.model.lora import quiet_peft

PYTHON = os.environ.get("PEFTUNE_LLAMA_PYTHON")
pytestmark = pytest.mark.skipif(not PYTHON, reason="PEFTUNE_LLAMA_PYTHON names no Python with llama-cpp-python")

TOKENS, PROMPTS = 24, 100
CLOSE = 2e-2
"""Logits. llama.cpp looks GELU up in a table of float16, so its logits are off by up to about 1e-2; nearer is a tie."""
KINDS: dict[str, dict[str, Any] | None] = {
    "base": None,
    "attention": {"r": 4, "lora_alpha": 16, "target_modules": ["c_attn"]},
    "square": {"r": 8, "lora_alpha": 16, "target_modules": ["attn.c_proj"]},
    "all": {"r": 5, "lora_alpha": 10, "target_modules": ["c_attn", "c_proj", "c_fc"]},
    "uneven": {"r": 2, "target_modules": ["c_attn", "c_fc"], "rank_pattern": {"c_fc": 6}, "use_rslora": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_is_the_same(kind: str, tmp_path: Path) -> None:
    base, adapter = open_base("builtin:small"), tmp_path / "adapter"
    if (settings := KINDS[kind]) is not None:
        write_adapter(base.directory, adapter, settings)
    export_gguf(base, tmp_path / "out", [adapter] if settings else [])
    texts = [document.text for document in documents("docs", "heldout")]
    prompts = [text[:size] for size in (3, 11, 40, 90) for text in texts][:PROMPTS]
    lora = str(tmp_path / "out" / "adapter.gguf") if settings else None
    asked = {"model": str(tmp_path / "out" / "model.gguf"), "lora": lora, "prompts": prompts, "tokens": TOKENS}
    done = subprocess.run([str(PYTHON), Path(__file__).with_name("llama_greedy.py")], input=json.dumps(asked),
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = json.loads(done.stdout)
    bank = AdapterBank(base)
    if settings:
        bank.add("adapter", adapter)
    options = peftune.GenerationSettings(max_new_tokens=TOKENS, temperature=0.0)
    made = bank.generate(prompts, options, ["adapter" if settings else None] * len(prompts))
    ties = 0
    for theirs, ours in zip(found, made, strict=True):
        ids = list(ours.ids)
        same = [a == b for a, b in zip(theirs["made"], ids, strict=False)]
        if not all(same):
            assert theirs["gaps"][same.index(False)] < CLOSE, (theirs, ids)
            ties += 1
    assert len(found) == PROMPTS and ties <= 2


def write_adapter(base: Path, out: Path, settings: dict[str, Any]) -> None:
    """A plain PEFT adapter with random values."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    with quiet_peft(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(out)
