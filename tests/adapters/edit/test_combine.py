"""A combined adapter is the weighted sum of updates, or the nearest to it, and an adapter like any other."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for
from peftune.adapters.edit.combine import combine
from peftune.adapters.merge.merge import merge
from peftune.errors import CheckFailed, UserError
from peftune.model.base import Base
from peftune.model.lora import quiet_peft

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Model with `tie_word_embeddings:UserWarning"
)

ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
UNLIKE: list[dict[str, Any]] = [
    {"r": 3, "lora_alpha": 5, "target_modules": ALL},
    {"r": 4, "use_rslora": True, "target_modules": ["attn.c_attn", "wpe"], "rank_pattern": {"h.1.attn.c_attn": 2}},
    {"r": 2, "lora_alpha": 7, "target_modules": ["mlp.c_fc", "wte", "wpe"], "alpha_pattern": {"mlp.c_fc": 1}},
]
WEIGHTS = [0.5, -1.25, 2.0]


def updates_by_peft(model: Any) -> dict[str, torch.Tensor]:
    """What PEFT itself adds to each weight, as that weight is stored, float64."""
    return {
        name: layer.get_delta_weight("default").detach().double()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
    }


def dense_sum(tools: Any, base: Path, adapters: list[Path], weights: list[float]) -> dict[str, torch.Tensor]:
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in zip(adapters, weights, strict=True):
        for name, update in updates_by_peft(tools.with_peft(base, adapter)).items():
            total[name] = total.get(name, torch.zeros_like(update)) + weight * update
    return total


def three(make_adapter: Any) -> list[Path]:
    return [make_adapter(f"a{number}", **settings) for number, settings in enumerate(UNLIKE)]


def test_the_sum_is_exact_for_unequal_ranks_scales_and_targets(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = three(make_adapter)
    result = combine(adapters, WEIGHTS, tmp_path / "sum")
    expected = dense_sum(tools, tiny_base, adapters, WEIGHTS)
    found = updates_by_peft(tools.with_peft(tiny_base, tmp_path / "sum"))
    assert found.keys() == expected.keys() == result.modules.keys()
    for name, update in expected.items():
        assert (found[name] - update).norm() <= 1e-6 * update.norm()
    assert result.modules["transformer.h.0.attn.c_attn"]["rank"] == 3 + 4
    assert result.modules["transformer.h.1.attn.c_attn"]["rank"] == 3 + 2
    assert result.modules["transformer.wpe"]["rank"] == 4 + 2
    assert result.relative_error < 1e-7


def test_logits_are_those_of_the_base_with_the_dense_sum(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = three(make_adapter)
    combine(adapters, WEIGHTS, tmp_path / "sum")
    model = GPT2LMHeadModel.from_pretrained(tiny_base)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())  # PEFT adapts wte alone
    for name, update in dense_sum(tools, tiny_base, adapters, WEIGHTS).items():
        model.get_submodule(name).weight.data += update.float()
    probe = torch.arange(40)[None]
    with torch.no_grad():
        logits, other = model.eval()(probe).logits, tools.with_peft(tiny_base, tmp_path / "sum")(probe).logits
    assert (logits - other).abs().max() <= 1e-4


def test_it_computes_what_pefts_own_concatenation_computes(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter("a", r=3, target_modules=ALL), make_adapter("b", r=5, lora_alpha=9, target_modules=ALL)]
    combine(adapters, [0.7, 0.3], tmp_path / "sum")
    model = tools.with_peft(tiny_base, adapters[0])
    with quiet_peft():
        model.load_adapter(str(adapters[1]), "b")
        model.add_weighted_adapter(["default", "b"], [0.7, 0.3], "cat", combination_type="cat")
    model.set_adapter("cat")
    probe = torch.arange(40)[None]
    with torch.no_grad():
        expected = model.eval()(probe).logits
        found = tools.with_peft(tiny_base, tmp_path / "sum")(probe).logits
    assert (found - expected).abs().max() <= 1e-4


def test_a_cut_is_as_near_as_the_dense_decomposition_and_says_how_near(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = three(make_adapter)
    result = combine(adapters, WEIGHTS, tmp_path / "cut", rank=3)
    expected = dense_sum(tools, tiny_base, adapters, WEIGHTS)
    found = updates_by_peft(tools.with_peft(tiny_base, tmp_path / "cut"))
    lost = 0.0
    for name, update in expected.items():
        values = torch.linalg.svdvals(update)
        error = float((found[name] - update).norm() / update.norm())
        assert error == pytest.approx(float(values[3:].norm() / values.norm()), abs=1e-6)
        assert result.modules[name]["relative_error"] == pytest.approx(error, abs=1e-6)
        assert result.modules[name]["rank"] <= 3
        lost += float((found[name] - update).norm()) ** 2
    total = sum(float(update.norm()) ** 2 for update in expected.values())
    assert result.relative_error == pytest.approx(math.sqrt(lost / total), abs=1e-6)
    assert result.relative_error > 0.01


def test_it_merges_and_loads_like_any_adapter_and_is_of_its_base_only(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter("a"), make_adapter("b", r=2, target_modules=["attn.c_proj"])]
    for adapter in adapters:
        (adapter / "peftune.json").write_text(json.dumps(Base(tiny_base, str(tiny_base)).identity()))
    combine(adapters, [1.0, 1.0], tmp_path / "sum")
    expected = tools.logits_with_peft(tiny_base, tmp_path / "sum")
    base = Base(tiny_base, str(tiny_base))
    load_with_rows(base, *read_for(tmp_path / "sum", base))
    merge(tmp_path / "sum", tmp_path / "merged", texts=tools.texts)
    assert (tools.logits_of(tmp_path / "merged") - expected).abs().max() <= 1e-4
    card = (tmp_path / "sum" / "README.md").read_text()
    assert f"base_model: {tiny_base}" in card and str(adapters[1]) in card
    other = tmp_path / "other"
    shutil.copytree(tiny_base, other)
    tensors = load_file(other / "model.safetensors")
    tensors["transformer.ln_f.bias"] += 1
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(UserError, match="was trained on"):
        read_for(tmp_path / "sum", Base(other))
    recorded = json.loads((tmp_path / "sum" / "peftune.json").read_text())["combined"]
    assert [part["weight"] for part in recorded["adapters"]] == [1.0, 1.0]
    assert len({part["fingerprint"] for part in recorded["adapters"]}) == 2


def test_one_adapter_alone_can_be_weakened_or_cut(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter("a")
    combine([adapter], [0.5], tmp_path / "half")
    full, half = (updates_by_peft(tools.with_peft(tiny_base, d)) for d in (adapter, tmp_path / "half"))
    assert all((full[name] - 2 * half[name]).norm() <= 1e-6 * full[name].norm() for name in full)


def test_an_adapter_of_weight_zero_adds_no_ranks(make_adapter: Any, tmp_path: Path) -> None:
    result = combine([make_adapter("a"), make_adapter("b", target_modules=ALL)], [1.0, 0.0], tmp_path / "sum")
    assert {module["rank"] for module in result.modules.values()} == {4}
    assert all("attn.c_attn" in name for name in result.modules)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, "is a DoRA"),
    "pissa": ({"init_lora_weights": "pissa"}, "first takes a part out of the base"),
    "modules-to-save": ({"modules_to_save": ["ln_f"]}, "trained ln_f in full"),
    "bias": ({"bias": "lora_only"}, "trained biases too"),
    "lora-bias": ({"lora_bias": True}, "trained biases too"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_sum_of_low_rank_updates_is_refused_with_the_reason(
    kind: str, make_adapter: Any, tmp_path: Path
) -> None:
    settings, reason = REFUSED[kind]
    adapters = [make_adapter("a"), make_adapter("b", **settings)]
    with pytest.raises(UserError, match=reason) as caught:
        combine(adapters, [1.0, 1.0], tmp_path / "sum")
    assert str(adapters[1]) in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        ([1.0], "1 given for 2 adapters"),
        ([1.0, math.nan], "expected finite numbers"),
        ([math.inf, 1.0], "expected finite numbers"),
        ([0.0, 0.0], "all are 0"),
        ([1.0, -1.0], "cancel each other"),
        ([1e38, 1e38], "does not fit float32"),
        ([1e-44, 0.0], "does not fit float32"),
    ],
)
def test_weights_that_make_no_sense_are_refused(
    weights: list[float], reason: str, make_adapter: Any, tmp_path: Path
) -> None:
    adapter = make_adapter("a", lora_alpha=1000)
    with pytest.raises(UserError, match=reason):
        combine([adapter, adapter], weights, tmp_path / "sum")
    assert not (tmp_path / "sum").exists()


def test_adapters_of_several_bases_are_refused(make_adapter: Any, tiny_base: Path, tmp_path: Path) -> None:
    adapters = [make_adapter("a"), make_adapter("b")]
    described = Base(tiny_base, "poet").identity()
    for adapter, weights in zip(adapters, ("0" * 64, "1" * 64), strict=True):
        (adapter / "peftune.json").write_text(json.dumps({**described, "base_fingerprint": weights}))
    with pytest.raises(UserError, match=r"trained on poet \(weights 000000000000\).*111111111111"):
        combine(adapters, [1.0, 1.0], tmp_path / "sum")


def test_bases_that_are_only_names_must_be_the_same_or_be_given(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter("a"), make_adapter("b")]
    tools.edit_config(adapters[1], base_model_name_or_path="elsewhere")
    with pytest.raises(UserError, match="pass the base if they are"):
        combine(adapters, [1.0, 1.0], tmp_path / "sum")
    combine(adapters, [1.0, 1.0], tmp_path / "sum", base=str(tiny_base))
    recorded = json.loads((tmp_path / "sum" / "peftune.json").read_text())
    assert recorded.items() >= Base(tiny_base, str(tiny_base)).identity().items()


def test_adapters_of_different_widths_are_refused(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    wide = tmp_path / "wide"
    GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_base, n_embd=64)).save_pretrained(wide)
    adapters = [make_adapter("a"), make_adapter("b", base=wide)]
    tools.edit_config(adapters[1], base_model_name_or_path=str(tiny_base))
    with pytest.raises(UserError, match="n_embd 64"):
        combine(adapters, [1.0, 1.0], tmp_path / "sum")


def test_an_embedding_stored_beside_lm_head_is_seen_to_be_a_copy(
    make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapters = [make_adapter("a"), make_adapter("b", r=2, target_modules=["lm_head"])]
    assert any("base_layer" in name for name in load_file(adapters[1] / "adapter_model.safetensors"))
    with pytest.raises(UserError, match=r"in full; pass the base"):
        combine(adapters, [1.0, 0.5], tmp_path / "sum")
    combine(adapters, [1.0, 0.5], tmp_path / "sum", base=str(tiny_base))
    expected = dense_sum(tools, tiny_base, adapters, [1.0, 0.5])
    found = updates_by_peft(tools.with_peft(tiny_base, tmp_path / "sum"))
    assert found.keys() == expected.keys() and "lm_head" in found
    assert all((found[name] - update).norm() <= 1e-6 * update.norm() for name, update in expected.items())


def test_an_existing_directory_is_not_overwritten(make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter("a")
    before = (adapter / "adapter_config.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        combine([adapter], [1.0], adapter)
    assert (adapter / "adapter_config.json").read_bytes() == before


def test_a_result_that_peft_would_read_otherwise_is_not_written(
    make_adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "peftune.adapters.edit.computed_adapter.re.escape", lambda name: name.replace("attn.c_attn", "nothing")
    )
    adapters = [make_adapter("a", rank_pattern={"h.1.attn.c_attn": 2})]
    with pytest.raises((CheckFailed, UserError)):
        combine(adapters, [1.0], tmp_path / "sum")
    assert not (tmp_path / "sum").exists()
