"""The verification of a merge refuses no correct one, however noisy its logits, and finds a small error anywhere."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters.merge import merge as merging
from peftune.adapters.merge.merge import merge
from peftune.errors import CheckFailed
from peftune.model.lora import quiet_peft

LINEAR = ["c_attn", "c_proj", "c_fc"]
KINDS: list[dict[str, Any]] = [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}]
# (initializer, size of the adapter's values): from calm models to such whose float32 logits are uncertain by 1e-3
NOISE = [(0.02, 1.0), (0.15, 0.1), (0.15, 1.0), (0.5, 1.0)]


@pytest.mark.parametrize(("initializer", "size"), NOISE)
def test_no_correct_merge_is_refused(
    initializer: float, size: float, tiny_base: Path, tools: Any, tmp_path: Path
) -> None:
    for seed, kind in enumerate(KINDS):
        torch.manual_seed(seed)
        base, adapter, out = (tmp_path / f"{name}{seed}" for name in ("base", "adapter", "out"))
        shutil.copytree(tiny_base, base)
        settings = {"vocab_size": 347, "n_layer": 3, "initializer_range": initializer}
        model = GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_base, **settings))
        model.transformer.wte.weight.data[-47:] = 0  # a vocabulary that was padded
        model.save_pretrained(base)
        with quiet_peft(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(
                model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=LINEAR, **kind)
            )
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.data += size * torch.randn_like(parameter)
            adapted.save_pretrained(adapter)
        report = merge(adapter, out, str(base), texts=tools.texts)
        assert report.max_abs_logit_difference is not None and report.tolerance is not None
        assert report.max_abs_logit_difference <= report.tolerance


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_thousandth_of_one_modules_norm_is_found_wherever_it_is(
    dtype: str, tiny_base: Path, make_adapter: Any, tools: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(target_modules=[*LINEAR, "wte"])
    right, planted = merging.MergedTensors.chunks, ""

    def wrong(self: Any, name: str, *rest: Any, **named: Any) -> Any:
        for chunk in right(self, name, *rest, **named):
            noise = torch.randn(chunk.shape, generator=torch.Generator().manual_seed(0))
            yield chunk + 1e-3 * chunk.norm() * noise / noise.norm() if name == planted else chunk

    names = [name for name, t in load_file(tiny_base / "model.safetensors").items() if t.count_nonzero()]
    monkeypatch.setattr(merging.MergedTensors, "chunks", wrong)
    for planted in names if dtype == "float32" else names[::9]:
        with pytest.raises(CheckFailed, match=f"{planted} differs from base"):
            merge(adapter, tmp_path / "out", str(tiny_base), dtype=dtype, texts=tools.texts)
    planted = ""
    merge(adapter, tmp_path / "out", str(tiny_base), dtype=dtype, texts=tools.texts)
