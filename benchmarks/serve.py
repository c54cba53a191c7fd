"""`peftune serve` under load: many adapters at once; memory over loads and unloads; how long a stream stands still."""

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
    command = [sys.executable, "-m", "peftune", "serve", "--base", str(arguments.base), "--port", "0"]
    command += [
        "--device",
        arguments.device,
        "--slots",
        str(arguments.slots),
        "--queue",
        "4096",
        "--adapter-root",
        str(root),
    ]
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


def client_of(url: str) -> Any:
    """OpenAI's own client of a server, which tries nothing twice."""
    from openai import AsyncOpenAI

    return AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600)


async def load(arguments: Namespace, url: str, names: list[str]) -> tuple[dict[str, list[float]], int]:
    """All requests at once, then each alone: figures of each round, and how many answers were compared."""
    wanted = [(names[i % len(names)], _PROMPTS[i // len(names) % len(_PROMPTS)]) for i in range(arguments.requests)]
    found: dict[str, list[float]] = {"p50": [], "p95": [], "tokens per second": []}
    async with client_of(url) as client:

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


async def gaps(arguments: Namespace, url: str, names: list[str], prompt: list[int]) -> dict[str, list[float]]:
    """Longest time in ms between two events of a stream: streams alone, and in every kind of company."""
    found: dict[str, list[float]] = {}
    async with client_of(url) as client:

        async def stream(model: str) -> list[float]:
            events: list[float] = []
            options: dict[str, Any] = {"max_tokens": arguments.length, "stream": True, "temperature": 0}
            async for _ in await client.completions.create(model=model, prompt="The ", **options):
                events.append(time.perf_counter())
            return [1e3 * (after - before) for before, after in pairwise(events)]

        async def keep_asking(model: str) -> None:
            while True:
                await client.completions.create(model=model, prompt=prompt, max_tokens=1)

        async def streams_beside(what: str, models: list[str]) -> None:
            company = [asyncio.create_task(keep_asking(model)) for model in models]
            each = await asyncio.gather(*(stream(name) for name in names[: arguments.streams]))
            for task in company:
                task.cancel()
            await asyncio.gather(*company, return_exceptions=True)
            found.setdefault(f"{what}, longest", []).append(max(map(max, each)))
            found.setdefault(f"{what}, median", []).append(statistics.median(gap for gaps in each for gap in gaps))

        await streams_beside("warm", ["auto", names[0]])
        found.clear()
        many = arguments.requests
        for _ in range(arguments.rounds):
            await streams_beside("streams alone", [])
            await streams_beside(f"beside {many} long named prompts", [names[i % len(names)] for i in range(many)])
            await streams_beside(f"beside {many} auto prompts", ["auto"] * many)
            await streams_beside(f"beside {many} of each", ["auto", names[0]] * many)
    return found


def gaps_test(setup: Setup) -> Result:
    """How long a stream of `peftune serve` stands still while prompts are read and routed beside it.

    python -m benchmarks.serve gaps [--shape small] [--adapters 10] [--streams 4] [--requests 4] [--prompt 500]

    `--streams` greedy texts of `--length` tokens stream; meanwhile `--requests` clients send prompts of `--prompt`
    tokens, one after the other: to named adapters, to the model auto, and both. The figures are times between two
    events of one stream, as its client sees them. Needs the extra `serve` and `openai`.
    """
    a = setup.arguments
    a.base = setup.base
    adapters = {f"a{number}": directory for number, directory in enumerate(setup.adapters(a.adapters))}
    prompt = [(7 * i) % 4000 for i in range(a.prompt)]
    with server(a, adapters, setup.root) as (url, _):
        found = asyncio.run(gaps(a, url, list(adapters), prompt))
    keys = ("streams", "requests", "prompt", "length", "adapters", "slots")
    settings = setup.settings(**{key: vars(a)[key] for key in keys})
    rows = [row("serve gaps", what, "the clock", values, "ms") for what, values in found.items()]
    return Result("serve gaps", "the time between two tokens of a stream", settings, rows=rows)


BENCHMARKS = {"load": load_test, "gaps": gaps_test}

if __name__ == "__main__":
    main("serve", BENCHMARKS)
