"""The table and the chart of all targets, from the JSON that each command wrote; and the page that holds them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row, Spread, number

BEGIN, END = "<!-- written by: python -m benchmarks.all --write docs/performance.md -->", "<!-- end -->"
_COLOURS = {"met": "#2a7f62", "missed": "#b5482e", "information": "#8a8f98"}
_PLAIN = {"facecolor": "white", "edgecolor": "none", "pad": 1}
_MOST = 3.0  # a bar that is longer is cut, with its figure beside it


def rows_of(results: Sequence[dict[str, Any]]) -> list[Row]:
    """The rows of several results."""
    kept = (row for result in results for row in result["rows"])
    return [
        Row(**{k: v for k, v in row.items() if k not in ("status", "measured")},
            measured=Spread(**row["measured"]) if row["measured"] else None)
        for row in kept
    ]  # fmt: skip


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table, then the machine, then for each target its gate, its contestants with their settings, its notes."""
    lines = ["| | what | against | measured (lowest to highest) | wanted | |", "|---|---|---|---|---|---|"]
    for row in rows_of(results):
        wanted = "" if row.sense == "information" else f"{row.sense} {number(row.wanted)} {row.unit}"
        measured = f"{row.measured} {row.unit}" if row.measured else "–"  # noqa: RUF001  a dash for nothing
        status = row.status + (f": {row.reason}" if row.reason else "")
        cells = [row.target, row.what, row.against, measured, wanted, status]
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join([*lines, "", machine_told(results), *(line for result in results for line in _details(result))])


def machine_told(results: Sequence[dict[str, Any]]) -> str:
    """One paragraph on the machine and the versions."""
    if not results:
        return "Nothing was measured."
    m = results[0]["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    gpu = m["gpu"] or "no GPU"
    return (
        f"Machine: {m['cpu']}, {m['cores']} cores ({', '.join(m['instructions'])}), {m['memory_GB']} GB, {gpu}; "
        f"{m['system']}, Python {m['python']}; {packages}."
    )


def _details(result: dict[str, Any]) -> list[str]:
    lines = ["", f"### {result['target']}: {result['title']}", ""]
    lines += [f"- {key}: {_flat(value)}" for key, value in result["settings"].items()]
    if result["gate"]:
        lines.append(f"- gate, before any timing: {_flat(result['gate'])}")
    if result["contestants"]:
        lines += ["", "| contestant | median (lowest to highest) | settings |", "|---|---|---|"]
    for c in result["contestants"]:
        figure = f"{Spread(**c['figures'])} {c['unit']}" if c["figures"] else f"not run: {c['failure']}"
        lines.append(f"| {c['name']} | {figure} | {_flat(c.get('settings', {}))} |".replace("\n", " "))
    return [*lines, *(f"\n{note}" for note in result["notes"])]


def _flat(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_flat(inner)}" for key, inner in value.items() if inner not in (None, {}, []))
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)


def rewritten(page: str, table: str) -> str:
    """The page with this table between its markers; ValueError where it has none."""
    if BEGIN not in page or END not in page:
        raise ValueError(f"no place for the table: expected the lines {BEGIN} and {END}")
    return re.sub(f"(?s){re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{table}\n{END}", page)


def achievement(row: Row) -> Spread:
    """How far a row is, in targets: 1 is the target, more is better whichever way the target points."""
    assert row.measured is not None
    m = row.measured
    if row.sense == "at most":
        low, high = (row.wanted / max(value, 1e-12) for value in (m.high, m.low))
        return Spread(row.wanted / max(m.median, 1e-12), low, high)
    return Spread(m.median / row.wanted, m.low / row.wanted, m.high / row.wanted)


def chart(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Horizontal bars, one a row with a target: measured in targets, whiskers from lowest to highest round."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    # What has a target of zero is a count, not a length: it is in the table.
    rows = [row for row in rows_of(results) if row.measured and row.sense != "information" and row.wanted][::-1]
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.42 * max(1, len(rows))), layout="constrained")
    for y, row in enumerate(rows):
        reached = achievement(row)
        end = min(reached.median, _MOST)
        axis.barh(y, end, color=_COLOURS[row.status], height=0.62)
        axis.plot([min(reached.low, _MOST), min(reached.high, _MOST)], [y, y], color="#222222", linewidth=1)
        cut = " →" if reached.median > _MOST else ""
        label = (
            f"{number(row.measured.median)} {row.unit} ({row.sense} {number(row.wanted)}){cut}" if row.measured else ""
        )
        axis.text(min(max(end, reached.high), _MOST) + 0.06, y, label, va="center", fontsize=8, bbox=_PLAIN, zorder=3)
    axis.set_yticks(range(len(rows)), [f"{row.target}  {row.what}\nagainst {row.against}" for row in rows], fontsize=7)
    axis.axvline(1, color="#222222", linewidth=1.2, linestyle="--")
    longest = max((min(achievement(row).high, _MOST) for row in rows), default=1.0)
    axis.set_xlim(0, max(1.5, longest) * 1.32)
    axis.set_xlabel(
        "measured in targets (dashed: the target; further right is better; whiskers: lowest and highest round)"
    )
    for status in ("met", "missed"):
        axis.barh(-9, 0, color=_COLOURS[status], label=status)
    axis.set_ylim(-0.6, max(len(rows), 1) - 0.4)
    axis.legend(loc="upper right", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
