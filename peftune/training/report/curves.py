"""The course of one or several runs as small SVG pictures, which hold numbers and no names."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from peftune.training.export.plots import COLOURS, over_steps, smoothed
from peftune.training.report.recorded import RecordedRun, number

_POINTS = 2000  # of a curve
_DOMAINS = 24
_STYLES = ("-", "--", ":", "-.")
_STEPWISE = {
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("speed", "tokens per second"),
}

Curve = tuple[np.ndarray, np.ndarray]
"""Steps, and a value at each."""


def look_of(number: int) -> tuple[str, str]:
    """Colour and line style of the run of this number."""
    return COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS) % len(_STYLES)]


def draw_curves(runs: Sequence[RecordedRun], domains: Sequence[str]) -> list[tuple[str, bytes]]:
    """(title, SVG) of all that has points: training loss, validation by domain, rate, gradient norm, speed."""
    drawn = [("training loss", "nats per token", [_course(run, "train", "loss") for run in runs])]
    for domain in domains[:_DOMAINS]:
        curves = [_course(run, "eval", "loss", domain) for run in runs]
        drawn.append((f"validation loss: {domain}", "nats per token", curves))
    for key, (title, unit) in _STEPWISE.items():
        drawn.append((title, unit, [_course(run, "train", key) for run in runs]))
    return [(title, _draw(curves, unit, title)) for title, unit, curves in drawn if any(len(x) for x, _ in curves)]


def _course(run: RecordedRun, event: str, key: str, domain: str | None = None) -> Curve:
    events = [e for e in run.of(event) if domain is None or e["domain"] == domain]
    pairs = [(number(e["step"]), number(e.get(key))) for e in events]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def thinned(curve: Curve) -> Curve:
    """At most some 2,000 points: of each stretch the lowest and the highest, so that no spike is lost."""
    x, y = curve
    if len(x) <= _POINTS:
        return curve
    stretches = np.array_split(np.arange(len(x)), _POINTS // 2)
    kept = np.unique([part[index] for part in stretches for index in (y[part].argmin(), y[part].argmax())])
    return x[kept], y[kept]


def _draw(curves: Sequence[Curve], unit: str, title: str) -> bytes:
    # Text stays text, in the reader's own fonts; without a salt the file would differ from call to call.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peftune", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.add_subplot()
        for index, curve in enumerate(curves):
            (colour, style), (x, y) = look_of(index), thinned(curve)
            if title == "training loss" and len(curve[0]) > 20:
                axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                x, y = thinned((curve[0], smoothed(curve[1])))
            marker = "o" if len(x) <= 20 else ""
            axes.plot(x, y, color=colour, linestyle=style, linewidth=1.5, marker=marker, markersize=3.5)
        over_steps(axes, unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return buffer.getvalue()
