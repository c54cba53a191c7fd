"""Rows, intervals and conclusions of a sweep, from results made by hand."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peftune.cli.output.sweep_table import conclusions
from peftune.errors import CheckFailed
from peftune.training.checkpoint import State
from peftune.training.export.adapter import Delivery
from peftune.training.sweep.picture import _axes, _limits, draw_sweep
from peftune.training.sweep.pruning import kept, rungs
from peftune.training.sweep.results import (
    _T,
    Results,
    RunResult,
    mean_and_half_width,
    result_of,
    results_of,
)

FIGURES = {"perplexity": 2.0, "bits_per_byte": 1.0}


def delivered(loss: float) -> RunResult:
    return RunResult("delivered", 40, loss, 2.0, 4.0)


def table(**rates: list[RunResult]) -> Results:
    """Outcomes by seed, of combinations called after their rate."""
    runs: list[Any] = []
    for name, results in rates.items():
        values = {"optim.lr": float(name[2:].replace("_", "-"))}
        runs += [(name, values, seed, result) for seed, result in enumerate(results)]
    return results_of(runs)


def test_intervals_are_those_of_student() -> None:
    for degrees, t in enumerate(_T, 1):
        x = np.linspace(0, t, 20_001)
        scale = math.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * math.gamma(degrees / 2))
        density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        assert 2 * np.trapezoid(density, x) == pytest.approx(0.95, abs=5e-5)
    values = [3.0, 3.2, 3.1]
    mean, half = mean_and_half_width(values)
    assert (mean, half) == (pytest.approx(3.1), pytest.approx(4.303 * 0.1 / math.sqrt(3)))
    assert mean_and_half_width([1.5]) == (1.5, None) and mean_and_half_width([]) == (None, None)
    assert mean_and_half_width([0.0, 1.0] * 50)[1] > 1.96 * statistics.stdev([0.0, 1.0] * 50) / 10  # type: ignore[operator]


def test_rows_are_compared_with_the_best_seed_by_seed() -> None:
    """Seeds differ by far more than the two settings, which differ by the same in each seed."""
    seeds = [3.0, 3.4, 3.1]
    found = table(lr1e_4=[delivered(x + 0.01) for x in seeds], lr2e_4=[delivered(x) for x in seeds])
    best, other = found.rows
    assert (best.name, other.name) == ("lr2e_4", "lr1e_4")
    assert other.against_best == pytest.approx(0.01) and other.against_half_width == pytest.approx(0, abs=1e-9)
    assert other.half_width is not None and other.half_width > 0.3
    assert not other.is_as_good()


def test_a_row_counts_only_the_seeds_that_both_have() -> None:
    lost = RunResult("failed", reason="diverged")
    found = table(lr1e_4=[delivered(3.0), delivered(3.2)], lr2e_4=[delivered(2.0), lost])
    assert [row.name for row in found.rows] == ["lr1e_4", "lr2e_4"], "one of whose seeds failed stands behind"
    assert found.rows[1].against_best == pytest.approx(-1.0) and found.rows[1].failed == {1: "diverged"}


def test_rows_stand_by_what_became_of_them() -> None:
    found = table(
        lr1e_4=[RunResult("not run")], lr2e_4=[RunResult("failed", reason="x")],
        lr3e_4=[RunResult("left out", 10, 2.0, 1.0)], lr4e_4=[delivered(3.1)], lr5e_4=[delivered(3.0)],
    )  # fmt: skip
    assert [row.name for row in found.rows] == ["lr5e_4", "lr4e_4", "lr3e_4", "lr2e_4", "lr1e_4"]
    assert found.best is found.rows[0] and found.before == 4.0
    assert table(lr3e_4=[RunResult("left out", 10, 2.0, 1.0)]).best is None


def test_the_best_at_the_edge_of_an_axis_is_told_with_the_value_beyond() -> None:
    (edge,) = table(lr1e_4=[delivered(3.2)], lr2e_4=[delivered(3.1)], lr4e_4=[delivered(3.0)]).edges()
    assert (edge.key, edge.value, edge.is_largest) == ("optim.lr", 4e-4, True)
    assert edge.beyond == pytest.approx(8e-4)
    assert table(lr1e_4=[delivered(3.2)], lr2e_4=[delivered(3.0)], lr4e_4=[delivered(3.1)]).edges() == []
    for key, values in (("lora.rank", (1, 2)), ("optim.warmup", (0.0, 0.1)), ("lora.dropout", (0.0, 0.1))):
        runs = [(str(v), {key: v}, 0, delivered(3.0 + v)) for v in values]
        assert results_of(runs).edges() == [], f"nothing lies below {key}={values[0]}"
    names = results_of([(v, {"lora.variant": v, "lora.rank": 8}, 0, delivered(3.0)) for v in ("lora", "dora")])
    assert names.edges() == [], "names have no edge, and one value has none"


def told(found: Results, several: bool) -> str:
    return " ".join(conclusions(found, several))


def test_one_seed_is_said_to_tell_no_small_difference() -> None:
    text = told(table(lr1e_4=[delivered(3.01)], lr2e_4=[delivered(3.0)], lr4e_4=[delivered(3.1)]), False)
    assert "One seed each" in text and "lr1e_4 lies that near to the best" in text and "lr4e_4" not in text


def test_with_seeds_the_paired_difference_decides() -> None:
    near = [delivered(3.0), delivered(3.2), delivered(3.1)]
    best = [delivered(3.1), delivered(3.0), delivered(3.05)]
    far = [delivered(3.5), delivered(3.41), delivered(3.44)]
    text = told(table(lr1e_4=near, lr2e_4=best, lr4e_4=far), True)
    assert "lr1e_4 may be as good" in text and "lr4e_4" not in text.partition("largest")[0]
    assert "very wide" in told(table(lr1e_4=near[:2], lr2e_4=best[:2]), True)


def test_what_was_left_out_is_said_to_be_a_risk_and_nothing_delivered_is_said() -> None:
    left = RunResult("left out", 10, 3.5, 1.0)
    assert "1 combination left out" in told(table(lr1e_4=[left], lr2e_4=[delivered(3.0)]), False)
    assert "nothing was delivered" in told(table(lr1e_4=[left]), False)


def test_an_outcome_is_the_mean_over_all_tokens_of_all_domains() -> None:
    def at(loss: float, tokens: int) -> dict[str, int | float]:
        return {"loss": loss, "tokens": tokens, **FIGURES}

    metrics = {
        "a": {"base": at(5.0, 100), "adapter": at(3.0, 100)},
        "b": {"base": at(4.0, 300), "adapter": at(1.0, 300)},
    }
    assert result_of(Delivery(Path("x"), 9, metrics, 3.0)) == RunResult("delivered", 9, 1.5, 3.0, 4.25)
    state = State(step=4, evaluated_step=4, seconds=2.04, figures={"0": {"a": at(5.0, 1)}, "4": {"a": at(2.0, 1)}})
    assert result_of(state) == RunResult("left out", 4, 2.0, 2.0, 5.0)
    assert result_of(CheckFailed("step 3:\nnan")) == RunResult("failed", reason="step 3: nan")


def test_of_a_factor_the_best_share_is_kept_at_each_rung() -> None:
    assert rungs(2) == (0.25, 0.5) and rungs(4) == (1 / 16, 0.25)
    losses: dict[str, list[float | None]] = {name: [loss] for name, loss in zip("abcde", (3, 1, 5, 2, 4), strict=True)}
    assert kept(losses, 2) == ["b", "d", "a"] and kept(losses, 5) == ["b"] and kept({"a": [1.0]}, 2) == ["a"]


def test_a_combination_with_a_failed_seed_stands_behind_and_one_without_any_goes() -> None:
    assert kept({"a": [1.0, None], "b": [5.0, 5.0], "c": [None, None], "d": [6.0, 5.0]}, 2) == ["b", "d"]
    assert kept({"a": [1.0, None], "c": [None, None]}, 2) == ["a"]
    assert kept({"c": [None]}, 2) == []


def grid_of(**axes: list[Any]) -> Results:
    import itertools

    runs: list[Any] = []
    for number, values in enumerate(itertools.product(*axes.values())):
        named = dict(zip((key.replace("_", ".") for key in axes), values, strict=True))
        runs.append((str(values), named, 0, delivered(3.0 + 0.01 * number)))
    return results_of(runs)


def test_the_rate_runs_across_then_the_longer_axes() -> None:
    found = grid_of(
        lora_rank=[1, 2, 4, 8], optim_lr=[1e-4, 2e-4], lora_variant=["lora", "dora"], optim_warmup=[0, 1, 2]
    )
    assert _axes(found) == ("optim.lr", "lora.rank", "optim.warmup", ["lora.variant"])
    assert _axes(grid_of(lora_variant=["lora", "dora", "x"], lora_rank=[4, 8])) == (
        "lora.rank",
        "lora.variant",
        None,
        [],
    )
    assert _axes(grid_of()) == (None, None, None, [])


def test_a_run_that_learnt_nothing_does_not_flatten_the_picture() -> None:
    losses = (3.0, 3.1, 3.2, 3.3, 9.0)
    low, high = _limits(table(**{f"lr{n}e_4": [delivered(loss)] for n, loss in enumerate(losses, 1)}).rows)
    assert 2.8 < low < 3.0 and 3.3 < high < 4.5


@pytest.mark.parametrize(
    "found",
    [
        grid_of(), grid_of(lora_rank=[8]), grid_of(lora_targets=["all", ["c_attn"]], optim_clip=[None, 1.0]),
        grid_of(run_fast=[True, False]), grid_of(optim_lr=[1e-4, 1e-3], lora_rank=list(range(1, 9))),
        grid_of(optim_lr=[1e-4], lora_rank=[1, 2], optim_warmup=[0, 0.1], optim_weight_decay=[0.0, 0.1]),
        table(lr1e_4=[delivered(3.0)], lr2e_4=[RunResult("failed")], lr3e_4=[RunResult("left out", 1, 9.0, 1.0)]),
        table(lr1e_4=[delivered(3.0)], lr2e_4=[RunResult("not run")]),
    ],
)  # fmt: skip
def test_any_axes_make_a_picture_without_a_warning(found: Results) -> None:
    assert draw_sweep(found, "a $name$ of\u4eba").startswith(b"\x89PNG")
