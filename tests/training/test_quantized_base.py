"""Runs on a base in 8 or 4 bits: what learns, what resumes, what is delivered, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.model import quantized
from peftune.model.base import Base
from peftune.model.load import load_adapted, load_model
from peftune.model.lora import quiet_peft
from peftune.training import step
from peftune.training.metrics import read_metrics
from peftune.training.run import train

pytest.importorskip("bitsandbytes")

Make = Callable[..., Recipe]
KINDS = ("int8", "nf4")
PROBE = torch.randint(0, 256, (2, 48), generator=torch.Generator().manual_seed(3))


def losses_of(made: Recipe) -> list[float]:
    events = read_metrics(Path(made.run.out) / "metrics.jsonl")
    return [event["loss"] for event in events if event["event"] == "train"]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(PROBE).logits  # type: ignore[no-any-return]


def on_full_base(base: Path, adapter: Path | str) -> PeftModel:
    """What plain PEFT makes of the delivered adapter."""
    with quiet_peft():
        return PeftModel.from_pretrained(load_model(Base(base)), adapter)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_learns_between_evaluations_and_samples(recipe: Make, kind: str, precision: str) -> None:
    made = recipe(
        f"quantize={kind}", f"run.precision={precision}", "data.validation=0.2", "run.eval_every=1",
        "run.checkpointing=true", 'run.samples=["the cat"]', "optim.steps=4",
    )  # fmt: skip
    figures = train(made).metrics["validation"]
    losses = losses_of(made)
    assert losses[-1] < losses[0] and figures["adapter"]["loss"] < figures["base"]["loss"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", ["lora", "rslora", "dora", "loftq"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    recipe: Make, tmp_path: Path, kind: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = (f"quantize={kind}", f"lora.variant={variant}", "lora.dropout=0.1", "optim.steps=4", "optim.lr=3e-3")
    whole = recipe(*settings, f"run.out={tmp_path / 'whole'}")
    train(whole)
    cut = recipe(*settings, f"run.out={tmp_path / 'cut'}")
    taken = iter([step.train_step] * 2)
    monkeypatch.setattr("peftune.training.run.train_step", lambda *given: next(taken, _stop)(*given))
    with pytest.raises(Exception, match="the same command"):
        train(cut)
    monkeypatch.undo()
    train(cut)
    assert losses_of(cut) == losses_of(whole) and losses_of(whole)[-1] < losses_of(whole)[0]
    first, second = ((tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert first == second


def _stop(*_: object) -> object:
    raise step.StopNow


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "extra",
    [
        "lora.variant=dora",
        "lora.variant=rslora",
        "lora.targets=[c_attn, wte]",
        "lora.targets=[c_attn, lm_head]",
        "lora.modules_to_save=[wte, lm_head]",
        "lora.modules_to_save=[ln_f, ln_1, wpe]",
        "lora.targets=[attn.c_proj]",
        "lora.layers=[1]",
    ],
)
def test_the_adapter_is_a_plain_one_for_the_full_precision_base(
    recipe: Make, tiny_base: Path, kind: Any, extra: str
) -> None:
    """Full weights in the place of the packed ones, and the model of the run gives what plain PEFT gives."""
    made = recipe(f"quantize={kind}", extra)
    train(made)
    config = json.loads((Path(made.run.out) / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is True and not any("quant" in key for key in config)
    delivered = on_full_base(tiny_base, made.run.out)
    trained = load_adapted(made, Base(tiny_base), torch.float32, torch.device("cpu")).model
    values = load_file(sorted((Path(made.run.out) / "checkpoints").glob("step-*"))[-1] / "adapter.safetensors")
    trained.load_state_dict(values, strict=False)
    on_packed = logits(trained)
    full = dict(load_model(Base(tiny_base)).named_modules())
    for name, module in list(trained.named_modules()):
        if quantized.is_quantized(module):
            path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            plain = torch.nn.Linear(*reversed(full[path].weight.T.shape))  # type: ignore[union-attr,arg-type]
            plain.weight.data, plain.bias.data = full[path].weight.T.data, full[path].bias.data  # type: ignore[union-attr]
            trained.set_submodule(name, plain)
    assert (logits(trained) - logits(delivered)).abs().max() < 1e-4
    assert 0 < (on_packed - logits(delivered)).abs().max() < 1


@pytest.mark.parametrize("kind", KINDS)
def test_loftq_delivers_what_was_learnt_without_the_correction(recipe: Make, tiny_base: Path, kind: str) -> None:
    """On the full base W the update is s·(B·A - B0·A0): the trained matrix, but for what the correction left over."""
    made = recipe(f"quantize={kind}", "lora.variant=loftq", "lora.rank=8")
    train(made)
    fresh = load_adapted(made, Base(tiny_base), torch.float32, torch.device("cpu"))
    trained = load_file(sorted((Path(made.run.out) / "checkpoints").glob("step-*"))[-1] / "adapter.safetensors")
    delivered = load_file(Path(made.run.out) / "adapter_model.safetensors")
    for name in (n.removesuffix(".lora_A.default.weight") for n in trained if ".lora_A." in n):
        now, first = (
            values[f"{name}.lora_B.default.weight"].double() @ values[f"{name}.lora_A.default.weight"].double()
            for values in (trained, fresh.initial)
        )
        update = delivered[f"{name}.lora_B.weight"].double() @ delivered[f"{name}.lora_A.weight"].double()
        assert delivered[f"{name}.lora_A.weight"].shape[0] == 16
        torch.testing.assert_close(update, now - first, rtol=0, atol=1e-7)
    plain = recipe(f"quantize={kind}", "lora.rank=8", f"run.out={made.run.out}-plain")
    train(plain)
    assert distance_to_trained(made, tiny_base) < distance_to_trained(plain, tiny_base)


def distance_to_trained(made: Recipe, base: Path) -> float:
    """Root mean square difference of logits: full base + delivered adapter, packed base + trained adapter."""
    model = load_adapted(made, Base(base), torch.float32, torch.device("cpu")).model
    values = load_file(sorted((Path(made.run.out) / "checkpoints").glob("step-*"))[-1] / "adapter.safetensors")
    model.load_state_dict(values, strict=False)
    return float((logits(model) - logits(on_full_base(base, made.run.out))).square().mean().sqrt())


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_base_is_said_and_recorded(recipe: Make, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = recipe(f"quantize={kind}")
    train(made)
    start = read_metrics(Path(made.run.out) / "metrics.jsonl")[0]
    assert start["base_bytes"] < start["base_bytes_fp32"] == 2 * start["base_bytes_bf16"]
    assert f" as {kind} (fp32 0.1 MB, bf16 0.1 MB)" in capsys.readouterr().err
    provenance = json.loads((Path(made.run.out) / "peftune.json").read_text())
    assert provenance["recipe"]["quantize"] == kind and "bitsandbytes" in provenance["versions"]
    assert f"The base was quantised to {kind}" in (Path(made.run.out) / "README.md").read_text()


def test_evaluation_and_generation_take_the_adapter_on_the_full_precision_base(
    recipe: Make, tiny_base: Path, tmp_path: Path
) -> None:
    from peftune.cli.writing.generate import generate_texts
    from peftune.inference.perplexity import evaluate
    from peftune.inference.settings import GenerationSettings

    made = recipe("quantize=nf4", "data.validation=0.2")
    measured = train(made).metrics["validation"]["adapter"]["loss"]
    folders = {"tuned": Path(made.run.out)}
    rows = evaluate(None, {"text": made.data.train}, folders)["rows"]
    assert rows["tuned"]["text"]["loss"] < rows["base"]["text"]["loss"]
    np.testing.assert_allclose(rows["tuned"]["text"]["loss"], measured, rtol=0.2)
    settings = GenerationSettings(max_new_tokens=8, temperature=0.0)
    generate_texts(None, folders, "tuned", ["the cat"], None, settings, tmp_path / "text.json", "fp32")
    assert json.loads((tmp_path / "text.json").read_text())


def test_without_bitsandbytes_one_line_says_what_to_install(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized, "is_available", lambda: False)
    made = recipe("quantize=int8")
    with pytest.raises(UserError, match=r"quantize: int8 needs bitsandbytes; pip install 'peftune\[quant\]'"):
        train(made)


@pytest.mark.parametrize("targets", ["[c_attn, wte]", "[lm_head]"])
def test_loftq_outside_the_blocks_is_refused_before_loading(recipe: Make, targets: str) -> None:
    with pytest.raises(UserError, match="loftq corrects quantised weights, and lm_head, wte and wpe are not quantised"):
        train(recipe("quantize=nf4", "lora.variant=loftq", f"lora.targets={targets}"))


def test_loftq_of_more_directions_than_there_are_is_refused_before_loading(recipe: Make) -> None:
    with pytest.raises(UserError, match="loftq takes 33 directions"):
        train(recipe("quantize=nf4", "lora.variant=loftq", "lora.rank=33"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_screen_shows_nothing_of_the_libraries(recipe: Make, tmp_path: Path, kind: str) -> None:
    made = recipe(
        f"quantize={kind}", "data.validation=0.2", "run.eval_every=1", 'run.samples=["the cat"]', "run.precision=bf16",
        f"run.out={tmp_path / 'adapter'}",
    )  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made.model_dump(mode="json")), encoding="utf-8")
    lines = []
    for verb in (["train", str(path)], ["merge", made.run.out, "--out", str(tmp_path / "merged")]):
        process = subprocess.run(
            [sys.executable, "-m", "peftune", *verb], capture_output=True, text=True, timeout=300, check=False
        )
        assert process.returncode == 0, process.stderr
        lines += process.stderr.splitlines()
    ours = ("memory at most ", "step ", "  sample ", "base: ", "4,096 trainable parameters, ")
    assert [line for line in lines if not line.startswith(ours) and "tokens to learn in" not in line] == []
