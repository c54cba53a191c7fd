"""`peftune serve` under load: concurrent requests over many adapters; memory over loads and unloads."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import psutil

from benchmarks.harness.options import ADAPTER, Benchmark, Setup, main
from benchmarks.harness.report import Result, row, spread

_PROMPTS = ("def main(", "The ", "import os\n", "LATIN SMALL LETTER", "class A", "for i in", "return ", "x = ")


@contextmanager
def server(arguments: Namespace, adapters: dict[str, Path], root: Path) -> Iterator[tuple[str, int]]:
    """URL and process id of a server with these adapters, loadable from `root` as well."""
    command = [sys.executable, "-m", "peftune", "serve", "--base", arguments.base, "--port", "0"]
    command += ["--slots", str(arguments.slots), "--queue", "4096", "--adapter-root", str(root)]
    command += [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        for line in process.stdout:
            found = [word for word in line.split() if word.startswith("http://")]
            if found:
                yield found[0].rstrip("/"), process.pid
                return
        raise SystemExit("the server ended before it was ready")
    finally:
        process.terminate()
        process.communicate()


async def ask(client: Any, model: str, prompt: str, length: int) -> tuple[str, int, float]:
    """Text, tokens and seconds of one greedy request."""
    start = time.perf_counter()
    answer = await client.completions.create(model=model, prompt=prompt, max_tokens=length, temperature=0)
    return answer.choices[0].text, answer.usage.completion_tokens, time.perf_counter() - start


async def load(arguments: Namespace, url: str, names: list[str]) -> dict[str, Any]:
    """All requests at once, then each alone."""
    from openai import AsyncOpenAI

    wanted = [(names[i % len(names)], _PROMPTS[i // len(names) % len(_PROMPTS)]) for i in range(arguments.requests)]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:
        await ask(client, names[0], "warm", 4)
        rounds = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            answers = await asyncio.gather(*(ask(client, *one, arguments.length) for one in wanted))
            rounds.append((time.perf_counter() - start, answers))
        alone = {one: (await ask(client, *one, arguments.length))[0] for one in dict.fromkeys(wanted)}
    different = sum(
        text != alone[one] for _, answers in rounds for (text, _, _), one in zip(answers, wanted, strict=True)
    )
    if different:
        raise SystemExit(f"{different} of {len(wanted) * len(rounds)} answers differ from those that come alone")
    latencies = [sorted(seconds for _, _, seconds in answers) for _, answers in rounds]
    return {
        "p50": [statistics.median(each) for each in latencies],
        "p95": [each[int(0.95 * (len(each) - 1))] for each in latencies],
        "tokens per second": [sum(tokens for _, tokens, _ in answers) / seconds for seconds, answers in rounds],
        "compared": len(wanted) * len(rounds),
    }


def reload(arguments: Namespace, url: str, process: int, adapter: Path) -> list[float]:
    """Growth of the server's memory in MB over each half of the cycles, after a tenth of them to warm up."""

    def post(path: str, body: dict[str, str]) -> None:
        request = Request(f"{url}/v1/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(request, timeout=60) as answer:
            answer.read()

    marks = []
    for count in (arguments.cycles // 10, arguments.cycles // 2, arguments.cycles // 2):
        for _ in range(count):
            post("load_lora_adapter", {"lora_name": "coming-and-going", "lora_path": str(adapter)})
            post("unload_lora_adapter", {"lora_name": "coming-and-going"})
        marks.append(psutil.Process(process).memory_info().rss / 1e6)
    return [after - before for before, after in pairwise(marks)]


def load_test(setup: Setup) -> Result:
    """`peftune serve` under load: concurrent requests over many adapters through OpenAI's own client; memory.

    python -m benchmarks.serve load [--base builtin:small] [--requests 200] [--adapters 8] [--cycles 1000]

    Greedy requests, all sent at once, in turn to every adapter; each answer is compared with the one that the same
    request gets alone. Reported are latencies (50th and 95th percentile, from sending to the complete answer), tokens a
    second over all, and growth of the server's resident memory over that many loads and unloads of an adapter. Needs
    the extra `serve` and `openai`.
    """
    a = setup.arguments
    adapters = {f"a{number}": Path(directory) for number, directory in enumerate(setup.adapters(a.adapters))}
    with server(a, adapters, setup.root) as (url, process):
        found = asyncio.run(load(a, url, list(adapters)))
        grown = reload(a, url, process, adapters["a0"])
    settings = {key: vars(a)[key] for key in ("base", "requests", "slots", "length", "rounds", "cycles")}
    result = Result("serve", "concurrent requests over adapters", settings)
    result.settings["adapters"] = f"{a.adapters}, rank {a.rank} on {a.targets}"
    result.gate = {"answers that equal those that come alone": f"{found['compared']} of {found['compared']}"}
    units = {"p50": "s", "p95": "s", "tokens per second": "tok/s"}
    result.rows = [row("serve", what, "the clock", spread(found[what]), unit) for what, unit in units.items()]
    halves = f"{grown[0]:+.1f} MB in the first half of the cycles, {grown[1]:+.1f} in the second"
    result.rows.append(row("serve memory", "memory over loads and unloads", "flat", spread(grown[1:]), "MB", halves))
    return result


_OPTIONS: dict[str, dict[str, Any]] = ADAPTER | {
    "base": {"default": "builtin:small", "help": "hub name, directory or builtin:small"},
    "requests": {"type": int, "default": 200, "help": "sent at once"},
    "adapters": {"type": int, "default": 8},
    "slots": {"type": int, "default": 16},
    "length": {"type": int, "default": 32, "help": "tokens a request"},
    "cycles": {"type": int, "default": 1000, "help": "loads and unloads of an adapter"},
}
BENCHMARKS = {"load": Benchmark(load_test, _OPTIONS, {"rounds": 3, "targets": "all"})}

if __name__ == "__main__":
    main("serve", BENCHMARKS)
