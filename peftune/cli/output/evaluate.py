"""The tables of `peftune eval` and `peftune score`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from peftune.cli.output.text_output import echo, print_table
from peftune.console import change

Matrix = Mapping[str, Mapping[str, Mapping[str, float]]]


def print_matrix(rows: Matrix, key: str = "perplexity") -> None:
    """Print rows (the base first, then adapters) by domains; the best is green, changes are against the base."""
    title = {"perplexity": "Perplexity (lower is better)", "bits_per_byte": "Bits per byte"}.get(key, key)
    best = {domain: min(figures[domain][key] for figures in rows.values()) for domain in rows["base"]}

    def cell(name: str, domain: str) -> Text:
        value, base = rows[name][domain][key], rows["base"][domain][key]
        against = f" ({change(value, base)})" if name != "base" and base else ""
        is_best = len(rows) > 1 and value == best[domain]
        return Text(f"{value:,.2f}{against}", "bold green" if is_best else "")

    print_table(title, ["model", *best], ([name, *(cell(name, domain) for domain in best)] for name in rows))


def print_not_held_out(found: Mapping[str, Any]) -> None:
    """Of which adapters the figures on which domain are those of text that they were trained on."""
    for adapter, domains in found.get("trained_on", {}).items():
        for domain, (known, told) in domains.items():
            echo(
                f"{domain} is not held out for {adapter}: it was trained on {known:,} of the {told:,} documents that "
                "its record tells of"
            )


def print_intervals(found: Mapping[str, Any]) -> None:
    """Print what `evaluate` found, with 95 % intervals: perplexities, and the change of the loss against the base.

    Green is surely better than the base, red surely worse: on another domain than its own, what an adapter forgot.
    """
    title = "With 95 % intervals over documents; against the base in nats per token, below 0 is better"
    rows = []
    for domain, facts in found["domains"].items():
        for name, row in found["intervals"].items():
            against = row[domain].get("against_base")
            low, high = against["interval"] or (0, 0) if against else (0, 0)
            style = "green" if high < 0 else "red" if low > 0 else ""
            change = _with_interval(against["loss"], against["interval"], "+.4f") if against else ""
            perplexity = _with_interval(found["rows"][name][domain]["perplexity"], row[domain]["perplexity"], ",.2f")
            begins = [domain, f"{facts['documents']:,}"] if name == "base" else ["", ""]
            rows.append([*begins, name, perplexity, Text(change, style)])
    print_table(title, ["domain", "documents", "model", "perplexity", "against the base"], rows)


def print_memorised(found: Mapping[str, Any]) -> None:
    """Print training texts by models: how many windows greedy decoding reproduces."""
    window = found["window"]
    title = f"Memorised: {window['continued']} tokens reproduced after {window['prompt']} of training text"
    rows = []
    for source in found["memorised"]["base"]:
        for name, row in found["memorised"].items():
            facts = row[source]
            share = _with_interval(facts["share"], facts["interval"], ".1%")
            begins = [source, f"{facts['windows']:,}"] if name == "base" else ["", ""]
            rows.append([*begins, name, f"{facts['reproduced']:,}", share])
    print_table(title, ["training text", "windows", "model", "reproduced", "share"], rows)


def print_scores(found: Mapping[str, Any]) -> None:
    """Print systems by metrics with 95 % intervals, from the second system on also against the first."""
    systems = found["systems"]
    title = f"{found['items']:,} items, {found['references']:,} references; 95 % intervals over items"
    rows = []
    for name, scores in systems.items():
        for metric, facts in scores.items():
            begins = [name if metric == next(iter(scores)) else "", metric]
            against = facts.get("against")
            compared = _with_interval(against["score"], against["interval"], "+,.2f") if against else ""
            rows.append([*begins, _with_interval(facts["score"], facts.get("interval"), ",.2f"), compared])
    columns = ["texts", "metric", "score", f"against {next(iter(systems))}"]
    shown = len(columns) if len(systems) > 1 else len(columns) - 1
    print_table(title, columns[:shown], (row[:shown] for row in rows))


def _with_interval(value: float, interval: Sequence[float] | None, form: str) -> str:
    if interval is None:
        return f"{value:{form}}"
    return f"{value:{form}} [{interval[0]:{form}}, {interval[1]:{form}}]"


def print_routing(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Print what `measure_routing` found: where prompts went, and both errors here and at the calibrated threshold."""
    rows = []
    for domain, facts in found["routing"].items():
        sent = [Text(str(facts["to"].get(name, 0)), "green" if name == domain else "") for name in names]
        rows.append([domain, *sent, f"{facts['accuracy']:.1%}"])
    print_table("Where prompts are sent", ["prompts of", *names, "right"], rows)
    says = {
        "false_accept": "of the prompts of no domain go to an adapter",
        "false_reject": "of the prompts of a domain go to the base",
    }
    for which, errors in (("threshold", found), ("calibrated: threshold", found.get("calibrated"))):
        if errors is not None:
            shares = errors.get("errors", errors).items()
            told = ", ".join(f"{share:.1%} {says[name]}" for name, share in shares if name in says)
            echo(f"{which} {errors['threshold']:g}: {told}")
