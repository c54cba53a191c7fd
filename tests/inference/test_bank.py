"""One base and many adapters: what a batch of all of them computes is what PEFT and a merge compute for each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from recorded_graph import record
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for
from peftune.adapters.merge.merge import merge
from peftune.errors import UserError
from peftune.inference import running_batch
from peftune.inference.bank import AdapterBank
from peftune.inference.generate import generate_with_transformers
from peftune.inference.settings import GenerationSettings
from peftune.model.base import Base
from peftune.model.decode.batch import DecodeBatch
from peftune.model.decode.captured_steps import CapturedSteps
from peftune.model.load import load_model

GREEDY = GenerationSettings(max_new_tokens=12, temperature=0)
PROMPTS = ("the cat", "", "naïve café", "on the log and the dog", "東京")


@pytest.fixture
def emptied(base_directory: Path) -> Iterator[AdapterBank]:
    yield AdapterBank(str(base_directory), device="cpu")


def test_a_mixed_batch_writes_what_peft_writes_with_each_adapter(
    bank: AdapterBank,
    base_directory: Path,
    adapters: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a CPU does it, and by recorded steps of fixed shapes, as a GPU does."""
    names = [*adapters, None]
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(names))]
    mixed = bank.generate(prompts, GREEDY, names, slots=4)
    steps = CapturedSteps(record)
    monkeypatch.setattr(running_batch, "DecodeBatch", partial(DecodeBatch, steps=steps))
    assert bank.generate(prompts, GREEDY, names, slots=4) == mixed and len(steps) > 5
    for name, prompt, written in zip(names, prompts, mixed, strict=True):
        base = Base(base_directory)
        model = load_model(base) if name is None else load_with_rows(base, *read_for(adapters[name], base))
        (alone,) = generate_with_transformers(model, tokenizer, [prompt], GREEDY)
        assert written == alone, name


def test_a_mixed_batch_writes_what_the_merged_checkpoints_write(
    bank: AdapterBank,
    base_directory: Path,
    adapters: dict[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    names = ["attention", "rslora", "dora", "head"]
    mixed = bank.generate(["the dog"] * 4, GREEDY, names)
    for name, written in zip(names, mixed, strict=True):
        merge(adapters[name], tmp_path / name, base=str(base_directory), texts=["the cat sat on the mat"])
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert generate_with_transformers(merged, tokenizer, ["the dog"], GREEDY)[0] == written, name


def test_logits_of_a_row_are_the_same_to_the_bit_whatever_is_beside_it(bank: AdapterBank) -> None:
    names = [*bank.names, None, "wide", "attention"]
    ids = torch.randint(0, 250, (len(names), 21), generator=torch.Generator().manual_seed(0))
    mixed = bank.logits(ids, names)
    for i, name in enumerate(names):
        assert torch.equal(bank.logits(ids[i : i + 1], name)[0], mixed[i]), name


def test_the_base_is_the_same_to_the_bit_after_adapters_came_and_went(
    emptied: AdapterBank, adapters: dict[str, Path]
) -> None:
    ids = torch.arange(40).view(2, 20)
    before = emptied.logits(ids)
    for name in ("wide", "pissa", "dora"):
        emptied.add(name, adapters[name])
        emptied.use(name)
        assert not torch.equal(emptied.logits(ids), before)
        emptied.use(None)
        assert torch.equal(emptied.logits(ids), before)
        emptied.use(name)
        emptied.remove(name)
        assert torch.equal(emptied.logits(ids), before)
    assert emptied.names == ()


@pytest.mark.parametrize("kind", ["attention", "dora", "head"])
def test_only_what_is_no_low_rank_update_of_the_blocks_gets_weights_of_its_own(bank: AdapterBank, kind: str) -> None:
    assert (bank.get(kind).variant.lora is None) == (kind != "attention")


def test_weights_that_an_adapter_does_not_change_are_shared(bank: AdapterBank) -> None:
    base = bank.variant(None).model
    assert bank.variant("one-block").model is base
    pissa = bank.variant("pissa").model
    assert pissa.wte is base.wte
    assert pissa.head is base.head
    assert pissa.blocks[0] is not base.blocks[0]


def test_an_unknown_name_is_an_error_and_never_the_base(bank: AdapterBank) -> None:
    for call in (bank.get, bank.use, bank.remove, bank.variant):
        with pytest.raises(UserError, match=r"no adapter is called 'poems'; known: attention, .*, base"):
            call("poems")
    with pytest.raises(UserError, match="poems"):
        bank.generate(["the"], GREEDY, "poems")


@pytest.mark.parametrize("name", ["", "base", "auto", "attention"])
def test_a_name_that_means_something_already_is_refused(
    bank: AdapterBank, adapters: dict[str, Path], name: str
) -> None:
    before = bank.names
    with pytest.raises(UserError, match="adapter"):
        bank.add(name, adapters["wide"])
    assert bank.names == before


def test_an_adapter_of_another_base_is_refused(bank: AdapterBank, tmp_path: Path, adapters: dict[str, Path]) -> None:
    directory = tmp_path / "foreign"
    shutil.copytree(adapters["attention"], directory)
    (directory / "peftune.json").write_text(json.dumps({"base": "gpt2", "base_fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="was trained on gpt2"):
        bank.add("foreign", directory)
    assert "foreign" not in bank.names


def test_as_many_adapters_as_prompts_are_expected(bank: AdapterBank) -> None:
    with pytest.raises(UserError, match="2 adapters for 3 prompts"):
        bank.generate(["a", "b", "c"], GREEDY, ["attention", None])


def test_bf16_stays_near_fp32(base_directory: Path, adapters: dict[str, Path], bank: AdapterBank) -> None:
    narrow = AdapterBank(str(base_directory), "bf16", "cpu")
    narrow.add("wide", adapters["wide"])
    ids = torch.randint(0, 250, (1, 30), generator=torch.Generator().manual_seed(1))
    full, rounded = bank.logits(ids, "wide"), narrow.logits(ids, "wide")
    assert float((full - rounded).norm() / full.norm()) < 0.05  # weights of 0.4 each, eight bits each


def test_on_text_gets_the_parts_of_each_text(bank: AdapterBank) -> None:
    parts: dict[int, list[str]] = {0: [], 1: []}
    written = bank.generate(["the", "a"], GREEDY, ["wide", None], lambda i, text: parts[i].append(text))
    assert ["".join(parts[i]) for i in (0, 1)] == [w.text for w in written]
