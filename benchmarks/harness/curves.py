"""How the cost of a token grows with documents, batch, rank, model, supervised share and adapted layers."""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import corpus
from benchmarks.harness.machine import calibration
from benchmarks.harness.options import Setup, prepared
from benchmarks.harness.report import Result, number, spread
from benchmarks.harness.shapes import adapted_linears, parse_shape, work_per_token
from benchmarks.harness.workers import Contestant

Change = dict[str, Any]
_SIZES = ["4,256,4", "6,512,8", "12,768,12", "24,1024,16"]
CURVES: dict[str, tuple[str, Callable[[argparse.Namespace, Any], Change], list[Any]]] = {
    "length": ("tokens of a document", lambda a, x: {"longest": x}, [64, 128, 256, 512, 1024]),
    "batch": ("blocks a step", lambda a, x: {"batch": x}, [1, 2, 4, 8, 16]),
    "rank": ("rank", lambda a, x: {"rank": x}, [1, 4, 16, 64, 256]),
    "size": ("million parameters", lambda a, x: {"shape": parse_shape(x)}, _SIZES),
    "supervised": ("share of tokens supervised", lambda a, x: {"prompted": 1 - x}, [0.1, 0.25, 0.5, 0.75, 1.0]),
    "layers": (
        "share of layers adapted (the last ones)", lambda a, x: {"lowest": round((1 - x) * a.shape.layers)},
        [0.25, 0.5, 0.75, 1.0],
    ),
}  # fmt: skip
_QUICK: dict[str, list[Any]] = {
    "length": [48, 96], "batch": [1, 2], "rank": [2, 8], "size": ["2,32,2,4097", "2,64,2,4097"],
    "supervised": [0.5, 1.0], "layers": [0.5, 1.0],
}  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "only": {"default": ",".join(CURVES), "help": f"with commas, of {', '.join(CURVES)}"},
    "chart": {"type": Path, "help": "write a picture (png, svg)"},
}
DEFAULTS = {"rounds": 3, "documents": 80, "block": 1024, "tokens": 2000, "batch": 4, "gate_blocks": 0}


def cost_of_a_token(setup: Setup) -> Result:
    """How the cost of a token grows with documents, batch, rank, model, supervised share and adapted layers.

    python -m benchmarks.train curves --json curves.json --chart curves.png [--shape small] [--only rank,batch]

    Each curve changes one thing and leaves the rest: full blocks, one adapter. Its points take turns, the calibration
    among them. The picture shows milliseconds per real token against two lines of 4N + 6TdL + 6a: at the calibrated
    bf16 GEMM peak, which is the limit, and at the share of it that the curve's middle point reaches. Points on the
    second line cost what the formula says; points above it pay for something else.
    """
    a = setup.arguments
    if unknown := sorted(set(a.only.split(",")) - set(CURVES)):
        raise SystemExit(f"--only {', '.join(unknown)}: known are {', '.join(CURVES)}")
    a.work = setup.root
    result = Result("curves", "the cost of a token", setup.settings())
    for name in a.only.split(","):
        result.curves.append(curve(name, a))
        result.notes.append(description(result.curves[-1]))
    if a.chart:
        chart(result.curves, a.chart)
    return result


def curve(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure one curve; its points take turns."""
    label, change, xs = CURVES[name]
    xs = _QUICK[name] if arguments.quick else xs
    with ExitStack() as stack:
        setups = []
        for x in xs:
            values = {**vars(arguments), "prompted": 0.0, "lowest": 0, **change(arguments, x)}
            setups.append(stack.enter_context(prepared(argparse.Namespace(**values))))
        points = [_contestant(f"{name} {x}", setup) for x, setup in zip(xs, setups, strict=True)]
        peak = calibration(setups[0])
        setups[0].interleave([*points, peak])
        found = [_point(x, c, s) for x, c, s in zip(xs, points, setups, strict=True)]
    best = statistics.median(peak.values())
    return {"name": name, "label": label, "calibration": best, "points": found}


def _contestant(name: str, setup: Setup) -> Contestant:
    a = setup.arguments
    recipe = setup.recipe()["lora"] | {"layers": list(range(a.lowest, a.shape.layers))}
    return setup.ours(name, lora=recipe)


def _point(x: Any, contestant: Contestant, setup: Setup) -> dict[str, Any]:
    a = setup.arguments
    supervised = corpus.supervised_share(a.longest, a.prompted)
    seconds = spread([supervised / value for value in contestant.values()])  # values count supervised tokens
    work = work_per_token(a.shape, a.longest, a.rank, adapted_linears(a.targets), supervised, a.lowest)
    million = (12 * a.shape.layers * a.shape.width**2 + a.shape.vocabulary * a.shape.width) / 1e6
    x = million if isinstance(x, str) else float(x)
    return {"x": x, "seconds": asdict(seconds), "flop": work.total}


def chart(curves: list[dict[str, Any]], path: Path) -> None:
    """Small panels, one a curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = math.ceil(len(curves) / 3)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 3.3 * rows), layout="constrained", squeeze=False)
    for axis, found in zip(axes.flat, curves, strict=False):
        _panel(axis, found)
    for axis in list(axes.flat)[len(curves) :]:
        axis.set_visible(False)
    axes[0][0].legend(frameon=False, fontsize=7)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _panel(axis: Any, found: dict[str, Any]) -> None:
    points = found["points"]
    xs = [p["x"] for p in points]
    limit = [1e-6 * p["flop"] / found["calibration"] for p in points]  # ms: FLOP / (GFLOP/s)
    measured = [1e3 * p["seconds"]["median"] for p in points]
    middle = len(points) // 2
    share = limit[middle] / measured[middle]
    axis.plot(xs, limit, "--", color="#8a8f98", label="4N + 6TdL + 6a at the GEMM peak")
    axis.plot(
        xs, [value / share for value in limit], "-", color="#2a7f62", label="the same at the middle point's share"
    )
    whiskers = [[m - 1e3 * p["seconds"]["low"] for m, p in zip(measured, points, strict=True)],
                [1e3 * p["seconds"]["high"] - m for m, p in zip(measured, points, strict=True)]]  # fmt: skip
    axis.errorbar(xs, measured, yerr=whiskers, fmt="o", color="#222222", capsize=3, markersize=4, label="measured")
    axis.set_xlabel(found["label"], fontsize=8)
    axis.set_ylabel("ms per real token", fontsize=8)
    axis.set_title(f"{found['name']}: {share:.0%} of peak at the middle", fontsize=9)
    axis.set_ylim(bottom=0)
    if max(xs) > max(1, 8 * min(xs)):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1000 else f"{value:,.0f}")
    axis.spines[["top", "right"]].set_visible(False)


def description(found: dict[str, Any]) -> str:
    """A curve as lines of text."""
    lines = [f"{found['name']} ({found['label']}), peak {number(found['calibration'])} GFLOP/s"]
    for p in found["points"]:
        seconds = p["seconds"]["median"]
        share = 1e-9 * p["flop"] / found["calibration"] / seconds
        lines.append(
            f"  {number(p['x'])}: {1e3 * seconds:.3g} ms a token, {p['flop'] / 1e9:.4g} GFLOP, {share:.1%} of peak"
        )
    return "\n".join(lines)
