"""The picture of a fleet's curves: every run is in it, the best can be told, and no run spoils it for the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from recorded_runs import events_of

from peftune.training.export import plots
from peftune.training.export.plots import INK, draw_fleet

Runs = dict[str, list[dict[str, Any]]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn from now on; it is made into a PNG all the same."""
    drawn, png = list[Figure](), plots.png

    def keep(figure: Figure) -> bytes:
        drawn.append(figure)
        return png(figure)

    monkeypatch.setattr(plots, "png", keep)
    return drawn


def fleet(count: int) -> Runs:
    """Runs of different lengths, of which the fourth from last has the lowest loss at its end."""
    runs = {f"rank={n} " + "long " * 12 + f"number {n}": events_of(20 + n % 21, ended=False) for n in range(count)}
    for event in runs[list(runs)[-4:][0]]:
        if event["event"] == "eval":
            event["loss"] -= 1
    return runs


def legends_of(figure: Figure) -> list[list[str]]:
    return [[text.get_text() for text in legend.get_texts()] for legend in figure.legends]


@pytest.mark.parametrize("count", [4, 64])
def test_every_run_has_its_line_and_the_best_is_in_ink(figures: list[Figure], count: int) -> None:
    runs = fleet(count)
    assert draw_fleet(runs).startswith(b"\x89PNG")
    (figure,), best = figures, count - 4
    left, right = figure.axes[:2]
    assert left.get_title(loc="left") == "training loss (smoothed)" and right.get_title(loc="left") == "validation loss"
    for axes in (left, right):
        colours = [line.get_color() for line in axes.lines]
        assert len(set(colours)) == count and colours[best] == INK
    assert [len(line.get_xdata()) for line in left.lines] == [20 + n % 21 for n in range(count)]
    assert list(right.lines[-1].get_ydata()) == [3.5, 3.5]  # the mean of two domains
    *names, (told,) = legends_of(figure)
    assert told.startswith(f"lowest validation loss: rank={best} long") and told.endswith(f"number {best}, 2.5000")
    assert [len(set(each)) for each in names] == ([4] if count == 4 else []) and len(figure.axes) == (2, 3)[count > 4]


def test_losses_that_are_missing_or_run_away_leave_the_picture_to_the_others(figures: list[Figure]) -> None:
    runs = fleet(5)
    names = list(runs)
    runs[names[0]] = events_of()[:1]  # nothing yet
    for event in runs[names[2]]:
        if event["event"] in ("train", "eval") and event["step"] > 15:
            event["loss"] = 1e6
    for event in runs[names[3]]:
        if event["event"] in ("train", "eval") and event["step"] > 15:
            event["loss"] = None
    runs[names[1]] = [*runs[names[1]], {"event": "failed", "step": 20, "text": "gone"}]  # had the lowest loss
    draw_fleet(runs)
    left, right = figures[0].axes
    assert left.get_title(loc="left").endswith("(smoothed), 1 run off the scale") and left.get_ylim()[1] < 5
    assert right.get_ylim()[1] < 5
    assert [len(line.get_xdata()) for line in left.lines] == [0, 21, 22, 15, 24]
    assert all(np.isfinite(line.get_ydata()).all() for line in (*left.lines, *right.lines))
    assert legends_of(figures[0])[-1][0].endswith("number 4, 3.5000")


def test_early_stopping_counts_by_what_it_delivers(figures: list[Figure]) -> None:
    runs = {"a": events_of(), "b": events_of()}
    for event in runs["b"]:
        if event["event"] == "eval":
            event["loss"] += {0: 0.0, 20: -0.5, 40: 3.0}[event["step"]]
    runs["b"][-1]["delivered_step"] = 20
    draw_fleet(runs)
    assert legends_of(figures[0])[-1] == ["lowest validation loss: b, 3.0000"]


def test_of_other_texts_no_run_is_the_best(figures: list[Figure]) -> None:
    runs = {"a": events_of(), "b": events_of()}
    for event in runs["b"]:
        if event["event"] == "eval":
            event["tokens"] += 1
    draw_fleet(runs)
    draw_fleet({name: [e for e in events if e["event"] != "eval"] for name, events in runs.items()})
    assert [legends_of(figure) for figure in figures] == [[["a", "b"]]] * 2
    assert [len(figure.axes) for figure in figures] == [2, 1]
