"""Compiled pieces compute what torch's compute, for all batches with the same few graphs, or are left alone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.config.recipe import LoraSection
from peftune.model.architecture import activation
from peftune.model.lora import Adapted, inject
from peftune.model.train import layers
from peftune.model.train.compiled import compiled
from peftune.model.train.forward import train_forward
from peftune.model.train.layers import Norm

WIDTH = 64
GELU = activation("gelu_new")
NORM = Norm(torch.rand(WIDTH), torch.rand(WIDTH), 1e-5, torch.float32)


def _adapted(dtype: torch.dtype) -> Adapted:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_positions=128, n_embd=WIDTH, n_layer=3, n_head=4)).to(dtype)
    adapted = inject(model, LoraSection(rank=4, layers=[1, 2]), 0)  # block 0 lies below the lowest adapter
    for name, parameter in adapted.trainable().items():
        parameter.data = parameter.float()
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.model.train()
    return adapted


def _gradients(function: Callable[..., torch.Tensor], adapted: Adapted, tokens: int) -> tuple[float, torch.Tensor]:
    ids = torch.randint(0, 97, (1, tokens), generator=torch.Generator().manual_seed(tokens))
    loss = function(ids, torch.arange(tokens)[None], ids.roll(-1, 1), None)
    found = torch.autograd.grad(loss, list(adapted.trainable().values()))
    return float(loss.detach()), torch.cat([gradient.flatten().double() for gradient in found])


@pytest.mark.slow
@pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="a CPU's pieces need a C++ compiler"
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("recompute", [False, True])
def test_steps_of_all_lengths_share_the_graphs_of_the_trial(dtype: torch.dtype, recompute: bool) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()  # type: ignore[no-untyped-call]
    adapted = _adapted(dtype)
    with_compiler = train_forward(adapted, dtype, 0.0, 0.0, recompute, compiles=True)
    made = with_compiler.elementwise
    refused = made.description.startswith(
        "not compiled: what the compiler made is off by "
    )  # on a CPU that it fails on
    assert refused or made.description.startswith("elementwise operations compiled in"), made.description
    plain, graphs = train_forward(adapted, dtype, 0.0, 0.0, recompute), counters["stats"]["unique_graphs"]
    assert graphs >= 3 and (not refused or made.activated is plain.elementwise.activated)
    for tokens in (2, 7, 64, 65, 128):
        (loss, found), (wanted_loss, wanted) = (_gradients(f, adapted, tokens) for f in (with_compiler, plain))
        assert loss == pytest.approx(wanted_loss, rel=1e-6 if dtype is torch.float32 else 1e-3)
        assert float((found - wanted).norm() / wanted.norm()) < (1e-5 if dtype is torch.float32 else 2e-2)
        with torch.no_grad():
            ids = torch.zeros(1, tokens, dtype=torch.int64)
            assert with_compiler(ids, ids, ids, None).isfinite()
    assert counters["stats"]["unique_graphs"] == graphs


def test_a_compiler_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda piece: lambda *given: piece(*given))
    found = compiled(layers.Elementwise(GELU), NORM, 4 * WIDTH)
    assert found.description.startswith("elementwise operations compiled in") and found.activated is not GELU


@pytest.mark.parametrize("given", [None, "torch's own", "mine"])
def test_kernels_for_other_instructions_are_never_found(
    given: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    def directories(capability: str) -> tuple[str, str]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
        found = []
        for _ in range(2):  # a process may train twice
            compiled(layers.Elementwise(GELU), NORM, 4 * WIDTH)
            found.append(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        return found[0], found[1]

    monkeypatch.setattr(torch, "compile", lambda piece: piece)
    monkeypatch.setenv("PEFTUNE_CACHE", str(tmp_path / "cache"))
    root, seen = tmp_path / "mine" if given == "mine" else tmp_path / "cache" / "torchinductor", set()
    for capability in ("AVX512", "AVX2", "DEFAULT"):
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if given == "mine":
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(root))
        elif given:
            cache_dir()  # torch puts its default into the environment when it first looks
        first, second = directories(capability)
        assert first == second and Path(first).parent == root
        seen.add(first)
    assert len(seen) == 3


def test_without_a_compiler_the_run_goes_on_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("no C++ compiler was found\nand a long story")

    monkeypatch.setattr(torch, "compile", refuse)
    found = compiled(layers.Elementwise(GELU), NORM, 4 * WIDTH)
    assert found.description == "not compiled: no C++ compiler was found"
    assert found.activated is GELU


def test_a_compiler_that_is_wrong_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(piece: Callable[..., Any]) -> Callable[..., Any]:
        return (lambda hidden: piece(hidden) * 1.001) if piece is GELU else piece

    monkeypatch.setattr(torch, "compile", wrong)
    found = compiled(layers.Elementwise(GELU), NORM, 4 * WIDTH)
    assert found.description.startswith("not compiled: what the compiler made is off by ")
    assert found.activated is GELU
