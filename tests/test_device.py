"""Device and precision are chosen by what works here; what does not is told, with what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from peftune import device
from peftune.cli import main
from peftune.device import choose_device, choose_precision, inference_precision, is_out_of_memory
from peftune.errors import UserError

CAPABILITIES = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")


@pytest.mark.parametrize(
    ("kind", "able", "wanted"),
    [
        ("AVX512", ["_is_avx512_bf16_supported"], "bf16"),
        ("AVX512", ["_is_amx_tile_supported"], "bf16"),
        ("AVX512", [], "fp32"),
        ("AVX2", [], "fp32"),
        ("DEFAULT", ["_is_arm_bf16_supported"], "bf16"),
        ("SVE256", ["_is_arm_bf16_supported"], "bf16"),
        ("DEFAULT", [], "fp32"),
    ],
)
@pytest.mark.parametrize("asked_of_torch", [True, False])
def test_a_cpu_gets_bf16_where_it_multiplies_it(
    kind: str, able: list[str], wanted: str, asked_of_torch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builds of torch differ in which capabilities they can name; one that is not there counts as absent."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: kind)
    for name in CAPABILITIES:
        monkeypatch.delattr(torch.cpu, name, raising=False)
        if name in able or asked_of_torch:
            monkeypatch.setattr(torch.cpu, name, lambda name=name: name in able, raising=False)
    assert choose_precision("auto", on_gpu=False) == wanted
    assert choose_precision("bf16", on_gpu=False) == "bf16"
    with pytest.raises(UserError, match="fp16 needs a GPU"):
        choose_precision("fp16", on_gpu=False)


def planted(monkeypatch: pytest.MonkeyPatch, driver: str | None, cuda: str | None, found: bool = False) -> None:
    """A machine with this NVIDIA driver, and a torch for this CUDA, which finds a GPU or none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "nvidia_driver", lambda: driver)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(found))

    def init() -> None:
        raise RuntimeError("CUDA driver initialization failed\nand more")

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        ("535.129.03", "13.0", r"driver \(535.129.03\) .* for CUDA 13.0, which needs 580 or newer: .*whl/cu126"),
        ("470.1", "12.6", r"for CUDA 12.6, which needs 525 or newer: update the driver"),
        ("595.1", None, r"is one for CPUs; install the one for CUDA"),
        ("595.1", "13.0", r"cannot use it: CUDA driver initialization failed; .*nvidia-smi"),
    ],
)
def test_a_driver_whose_gpu_torch_cannot_use_is_refused_and_the_cpu_can_be_insisted_on(
    driver: str, cuda: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted(monkeypatch, driver, cuda)
    for asked in ("auto", "cuda"):
        with pytest.raises(UserError, match=words) as error:
            choose_device(asked)
        assert "run.device: cpu" in str(error.value) and "\n" not in str(error.value)
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert choose_device("auto").type == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=words):
        choose_device("auto")


def test_without_a_driver_the_cpu_is_taken_unless_a_gpu_is_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, None, "13.0")
    assert choose_device().type == "cpu"
    with pytest.raises(UserError, match="device is cuda, and torch finds no GPU"):
        choose_device("cuda")
    with pytest.raises(UserError, match="device is gpu, expected auto, cpu or cuda"):
        choose_device("gpu")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("CUDA error: no kernel image is available for execution on the device\nCompile with", "whl/cu126"),
        ("CUDA error: out of memory", "other programs hold its memory"),
        ("CUDA error: an illegal instruction was encountered", "must fit"),
        (None, "a product of matrices is wrong"),
    ],
)
def test_a_gpu_on_which_no_kernel_runs_is_refused_before_anything_is_loaded(
    error: str | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a V100 with a torch for CUDA 13, which finds it and has no kernel for it."""
    planted(monkeypatch, "595.1", "13.0", found=True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))

    def ones(*_: object, device: torch.device) -> torch.Tensor:
        assert device == torch.device("cuda", 0)
        if error is not None:
            raise torch.AcceleratorError(error)
        return torch.zeros(8, 8)

    monkeypatch.setattr(torch, "ones", ones)
    with pytest.raises(UserError, match=rf"Tesla V100 \(compute capability 7.0\) computes nothing .*{words}") as told:
        choose_device()
    assert "\n" not in str(told.value) and choose_device("cpu").type == "cpu"


def test_each_rank_gets_a_gpu_of_its_own_and_fp32_is_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    planted(monkeypatch, "595.1", "13.0", found=True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(device, "why_no_kernel", lambda _: "")
    monkeypatch.setenv("LOCAL_RANK", "3")
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers have it
    try:
        assert choose_device() == torch.device("cuda", 3)
        assert torch.get_float32_matmul_precision() == "highest"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("able", [True, False])
def test_models_that_do_not_learn_take_bf16_on_a_gpu_that_has_it(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
    assert inference_precision("auto", torch.device("cuda")) == ("bf16" if able else "fp32")
    assert inference_precision("auto", torch.device("cpu")) == "fp32"
    assert inference_precision("fp16", torch.device("cuda")) == "fp16"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 bytes"), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (MemoryError(), True),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
    ],
)
def test_memory_that_runs_out_is_known_in_the_words_of_every_library(error: BaseException, wanted: bool) -> None:
    assert is_out_of_memory(error) == wanted


def test_the_driver_is_asked_for_its_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert device.nvidia_driver() is None
    for script, version in (
        ("echo '| NVIDIA-SMI 535.1   Driver Version: 535.129.03   CUDA Version: 12.2 |'", "535.129.03"),
        ("echo No devices were found", None),
        ("exit 9", None),
    ):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o700)
        assert device.nvidia_driver() == version


def test_no_test_sees_a_gpu_but_those_that_need_one(request: pytest.FixtureRequest) -> None:
    assert request.config.getoption("markexpr") == "gpu" or os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(
    "words",
    [
        "generate --prompt the --base {base} --device cuda",
        "eval --data text={text} --base {base} --device cuda",
        "serve --port 0 --base {base} --device cuda",
        "train {recipe} run.device=cuda",
        "train {recipe} run.device=cuda --dry-run",
        "plan {recipe} run.device=cuda",
    ],
    ids=lambda words: words.split()[0] + words.split()[-1],
)
def test_every_verb_refuses_a_gpu_that_is_not_there_in_one_line(
    words: str, tiny_base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    text, recipe = tmp_path / "text.txt", tmp_path / "recipe.yaml"
    text.write_text("the cat sat\n\nthe dog ran\n")
    recipe.write_text(f"base: {tiny_base}\ndata: {{train: {text}, validation: 0}}\nrun: {{out: {tmp_path / 'out'}}}\n")
    assert main.run(words.format(base=tiny_base, text=text, recipe=recipe).split()) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("peftune: device is cuda, and torch finds no GPU here")
    assert not (tmp_path / "out").exists()
