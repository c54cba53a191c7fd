"""What the verbs of `peftune adapters` print: results on stdout, as tables that stay whole in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftune.adapters.edit.combine import Combined
from peftune.adapters.edit.extract import Extracted
from peftune.adapters.inspect.compare import Comparison
from peftune.adapters.inspect.scan import ScanEntry, ScanResult, targets_told

_PIPE = 200  # columns where there is no terminal to ask


class TablePrinter:
    """Lines and tables for a person; nothing that a user named is taken for markup."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPE)

    def line(self, text: str = "") -> None:
        """One line, which a terminal may wrap."""
        self.console.print(text, soft_wrap=True)

    def table(self, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]], left: int = 1) -> None:
        """A table whose first `left` columns are words and whose others are figures."""
        self.console.print(Text(title, style="bold"), soft_wrap=True)  # a table's own title wraps at its width
        table = Table(header_style="bold", pad_edge=False)
        for number, name in enumerate(columns):
            table.add_column(name, justify="left" if number < left or not name else "right", overflow="fold")
        for row in rows:
            table.add_row(*(Text(cell) for cell in row))
        self.console.print(table)


def print_scan(found: ScanResult) -> None:
    """`peftune adapters list`."""
    printer = TablePrinter()
    usable = [entry for entry in found.entries if not entry.problem]
    broken = [entry for entry in found.entries if entry.problem]
    if not found.entries:
        printer.line(f"{found.directory}: no adapter here or below")
    if usable:
        columns = ("adapter", "base", "variant", "targets", "rank", "MB", "steps", "held-out loss")
        printer.table(f"{len(usable)} adapters in {found.directory}", columns, map(_row, usable), left=4)
    if broken:
        printer.line(f"{len(broken)} that cannot be used:")
    for entry in broken:
        printer.line(f"  {entry.name}: {entry.problem}")
    if found.cut:
        printer.line("There may be more: the search ended at its bounds; name a directory further down.")


def _row(entry: ScanEntry) -> list[str]:
    facts = entry.facts
    ranks, step = facts["ranks"], facts["step"]
    span = "-" if not ranks else f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    loss = ", ".join(f"{domain} {value:.3f}" for domain, value in facts["loss"].items())
    return [
        entry.name, facts["base"] or "not known", facts["variant"], targets_told(facts["targets"]), span,
        f"{facts['megabytes']:.2f}", "-" if step is None else f"{step:,}", loss or "-",
    ]  # fmt: skip


def print_combined(result: Combined) -> None:
    """`peftune adapters combine`."""
    printer = TablePrinter()
    rows = [
        [name.removeprefix("transformer."), f"{int(m['rank'])}", figure(m["norm"]), share(m["relative_error"])]
        for name, m in result.modules.items()
    ]
    if result.rank is not None:
        printer.table("Cut to rank", ("module", "rank", "norm of the sum", "relative error"), rows)
    ranks = sorted({int(m["rank"]) for m in result.modules.values()})
    span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
    kind = "exact to rounding" if result.rank is None else f"the nearest of rank {result.rank}"
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in result.weights.items())
    printer.line(
        f"{result.out}: {terms}, {kind}: {len(result.modules)} modules, {span}, relative error "
        f"{share(result.relative_error)}"
    )


def print_extracted(result: Extracted) -> None:
    """`peftune adapters extract`."""
    printer = TablePrinter()
    rows = [
        [name.removeprefix("transformer."), f"{m['rank']}", figure(m["norm"]), share(m["relative_change"]),
         share(m["relative_error"])]
        for name, m in result.modules.items()
    ]  # fmt: skip
    columns = ("module", "rank", "norm of the change", "of the weight", "missing")
    printer.table(f"From {result.base} to {result.tuned}", columns, rows)
    if result.unchanged:
        printer.line(f"not changed by the fine-tune, and so left out: {len(result.unchanged)} modules")
    rest = [
        [kind, f"{m['tensors']}", figure(m["norm"]), share(m["relative_change"])] for kind, m in result.not_held.items()
    ]
    if rest:
        title = "Changed too, and not in these modules, so the adapter does not hold it"
        printer.table(title, ("what", "tensors", "norm of the change", "of the weight"), rest)
    for note in result.notes:
        printer.line(f"note: {note}")
    printer.line(
        f"{result.out}: {len(result.modules)} modules of rank {result.rank}; {share(result.relative_error)} of the "
        f"change in them is missing; held of the whole fine-tune, by squared norm: {result.held:.2%}"
    )


def print_comparison(found: Comparison) -> None:
    """`peftune adapters compare`."""
    printer = TablePrinter()
    printer.line(f"not known to be of one base: {found.apart}" if found.apart else "both are adapters of the same base")
    columns = ("module", "norm, first", "second", "cosine", "distance", "overlap in", "overlap out")
    rows = [
        [name.removeprefix("transformer."), *(told(figures.get(key)) for key, told in _COMPARED.items())]
        for name, figures in [*found.modules.items(), ("all", found.overall)]
    ]
    printer.table(f"{found.first} and {found.second}", columns, rows)
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            printer.line(f"only in the {which}: {', '.join(name.removeprefix('transformer.') for name in names)}")
    if found.differences:
        told = [[key, _short(one), _short(other)] for key, (one, other) in found.differences.items()]
        printer.table("What differs in how they were made", ("", "first", "second"), told, left=3)
    for note in found.notes:
        printer.line(f"note: {note}")


def figure(value: float | None) -> str:
    """Three significant digits."""
    return "-" if value is None else f"{value:#.3g}".rstrip(".")


def share(value: float | None) -> str:
    """A relative size in percent, or by its power of ten where that would read 0; None is one relative to nothing."""
    if value is None:
        return "from 0"
    return f"{value:.2%}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


_COMPARED = {
    "norm_first": figure, "norm_second": figure, "cosine": _cosine, "distance": figure, "overlap_in": figure,
    "overlap_out": figure,
}  # fmt: skip


def _short(value: Any) -> str:
    """One cell; a data source by what was said of it."""
    if isinstance(value, list):
        return _short(", ".join(_source(item) for item in value))
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _source(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return " ".join(str(v) if k == "path" else f"{k}={v}" for k, v in item.items() if v is not None)
