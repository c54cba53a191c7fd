"""docs/performance.md and its pictures, from the JSON that each command wrote."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from benchmarks.harness.report import Row, Spread, details, drawn, number, table_row, targets

BEGIN, END = "<!-- written by: python -m benchmarks.all --write docs/performance.md -->", "<!-- end -->"
_BETTER, _WORSE = "#2a7f62", "#b5482e"


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of several results."""
    return TypeAdapter(list[Row]).validate_python([row for result in results for row in result["rows"]])


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table, then the machine, then for each target its gate, its contestants with their settings, its notes."""
    lines = ["| | what | against | measured (lowest to highest) | wanted | |", "|---|---|---|---|---|---|"]
    for row in rows_of(results):
        wanted = "" if row.sense == "information" else f"{row.sense} {number(row.wanted)} {row.unit}"
        measured = f"{row.measured} {row.unit}" if row.measured else "–"  # noqa: RUF001  a dash for nothing
        status = row.status + (f": {row.reason}" if row.reason else "")
        lines.append(table_row([row.target, row.what, row.against, measured, wanted, status]))
    machine = machine_description(results)
    return "\n".join([*lines, "", machine, *(line for result in results for line in details(result))])


def machine_description(results: Sequence[dict[str, Any]]) -> str:
    """One paragraph on the machine and the versions."""
    if not results:
        return "Nothing was measured."
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
        for row in rows_of(results):
            named = row.what.startswith(entry["what"]) and entry["against"] in row.against
            if row.target == entry["target"] and named and row.measured:
                m = row.measured
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
