"""Contestants take turns: each a process that loads and warms up once, then works one round whenever it is asked to.

The parent writes one line to a contestant's standard input for each round and reads one line of JSON back; meanwhile
all others sleep on a read. So a Trainer is timed inside its own loop (it waits in a callback), threads and global
settings of one library never reach another, and a machine that slows down does so for all.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


class Channel:
    """The contestant's end: it sends `settings` once, then a `value` for every round, and whatever is worth keeping."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # whatever a library prints goes to stderr

    def send(self, **facts: Any) -> None:
        """Say that it is loaded, or what a round brought."""
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def rounds(self, **settings: Any) -> Iterator[None]:
        """Loaded; one turn for each round that is asked for."""
        self.send(settings=settings)
        while self.wait():
            yield

    def wait(self) -> bool:
        """Sleep until the next round; False when there is none.

        A sleeper that keeps gigabytes it does not use (CUDA's cache; glibc's heap) would make another run out.
        """
        gc.collect()
        if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
        return sys.stdin.readline().strip() == "round"


@dataclass
class Contestant:
    """What is measured: `module` (its `worker(job, channel)`, or MODULE:FUNCTION, in its own process) and its job."""

    name: str
    module: str
    job: dict[str, Any]
    unit: str
    must_run: bool = False
    """Ours must; a peer that cannot run here is reported as such, with the reason."""
    facts: dict[str, Any] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    failure: str | None = None

    def values(self) -> list[float]:
        return [found["value"] for found in self.rounds]


class Failed(SystemExit):
    """A contestant ended before its time; the message is the last line that it wrote. Of ours it ends the command."""


def interleave(
    contestants: list[Contestant], rounds: int, warmup: int, environment: dict[str, str], at_once: bool = True
) -> None:
    """Fill `facts` and `rounds` of every contestant; warm-up rounds are not kept.

    With `at_once` False there is one process at a time, fresh for each contestant and round, with `warmup` rounds
    before: for memory, where a sleeping neighbour would take some.
    """
    if not at_once:
        for contestant in rounds * contestants:
            if contestant.failure is None:
                interleave([contestant], 1, warmup, environment)
        return
    with ExitStack() as stack:
        logs, running = Path(stack.enter_context(tempfile.TemporaryDirectory())), {}
        for turn in range(rounds + 1):  # before the first round: start and warm up
            for number, c in enumerate(contestants):
                if c.failure is not None:
                    continue
                try:
                    if turn:
                        c.rounds.append(running[number].round())
                        said = f"round {turn} of {rounds}: {c.name} {c.rounds[-1]['value']:,.4g} {c.unit}"
                    else:
                        running[number] = stack.enter_context(_Process(c, environment, logs / f"{number}.log"))
                        c.facts = running[number].answer()
                        said = f"{c.name}: {json.dumps(c.facts)}"
                        for _ in range(warmup):
                            running[number].round()
                except Failed as error:
                    if c.must_run:
                        raise
                    c.failure = str(error)
                    said = f"{c.name}: not run: {error}"
                print(f"  {said}", file=sys.stderr, flush=True)


class _Process(subprocess.Popen[str]):
    """One contestant at work; left as a context, its input is closed, which ends it between rounds."""

    def __init__(self, contestant: Contestant, environment: dict[str, str], log: Path) -> None:
        self.name, self.log = contestant.name, log
        command = [sys.executable, "-m", "benchmarks.harness.workers", contestant.module, json.dumps(contestant.job)]
        with open(log, "wb") as stderr:
            super().__init__(
                command, bufsize=1, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT,
                env={**os.environ, **environment},
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.stdout is not None
        if line := self.stdout.readline():
            return json.loads(line)  # type: ignore[no-any-return]
        if self.wait() == -signal.SIGKILL:
            raise Failed(f"{self.name} was killed, most likely because memory ran out")
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        raise Failed(f"{self.name} ended with {self.returncode}: {' '.join(lines[-1:])[:400]}")

    def round(self) -> dict[str, Any]:
        assert self.stdin is not None
        with suppress(BrokenPipeError):  # `answer` says why it ended
            self.stdin.write("round\n")
        return self.answer()

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self.send_signal(signal.SIGINT)  # no round is waited for; it may have children to end
        super().__exit__(*error)


def main() -> None:
    """A contestant's process: `python -m benchmarks.harness.workers MODULE JOB`, started by `interleave`."""
    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function or "worker")(json.loads(sys.argv[2]), Channel())


if __name__ == "__main__":
    main()
