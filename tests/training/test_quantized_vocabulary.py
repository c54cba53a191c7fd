"""Quantised bases with GPT-2's real vocabulary and E2E data, against PEFT's own merge; skipped without the data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters.merge.merge import merge
from peftune.config.recipe import recipe_from
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import quiet_peft
from peftune.training.metrics import read_metrics
from peftune.training.run import train

pytest.importorskip("bitsandbytes")

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of GPT-2's width and vocabulary, random weights."""
    directory = tmp_path_factory.mktemp("wide")
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if (SHARED / "gpt2-tokenizer" / name).is_file():
            shutil.copyfile(SHARED / "gpt2-tokenizer" / name, directory / name)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(n_layer=2)).save_pretrained(directory)
    return directory


@pytest.mark.slow
@pytest.mark.skipif(not (SHARED / "e2e" / "valid.txt").is_file(), reason=f"no {SHARED}")
@pytest.mark.parametrize(("kind", "variant"), [("int8", "lora"), ("nf4", "lora"), ("nf4", "loftq")])
def test_e2e_on_the_real_vocabulary_merges_as_peft_does(kind: str, variant: str, base: Path, tmp_path: Path) -> None:
    pairs = [line.split("||") for line in (SHARED / "e2e" / "valid.txt").read_text(encoding="utf-8").splitlines()[:200]]
    data = tmp_path / "e2e.jsonl"
    data.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs), encoding="utf-8")
    values: dict[str, Any] = {
        "base": str(base),
        "quantize": kind,
        "data": {"train": str(data), "validation": 0.2, "block_size": 128},
        "lora": {"rank": 8, "alpha": 16, "variant": variant},
        "optim": {"lr": 5e-3, "schedule": "constant", "warmup": 0, "steps": 6},
        "batch": {"global_size": 4},
        "run": {"out": str(tmp_path / "adapter"), "precision": "fp32", "eval_every": 3},
    }
    made = recipe_from(values, [])
    figures = train(made).metrics["validation"]
    assert figures["adapter"]["loss"] < figures["base"]["loss"] - 0.5
    start = read_metrics(tmp_path / "adapter" / "metrics.jsonl")[0]
    embeddings = 4 * (50_257 + 1024) * 768
    assert start["base_bytes"] - embeddings < (start["base_bytes_fp32"] - embeddings) * (
        0.27 if kind == "int8" else 0.15
    )
    report = merge(tmp_path / "adapter", tmp_path / "merged")
    with quiet_peft():
        theirs: Any = PeftModel.from_pretrained(load_model(Base(base)), tmp_path / "adapter").merge_and_unload()
    ours = GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    for name, tensor in theirs.state_dict().items():
        assert (ours.state_dict()[name] - tensor).abs().max() <= 1e-6, name
    ids = torch.randint(0, 50_257, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (ours.eval()(ids).logits - theirs.eval()(ids).logits).abs().max() <= 1e-5
    assert report.max_abs_logit_difference is not None and report.max_abs_logit_difference <= 1e-4
    assert report.mean_kl_to_trained is not None and 1e-9 < report.mean_kl_to_trained < 0.1
