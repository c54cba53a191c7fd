"""All targets, one after the other, each by its own command: the table, JSON, a chart, the page.

    python -m benchmarks.all                                    everything, on the shapes of the targets
    python -m benchmarks.all --quick                            does it run: tiny shapes
    python -m benchmarks.all --only B1,B6 --json all.json --chart all.png --write docs/performance.md
    python -m benchmarks.all -- --rounds 7 --threads 4          what follows -- goes to every command
    python -m benchmarks.all --from all.json --write docs/performance.md       no measuring: from an earlier JSON

A command that fails is told in the table with the end of what it said, and the exit code is 1; missed targets are not
failures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.machine import describe
from benchmarks.measure import Result, Row, verdict
from benchmarks.rounds import ROOT
from benchmarks.table import chart, markdown, rewritten, rows_of

COMMANDS = {
    "B1": "train_small", "B2": "train_medium", "B3": "step_memory", "B4": "share_of_peak", "B5": "gradients",
    "B6": "merging", "B7": "swapping", "B8": "decoding", "B9": "data_path", "B11": "train_gpu",
    "B12": "train_quantised", "B13": "startup",
}  # fmt: skip


def measure(target: str, options: list[str]) -> dict[str, Any]:
    """The JSON of one command, run in a process of its own; what it says goes to stderr."""
    command = [sys.executable, "-m", f"benchmarks.{COMMANDS[target]}", *options]
    print(f"\n{target}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        done = subprocess.run([*command, "--json", str(path)], stdout=sys.stderr, cwd=ROOT, check=False)
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    failed = Row(
        target, COMMANDS[target], "", None, 0, "information", reason=f"the command ended with {done.returncode}"
    )
    result = Result(target, COMMANDS[target], {"command": " ".join(command[1:])}, rows=[failed], machine=describe())
    return {**asdict(result), "failed": True}


def main() -> None:
    """Measure what was asked for, tell, write."""
    own, passed = sys.argv[1:], []
    if "--" in own:
        own, passed = own[: own.index("--")], own[own.index("--") + 1 :]
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--only", default=",".join(COMMANDS), help=f"targets with commas, of {', '.join(COMMANDS)}")
    made.add_argument("--quick", action="store_true", help="tiny shapes, two rounds")
    made.add_argument("--tokenizer", metavar="DIR", help="a GPT-2 tokenizer for every command")
    made.add_argument("--data", metavar="FILE", help="text for every command that reads some")
    made.add_argument("--json", type=Path, help="write everything that was found")
    made.add_argument("--chart", type=Path, help="write a picture (png, svg)")
    made.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the markers of this page")
    made.add_argument(
        "--from", dest="earlier", type=Path, metavar="JSON", help="take results from here, measure nothing"
    )
    arguments = made.parse_args(own)
    unknown = sorted(set(arguments.only.split(",")) - set(COMMANDS))
    if unknown:
        made.error(f"--only {', '.join(unknown)}: known are {', '.join(COMMANDS)}")
    page = arguments.write.read_text(encoding="utf-8") if arguments.write else ""
    if arguments.write:
        rewritten(page, "")  # a page without markers is told before hours of measuring
    options = [*(["--quick"] if arguments.quick else []), *_for_every(arguments), *passed]
    results = _earlier(arguments) if arguments.earlier else []
    for target in [] if arguments.earlier else arguments.only.split(","):
        results.append(measure(target, options))
        if arguments.json:  # after each: hours of measuring outlive an interruption
            arguments.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if arguments.chart:
        chart(results, arguments.chart)
    if arguments.write:
        arguments.write.write_text(rewritten(page, markdown(results)), encoding="utf-8")
    for row in rows_of(results):
        print(f"{row.target:4} {row.what} against {row.against}: {verdict(row)}")
    if any(result.get("failed") for result in results):
        raise SystemExit(1)


def _for_every(arguments: argparse.Namespace) -> list[str]:
    given = {"--tokenizer": arguments.tokenizer, "--data": arguments.data}
    return [part for key, value in given.items() if value is not None for part in (key, value)]


def _earlier(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = json.loads(arguments.earlier.read_text(encoding="utf-8"))
    results = found if isinstance(found, list) else [found]
    return [result for result in results if result["target"] in arguments.only.split(",")]


if __name__ == "__main__":
    main()
