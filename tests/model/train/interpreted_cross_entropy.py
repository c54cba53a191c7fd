"""The kernel of the cross entropy in Triton's interpreter; `test_cross_entropy.py` starts this in a process of its own.

Triton decides when it is imported whether it interprets, for the whole process. Its interpreter computes with numpy
what a program computes, one row after the other; it rounds to bf16 by cutting off, a GPU to the nearest.
"""

from __future__ import annotations

import contextlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from gpu_recipe import values_over_text
from pretended_cuda import PretendedCUDA, pretend
from torch import nn
from torch.nn import functional as F

from peftune.config.recipe import recipe_from
from peftune.model import loss as loss_module
from peftune.model.loss import nats_of_parts
from peftune.model.train import cross_entropy
from peftune.model.train.cross_entropy_kernel import launch
from peftune.training import run
from peftune.training.metrics import read_metrics

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of infinities
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDING = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def exact(row: torch.Tensor, target: int, share: float) -> tuple[float, torch.Tensor]:
    """Nats and gradient of a row, in float64."""
    x = row.double() - row.double().max()
    log_p = x - torch.logsumexp(x, 0)
    gradient = log_p.exp() - share / len(x)
    gradient[target] -= 1 - share
    return float(-(1 - share) * log_p[target] - (share * log_p.mean() if share else 0)), gradient


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "columns", "stride", "block"),
    [(1, 50257, 50304, 4096), (2, 1501, 1501, 512), (3, 97, 128, 1024), (3, 300, 301, 128), (2, 128, 128, 64)],
)
def test_nats_and_gradient_are_those_of_float64(
    rows: int, columns: int, stride: int, block: int, dtype: torch.dtype
) -> None:
    """Odd lengths, less than a block, exact multiples, with and without room between rows, first and last target."""
    torch.manual_seed(0)
    memory = (4 * torch.randn(rows, stride)).to(dtype)
    targets = torch.tensor([columns - 1, 0, *torch.randint(0, columns, (rows,)).tolist()])[:rows]
    each = torch.rand(rows, 1)
    each[0] = 0.0
    for shares in (None, torch.ones(rows, 1), each):
        of_rows = [0.0] * rows if shares is None else shares[:, 0].tolist()
        rows_of = zip(memory[:, :columns], targets.tolist(), of_rows, strict=True)
        wanted, gradients = zip(*(exact(*row) for row in rows_of), strict=True)
        for with_gradient in (True, False):
            held, nats = memory.clone(), torch.full((rows, 1), torch.nan)
            launch(held[:, :columns], targets, shares, nats, with_gradient, block)
            torch.testing.assert_close(nats[:, 0], torch.tensor(wanted), rtol=1e-5, atol=1e-5)
            assert torch.equal(held[:, columns:], memory[:, columns:])
            if with_gradient:
                found = held[:, :columns].double()
                torch.testing.assert_close(found, torch.stack(gradients), rtol=ROUNDING[dtype], atol=1e-7)
            else:
                assert torch.equal(held, memory)


def of_row(row: torch.Tensor, target: int, share: float | None = None) -> tuple[float, torch.Tensor]:
    """Nats and gradient of one row, in blocks of 64."""
    logits, nats = row[None].clone(), torch.zeros(1, 1)
    launch(logits, torch.tensor([target]), None if share is None else torch.full((1, 1), share), nats, True, 64)
    return float(nats), logits[0]


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_and_equal_ones(dtype: torch.dtype, share: float) -> None:
    for low, high in ((-1e30, 1e30), (-1e38, 1e38), (7.0, 7.0), *[(-3.3e38, -3.3e38)] * (share == 0)):
        row = torch.full((200,), low).to(dtype)
        row[150] = row[3] = high
        for target in (150, 3, 0):
            nats, gradient = of_row(row, target, share)
            wanted, right = exact(row, target, share)
            assert nats == pytest.approx(wanted, rel=1e-5, abs=1e-5)
            torch.testing.assert_close(gradient.double(), right, rtol=ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_minus_infinity_take_no_part(dtype: torch.dtype) -> None:
    """A whole first block of them, the last one, and all but the target."""
    for places in ([*range(64)], [*range(150, 200)], [n for n in range(200) if n != 100]):
        row = torch.randn(200, generator=torch.Generator().manual_seed(0)).to(dtype)
        row[places] = -torch.inf
        wanted, right = exact(row, 100, 0.0)
        for share in (None, 0.0):  # the second where other rows are smoothed
            nats, gradient = of_row(row, 100, share)
            assert nats == pytest.approx(wanted, rel=1e-5, abs=1e-5) and not gradient[places].any()
            torch.testing.assert_close(gradient.double(), right, rtol=ROUNDING[dtype], atol=1e-7)
        assert of_row(row, places[0])[0] == torch.inf and of_row(row, 100, 0.5)[0] == torch.inf


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_what_is_no_number_is_told(share: float) -> None:
    """As torch does; a run stops where its loss is not finite."""
    for place, value in ((0, torch.nan), (100, torch.nan), (199, torch.nan), (70, torch.inf)):
        row = torch.zeros(200)
        row[place] = value
        nats, gradient = of_row(row, 100, share)
        assert nats != nats and gradient.isnan().any()
    assert of_row(torch.full((200,), -torch.inf), 100, share)[0] != 0


def test_a_row_that_begins_beyond_32_bits_is_found(tmp_path: Path) -> None:
    """Of a file of 4 GiB that takes no room."""
    stride = 2**30
    held = torch.from_file(str(tmp_path / "sparse"), shared=True, size=2 * stride + 200, dtype=torch.bfloat16)
    logits, nats = held.as_strided((3, 200), (stride, 1)), torch.zeros(3, 1)
    logits.copy_(torch.randn(3, 200, generator=torch.Generator().manual_seed(0)))
    wanted = F.cross_entropy(logits.float(), torch.tensor([0, 1, 199]), reduction="none")
    launch(logits, torch.tensor([0, 1, 199]), None, nats, True)
    torch.testing.assert_close(nats[:, 0], wanted)
    assert (logits.float().sum(1).abs() < 0.1).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_trial_of_a_run_finds_it_right(dtype: torch.dtype) -> None:
    assert cross_entropy.reason_against(CPU, dtype) == ""


@pytest.mark.parametrize("smoothing", [[0.0, 0.0], [0.1, 0.1], [0.0, 0.3]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_head_learns_through_the_kernel_what_autograd_learns(
    dtype: torch.dtype, smoothing: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 301, bias=False).to(dtype).requires_grad_(False)
    given, targets, counts = (3 * torch.randn(13, 16)).to(dtype), torch.randint(0, 301, (13,)), [9, 4]
    exact = given.double().requires_grad_()
    parts = zip(torch.split(exact, counts), torch.split(targets, counts), smoothing, strict=True)
    wanted = [F.cross_entropy(h @ head.weight.double().T, t, reduction="sum", label_smoothing=s) for h, t, s in parts]
    (wanted[0] + 0.5 * wanted[1]).backward()

    monkeypatch.setattr(loss_module, "_in_place_for", lambda logits: cross_entropy.by_kernel)
    monkeypatch.setattr(loss_module, "chunk_rows", lambda device: 5)
    hidden = given.clone().requires_grad_()
    with torch.no_grad():
        told = nats_of_parts(hidden, head, targets, counts, smoothing)
    found = nats_of_parts(hidden, head, targets, counts, smoothing)
    (found[0] + 0.5 * found[1]).backward()
    assert torch.equal(told, found)
    precise = dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(wanted).detach(), rtol=1e-6 if precise else 1e-2, atol=1e-6)
    off = (hidden.grad.double() - exact.grad).norm() / exact.grad.norm()
    assert off < (1e-6 if precise else 1e-2)


def train(base: Path, out: Path) -> list[float]:
    """Losses of a run of 2 steps in fp32, with label smoothing."""
    AcceleratorState._reset_state(reset_partial_state=True)
    values = values_over_text(base, out.parent) | {"run": {"out": str(out), "precision": "fp32", "eval_every": 0}}
    del values["data"]["validation"]  # half as much by default: a row takes milliseconds
    run.train(recipe_from(values, ["optim.steps=2", "optim.label_smoothing=0.1", "batch.global_size=2"]))
    events = [*read_metrics(out / "metrics.jsonl")]
    assert ("cross entropy by one kernel" in events[0]["function"]) == (out.name == "gpu")
    return [event["loss"] for event in events if "loss" in event]


def on_pretended_gpu(cuda: PretendedCUDA, patch: pytest.MonkeyPatch) -> list[int]:
    """The kernel in the place of what stands in for it there, and how many rows each launch had."""
    rows: list[int] = []

    def launched(logits: torch.Tensor, *given: Any) -> None:
        rows.append(len(logits))
        with cuda.one_kernel("cross entropy"):
            launch(logits, *given)

    patch.setitem(sys.modules, "peftune.model.train.cross_entropy_kernel", types.SimpleNamespace(launch=launched))
    patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    return rows


def test_a_run_through_the_kernel_learns_what_a_run_without_it_learns(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = train(tiny_base, tmp_path / "cpu")
    with pretend(monkeypatch) as cuda:
        rows = on_pretended_gpu(cuda, monkeypatch)
        found = train(tiny_base, tmp_path / "gpu")
    assert len(wanted) == 4 and found == pytest.approx(wanted, rel=1e-5)
    assert max(rows) > 50 and not cuda.faults
