"""Training: speed, memory, right gradients and start-up, beside TRL, Trainer and PEFT.

Same base, same documents, same adapter; the figure is real tokens (no padding) per second of whole optimizer steps in
each trainer's own loop. Rows are also against the fastest peer of all that ran, so adding a peer (`--peer`) or tuning
one (`--tune`) can only raise the bar.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.harness import corpus
from benchmarks.harness.options import DECLARED, Setup, fresh, main, prepared
from benchmarks.harness.ours import gate, gradient_contestant
from benchmarks.harness.report import Result, compare, drawn, fastest, number, row, spread
from benchmarks.harness.shapes import Shape, adapted_linears, context_of, parse_shape, target_modules, work_per_token
from benchmarks.harness.workers import Channel, Contestant
from peftune.training.metrics import read_metrics

CURVES = DECLARED["curves"]
_PATIENCE = 600.0  # seconds until a command that reports no step is given up
RAGGED, FULL = "train small, ragged documents", "train medium, full blocks"


def measured(
    setup: Setup, target: str, title: str, ours: list[Contestant], at_once: bool = True
) -> tuple[Result, list[Contestant], Contestant]:
    """Gate, then rounds in turns, the calibration among them; the result, the peers, and the calibration."""
    checked = gate(setup)
    peers, peak = [setup.peer(peer) for peer in setup.arguments.peers], setup.calibration()
    result = setup.measure(target, title, [*ours, *peers, peak], at_once)
    return replace(result, gate=checked), peers, peak


def ours_both_ways(setup: Setup) -> list[Contestant]:
    """peftune as it comes, and with `run.fast=false` where the command leaves that key open."""
    slow = not any(key.startswith("run.fast=") for key in setup.arguments.ours)
    return [setup.ours(), *([setup.ours("peftune run.fast=false", "run.fast=false")] if slow else [])]


def ragged(setup: Setup) -> Result:
    """B1: training GPT-2 small on documents of unequal length, against TRL and Trainer as they come and as tuned.

    python -m benchmarks.train ragged [--data FILE] [--tune trl-tuned:per_device_train_batch_size=4]
    """
    ours, *slow = ours_both_ways(setup)
    result, peers, _ = measured(setup, "B1", RAGGED, [ours, *slow])
    result.rows = [compare("B1 default", RAGGED, ours, p, "TRL, defaults") for p in peers if p.name == "trl-default"]
    if best := fastest(peers):
        tuned = f"best tuning found ({best.name})"
        result.rows.append(compare("B1 tuned", RAGGED, ours, best, tuned))
        result.rows.append(compare("B1 tuned, second goal", f"{RAGGED}, second goal", ours, best, tuned))
    result.rows += [compare("B1", RAGGED, ours, other) for other in slow]
    return result


def full(setup: Setup) -> Result:
    """B2: training GPT-2 medium on full blocks (two of 512 tokens), against PEFT with bf16 weights and no dropout.

    python -m benchmarks.train full [--shape medium] [--batch 2] [--longest 512]

    Documents are all as long as a block, so padding and packing play no part: what remains is the arithmetic. The bare
    loop around PEFT has no trainer's overhead and is the hardest peer.
    """
    ours, *slow = ours_both_ways(setup)
    result, peers, _ = measured(setup, "B2", FULL, [ours, *slow])
    best = fastest(peers)
    result.rows = [compare("B2 tuned", FULL, ours, best, f"PEFT tuned ({best.name})")] if best else []
    result.rows += [compare("B2", FULL, ours, other) for other in slow]
    return result


def memory(setup: Setup) -> Result:
    """B3: how far resident memory grows in a training step, four documents of 512 tokens, against PEFT in bf16.

    python -m benchmarks.train memory [--shape small] [--batch 4]

    Every figure is from a process of its own: the largest resident set from the beginning of the first step to the end
    of a round, less the resident set before the first step (Linux; on CUDA the allocator's figures). What the first
    step alone allocates (the optimizer's state, compiled code) is in it.
    """
    title, everyone = "growth of memory in a step", ours_both_ways(setup)
    result, peers, _ = measured(setup, "B3", title, everyone, at_once=False)
    grown = {c.name: [found["grown"] for found in c.rounds if found["grown"]] for c in (*everyone, *peers)}
    result.notes = [f"{n} grew by {[round(size / 1e6) for size in sizes]} MB" for n, sizes in grown.items() if sizes]
    for peer in peers:
        shares = [a / b for a, b in zip(grown["peftune"], grown[peer.name], strict=False)]
        result.rows.append(row(f"B3 {peer.name}", title, peer.name, shares, reason=peer.failure))
    return result


def peak(setup: Setup) -> Result:
    """B4: the share of the machine's bf16 GEMM peak that a training step reaches at 4N + 6TdL + 6a FLOP per token.

    python -m benchmarks.train peak [--shape small] [--batch 8]

    The peak is the best of several matrix products (those of the model and a square one), measured in the same rounds
    as the step. Work that the formula does not know (recomputed or padded tokens) counts against the share.
    """
    ours = ours_both_ways(setup)
    result, _, limit = measured(setup, "B4", "share of the bf16 GEMM peak", ours)
    a = setup.arguments
    work = work_per_token(a.shape, context_of(setup.lengths), a.rank, adapted_linears(a.targets)).total
    result.settings["GFLOP per token"] = round(work / 1e9, 4)
    shares = {c.name: [100e-9 * v * work / p for v, p in zip(c.values(), limit.values(), strict=True)] for c in ours}
    for i, (name, share) in enumerate(shares.items()):
        result.rows.append(row("B4" if i else "B4 share", f"share of bf16 peak, {name}", "calibrated GEMM", share, "%"))
    goal = "share of bf16 peak, second goal"
    result.rows.append(row("B4 share, second goal", goal, "calibrated GEMM", shares["peftune"], "%"))
    return result


def gpu(setup: Setup) -> Result:
    """B11: training on a CUDA device against TRL tuned for it (bf16, fused AdamW, flash attention, packing).

    python -m benchmarks.train gpu [--shape small] [--tune trl-cuda-flash:per_device_train_batch_size=64]

    Says «not run: no CUDA device» where there is none; with `--quick` all of it runs on a CPU, without a goal. A peer
    whose kernels are not installed is listed with its reason.
    """
    what = "train small on a GPU, ragged documents"
    device, on_gpu = setup.arguments.device, torch.cuda.is_available() and setup.arguments.device == "cuda"
    if not on_gpu and (device == "cuda" or not setup.arguments.quick):
        absent = row("B11 tuned", what, "TRL, tuned", [], reason="no CUDA device")
        return Result("B11", what, {"shape": str(setup.arguments.shape)}, rows=[absent])
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    kind = "H100" if "H100" in name else name  # the goal is for an H100; other devices get a row without one
    key = "B11 tuned" if on_gpu else "B11 CPU"
    ours, *slow = ours_both_ways(setup)
    result, peers, _ = measured(setup, "B11", what, [ours, *slow])
    if best := fastest(peers):
        result.rows = [compare(key, what, ours, best)]
    else:
        reason = "no peer ran: " + ("; ".join(peer.failure or "" for peer in peers) or "none was asked for")
        result.rows = [row(key, what, "TRL, tuned", [], reason=reason)]
    rates = [value / 1000 for value in ours.values()]
    result.rows.append(row(f"B11 {kind}", what, kind, rates, "thousand tok/s"))
    return result


def quantized(setup: Setup) -> Result:
    """B12: training on an int8 or nf4 base against our own bf16: what speed it keeps, what memory the base takes.

    python -m benchmarks.train quantized [--shape medium] [--batch 2]
    """
    bf16 = setup.ours("bf16", "run.precision=bf16")
    packed = [setup.ours(kind, "run.precision=bf16", must_run=False, quantize=kind) for kind in ("int8", "nf4")]
    result, _, _ = measured(setup, "B12", "quantised base, medium", [bf16, *packed])
    for c in packed:
        share = [c.facts["base_bytes"] / bf16.facts["base_bytes"]] if c.rounds else []
        result.rows += [
            compare(f"B12 speed {c.name}", f"speed on a base in {c.name}", c, bf16, "our bf16"),
            row(f"B12 memory {c.name}", f"memory of a base in {c.name}", "our bf16", share, reason=c.failure),
        ]
    return result


def plan(setup: Setup) -> Result:
    """What `peftune plan` foresees of memory against what runs of twelve steps take, each in a process of its own.

    python -m benchmarks.train plan [--grid 4x768:fp32:512:1,12x768:bf16:256:4:recompute]

    A point is layers x width, precision, tokens of a block, blocks of a micro-batch, and `recompute` if it does. Both
    figures are those that `train` prints. The row says how far the worst is off.
    """
    result, worst = Result("plan", "memory foreseen", {"grid": setup.arguments.grid}), 0.0
    for point in setup.arguments.grid.split(","):
        shape, precision, block, blocks, *recompute = point.split(":")
        layers, width = map(int, shape.split("x"))
        base = corpus.base_of_shape(setup.root, Shape(layers, width, width // 64), setup.arguments.tokenizer, 0)
        out = fresh(setup.root / "plan")
        values = {
            "base": str(base), "quantize": precision if precision in ("int8", "nf4") else None, "optim": {"steps": 12},
            "data": {"train": list(corpus.CORPORA), "validation": 0, "block_size": int(block)},
            "batch": {"global_size": int(blocks), "micro_size": int(blocks)},
            "run": {"out": str(out / "run"), "precision": "bf16" if precision in ("int8", "nf4") else precision,
                    "checkpointing": bool(recompute)},
        }  # fmt: skip
        (out / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
        subprocess.run([sys.executable, "-m", "peftune", "train", out / "recipe.yaml"], check=True, capture_output=True)
        events = read_metrics(out / "run" / "metrics.jsonl")
        foreseen = next(event["predicted_peak_bytes"] for event in events if event["event"] == "memory")
        measured = max(event["peak_memory_bytes"] for event in events if event["event"] == "train")
        off = foreseen / measured - 1
        worst = max(worst, abs(off))
        result.notes.append(
            f"{point}: {measured / 1e6:,.0f} MB measured, {foreseen / 1e6:,.0f} MB foreseen, {off:+.1%}"
        )
    result.rows.append(row("plan", "memory foreseen, worst of the grid", "measured", [100 * worst], "%"))
    return result


def compiled(setup: Setup) -> Result:
    """What `run.compile` brings a step: whole steps of peftune, as it comes and compiled, in turns.

    python -m benchmarks.train compiled [--shape small] [--device cuda] [--rounds 5]

    The gate compares the gradients of the compiled steps with PEFT's. Compiling is done before the first round; how
    long it took is among what is printed. Most of a step is matrix products, which no compiler makes faster.
    """
    plain = setup.ours()
    setup.arguments.ours = [*setup.arguments.ours, "run.compile=true"]
    fused = setup.ours("peftune run.compile=true")
    result, _, _ = measured(setup, "compile", "steps with and without run.compile", [plain, fused])
    result.rows = [compare("compile", "a step, compiled", fused, plain, "as it comes")]
    return result


def right_gradients(setup: Setup) -> Result:
    """B5: the gradient of every adapter matrix, packed by peftune, against PEFT document by document in float32.

    python -m benchmarks.train gradients [--shape small] [--gate-blocks 4]

    It is also the gate of the other training targets: they time nothing before it is passed.
    """
    judge = gradient_contestant(setup)
    result = setup.measure("B5", "gradients, packed against document by document", [judge])
    for precision, worst in judge.rounds[0]["worst"].items():
        what = f"gradients in {precision}, worst matrix"
        result.rows.append(row(f"B5 {precision}", what, "PEFT fp32, per document", [worst], "rel."))
    return result


def startup_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round starts the command once; the value is seconds until its first step, or its end where none is due."""
    command, log = " ".join(Path(part).name if part[:1] == "/" else part for part in job["command"]), Path(job["log"])
    for _ in channel.rounds(command=command):
        shutil.rmtree(job["out"], ignore_errors=True)
        start = time.perf_counter()
        with log.open("wb") as output:
            child = subprocess.Popen(job["command"], stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            _wait(child, Path(job["watched"]), job["sign"], log)
            seconds = time.perf_counter() - start
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)  # the group that this process started
                child.wait()
        channel.send(value=seconds)


def _wait(child: subprocess.Popen[bytes], watched: Path, sign: str | None, log: Path) -> None:
    """Until the command has written `sign`; without one, until it ends."""
    until, parent = time.monotonic() + _PATIENCE, os.getppid()
    while time.monotonic() < until and os.getppid() == parent:  # an interrupted benchmark leaves nobody training
        ended = child.poll() is not None  # before reading, so that the last words are read
        if not sign and ended and not child.returncode:
            return
        if sign and watched.is_file() and sign in watched.read_text(encoding="utf-8", errors="replace"):
            return
        if ended:
            lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
            reason = next((line for line in lines if "Error: " in line), " ".join(lines[-1:]))
            raise SystemExit(f"ended with {child.returncode}: {reason[:300]}")
        time.sleep(0.01)
    raise SystemExit(f"no step within {_PATIENCE:.0f} s, or interrupted")


def startup(setup: Setup) -> Result:
    """B13: how soon something happens: `peftune --help`, and the end of the first step of `train` and `trl sft`.

    python -m benchmarks.train startup [--shape small] [--documents 8]

    Both commands learn the same few documents, all of them in one step, with the same adapter on the same base; the
    clock runs from the start of the process until the step is reported (a line in metrics.jsonl, a line with the loss
    on TRL's output). The first start of a command, which fills caches, is a warm-up round.
    """
    a, root = setup.arguments, setup.root
    recipe, data = root / "recipe.yaml", root / "data"
    recipe.write_text(yaml.safe_dump(setup.recipe("peftune", batch={"global_size": a.documents})), encoding="utf-8")
    data.mkdir(exist_ok=True)
    shutil.copy(setup.documents, data / "train.jsonl")
    modules = target_modules(a.targets)  # a single name is a regular expression over full paths on TRL's command line
    modules = [rf".*\.{modules[0]}"] if len(modules) == 1 else modules
    trl = [
        str(Path(sys.executable).with_name("trl")), "sft", "--model_name_or_path", str(setup.base),
        "--dataset_name", str(data), "--output_dir", str(root / "out-trl"), "--use_peft", "--lora_r", str(a.rank),
        "--lora_target_modules", *modules, "--per_device_train_batch_size", str(a.documents),
        *(["--use_cpu", "true"] if a.device == "cpu" else []), *shlex.split(a.trl),
    ]  # fmt: skip
    peftune = [sys.executable, "-m", "peftune"]
    commands: dict[str, tuple[list[str], str, str | None]] = {
        "peftune --help": ([*peftune, "--help"], "log-peftune", None),
        "peftune train, first step": (
            [*peftune, "train", str(recipe), *a.ours], "out-peftune/metrics.jsonl", '"event": "train"',
        ),
        "trl sft, first step": (trl, "log-trl", "'loss'"),
    }  # fmt: skip
    everyone = []
    for name, (command, watched, sign) in commands.items():
        whose = name.split()[0]
        job = {"command": command, "watched": str(root / watched), "sign": sign}
        job |= {"log": str(root / f"log-{whose}"), "out": str(root / f"out-{whose}")}
        everyone.append(Contestant(name, "benchmarks.train:startup_worker", job, "s", must_run=whose == "peftune"))
    result = setup.measure("B13", "start-up", everyone)
    help_, ours, theirs = everyone
    result.rows = [
        row("B13 help", "peftune --help", "the clock", help_.values(), "s"),
        compare("B13 train", "first step of train", ours, theirs, "trl sft"),
    ]
    return result


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
        result.notes.append(curve_description(result.curves[-1]))
    if a.chart:
        curves_chart(result.curves, Path(a.chart))
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
        peak = points[0][1].calibration()
        points[0][1].interleave([*(contestant for _, _, contestant in points), peak])
    measured = [_point(x, contestant.values(), setup.arguments) for x, setup, contestant in points]
    return {"name": name, "label": found["label"], "calibration": statistics.median(peak.values()), "points": measured}


def _point(x: Any, rates: list[float], a: argparse.Namespace) -> dict[str, Any]:
    supervised = corpus.supervised_share(a.longest, a.prompted)
    seconds = spread([supervised / rate for rate in rates])  # of supervised tokens
    work = work_per_token(a.shape, a.longest, a.rank, adapted_linears(a.targets), supervised, a.first)
    million = (12 * a.shape.layers * a.shape.width**2 + a.shape.vocabulary * a.shape.width) / 1e6
    return {"x": million if isinstance(x, str) else float(x), "seconds": asdict(seconds), "flop": work.total}


def curves_chart(curves: list[dict[str, Any]], path: Path) -> None:
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


def curve_description(found: dict[str, Any]) -> str:
    """A curve as lines of text."""
    lines = [f"{found['name']} ({found['label']}), peak {number(found['calibration'])} GFLOP/s"]
    for p in found["points"]:
        seconds, work = p["seconds"]["median"], 1e-9 * p["flop"]
        share = work / found["calibration"] / seconds
        lines.append(f"  {number(p['x'])}: {1e3 * seconds:.3g} ms a token, {work:.4g} GFLOP, {share:.1%} of peak")
    return "\n".join(lines)


BENCHMARKS = {
    "ragged": ragged, "full": full, "memory": memory, "peak": peak, "gradients": right_gradients, "gpu": gpu,
    "quantized": quantized, "compiled": compiled, "plan": plan, "startup": startup, "curves": cost_of_a_token,
}  # fmt: skip

if __name__ == "__main__":
    main("train", BENCHMARKS)
