"""Queries and values alone, as the LoRA paper trains them: a PEFT adapter on c_attn whose other elements stay zero."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.config.recipe import LoraSection, Recipe
from peftune.data.batches import Batch
from peftune.errors import UserError
from peftune.model.base import Base
from peftune.model.load import load_adapted, load_model
from peftune.model.lora import inject
from peftune.model.loss import LossModel
from peftune.training.inputs import read_inputs
from peftune.training.metrics import read_metrics
from peftune.training.optimizer import lr_at
from peftune.training.run import train

Make = Callable[..., Recipe]
QV = "lora.targets=query-value"


def untrained(tensor: torch.Tensor) -> torch.Tensor:
    """The elements of a stored B (3D, 2r) that belong to no part, written out without the code under test."""
    width, rank = tensor.shape[0] // 3, tensor.shape[1] // 2
    q, k, v = tensor[:width], tensor[width : 2 * width], tensor[2 * width :]
    return torch.cat([q[:, rank:].flatten(), k.flatten(), v[:, :rank].flatten()])


class SeparateLoras(torch.nn.Module):
    """c_attn with one LoRA for its queries and one for its values, each of rank r, in the precision of its tensors."""

    def __init__(self, inner: torch.nn.Module, a: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.inner, self.scale, rank = inner, scale, len(a) // 2
        width = a.shape[1]
        self.a = torch.nn.ParameterList([a[:rank].clone(), a[rank:].clone()])
        self.b = torch.nn.ParameterList([torch.zeros(width, rank, dtype=a.dtype) for _ in range(2)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, v = (self.scale * (x @ a.T @ b.T) for a, b in zip(self.a, self.b, strict=True))
        return self.inner(x) + torch.cat([q, torch.zeros_like(q), v], dim=-1)  # type: ignore[no-any-return]


def trained_in_float64(made: Recipe) -> dict[str, torch.Tensor]:
    """The adapter that AdamW learns in float64 by two separate products, as PEFT would store it on c_attn."""
    from peftune.data.batches import blocks_of_step

    inputs = read_inputs(made)
    starts = inject(load_model(inputs.base), made.lora, made.run.seed).trainable()
    model: Any = load_model(inputs.base).double().requires_grad_(False)
    rank = made.lora.rank
    scale = made.lora.alpha / (rank**0.5 if made.lora.variant == "rslora" else rank)
    for number, block in enumerate(model.transformer.h):
        a = starts[f"base_model.model.transformer.h.{number}.attn.c_attn.lora_A.default.weight"].detach().double()
        block.attn.c_attn = SeparateLoras(block.attn.c_attn, a, scale)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=made.optim.lr, weight_decay=made.optim.weight_decay)
    loss_model, blocks = LossModel(model), inputs.corpus.train
    for step in range(inputs.total_steps):
        chosen = blocks_of_step(step, len(blocks), made.batch.global_size, made.run.seed)
        batch: Batch
        for batch in blocks.batches(chosen, 8):
            (
                loss_model(batch.ids, batch.positions, batch.targets, batch.segments) / blocks.tokens_of(chosen)
            ).backward()
        torch.nn.utils.clip_grad_norm_(parameters, made.optim.clip or 1e9)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, inputs.total_steps, made.optim)
        optimizer.step()
        optimizer.zero_grad()
    stored: dict[str, torch.Tensor] = {}
    for number, block in enumerate(model.transformer.h):
        layer, name = block.attn.c_attn, f"base_model.model.transformer.h.{number}.attn.c_attn"
        width = layer.b[0].shape[0]
        b = torch.zeros(3 * width, 2 * rank, dtype=torch.float64)
        b[:width, :rank], b[2 * width :, rank:] = layer.b[0].detach(), layer.b[1].detach()
        stored |= {f"{name}.lora_A.weight": torch.cat([p.detach() for p in layer.a]), f"{name}.lora_B.weight": b}
    return stored


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("lora.variant=rslora", "run.fast=false"),
        ("optim.weight_decay=0.1", "optim.clip=0.05", "batch.micro_size=3"),
    ],
    ids=["fast", "rslora-peft", "decay-clip"],
)
def test_it_learns_what_two_separate_loras_learn(recipe: Make, overrides: tuple[str, ...]) -> None:
    made = recipe(QV, *overrides)
    train(made)
    found, wanted = load_file(Path(made.run.out) / "adapter_model.safetensors"), trained_in_float64(made)
    assert found.keys() == wanted.keys()
    off = sum(float((found[n].double() - wanted[n]).square().sum()) for n in found)
    assert (off / sum(float(t.square().sum()) for t in wanted.values())) ** 0.5 < 1e-6
    settings = json.loads((Path(made.run.out) / "adapter_config.json").read_text())
    alpha = 8 * 2**0.5 if settings["use_rslora"] else 16
    assert settings["r"] == 8 and settings["lora_alpha"] == pytest.approx(alpha, rel=1e-12)
    if made.optim.clip == 0.05:  # the clipping had something to do
        events = read_metrics(Path(made.run.out) / "metrics.jsonl")
        assert all(e["grad_norm"] > 0.1 for e in events if e["event"] == "train")


@pytest.mark.parametrize(
    "overrides",
    [("run.checkpointing=true", "run.fast=false", "lora.dropout=0.1"), ("quantize=int8", "optim.weight_decay=0.1"),
     ("run.precision=bf16", "optim.lr_b_ratio=4", "lora.layers=[1]")],
    ids=["recompute", "int8", "bf16"],
)  # fmt: skip
def test_what_belongs_to_no_part_stays_zero(recipe: Make, overrides: tuple[str, ...]) -> None:
    if "quantize=int8" in overrides:
        pytest.importorskip("bitsandbytes")
    made = recipe(QV, *overrides)
    train(made)
    tensors = load_file(Path(made.run.out) / "adapter_model.safetensors")
    bs = [tensor for name, tensor in tensors.items() if "lora_B" in name]
    assert bs and all(not untrained(b).any() and b.any() for b in bs)


def test_what_is_printed_counts_what_is_trained(recipe: Make) -> None:
    made = recipe(QV)
    train(made)
    written = json.loads((Path(made.run.out) / "peftune.json").read_text())
    assert written["trainable_parameters"] == 2 * 2 * (32 * 4 + 4 * 32)  # blocks, parts, A and B
    with torch.device("meta"):
        medium = GPT2LMHeadModel(GPT2Config(n_embd=1024, n_layer=24, n_head=16))
        adapted = inject(medium, LoraSection(rank=4, targets="query-value"), 0)
    masks = zip(adapted.trainable().values(), adapted.masks(), strict=True)
    assert sum(p.numel() - (0 if m is None else int(m.sum())) for p, m in masks) == 393_216  # the paper's 0.35 M


@pytest.mark.parametrize("variant", ["dora", "pissa", "loftq"])
def test_variants_that_take_a_matrix_whole_are_refused(recipe: Make, variant: str) -> None:
    quantize = "int8" if variant == "loftq" else "null"
    with pytest.raises(UserError, match=f"query-value adapts parts of c_attn, {variant} takes it whole"):
        recipe(QV, f"lora.variant={variant}", f"quantize={quantize}")


def test_parts_by_the_names_of_other_models_lead_to_the_right_one(recipe: Make, tiny_base: Path) -> None:
    with pytest.raises(UserError, match=r"'q_proj', which is a part of c_attn; query-value adapts"):
        load_adapted(recipe("lora.targets=[q_proj, v_proj]"), Base(tiny_base), torch.float32, torch.device("cpu"))
    with pytest.raises(UserError, match=r"lora.rank: 33 is more than .* at most 32"):
        load_adapted(recipe(QV, "lora.rank=33"), Base(tiny_base), torch.float32, torch.device("cpu"))
