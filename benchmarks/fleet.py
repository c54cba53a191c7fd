"""Many adapters in one run against the same runs one after another: speed, memory, and tokens that a forward shares.

Figures of a CPU are per second of its time, not per second of the clock, so that a neighbour on the machine takes
nothing away from either side; both sides take turns. On a GPU they are per second of the clock.
"""

from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness.fleets import LIMIT, FleetSteps, read, recipes_of
from benchmarks.harness.memory import process_memory
from benchmarks.harness.options import Setup, fresh, main
from benchmarks.harness.report import Result, number, row, table_row
from benchmarks.harness.workers import ROOT, Channel, Contestant
from peftune.training.fleet.train_fleet import train_fleet
from peftune.training.metrics import read_metrics
from peftune.training.planning import trace
from peftune.training.run import train

_PAYS, _SLOWER = 1.05, 0.97


def speed(setup: Setup) -> Result:
    """B15: a fleet against the same recipes one after another: steps alone, and whole commands.

    python -m benchmarks.fleet speed [--shape 6,256,4,4097] [--counts 2,8,32] [--sizes 128,512,1024,4096]

    Steps: tokens per second in one process over one base, for each number of adapters and tokens of an adapter's
    step (blocks of so many tokens, of 1,024 above that; `short` is one document of a quarter block), both in turns.
    Commands: CPU seconds from start-up to delivery, `peftune train` for each recipe against one for all. Before
    anything is timed, losses in fp32 must be equal to 1e-5. Cells of more than `--most` tokens a step are left out.
    """
    a, settings = setup.arguments, setup.settings()
    result = Result("B15", "a fleet against its runs one after another", settings, gate=_gate(setup))
    everyone, table = [], dict[tuple[str, int], dict[str, float]]()
    for precision, adapters, size in _cells(setup):
        what = f"{adapters} adapters, {size} tokens each, {precision}"
        c = Contestant(what, "benchmarks.fleet:steps_worker", _job(setup, adapters, size, precision), "times", True)
        setup.interleave([c])
        result.rows.append(row("B15 steps", f"steps of {what}", "one after another", c.values()))
        table.setdefault((precision, adapters), {})[size] = statistics.median(c.values())
        everyone.append(c)
    for adapters in map(int, filter(None, a.commands.split(","))):
        job = _job(setup, adapters, a.sizes.split(",")[0], a.precisions.split(",")[0], steps=a.steps)
        what = f"{adapters} commands of {a.steps} steps of {a.sizes.split(',')[0]} tokens"
        c = Contestant(what, "benchmarks.fleet:commands_worker", job, "times", True)
        setup.interleave([c], warmup=0)
        result.rows.append(row("B15 commands", what, "one after another", c.values()))
        everyone.append(c)
    result.notes = ["\n".join(table_of(table, [*a.sizes.split(","), *(["short"] if a.short else [])])), in_words(table)]
    return result.add(everyone)


def _cells(setup: Setup) -> Iterator[tuple[str, int, str]]:
    """Precision, adapters, and tokens of an adapter's step."""
    a = setup.arguments
    for precision in a.precisions.split(","):
        for adapters in map(int, a.counts.split(",")):
            for size in [*a.sizes.split(","), *(["short"] if a.short else [])]:
                if size == "short" or adapters * int(size) <= a.most:
                    yield precision, adapters, size


def _job(setup: Setup, adapters: int, size: str, precision: str, **more: Any) -> dict[str, Any]:
    """Recipes of a cell: an adapter's step is one block, or several of the largest."""
    longest = setup.arguments.longest
    tokens = longest if size == "short" else int(size)
    values = setup.recipe(f"{adapters}-{size}-{precision}", batch={"global_size": max(1, tokens // longest)})
    values["data"]["block_size"] = min(tokens, longest)
    if size == "short":
        values["data"] |= {"train": str(_short_documents(setup)), "one_document_per_block": True}
    values["run"] |= {"precision": precision, "device": setup.arguments.device}
    if steps := more.get("steps"):
        values["optim"] = {"lr": 1e-4, "steps": steps}
    job = {"recipe": values, "adapters": adapters, "overrides": setup.arguments.ours, "tokens": setup.arguments.tokens}
    return job | more


def _short_documents(setup: Setup) -> Path:
    """The same text, cut where a document fills a sixteenth of the longest block."""
    path = setup.root / "short.jsonl"
    texts = [json.loads(line)["text"] for line in setup.documents.read_text(encoding="utf-8").splitlines()]
    path.write_text("".join(json.dumps({"text": text[: len(text) // 16]}) + "\n" for text in texts), encoding="utf-8")
    return path


def _gate(setup: Setup) -> dict[str, str]:
    """The losses of three steps, in fp32, at the smallest size; SystemExit where they are not equal."""
    a = setup.arguments
    job = _job(setup, min(8, max(map(int, a.counts.split(",")))), a.sizes.split(",")[0], "fp32")
    judge = Contestant("losses", "benchmarks.fleet:gate_worker", job, "relative", must_run=True)
    setup.interleave([judge], rounds=1, warmup=0)
    (worst,) = judge.values()
    found = {"losses, worst of three steps": f"{number(worst)} (limit {LIMIT:g})"}
    if not worst <= LIMIT:
        raise SystemExit(f"the gate is closed, nothing was timed: {found}")
    return found


def table_of(found: dict[tuple[str, int], dict[str, float]], sizes: list[str]) -> list[str]:
    """Ratios by precision and adapters, a column for each size; a cell that was left out is empty."""
    lines = [table_row(["precision", "adapters", *sizes]), "|---" * (2 + len(sizes)) + "|"]
    for (precision, adapters), cells in found.items():
        ratios = [f"{cells[size]:.2f}" if size in cells else "" for size in sizes]
        lines.append(table_row([precision, str(adapters), *ratios]))
    return lines


def in_words(found: dict[tuple[str, int], dict[str, float]]) -> str:
    """Where a fleet pays, and where it does not."""
    cells = {f"{n} × {size} in {p}": r for (p, n), row in found.items() for size, r in row.items()}  # noqa: RUF001
    pays = [name for name, ratio in cells.items() if ratio >= _PAYS]
    slower = [name for name, ratio in cells.items() if ratio < _SLOWER]
    same = [name for name in cells if name not in {*pays, *slower}]
    return (
        f"Faster by 5 % or more: {', '.join(pays) or 'nowhere'}. About the same: {', '.join(same) or 'nowhere'}. "
        f"Slower than {_SLOWER} times: {', '.join(slower) or 'nowhere'}."
    )


def memory(setup: Setup) -> Result:
    """B15: the peak of a fleet against that of one run at the same tokens a forward, each in a process of its own.

    python -m benchmarks.fleet memory [--adapters 64] [--shape small] [--tokens 2048]

    The limit is 1.2 times that run, and 16 bytes for each parameter that is trained: value, gradient, two moments.
    """
    a, peaks = setup.arguments, []
    result = Result("B15", "memory of a fleet against one run", setup.settings(adapters=a.adapters))
    for adapters, blocks in ((1, a.tokens // a.block), (a.adapters, 1)):
        job = _job(setup, adapters, str(a.block), a.precision, steps=a.steps)
        job["recipe"]["batch"] = {"global_size": blocks, "micro_size": blocks}
        what = f"{adapters} adapters" if adapters > 1 else "one run"
        peaks.append(Contestant(what, "benchmarks.fleet:peak_worker", job, "MB", must_run=True))
    setup.interleave(peaks, at_once=False)
    solo, fleet = peaks
    trained = fleet.rounds[0]["trained"]
    limits = [1.2 * value + 16e-6 * trained for value in solo.values()]
    shares = [value / limit for value, limit in zip(fleet.values(), limits, strict=True)]
    result.notes = [
        f"one run {number(solo.values()[0])} MB, the fleet {number(fleet.values()[0])} MB with {trained:,} trained "
        f"parameters; the limit is {number(limits[0])} MB"
    ]
    result.rows = [row("B15 memory", f"peak of {a.adapters} adapters", "1.2 runs + 16 bytes a parameter", shares)]
    return result.add(peaks)


def sizes(setup: Setup) -> Result:
    """How many tokens a shared forward should have: tokens per CPU second of steps with so many, in turns.

    python -m benchmarks.fleet sizes [--counts 32] [--sizes 512,1024,2048,4096,8192] [--block 128]
    """
    a, result = setup.arguments, Result("fleet", "tokens of a shared forward", setup.settings())
    everyone = []
    for precision in a.precisions.split(","):
        job = _job(setup, int(a.counts), str(a.block), precision, forwards=[*map(int, a.sizes.split(","))])
        c = Contestant(f"{a.counts} adapters, {precision}", "benchmarks.fleet:sizes_worker", job, "tok/s", True)
        setup.interleave([c])
        for name in c.rounds[0]["rates"]:
            rates = [found["rates"][name] for found in c.rounds]
            result.rows.append(
                row("fleet sizes", f"forwards of {name} tokens, {precision}", "CPU time", rates, "tok/s")
            )
        everyone.append(c)
    return result.add(everyone)


def steps_worker(job: dict[str, Any], channel: Channel) -> None:
    """A round takes steps together, then alone; the value is the ratio of tokens per CPU second."""
    steps = FleetSteps(recipes_of(job["recipe"], job["adapters"]), job["overrides"])
    for _ in channel.rounds(**steps.settings()):
        steps.together()  # sleepers give memory back: whoever is first would pay for getting it again
        together, alone = (steps.rate(shares, job["tokens"]) for shares in (True, False))
        channel.send(value=together / alone, together=together, alone=alone)


def gate_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round; the value is the worst relative difference of a loss."""
    steps = FleetSteps(recipes_of(job["recipe"], job["adapters"]), job["overrides"])
    for _ in channel.rounds(**steps.settings()):
        channel.send(value=steps.difference(3))


def sizes_worker(job: dict[str, Any], channel: Channel) -> None:
    """A round tries each size of a forward, and the steps alone; the value is the best rate."""
    steps = FleetSteps(recipes_of(job["recipe"], job["adapters"]), job["overrides"])
    for _ in channel.rounds(**steps.settings()):
        rates = {}
        steps.together()
        for tokens in job["forwards"]:
            steps.room.blocks = max(1, tokens // steps.block)
            rates[f"{tokens:,}"] = steps.rate(True, job["tokens"])
        rates["one adapter's"] = steps.rate(False, job["tokens"])
        channel.send(value=max(rates.values()), rates=rates)


def peak_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round trains, from reading to delivery; the value is the peak of this process in MB."""
    trace.CPU_TOKENS = job["tokens"]
    recipes = read(recipes_of(job["recipe"], job["adapters"]), job["overrides"])
    for _ in channel.rounds(adapters=len(recipes)):
        shutil.rmtree(job["recipe"]["run"]["out"], ignore_errors=True)
        train_fleet(recipes) if len(recipes) > 1 else train(recipes[0])
        events = [event for recipe in recipes for event in read_metrics(Path(recipe.run.out))]
        trained = sum(event["trainable_parameters"] for event in events if event["event"] == "start")
        channel.send(value=process_memory("VmHWM") / 1e6, trained=trained)


def commands_worker(job: dict[str, Any], channel: Channel) -> None:
    """A round runs each recipe's command, then one call for all; the value is the ratio of their CPU seconds."""
    root = Path(job["recipe"]["run"]["out"] + "-commands")
    for _ in channel.rounds(steps=job["steps"]):
        cpu, clock = {}, {}
        for kind in ("alone", "together"):
            values, paths = job["recipe"] | {"run": job["recipe"]["run"] | {"out": str(fresh(root / kind))}}, []
            for which, each in enumerate(recipes_of(values, job["adapters"])):
                paths.append(str(root / f"{kind}-{which}.json"))
                Path(paths[-1]).write_text(json.dumps(each), encoding="utf-8")
            program = [sys.executable, "-m", "peftune", "train", "--quiet"]
            calls = [[*program, *paths]] if kind == "together" else [[*program, path] for path in paths]
            before, began = _cpu_of_children(), time.perf_counter()
            for call in calls:
                subprocess.run(call, check=True, cwd=ROOT, stdout=sys.stderr)
            cpu[kind], clock[kind] = _cpu_of_children() - before, time.perf_counter() - began
        channel.send(value=cpu["alone"] / cpu["together"], cpu_seconds=cpu, seconds=clock)


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


BENCHMARKS = {"speed": speed, "memory": memory, "sizes": sizes}

if __name__ == "__main__":
    main("fleet", BENCHMARKS)
