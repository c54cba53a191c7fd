"""What `peftune adapters show` prints of one adapter."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftune.adapters.inspect.describe import AdapterDescription, ModuleDescription
from peftune.adapters.layout import block_of, suffix_in_block
from peftune.adapters.provenance import recorded, recorded_dict
from peftune.cli.adapter_tables import TablePrinter, figure, share, short
from peftune.model.lora import ALL

_BAR = 24
_EFFORT = {"step": "steps", "tokens": "tokens", "seconds": "s"}


def print_description(found: AdapterDescription) -> None:
    """`peftune adapters show`; peftune.json may be another program's, so nothing in it is taken for granted."""
    printer = TablePrinter()
    printer.lines(
        f"{found.name}: {found.variant} for {found.base or 'a base that it does not name'}, {len(found.modules)} "
        f"modules, {found.parameters:,} parameters, {found.megabytes:.2f} MB",
        *_ranks(found.modules),
    )
    if found.replaced:
        printer.lines(f"trained or stored whole: {', '.join(found.replaced)}")
    printer.lines(*_history(found.provenance))
    _print_metrics(printer, recorded_dict(found.provenance, "metrics"))
    _print_norms(printer, found)
    printer.lines(*_provenance(found))


def _ranks(modules: dict[str, ModuleDescription]) -> Iterator[str]:
    groups: dict[tuple[int, float, float], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((module.rank, module.alpha, module.scale), []).append(short(name))
    for (rank, alpha, scale), names in sorted(groups.items()):
        where = f": {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        yield f"rank {rank}, alpha {alpha:g}, scale {scale:.4g}{where if len(groups) > 1 else ''}"


def _history(provenance: dict[str, Any] | None) -> Iterator[str]:
    """What it was trained on, or made of, as far as peftune.json says."""
    if provenance is None:
        yield "no peftune.json: what it was trained on, for how long and how well is not known"
    sources = recorded(provenance, "recipe", "data", "train")
    if isinstance(sources, list):
        paths = ", ".join(str(source["path"]) for source in sources if isinstance(source, dict) and "path" in source)
        effort = [
            f"{recorded(provenance, key):,.0f} {unit}"
            for key, unit in _EFFORT.items()
            if _is_number(recorded(provenance, key))
        ]
        base = [f"base in {dtype}" for dtype in [recorded(provenance, "recipe", "quantize")] if dtype]
        yield f"trained on {paths}: {', '.join([*effort, str((provenance or {}).get('precision', '')), *base])}"
    combined = recorded(provenance, "combined", "adapters")
    for part in combined if isinstance(combined, list) else []:
        weight, name, fingerprint = (recorded(part, key) for key in ("weight", "adapter", "fingerprint"))
        yield f"combined from {weight} of {name} ({str(fingerprint)[:12]})"
    tuned = recorded(provenance, "extracted", "tuned")
    if tuned is not None:
        yield f"extracted from {tuned} ({str(recorded(provenance, 'extracted', 'tuned_fingerprint'))[:12]})"
    for error in (recorded(provenance, key, "relative_error") for key in ("combined", "extracted")):
        if _is_number(error):
            yield f"relative error when it was made: {share(error)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _print_metrics(printer: TablePrinter, metrics: dict[str, Any]) -> None:
    columns = ("held-out domain", "loss, base", "with adapter", "perplexity, base", "with adapter")
    rows = []
    for domain, of in metrics.items():
        values = [recorded(of, model, key) for key in ("loss", "perplexity") for model in ("base", "adapter")]
        rows.append([domain, *(f"{value:,.3f}" if _is_number(value) else "-" for value in values)])
    if rows:
        printer.table("How well", columns, rows)


def _print_norms(printer: TablePrinter, found: AdapterDescription) -> None:
    cells = {(block_of(name), _column(name)): _norm(module) for name, module in found.modules.items()}
    columns = sorted({name for _, name in cells}, key=lambda name: ALL.index(name) if name in ALL else len(ALL))
    layers = found.layers()
    largest = max(layers.values(), default=0.0) or 1.0
    rows = []
    for block, norm in layers.items():
        by_module = [cells.get((block, name), "-") for name in columns]
        rows.append([block, *by_module, figure(norm), "█" * round(norm / largest * _BAR) or "▏"])
    if rows:
        relative = any(module.relative is not None for module in found.modules.values())
        title = f"Norm {found.norms_are}, by block{' (and in % of the norm of the weight)' if relative else ''}"
        printer.table(title, ("block", *columns, "all", ""), rows)


def _column(module: str) -> str:
    return suffix_in_block(module) or "outside"


def _norm(module: ModuleDescription) -> str:
    return figure(module.norm) + (f" ({share(module.relative)})" if module.relative is not None else "")


def _provenance(found: AdapterDescription) -> Iterator[str]:
    provenance = found.provenance or {}
    fingerprints = {
        "adapter": found.fingerprint, "base": provenance.get("base_fingerprint"),
        "tokenizer": provenance.get("tokenizer_fingerprint"),
        **{f"data {name}": value for name, value in recorded_dict(provenance, "data_fingerprints").items()},
    }  # fmt: skip
    yield "fingerprints: " + ", ".join(f"{name} {str(value)[:12]}" for name, value in fingerprints.items() if value)
    versions = {"peftune": provenance.get("peftune"), **recorded_dict(provenance, "versions")}
    if provenance:
        yield "made with: " + ", ".join(f"{name} {value}" for name, value in versions.items() if value)
