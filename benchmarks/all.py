"""All targets, one after the other, each by its own command: the table, JSON, a chart, the page.

    python -m benchmarks.all                                    everything, on the shapes of the targets
    python -m benchmarks.all --quick                            does it run: tiny shapes, two rounds
    python -m benchmarks.all --only B1,B6 --json all.json --chart all.png --write docs/performance.md
    python -m benchmarks.all --rounds 7 --threads 4             what is not known here goes to every command
    python -m benchmarks.all --from docs/performance.json --chart docs/performance.png       no measuring

A command that fails is in the table with its exit code, and the exit code here is 1; missed targets are not failures.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness.options import DECLARED
from benchmarks.harness.report import Result, row, write_json
from benchmarks.harness.workers import ROOT
from benchmarks.page import chart, markdown, rewritten, rows_of

COMMANDS: dict[str, str] = DECLARED["targets"]


def measure(target: str, options: list[str]) -> dict[str, Any]:
    """The JSON of one command, run in a process of its own; what it says goes to stderr."""
    module, name = COMMANDS[target].split()
    command = [sys.executable, "-m", f"benchmarks.{module}", name, *options]
    print(f"\n{target}: {' '.join(command[1:])}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "result.json"
        done = subprocess.run([*command, "--json", str(path)], stdout=sys.stderr, cwd=ROOT, check=False)
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
    missing = row(target, COMMANDS[target], "", [], reason=f"the command ended with {done.returncode}")
    settings = {"command": " ".join(command[1:])}
    return Result(target, COMMANDS[target], settings, rows=[missing], failed=True).values()


def main() -> None:
    """Measure what was asked for, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(COMMANDS), help=f"targets with commas, of {', '.join(COMMANDS)}")
    parser.add_argument("--json", type=Path, help="write everything that was found")
    parser.add_argument("--chart", type=Path, help="write a picture (png, svg)")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table between the markers of this page")
    parser.add_argument("--from", dest="earlier", type=Path, metavar="JSON", help="take results from here")
    arguments, passed = parser.parse_known_args()
    only = arguments.only.split(",")
    if unknown := sorted(set(only) - set(COMMANDS)):
        parser.error(f"--only {', '.join(unknown)}: known are {', '.join(COMMANDS)}")
    page = arguments.write.read_text(encoding="utf-8") if arguments.write else ""
    if arguments.write:
        rewritten(page, "")  # a page without markers is refused before hours of measuring
    results: list[dict[str, Any]] = []
    if arguments.earlier:
        found = json.loads(arguments.earlier.read_text(encoding="utf-8"))
        results = [r for r in (found if isinstance(found, list) else [found]) if r["target"] in only]
    for target in [] if arguments.earlier else only:
        results.append(measure(target, passed))
        if arguments.json:  # after each: hours of measuring outlive an interruption
            write_json(arguments.json, results)
    if arguments.chart:
        chart(results, arguments.chart)
    if arguments.write:
        arguments.write.write_text(rewritten(page, markdown(results)), encoding="utf-8")
    for line in rows_of(results):
        print(f"{line.target:4} {line.what} against {line.against}: {line.verdict()}")
    if any(result.get("failed") for result in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
