"""Transformers' Trainer and TRL, given the same windows and the same fresh adapter, learn the same thing.

Their loss divides by the number of labels that are not -100, counted before the shift; with the first label of every
row at -100, which is what our documents have, that is the number of scored tokens, and the trajectories must agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from peftune.config.recipe import Recipe
from peftune.model.base import Base
from peftune.model.load import load_model
from peftune.model.lora import inject, quiet_peft
from peftune.training.metrics import read_metrics
from peftune.training.run import train

Make = Callable[..., Recipe]
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # what the oracles warn about is theirs
STEPS, LR = 4, 1e-2


@pytest.fixture(scope="module")
def windows(tiny_base: Path, corpus: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    end, made = tokenizer.eos_token_id, []
    for line in corpus.read_text(encoding="utf-8").splitlines():
        ids = [end, *tokenizer(json.loads(line)["text"])["input_ids"], end]
        made += [ids[first : first + 64] for first in range(0, len(ids) - 1, 63)]
    return made


def ours(recipe: Make) -> tuple[list[float], dict[str, torch.Tensor]]:
    made = recipe("batch.global_size=1000", f"optim.steps={STEPS}", f"optim.lr={LR}")
    train(made)
    events = read_metrics(Path(made.run.out) / "metrics.jsonl")
    return [e["loss"] for e in events if e["event"] == "train"], load_file(
        Path(made.run.out) / "adapter_model.safetensors"
    )


def settings(folder: Path, rows: int) -> dict[str, Any]:
    return {
        "output_dir": str(folder), "per_device_train_batch_size": rows, "max_steps": STEPS, "learning_rate": LR,
        "lr_scheduler_type": "constant", "max_grad_norm": 1.0, "weight_decay": 0.0, "logging_steps": 1,
        "report_to": [], "use_cpu": True, "bf16": False, "save_strategy": "no", "disable_tqdm": True, "seed": 0,
    }  # fmt: skip


def compare(found: tuple[list[float], dict[str, torch.Tensor]], trainer: Any) -> None:
    theirs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(found[0], theirs, rtol=1e-5)  # theirs is averaged in fp32
    values = {n.replace(".default.", "."): p.detach() for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert found[1].keys() == values.keys()
    flat = [torch.cat([side[name].flatten() for name in sorted(values)]) for side in (found[1], values)]
    assert float((flat[0] - flat[1]).norm() / flat[1].norm()) < 1e-5


def fresh(recipe: Make, tiny_base: Path) -> Any:
    return inject(load_model(Base(tiny_base)), recipe().lora, seed=0).model


def test_trainer_learns_the_same(recipe: Make, tiny_base: Path, windows: list[list[int]], tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        ids, labels, mask = (torch.full((len(rows), width), fill) for fill in (0, -100, 0))
        for y, row in enumerate(rows):
            values = torch.tensor(row["input_ids"])
            ids[y, : len(values)], labels[y, 1 : len(values)], mask[y, : len(values)] = values, values[1:], 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    arguments = TrainingArguments(**settings(tmp_path / "trainer", len(windows)), remove_unused_columns=False)
    with quiet_peft():
        trainer = Trainer(
            fresh(recipe, tiny_base),
            arguments,
            train_dataset=[{"input_ids": w} for w in windows],
            data_collator=collate,
        )
        trainer.train()
    compare(ours(recipe), trainer)


def test_trl_learns_the_same(recipe: Make, tiny_base: Path, windows: list[list[int]], tmp_path: Path) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    rows = Dataset.from_list([{"input_ids": w, "completion_mask": [0] + [1] * (len(w) - 1)} for w in windows])
    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    tokenizer.pad_token = tokenizer.eos_token
    arguments = SFTConfig(
        **settings(tmp_path / "trl", len(windows)), completion_only_loss=True, gradient_checkpointing=False,
        max_length=None, loss_type="nll",
    )  # fmt: skip
    with quiet_peft():
        trainer = SFTTrainer(fresh(recipe, tiny_base), args=arguments, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    compare(ours(recipe), trainer)
