"""How the cost of a token grows with documents, batch, rank, model, supervised share and adapted layers."""

from __future__ import annotations

import argparse
import statistics
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import corpus
from benchmarks.harness.machine import calibration
from benchmarks.harness.options import DECLARED, Setup, prepared
from benchmarks.harness.report import Result, drawn, number, spread
from benchmarks.harness.shapes import adapted_linears, parse_shape, work_per_token
from benchmarks.harness.workers import Contestant

CURVES = DECLARED["curves"]


def cost_of_a_token(setup: Setup) -> Result:
    """How the cost of a token grows with documents, batch, rank, model, supervised share and adapted layers.

    python -m benchmarks.train curves --json curves.json --chart curves.png [--shape small] [--only rank,batch]

    Each curve changes one thing and leaves the rest: full blocks, one adapter. Its points take turns, the calibration
    among them. The picture shows milliseconds per real token against two lines of 4N + 6TdL + 6a: at the calibrated
    bf16 GEMM peak, which is the limit, and at the share of it that the curve's middle point reaches. Points on the
    second line cost what the formula says; points above it pay for something else.
    """
    a, names = setup.arguments, setup.arguments.only.split(",")
    if unknown := sorted(set(names) - set(CURVES)):
        raise SystemExit(f"--only {', '.join(unknown)}: known are {', '.join(CURVES)}")
    a.work = setup.root
    result = Result("curves", "the cost of a token", setup.settings())
    for name in names:
        result.curves.append(curve(name, a))
        result.notes.append(description(result.curves[-1]))
    if a.chart:
        chart(result.curves, Path(a.chart))
    return result


def curve(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one curve; its points take turns."""
    found = CURVES[name]
    with ExitStack() as stack:
        points: list[tuple[Any, Setup, Contestant]] = []
        for x in found["quick" if arguments.quick else "values"]:
            a = argparse.Namespace(**vars(arguments) | {"supervised": 1.0, "adapted": 1.0, found["argument"]: x})
            a.shape, a.prompted = parse_shape(a.shape) if isinstance(a.shape, str) else a.shape, 1 - a.supervised
            a.first = round((1 - a.adapted) * a.shape.layers)
            setup = stack.enter_context(prepared(a))
            lora = setup.recipe(name)["lora"] | {"layers": list(range(a.first, a.shape.layers))}
            points.append((x, setup, setup.ours(f"{name} {x}", lora=lora)))
        peak = calibration(points[0][1])
        points[0][1].interleave([*(contestant for _, _, contestant in points), peak])
    measured = [_point(x, contestant.values(), setup.arguments) for x, setup, contestant in points]
    return {"name": name, "label": found["label"], "calibration": statistics.median(peak.values()), "points": measured}


def _point(x: Any, rates: list[float], a: argparse.Namespace) -> dict[str, Any]:
    supervised = corpus.supervised_share(a.longest, a.prompted)
    seconds = spread([supervised / rate for rate in rates])  # of supervised tokens
    work = work_per_token(a.shape, a.longest, a.rank, adapted_linears(a.targets), supervised, a.first)
    million = (12 * a.shape.layers * a.shape.width**2 + a.shape.vocabulary * a.shape.width) / 1e6
    return {"x": million if isinstance(x, str) else float(x), "seconds": asdict(seconds), "flop": work.total}


def chart(curves: list[dict[str, Any]], path: Path) -> None:
    """Small panels, one a curve."""
    rows = -(-len(curves) // 3)
    with drawn(path, (11, 3.3 * rows), rows, 3) as axes:
        for axis, found in zip(axes, curves, strict=False):
            _panel(axis, found)
        for axis in axes[len(curves) :]:
            axis.set_visible(False)
        axes[0].legend(frameon=False, fontsize=7)


def _panel(axis: Any, found: dict[str, Any]) -> None:
    points = found["points"]
    xs = [p["x"] for p in points]
    limit = [1e-6 * p["flop"] / found["calibration"] for p in points]  # ms: FLOP / (GFLOP/s)
    low, measured, high = ([1e3 * p["seconds"][key] for p in points] for key in ("low", "median", "high"))
    share = limit[len(points) // 2] / measured[len(points) // 2]
    reached = [value / share for value in limit]
    axis.plot(xs, limit, "--", color="#8a8f98", label="4N + 6TdL + 6a at the GEMM peak")
    axis.plot(xs, reached, "-", color="#2a7f62", label="the same at the middle point's share")
    axis.vlines(xs, low, high, color="#222222")
    axis.plot(xs, measured, "o", color="#222222", markersize=4, label="measured")
    axis.set_xlabel(found["label"], fontsize=8)
    axis.set_ylabel("ms per real token", fontsize=8)
    axis.set_title(f"{found['name']}: {share:.0%} of peak at the middle", fontsize=9)
    axis.set_ylim(bottom=0)
    if max(xs) > max(1, 8 * min(xs)):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value:,.0f}")


def description(found: dict[str, Any]) -> str:
    """A curve as lines of text."""
    lines = [f"{found['name']} ({found['label']}), peak {number(found['calibration'])} GFLOP/s"]
    for p in found["points"]:
        seconds, work = p["seconds"]["median"], 1e-9 * p["flop"]
        share = work / found["calibration"] / seconds
        lines.append(f"  {number(p['x'])}: {1e3 * seconds:.3g} ms a token, {work:.4g} GFLOP, {share:.1%} of peak")
    return "\n".join(lines)
