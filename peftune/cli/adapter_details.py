"""What `peftune adapters show` prints of one adapter."""

from __future__ import annotations

from typing import Any

from peftune.adapters.inspect.describe import AdapterDescription, ModuleDescription, layer_of
from peftune.cli.adapter_tables import TablePrinter, figure, share
from peftune.model.lora import ALL

_BAR = 24


def print_description(found: AdapterDescription) -> None:
    """`peftune adapters show`."""
    printer = TablePrinter()
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


def _ranks(modules: dict[str, ModuleDescription]) -> list[str]:
    groups: dict[tuple[int, float, float], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((module.rank, module.alpha, module.scale), []).append(name.removeprefix("transformer."))
    lines = []
    for (rank, alpha, scale), names in sorted(groups.items()):
        where = f": {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        lines.append(f"rank {rank}, alpha {alpha:g}, scale {scale:.4g}{where if len(groups) > 1 else ''}")
    return lines


def _history(recorded: dict[str, Any] | None) -> list[str]:
    """What it was trained on, or made of, as far as peftune.json says."""
    if recorded is None:
        return ["no peftune.json: what it was trained on, for how long and how well is not known"]
    lines = []
    sources = _at(recorded, "recipe", "data", "train")
    if isinstance(sources, list):
        told = ", ".join(str(source["path"]) for source in sources if isinstance(source, dict) and "path" in source)
        effort = [f"{recorded[key]:,.0f} {unit}" for key, unit in _EFFORT.items() if _is_number(recorded.get(key))]
        held = [f"base in {kind}" for kind in [_at(recorded, "recipe", "quantize")] if kind]
        lines.append(f"trained on {told}: {', '.join([*effort, str(recorded.get('precision', '')), *held])}")
    parts = _at(recorded, "combined", "adapters")
    for part in parts if isinstance(parts, list) else []:
        weight, name, fingerprint = (_at(part, key) for key in ("weight", "adapter", "fingerprint"))
        lines.append(f"combined from {weight} of {name} ({str(fingerprint)[:12]})")
    tuned = _at(recorded, "extracted", "tuned")
    if tuned is not None:
        lines.append(f"extracted from {tuned} ({str(_at(recorded, 'extracted', 'tuned_fingerprint'))[:12]})")
    errors = [_at(recorded, key, "relative_error") for key in ("combined", "extracted")]
    return lines + [f"relative error when it was made: {share(error)}" for error in errors if _is_number(error)]


_EFFORT = {"step": "steps", "tokens": "tokens", "seconds": "s"}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _at(recorded: Any, *keys: str) -> Any:
    """The entry below these keys, or None."""
    for key in keys:
        recorded = recorded.get(key) if isinstance(recorded, dict) else None
    return recorded


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _print_metrics(printer: TablePrinter, metrics: Any) -> None:
    if not isinstance(metrics, dict) or not metrics:
        return
    rows = [
        [domain, *(_metric(_at(models, model, key)) for key in ("loss", "perplexity") for model in ("base", "adapter"))]
        for domain, models in metrics.items()
    ]
    columns = ("held-out domain", "loss, base", "with adapter", "perplexity, base", "with adapter")
    printer.table("How well", columns, rows)


def _metric(value: Any) -> str:
    return f"{value:,.3f}" if _is_number(value) else "-"


def _print_norms(printer: TablePrinter, found: AdapterDescription) -> None:
    inside = sorted({_inside(name) for name in found.modules}, key=lambda n: ALL.index(n) if n in ALL else len(ALL))
    cells = {(layer_of(name), _inside(name)): module for name, module in found.modules.items()}
    layers = found.layers()
    strongest = max(layers.values(), default=0.0) or 1.0
    rows = [
        [layer, *(_norm(cells.get((layer, name))) for name in inside), figure(size), _bar(size / strongest)]
        for layer, size in layers.items()
    ]
    if rows:
        relative = any(module.relative is not None for module in found.modules.values())
        title = f"Norm {found.norms_are}, by block{' (and in % of the norm of the weight)' if relative else ''}"
        printer.table(title, ("block", *inside, "all", ""), rows)


def _inside(name: str) -> str:
    return name.split(".", 3)[3] if ".h." in name else "outside"


def _norm(module: ModuleDescription | None) -> str:
    if module is None:
        return "-"
    return figure(module.norm) + (f" ({share(module.relative)})" if module.relative is not None else "")


def _bar(share: float) -> str:
    return "█" * round(share * _BAR) or "▏"


def _provenance(found: AdapterDescription) -> list[str]:
    recorded = found.provenance or {}
    prints = {
        "adapter": found.fingerprint, "base": recorded.get("base_fingerprint"),
        "tokenizer": recorded.get("tokenizer_fingerprint"),
        **{f"data {name}": value for name, value in _mapping(recorded.get("data_fingerprints")).items()},
    }  # fmt: skip
    lines = ["fingerprints: " + ", ".join(f"{name} {str(value)[:12]}" for name, value in prints.items() if value)]
    versions = {"peftune": recorded.get("peftune"), **_mapping(recorded.get("versions"))}
    if recorded:
        lines.append("made with: " + ", ".join(f"{name} {value}" for name, value in versions.items() if value))
    return lines
