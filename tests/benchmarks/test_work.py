"""The formula counts what PyTorch counts, and documents have the tokens that the figures are divided by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import GPT2LMHeadModel

from benchmarks.harness.corpus import supervised_share, write_documents
from benchmarks.harness.peer_loop import real_tokens
from benchmarks.harness.shapes import PRESETS, Shape, adapted_linears, context_of, parse_shape, work_per_token
from peftune.model.base import BUILTIN, Base
from peftune.model.lora import quiet_peft

SHAPE = Shape(layers=4, width=64, heads=2, vocabulary=500)
TOKENS = 48


def counted(lowest: int, supervised: int, rank: int) -> float:
    """FLOP of one token in a step of PEFT on frozen weights, the head on so many of the tokens."""
    config = SHAPE.config()
    config._attn_implementation = "eager"
    lora = LoraConfig(
        r=rank, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, layers_pattern="h",
        layers_to_transform=list(range(lowest, SHAPE.layers)),
    )  # fmt: skip
    with quiet_peft():
        model = get_peft_model(GPT2LMHeadModel(config), lora).get_base_model()
    ids = torch.randint(0, 500, (1, TOKENS))
    with FlopCounterMode(display=False) as counter:
        hidden = model.transformer(ids, use_cache=False).last_hidden_state[0, :supervised]
        torch.nn.functional.cross_entropy(model.lm_head(hidden), ids[0, :supervised]).backward()
    return counter.get_total_flops() / TOKENS


@pytest.mark.parametrize(("lowest", "supervised", "rank"), [(0, TOKENS, 8), (2, TOKENS, 8), (0, 12, 2)])
def test_the_formula_counts_what_a_step_does(lowest: int, supervised: int, rank: int) -> None:
    work = work_per_token(SHAPE, TOKENS, rank, adapted_linears("all"), supervised / TOKENS, lowest)
    # PEFT's eager attention computes both halves of the square, the formula the half that is looked at.
    expected = work.total + work.attention
    spared = 2 * 3 * SHAPE.width**2 + 2 * rank * SHAPE.width  # nobody asks for the gradient of the lowest input
    assert counted(lowest, supervised, rank) == pytest.approx(expected - spared, rel=1e-6)


def test_the_known_figures_of_the_gpt2_family() -> None:
    shapes = ("small", "medium", "large", "xl")
    found = [
        work_per_token(PRESETS[name], 1024, 1).total - 6 * 4 * PRESETS[name].width * PRESETS[name].layers
        for name in shapes
    ]
    assert [round(flop / 1e9, 3) for flop in found] == [0.551, 1.565, 3.372, 6.692]


def test_shapes_are_presets_or_numbers() -> None:
    assert parse_shape("medium") == PRESETS["medium"]
    assert parse_shape("2,32,4,300") == Shape(2, 32, 4, 300)
    for wrong in ("huge", "2,32", "2,32,5", "0,32,4"):
        with pytest.raises(ValueError, match="expected tiny, small"):
            parse_shape(wrong)


def test_context_weighs_documents_by_their_tokens() -> None:
    assert context_of([10, 10]) == 10
    assert context_of([10, 30]) == 25


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    pieces = (
        "\n".join(f"Line {i}.{j} of the log: naïve café, {i * j} birds." for j in range(i % 17 + 1)) for i in range(400)
    )
    path.write_text("\n\n".join(pieces), encoding="utf-8")
    return path


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_documents_have_the_tokens_that_are_counted_and_the_mean_that_was_asked_for(text: Path, tmp_path: Path) -> None:
    tokenizer = Base(BUILTIN["builtin:small"]).tokenizer
    lengths = write_documents(tmp_path / "d.jsonl", tokenizer, 500, 60, 150, str(text))
    assert lengths == [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows(tmp_path / "d.jsonl")]
    assert sum(lengths) / len(lengths) == pytest.approx(60, rel=0.1)
    assert max(lengths) <= 149 and min(lengths) < 30


def test_documents_of_one_length_with_an_exact_share_of_prompt(text: Path, tmp_path: Path) -> None:
    tokenizer = Base(BUILTIN["builtin:small"]).tokenizer
    lengths = write_documents(tmp_path / "d.jsonl", tokenizer, 20, float("inf"), 64, str(text), prompted=0.5)
    assert set(lengths) == {63}
    completions = [len(tokenizer(row["completion"])["input_ids"]) + 1 for row in rows(tmp_path / "d.jsonl")]
    assert {count / 63 for count in completions} == {supervised_share(64, 0.5)}


def test_only_real_tokens_of_a_batch_count() -> None:
    padded = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    assert real_tokens(padded) == 5
    packed = {  # two documents of 3 and 2 tokens, then two places of padding, each a "document" of one place
        "labels": torch.tensor([[-100, 5, 6, -100, 7, -100, -100]]), "cu_seq_lens_q": torch.tensor([0, 3, 5, 6, 7]),
    }  # fmt: skip
    assert real_tokens(packed) == 5
