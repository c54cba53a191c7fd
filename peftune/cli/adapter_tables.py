"""What the verbs of `peftune adapters` print: results on stdout, as tables that are not cut in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftune.adapters.edit.combine import CombineResult
from peftune.adapters.edit.extract import ExtractResult
from peftune.adapters.inspect.compare import Comparison
from peftune.adapters.inspect.scan import ScanEntry, ScanResult
from peftune.model.lora import ALL, ATTENTION

_PIPE = 200  # columns where there is no terminal to ask
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Heading of a column: the key of its figure, and how that is written."""


class TablePrinter:
    """Lines and tables for a person; nothing that a user named is taken for markup."""

    def __init__(self) -> None:
        self.console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _PIPE)

    def lines(self, *texts: str) -> None:
        """Lines, which a terminal may wrap."""
        for text in texts:
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

    def figures(self, title: str, first: str, columns: Columns, rows: Mapping[str, Mapping[str, Any]]) -> None:
        """A table of figures by module, or by what `first` says."""
        cells = ([short(name), *(text(row.get(key)) for key, text in columns.values())] for name, row in rows.items())
        self.table(title, (first, *columns), cells)


def print_scan(found: ScanResult) -> None:
    """`peftune adapters list`."""
    printer = TablePrinter()
    usable = [entry for entry in found.entries if not entry.problem]
    broken = [entry for entry in found.entries if entry.problem]
    if not found.entries:
        printer.lines(f"{found.directory}: no adapter here or below")
    if usable:
        columns = ("adapter", "base", "variant", "targets", "rank", "MB", "steps", "held-out loss")
        printer.table(f"{len(usable)} adapters in {found.directory}", columns, map(_row, usable), left=4)
    if broken:
        printer.lines(f"{len(broken)} that cannot be used:", *(f"  {entry.name}: {entry.problem}" for entry in broken))
    if found.cut:
        printer.lines("There may be more: the search ended at its bounds; name a directory further down.")


def _row(entry: ScanEntry) -> list[str]:
    facts = entry.facts
    ranks, step = facts["ranks"], facts["step"]
    span = " to ".join(dict.fromkeys(str(rank) for rank in (*ranks[:1], *ranks[-1:])))
    presets = {ALL: "all", ATTENTION: "attention"}
    loss = ", ".join(f"{domain} {value:.3f}" for domain, value in facts["loss"].items())
    return [
        entry.name, facts["base"] or "not known", facts["variant"],
        presets.get(tuple(facts["targets"]), ", ".join(facts["targets"])), span or "-",
        f"{facts['megabytes']:.2f}", "-" if step is None else f"{step:,}", loss or "-",
    ]  # fmt: skip


def print_combination(result: CombineResult) -> None:
    """`peftune adapters combine`."""
    printer = TablePrinter()
    if result.rank is not None:
        printer.figures("Cut to rank", "module", _COMBINED, result.modules)
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in result.weights.items())
    printer.lines(
        f"{result.out}: {terms}, {result.accuracy}: {len(result.modules)} modules, {result.rank_range}, relative error "
        f"{share(result.relative_error)}"
    )


def print_extraction(result: ExtractResult) -> None:
    """`peftune adapters extract`."""
    printer = TablePrinter()
    printer.figures(f"From {result.base} to {result.tuned}", "module", _EXTRACTED, result.modules)
    if result.unchanged:
        printer.lines(f"not changed by the fine-tune, and so left out: {len(result.unchanged)} modules")
    if result.not_held:
        title = "Changed too, and not in these modules, so the adapter does not hold it"
        printer.figures(title, "what", _NOT_HELD, result.not_held)
    printer.lines(
        *(f"note: {note}" for note in result.notes),
        f"{result.out}: {len(result.modules)} modules of rank {result.rank}; {share(result.relative_error)} of the "
        f"change in them is missing; held of the whole fine-tune, by squared norm: {result.held:.2%}",
    )


def print_comparison(found: Comparison) -> None:
    """`peftune adapters compare`."""
    printer = TablePrinter()
    mismatch = found.base_mismatch
    printer.lines(f"not known to be of one base: {mismatch}" if mismatch else "both are adapters of the same base")
    printer.figures(f"{found.first} and {found.second}", "module", _COMPARED, {**found.modules, "all": found.overall})
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            printer.lines(f"only in the {which}: {', '.join(map(short, names))}")
    if found.differences:
        rows = [[key, _abbreviated(a), _abbreviated(b)] for key, (a, b) in found.differences.items()]
        printer.table("What differs in how they were made", ("", "first", "second"), rows, left=3)
    printer.lines(*(f"note: {note}" for note in found.notes))


def short(module: str) -> str:
    """A module's name without the prefix that all have."""
    return module.removeprefix("transformer.")


def figure(value: float | None, form: str = "#.3g") -> str:
    """Three significant digits, or another form; `-` for None."""
    return "-" if value is None else f"{value:{form}}".rstrip(".")


def share(value: float | None) -> str:
    """A relative size in percent, or by its power of ten where that would read 0; None is one relative to nothing."""
    if value is None:
        return "from 0"
    return f"{value:.2%}" if value >= 1e-4 or value == 0 else f"{value:.1e}"


_COMBINED: Columns = {
    "rank": ("rank", str), "norm of the sum": ("norm", figure), "relative error": ("relative_error", share),
}  # fmt: skip
_CHANGE: Columns = {"norm of the change": ("norm", figure), "of the weight": ("relative_change", share)}
_EXTRACTED: Columns = {"rank": ("rank", str), **_CHANGE, "missing": ("relative_error", share)}
_NOT_HELD: Columns = {"tensors": ("tensors", str), **_CHANGE}
_COMPARED: Columns = {
    "norm, first": ("norm_first", figure), "second": ("norm_second", figure),
    "cosine": ("cosine", lambda value: figure(value, "+.3f")), "distance": ("distance", figure),
    "overlap in": ("overlap_in", figure), "overlap out": ("overlap_out", figure),
}  # fmt: skip


def _abbreviated(value: Any) -> str:
    """One cell of at most 60 characters; a data source by its settings."""
    if isinstance(value, list):
        return _abbreviated(", ".join(_source(item) for item in value))
    text = "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _source(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return " ".join(str(v) if k == "path" else f"{k}={v}" for k, v in item.items() if v is not None)
