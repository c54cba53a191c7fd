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
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks.harness.options import DECLARED
from benchmarks.harness.report import Result, Row, Spread, details, drawn, number, row, table_row, targets
from benchmarks.harness.workers import ROOT
from peftune.files import write_json

COMMANDS: dict[str, str] = DECLARED["targets"]
BEGIN, END = "<!-- written by: python -m benchmarks.all --write docs/performance.md -->", "<!-- end -->"
_BETTER, _WORSE = "#2a7f62", "#b5482e"


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


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of several results."""
    return TypeAdapter(list[Row]).validate_python([row for result in results for row in result["rows"]])


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table, then the machine, then for each target its gate, its contestants with their settings, its notes."""
    lines = ["| | what | against | measured (lowest to highest) | wanted | |", "|---|---|---|---|---|---|"]
    for each in rows_of(results):
        wanted = "" if each.sense == "information" else f"{each.sense} {number(each.wanted)} {each.unit}"
        measured = f"{each.measured} {each.unit}" if each.measured else "–"  # noqa: RUF001  a dash for nothing
        status = each.status + (f": {each.reason}" if each.reason else "")
        lines.append(table_row([each.target, each.what, each.against, measured, wanted, status]))
    machine = machine_description(results)
    return "\n".join([*lines, "", machine, *(line for result in results for line in details(result))])


def machine_description(results: Sequence[dict[str, Any]]) -> str:
    """One paragraph on the machine and the versions."""
    m = results[0]["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    return (
        f"Machine: {m['cpu']}, {m['cores']} cores ({', '.join(m['instructions'])}), {m['memory_GB']} GB, "
        f"{m['gpu'] or 'no GPU'}; {m['system']}, Python {m['python']}; {packages}."
    )


def rewritten(page: str, table: str) -> str:
    """The page with this table between its markers; ValueError where it has none."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"the page has no markers for the table: expected the lines {BEGIN} and {END}")
    return re.sub(f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{table}\n{END}", page)


def gains(results: Sequence[dict[str, Any]]) -> list[tuple[str, Spread]]:
    """What is drawn: for each entry of the chart that was measured, how many times better we are; below 1, worse."""
    found = []
    for entry in targets()["chart"]:
        for each in rows_of(results):
            named = each.what.startswith(entry["what"]) and entry["against"] in each.against
            if each.target == entry["target"] and named and each.measured:
                m = each.measured
                found.append((entry["label"], Spread(1 / m.median, 1 / m.high, 1 / m.low) if entry.get("less") else m))
                break
    return found


def chart(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Horizontal bars from 1, «as good»: to the right peftune is better, to the left worse; whiskers are rounds."""
    found = gains(results)[::-1]
    with drawn(path, (9.5, 1.3 + 0.4 * max(1, len(found)))) as (axis,):
        for y, (_, gain) in enumerate(found):
            axis.barh(y, gain.median - 1, left=1, color=_BETTER if gain.median >= 1 else _WORSE, height=0.6)
            axis.plot([gain.low, gain.high], [y, y], color="#222222", linewidth=1)
            axis.text(max(gain.high, 1) * 1.06, y, f"{gain.median:.2g} times", va="center", fontsize=9)
        axis.set_yticks(range(len(found)), [label for label, _ in found], fontsize=9)
        axis.set_xscale("log")
        ticks = [0.25, 0.5, 1, 2, 4, 8, 16]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.set_xlim(0.17, 40)
        axis.axvline(1, color="#222222", linewidth=1.2)
        label = "times as good as what is named (1: the same; black lines: lowest and highest round)"
        axis.set_xlabel(label, fontsize=9)


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
