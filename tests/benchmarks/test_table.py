"""Results become a table between two markers and a chart, misses included with their reason."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import all as everything
from benchmarks import train
from benchmarks.all import BEGIN, END, chart, gains, markdown, rewritten
from benchmarks.harness.report import Result, Row, Spread, number, ratio, spread, targets
from benchmarks.harness.workers import Contestant

MACHINE = {
    "cpu": "A CPU", "cores": 2, "instructions": ["avx2"], "memory_GB": 8.0, "gpu": None, "system": "Linux",
    "python": "3.11", "versions": {"torch": "2.13"},
}  # fmt: skip


def result() -> dict[str, Any]:
    rows = [
        Row("B1", "train", "TRL", Spread(12.0, 11.0, 13.0), 10, "at least"),
        Row("B3", "memory", "PEFT | bf16", Spread(0.4, 0.3, 0.5), 0.2, "at most", reason="activations"),
        Row("B11", "GPU", "TRL", None, 1.5, "at least", reason="no CUDA device"),
    ]
    found = Result("B1", "train", {"shape": "small"}, {"fp32 gradients": "1e-7"}, rows=rows, machine=MACHINE)
    peer = Contestant("trl", "", {}, "tok/s", facts={"settings": {"packing": True}}, rounds=[{"value": 80.0}])
    found.add([peer, Contestant("gone", "", {}, "tok/s", failure="not installed")])
    return found.values()


def test_the_table_tells_met_missed_and_not_run_with_reasons() -> None:
    table = markdown([result()])
    assert "| B1 | train | TRL | 12 (11 to 13) times | at least 10 times | met |" in table
    assert "| B3 | memory | PEFT \\| bf16 | 0.4 (0.3 to 0.5) times | at most 0.2 times | missed: activations |" in table
    assert "not run: no CUDA device" in table
    assert "| trl | 80 (80 to 80) tok/s | packing True |" in table and "not run: not installed" in table
    assert "A CPU, 2 cores" in table and "fp32 gradients 1e-7" in table


def test_the_page_keeps_everything_outside_the_markers_and_is_stable() -> None:
    page = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = rewritten(page, markdown([result()]))
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    assert rewritten(once, markdown([result()])) == once
    with pytest.raises(ValueError, match="no markers for the table"):
        rewritten("nothing here", "table")


def test_the_shipped_page_has_its_markers() -> None:
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "a table" in rewritten(page, "a table")


def test_a_chart_is_drawn_of_what_was_measured(tmp_path: Path) -> None:
    chart([result()], tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_all_writes_page_chart_and_table_from_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture, earlier = (tmp_path / name for name in ("page.md", "chart.svg", "all.json"))
    page.write_text(f"# Title\n{BEGIN}\n{END}\n", encoding="utf-8")
    earlier.write_text(json.dumps([result()]), encoding="utf-8")
    options = ["--from", str(earlier), "--write", str(page), "--chart", str(picture)]
    monkeypatch.setattr(sys, "argv", ["all", *options])
    everything.main()
    assert "at least 10 times | met |" in page.read_text(encoding="utf-8")
    assert "<svg" in picture.read_text(encoding="utf-8")
    assert "B11  GPU against TRL: not run (no CUDA device)" in capsys.readouterr().out


def test_curves_are_drawn_and_told_against_the_formula(tmp_path: Path) -> None:
    points = [
        {"x": x, "seconds": {"median": x / 1e6, "low": x / 2e6, "high": x / 5e5}, "flop": x * 1e5}
        for x in (1.0, 2.0, 16.0)
    ]
    curve = {"name": "rank", "label": "rank", "calibration": 200.0, "points": points}
    assert "  2: 0.002 ms a token, 0.0002 GFLOP, 50.0% of peak" in train.curve_description(curve)
    train.curves_chart([curve, curve], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_more_is_better_in_the_chart_whichever_way_a_row_points() -> None:
    rows = [
        Row("B2", "train medium, full blocks", "PEFT tuned (peft-bf16)", Spread(2, 1, 3), 1.4, "at least"),
        Row("B3", "growth of memory in a step", "peft-bf16", Spread(0.4, 0.2, 0.8), 0.2, "at most"),
    ]
    values = Result("B2", "train", {}, rows=rows, machine=MACHINE).values()
    assert [gain for _, gain in gains([values])] == [Spread(2, 1, 3), Spread(2.5, 1.25, 5)]


def test_every_row_of_the_chart_is_found_among_the_stored_results() -> None:
    stored = json.loads((Path(__file__).parents[2] / "docs" / "performance.json").read_text(encoding="utf-8"))
    drawn = {label for label, _ in gains(stored)}
    assert {entry["label"] for entry in targets()["chart"] if entry["target"] != "B11"} == drawn


def test_the_shipped_page_is_that_of_the_stored_results() -> None:
    docs = Path(__file__).parents[2] / "docs"
    page = (docs / "performance.md").read_text(encoding="utf-8")
    assert rewritten(page, markdown(json.loads((docs / "performance.json").read_text(encoding="utf-8")))) == page


def test_a_ratio_is_that_of_medians_with_the_spread_within_rounds() -> None:
    ours = Contestant("ours", "", {}, "tok/s", rounds=[{"value": v} for v in (10.0, 20.0, 30.0)])
    peer = Contestant("peer", "", {}, "tok/s", rounds=[{"value": v} for v in (5.0, 5.0, 10.0)])
    assert ratio(ours, peer) == Spread(4.0, 2.0, 4.0)
    assert ratio(ours, Contestant("absent", "", {}, "tok/s")) is None
    assert spread([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_numbers_are_short() -> None:
    assert [number(v) for v in (0, 4e-7, 0.2, 4.72, 99.6, 991.3, 12345)] == [
        "0",
        "4e-07",
        "0.2",
        "4.72",
        "99.6",
        "991",
        "12,345",
    ]
