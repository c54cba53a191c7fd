"""A text has the same bits alone and in any company, whatever the kernels of this processor do.

What other processors do is put in their place: kernels whose last bits change with the number of rows, with the place
of a row among them, and with the zeros beside its own numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.model.base import Base
from peftune.model.decode import batch_invariance, forward, lora_slots, packed_linear
from peftune.model.decode.batch import DecodeBatch, ModelVariant
from peftune.model.decode.batch_invariance import by_row, rows_as_alone
from peftune.model.decode.build import ModelSpec, build
from peftune.model.decode.kv_cache import runs_of
from peftune.model.decode.lora_stack import LoraWeights, lora_weights

Kernel = Callable[..., torch.Tensor]
CONFIG = GPT2Config(vocab_size=90, n_positions=192, n_embd=48, n_inner=60, n_layer=2, n_head=4, initializer_range=0.2)
PROMPTS = (5, 70, 16, 5, 130, 64)  # tokens
SHAPES = {"attn.c_attn": (48, 144), "mlp.c_proj": (60, 48)}


def rounding_by_company(kernel: Kernel) -> Kernel:
    """The kernel, with errors that follow from the shapes and the place of a row alone."""

    def changed(*tensors: torch.Tensor | None, **settings: object) -> torch.Tensor:
        y = kernel(*tensors, **settings)
        sizes = sum(size for tensor in tensors if tensor is not None for size in tensor.shape)
        error = (1 + (torch.arange(len(y)) * 5 + sizes * 3) % 17) * 2.0**-20
        return y * (1 + error.view(-1, *[1] * (y.dim() - 1)))

    return changed


@pytest.fixture(params=["this processor's kernels", "rounding by company", "rounding by company, nothing packed"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(batch_invariance, "_found", {})
    if request.param != "this processor's kernels":
        for module, name in (
            (packed_linear, "_product"),
            (lora_slots, "_batched"),
            (forward, "_attention"),
            (F, "linear"),
            (F, "gelu"),
            (F, "layer_norm"),
        ):
            monkeypatch.setattr(module, name, rounding_by_company(getattr(module, name)))
    if "nothing packed" in request.param:
        monkeypatch.setattr(packed_linear, "_can_pack", lambda _: False)
    return str(request.param)


def adapter(rank: int, *modules: str) -> LoraWeights:
    random = torch.Generator().manual_seed(rank)
    return lora_weights(
        {
            (block, module): (
                torch.randn(rank, SHAPES[module][0], generator=random),
                torch.randn(SHAPES[module][1], rank, generator=random),
                0.1,
            )
            for block in range(2)
            for module in modules
        }
    )


@pytest.fixture
def variants(tmp_path: Path, kernels: str) -> tuple[ModelSpec, list[ModelVariant]]:
    torch.manual_seed(0)
    GPT2LMHeadModel(CONFIG).save_pretrained(tmp_path)
    base = Base(tmp_path)
    spec = ModelSpec(base.config, torch.float32, torch.device("cpu"))
    model = build(spec, base.weights.tensor, base.weights.tied)
    wide = adapter(20, "attn.c_attn", "mlp.c_proj")
    loras = [adapter(1, "attn.c_attn"), wide, None, adapter(8, "mlp.c_proj"), wide, adapter(3, *SHAPES)]
    return spec, [ModelVariant(model, lora) for lora in loras]


def written(spec: ModelSpec, variants: list[ModelVariant], rows: list[int], slots: list[int]) -> list[torch.Tensor]:
    """Of each of the texts in `rows`: hidden states of its prompt and of three more tokens, and their logits."""
    batch = DecodeBatch(8, spec.kv_cache(8))
    ids = torch.randint(0, 90, (len(PROMPTS), 192), generator=torch.Generator().manual_seed(1))
    found: list[list[torch.Tensor]] = [[] for _ in rows]
    for length in sorted({PROMPTS[row] for row in rows}):
        group = [place for place, row in enumerate(rows) if PROMPTS[row] == length]
        texts = ids[[rows[place] for place in group], :length]
        hidden = batch.prefill([variants[rows[p]] for p in group], [slots[p] for p in group], texts, 0)
        for place, states in zip(group, hidden, strict=True):
            found[place].append(states.flatten())
    used = [variants[row] for row in rows]
    for step in range(3):
        positions = [PROMPTS[row] + step for row in rows]
        hidden = batch.decode(used, slots, ids[rows, positions].tolist(), positions)
        for place, (states, logits) in enumerate(zip(hidden, batch.logits(used, hidden), strict=True)):
            found[place] += [states, logits]
    return [torch.cat(parts) for parts in found]


def test_a_text_is_the_same_to_the_bit_alone_and_in_any_company(
    variants: tuple[ModelSpec, list[ModelVariant]], threads: int
) -> None:
    alone = [written(*variants, [row], [0])[0] for row in range(len(PROMPTS))]
    for rows, slots in (
        ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
        ([5, 3, 0], [2, 3, 7]),
        ([1, 4], [0, 1]),  # of one adapter
        ([2, 5], [6, 1]),
    ):
        for row, got in zip(rows, written(*variants, rows, slots), strict=True):
            assert torch.equal(got, alone[row]), (rows, row)


@pytest.mark.parametrize("kernels", ["rounding by company"], indirect=True)
@pytest.mark.parametrize(
    ("module", "names"),
    [(batch_invariance, ["rows_as_alone"]), (lora_slots, ["rows_as_alone", "holds"]), (forward, ["holds"])],
)
def test_without_being_tried_such_kernels_show(
    variants: tuple[ModelSpec, list[ModelVariant]],
    module: ModuleType,
    names: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alone = [written(*variants, [row], [0])[0] for row in range(len(PROMPTS))]
    for name in names:
        monkeypatch.setattr(module, name, lambda *_, **__: True)
    together = written(*variants, list(range(len(PROMPTS))), list(range(len(PROMPTS))))
    assert not all(map(torch.equal, together, alone))


def test_a_layout_is_tried_once_for_each_number_of_threads(kernels: str, threads: int) -> None:
    sizes: list[int] = []

    def double(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return x * 2

    x = torch.randn(4, 16)
    for _ in range(3):
        assert torch.equal(by_row("double", double, x), x * 2)
    assert sizes == [1, 4, 4, 4, 4]  # tried with one row and with four, then taken
    torch.set_num_threads(threads + 1)
    by_row("double", double, x)
    assert sizes[5:] == [1, 4, 4]


def test_rows_at_other_addresses_than_alone_are_moved(kernels: str) -> None:
    addresses: list[int] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        addresses.append(x.data_ptr() % 64)
        return x + 0

    x = torch.randn(5, 3)
    assert torch.equal(by_row("note", note, x[1:]), x[1:])
    assert addresses == [0, 0, 0, 0]


def test_what_is_tried_is_laid_out_as_what_is_computed(kernels: str) -> None:
    layouts: list[object] = []

    def note(*tensors: torch.Tensor) -> torch.Tensor:
        layouts.append([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
        return tensors[0] + 0

    tensors = torch.randn(3, 4, 32)[:, :2], torch.randn(1, 7).expand(3, 7), torch.randn(3, 5, 2).bfloat16().mT
    assert rows_as_alone("note", note, *tensors)
    assert layouts[1] == [(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors]


def test_runs_are_rows_of_one_length_in_slots_that_follow_each_other() -> None:
    assert runs_of([3], [64]) == [(slice(0, 1), slice(3, 4), 64)]
    assert runs_of([0, 1, 3, 4, 2], [64, 64, 64, 128, 128]) == [
        (slice(0, 2), slice(0, 2), 64),
        (slice(2, 3), slice(3, 4), 64),
        (slice(3, 4), slice(4, 5), 128),
        (slice(4, 5), slice(2, 3), 128),
    ]
