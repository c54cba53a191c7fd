"""How the cost of a token grows with documents, batch, rank, model, supervised share and adapted layers."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness import corpus
from benchmarks.harness.machine import calibration
from benchmarks.harness.options import Setup, prepared
from benchmarks.harness.report import Result, drawn, number, spread
from benchmarks.harness.shapes import adapted_linears, parse_shape, work_per_token

_SIZES = ["4,256,4", "6,512,8", "12,768,12", "24,1024,16"]
CURVES: dict[str, tuple[str, Callable[[argparse.Namespace, Any], dict[str, Any]], list[Any]]] = {
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
_QUICK: dict[str, list[Any]] = {"length": [48, 96], "size": ["2,32,2,4097", "2,64,2,4097"]}


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
    label, change, xs = CURVES[name]
    xs = _QUICK.get(name, xs[-2:] if isinstance(xs[-1], float) else xs[:2]) if arguments.quick else xs
    with ExitStack() as stack:
        setups, points = [], []
        for x in xs:
            values = {**vars(arguments), "prompted": 0.0, "lowest": 0, **change(arguments, x)}
            setups.append(stack.enter_context(prepared(argparse.Namespace(**values))))
            a = setups[-1].arguments
            lora = setups[-1].recipe(name)["lora"] | {"layers": list(range(a.lowest, a.shape.layers))}
            points.append(setups[-1].ours(f"{name} {x}", lora=lora))
        peak = calibration(setups[0])
        setups[0].interleave([*points, peak])
    found = [_point(x, c.values(), s.arguments) for x, c, s in zip(xs, points, setups, strict=True)]
    return {"name": name, "label": label, "calibration": statistics.median(peak.values()), "points": found}


def _point(x: Any, rates: list[float], a: argparse.Namespace) -> dict[str, Any]:
    supervised = corpus.supervised_share(a.longest, a.prompted)
    seconds = spread([supervised / rate for rate in rates])  # of supervised tokens
    work = work_per_token(a.shape, a.longest, a.rank, adapted_linears(a.targets), supervised, a.lowest)
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
