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

from benchmarks.harness.options import Setup, main
from benchmarks.harness.report import Result, row

_PROMPTS = ("def main(", "The ", "import os\n", "LATIN SMALL LETTER", "class A", "for i in", "return ", "x = ")


@contextmanager
def server(arguments: Namespace, adapters: dict[str, str], root: Path) -> Iterator[tuple[str, int]]:
    """URL and process id of a server with these adapters, loadable from `root` as well."""
    command = [sys.executable, "-m", "peftune", "serve", "--base", arguments.base, "--port", "0"]
    command += ["--slots", str(arguments.slots), "--queue", "4096", "--adapter-root", str(root)]
    command += [part for name, path in adapters.items() for part in ("--adapter", f"{name}={path}")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    try:
        words = (word for line in process.stdout for word in line.split())
        url = next((word for word in words if word.startswith("http://")), None)
        if url is None:
            raise SystemExit("the server ended before it was ready")
        yield url.rstrip("/"), process.pid
    finally:
        process.terminate()
        process.communicate()


async def load(arguments: Namespace, url: str, names: list[str]) -> tuple[dict[str, list[float]], int]:
    """All requests at once, then each alone: figures of each round, and how many answers were compared."""
    from openai import AsyncOpenAI

    wanted = [(names[i % len(names)], _PROMPTS[i // len(names) % len(_PROMPTS)]) for i in range(arguments.requests)]
    found: dict[str, list[float]] = {"p50": [], "p95": [], "tokens per second": []}
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) as client:

        async def ask(model: str, prompt: str, length: int = arguments.length) -> tuple[str, int, float]:
            start = time.perf_counter()
            answer = await client.completions.create(model=model, prompt=prompt, max_tokens=length, temperature=0)
            assert answer.usage is not None
            return answer.choices[0].text, answer.usage.completion_tokens, time.perf_counter() - start

        await ask(names[0], "warm", 4)
        texts = []
        for _ in range(arguments.rounds):
            start = time.perf_counter()
            answers = await asyncio.gather(*(ask(*one) for one in wanted))
            seconds = time.perf_counter() - start
            latencies = sorted(latency for _, _, latency in answers)
            found["p50"].append(statistics.median(latencies))
            found["p95"].append(latencies[int(0.95 * (len(latencies) - 1))])
            found["tokens per second"].append(sum(tokens for _, tokens, _ in answers) / seconds)
            texts += [text for text, _, _ in answers]
        alone = {one: (await ask(*one))[0] for one in dict.fromkeys(wanted)}
    different = sum(text != alone[one] for text, one in zip(texts, arguments.rounds * wanted, strict=True))
    if different:
        raise SystemExit(f"{different} of {len(texts)} answers differ from those that come alone")
    return found, len(texts)


def reload(cycles: int, url: str, process: int, adapter: str) -> list[float]:
    """Growth of the server's memory in MB over each half of the cycles, after a tenth of them to warm up."""
    name, marks = {"lora_name": "coming-and-going"}, []

    def post(path: str, body: dict[str, str]) -> None:
        headers = {"Content-Type": "application/json"}
        with urlopen(Request(f"{url}/v1/{path}", json.dumps(body).encode(), headers), timeout=60) as answer:
            answer.read()

    for count in (cycles // 10, cycles // 2, cycles // 2):
        for _ in range(count):
            post("load_lora_adapter", {**name, "lora_path": adapter})
            post("unload_lora_adapter", name)
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
    adapters = {f"a{number}": directory for number, directory in enumerate(setup.adapters(a.adapters))}
    with server(a, adapters, setup.root) as (url, process):
        found, compared = asyncio.run(load(a, url, list(adapters)))
        grown = reload(a.cycles, url, process, adapters["a0"])
    settings: dict[str, Any] = {
        key: vars(a)[key] for key in ("base", "requests", "slots", "length", "rounds", "cycles")
    }
    settings |= {"adapters": f"{a.adapters}, rank {a.rank} on {a.targets}"}
    gate = {"answers that equal those that come alone": f"{compared} of {compared}"}
    units = {"p50": "s", "p95": "s", "tokens per second": "tok/s"}
    rows = [row("serve", what, "the clock", values, units[what]) for what, values in found.items()]
    halves = f"{grown[0]:+.1f} MB in the first half of the cycles, {grown[1]:+.1f} in the second"
    rows.append(row("serve memory", "memory over loads and unloads", "flat", grown[1:], "MB", halves))
    return Result("serve", "concurrent requests over adapters", settings, gate, rows=rows)


BENCHMARKS = {"load": load_test}

if __name__ == "__main__":
    main("serve", BENCHMARKS)
