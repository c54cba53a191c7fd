"""Merging what was trained on a quantised base: into the full-precision base, with the distance to what was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2LMHeadModel

from peftune.adapters.merge.merge import merge
from peftune.cli import main
from peftune.config.recipe import Recipe, recipe_from
from peftune.model import quantized
from peftune.model.base import Base
from peftune.model.load import load_adapted, load_model
from peftune.training.run import train

pytest.importorskip("bitsandbytes")

KINDS = ("int8", "nf4")
TEXTS = ["the cat sat on the mat and the dog sat on the log", "naïve café, 東京 and a tab\there"]
Train = Callable[..., Recipe]


@pytest.fixture
def trained(tiny_base: Path, tmp_path: Path) -> Train:
    """Trains three steps on the tiny base and gives the recipe; arguments are overrides."""

    def run(*overrides: str) -> Recipe:
        (tmp_path / "text.txt").write_text("\n\n".join(TEXTS * 8), encoding="utf-8")
        values: dict[str, Any] = {
            "base": str(tiny_base),
            "data": {"train": str(tmp_path / "text.txt"), "validation": 0},
            "lora": {"rank": 4, "alpha": 8},
            "optim": {"lr": 1e-2, "schedule": "constant", "warmup": 0, "steps": 3},
            "batch": {"global_size": 4, "micro_size": 4},
            "run": {"out": str(tmp_path / "adapter"), "precision": "fp32", "eval_every": 0, "save_every": 0},
        }
        made = recipe_from(values, list(overrides))
        train(made)
        return made

    return run


def trained_function(made: Recipe, base: Path) -> torch.nn.Module:
    """The oracle: the packed base with the adapter of the last checkpoint, as the run left it."""
    model = load_adapted(made, Base(base), torch.float32, torch.device("cpu")).model
    (last,) = (Path(made.run.out) / "checkpoints").glob("step-3")
    model.load_state_dict(load_file(last / "adapter.safetensors"), strict=False)
    return model.eval()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "extra",
    [
        "lora.variant=lora",
        "lora.variant=rslora",
        "lora.variant=dora",
        "lora.variant=loftq",
        "lora.targets=attention",
        "lora.targets=[c_attn, wte]",
        "lora.modules_to_save=[ln_f, wte]",
    ],
)
def test_both_distances_are_those_of_whole_models(
    kind: str, extra: str, trained: Train, tools: Any, tiny_base: Path, tmp_path: Path
) -> None:
    made = trained(f"quantize={kind}", extra)
    report = merge(Path(made.run.out), tmp_path / "merged", texts=TEXTS)
    full = tools.logits_with_peft(tiny_base, made.run.out)
    assert (tools.logits_of(tmp_path / "merged") - full).abs().max() <= 1e-5
    assert report.max_abs_logit_difference is not None and report.max_abs_logit_difference <= 1e-5
    tokenizer, merged = AutoTokenizer.from_pretrained(tiny_base), GPT2LMHeadModel.from_pretrained(tmp_path / "merged")
    largest, kl, same = [], [], []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(text)["input_ids"]]])
            p, q = (m(ids).logits[0].double() for m in (trained_function(made, tiny_base), merged.eval()))
            largest.append((p - q).abs().max())
            kl.append((p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1))
            same.append(p.argmax(1) == q.argmax(1))
    assert report.trained_on == kind
    assert report.max_abs_logit_difference_to_trained == pytest.approx(float(max(largest)), abs=2e-5)
    assert report.mean_kl_to_trained == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert report.argmax_agreement_to_trained == pytest.approx(float(torch.cat(same).double().mean()))
    assert report.max_abs_logit_difference_to_trained > 10 * report.max_abs_logit_difference


@pytest.mark.parametrize("layout", ["bare-shards", "bare-bin", "prefixed-bin-shards"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_of_the_base_is_quantised_alike(
    kind: Any, layout: str, layouts: dict[str, Path], tiny_base: Path
) -> None:
    """By Transformers when a base is loaded, by peftune's own reader when a merge compares."""
    loaded, weights = load_model(Base(layouts[layout]), quantize=kind), Base(layouts[layout]).weights
    one_file = load_model(Base(tiny_base), quantize=kind)
    for name, module in one_file.named_modules():
        if quantized.is_quantized(module):
            wanted = quantized.unpacked(module)
            assert torch.equal(quantized.unpacked(loaded.get_submodule(name)), wanted)
            assert torch.equal(quantized.rounded(weights.tensor(f"{name}.weight"), kind).T, wanted)


def test_loftq_is_merged_nearer_to_what_was_trained(trained: Train, tmp_path: Path) -> None:
    kl = {}
    for variant in ("lora", "loftq"):
        made = trained("quantize=nf4", "lora.rank=16", f"lora.variant={variant}", f"run.out={tmp_path / variant}")
        kl[variant] = merge(Path(made.run.out), tmp_path / f"merged-{variant}", texts=TEXTS).mean_kl_to_trained
    assert kl["loftq"] is not None and kl["lora"] is not None and kl["loftq"] < 0.5 * kl["lora"]


def test_the_command_line_tells_both_distances_and_the_file_holds_them(
    trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trained("quantize=nf4")
    assert main.run(["merge", made.run.out, "--out", str(tmp_path / "merged"), "--dtype", "bfloat16"]) == 0
    told = capsys.readouterr().out
    assert "against base + adapter: logits differ by at most" in told
    assert "trained on the base in nf4: against that + adapter logits differ by at most" in told
    written = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert written["trained_on"] == "nf4" and 0 < written["mean_kl_to_trained"] < 0.1


def test_without_bitsandbytes_the_second_distance_is_not_measured_and_said_so(
    trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trained("quantize=int8")
    monkeypatch.setattr(quantized, "is_available", lambda: False)
    assert main.run(["merge", made.run.out, "--out", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr().out
    assert "against that + adapter not measured, bitsandbytes is not installed" in told
    written = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert written["trained_on"] == "int8" and written["mean_kl_to_trained"] is None and written["mean_kl"] is not None


def test_no_verification_skips_both(trained: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = trained("quantize=int8")
    assert main.run(["merge", made.run.out, "--out", str(tmp_path / "merged"), "--no-verify"]) == 0
    assert "against that" not in capsys.readouterr().out
    written = json.loads((tmp_path / "merged" / "merge.json").read_text())
    assert written["trained_on"] == "int8" and written["mean_kl_to_trained"] is written["mean_kl"] is None
