"""The loss and the update are those of a plain float64 loop, however the step is cut up and laid out."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoTokenizer, GPT2LMHeadModel

from peftune.config.recipe import Recipe
from peftune.model.lora import quiet_peft
from peftune.training.metrics import read_metrics
from peftune.training.run import train

Make = Callable[..., Recipe]


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(out / "metrics.jsonl") if event["event"] == "train"]


def adapter(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter_model.safetensors")


def relative_error(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Of the whole adapter, ‖found - wanted‖ / ‖wanted‖.

    Not matrix by matrix: AdamW's first update is lr·g / (|g| + 1e-8), so a single element whose true gradient is
    about 1e-8 moves by a percent of lr with the rounding of fp32, in any implementation.
    """
    assert found.keys() == wanted.keys()
    flat = [torch.cat([side[n].double().flatten() for n in sorted(wanted)]) for side in (found, wanted)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


@pytest.fixture(scope="module")
def by_hand(tiny_base: Path, corpus: Path) -> Callable[[int, float], tuple[list[float], dict[str, torch.Tensor]]]:
    """Float64, one document at a time, windows of 64 with one token of context: full-batch AdamW steps."""

    def loop(steps: int, lr: float) -> tuple[list[float], dict[str, torch.Tensor]]:
        tokenizer = AutoTokenizer.from_pretrained(tiny_base)
        base = GPT2LMHeadModel.from_pretrained(tiny_base)
        base.config.resid_pdrop = 0.0
        for module in base.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        torch.manual_seed(0)
        targets = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
        config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True)
        with quiet_peft():
            model = get_peft_model(base, config).double().eval()
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.999), weight_decay=0.0)
        end, history = tokenizer.eos_token_id, []
        for _ in range(steps):
            nats, count = torch.zeros((), dtype=torch.float64), 0
            for line in corpus.read_text(encoding="utf-8").splitlines():
                ids = [end, *tokenizer(json.loads(line)["text"])["input_ids"], end]
                for first in range(0, len(ids) - 1, 63):
                    window = torch.tensor(ids[first : first + 64])
                    logits = model(window[None, :-1]).logits[0]
                    nats = nats + F.cross_entropy(logits, window[1:], reduction="sum")
                    count += len(window) - 1
            optimizer.zero_grad()
            (nats / count).backward()
            torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            optimizer.step()
            history.append(float(nats.detach()) / count)
        return history, {n.replace(".default.", "."): p.detach() for n, p in trained.items()}

    return loop


LAYOUTS = [(1, "true"), (4, "true"), (22, "true"), (1, "false"), (4, "false"), (22, "false")]


@pytest.mark.parametrize(("micro", "packing"), LAYOUTS)
def test_a_step_over_everything_equals_a_float64_loop(
    recipe: Make, by_hand: Callable[[int, float], tuple[list[float], dict[str, torch.Tensor]]], micro: int, packing: str
) -> None:
    made = recipe("batch.global_size=1000", f"batch.micro_size={micro}", f"data.packing={packing}")
    train(made)
    wanted_losses, wanted = by_hand(3, 1e-2)
    np.testing.assert_allclose(losses(Path(made.run.out)), wanted_losses, rtol=2e-6)  # fp32 against float64
    assert relative_error(adapter(Path(made.run.out)), wanted) < 1e-5


def test_no_layout_changes_a_run_with_partial_steps(recipe: Make, tmp_path: Path) -> None:
    results = []
    for micro, packing in LAYOUTS[:1] + LAYOUTS[1:5]:
        out = tmp_path / f"{micro}-{packing}"
        train(recipe("batch.global_size=5", f"batch.micro_size={min(micro, 5)}", f"data.packing={packing}",
                     "optim.steps=null", "optim.epochs=2", "optim.lr=1e-3", f"run.out={out}"))  # fmt: skip
        results.append((losses(out), adapter(out)))
    (wanted_losses, wanted), *others = results
    assert len(wanted_losses) % 2 == 0
    for found_losses, found in others:
        np.testing.assert_allclose(found_losses, wanted_losses, rtol=2e-6)
        assert relative_error(found, wanted) < 1e-5


def test_accumulated_micro_batches_cover_each_block_once_an_epoch(recipe: Make) -> None:
    from peftune.data.batches import blocks_of_step, steps_per_epoch

    for blocks, size in [(7, 3), (8, 4), (5, 9), (1, 1)]:
        steps = steps_per_epoch(blocks, size)
        seen = np.concatenate([blocks_of_step(step, blocks, size, seed=1) for step in range(steps, 2 * steps)])
        assert sorted(seen) == list(range(blocks))
    first, second = (blocks_of_step(step, 50, 50, seed=1).tolist() for step in (0, 1))
    assert first != second


def test_validation_loss_does_not_depend_on_the_batch(recipe: Make, tmp_path: Path) -> None:
    found = []
    for micro in (1, 3, 8):
        out = tmp_path / str(micro)
        train(recipe("data.validation=0.3", f"batch.micro_size={micro}", "optim.steps=1", f"run.out={out}"))
        found.append([e["loss"] for e in read_metrics(out / "metrics.jsonl") if e["event"] == "eval"])
    for a, b in pairwise(found):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@given(count=st.integers(1, 40), micro_size=st.integers(1, 9), ranks=st.integers(1, 8))
def test_ranks_take_every_block_once_and_equally_many_micro_batches(count: int, micro_size: int, ranks: int) -> None:
    from peftune.data.batches import share_of

    blocks = np.random.default_rng(0).permutation(count)
    shares = [share_of(blocks, micro_size, rank, ranks) for rank in range(ranks)]
    assert sorted(np.concatenate(shares).tolist()) == list(range(count))
    forwards = [-(-len(share) // micro_size) for share in shares]
    assert max(forwards) == -(-count // (micro_size * ranks)) and max(forwards) - min(forwards) <= 1
    if count >= micro_size * ranks:  # the micro-batches of one process, dealt out
        alone = [blocks[first : first + micro_size].tolist() for first in range(0, count, micro_size)]
        dealt = [
            share[first : first + micro_size].tolist() for share in shares for first in range(0, len(share), micro_size)
        ]
        assert sorted(dealt) == sorted(alone)
