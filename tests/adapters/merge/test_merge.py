"""A merged directory computes what base + adapter compute, or is not written."""

from __future__ import annotations

import errno
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from peftune.adapters import fold
from peftune.adapters.merge.merge import merge
from peftune.errors import CheckFailed, UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Model with `tie_word_embeddings:UserWarning"
)

VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
}
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": ["attn.c_attn", "attn.c_proj"]},
    "all": {"target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    "lm_head": {"target_modules": ["attn.c_attn", "lm_head"]},
    "wte": {"target_modules": ["attn.c_attn", "wte"]},
    "whole-wte": {"modules_to_save": ["wte"]},
    "whole-head": {"modules_to_save": ["lm_head", "ln_f"]},
}
CASES = list(enumerate(itertools.product(VARIANTS, TARGETS, (True, False))))


@pytest.mark.parametrize(
    ("number", "case"), CASES, ids=lambda c: "-".join(map(str, c)) if isinstance(c, tuple) else str(c)
)
def test_merged_equals_peft_for_every_variant_target_flag_and_layout(
    number: int,
    case: tuple[str, str, bool],
    layouts: dict[str, Path],
    make_adapter: Any,
    tools: Any,
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    variant, target, flag = case
    base = list(layouts.values())[number % len(layouts)]
    if variant == "pissa" and target == "wte":
        adapter = make_adapter(**TARGETS[target])
        tools.edit_config(adapter, init_lora_weights="pissa")
        with pytest.raises(UserError, match="nothing that PEFT can load"):
            merge(adapter, tmp_path / "out", str(base), texts=tools.texts)
        return
    adapter = make_adapter(**VARIANTS[variant], **TARGETS[target])
    tools.edit_config(adapter, fan_in_fan_out=flag)
    report = merge(adapter, tmp_path / "out", str(base), texts=tools.texts)
    expected = tools.logits_with_peft(tiny_base, adapter)
    assert (tools.logits_of(tmp_path / "out") - expected).abs().max() <= 1e-4
    assert report.max_abs_logit_difference is not None and report.max_abs_logit_difference <= 1e-4
    assert report.modules_applied == report.modules_in_adapter > 0
    assert report.tie_word_embeddings == (target in ("attention", "all"))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear", "rank_pattern": {"h.1.attn.c_attn": 2}, "alpha_pattern": {"mlp.c_fc": 3}},
        {"layers_to_transform": [1], "layers_pattern": "h", "bias": "lora_only"},
        {"bias": "all"},
        {"lora_bias": True, "target_modules": ["c_attn", "c_proj", "c_fc"]},
        {"target_modules": ["wte", "wpe", "c_fc"], "use_dora": True, "use_rslora": True},
        {"target_modules": ["lm_head"], "use_dora": True},
        {"use_dora": True, "init_lora_weights": "pissa"},
        {"modules_to_save": ["wte", "lm_head"]},
        {"modules_to_save": ["wte"], "ensure_weight_tying": True},
        {"modules_to_save": ["wpe", "ln_1"], "lora_dropout": 0.1},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_merged_equals_peft_for_rarer_settings(
    settings: dict[str, Any], make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(**settings)
    merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    assert (tools.logits_of(tmp_path / "out") - tools.logits_with_peft(tiny_base, adapter)).abs().max() <= 1e-4


def test_merged_equals_peft_on_an_untied_base(tiny_base: Path, make_adapter: Any, tools: Any, tmp_path: Path) -> None:
    torch.manual_seed(5)
    config = GPT2Config.from_pretrained(tiny_base, tie_word_embeddings=False)
    base = tmp_path / "untied"
    GPT2LMHeadModel(config).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_base).save_pretrained(base)
    adapter = make_adapter(base=base, target_modules=["c_attn", "lm_head"], init_lora_weights="pissa")
    merge(adapter, tmp_path / "out", str(base), texts=tools.texts)
    assert (tools.logits_of(tmp_path / "out") - tools.logits_with_peft(base, adapter)).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_states_what_rounding_did(
    dtype: str, make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    report = merge(make_adapter(), tmp_path / "out", str(tiny_base), dtype=dtype, texts=tools.texts)
    written = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert written["dtype"] == json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == dtype
    assert 0 < written["rounding_mean_kl"] < 0.01
    assert written["float32_max_abs_logit_difference"] < 1e-4 < written["max_abs_logit_difference"]
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {getattr(torch, dtype)}
    assert report.argmax_agreement == written["argmax_agreement"]


def test_merged_directory_is_an_ordinary_checkpoint(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    merge(make_adapter(), tmp_path / "out", str(tiny_base), texts=tools.texts, max_shard_bytes=20_000)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "merge.json",
        "model.safetensors.index.json",
    } <= names
    assert len([name for name in names if name.startswith("model-")]) > 3
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the cat")["input_ids"]
    _, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_untouched_tensors_are_copied_bit_for_bit(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    merge(make_adapter(), tmp_path / "out", str(tiny_base), texts=tools.texts)
    before, after = load_file(tiny_base / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"transformer.h.{i}.attn.c_attn.weight" for i in (0, 1)} and before.keys() == after.keys()


def test_pissa_on_a_tied_head_without_its_residual_is_refused(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(**TARGETS["lm_head"], init_lora_weights="pissa")
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors["base_model.model.lm_head.base_layer.weight"]
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="changed the input embedding as well"):
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)


def test_wrong_orientation_of_a_square_matrix_is_caught(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(target_modules=["attn.c_proj"])
    right = fold._update
    monkeypatch.setattr(fold, "_update", lambda target: right(target).T)
    with pytest.raises(CheckFailed, match="differs from base"):
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_an_adapter_tensor_that_is_not_applied_is_caught(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fold.MergedTensors, "shapes", lambda self: {"transformer.h.0.attn.c_attn.weight": (32, 96)})
    with pytest.raises(CheckFailed, match="were not applied"):
        merge(make_adapter(), tmp_path / "out", str(tiny_base), texts=tools.texts)


def test_a_full_disk_is_one_line_and_leaves_nothing(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("peftune.adapters.merge.shards.os.fsync", full)
    with pytest.raises(UserError, match="No space left"):
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter"]


def test_values_that_float16_cannot_hold_are_refused(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(lora_alpha=10**8)
    with pytest.raises(CheckFailed, match="do not fit"):
        merge(adapter, tmp_path / "out", str(tiny_base), dtype="float16", texts=tools.texts)
    assert not (tmp_path / "out").exists()


def test_existing_out_base_and_adapter_are_never_overwritten(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter()
    (tmp_path / "out").mkdir()
    for out in (tmp_path / "out", adapter, tiny_base):
        with pytest.raises(UserError):
            merge(adapter, out, str(tiny_base), texts=tools.texts)


def test_more_tokens_than_the_base_need_the_adapters_tokenizer(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter()
    base = load_file(tiny_base / "model.safetensors")["transformer.wte.weight"]
    grown = torch.cat([base, torch.randn(3, 32)])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{name}.weight": grown.clone() for name in ("transformer.wte", "lm_head")}
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="holds no tokenizer"):
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.add_tokens(["<a>", "<b>", "<c>"])
    tokenizer.save_pretrained(adapter)
    report = merge(adapter, tmp_path / "out", str(tiny_base), texts=[*tools.texts, "<a> and <c>"])
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert report.tie_word_embeddings and model.config.vocab_size == len(base) + 3 == report.vocabulary
    assert torch.equal(model.transformer.wte.weight.detach(), grown)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_parameters": ["attn.c_attn.weight"]}, "uses target_parameters"),
        ({"trainable_token_indices": [1, 2]}, "is named by its configuration, but is not there"),
        ({"something_new": {"a": 1}}, "uses something_new"),
        ({"init_lora_weights": "olora"}, "cannot be repeated exactly"),
        ({"init_lora_weights": "pissa_niter_4"}, "cannot be repeated exactly"),
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": 8}, "shape"),
    ],
)
def test_what_cannot_be_folded_is_refused_with_the_reason(
    settings: dict[str, Any], message: str, make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter()
    tools.edit_config(adapter, **settings)
    with pytest.raises(UserError, match=message) as caught:
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_lora_bias_on_the_head_is_refused(make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapter = make_adapter(target_modules=["lm_head"], lora_bias=True)
    with pytest.raises(UserError, match="has no bias"):
        merge(adapter, tmp_path / "out", str(tiny_base), texts=tools.texts)
