"""The picture of a sweep: validation loss over one axis, a line for each value of the next, a panel for a third."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from peftune.training.export.plots import COLOURS, INK, png
from peftune.training.sweep.grid import value_text
from peftune.training.sweep.results import Results, Row, is_number

_RATE = "optim.lr"
_PANELS = 9
_ABOVE = 4.0  # how much higher than the best the median may be, times this, is in the picture
_LOG = 3.0  # ratio of the ends from which an axis of positive numbers is logarithmic
_SHORT = 24  # characters of a value


def draw_sweep(found: Results, title: str) -> bytes:
    """A PNG of the delivered rows; what failed or was left out is marked above or hollow.

    Of more than three axes each point is the best over the others.
    """
    across, lines, panels, others = _axes(found)
    shown = found.axes[panels][:_PANELS] if panels else [None]
    columns = min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    size = (7.2, 4.4) if len(shown) == 1 else (3.6 * columns + 1.2, 3.0 * rows + 0.6)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    limits = _limits(found.rows)
    for number, ax in enumerate(grid.flat):
        if number >= len(shown):
            ax.set_axis_off()
            continue
        here = [row for row in found.rows if not panels or row.values.get(panels) == shown[number]]
        _panel(ax, found, here, across, lines, limits)
        if panels:
            ax.set_title(f"{panels} = {_cut(value_text(shown[number]))}", loc="left", fontsize=9, color=INK)
        if number % columns == 0:
            ax.set_ylabel("validation loss, nats per token", fontsize=9)
        if number >= len(shown) - columns:
            ax.set_xlabel(across or "", fontsize=9)
            ax.tick_params(labelbottom=True)
    more = f"; each point is the best over {', '.join(others)}" if others else ""
    figure.suptitle(f"{_cut(title, 40)}{more}", x=0.01, ha="left", fontsize=11, fontweight="bold", color=INK)
    handles = grid.flat[0].get_legend_handles_labels()[0] if lines else []
    where: dict[str, Any] = {"loc": "outside right upper", "frameon": False, "fontsize": 8}
    figure.legend(handles=[*handles, *_key(found)], title=lines, title_fontsize=9, alignment="left", **where)
    return png(figure)


def _axes(found: Results) -> tuple[str | None, str | None, str | None, list[str]]:
    """Which axis runs across, which one makes lines, which one panels, and which are left."""
    varied = [key for key, values in found.axes.items() if len(values) > 1] or list(found.axes)
    numbers = {key: all(map(is_number, found.axes[key])) for key in varied}
    order = sorted(varied, key=lambda key: (key != _RATE, not numbers[key], -len(found.axes[key])))
    rest = sorted(order[1:], key=lambda key: -len(found.axes[key]))
    across, lines, panels = (*order[:1], *rest, None, None, None)[:3]
    return across, lines, panels, rest[2:]


def _panel(
    ax: Axes, found: Results, rows: Sequence[Row], across: str | None, lines: str | None, limits: tuple[float, float]
) -> None:
    values = found.axes[across] if across else [None]
    numeric = all(map(is_number, values))
    places = {value_text(value): value if numeric else float(at) for at, value in enumerate(values)}
    kinds = found.axes[lines] if lines else [None]
    many, (low, high) = colormaps["viridis"], limits
    for number, kind in enumerate(kinds):
        colour = COLOURS[number] if len(kinds) <= len(COLOURS) else many(number / len(kinds))
        aside = 0.0 if numeric else 0.5 * ((number + 0.5) / len(kinds) - 0.5)  # names have room for points side by side
        points: dict[float, Row] = {}
        for row in rows:  # the best first
            if lines is None or row.values.get(lines) == kind:
                points.setdefault(places[value_text(row.values.get(across))] + aside if across else 0.0, row)
        done = [(x, row, row.loss) for x, row in sorted(points.items()) if row.ending == "delivered" and row.loss]
        ax.errorbar(
            [x for x, *_ in done], [min(loss, high) for *_, loss in done],
            yerr=[row.half_width or 0.0 for _, row, _ in done], color=colour, marker="o", markersize=4.5, capsize=2,
            linewidth=1.6, linestyle="-" if numeric else "none", label=_cut(value_text(kind)),
        )  # fmt: skip
        for x, row in points.items():
            if row.ending == "failed":
                ax.plot(x, high, "x", markersize=7, color=colour, clip_on=False)
            elif row.ending == "left out" and row.loss is not None:
                ax.plot(x, min(row.loss, high), "o", markersize=4.5, markerfacecolor="white", color=colour)
            if row.loss is not None and row.loss > high:
                ax.annotate(
                    f"{row.loss:.2f}", (x, high), xytext=(0, -5), textcoords="offset points", ha="center", va="top",
                    fontsize=7, color=colour,
                )  # fmt: skip
            if row is found.best and row.loss is not None:
                ax.plot(x, row.loss, "o", markersize=11, markerfacecolor="none", color=INK)
    _scale(ax, values, numeric)
    ax.set_ylim(low, high)
    ax.grid(axis="y", color="#e0e4e8", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)


def _key(found: Results) -> list[Line2D]:
    """What the marks mean that are in the picture."""
    endings = {row.ending for row in found.rows}
    alone: dict[str, Any] = {"color": INK, "linestyle": "none"}
    marks = [Line2D([], [], marker="o", markersize=9, markerfacecolor="none", label="best", **alone)]
    if "left out" in endings:
        label = "left out, where it stopped"
        marks.append(Line2D([], [], marker="o", markersize=4.5, markerfacecolor="white", label=label, **alone))
    if "failed" in endings:
        marks.append(Line2D([], [], marker="x", markersize=7, label="failed", **alone))
    return marks


def _scale(ax: Axes, values: Sequence[Any], numeric: bool) -> None:
    """Ticks at the values themselves, on a logarithmic axis where they span a factor of `_LOG`."""
    if numeric and min(values) > 0 and max(values) >= _LOG * min(values):
        ax.set_xscale("log")
    at = list(values) if numeric else list(range(len(values)))
    ax.minorticks_off()
    ax.set_xticks(at, [_cut(value_text(value), 16) if value is not None else "" for value in values], fontsize=8)
    ax.tick_params(axis="y", labelsize=8)
    if max((len(value_text(value)) for value in values), default=0) * len(values) > 45:
        ax.tick_params(axis="x", rotation=35)


def _limits(rows: Sequence[Row]) -> tuple[float, float]:
    """From a little below the best to what shows most rows: one that learnt nothing may not flatten the others."""
    known = [(row.loss, row.half_width or 0.0) for row in rows if row.loss is not None and row.ending != "failed"]
    losses = sorted(loss for loss, _ in known)
    best, middle = losses[0], losses[len(losses) // 2]
    top = min(losses[-1], best + _ABOVE * (middle - best)) if middle > best else losses[-1]
    low = min(loss - half for loss, half in known)
    high = max(loss + half for loss, half in known if loss <= top)
    room = max(0.06 * (high - low), 0.002)
    return low - room, high + room


def _cut(text: str, length: int = _SHORT) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
