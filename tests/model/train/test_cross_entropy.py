"""The cross entropy's kernel: in Triton's interpreter, compiled for GPUs, and when it is taken."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from pretended_cuda import cross_entropy_kernel as stand_in

from peftune.model.train import cross_entropy

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
KERNEL = "peftune.model.train.cross_entropy_kernel"
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_in_tritons_interpreter_it_computes_what_torch_computes() -> None:
    """In a process of its own, because Triton decides when it is imported whether it interprets."""
    cases = Path(__file__).with_name("interpreted_cross_entropy.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)],
        cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    (passed, other) = re.search(r"(\d+) passed(.*) in ", done.stdout).groups()
    assert int(passed) == 35 and not other, done.stdout[-2000:]


@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "shares"),
    [(75, "fp16", True), (75, "fp32", False), (80, "bf16", True), (90, "bf16", False), (120, "bf16", True)],
)
def test_it_compiles_for_gpus_and_reads_whole_blocks_sixteen_bytes_at_a_time(
    capability: int, dtype: str, shares: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where rows begin at multiples of 16 elements; nothing in it depends on the order in which programs run."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from peftune.model.train import cross_entropy_kernel as kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    types = [f"*{dtype}", "*i64", "*fp32" if shares else "constexpr", "*fp32", "i32", "i32", *["constexpr"] * 3]
    names = kernel._row.arg_names
    fixed = {"smoothed": shares, "wanted": True, "block": kernel.BLOCK} | ({} if shares else {"shares": None})
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in ("logits", "targets", "nats", "stride")}
    source = ASTSource(kernel._row, dict(zip(names, types, strict=True)), fixed, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": kernel.WARPS})
    code = made.asm["ptx"]
    vectors = kernel.BLOCK // (kernel.WARPS * 32) * (4 if dtype == "fp32" else 2) // 16
    assert len(re.findall(r"ld\.global\.v4\.b32", code)) == 2 * vectors  # in each pass
    assert len(re.findall(r"st\.global\.v4\.b32", code)) == vectors
    assert not re.search(r"\b(atom|red)\.", code) and "cubin" in made.asm


def changed(change: Callable[[torch.Tensor, torch.Tensor], object]) -> Any:
    """What stands in for the kernel, and then something else."""

    def launch(logits: torch.Tensor, targets: Any, shares: Any, nats: torch.Tensor, wanted: bool) -> None:
        stand_in(logits, targets, shares, nats, wanted)
        if wanted:
            change(logits, nats)

    return launch


def raising(error: BaseException) -> Any:
    def launch(*_: object) -> None:
        raise error

    return launch


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """The reason against a kernel that is launched so."""

    def reason(launch: Any, dtype: torch.dtype = torch.bfloat16) -> str:
        monkeypatch.setitem(sys.modules, KERNEL, launch and types.SimpleNamespace(launch=launch))
        return cross_entropy.reason_against(CPU, dtype)

    cross_entropy.reason_against.cache_clear()
    yield reason
    cross_entropy.reason_against.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_that_is_right_is_taken(taken: Callable[..., str], dtype: torch.dtype) -> None:
    assert taken(stand_in, dtype) == ""


def _last_column(logits: torch.Tensor, nats: torch.Tensor) -> None:
    logits[:, -1] = 0


@pytest.mark.parametrize(
    ("launch", "reason"),
    [
        (changed(lambda logits, nats: nats.mul_(1.01)), r"it is off by \d"),
        (changed(lambda logits, nats: logits[1].mul_(1.05)), r"it is off by \d"),
        (changed(_last_column), r"it is off by \d"),
        (changed(lambda logits, nats: nats[2].fill_(torch.nan)), "it is off by inf times what rounding explains"),
        (lambda *_: None, "it is off by inf"),
        (None, f"ModuleNotFoundError: import of {KERNEL} halted"),
        (raising(RuntimeError("Failed to find C compiler.\nPlease specify")), r"RuntimeError: .*compiler\.$"),
        (raising(subprocess.CalledProcessError(1, ["gcc"])), "CalledProcessError: .*gcc"),
    ],
)
def test_one_that_is_lost_is_told_with_its_reason(launch: Any, reason: str, taken: Callable[..., str]) -> None:
    assert re.match(reason, taken(launch))
    told = cross_entropy.description(CPU, torch.bfloat16)
    assert told.startswith("cross entropy by torch, without its Triton kernel: ") and "\n" not in told


def test_a_gpu_without_memory_for_the_trial_has_not_lost_it(taken: Callable[..., str]) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        taken(raising(torch.OutOfMemoryError("CUDA out of memory")))


@needs_triton
def test_without_a_gpu_triton_is_installed_in_vain(taken: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    cross_entropy.reason_against.cache_clear()
    assert re.match("[A-Za-z]+Error: .", cross_entropy.reason_against(CPU, torch.float32))
