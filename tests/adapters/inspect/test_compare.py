"""Angles and distances of two adapters' updates are those of the full matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters.edit.combine import combine
from peftune.adapters.inspect.compare import compare
from peftune.errors import UserError
from peftune.model.base import Base

ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def updates(model: Any) -> dict[str, torch.Tensor]:
    modules = model.get_base_model().named_modules()
    return {n: m.get_delta_weight("default").detach().double() for n, m in modules if isinstance(m, LoraLayer)}


def test_figures_are_those_of_the_dense_updates(make_adapter: Any, tools: Any, tiny_base: Path) -> None:
    first = make_adapter("a", r=3, target_modules=ALL)
    second = make_adapter("b", r=5, lora_alpha=3, use_rslora=True, target_modules=["attn.c_attn", "mlp.c_proj", "wpe"])
    found = compare(first, second)
    ones, others = (updates(tools.with_peft(tiny_base, adapter)) for adapter in (first, second))
    assert found.modules.keys() == ones.keys() & others.keys()
    assert set(found.only_first) == ones.keys() - others.keys() and found.only_second == ["transformer.wpe"]
    for name, figures in found.modules.items():
        a, b = ones[name], others[name]
        assert figures["norm_first"] == pytest.approx(float(a.norm()), rel=1e-5)
        assert figures["cosine"] == pytest.approx(float((a * b).sum() / (a.norm() * b.norm())), abs=1e-6)
        assert figures["distance"] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)
        (u1, _, v1), (u2, _, v2) = torch.linalg.svd(a), torch.linalg.svd(b)  # (in, out): u spans what is read
        for key, one, other in (("overlap_in", u1, u2), ("overlap_out", v1.T, v2.T)):
            assert figures[key] == pytest.approx(float((one[:, :3].T @ other[:, :5]).square().sum() / 3), abs=1e-4)
    zero = torch.zeros(1, dtype=torch.float64)
    full = [
        torch.cat([u.get(n, zero * ones.get(n, others.get(n))).flatten() for n in {**ones, **others}])
        for u in (ones, others)
    ]
    assert found.overall["cosine"] == pytest.approx(float(torch.cosine_similarity(*full, dim=0)), abs=1e-6)
    assert found.overall["distance"] == pytest.approx(float((full[0] - full[1]).norm() / full[0].norm()), rel=1e-5)


def test_an_adapter_equals_itself_and_opposes_its_negative(make_adapter: Any, tmp_path: Path) -> None:
    adapter = make_adapter("a")
    same = compare(adapter, adapter)
    assert same.overall["cosine"] == pytest.approx(1.0) and same.overall["distance"] == pytest.approx(0.0, abs=1e-12)
    assert same.differences == {} and same.base_mismatch == "" and same.notes == []
    assert all(f["overlap_in"] == pytest.approx(1.0) for f in same.modules.values())
    combine([adapter], [-2.0], tmp_path / "back")
    other = compare(adapter, tmp_path / "back")
    assert other.overall["cosine"] == pytest.approx(-1.0) and other.overall["distance"] == pytest.approx(3.0)
    assert other.differences["variant"] == ("lora", "combined")


def test_a_fresh_adapter_has_no_direction(make_adapter: Any) -> None:
    fresh = make_adapter("fresh")
    tensors = load_file(fresh / "adapter_model.safetensors")
    zero = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in tensors.items()}
    save_file(zero, fresh / "adapter_model.safetensors")
    found = compare(fresh, make_adapter("a"))
    assert found.overall["cosine"] is found.overall["distance"] is None
    assert all(figures["overlap_out"] is None for figures in found.modules.values())
    json.dumps(found.as_json(), allow_nan=False)


def test_other_bases_and_other_recipes_are_reported(make_adapter: Any, tiny_base: Path) -> None:
    adapters = [make_adapter("a"), make_adapter("b", r=8)]
    described = Base(tiny_base, "poet").identity()
    for number, adapter in enumerate(adapters):
        identity = {
            "optim.lr": 1e-4 * (number + 1),
            "run.seed": 0,
            "lora.rank": 8,
            "data.train": [{"path": f"{number}"}],
        }
        recorded = {**described, "base_fingerprint": str(number) * 64, "step": 10 * number, "identity": identity}
        (adapter / "peftune.json").write_text(json.dumps(recorded))
    found = compare(*adapters)
    assert "weights 000000000000" in found.base_mismatch and not found.as_json()["same_base"]
    assert found.differences == {
        "ranks": ([4], [8]), "scales": ([1.5], [0.75]), "step": (0, 10), "optim.lr": (1e-4, 2e-4),
        "data.train": ([{"path": "0"}], [{"path": "1"}]),
    }  # fmt: skip


def test_what_is_not_compared_is_noted(make_adapter: Any, tiny_base: Path, tmp_path: Path) -> None:
    found = compare(make_adapter("a", use_dora=True), make_adapter("b", modules_to_save=["ln_f"]))
    assert "B·A alone is compared" in found.notes[0] and "transformer.ln_f.bias" in found.notes[1]
    wide = tmp_path / "wide"
    GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_base, n_embd=64)).save_pretrained(wide)
    with pytest.raises(UserError, match=r"no module has the same shape in both, .* \(96, 32\) and \(192, 64\)"):
        compare(tmp_path / "a", make_adapter("c", base=wide))
