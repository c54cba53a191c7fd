"""A fleet is timed against the same steps one after another, behind a gate that sees where they differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import fleet
from benchmarks.harness.fleets import LIMIT, FleetSteps, recipes_of
from benchmarks.harness.workers import Contestant


class Turns:
    """A channel of one round."""

    def __init__(self) -> None:
        self.sent: list[dict[str, Any]] = []

    def rounds(self, **settings: Any) -> Iterator[None]:
        self.send(settings=settings)
        yield

    def send(self, **facts: Any) -> None:
        self.sent.append(facts)


@pytest.fixture
def job(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    texts = [f"Day {n} of a long voyage: the sea was calm, and nobody spoke of the day before.\n" * 3 for n in range(9)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    recipe = {
        "base": str(tiny_base), "data": {"train": str(tmp_path / "text.jsonl"), "validation": 0, "block_size": 32},
        "lora": {"rank": 2, "targets": "all"}, "optim": {"lr": 1e-3, "steps": 1000}, "batch": {"global_size": 1},
        "run": {"out": str(tmp_path / "out"), "precision": "fp32", "eval_every": 0, "save_every": 0},
    }  # fmt: skip
    return {"recipe": recipe, "adapters": 3, "overrides": [], "tokens": 1, "forwards": [32, 96]}


def test_a_round_takes_the_same_steps_both_ways_and_tells_the_ratio(job: dict[str, Any]) -> None:
    channel = Turns()
    fleet.steps_worker(job, channel)  # type: ignore[arg-type]
    settings, found = channel.sent
    assert settings["settings"]["adapters"] == 3
    assert found["value"] == pytest.approx(found["together"] / found["alone"]) and found["alone"] > 0
    channel = Turns()
    fleet.sizes_worker(job, channel)  # type: ignore[arg-type]
    assert [*channel.sent[1]["rates"]] == ["32", "96", "one adapter's"]


def test_the_gate_sees_an_adapter_that_learns_otherwise_in_a_fleet(job: dict[str, Any]) -> None:
    steps = FleetSteps(recipes_of(job["recipe"], 3), [])
    assert steps.difference(2) <= LIMIT
    with torch.no_grad():
        for parameter in steps._together[1].adapted.trainable().values():
            parameter.mul_(1.5)
    assert steps.difference(1) > LIMIT


def test_no_fleet_is_timed_behind_a_closed_gate() -> None:
    class Wrong:
        arguments = type(
            "Arguments", (), {"counts": "2", "sizes": "8", "longest": 8, "ours": [], "tokens": 1, "device": "cpu"}
        )

        def recipe(self, *_: object, **__: object) -> dict[str, dict[str, object]]:
            return {"run": {"out": "x"}, "data": {}}

        def interleave(self, judges: list[Contestant], **_: object) -> None:
            judges[0].rounds.append({"value": 2e-5})

    with pytest.raises(SystemExit, match="the gate is closed"):
        fleet._gate(Wrong())  # type: ignore[arg-type]


def test_the_table_says_where_a_fleet_pays_and_where_it_does_not() -> None:
    found = {("fp32", 2): {"128": 1.3, "512": 0.9}, ("bf16", 8): {"128": 1.0}}
    assert fleet.table_of(found, ["128", "512"])[2:] == ["| fp32 | 2 | 1.30 | 0.90 |", "| bf16 | 8 | 1.00 |  |"]
    assert fleet.in_words(found) == (
        "Faster by 5 % or more: 2 × 128 in fp32. About the same: 8 × 128 in bf16. "  # noqa: RUF001
        "Slower than 0.97 times: 2 × 512 in fp32."  # noqa: RUF001
    )
