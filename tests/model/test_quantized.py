"""A base in 8 or 4 bits: what is packed, what it computes, what it takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel

from peftune.config.recipe import LoraSection
from peftune.model import quantized
from peftune.model.base import Base, open_base
from peftune.model.load import footprint, load_model
from peftune.model.lora import best_product, inject
from peftune.model.loss import LossModel

pytest.importorskip("bitsandbytes")

KINDS = ("int8", "nf4")
LINEARS = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))


def batch(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Arguments of the scorer: every place scored, one document a row."""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    return ids, positions, ids.roll(-1, 1), torch.zeros_like(ids)


def dense(base: Path, kind: Any, dtype: torch.dtype = torch.float64) -> GPT2LMHeadModel:
    """The oracle: a full-precision GPT-2 with unpacked weights in it."""
    model = load_model(Base(base))
    packed = load_model(Base(base), quantize=kind)
    with torch.no_grad():
        for index, block in enumerate(model.transformer.h):
            for name in LINEARS:
                weight = quantized.unpacked(packed.transformer.h[index].get_submodule(name))
                block.get_submodule(name).weight.copy_(weight.T)
    return model.to(dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_the_blocks_linear_layers_are_packed_and_nothing_else(kind: Any, tiny_base: Path) -> None:
    model = load_model(Base(tiny_base), torch.bfloat16, quantize=kind)
    packed = {name for name, module in model.named_modules() if quantized.is_quantized(module)}
    assert packed == {f"transformer.h.{i}.{name}" for i in range(2) for name in LINEARS}
    assert model.lm_head.weight is model.transformer.wte.weight
    others = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
    assert set(others.values()) == {torch.bfloat16} and "transformer.h.0.attn.c_attn.bias" in others


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_unpacked_weights(kind: Any, tiny_base: Path, ids: torch.Tensor) -> None:
    model = load_model(Base(tiny_base), quantize=kind)
    with torch.no_grad():
        found, wanted = model(ids).logits, dense(tiny_base, kind)(ids).logits
        full = load_model(Base(tiny_base))(ids).logits
    assert (found - wanted).abs().max() < 1e-5
    assert (found - full).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_rounded_by_itself_is_that_of_the_loaded_base(kind: Any, tiny_base: Path) -> None:
    model, weights = load_model(Base(tiny_base), torch.bfloat16, quantize=kind), Base(tiny_base).weights
    for index in range(2):
        for name in LINEARS:
            path = f"transformer.h.{index}.{name}"
            alone = quantized.rounded(weights.tensor(f"{path}.weight"), kind)
            assert torch.equal(alone, quantized.unpacked(model.get_submodule(path)).T)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_compute_the_same_whatever_the_batch(kind: Any) -> None:
    """On a trained base, whose activations have outliers: the library's own int8 layers differ by 0.3 there."""
    model = load_model(open_base("builtin:small"), quantize=kind)
    ids = torch.randint(0, 4000, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        evaluated = model.eval()(ids).logits
        assert torch.equal(model.train()(ids).logits, evaluated)
        torch.testing.assert_close(model.eval()(ids[1:2]).logits[0], evaluated[1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_computed_is_what_bitsandbytes_trains_with(kind: Any, tiny_base: Path, ids: torch.Tensor) -> None:
    ours, theirs = load_model(Base(tiny_base), quantize=kind), load_model(Base(tiny_base), quantize=kind).train()
    for module in theirs.modules():
        if quantized.is_quantized(module):
            del module.forward
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    first, second = (m.transformer.h[1].mlp.c_fc(hidden) for m in (ours, theirs))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_of_the_unpacked_weights_in_float64(
    kind: Any, checkpointing: bool, tiny_base: Path, ids: torch.Tensor
) -> None:
    lora = LoraSection(rank=4, alpha=8)
    packed, wanted = (
        inject(load_model(Base(tiny_base), quantize=kind), lora, 0),
        inject(dense(tiny_base, kind), lora, 0),
    )
    for (name, p), q in zip(packed.trainable().items(), wanted.trainable().values(), strict=True):
        p.data.copy_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
        q.data = p.detach().double()
    for parameter in wanted.model.parameters():
        parameter.data = parameter.data.double()
    if checkpointing:
        core: Any = packed.model.base_model.model
        getattr(core, "activation_checkpointing_enable", core.gradient_checkpointing_enable)({"use_reentrant": False})
    losses = [LossModel(adapted.model).train()(*batch(ids)) for adapted in (packed, wanted)]
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[1]
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(packed.trainable().items(), wanted.trainable().values(), strict=True):
        assert p.grad is not None and q.grad is not None and q.grad.abs().max() > 0, name
        assert (p.grad - q.grad).abs().max() < 1e-5 * q.grad.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_counted_with_scales(kind: Any, tiny_base: Path) -> None:
    full, packed = (
        footprint(load_model(Base(tiny_base)).requires_grad_(False)),
        footprint(load_model(Base(tiny_base), quantize=kind)),
    )
    assert full.held == full.fp32 == 2 * full.bf16 == packed.fp32
    linear = 2 * 12 * 32 * 32  # weights in the linear layers of two blocks of width 32
    scales = 4 * 2 * (3 + 1 + 4 + 1) * 32 if kind == "int8" else 4 * linear // 64 + 4 * 16 * 8
    assert packed.held == full.held - 4 * linear + (linear if kind == "int8" else linear // 2) + scales
    assert "fp32 0.1 MB" in packed.description(kind)


@pytest.mark.parametrize("kind", KINDS)
def test_moving_and_copying_a_packed_model_changes_nothing(kind: Any, tiny_base: Path, ids: torch.Tensor) -> None:
    model = load_model(Base(tiny_base), quantize=kind)
    with torch.no_grad():
        before = model(ids).logits
        for module in model.modules():
            module.to("cpu")
        assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("kind", KINDS)
def test_loftq_starts_nearer_to_the_full_precision_model(kind: Any, tiny_base: Path, ids: torch.Tensor) -> None:
    original = Base(tiny_base).weights.tensor
    with torch.no_grad():
        full = load_model(Base(tiny_base))(ids).logits

        def distance(variant: Any) -> float:
            started = inject(
                load_model(Base(tiny_base), quantize=kind), LoraSection(rank=16, variant=variant), 0, original
            )
            return float((started.model(ids).logits - full).square().mean().sqrt())

        assert distance("loftq") < 0.7 * distance("lora")


def test_loftq_repeats_itself_bit_for_bit(tiny_base: Path) -> None:
    first, second = (
        inject(
            load_model(Base(tiny_base), quantize="nf4"),
            LoraSection(variant="loftq"),
            seed,
            Base(tiny_base).weights.tensor,
        )
        for seed in (0, 1)
    )
    assert len(first.initial) == 2 * 2 * 4
    assert all(torch.equal(first.initial[name], second.initial[name]) for name in first.initial)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (24, 24)])
def test_the_correction_is_the_truncated_singular_value_decomposition(shape: tuple[int, int]) -> None:
    error = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    a, b = best_product(error, rank=5, scale=3.0)
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    assert a.shape == (5, shape[1]) and b.shape == (shape[0], 5)
    torch.testing.assert_close(3.0 * b @ a, (left[:, :5] * values[:5]) @ right[:5], rtol=0, atol=1e-12)
    torch.testing.assert_close(a.square().sum(1), b.square().sum(0))


def test_a_width_that_no_block_of_64_divides_is_quantised_too(tiny_base: Path) -> None:
    weight = torch.randn(6, 18, generator=torch.Generator().manual_seed(0))
    for kind, largest in (("int8", 0.02), ("nf4", 0.6)):
        assert (quantized.rounded(weight, kind) - weight).abs().max() < largest  # type: ignore[arg-type]
