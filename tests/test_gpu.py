"""The same promises on a GPU. Skipped, and counted as skipped, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from peftune.config.recipe import LoraSection, Recipe, recipe_from
from peftune.inference.bank import AdapterBank
from peftune.inference.settings import GenerationSettings
from peftune.model import quantized
from peftune.model.base import Base
from peftune.model.load import load_model, move_to
from peftune.model.lora import inject
from peftune.model.loss import LossModel
from peftune.model.train import attention, varlen_attention
from peftune.model.train.forward import train_forward
from peftune.training import run
from peftune.training.metrics import read_metrics
from peftune.training.optimizer import ReplicatedStrategy

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[1]
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Make:
    """`recipe(out, "key=value", …)` over a small corpus of long and short documents, fp32 unless told otherwise."""
    corpus = tmp_path / "text.jsonl"
    texts = [" ".join(["the cat sat on the mat"] * (1 + number % 9)) for number in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    values: dict[str, Any] = {
        "base": str(tiny_base),
        "data": {"train": str(corpus), "validation": 0.1},
        "lora": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "steps": 8},
        "batch": {"global_size": 8},
        "run": {"out": "", "precision": "fp32", "eval_every": 0, "save_every": 4},
    }
    return lambda out, *overrides: recipe_from(values, [f"run.out={tmp_path / out}", *overrides])


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[Recipe], list[float]]:
    """Train a recipe as on a machine without a GPU; its losses."""

    def start(made: Recipe) -> list[float]:
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: False)
            return losses(made)

    return start


def losses(made: Recipe) -> list[float]:
    run.train(made)
    return told(Path(made.run.out))


def told(out: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(out / "metrics.jsonl") if event["event"] == "train"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2), ("fp16", 1e-2)])
def test_a_gpu_learns_what_a_cpu_learns(recipe: Make, on_cpu: Any, precision: str, tolerance: float) -> None:
    if precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")
    wanted = on_cpu(recipe("cpu"))
    np.testing.assert_allclose(losses(recipe("gpu", f"run.precision={precision}")), wanted, rtol=tolerance)


def test_a_run_begun_on_a_gpu_goes_on_on_a_cpu(recipe: Make, on_cpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = on_cpu(recipe("whole"))
    taken = iter([run.train_step] * 5)
    with monkeypatch.context() as patch, pytest.raises(Exception, match="the same command"):
        patch.setattr(run, "train_step", lambda *given: next(taken, _stop)(*given))
        run.train(recipe("moved"))
    np.testing.assert_allclose(on_cpu(recipe("moved")), whole, rtol=1e-4)


def _stop(*_: object) -> object:
    raise run.StopNow


def test_adamw_is_fused_and_batches_come_through_pinned_memory(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    update, pin = ReplicatedStrategy.update, torch.Tensor.pin_memory

    def look(strategy: ReplicatedStrategy, *given: Any) -> float:
        seen.append(bool(strategy.optimizer.param_groups[0]["fused"]))
        return update(strategy, *given)

    pinned: list[int] = []
    monkeypatch.setattr(ReplicatedStrategy, "update", look)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *a: pinned.append(t.numel()) or pin(t, *a))
    run.train(recipe("fused"))
    assert seen and all(seen) and pinned


def test_a_gpu_that_is_full_halves_the_micro_batch(recipe: Make, tmp_path: Path) -> None:
    corpus = tmp_path / "many.jsonl"  # a step of 2,000 blocks keeps about 1.4 GB of activations in one forward
    corpus.write_text("".join(json.dumps({"text": "the cat sat on the mat " * 11}) + "\n" for _ in range(2000)))
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_allocated() + 500_000_000
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        run.train(recipe("full", "batch.global_size=2000", f"data.train=[{corpus}]", "optim.steps=2"))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    state = json.loads((tmp_path / "full" / "checkpoints" / "step-2" / "state.json").read_text())
    assert 0 < state["micro_size"] < 2000


def test_rows_of_one_document_take_flash_attention(tiny_base: Path) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    scorer = LossModel(load_model(Base(tiny_base), torch.bfloat16, "cuda"))
    ids, positions = torch.randint(0, 299, (2, 64), device="cuda"), torch.arange(64, device="cuda").expand(2, 64)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.no_grad():  # raises where no such kernel takes it
        flash = scorer(ids, positions, ids.roll(-1, dims=1), None)
    masked = scorer(ids, positions, ids.roll(-1, dims=1), torch.zeros_like(ids))
    torch.testing.assert_close(flash, masked, rtol=1e-2, atol=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
def test_fast_steps_give_the_gradients_of_the_library_path(
    tiny_base: Path, dtype: torch.dtype, tolerance: float
) -> None:
    """Documents of unequal length, one row padded; whichever kernel was chosen for this dtype."""
    segments = torch.tensor([[0] * 20 + [1] * 44, [0] * 3 + [1] * 37 + [-1] * 24])
    positions = torch.cat([torch.arange(n) for n in (20, 44, 3, 37, 24)]).view(2, 64)
    ids = torch.randint(0, 299, (2, 64))
    targets = torch.where(segments >= 0, ids.roll(-1, dims=1), -100)

    def gradient(number_format: torch.dtype, is_fast: bool) -> torch.Tensor:
        adapted = inject(load_model(Base(tiny_base)), LoraSection(rank=4, alpha=8), 0)
        for name, parameter in adapted.trainable().items():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        move_to(adapted.model, "cuda", number_format)
        adapted.model.train()
        if is_fast:
            loss = train_forward(adapted, dtype, 0.0, 0.0, recompute=False)(ids, positions, targets, segments)
        else:
            loss = LossModel(adapted.model)(ids.cuda(), positions.cuda(), targets.cuda(), segments.cuda())
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapted.trainable().values()))])

    found, wanted = gradient(dtype, True), gradient(torch.float32, False)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("plan", [varlen_attention.plan, attention._fused])
def test_every_gpu_kernel_is_causal_attention_within_documents(plan: Any) -> None:
    lengths, heads = np.array([5, 130, 1, 129]), 2
    qkv = torch.randn(265, 3 * heads * 64, device="cuda", dtype=torch.bfloat16)
    found = plan(lengths, heads, torch.device("cuda"))(qkv)
    wanted = attention._by_query_blocks(lengths, heads, torch.device("cpu"))(qkv.float().cpu())
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_computes_on_a_gpu_what_it_computes_on_a_cpu(tiny_base: Path, kind: quantized.Kind) -> None:
    ids, positions = torch.randint(0, 299, (2, 64)), torch.arange(64).expand(2, 64)
    targets = ids.roll(-1, dims=1)
    wanted = LossModel(load_model(Base(tiny_base), quantize=kind))(ids, positions, targets, None)
    scorer = LossModel(load_model(Base(tiny_base), device="cuda", quantize=kind))
    found = scorer(ids.cuda(), positions.cuda(), targets.cuda(), None)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=0)


@pytest.fixture
def gpus() -> Iterator[int]:
    yield torch.cuda.device_count()


def test_a_mixed_batch_writes_on_a_gpu_what_it_writes_on_a_cpu(tiny_base: Path, tmp_path: Path) -> None:
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        model = get_peft_model(load_model(Base(tiny_base)), LoraConfig(r=4 + seed, target_modules=["c_attn", "c_fc"]))
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    banks = [AdapterBank(str(tiny_base), device=device) for device in ("cpu", "cuda")]
    names = ["one", "two", None, "two"]
    for bank in banks:
        for name in ("one", "two"):
            bank.add(name, tmp_path / name)
    ids = torch.randint(0, 250, (4, 30), generator=torch.Generator().manual_seed(0))
    cpu, gpu = (bank.logits(ids, names).cpu() for bank in banks)
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)
    settings = GenerationSettings(max_new_tokens=20, temperature=0)
    alone = [banks[1].generate(["the cat"], settings, name)[0] for name in names]
    assert banks[1].generate(["the cat"] * 4, settings, names) == alone


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_every_gpu_configuration_gives_the_same_adapter(
    recipe: Make, tmp_path: Path, gpus: int, distance: Callable[[Path, Path], float], way: str, ranks: int
) -> None:
    """NCCL between GPUs, offloaded optimizer and weights in pinned memory; one GPU is a world of one."""
    if gpus < ranks:
        pytest.skip(f"{ranks} GPUs needed, {gpus} here")
    losses(recipe("one"))
    made = recipe("many", f"batch.micro_size={4 // ranks}")
    (tmp_path / "r.json").write_text(json.dumps(made.model_dump(mode="json")))
    launcher = [sys.executable, "-m", "peftune", "launch", "--processes", str(ranks)]
    command = [*launcher, way, str(tmp_path / "r.json")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    np.testing.assert_allclose(told(tmp_path / "many"), told(tmp_path / "one"), rtol=1e-4)
    assert distance(tmp_path / "one", tmp_path / "many") <= 1e-3
