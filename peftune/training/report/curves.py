"""The course of one or several runs as small SVG pictures, which hold numbers and no names."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from peftune.training.export.plots import Curve, cut_off, look_of, over_steps, smoothed
from peftune.training.metrics import validation_course
from peftune.training.report.recorded import RecordedRun, number

_POINTS, _OF_ALL = 2000, 10_000  # of a curve, and of all curves of a picture
_DOMAINS = 24
_FEW = 6  # runs of which single steps are shown too
_STEPWISE = {
    "lr": ("learning rate", ""),
    "grad_norm": ("gradient norm", ""),
    "tokens_per_second": ("speed", "tokens per second"),
}
_NOISY = ("training loss", "gradient norm", "speed")  # the first is smoothed always, the others of many runs


def draw_curves(runs: Sequence[RecordedRun], domains: Sequence[str]) -> list[tuple[str, bytes]]:
    """(title, SVG) of all that has points: training loss, validation by domain, rate, gradient norm, speed.

    Domains of one run among several are drawn as one curve a run, over all its domains.
    """
    drawn = [("training loss", "nats per token", [_course(run, "train", "loss") for run in runs])]
    shared = [name for name in domains if len(runs) == 1 or sum(name in run.figures for run in runs) > 1]
    if len(shared) < len(domains):
        courses = [np.array([*validation_course(run.of("eval")).items()], dtype=float) for run in runs]
        drawn.append(("validation loss, each on all its text", "nats per token", [_known(each) for each in courses]))
    for domain in shared[:_DOMAINS]:
        curves = [_course(run, "eval", "loss", domain) for run in runs]
        drawn.append((f"validation loss: {domain}", "nats per token", curves))
    for key, (title, unit) in _STEPWISE.items():
        drawn.append((title, unit, [_course(run, "train", key) for run in runs]))
    return [_draw(curves, unit, title) for title, unit, curves in drawn if any(len(x) for x, _ in curves)]


def _course(run: RecordedRun, event: str, key: str, domain: str | None = None) -> Curve:
    events = [e for e in run.of(event) if domain is None or e["domain"] == domain]
    return _known(np.array([(number(e["step"]), number(e.get(key))) for e in events], dtype=float))


def _known(points: np.ndarray) -> Curve:
    x, y = points.reshape(-1, 2).T
    known = np.isfinite(x) & np.isfinite(y)
    return x[known], y[known]


def thinned(curve: Curve, points: int = _POINTS) -> Curve:
    """At most so many points: of each stretch the lowest and the highest, so that no spike is lost."""
    x, y = curve
    if len(x) <= points:
        return curve
    stretches = np.array_split(np.arange(len(x)), points // 2)
    kept = np.unique([part[index] for part in stretches for index in (y[part].argmin(), y[part].argmax())])
    return x[kept], y[kept]


def _draw(curves: Sequence[Curve], unit: str, title: str) -> tuple[str, bytes]:
    few, points = len(curves) <= _FEW, min(_POINTS, max(100, _OF_ALL // len(curves)))
    smooth = title in _NOISY[: 1 if few else None] and any(len(x) > 20 for x, _ in curves)
    # Text stays text, in the reader's own fonts; without a salt the file would differ from call to call.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "peftune", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes, shown = figure.add_subplot(), list[Curve]()
        for index, curve in enumerate(curves):
            (colour, style), (x, y) = look_of(index, len(curves)), thinned(curve, points)
            if smooth and len(curve[0]) > 20:
                if few:  # of many it would be one band
                    axes.plot(x, y, color=colour, linewidth=0.7, alpha=0.3)
                x, y = thinned((curve[0], smoothed(curve[1])), points)
            marker, width = "o" if len(x) <= 20 else "", 1.5 if few else 1.0
            axes.plot(x, y, color=colour, linestyle=style, linewidth=width, marker=marker, markersize=2.3 * width)
            shown.append((x, y))
        title += " (smoothed)" if smooth and not few else ""
        title += cut_off(axes, shown) if "loss" in title and len(curves) > 1 else ""
        over_steps(axes, unit)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return title, buffer.getvalue()
