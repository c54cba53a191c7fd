"""Training and evaluation on a pretended GPU: devices, waits, dtypes, and budgets that may only go down.

`pretended_cuda` says what this cannot see: CUDA's own kernels and their numbers, races, memory and time among it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from gpu_recipe import values_over_text
from pretended_cuda import PretendedCUDA, WrongDevice, pretend
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.config.recipe import LoraSection, recipe_from
from peftune.errors import Interrupted
from peftune.inference.evaluation.memorisation import Window
from peftune.inference.perplexity import evaluate
from peftune.model.load import move_to
from peftune.model.lora import inject
from peftune.model.train import cross_entropy
from peftune.model.train import forward as forward_module
from peftune.model.train.forward import TrainGPT2, train_forward
from peftune.model.train.layers import Elementwise, LoraFactors
from peftune.training import run
from peftune.training.fleet import train_fleet
from peftune.training.metrics import read_metrics
from peftune.training.optimizer import Gradient
from peftune.training.planning.calibration import seconds_per_block

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STEP = {
    "training/step.py:_accumulate (tolist)": 1,
    "training/step.py:steps_together (tolist)": 1,
}
"""Where a step may wait, and how often: for its nats with its largest gradient, and for the norm."""
OF_A_LIBRARY = STEP | {
    "model/loss.py:hidden (_local_scalar_dense)": 1,
    "model/loss.py:forward (nonzero)": 3,
}
"""Steps by Transformers and PEFT: which positions are scored, once a batch."""


class Steps:
    """What each step and each evaluation of a run did to the GPU."""

    def __init__(self, cuda: PretendedCUDA, patch: pytest.MonkeyPatch) -> None:
        self.cuda = cuda
        self.taken = self.evaluated = 0
        self.cut: int | None = None
        """Before which step, from 0, the run is interrupted once."""
        self.dtype, self.waits, self.launches = torch.float32, dict[str, int](), list[int]()
        for name in ("train_step", "evaluate_domain"):
            patch.setattr(run, name, self._checked(name, getattr(run, name)))

    def _checked(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            if name == "train_step" and self.taken == self.cut:
                self.cut = None
                raise Interrupted("cut")
            self.cuda.forget()
            result = function(*given)
            if name == "train_step":
                self.cuda.assert_clean(self.dtype, self.waits)
                self.taken += 1
                self.launches.append(sum(self.cuda.launches.values()))
            else:
                self.cuda.assert_clean(self.dtype, self.waits | EVALUATION)
                self.evaluated += 1
            return result

        return call


EVALUATION = {"training/validation.py:attempt (_local_scalar_dense)": 1}


def train(tiny_base: Path, out: Path, *overrides: str, told: str = "") -> list[float]:
    """Losses of a run of 4 steps of 2 micro-batches, with 3 evaluations and 2 checkpoints."""
    values = values_over_text(tiny_base, out.parent) | {
        "run": {"out": str(out), "precision": "bf16", "eval_every": 2, "save_every": 2},
    }
    run.train(recipe_from(values, ["optim.steps=4", "batch.micro_size=4", *overrides]))
    events = [*read_metrics(out / "metrics.jsonl")]
    assert [told in event["function"] for event in events if event["event"] == "start"] == [True]
    return [event["loss"] for event in events if event["event"] == "train"]


@pytest.mark.parametrize(
    ("overrides", "flash", "most"),
    [
        (["run.checkpointing=true", "lora.dropout=0.1"], True, 718),
        (["optim.neftune=5", "optim.label_smoothing=0.1", "lora.targets=query-value"], True, 276),
        (["run.precision=fp32"], True, 412),
        (["run.precision=fp16"], True, 468),
        ([], False, 632),
        (["quantize=int8"], True, None),
        (["quantize=int8", "run.fast=false"], True, None),
        (["quantize=nf4", "lora.variant=loftq"], True, None),
        (["run.fast=false", "optim.neftune=5"], True, None),
        (["lora.variant=dora", "lora.modules_to_save=[lm_head]"], True, None),
    ],
    ids=str,
)
def test_a_run_keeps_to_the_gpu(
    overrides: list[str],
    flash: bool,
    most: int | None,
    tiny_base: Path,
    tmp_path: Path,
    forgetful: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With budgets of a step's launches, two micro-batches and the update, that may only go down."""
    if any("quantize" in one for one in overrides):
        pytest.importorskip("bitsandbytes")
    precision = next((one.split("=")[1] for one in overrides if "precision" in one), "bf16")
    with pretend(monkeypatch, flash, triton=flash) as cuda:
        steps = Steps(cuda, monkeypatch)
        steps.dtype = DTYPES[precision]
        by_library = any("fast=false" in one or "dora" in one for one in overrides)
        steps.waits = OF_A_LIBRARY if by_library else STEP
        without = "cross entropy by torch, without its Triton kernel: ModuleNotFoundError: import of peftune"
        told = "cross entropy by one kernel" if flash else without
        if any("modules_to_save" in one for one in overrides):
            told = "DoRA normalises full weights)"
        if not flash:
            steps.cut = 2
            with pytest.raises(Interrupted):
                train(tiny_base, tmp_path / "adapter")
        losses = train(tiny_base, tmp_path / "adapter", *overrides, told=told)
    assert (steps.taken, steps.evaluated) == (4, 3) and losses[-1] < losses[0]
    assert most is None or max(steps.launches[1:]) <= most, steps.launches


def test_on_rectangles_and_in_fp32_a_gpu_learns_what_a_cpu_learns(
    tiny_base: Path, tmp_path: Path, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = train(tiny_base, tmp_path / "cpu", "run.precision=fp32")
    AcceleratorState._reset_state(reset_partial_state=True)
    with pretend(monkeypatch):
        assert train(tiny_base, tmp_path / "gpu", "run.precision=fp32") == pytest.approx(wanted, rel=1e-5)


def test_evaluating_reads_each_domain_once(tiny_base: Path, tmp_path: Path, cuda: PretendedCUDA) -> None:
    train(tiny_base, tmp_path / "adapter")
    cuda.forget()
    result = evaluate(
        str(tiny_base),
        {"text": tmp_path / "text.jsonl"},
        {"mine": tmp_path / "adapter"},
        precision="bf16",
        batch=2,
        trained_on={"learnt": tmp_path / "text.jsonl"},
        window=Window(8, 8),
    )
    assert result["memorised"]["base"]["learnt"]["windows"] > 2
    batches = cuda.waits["model/loss.py:hidden (_local_scalar_dense)"]  # Transformers looks for rows of several texts
    moved = {place: count for place, count in cuda.waits.items() if "perplexity.py:_measured" in place}
    read = {
        "device.py:why_no_kernel (_local_scalar_dense)": 1,  # before anything is loaded
        "model/loss.py:hidden (_local_scalar_dense)": batches,
        "inference/evaluation/documents.py:nats_by_document (copy to the host)": 2,
        "inference/evaluation/memorisation.py:share_reproduced (_local_scalar_dense)": 2,
        "inference/evaluation/memorisation.py:share_reproduced (copy from memory that is not pinned)": 2,
    }
    cuda.assert_clean(torch.bfloat16, moved | read)


@pytest.mark.parametrize("fast", [True, False])
def test_a_block_that_is_timed_keeps_to_the_gpu(
    fast: bool, tiny_base: Path, tmp_path: Path, cuda: PretendedCUDA
) -> None:
    run_section = {"out": str(tmp_path / "adapter"), "fast": fast}
    recipe = recipe_from(values_over_text(tiny_base, tmp_path) | {"run": run_section}, [])
    config, device = GPT2Config(vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4), cuda.device
    assert not cross_entropy.reason_against(device, torch.bfloat16)
    cuda.forget()
    assert seconds_per_block(config, recipe, torch.bfloat16, 64, device, seconds=0.0) > 0
    timed = {
        "training/planning/calibration.py:seconds_per_block (synchronize)": 2,
        "model/train/varlen_attention.py:reason_against (copy from memory that is not pinned)": 4,
        "model/train/varlen_attention.py:<listcomp> (_local_scalar_dense)": 4,
    }
    library = {"model/loss.py:hidden (_local_scalar_dense)": 2, "model/loss.py:forward (nonzero)": 6}
    once = {"training/planning/calibration.py:_one_pass (copy from memory that is not pinned)": 2}
    cuda.assert_clean(torch.bfloat16, timed if fast else timed | library | once)


@dataclass
class MicroBatch:
    """A bf16 forward of a GPT-2 with LoRA on all linear layers, on the GPU, and two short documents with padding."""

    forward: TrainGPT2
    gradient: Gradient
    cuda: PretendedCUDA

    def run(self) -> Counter[str]:
        """Launches of a micro-batch between two updates, clean ones."""
        segments = torch.tensor([[0] * 20 + [1] * 44, [0] * 60 + [-1] * 4])
        ids, positions = torch.arange(128).view(2, 64) % 97, torch.arange(64).expand(2, 64)
        targets = torch.where(segments >= 0, ids.roll(-1, 1), -100)
        with self.forward.between_updates():
            self.cuda.forget()
            self.gradient.add(self.forward(ids, positions, targets, segments))
        self.cuda.assert_clean(torch.bfloat16, {})
        return Counter(self.cuda.launches)


def micro_batch(cuda: PretendedCUDA, layers: int = 2) -> MicroBatch:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": 32, "n_layer": layers, "n_head": 4}
    none = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    model = GPT2LMHeadModel(GPT2Config(**sizes, **none, bos_token_id=0, eos_token_id=0))
    adapted = inject(model, LoraSection(rank=4), 0)
    move_to(adapted.model, "cuda", torch.bfloat16)
    adapted.model.train()
    parameters = list(adapted.trainable().values())
    gradient = Gradient(parameters, [p.shape for p in parameters], torch.device("cuda"))
    assert not cross_entropy.reason_against(parameters[0].device, torch.bfloat16)  # tried, as a run does at its start
    return MicroBatch(train_forward(adapted, torch.bfloat16, 0.0, 0.0, False), gradient, cuda)


A_BLOCK = 87
"""Launches of a block in a micro-batch, forward and backward, LoRA on all four linear layers. May only go down."""
A_MICRO_BATCH = 24
"""Launches of a micro-batch beside its blocks: embeddings, head, loss, gradients. May only go down."""


def test_launches_of_a_micro_batch_stay_within_their_budget(cuda: PretendedCUDA) -> None:
    shallow, deep = micro_batch(cuda, 2).run(), micro_batch(cuda, 4).run()
    two_blocks = deep - shallow
    assert two_blocks.total() <= 2 * A_BLOCK, two_blocks
    assert (shallow - two_blocks).total() <= A_MICRO_BATCH, shallow - two_blocks


def test_a_tensor_left_on_the_cpu_is_found(cuda: PretendedCUDA) -> None:
    planted = micro_batch(cuda)
    planted.forward = replace(planted.forward, wpe=planted.forward.wpe.cpu())
    with pytest.raises(WrongDevice, match=r"model/train/forward.py:embedded: "):
        planted.run()


@pytest.mark.parametrize(
    ("read", "named"),
    [
        (lambda hidden: hidden * float(hidden.sum() < 1e9), "_local_scalar_dense"),
        (lambda hidden: hidden * len(hidden.tolist()), "tolist"),
        (lambda hidden: hidden + hidden[hidden > 1e9].sum(), "index"),
        (lambda hidden: hidden + len(torch.nonzero(hidden > 1e9)), "nonzero"),
        (lambda hidden: hidden + torch.zeros(hidden.shape[1]).to(hidden), "copy from memory that is not pinned"),
        (lambda hidden: hidden.cpu().to(hidden.device), "copy to the host"),
        (lambda hidden: hidden[torch.arange(len(hidden))], "indices from the host"),
        (lambda hidden: hidden * torch.tensor(1, device="cuda"), "tensor of numbers"),
    ],
)
def test_a_wait_in_a_block_is_found(read: Callable[..., torch.Tensor], named: str, cuda: PretendedCUDA) -> None:
    planted = micro_batch(cuda)
    activated = planted.forward.elementwise.activated
    planted.forward = replace(planted.forward, elementwise=Elementwise(lambda hidden: activated(read(hidden))))
    with pytest.raises(AssertionError, match=rf"waits for the GPU: .*\({named}\)': [24]"):
        planted.run()


def test_a_copy_that_forgets_to_pin_is_found(cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = micro_batch(cuda)
    monkeypatch.setattr(forward_module, "to_device", lambda tensor, device: tensor.to(device, non_blocking=True))
    with pytest.raises(AssertionError, match="not pinned"):
        planted.run()


def test_a_layer_in_another_dtype_is_found(cuda: PretendedCUDA) -> None:
    planted = micro_batch(cuda)
    first, *others = planted.forward.blocks
    slipped = replace(first, ln_2=replace(first.ln_2, dtype=torch.float32))
    planted.forward = replace(planted.forward, blocks=(slipped, *others))
    with pytest.raises((AssertionError, RuntimeError), match=r"dtype|float"):
        planted.run()


def test_splitting_a_and_b_in_every_micro_batch_breaks_the_budget(
    cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoraFactors, "split", lambda factors, dtype: None)
    shallow, deep = micro_batch(cuda, 2).run(), micro_batch(cuda, 4).run()
    assert (deep - shallow).total() > 2 * A_BLOCK


def test_rows_of_logits_begin_where_fast_kernels_want_them(
    cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    strides, product = set[int](), torch.mm

    def seen(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        strides.add(out.stride(0))
        return product(a, b, out=out)

    monkeypatch.setattr(torch, "mm", seen)
    micro_batch(cuda).run()
    assert strides == {128}  # for a vocabulary of 97


FLEET = {
    "training/fleet/shared_room.py:accumulate (tolist)": 1,
    "training/step.py:steps_together (tolist)": 1,
}
"""Where a step of many adapters may wait, and how often: once for all."""


@pytest.mark.parametrize(
    ("members", "most", "own"),
    [(2, 373, []), (2, 436, ["lora.dropout=0.1", "optim.label_smoothing=0.1"]), (8, 601, [])],
    ids=str,
)
def test_a_fleet_keeps_to_the_gpu_and_launches_for_all_at_once(
    members: int,
    most: int,
    own: list[str],
    tiny_base: Path,
    tmp_path: Path,
    forgetful: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`own` are settings of the first members, one each."""
    values = values_over_text(tiny_base, tmp_path) | {
        "run": {"out": "", "precision": "bf16", "eval_every": 0, "save_every": 2}
    }
    each = ["optim.steps=4", "batch.micro_size=8"]
    recipes = [
        recipe_from(
            values,
            [*each, f"run.seed={n}", f"run.out={tmp_path / str(n)}", f"lora.rank={4 + n % 2}", *own[n : n + 1]],
        )
        for n in range(members)
    ]
    launches = []
    with pretend(monkeypatch) as cuda:
        taken = train_fleet.steps_together

        def checked(*given: Any) -> Any:
            cuda.forget()
            done = taken(*given)
            cuda.assert_clean(torch.bfloat16, FLEET)
            launches.append(sum(cuda.launches.values()))
            return done

        monkeypatch.setattr(train_fleet, "steps_together", checked)
        outcomes = train_fleet.train_fleet(recipes)
    assert [type(outcome).__name__ for outcome in outcomes] == ["Delivery"] * members, outcomes
    assert max(launches[1:]) <= most, launches  # of the first step AdamW makes its state besides
