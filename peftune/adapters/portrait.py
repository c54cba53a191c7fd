"""What `peftune adapters show` prints of one adapter."""

from __future__ import annotations

from typing import Any

from peftune.adapters.anatomy import Anatomy, Module, layer_of
from peftune.adapters.tables import Printer
from peftune.model.lora import ALL

_BAR = 24
_MODELS = ("base", "adapter")


def print_anatomy(found: Anatomy) -> None:
    """`peftune adapters show`."""
    printer = Printer()
    printer.line(
        f"{found.name}: {found.variant} for {found.base or 'a base that it does not name'}, {len(found.modules)} "
        f"modules, {found.parameters:,} parameters, {found.megabytes:.2f} MB"
    )
    for line in _ranks(found.modules):
        printer.line(line)
    if found.whole:
        printer.line(f"trained or stored whole: {', '.join(found.whole)}")
    for line in _history(found.provenance):
        printer.line(line)
    _print_metrics(printer, (found.provenance or {}).get("metrics"))
    _print_norms(printer, found)
    for line in _provenance(found):
        printer.line(line)


def _ranks(modules: dict[str, Module]) -> list[str]:
    groups: dict[tuple[int, float, float], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((module.rank, module.alpha, module.scale), []).append(name.removeprefix("transformer."))
    lines = []
    for (rank, alpha, scale), names in sorted(groups.items()):
        where = f": {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        lines.append(f"rank {rank}, alpha {alpha:g}, scale {scale:.4g}{where if len(groups) > 1 else ''}")
    return lines


def _history(recorded: dict[str, Any] | None) -> list[str]:
    """What it was trained on, or made of."""
    if recorded is None:
        return ["no peftune.json: what it was trained on, for how long and how well is not known"]
    lines = []
    recipe = recorded.get("recipe")
    if isinstance(recipe, dict):
        sources = ", ".join(str(source["path"]) for source in recipe["data"]["train"])
        held = f", base in {recipe['quantize']}" if recipe.get("quantize") else ""
        lines.append(
            f"trained on {sources}: {recorded['step']:,} steps, {recorded['tokens']:,} tokens, "
            f"{recorded['seconds']:,.0f} s, {recorded['precision']}{held}"
        )
    for part in recorded.get("combined", {}).get("adapters", []):
        lines.append(f"combined from {part['weight']:g} of {part['adapter']} ({part['fingerprint'][:12]})")
    made = recorded.get("extracted")
    if made is not None:
        lines.append(f"extracted from {made['tuned']} ({made['tuned_fingerprint'][:12]})")
    for key in ("combined", "extracted"):
        if key in recorded:
            lines.append(f"relative error when it was made: {recorded[key]['relative_error']:.1e}")
    return lines


def _print_metrics(printer: Printer, metrics: Any) -> None:
    if not isinstance(metrics, dict) or not metrics:
        return
    rows = [
        [domain, *(f"{r[key]:,.3f}" if r else "-" for key in ("loss", "perplexity") for r in map(rows.get, _MODELS))]
        for domain, rows in metrics.items()
    ]
    columns = ("held-out domain", "loss, base", "with adapter", "perplexity, base", "with adapter")
    printer.table("How well", columns, rows)


def _print_norms(printer: Printer, found: Anatomy) -> None:
    inside = sorted({_inside(name) for name in found.modules}, key=lambda n: ALL.index(n) if n in ALL else len(ALL))
    cells = {(layer_of(name), _inside(name)): module for name, module in found.modules.items()}
    layers = found.layers()
    strongest = max(layers.values(), default=0.0) or 1.0
    rows = [
        [layer, *(_norm(cells.get((layer, name))) for name in inside), f"{size:.3g}", _bar(size / strongest)]
        for layer, size in layers.items()
    ]
    if rows:
        relative = any(module.relative is not None for module in found.modules.values())
        title = f"Norm {found.norms_are}, by block{' (and in % of the norm of the weight)' if relative else ''}"
        printer.table(title, ("block", *inside, "all", ""), rows)


def _inside(name: str) -> str:
    return name.split(".", 3)[3] if ".h." in name else "outside"


def _norm(module: Module | None) -> str:
    if module is None:
        return "-"
    return f"{module.norm:.3g}" + (f" ({module.relative:.2%})" if module.relative is not None else "")


def _bar(share: float) -> str:
    return "█" * round(share * _BAR) or "▏"


def _provenance(found: Anatomy) -> list[str]:
    recorded = found.provenance or {}
    prints = {
        "adapter": found.fingerprint, "base": recorded.get("base_fingerprint"),
        "tokenizer": recorded.get("tokenizer_fingerprint"),
        **{f"data {name}": value for name, value in recorded.get("data_fingerprints", {}).items()},
    }  # fmt: skip
    lines = ["fingerprints: " + ", ".join(f"{name} {value[:12]}" for name, value in prints.items() if value)]
    versions = {"peftune": recorded.get("peftune"), **recorded.get("versions", {})}
    if recorded:
        lines.append("made with: " + ", ".join(f"{name} {value}" for name, value in versions.items() if value))
    return lines
