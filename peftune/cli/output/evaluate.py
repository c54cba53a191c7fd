"""The tables of `peftune eval`: the perplexity matrix, or with --routing where prompts are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Column, Table
from rich.text import Text

from peftune.cli.output.text_output import echo
from peftune.console import SafeConsole, change

Matrix = Mapping[str, Mapping[str, Mapping[str, float]]]


def print_tables(*tables: Table) -> None:
    """Show tables on stdout."""
    console = SafeConsole(highlight=False)
    for table in tables:
        console.print(table)


def matrix_table(rows: Matrix, key: str = "perplexity") -> Table:
    """Rows (the base first, then adapters) by domains; the best is green, changes are against the base."""
    title = {"perplexity": "Perplexity (lower is better)", "bits_per_byte": "Bits per byte"}.get(key, key)
    domains = list(next(iter(rows.values())))
    table = _table(title, "model", domains)
    best = {domain: min(figures[domain][key] for figures in rows.values()) for domain in domains}
    for name, figures in rows.items():
        cells = []
        for domain in domains:
            value, base = figures[domain][key], rows["base"][domain][key]
            against = f" ({change(value, base)})" if name != "base" and base else ""
            is_best = len(rows) > 1 and value == best[domain]
            cells.append(Text(f"{value:,.2f}{against}", "bold green" if is_best else ""))
        table.add_row(name, *cells)
    return table


def print_not_held_out(found: Mapping[str, Any]) -> None:
    """Of which adapters the figures on which domain are those of text that they were trained on."""
    for adapter, domains in found.get("trained_on", {}).items():
        for domain, (known, told) in domains.items():
            echo(
                f"{domain} is not held out for {adapter}: it was trained on {known:,} of the {told:,} documents that "
                "its record tells of"
            )


def routing_table(domains: Mapping[str, Mapping[str, Any]], names: Sequence[str]) -> Table:
    """Domains by where their prompts went, the right ones green."""
    table = _table("Where prompts are sent", "prompts of", [*names, "right"])
    for domain, facts in domains.items():
        cells = [Text(str(facts["to"].get(name, 0)), "green" if name == domain else "") for name in names]
        table.add_row(domain, *cells, f"{facts['accuracy']:.1%}")
    return table


def print_routing(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """What `measure_routing` found: the table, and below it both errors here and at the calibrated threshold."""
    print_tables(routing_table(found["routing"], names))
    says = {
        "false_accept": "of the prompts of no domain go to an adapter",
        "false_reject": "of the prompts of a domain go to the base",
    }
    for which, errors in (("threshold", found), ("calibrated: threshold", found.get("calibrated"))):
        if errors is not None:
            shares = [
                f"{share:.1%} {says[name]}" for name, share in errors.get("errors", errors).items() if name in says
            ]
            echo(f"{which} {errors['threshold']:g}: {', '.join(shares)}")


def _table(title: str, first: str, others: Sequence[str]) -> Table:
    columns = (Column(first), *(Column(other, justify="right") for other in others))
    return Table(*columns, title=title, title_justify="left", title_style="bold", header_style="bold", pad_edge=False)
