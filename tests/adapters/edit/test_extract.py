"""An extracted adapter is the nearest one to a fine-tune, and what it cannot hold is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.adapters.edit.extract import CheckpointDiff, extract
from peftune.adapters.low_rank import norm
from peftune.adapters.merge.merge import merge
from peftune.errors import UserError
from peftune.model.base import Base

MATRICES = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
Tune = Callable[..., Path]


@pytest.fixture
def tune(tiny_base: Path, tmp_path: Path) -> Tune:
    """A function that copies the base and moves the tensors whose names hold one of `parts`."""

    def tuned(*parts: str, name: str = "tuned", rank: int = 32) -> Path:
        out = tmp_path / name
        shutil.copytree(tiny_base, out)
        tensors = load_file(out / "model.safetensors")
        generator = torch.Generator().manual_seed(7)
        for key, tensor in tensors.items():
            if any(part in key for part in parts):
                moved = torch.randn(tensor.shape, generator=generator)
                if tensor.ndim == 2 and rank < min(tensor.shape):
                    moved = moved[:, :rank] @ torch.randn(rank, tensor.shape[1], generator=generator)
                tensors[key] = tensor + 0.05 * moved
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return out

    return tuned


def changes(base: Path, tuned: Path) -> dict[str, torch.Tensor]:
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    return {name: after[name].double() - before[name].double() for name in before}


def test_at_full_rank_the_merged_adapter_is_the_fine_tune(
    tune: Tune, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    tuned = tune(*(f"{name}.weight" for name in MATRICES))
    result = extract(str(tiny_base), str(tuned), 32, tmp_path / "out")
    assert result.relative_error < 1e-6 and result.held == pytest.approx(1.0) and result.not_held == {}
    assert (tools.logits_with_peft(tiny_base, tmp_path / "out") - tools.logits_of(tuned)).abs().max() <= 1e-4
    merge(tmp_path / "out", tmp_path / "merged", str(tiny_base), texts=tools.texts)
    merged, expected = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", tuned))
    assert all((merged[name] - expected[name]).abs().max() <= 1e-6 for name in expected)


def test_each_module_misses_what_the_dense_decomposition_says(tune: Tune, tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune(*(f"{name}.weight" for name in MATRICES))
    result = extract(str(tiny_base), str(tuned), 5, tmp_path / "out")
    moved = changes(tiny_base, tuned)
    assert set(result.modules) == {f"transformer.h.{block}.{name}" for block in (0, 1) for name in MATRICES}
    before = load_file(tiny_base / "model.safetensors")
    for name, facts in result.modules.items():
        delta = moved[f"{name}.weight"]
        values = torch.linalg.svdvals(delta)
        assert facts["relative_error"] == pytest.approx(float(values[5:].norm() / values.norm()), abs=1e-6)
        assert facts["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
        weight = before[f"{name}.weight"].double()
        assert facts["relative_change"] == pytest.approx(float(delta.norm() / weight.norm()), rel=1e-9)


def test_stored_factors_are_the_adapter_that_the_errors_speak_of(tune: Tune, tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune("attn.c_proj.weight")
    result = extract(str(tiny_base), str(tuned), 4, tmp_path / "out", "attention")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "transformer.h.1.attn.c_proj"
    a, b = (tensors[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
    delta = changes(tiny_base, tuned)[f"{name}.weight"]  # (in, out)
    error = float((delta - (b @ a).T).norm() / delta.norm())
    assert result.modules[name]["relative_error"] == pytest.approx(error, rel=1e-9)
    assert result.unchanged == ["transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 4 and config["fan_in_fan_out"] is True


def test_a_change_of_low_rank_is_held_completely_whatever_rank_is_asked(
    tune: Tune, tiny_base: Path, tmp_path: Path
) -> None:
    tuned = tune("mlp.c_fc.weight", rank=2)
    result = extract(str(tiny_base), str(tuned), 2, tmp_path / "out", "mlp.c_fc")
    assert result.relative_error < 1e-5  # the fine-tune itself is rounded to float32
    assert result.modules.keys() == {"transformer.h.0.mlp.c_fc", "transformer.h.1.mlp.c_fc"}


def test_what_no_lora_on_these_modules_holds_is_reported(tune: Tune, tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune("attn.c_attn.weight", "wte", "ln_1.weight", "mlp.c_fc.bias", "mlp.c_proj.weight")
    result = extract(str(tiny_base), str(tuned), 32, tmp_path / "out", "attn.c_attn")
    moved, before = changes(tiny_base, tuned), load_file(tiny_base / "model.safetensors")
    assert {kind: facts["tensors"] for kind, facts in result.not_held.items()} == {
        "embeddings": 1, "norms": 2, "biases": 2, "other matrices": 2,
    }  # fmt: skip
    name = "transformer.wte.weight"
    both = (before[name].norm() ** 2 + before["transformer.wpe.weight"].norm() ** 2).sqrt()
    assert result.not_held["embeddings"]["relative_change"] == pytest.approx(float(moved[name].norm() / both), rel=1e-5)
    assert result.not_held["biases"]["relative_change"] is None  # they were zero
    total = sum(float(delta.square().sum()) for delta in moved.values())
    held = sum(float(moved[f"{name}.weight"].square().sum()) for name in result.modules)
    assert result.held == pytest.approx(held / total, rel=1e-6)
    assert result.as_json()["held"] == result.held and json.dumps(result.as_json(), allow_nan=False)


def test_its_base_and_source_are_recorded(tune: Tune, tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune("attn.c_attn.weight")
    extract(str(tiny_base), str(tuned), 2, tmp_path / "out")
    recorded = json.loads((tmp_path / "out" / "peftune.json").read_text())
    assert recorded.items() >= Base(tiny_base, str(tiny_base)).identity().items()
    assert recorded["extracted"]["tuned"] == str(tuned) and len(recorded["extracted"]["tuned_fingerprint"]) == 64


def test_only_one_tensor_of_each_checkpoint_is_read_at_a_time(
    tune: Tune, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tune("attn.c_attn.weight", "mlp.c_fc.weight")
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("a full file was read"))
    monkeypatch.setattr("transformers.GPT2LMHeadModel.from_pretrained", lambda *_: pytest.fail("a full model"))
    read: list[str] = []
    original = CheckpointDiff.difference
    monkeypatch.setattr(CheckpointDiff, "difference", lambda self, name: read.append(name) or original(self, name))
    extract(str(tiny_base), str(tuned), 2, tmp_path / "out", "attn.c_attn")
    assert read == [f"transformer.h.{block}.attn.c_attn.weight" for block in (0, 1)]


@pytest.mark.parametrize(
    ("parts", "targets", "reason"),
    [
        ((), "all", "holds the same weights"),
        (("wte",), "all", "differs from .* in 1 tensors, such as transformer.wte.weight, but in none of the target"),
        (("mlp.c_fc.weight",), "attention", "choose other targets"),
        (("attn",), "attn.q", r"targets 'attn.q': expected all, attention, mlp, or some of"),
        (("attn",), ",", "expected all, attention, mlp"),
    ],
)
def test_nothing_to_extract_is_refused(
    parts: tuple[str, ...], targets: str, reason: str, tune: Tune, tiny_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=reason):
        extract(str(tiny_base), str(tune(*parts)), 2, tmp_path / "out", targets)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change", [{"n_layer": 3}, {"n_embd": 64}, {"vocab_size": 310}, {"n_head": 2}, {"n_inner": 64}]
)
def test_another_architecture_is_refused_by_its_numbers(
    change: dict[str, int], tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    GPT2LMHeadModel(GPT2Config.from_pretrained(tiny_base, **change)).save_pretrained(other)
    with pytest.raises(UserError, match="are not a base and its fine-tune") as caught:
        extract(str(tiny_base), str(other), 2, tmp_path / "out")
    key, value = next(iter(change.items()))
    assert key in str(caught.value) and str(value) in str(caught.value)


def test_a_head_of_its_own_is_compared_with_the_embedding_that_it_was(tiny_base: Path, tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny_base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    model.transformer.h[0].mlp.c_fc.weight.data += 0.1 * torch.randn_like(model.transformer.h[0].mlp.c_fc.weight)
    model.save_pretrained(tmp_path / "tuned")
    result = extract(str(tiny_base), str(tmp_path / "tuned"), 2, tmp_path / "out")
    assert result.not_held.keys() == {"output head"}
    assert result.not_held["output head"]["relative_change"] == pytest.approx(0.5, rel=1e-5)


def test_rounding_of_a_coarser_fine_tune_is_pointed_out(tune: Tune, tiny_base: Path, tmp_path: Path) -> None:
    tuned = tune("attn.c_attn.weight")
    tensors = load_file(tuned / "model.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, tuned / "model.safetensors")
    result = extract(str(tiny_base), str(tuned), 2, tmp_path / "out")
    assert "stored as bfloat16" in result.notes[0] and "3.9e-03" in result.notes[0]


def test_strongest_directions_of_a_steep_spectrum_are_exact(tmp_path: Path) -> None:
    from peftune.adapters.edit.extract import strongest

    torch.manual_seed(3)
    left, right = (torch.linalg.qr(torch.randn(rows, 20, dtype=torch.float64)).Q for rows in (40, 90))
    values = 10.0 ** -torch.arange(20, dtype=torch.float64)
    delta = left * values @ right.T
    for matrix in (delta, delta.T):
        found = strongest("m", "conv1d", matrix, 6)
        error = float((matrix - found.left @ found.right).norm())
        assert error == pytest.approx(float(values[6:].norm()), rel=1e-3)
        assert norm(found) == pytest.approx(float(values[:6].norm()), rel=1e-12)
