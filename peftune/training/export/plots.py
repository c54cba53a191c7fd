"""Plots of runs: loss curves, of one or of a fleet, and perplexities beside them."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text

from peftune.console import change, counted, shortened
from peftune.training.metrics import validation_course

INK, PALE = "#1f2933", "#9aa5b1"
COLOURS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#a61e4d", "#e67700")
_MAP, _DARK = "plasma", 0.8  # of the map what is dark enough on white
_NAMED, _POINTS = 2 * len(COLOURS), 1000  # runs in a legend, points of a curve

Curve = tuple[np.ndarray, np.ndarray]
"""Steps, and a finite value at each."""


def draw_loss(events: list[dict[str, Any]], title: str) -> bytes:
    """A PNG of training loss (each step and smoothed) and every evaluation, in nats per token."""
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    loss_axes(figure.add_subplot(), events, title)
    return png(figure)


def draw_overview(runs: dict[str, list[dict[str, Any]]], rows: dict[str, dict[str, dict[str, float]]]) -> bytes:
    """A PNG with the loss curves of several runs (by adapter name) and the perplexity matrix beside them."""
    figure = Figure(figsize=(5.2 + 3.6 * len(runs), 3.9), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(runs) + 1, width_ratios=[*[1.0] * len(runs), 1.35])
    for ax, (name, events) in zip(axes, runs.items(), strict=False):
        loss_axes(ax, events, f"learning {name}")
    matrix_axes(axes[-1], rows)
    return png(figure)


def draw_fleet(runs: Mapping[str, list[dict[str, Any]]]) -> bytes:
    """A PNG with the training loss (smoothed) and the validation loss over all domains of many runs, by name.

    The run with the lowest loss is in ink, where all were measured on the same text. A loss that runs away is cut off.
    """
    training = {name: _smooth_course(events) for name, events in runs.items()}
    validation = {name: _finite(list(validation_course(events).items())) for name, events in runs.items()}
    panels = [("training loss (smoothed)", training)]
    panels += [("validation loss", validation)] * any(len(x) for x, _ in validation.values())
    figure = Figure(figsize=(5.2 * len(panels) + 2.4, 4.4), dpi=150, layout="constrained")
    looks = [look_of(number, len(runs)) for number in range(len(runs))]
    best, few = _best(runs), len(runs) <= _NAMED
    for axes, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for (name, (x, y)), (colour, style) in zip(curves.items(), looks, strict=True):
            marker = "o" if few and len(x) <= 20 else ""
            look: dict[str, Any] = {"color": colour, "linestyle": style, "linewidth": 1.3 if few else 1.0}
            if best is not None and name == best[0]:
                look |= {"color": INK, "linestyle": "-", "linewidth": 2.4, "zorder": 3}
            axes.plot(x, y, marker=marker, markersize=3.5, label=shortened(name, 36), **look)
        axes.set_title(title + cut_off(axes, curves.values()), loc="left", color=INK, fontweight="bold", fontsize=11)
        over_steps(axes, "nats per token")
    handles, labels = axes.get_legend_handles_labels()
    if few:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    else:
        shown = matplotlib.cm.ScalarMappable(cmap=ListedColormap([colour for colour, _ in looks]))
        shown.set_clim(-0.5, len(runs) - 0.5)
        ticks = np.linspace(0, len(runs) - 1, 5).round().astype(int)
        bar = figure.colorbar(shown, ax=figure.axes, ticks=ticks, aspect=40, pad=0.02)
        bar.ax.set_yticklabels([shortened(list(runs)[tick], 36) for tick in ticks], fontsize=8)
        bar.ax.invert_yaxis()
        bar.outline.set_visible(False)
    if best is not None:
        label = f"lowest validation loss: {shortened(best[0], 80)}, {best[1]:.4f}"
        figure.legend([handles[[*runs].index(best[0])]], [label], loc="outside lower left", frameon=False, fontsize=10)
    return png(figure)


def look_of(number: int, count: int) -> tuple[str, str]:
    """Colour and line style of one of so many; along a map where they are many, so that neighbours are alike."""
    if count <= _NAMED:
        return COLOURS[number % len(COLOURS)], "--" if number >= len(COLOURS) else "-"
    return to_hex(matplotlib.colormaps[_MAP](_DARK * number / (count - 1))), "-"


def _smooth_course(events: Sequence[dict[str, Any]]) -> Curve:
    x, y = _finite([(e["step"], e["loss"]) for e in events if e["event"] == "train"])
    kept = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).astype(int))
    return x[kept], smoothed(y)[kept]


def _finite(pairs: Sequence[tuple[float | None, float | None]]) -> Curve:
    points = np.array(pairs, dtype=float).reshape(-1, 2)
    x, y = points[np.isfinite(points).all(axis=1)].T
    return x, y


def _best(runs: Mapping[str, list[dict[str, Any]]]) -> tuple[str, float] | None:
    """Which run delivers the lowest validation loss, or has it so far; None where texts differ."""
    texts = {frozenset((e["domain"], e["tokens"]) for e in events if e["event"] == "eval") for events in runs.values()}
    losses = {}
    for name, events in runs.items():
        if (course := validation_course(events)) and events[-1]["event"] != "failed":
            losses[name] = course.get(events[-1].get("delivered_step", -1), [*course.values()][-1])
    losses = {name: loss for name, loss in losses.items() if np.isfinite(loss)}
    if len(texts - {frozenset()}) != 1 or len(losses) < 2:
        return None
    return min(losses.items(), key=lambda pair: pair[1])


def cut_off(axes: Axes, curves: Iterable[Curve]) -> str:
    """Cut off losses that run away, far above where any run began; what to say of that in the title."""
    known = [y for _, y in curves if len(y)]
    if not known:
        return ""
    began, low = max(np.median(y[: len(y) // 10 + 1]) for y in known), min(y.min() for y in known)
    away = sum(bool(y.max() > 2 * began - low) for y in known)
    if away and began > low:
        axes.set_ylim(low - 0.05 * (began - low), began + 0.35 * (began - low))
        return f", {counted(away, 'run')} off the scale"
    return ""


def matrix_axes(axes: Axes, rows: dict[str, dict[str, dict[str, float]]]) -> None:
    """Perplexities as a grid; the colour of a cell is its ratio to the base on that domain, green where better."""
    domains = list(rows["base"])
    values = np.array([[row[domain]["perplexity"] for domain in domains] for row in rows.values()])
    base = np.array([rows["base"][domain]["perplexity"] for domain in domains])
    ratio = np.log2(values / base)
    axes.imshow(np.clip(ratio, -1.5, 1.5), cmap="RdYlGn_r", vmin=-2.2, vmax=2.2, aspect="auto")
    for (y, x), value in np.ndenumerate(values):
        compared = "" if list(rows)[y] == "base" else f"\n{change(value, base[x])}"
        axes.text(x, y, f"{value:,.1f}{compared}", ha="center", va="center", color=INK, fontsize=10)
    axes.set_xticks(range(len(domains)), domains)
    axes.set_yticks(range(len(rows)), [name if name == "base" else f"adapter {name}" for name in rows])
    axes.tick_params(length=0, labelsize=10)
    axes.spines[:].set_visible(False)
    axes.set_title("held-out perplexity", loc="left", color=INK, fontweight="bold", fontsize=11)


def png(figure: Figure) -> bytes:
    """A finished figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)  # names come from people: a $ is a $
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # drawn as a box
        figure.savefig(buffer, format="png", metadata={"Software": "peftune"})
    return buffer.getvalue()


def loss_axes(axes: Axes, events: list[dict[str, Any]], title: str) -> None:
    """Draw one run's loss curves into `axes`."""
    train = [(e["step"], e["loss"]) for e in events if e["event"] == "train" and e["loss"] is not None]
    if train:
        steps, losses = np.array(train).T
        axes.plot(steps, losses, color=PALE, linewidth=0.8, alpha=0.7)
        axes.plot(steps, smoothed(losses), color=INK, linewidth=1.8, label="training (smoothed)")
    for number, domain in enumerate(dict.fromkeys(e["domain"] for e in events if e["event"] == "eval")):
        points = [(e["step"], e["loss"]) for e in events if e["event"] == "eval" and e["domain"] == domain]
        x, y = np.array(points, dtype=float).T
        look: dict[str, Any] = {"color": COLOURS[number % len(COLOURS)], "markersize": 4, "linewidth": 1.4}
        axes.plot(x, y, "o-", label=shortened(domain, 40), **look)
    axes.set_title(shortened(title, 90), loc="left", color=INK, fontweight="bold", fontsize=11)
    over_steps(axes, "loss, nats per token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def over_steps(axes: Axes, unit: str) -> None:
    """Label axes on which something is drawn over the steps of a run."""
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#e0e4e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the run that trails each step."""
    window = max(1, len(values) // 10)
    sums, ends = np.cumsum(np.concatenate([[0.0], values])), np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
