"""What an adapter is, from its tensors: norms of its update by module and layer, with and without its base."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from peftune.adapters.inspect.describe import describe
from peftune.adapters.merge.merge import merge
from peftune.errors import UserError
from peftune.model.base import Base

pytestmark = pytest.mark.filterwarnings(
    "ignore:Setting `save_embedding_layers`:UserWarning", "ignore:Model with `tie_word_embeddings:UserWarning"
)

SETTINGS: list[dict[str, Any]] = [
    {},
    {"use_rslora": True, "target_modules": ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]},
    {"target_modules": ["mlp.c_proj"], "layers_to_transform": [1], "layers_pattern": "h"},
    {"target_modules": ["wte", "wpe", "c_fc"], "rank_pattern": {"h.0.mlp.c_fc": 2}, "alpha_pattern": {"wte": 1}},
    {"target_modules": ["lm_head", "attn.c_attn"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_norms_are_those_of_pefts_update_without_the_base(
    settings: dict[str, Any], make_adapter: Any, tools: Any, tiny_base: Path
) -> None:
    adapter = make_adapter(**settings)
    found = describe(adapter)
    model = tools.with_peft(tiny_base, adapter).get_base_model()
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    assert found.modules.keys() == layers.keys() and found.norms_are == "of the whole update"
    for name, layer in layers.items():
        module = found.modules[name]
        assert module.norm == pytest.approx(float(layer.get_delta_weight("default").double().norm()), rel=1e-5)
        assert (module.rank, module.alpha) == (layer.r["default"], layer.lora_alpha["default"])
        assert module.scale == pytest.approx(layer.scaling["default"]) and module.relative is None
    total = math.hypot(*(module.norm for module in found.modules.values()))
    assert math.hypot(*found.layers().values()) == pytest.approx(total)
    assert found.provenance is None and found.base == str(tiny_base)
    json.dumps(found.as_json(), allow_nan=False)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
def test_with_the_base_it_is_the_full_change_and_relative_to_the_weight(
    settings: dict[str, Any], make_adapter: Any, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(target_modules=["attn.c_attn", "mlp.c_proj"], **settings)
    merge(adapter, tmp_path / "merged", str(tiny_base), texts=tools.texts)
    before, after = (load_file(path / "model.safetensors") for path in (tiny_base, tmp_path / "merged"))
    for name, module in describe(adapter, str(tiny_base)).modules.items():
        weight = before[f"{name}.weight"].double()
        moved = float((after[f"{name}.weight"].double() - weight).norm())
        assert module.norm == pytest.approx(moved, rel=1e-4)
        assert module.relative == pytest.approx(moved / float(weight.norm()), rel=1e-4)
    assert ("B·A alone" in describe(adapter).norms_are) == bool(settings)


def test_layers_stand_in_the_order_of_the_model(make_adapter: Any) -> None:
    assert list(describe(make_adapter(target_modules=["lm_head", "wpe", "c_fc"])).layers()) == [
        "wpe",
        "0",
        "1",
        "lm_head",
    ]


def test_another_base_than_its_own_is_refused(make_adapter: Any, tiny_base: Path) -> None:
    adapter = make_adapter()
    recorded = {**Base(tiny_base, "poet").identity(), "base_fingerprint": "0" * 64}
    (adapter / "peftune.json").write_text(json.dumps(recorded))
    assert describe(adapter).base == "poet"
    with pytest.raises(UserError, match="was trained on poet"):
        describe(adapter, str(tiny_base))


def test_an_adapter_without_a_width_asks_for_the_base(make_adapter: Any, tools: Any, tiny_base: Path) -> None:
    from safetensors.torch import save_file

    adapter = make_adapter(modules_to_save=["ln_f"])
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, first: torch.cat([tensors[first]] * 2, dim=1)}, path)
    with pytest.raises(UserError, match="n_embd"):
        describe(adapter)
