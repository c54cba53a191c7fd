"""The formulas for memory give what one process really holds, and the shipped DeepSpeed files are those they mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from peftune.config.recipe import LoraSection, recipe_from
from peftune.model.base import Base
from peftune.model.load import DTYPES, footprint, load_adapted
from peftune.training.optimizer import Gradient, ReplicatedStrategy, build_adamw
from peftune.training.planning.memory_model import ZeroSettings, bytes_per_rank, shapes_of

ROOT = Path(__file__).parents[2]
SIZES = {"gpt2": (12, 768, 12), "gpt2-xl": (48, 1600, 25)}


def held(base: Path, precision: str, quantize: str | None, lora: dict[str, Any]) -> tuple[dict[str, int], int]:
    """What a process holds after a first step, by its own account; and the frozen weights with their scales."""
    values = {"base": str(base), "quantize": quantize, "data": {"train": "none.txt"}, "lora": lora, "run": {"out": "x"}}
    recipe = recipe_from(values, [])
    adapted = load_adapted(recipe, Base(base), DTYPES[precision], torch.device("cpu"))
    parameters = adapted.trainable()
    gradient = Gradient(list(parameters.values()), [p.shape for p in parameters.values()], torch.device("cpu"))
    engine = ReplicatedStrategy(adapted.model, parameters, build_adamw(parameters, recipe.optim, fused=False), None, 1)
    engine.update(gradient, 1.0, 1e-3)
    measured = engine.memory_bytes(adapted.model) | {"gradient": gradient.flat.nbytes}
    return measured, footprint(adapted.model).held


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4},
        {"rank": 4, "variant": "dora"},
        {"rank": 4, "variant": "pissa"},
        {"rank": 4, "targets": ["c_attn", "wte"], "layers": None},
        {"rank": 4, "modules_to_save": ["ln_f"]},
    ],
    ids=["lora", "dora", "pissa", "embeddings", "saved"],
)
def test_the_formulas_give_what_one_process_holds(tiny_base: Path, precision: str, lora: dict[str, Any]) -> None:
    measured, base = held(tiny_base, precision, None, lora)
    shapes = shapes_of(Base(tiny_base).config, LoraSection(**lora))
    foreseen = bytes_per_rank(shapes, "one", 1, precision)  # type: ignore[arg-type]
    assert base == foreseen.base
    assert measured["parameters"] == foreseen.base + 4 * shapes.adapter
    assert measured["gradient"] == foreseen.gradient
    counters = 4 * len(shapes.trained)  # AdamW counts its steps for each tensor
    assert measured["optimizer_state"] == foreseen.optimizer_state + counters


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_formulas_count_packed_weights_and_their_scales(tiny_base: Path, kind: str, precision: str) -> None:
    pytest.importorskip("bitsandbytes")
    _, base = held(tiny_base, precision, kind, {"rank": 4})
    shapes = shapes_of(Base(tiny_base).config, LoraSection(rank=4))
    assert base == bytes_per_rank(shapes, "one", 1, precision, kind).base  # type: ignore[arg-type]


def test_the_settings_are_those_of_the_shipped_files() -> None:
    ours = ZeroSettings()
    for path in sorted((ROOT / "ds_configs").glob("*.json")):
        zero = json.loads(path.read_text())["zero_optimization"]
        assert zero["reduce_bucket_size"] == ours.reduce_bucket
        if zero["stage"] == 3:
            assert zero["stage3_param_persistence_threshold"] == ours.persistence
            assert zero["stage3_max_live_parameters"] == zero["stage3_max_reuse_distance"] == ours.live


@pytest.mark.parametrize("name", SIZES)
def test_every_way_is_between_one_process_and_its_share(name: str) -> None:
    from transformers import GPT2Config

    layers, width, heads = SIZES[name]
    shapes = shapes_of(GPT2Config(n_layer=layers, n_embd=width, n_head=heads), LoraSection())
    one, zero2 = bytes_per_rank(shapes, "one", 1, "bf16"), bytes_per_rank(shapes, "zero2", 8, "bf16")
    assert bytes_per_rank(shapes, "ddp", 8, "bf16") == one
    assert zero2 == bytes_per_rank(shapes, "zero1", 8, "bf16")
    assert one.held - zero2.held == pytest.approx((8 - 12 / 8) * shapes.adapter, rel=1e-4)
    many = [bytes_per_rank(shapes, "zero3", ranks, "bf16") for ranks in (1, 2, 8, 64)]
    assert [m.base for m in many] == sorted((m.base for m in many), reverse=True)
    assert many[0].base >= one.base and many[2].base < 0.14 * one.base


def test_zero3_gathers_a_small_base_whole_and_a_large_one_in_parts() -> None:
    from transformers import GPT2Config

    for name, most in (("gpt2", 124_318_464), ("gpt2-xl", 200_000_000 + 50257 * 1600)):
        layers, width, heads = SIZES[name]
        shapes = shapes_of(GPT2Config(n_layer=layers, n_embd=width, n_head=heads), LoraSection())
        assert bytes_per_rank(shapes, "zero3", 2, "bf16").gathered == 2 * most


def test_shapes_leave_the_random_numbers_alone(tiny_base: Path) -> None:
    before = torch.get_rng_state()
    shapes_of(Base(tiny_base).config, LoraSection())
    assert torch.equal(before, torch.get_rng_state())
