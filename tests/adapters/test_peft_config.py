"""adapter_config.json as others write it: settings of the wrong type are one line, odd but right ones are read."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import GPT2LMHeadModel

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for
from peftune.adapters.directory import read_adapter
from peftune.adapters.merge.merge import merge
from peftune.errors import UserError
from peftune.model.base import Base


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r: expected a number greater than 0, found 0"),
        ({"r": "8"}, "r: expected a whole number, found '8'"),
        ({"r": True}, "r: expected a whole number, found True"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, found nothing"),
        ({"lora_alpha": 1e308}, "lora_alpha: expected a number less than 3"),
        ({"lora_alpha": float("inf")}, "Infinity is not JSON"),
        ({"target_modules": 5}, "target_modules: expected names of modules or a regular expression, found 5"),
        ({"target_modules": [5]}, "target_modules: expected names of modules"),
        ({"target_modules": "((("}, r"target_modules: '\(\(\(' is not a regular expression"),
        ({"exclude_modules": "((("}, "exclude_modules: .* is not a regular expression"),
        ({"rank_pattern": [1]}, "rank_pattern: expected"),
        ({"rank_pattern": {"(((": 2}}, "rank_pattern.* is not a regular expression"),
        ({"rank_pattern": {"c_attn": 2.5}}, "rank_pattern.c_attn: expected a whole number, found 2.5"),
        ({"alpha_pattern": {"c_attn": float("nan")}}, "NaN is not JSON"),
        ({"alpha_pattern": {"c_attn": "x"}}, "alpha_pattern.c_attn: expected a number, found 'x'"),
        ({"use_dora": "yes"}, "use_dora: expected true or false, found 'yes'"),
        ({"bias": "weird"}, "bias: expected 'none', 'all' or 'lora_only', found 'weird'"),
        ({"init_lora_weights": 7}, "init_lora_weights: expected true, false or the name"),
        ({"modules_to_save": "ln_f"}, "modules_to_save: expected a list"),
        ({"lora_dropout": 2.0}, "lora_dropout: expected a number less than or equal to 1"),
        ({"r": 0, "bias": "weird"}, "r: expected .*; bias: expected"),
    ],
)
def test_settings_of_another_type_are_named_in_one_line(
    make_adapter: Any, tools: Any, settings: dict[str, Any], message: str
) -> None:
    adapter = make_adapter()
    tools.edit_config(adapter, **settings)
    with pytest.raises(UserError, match=message) as caught:
        read_adapter(adapter)
    assert "\n" not in str(caught.value)


def test_whole_numbers_are_no_tensors_of_an_adapter(make_adapter: Any) -> None:
    adapter = make_adapter()
    path = adapter / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int32) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(UserError, match=r"holds torch.int32; expected floating-point"):
        read_adapter(adapter)


@pytest.mark.parametrize("saved", [["wte"], ["lm_head"], ["wte", "lm_head"]])
def test_new_tokens_with_embeddings_trained_whole_are_merged(
    tiny_base: Path, tools: Any, tmp_path: Path, saved: list[str]
) -> None:
    """PEFT then stores each embedding three times: as itself, as its trained copy and as the original."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GPT2LMHeadModel.from_pretrained(tiny_base)
        model.resize_token_embeddings(303)
        settings = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["c_attn"], modules_to_save=saved)
        adapted = get_peft_model(model, settings)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data += 0.1 * torch.randn_like(parameter)
        adapted.save_pretrained(tmp_path / "adapter")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(tiny_base / name, tmp_path / "adapter")
        fresh = GPT2LMHeadModel.from_pretrained(tiny_base)
        fresh.resize_token_embeddings(303)
        loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    merge(tmp_path / "adapter", tmp_path / "merged", base=str(tiny_base))
    probe = torch.randint(0, 300, (2, 30))
    merged = GPT2LMHeadModel.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(probe).logits, loaded(probe).logits, atol=1e-4, rtol=0)


def test_a_copy_that_differs_from_its_module_is_refused(make_adapter: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(modules_to_save=["ln_f"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("ln_f.weight"))
    save_file({**tensors, name.replace("ln_f", "ln_f.modules_to_save"): tensors[name] + 1}, path)
    with pytest.raises(UserError, match=r"ln_f.modules_to_save.weight is not what .*ln_f.weight holds"):
        merge(adapter, tmp_path / "merged", base=str(tiny_base))


def test_a_lora_bias_is_put_on_a_model_without_a_warning(make_adapter: Any, tiny_base: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_with_rows(Base(tiny_base), *read_for(make_adapter(lora_bias=True), Base(tiny_base)))
