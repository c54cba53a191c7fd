"""The tables of `peftune eval`: the perplexity matrix, or with --routing where prompts are sent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from peftune.cli.output.text_output import echo, print_table
from peftune.console import change

Matrix = Mapping[str, Mapping[str, Mapping[str, float]]]


def print_matrix(rows: Matrix, key: str = "perplexity") -> None:
    """Print rows (the base first, then adapters) by domains; the best is green, changes are against the base."""
    title = {"perplexity": "Perplexity (lower is better)", "bits_per_byte": "Bits per byte"}.get(key, key)
    domains = list(next(iter(rows.values())))
    table = _table("model", domains)
    best = {domain: min(figures[domain][key] for figures in rows.values()) for domain in domains}
    for name, figures in rows.items():
        cells = []
        for domain in domains:
            value, base = figures[domain][key], rows["base"][domain][key]
            against = f" ({change(value, base)})" if name != "base" and base else ""
            is_best = len(rows) > 1 and value == best[domain]
            cells.append(Text(f"{value:,.2f}{against}", "bold green" if is_best else ""))
        table.add_row(Text(name), *cells)
    print_table(title, table)


def print_not_held_out(found: Mapping[str, Any]) -> None:
    """Of which adapters the figures on which domain are those of text that they were trained on."""
    for adapter, domains in found.get("trained_on", {}).items():
        for domain, (known, told) in domains.items():
            echo(
                f"{domain} is not held out for {adapter}: it was trained on {known:,} of the {told:,} documents that "
                "its record tells of"
            )


def print_routing(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Print what `measure_routing` found: where prompts went, and both errors here and at the calibrated threshold."""
    table = _table("prompts of", [*names, "right"])
    for domain, facts in found["routing"].items():
        cells = [Text(str(facts["to"].get(name, 0)), "green" if name == domain else "") for name in names]
        table.add_row(Text(domain), *cells, f"{facts['accuracy']:.1%}")
    print_table("Where prompts are sent", table)
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


def _table(first: str, others: Sequence[str]) -> Table:
    columns = (Column(first, overflow="fold"), *(Column(escape(o), justify="right", overflow="fold") for o in others))
    return Table(*columns, header_style="bold", pad_edge=False)
