"""What CUDA would refuse or compute garbage from is found by `pretended_cuda`, and what is right goes through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pretended_cuda import PretendedCUDA, WrongDevice

from peftune.model.decode.captured_steps import CUDARecorder


def on_gpu(*shape: int) -> torch.Tensor:
    return torch.ones(shape, device="cuda")


def under_way() -> tuple[torch.Tensor, torch.Tensor]:
    """Page-locked memory, and where it is being copied to."""
    host = torch.ones(3).pin_memory()
    return host, host.to("cuda", non_blocking=True)


def filled(host: torch.Tensor) -> torch.Tensor:
    return host.copy_(on_gpu(3), non_blocking=True)


def of_the_cpu(function: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A gradient, from one that is on the CPU."""
    x = on_gpu(3).requires_grad_()
    return torch.autograd.grad(x.exp(), x, function())[0]


def recorded(function: Callable[[], torch.Tensor], waits: bool = True) -> torch.Tensor:
    recorder = CUDARecorder(torch.device("cuda"))
    if not waits:
        recorder._stream.wait_stream = lambda other: None
    replay, output = recorder(function)
    replay()
    return output


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (lambda: on_gpu(3).to("cpu", non_blocking=True).tolist(), "the host reads what a copy has yet to bring"),
        (lambda: on_gpu(3).to("cpu", non_blocking=True).numpy(), "the host reads what a copy has yet to bring"),
        (lambda: on_gpu(3).to("cpu", non_blocking=True)[:2].sum(), "sum of what a copy has yet to bring"),
        (lambda: filled(torch.empty(3).pin_memory()) + 1, "add of what a copy has yet to bring"),
        (lambda: under_way()[0].zero_(), "zero_ writes to what a copy has yet to read"),
        (lambda: torch.ones(3, out=under_way()[0]), "writes to what a copy has yet to read"),
        (lambda: on_gpu(3).bernoulli_(0.5, generator=torch.Generator()), "generator of another device"),
        (lambda: torch.rand(3, generator=torch.Generator("cuda")), "generator of another device"),
        (lambda: torch.zeros(()).add_(on_gpu()), "add_ of tensors on the GPU and on the CPU"),
        (lambda: of_the_cpu(lambda: torch.ones(3)), "a gradient on another device"),
        (lambda: recorded(lambda: on_gpu(3) + under_way()[1]), "a copy of the host's memory is recorded"),
        (lambda: recorded(lambda: on_gpu(3) + torch.ones(3).to("cuda")), "while a graph is recorded"),
        (lambda: recorded(lambda: on_gpu(3) + 1, waits=False), "a stream that has not waited"),
    ],
)
def test_a_fault_is_found(fault: Callable[[], object], told: str, cuda: PretendedCUDA) -> None:
    with pytest.raises(WrongDevice, match=told):
        fault()


def test_what_waits_for_a_copy_is_right(cuda: PretendedCUDA) -> None:
    brought, (host, there) = on_gpu(3).to("cpu", non_blocking=True), under_way()
    host.view(3, 1)
    again = brought.to("cuda", non_blocking=True)  # by the GPU, in order
    torch.cuda.synchronize()
    assert brought.tolist() == again.tolist() == [1, 1, 1] and host.zero_().sum() == 0 and float(there.sum()) == 3
    there.bernoulli_(0.5, generator=torch.Generator("cuda"))
    assert torch.rand(3, generator=torch.Generator()).shape == recorded(lambda: there + 1).shape
    assert of_the_cpu(lambda: on_gpu(3)).shape == (3,) and not cuda.faults


def test_autocast_of_the_cpu_and_sums_in_16_bits_show(cuda: PretendedCUDA) -> None:
    x = on_gpu(2, 2)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        cuda.forget()
        with torch.autocast(device, torch.bfloat16):
            assert (x @ x).dtype is dtype
        cuda.assert_clean(dtype, {})
    x.to(torch.bfloat16).sum(dtype=torch.float32)
    cuda.assert_clean(torch.bfloat16, {})
    x.to(torch.bfloat16).sum()
    with pytest.raises(AssertionError, match="sums in 16 bits"):
        cuda.assert_clean(torch.bfloat16, {})


def test_what_the_cpus_autocast_says_is_not_said_of_the_gpu(cuda: PretendedCUDA) -> None:
    with torch.autocast("cuda", torch.float16):
        assert torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cuda") is torch.float16
