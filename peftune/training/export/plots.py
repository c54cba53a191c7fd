"""Plots of a run: its loss curve, and perplexities beside it."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from peftune.console import change

INK, PALE = "#1f2933", "#9aa5b1"
COLOURS = ("#0b7285", "#d9480f", "#5f3dc4", "#2b8a3e", "#a61e4d", "#e67700")


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
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(
            *np.array(points, dtype=float).T, "o-", color=colour, markersize=4, linewidth=1.4, label=_cut(domain, 40)
        )
    axes.set_title(_cut(title, 90), loc="left", color=INK, fontweight="bold", fontsize=11)
    over_steps(axes, "loss, nats per token")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)


def over_steps(axes: Axes, unit: str) -> None:
    """Label axes on which something is drawn over the steps of a run."""
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(unit)
    axes.grid(axis="y", color="#e0e4e8", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


def _cut(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def smoothed(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a tenth of the run that trails each step."""
    window = max(1, len(values) // 10)
    sums, ends = np.cumsum(np.concatenate([[0.0], values])), np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    return np.asarray((sums[ends] - sums[starts]) / (ends - starts))
