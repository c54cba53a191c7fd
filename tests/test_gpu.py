"""The same promises on a GPU: `pytest -m gpu`. Skipped, and counted as skipped, where there is none."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_recipe import values_over_text
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.config.recipe import LoraSection, Recipe, recipe_from
from peftune.device import choose_device, device_name
from peftune.errors import UserError
from peftune.inference.bank import AdapterBank
from peftune.inference.engine import Engine
from peftune.inference.request import Request, RequestOutput
from peftune.inference.settings import GenerationSettings
from peftune.model import quantized
from peftune.model.base import Base, open_base
from peftune.model.decode.captured_steps import VARIABLE
from peftune.model.load import load_model, move_to
from peftune.model.lora import Adapted, inject
from peftune.model.loss import LossModel, by_torch
from peftune.model.train import attention, cross_entropy, varlen_attention
from peftune.model.train.attention import kernel_for
from peftune.model.train.forward import train_forward
from peftune.serve.engines.group import EngineGroup
from peftune.serve.settings import ServeSettings
from peftune.training import run
from peftune.training.metrics import read_metrics
from peftune.training.optimizer import ReplicatedStrategy

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]  # libraries warn of other things on a GPU
ROOT = Path(__file__).parents[1]
GPU = torch.device("cuda", 0)
Make = Callable[..., Recipe]


@pytest.fixture
def recipe(tiny_base: Path, tmp_path: Path) -> Make:
    """`recipe(out, "key=value", …)` over a small corpus of long and short documents, fp32 unless told otherwise."""
    values = values_over_text(tiny_base, tmp_path) | {
        "run": {"out": "", "precision": "fp32", "eval_every": 0, "save_every": 4},
    }
    return lambda out, *overrides: recipe_from(values, [f"run.out={tmp_path / out}", *overrides])


def losses(made: Recipe) -> list[float]:
    """Of a run that is made now, on the device that its recipe names, else on the GPU."""
    run.train(made)
    return told(made)


def told(made: Recipe) -> list[float]:
    events = [*read_metrics(Path(made.run.out) / "metrics.jsonl")]
    wanted = "CPU" if made.run.device == "cpu" else device_name(GPU)
    assert [event["device"] for event in events if event["event"] == "start"] == [wanted]
    return [event["loss"] for event in events if event["event"] == "train"]


def needs_bf16() -> None:
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        pytest.skip("this GPU has no bf16")


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-4), ("bf16", 1e-2), ("fp16", 1e-2)])
def test_a_gpu_learns_what_a_cpu_learns(recipe: Make, precision: str, tolerance: float) -> None:
    if precision == "bf16":
        needs_bf16()
    wanted = losses(recipe("cpu", "run.device=cpu"))
    np.testing.assert_allclose(losses(recipe("gpu", f"run.precision={precision}")), wanted, rtol=tolerance)


def test_a_run_begun_on_a_gpu_goes_on_on_a_cpu(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = losses(recipe("whole", "run.device=cpu"))
    cut_after(5, recipe("moved"), monkeypatch)
    run.train(recipe("moved", "run.device=cpu"))
    np.testing.assert_allclose(told(recipe("moved")), whole, rtol=1e-4)


def cut_after(steps: int, made: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a run that a signal stops after so many steps."""
    taken = iter([run.train_step] * steps)

    def stop(*_: object) -> object:
        raise run.StopNow

    with monkeypatch.context() as patch, pytest.raises(Exception, match="the same command"):
        patch.setattr(run, "train_step", lambda *given: next(taken, stop)(*given))
        run.train(made)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_equal_deterministic_runs_are_equal_to_the_bit_and_so_is_one_that_is_resumed(
    recipe: Make, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16":
        needs_bf16()
    settings = f"run.precision={precision}", "run.deterministic=true", "lora.dropout=0.1"
    made = [recipe(name, *settings) for name in ("one", "two", "resumed")]
    cut_after(5, made[2], monkeypatch)
    assert losses(made[0]) == losses(made[1]) == losses(made[2])
    first, *others = (load_file(Path(each.run.out) / "adapter_model.safetensors") for each in made)
    for other in others:
        assert all(torch.equal(other[name], tensor) for name, tensor in first.items())


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


def test_a_gpu_that_is_full_halves_the_micro_batch(
    recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit is one of this process, of which the estimate of the first micro-batch does not know."""
    corpus = tmp_path / "many.jsonl"  # a step of 1,000 blocks keeps about 0.7 GB of activations in one forward
    corpus.write_text("".join(json.dumps({"text": "the cat sat on the mat " * 11}) + "\n" for _ in range(1000)))
    made = recipe("full", "batch.global_size=1000", f"data.train=[{corpus}]", "optim.steps=2")
    torch.cuda.empty_cache()
    limit = torch.cuda.memory_allocated() + 300_000_000
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    try:
        losses(made)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory: micro-batches of" in capsys.readouterr().err
    state = json.loads((tmp_path / "full" / "checkpoints" / "step-2" / "state.json").read_text())
    assert 0 < state["micro_size"] < 1000


def test_memory_of_a_run_is_what_was_foreseen(recipe: Make) -> None:
    made = recipe("memory", "batch.global_size=512", "optim.epochs=1", "optim.steps=2", "run.precision=auto")
    losses(made)
    events = [*read_metrics(Path(made.run.out) / "metrics.jsonl")]
    foreseen = next(event["predicted_peak_bytes"] for event in events if event["event"] == "memory")
    measured = max(event["peak_memory_bytes"] for event in events if event["event"] == "train")
    assert measured < 1.1 * foreseen + 50e6  # cuBLAS has a workspace of its own


def test_rows_of_one_document_take_flash_attention(tiny_base: Path) -> None:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    needs_bf16()
    scorer = LossModel(load_model(Base(tiny_base), torch.bfloat16, GPU))
    ids, positions = torch.randint(0, 299, (2, 64), device=GPU), torch.arange(64, device=GPU).expand(2, 64)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]), torch.no_grad():  # raises where no such kernel takes it
        flash = scorer(ids, positions, ids.roll(-1, dims=1), None)
    masked = scorer(ids, positions, ids.roll(-1, dims=1), torch.zeros_like(ids))
    torch.testing.assert_close(flash, masked, rtol=1e-2, atol=0)


@pytest.mark.parametrize("width", [64, 80])
def test_training_in_bf16_takes_flash_attention_over_documents_end_to_end(width: int) -> None:
    """From compute capability 8.0 on; the widths of a head of GPT-2 and of one that is odd."""
    if torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("flash attention needs compute capability 8.0")
    assert kernel_for(GPU, torch.bfloat16, width).name == "flash attention, documents end to end"


def adapted_of(base: Path | tuple[int, int]) -> Adapted:
    """A checkpoint, or random weights of (width, heads) and two blocks, with an adapter whose B is not zero."""
    if isinstance(base, Path):
        model = load_model(Base(base))
    else:
        torch.manual_seed(0)
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=base[0], n_head=base[1], **drop))
    adapted = inject(model, LoraSection(rank=4, alpha=8), 0)
    for name, parameter in adapted.trainable().items():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
    return adapted


def gradient(adapted: Adapted, batch: list[torch.Tensor], fast: torch.dtype | None, recompute: bool) -> torch.Tensor:
    """By the fast forward in this dtype; None is the library's path in fp32."""
    move_to(adapted.model, GPU, fast or torch.float32)
    adapted.model.train()
    if fast is not None:
        loss = train_forward(adapted, fast, 0.0, 0.0, recompute)(*batch)
    else:
        loss = LossModel(adapted.model)(*(tensor.to(GPU) for tensor in batch))
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapted.trainable().values()))])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("base", ["tiny", (768, 12), (1600, 25)], ids=str)
def test_fast_steps_give_the_gradients_of_the_library_path(
    tiny_base: Path, base: Any, dtype: torch.dtype, tolerance: float, recompute: bool
) -> None:
    """Documents of unequal length, one row padded; whichever kernel this dtype has; GPT-2's and XL's width."""
    times = 1 if base == "tiny" else 8
    lengths = [times * n for n in (20, 44, 3, 37, 24)]
    segments = torch.tensor([0, 1, 0, 1, -1]).repeat_interleave(torch.tensor(lengths)).view(2, -1)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(2, -1)
    ids = torch.randint(0, 299, segments.shape, generator=torch.Generator().manual_seed(0))
    targets = torch.where(segments >= 0, ids.roll(-1, dims=1), -100)
    batch, where = [ids, positions, targets, segments], tiny_base if base == "tiny" else base
    found = gradient(adapted_of(where), batch, dtype, recompute)
    wanted = gradient(adapted_of(where), batch, None, False)
    assert float((found - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("plan", [varlen_attention.plan, attention._fused])
def test_every_gpu_kernel_is_causal_attention_within_documents(plan: Any) -> None:
    lengths, heads, scale = np.array([5, 130, 1, 129]), 2, 0.125
    qkv = torch.randn(265, 3 * heads * 64, device=GPU, dtype=torch.bfloat16)
    found = plan(lengths, heads, GPU)(qkv, scale)
    wanted = attention._by_query_blocks(lengths, heads, torch.device("cpu"))(qkv.float().cpu(), scale)
    torch.testing.assert_close(found.float().cpu(), wanted, rtol=3e-2, atol=3e-2)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("stride", [50257, 50304])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_entropy_by_the_kernel_is_that_by_torch(dtype: torch.dtype, stride: int) -> None:
    """Twice to the bit, and of as many rows as a step has."""
    assert cross_entropy.reason_against(GPU, dtype) == ""
    made = torch.Generator().manual_seed(0)
    given = (4 * torch.randn(1024, stride, generator=made)).to(GPU, dtype)
    targets = torch.randint(0, 50257, (1024,), generator=made).to(GPU)
    shares = torch.rand(1024, 1, generator=made).to(GPU)
    room = torch.empty(1024, 50257, device=GPU)
    for share in (0.0, 0.1, shares):
        found = []
        for way in (partial(by_torch, room), cross_entropy.by_kernel, cross_entropy.by_kernel):
            held, nats = given.clone(), torch.zeros(1024, 1, device=GPU)
            way(held[:, :50257], targets, share, nats, True)
            assert torch.equal(held[:, 50257:], given[:, 50257:])
            found.append((nats, held[:, :50257]))
        (wanted, gradient), first, second = found
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        torch.testing.assert_close(first[0], wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(first[1], gradient, rtol=max(1e-4, 2 * torch.finfo(dtype).eps), atol=1e-6)
        held, nats = given.clone(), torch.zeros(1024, 1, device=GPU)
        cross_entropy.by_kernel(held[:, :50257], targets, share, nats, False)
        assert torch.equal(held, given) and torch.equal(nats, first[0])


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_learns_through_the_kernel_of_the_cross_entropy_what_it_learns_without(
    recipe: Make, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16":
        needs_bf16()
    settings = f"run.precision={precision}", "optim.label_smoothing=0.1", "data.validation=0.2", "run.eval_every=4"
    found = []
    for name in ("with", "without"):
        if name == "without":
            monkeypatch.setattr(cross_entropy, "reason_against", lambda *_: "it is not wanted")
        made = recipe(name, *settings)
        losses(made)
        events = [*read_metrics(Path(made.run.out) / "metrics.jsonl")]
        assert ("cross entropy by one kernel" in events[0]["function"]) == (name == "with")
        found.append([event["loss"] for event in events if "loss" in event])
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5 if precision == "fp32" else 1e-2)


@pytest.mark.skipif(not quantized.is_available(), reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_a_quantised_base_computes_on_a_gpu_what_it_computes_on_a_cpu(tiny_base: Path, kind: quantized.Kind) -> None:
    ids, positions = torch.randint(0, 299, (2, 64)), torch.arange(64).expand(2, 64)
    targets = ids.roll(-1, dims=1)
    wanted = LossModel(load_model(Base(tiny_base), quantize=kind))(ids, positions, targets, None)
    scorer = LossModel(load_model(Base(tiny_base), device=GPU, quantize=kind))
    found = scorer(ids.to(GPU), positions.to(GPU), targets.to(GPU), None)
    torch.testing.assert_close(found.cpu(), wanted, rtol=1e-4, atol=0)


@pytest.fixture
def two_adapters(tiny_base: Path, tmp_path: Path) -> dict[str, Path]:
    """Of ranks 4 and 20."""
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        lora = LoraConfig(r=4 + 16 * seed, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
        model = get_peft_model(load_model(Base(tiny_base)), lora)
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.data += 0.2 * torch.randn_like(parameter)
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in ("one", "two")}


def bank_of(base: Path, adapters: dict[str, Path], precision: str, device: str) -> AdapterBank:
    bank = AdapterBank(str(base), precision, device)
    for name, directory in adapters.items():
        bank.add(name, directory)
    return bank


def test_a_mixed_batch_writes_on_a_gpu_what_it_writes_on_a_cpu(tiny_base: Path, two_adapters: dict[str, Path]) -> None:
    banks = [bank_of(tiny_base, two_adapters, "fp32", device) for device in ("cpu", GPU.type)]
    names = ["one", "two", None, "two"]
    ids = torch.randint(0, 250, (4, 30), generator=torch.Generator().manual_seed(0))
    cpu, gpu = (bank.logits(ids, names).cpu() for bank in banks)
    torch.testing.assert_close(gpu, cpu, rtol=1e-3, atol=1e-4)
    settings = GenerationSettings(max_new_tokens=20, temperature=0)
    alone = [banks[1].generate(["the cat"], settings, name)[0] for name in names]
    assert banks[1].generate(["the cat"] * 4, settings, names) == alone


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replayed_graphs_write_what_is_written_kernel_by_kernel(
    tiny_base: Path,
    two_adapters: dict[str, Path],
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In the engine's thread, with rows of several adapters that end, move and make room for others."""
    if precision == "bf16":
        needs_bf16()
    bank, written = bank_of(tiny_base, two_adapters, precision, GPU.type), dict[str, list[list[int]]]()
    settings = GenerationSettings(max_new_tokens=40, temperature=0, ignore_eos=True)
    for switch in ("0", "1"):
        monkeypatch.setenv(VARIABLE, switch)
        engine, texts = Engine(bank, slots=3), [list[int]() for _ in range(9)]
        asked = [replace(settings, max_new_tokens=20 + 3 * number) for number in range(9)]
        for number, (text, one) in enumerate(zip(texts, asked, strict=True)):
            request = Request(tuple(range(2 + number)), ["one", "one", None, "two"][number % 4], one)
            engine.submit(request, lambda output, text=text: text.extend(output.ids))
        engine.start()
        engine.stop(drain_seconds=100)
        written[switch] = texts
    assert [len(text) for text in written["1"]] == [20 + 3 * number for number in range(9)]
    assert written["1"] == written["0"]
    assert "CUDA graphs are off" not in caplog.text
    step = engine._batch._batch._step
    assert step is not None and len(step._steps) > 3  # of few rows and many, of one adapter and several


def test_a_bank_computes_in_bf16_on_a_gpu_that_has_it(tiny_base: Path) -> None:
    needs_bf16()
    bank = AdapterBank(str(tiny_base))
    assert (bank.precision, bank.spec.device, bank.spec.dtype) == ("bf16", choose_device(), torch.bfloat16)
    assert bank.generate(["the cat"], GenerationSettings(max_new_tokens=20, temperature=0))[0].ids


def test_every_gpu_has_an_engine_of_its_own_behind_one_address(tiny_base: Path, gpus: int) -> None:
    """With one GPU too: a process of its own, which sees that GPU alone, and the server's touches none."""
    before = [torch.cuda.mem_get_info(number)[0] for number in range(gpus)]
    base, outputs = open_base(str(tiny_base)), [list[RequestOutput]() for _ in range(4 * gpus)]
    with pytest.raises(UserError, match=f"torch finds {gpus} GPU"):
        EngineGroup(base, {}, "auto", ServeSettings(data_parallel_size=gpus + 1), "cuda")
    group = EngineGroup(base, {}, "auto", ServeSettings(data_parallel_size=gpus), "cuda")
    try:
        assert group.loaded().device == device_name(GPU)
        for number, found in enumerate(outputs):
            settings = GenerationSettings(max_new_tokens=20, seed=number // 2)
            group.submit(Request((1, 2, 3), None, settings), found.append)
        until = time.monotonic() + 100
        while group.load.running + group.load.waiting and time.monotonic() < until:
            time.sleep(0.01)
        after = [torch.cuda.mem_get_info(number)[0] for number in range(gpus)]
    finally:
        group.stop(0)
    assert all(found[-1].finish_reason in ("length", "end") for found in outputs)
    assert all(was - now > 50 << 20 for was, now in zip(before, after, strict=True))  # what CUDA itself takes


@pytest.fixture
def gpus() -> Iterator[int]:
    yield torch.cuda.device_count()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("way", ["ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"])
def test_every_gpu_configuration_gives_the_same_adapter(
    recipe: Make, tmp_path: Path, gpus: int, distance: Callable[[Path, Path], float], way: str, ranks: int
) -> None:
    """NCCL between GPUs, offloaded optimizer and weights in pinned memory; one GPU is a world of one."""
    if gpus < ranks:
        pytest.skip(f"{ranks} GPUs needed, {gpus} here")
    if "zero" in way and find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    one, made = recipe("one"), recipe("many", f"batch.micro_size={4 // ranks}")
    wanted = losses(one)
    (tmp_path / "r.json").write_text(json.dumps(made.model_dump(mode="json")))
    launcher = [sys.executable, "-m", "peftune", "launch", "--processes", str(ranks)]
    command = [*launcher, way, str(tmp_path / "r.json")]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    np.testing.assert_allclose(told(made), wanted, rtol=1e-4)
    assert distance(tmp_path / "one", tmp_path / "many") <= 1e-3
