"""Steps of fixed shapes, as a GPU is given them, on a CPU: they compute what the CPU's own way computes.

Graphs are recorded in software (`recorded_graph`), so what Python knew at the time of recording shows.
"""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from recorded_graph import record
from transformers import GPT2Config, GPT2LMHeadModel

from peftune.model.base import Base
from peftune.model.decode import captured_steps
from peftune.model.decode.batch import DecodeBatch, ModelVariant
from peftune.model.decode.build import ModelSpec, build
from peftune.model.decode.captured_steps import CapturedSteps
from peftune.model.decode.kv_cache import KVCache
from peftune.model.decode.lora_stack import LoraWeights, lora_weights
from peftune.model.decode.token_step import padded_rows

CONFIG = GPT2Config(vocab_size=90, n_positions=192, n_embd=48, n_inner=60, n_layer=2, n_head=4, initializer_range=0.2)
SHAPES = {"attn.c_attn": (48, 144), "attn.c_proj": (48, 48), "mlp.c_fc": (48, 60), "mlp.c_proj": (60, 48)}
ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""Both ways are float32 and sum at most 192 terms, in another order; a neighbour's key or adapter is off by 0.1."""


def adapter(rank: int, *modules: str) -> LoraWeights:
    numbers = torch.Generator().manual_seed(rank)

    def random_factors(module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        width_in, width_out = SHAPES[module]
        return torch.randn(rank, width_in, generator=numbers), torch.randn(width_out, rank, generator=numbers), 0.1

    return lora_weights({(block, module): random_factors(module) for block in range(2) for module in modules})


@dataclass
class Served:
    """A base with a cache of 6 slots, computed twice: as a CPU does it, and by recorded steps of fixed shapes."""

    spec: ModelSpec
    variants: list[ModelVariant]
    steps: CapturedSteps

    def __post_init__(self) -> None:
        self.caches = [self.spec.kv_cache(6) for _ in range(2)]
        self.batches = [DecodeBatch(6, self.caches[0]), DecodeBatch(6, self.caches[1], self.steps)]
        self.texts: dict[int, tuple[ModelVariant, list[int]]] = {}  # by slot
        self.numbers = random.Random(0)

    def join(self, slot: int, variant: ModelVariant, length: int) -> None:
        """A text begins; its prompt is computed but for the last token."""
        ids = [self.numbers.randrange(90) for _ in range(length)]
        self.texts[slot] = variant, ids
        prompt = torch.tensor([ids[:-1]])
        one, other = (batch.prefill([variant], [slot], prompt, 0) for batch in self.batches)
        torch.testing.assert_close(other, one, **ROUNDING)

    def leave(self, slot: int) -> None:
        """A text ends; the last one moves into its slot, as in a running batch."""
        last = max(self.texts)
        for cache in self.caches:
            cache.free(slot, len(self.texts[slot][1]))
            if last != slot:
                cache.move(last, slot, len(self.texts[last][1]))
        self.texts[slot] = self.texts[last]
        del self.texts[last]

    def step(self, *slots: int) -> None:
        """One token of the texts in these slots (of none: of all)."""
        used = list(slots or self.texts)
        variants = [self.texts[slot][0] for slot in used]
        ids, positions = zip(*((self.texts[slot][1][-1], len(self.texts[slot][1]) - 1) for slot in used), strict=True)
        one, other = (batch.decode(variants, used, ids, positions) for batch in self.batches)
        torch.testing.assert_close(other, one, **ROUNDING)
        torch.testing.assert_close(*(b.logits(variants, h) for b, h in zip(self.batches, (other, one), strict=True)))
        for slot in used:
            self.texts[slot][1].append(self.numbers.randrange(90))

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Rows and span of what is recorded, that which was used last at the end."""
        return [(key[1], key[2]) for key in self.steps._steps]  # type: ignore[index]


@pytest.fixture
def served(tmp_path: Path) -> Served:
    """Variants: the base, adapters of ranks 4, 20 and 8 on other modules, and a model with weights of its own."""
    torch.manual_seed(0)
    for name in ("base", "own"):
        GPT2LMHeadModel(CONFIG).save_pretrained(tmp_path / name)
    spec = ModelSpec(Base(tmp_path / "base").config, torch.float32, torch.device("cpu"))
    models = [build(spec, base.weights.tensor, base.weights.tied) for base in map(Base, tmp_path.iterdir())]
    loras = [None, adapter(4, "attn.c_attn"), adapter(20, "attn.c_attn", "mlp.c_proj"), adapter(8, *SHAPES)]
    variants = [*(ModelVariant(models[0], lora) for lora in loras), ModelVariant(models[1], loras[1])]
    return Served(spec, variants, CapturedSteps(record))


def test_texts_that_come_and_go_get_what_the_cpus_own_way_gives_them(served: Served) -> None:
    """Of all adapters, of lengths across spans, in slots that others had, and while other slots do not take part."""
    chance = random.Random(1)
    for number in range(90):
        if len(served.texts) < 6 and chance.random() < 0.4:
            served.join(len(served.texts), chance.choice(served.variants), chance.choice([2, 9, 60, 62, 125, 180]))
        if len(served.texts) > 1 and chance.random() < 0.3:
            served.leave(chance.choice(list(served.texts)))
        for slot in [slot for slot, (_, ids) in served.texts.items() if len(ids) > 190]:
            served.texts[slot][1][50:] = []
        if served.texts:
            some = chance.sample(list(served.texts), chance.randint(1, len(served.texts)))
            served.step(*(sorted(some) if number % 3 else some))
    assert {rows for rows, _ in served.shapes} == {1, 2, 4, 6} and {span for _, span in served.shapes} == {64, 128, 192}


def test_rows_and_spans_are_rounded_up_to_few_sizes(served: Served) -> None:
    assert [padded_rows(rows, 256) for rows in (1, 2, 3, 9, 32, 33, 64, 65, 250)] == [1, 2, 4, 16, 32, 64, 64, 96, 256]
    assert [padded_rows(rows, 6) for rows in (4, 5, 6)] == [4, 6, 6]
    cache = KVCache(GPT2Config(n_positions=1000, n_embd=4, n_layer=1, n_head=1), 1, torch.float32, torch.device("cpu"))
    assert [cache.span(length) for length in (1, 64, 65, 129, 256, 257, 900)] == [64, 64, 128, 256, 256, 512, 1000]
    for slot in range(3):
        served.join(slot, served.variants[0], 60 + slot)
    for _ in range(5):
        served.step()
    assert served.shapes == [(4, 64), (4, 128)]


def test_rows_that_do_not_take_part_keep_their_keys(served: Served) -> None:
    for slot in range(4):
        served.join(slot, served.variants[slot], 20)
    before = [tensor[[0, 2]].clone() for tensor in served.caches[1].keys]
    for _ in range(4):
        served.step(1, 3)
    for tensor, kept in zip(served.caches[1].keys, before, strict=True):
        assert torch.equal(tensor[[0, 2]], kept)
    served.step()


def test_an_adapter_that_fits_needs_no_new_recording_and_a_larger_one_does(served: Served) -> None:
    base, small, large, _, _ = served.variants
    for slot, variant in enumerate((base, small)):
        served.join(slot, variant, 5)
    for other in (small, replace(small, lora=adapter(3, "attn.c_attn")), small):  # one came, one went
        served.texts[1] = other, served.texts[1][1]
        served.step()
    assert len(served.steps) == 1
    served.texts[1] = large, served.texts[1][1]
    served.step()
    served.texts[1] = small, served.texts[1][1]
    served.step()
    assert len(served.steps) == 2


def test_one_adapter_for_all_is_recorded_once_for_all_adapters(served: Served) -> None:
    for variant in (served.variants[2], served.variants[1], served.variants[2]):
        served.texts.clear()
        for slot in range(2):
            served.join(slot, variant, 5)
        served.step()
    assert len(served.steps) == 1


def test_a_recording_keeps_no_model_and_is_not_taken_for_another_models(served: Served) -> None:
    served.steps._record = lambda function: (lambda: None, function())  # software holds tensors, CUDA does not
    served.join(0, served.variants[4], 5)
    served.batches[1].decode([served.variants[4]], [0], [1], [4])
    model = weakref.ref(served.variants[4].model)
    served.texts.clear()
    served.variants.pop()
    gc.collect()
    assert model() is None and len(served.steps) == 1
    served.join(0, served.variants[0], 5)
    served.step()
    assert len(served.steps) == 2


def test_of_too_many_recordings_those_stay_that_were_used_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_steps, "_MOST", 3)
    steps, recorded, x = CapturedSteps(record), list[int](), torch.ones(2)

    def called(number: int) -> Callable[[], torch.Tensor]:
        def function() -> torch.Tensor:
            recorded.append(number)
            return x * number

        return function

    for number in (1, 2, 3, 1, 4, 1, 3, 4):
        assert torch.equal(steps.run(number, called(number)), x * number)
    assert len(steps) == 3 and recorded.count(2) == 3  # warmed up, recorded, compared
    recorded.clear()
    x *= 2  # in place: what lies in the tensors counts
    assert torch.equal(steps.run(1, called(1)), x) and not recorded
    steps.run(2, called(2))
    assert recorded == [2, 2, 2]


def test_a_replay_that_gives_other_numbers_is_found_and_all_goes_on_without(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    def stale(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        output = function()
        return lambda: None, output  # right once

    served.steps._record = stale
    served.join(0, served.variants[0], 5)
    for _ in range(3):
        served.step()
    assert [record.message for record in caplog.records] == [
        "CUDA graphs are off: a replay gives other numbers; each token is launched kernel by kernel"
    ]
    assert len(served.steps) == 0


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), "no memory for one"),
        (RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore"), "CUDA error: operation"),
    ],
)
def test_what_cannot_be_recorded_is_computed_all_the_same(
    served: Served, error: Exception, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def fails(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        asked.append(function)
        raise error

    served.steps._record = fails
    served.join(0, served.variants[1], 5)
    for _ in range(3):
        served.step()
    assert len(asked) == 1 and len(caplog.records) == 1 and reason in caplog.text and "\nmore" not in caplog.text
