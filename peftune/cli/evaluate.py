"""`peftune eval`: the perplexity matrix, or with --routing where prompts are sent; on stdout, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peftune.adapters.base_of import base_of
from peftune.config.recipe import Source
from peftune.console import change
from peftune.files import check_writable, write_json
from peftune.inference.perplexity import evaluate
from peftune.inference.routing_accuracy import measure_routing

Data = Mapping[str, Sequence[Source]]
Matrix = Mapping[str, Mapping[str, Mapping[str, float]]]


def print_matrix(
    base: str | None,
    adapters: Mapping[str, Path],
    data: Data,
    batch: int = 8,
    precision: str = "fp32",
    json_path: Path | None = None,
    block_size: int | None = None,
) -> None:
    """Score the base and each adapter on each domain; `base` None is the one that all adapters name."""
    if json_path is not None:
        check_writable(json_path)
    found = evaluate(base or base_of(*adapters.values()), data, adapters, batch, precision, block_size)
    _report(found, [matrix_table(found["rows"], key) for key in ("perplexity", "bits_per_byte")], json_path)


def print_routing(
    base: str | None,
    adapters: Mapping[str, Path],
    data: Data,
    prompt_tokens: int,
    max_prompts: int,
    threshold: float,
    json_path: Path | None = None,
) -> None:
    """Route held-out prompts of each domain; `base` None is the one that the first adapter names."""
    if json_path is not None:
        check_writable(json_path)
    used = base or base_of(*list(adapters.values())[:1])
    found = measure_routing(used, data, adapters, prompt_tokens, max_prompts, threshold)
    _report(found, [routing_table(found["routing"], [*adapters, "base"])], json_path)


def matrix_table(rows: Matrix, key: str = "perplexity") -> Table:
    """Rows (the base first, then adapters) by domains; the best is green, changes are against the base."""
    title = {"perplexity": "Held-out perplexity (lower is better)", "bits_per_byte": "Bits per byte"}.get(key, key)
    domains = list(next(iter(rows.values())))
    table = _table(title, "model", domains)
    base = rows.get("base")
    for name, figures in rows.items():
        cells = [
            _cell(figures[d][key], base[d][key] if base and name != "base" else None, _is_best(rows, d, key, name))
            for d in domains
        ]
        table.add_row(name, *cells)
    return table


def routing_table(domains: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Domains by where their prompts went, the right ones green."""
    table = _table("Where prompts are sent", "prompts of", [*names, "right"])
    for domain, facts in domains.items():
        cells = [Text(str(facts["to"].get(name, 0)), "green" if name == domain else "") for name in names]
        table.add_row(domain, *cells, f"{facts['accuracy']:.1%}")
    return table


def _report(found: dict[str, Any], tables: Sequence[Table], json_path: Path | None) -> None:
    console = Console(highlight=False)
    for table in tables:
        console.print(table)
    if json_path is not None:
        write_json(json_path, found)


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
    table.add_column(first)
    for column in others:
        table.add_column(column, justify="right")
    return table


def _is_best(rows: Matrix, domain: str, key: str, name: str) -> bool:
    return len(rows) > 1 and rows[name][domain][key] == min(figures[domain][key] for figures in rows.values())


def _cell(value: float, base: float | None, best: bool) -> Text:
    against = f" ({change(value, base)})" if base else ""
    return Text(f"{value:,.2f}{against}", style="bold green" if best else "")
