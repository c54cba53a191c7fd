"""One process, DDP and ZeRO 1-3 on two ranks learn the same adapter, and each goes on from any other's checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from peftune.config.recipe import LoraSection, recipe_from
from peftune.data.batches import blocks_of_step
from peftune.model.base import Base
from peftune.training.checkpoint import read
from peftune.training.inputs import read_inputs
from peftune.training.metrics import read_metrics
from peftune.training.planning.memory_model import ZeroSettings, bytes_per_rank, shapes_of

ROOT = Path(__file__).parents[2]
WAYS = ("one", "ddp", "zero1", "zero2", "zero3")
CUT = 5  # the checkpoint from which every way goes on
Make = Callable[..., dict[str, Any]]
Distance = Callable[[Path, Path], float]
SPECIAL: dict[str, dict[str, Any]] = {
    # LoRA+ and weight decay make several groups of parameters; padded rows; activations made anew; some of the blocks
    "groups": {"optim": {"lr": 1e-3, "lr_b_ratio": 8.0, "weight_decay": 0.1}, "data": {"packing": False}},
    "parts": {"lora": {"layers": [1], "variant": "rslora"}, "run": {"checkpointing": True}, "optim": {"clip": None}},
    # queries and values alone, some elements of B untrained; then on from the one that one process made
    "queries": {"lora": {"targets": "query-value"}, "optim": {"weight_decay": 0.1}},
    "continued": {"run": {"init": "one-queries", "init_optimizer": True}, "optim": {"lr": 1e-3}},
}
NOT_SHARDED: dict[str, dict[str, Any]] = {
    "int8": {"quantize": "int8"},
    "nf4": {"quantize": "nf4"},
    "rows": {"data": {"new_tokens": ["on a", "<|name|>"]}},
}


@pytest.fixture(scope="module")
def trained(values: Make, group: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`WAY/` trained through in each way, and `WAY-from-OTHER/` resumed in it from step CUT of the other's run.

    The ranks of each way train both lists; what each run takes from the recipe or a checkpoint is set anew.
    """
    folder = tmp_path_factory.mktemp("grid")
    groups = {}
    for way in WAYS:
        (folder / f"census-{way}").mkdir()
        special = [values(folder / f"{way}-{name}", **sections) for name, sections in SPECIAL.items()]
        special[-1]["run"]["init"] = str(folder / "one-queries")
        names = NOT_SHARDED if way != "zero3" else {}
        whole = [values(folder / f"{way}-{name}", **sections) for name, sections in names.items()]
        jobs: list[Any] = [*special, *whole, values(folder / way)]
        groups[way] = group(way, lists=2, PEFTUNE_CENSUS=str(folder / f"census-{way}"))
        if way in TOGETHER:
            jobs.append([values(folder / f"{way}-fleet-{name}", **sections) for name, sections in MEMBERS.items()])
        groups[way].train(jobs)
    for way in WAYS:
        for other in WAYS:
            cut_after_checkpoint(folder / other, folder / f"{way}-from-{other}")
        again: list[Any] = [values(folder / f"{way}-from-{other}") for other in WAYS]
        for other in TOGETHER if way in TOGETHER else ():
            for name in MEMBERS:
                cut_after_checkpoint(folder / f"{other}-fleet-{name}", folder / f"{way}-fleet-from-{other}-{name}")
            again.append([values(folder / f"{way}-fleet-from-{other}-{n}", **MEMBERS[n]) for n in MEMBERS])
        groups[way].train(again)
    return folder


TOGETHER = ("one", "ddp")  # ways in which adapters learn side by side
MEMBERS: dict[str, dict[str, Any]] = {"plain": {}, "groups": SPECIAL["groups"], "queries": SPECIAL["queries"]}


def cut_after_checkpoint(run: Path, out: Path) -> None:
    """What a run would have left had it been killed after the checkpoint of step CUT."""
    shutil.copytree(run / "checkpoints" / f"step-{CUT}", out / "checkpoints" / f"step-{CUT}")
    shutil.copy(run / "metrics.jsonl", out)


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in read_metrics(folder / "metrics.jsonl") if event["event"] == kind]


@pytest.mark.slow
def test_the_corpus_has_what_would_show_a_wrong_division(values: Make, tmp_path: Path) -> None:
    made = recipe_from(values(tmp_path), [])
    train = read_inputs(made).corpus.train
    steps = [blocks_of_step(step, len(train), 11, 0) for step in range(-(-len(train) // 11))]
    assert len(steps[-1]) == 1, "the last step of an epoch leaves the second rank without a block"
    assert len(steps) == 3, "the checkpoint lies within the second epoch"
    scored = [[train.tokens_of([block]) for block in blocks] for blocks in steps]
    assert any(sum(step[0::2]) != sum(step[1::2]) for step in scored), "unequal tokens on the ranks"


def limit(*ways: str) -> float:
    """Of the distance to one process; ZeRO-3 goes by Transformers' and PEFT's steps, the others by fast ones."""
    return 1e-5 if "zero3" in ways else 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:])
def test_two_ranks_give_the_same_adapter_as_one_process(trained: Path, way: str, distance: Distance) -> None:
    """fp32 sums of the same numbers in another order: 2e-8 in a step's loss, 1e-6 in the whole adapter."""
    assert distance(trained / "one", trained / way) <= limit(way)
    one, many = events(trained / "one", "train"), events(trained / way, "train")
    np.testing.assert_allclose([e["loss"] for e in many], [e["loss"] for e in one], rtol=1e-6)
    np.testing.assert_allclose([e["grad_norm"] for e in many], [e["grad_norm"] for e in one], rtol=1e-5)
    assert [e["tokens"] for e in many] == [e["tokens"] for e in one]
    assert any(e["grad_norm"] > 0.5 for e in one), "the clipping had nothing to do"


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("way", WAYS[1:])
def test_what_else_a_recipe_asks_for_is_the_same_on_two_ranks(
    trained: Path, way: str, name: str, distance: Distance
) -> None:
    assert distance(trained / f"one-{name}", trained / f"{way}-{name}") <= limit(way)
    tensors = load_file(trained / f"{way}-{name}" / "adapter_model.safetensors")
    if name in ("queries", "continued"):
        bs = [b for key, b in tensors.items() if "lora_B" in key]
        assert len(bs) == 2 and not any(b[:32, 4:].any() or b[32:64].any() or b[64:, :4].any() for b in bs)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero1", "zero2"])
def test_rows_of_new_tokens_are_the_same_on_two_ranks(trained: Path, way: str, distance: Distance) -> None:
    assert distance(trained / "one-rows", trained / f"{way}-rows") <= limit(way)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("way", ["ddp", "zero1", "zero2"])
def test_a_quantised_base_gives_the_same_adapter_on_two_ranks(
    trained: Path, way: str, kind: str, distance: Distance
) -> None:
    """1e-5: one element of the nf4 run has a gradient next to AdamW's epsilon and moves by 1e-5 with the rounding."""
    assert distance(trained / f"one-{kind}", trained / f"{way}-{kind}") <= 1e-5
    assert distance(trained / "one", trained / f"one-{kind}") > 1e-3, "the base was not quantised"


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS[1:])
def test_evaluation_over_ranks_counts_every_token_once(trained: Path, way: str) -> None:
    one, many = events(trained / "one", "eval"), events(trained / way, "eval")
    assert [e["tokens"] for e in many] == [e["tokens"] for e in one]
    np.testing.assert_allclose([e["loss"] for e in many], [e["loss"] for e in one], rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "other"), list(product(WAYS, WAYS)))
def test_any_checkpoint_goes_on_in_any_way(trained: Path, way: str, other: str, distance: Distance) -> None:
    resumed = trained / f"{way}-from-{other}"
    assert events(resumed, "resume")[0]["from_step"] == CUT
    assert [e["step"] for e in events(resumed, "train")] == [e["step"] for e in events(trained / "one", "train")]
    assert distance(trained / "one", resumed) <= limit(way, other)
    if way == other:
        assert distance(trained / way, resumed) == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("way", TOGETHER)
def test_side_by_side_each_adapter_is_the_one_of_its_own_process(
    trained: Path, way: str, name: str, distance: Distance
) -> None:
    solo = trained / ("one" if name == "plain" else f"one-{name}")
    for folder in (f"{way}-fleet-{name}", *(f"{way}-fleet-from-{other}-{name}" for other in TOGETHER)):
        assert distance(solo, trained / folder) <= limit(way), folder
        losses, alone = ([e["loss"] for e in events(path, "train")] for path in (trained / folder, solo))
        np.testing.assert_allclose(losses, alone, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_checkpoint_is_small_and_holds_only_the_adapter(trained: Path, way: str) -> None:
    path = trained / way / "checkpoints" / f"step-{CUT}"
    trainable = sum(value.numel() * 4 for value in read(path).values.values())
    assert sum(file.stat().st_size for file in path.iterdir()) < 4 * trainable + 1_000_000
    assert all(".lora_" in name for name in read(path).values)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["zero1", "zero2", "zero3"])
def test_each_rank_holds_its_own_half_of_the_optimizer_state(trained: Path, way: str) -> None:
    ranks = [torch.load(trained / f"census-{way}" / f"rank-{rank}.pt") for rank in (0, 1)]
    values, moments = ranks[0]["whole"]
    elements = sum(value.numel() for value in values.values())
    whole = torch.cat([moment.flatten() for name, moment in moments.items() if name.endswith("/exp_avg")]).sort().values
    parts = [torch.cat(rank["moments"]) for rank in ranks]
    assert all(elements / 2 <= part.numel() <= elements / 2 + 16 for part in parts)
    together = torch.cat(parts)
    nonzero = together[together != 0].sort().values
    torch.testing.assert_close(nonzero, whole[whole != 0], rtol=0, atol=0)  # alignment pads parts with zeros


@pytest.fixture(scope="module")
def shared_out(values: Make, run_jobs: Callable[..., None], trained: Path) -> Path:
    """ZeRO-3 that keeps no matrix whole, however small; the shipped file keeps those below 100,000 elements."""
    folder = trained / "census-all-shared"
    folder.mkdir()
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (folder / "zero3.json").write_text(json.dumps(zero3))
    settings = (ROOT / "accelerate_configs" / "cpu-2-zero3.yaml").read_text()
    config = folder / "all-shared.yaml"
    config.write_text(settings.replace("ds_configs/zero3.json", str(folder / "zero3.json")))
    run_jobs(config, [values(trained / "all-shared")], PEFTUNE_CENSUS=str(folder))
    return folder


@pytest.mark.slow
def test_zero3_shares_out_the_weights_of_the_base(trained: Path, shared_out: Path, distance: Distance) -> None:
    ranks = [torch.load(shared_out / f"rank-{rank}.pt") for rank in (0, 1)]
    whole = torch.load(trained / "census-one" / "rank-0.pt")
    for number, full in enumerate(whole["parameters"]):
        parts = torch.cat([rank["parameters"][number] for rank in ranks])
        assert parts.numel() - full.numel() in (0, 1)
        torch.testing.assert_close(parts[: full.numel()], full, rtol=1e-4, atol=1e-5)
    assert all(rank["live_elements"] == 0 for rank in ranks), "weights were left whole between two forwards"
    assert distance(trained / "one", trained / "all-shared") <= limit("zero3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "parameters", "optimizer"),
    [("ddp", 1.0, 1.0), ("zero1", 1.0, 0.75), ("zero2", 1.0, 0.75), ("all-shared", 0.5, 0.75)],
)
def test_the_metrics_tell_what_each_rank_holds(
    trained: Path, shared_out: Path, way: str, parameters: float, optimizer: float
) -> None:
    """ZeRO keeps a master copy beside both moments: three halves where one process has two wholes."""
    alone = events(trained / "one", "memory")[0]["bytes_per_rank"][0]
    many = events(trained / way, "memory")[0]["bytes_per_rank"]
    assert len(many) == 2
    for held in many:
        np.testing.assert_allclose(held["parameters"], parameters * alone["parameters"], rtol=0.02)
        np.testing.assert_allclose(held["optimizer_state"], optimizer * alone["optimizer_state"], rtol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "zero1", "zero2", "zero3", "all-shared"])
def test_the_formulas_foresee_what_each_rank_holds(trained: Path, shared_out: Path, tiny_base: Path, way: str) -> None:
    """Parts are rounded up to equal lengths, AdamW counts its steps for each tensor: a few bytes a parameter."""
    shapes = shapes_of(Base(tiny_base).config, LoraSection(rank=4))
    zero = ZeroSettings(persistence=0) if way == "all-shared" else ZeroSettings()
    foreseen = bytes_per_rank(shapes, "zero3" if way == "all-shared" else way, 2, "fp32", zero=zero)  # type: ignore[arg-type]
    slack = 16 * (len(shapes.trained) + len(shapes.frozen()))
    for held in events(trained / way, "memory")[0]["bytes_per_rank"]:
        assert held["parameters"] == pytest.approx(foreseen.base + foreseen.adapter, abs=slack)
        assert held["optimizer_state"] == pytest.approx(foreseen.optimizer_state, abs=slack)
        assert held["gradient"] == foreseen.gradient
