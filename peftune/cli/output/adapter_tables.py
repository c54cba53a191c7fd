"""What the verbs of `peftune adapters` print: results on stdout, as tables that are not cut in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from peftune.adapters.edit.combine import CombineResult
from peftune.adapters.edit.extract import ExtractResult
from peftune.adapters.imported.import_adapter import ImportResult
from peftune.adapters.inspect.compare import Comparison
from peftune.adapters.inspect.describe import AdapterDescription, ModuleDescription
from peftune.adapters.inspect.scan import ScanEntry, ScanResult
from peftune.adapters.layout import block_of, suffix_in_block
from peftune.adapters.provenance import (
    INIT,
    first_row,
    merged_text,
    recorded,
    recorded_dict,
    recorded_hashes,
    recorded_list,
)
from peftune.cli.output.text_output import print_table, results
from peftune.console import name_some
from peftune.model.lora import ALL, ATTENTION

_BAR = 24
_EFFORT = {"step": "steps", "tokens": "tokens", "seconds": "s"}
Columns = Mapping[str, tuple[str, Callable[[Any], str]]]
"""Heading of a column: the key of its figure, and how that is written."""


def lines(*texts: str) -> None:
    """Print lines, which a terminal may wrap; nothing that a user named is taken for markup."""
    for text in texts:
        results().print(" ".join(text.split("\n")), soft_wrap=True)


def figures(title: str, first: str, columns: Columns, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """Print a table of figures by module, or by what `first` says."""
    cells = ([short(name), *(text(row.get(key)) for key, text in columns.values())] for name, row in rows.items())
    print_table(title, (first, *columns), cells)


def print_scan(found: ScanResult) -> None:
    """`peftune adapters list`."""
    usable = [entry for entry in found.entries if not entry.problem]
    broken = [f"  {entry.name}: {entry.problem}" for entry in found.entries if entry.problem]
    if not found.entries:
        lines(f"{found.directory}: no adapter here or below")
    if usable:
        columns = ("adapter", "base", "variant", "targets", "rank", "MB", "steps", "validation loss")
        print_table(f"{len(usable)} adapters in {found.directory}", columns, map(_row, usable), left=4)
    if broken:
        lines(f"{len(broken)} that cannot be used:", *broken)
    lines(*found.notes())
    if found.cut:
        lines("There may be more: the search ended at its bounds; name a directory further down.")


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
    if result.rank is not None:
        figures("Cut to rank", "module", _COMBINED, result.modules)
    terms = " + ".join(f"{weight:g} x {name}" for name, weight in result.weights.items())
    lines(
        f"{result.out}: {terms}, {result.accuracy}: {len(result.modules)} modules, {result.rank_range}, relative error "
        f"{share(result.relative_error)}"
    )


def print_extraction(result: ExtractResult) -> None:
    """`peftune adapters extract`."""
    figures(f"From {result.base} to {result.tuned}", "module", _EXTRACTED, result.modules)
    if result.unchanged:
        lines(f"not changed by the fine-tune, and so left out: {len(result.unchanged)} modules")
    if result.not_held:
        title = "Changed too, and not in these modules, so the adapter does not hold it"
        figures(title, "what", _NOT_HELD, result.not_held)
    lines(
        *(f"note: {note}" for note in result.notes),
        f"{result.out}: {len(result.modules)} modules of rank {result.rank}; {share(result.relative_error)} of the "
        f"change in them is missing; held of the whole fine-tune, by squared norm: {result.held:.2%}",
    )


def print_import(result: ImportResult) -> None:
    """`peftune adapters import`."""
    if result.relative_error:
        figures("How near each module is", "module", _IMPORTED, result.modules)
    ranks = sorted({module["rank"] for module in result.modules.values()})
    span = " to ".join(dict.fromkeys(str(rank) for rank in (ranks[0], ranks[-1])))
    nearness = f"relative error {share(result.relative_error)}" if result.relative_error else "the same update"
    lines(
        *(f"note: {note}" for note in result.notes),
        f"{result.out}: {result.source} ({result.kind}) for {result.base}, {len(result.modules)} modules, rank {span}, "
        f"{nearness}",
    )


def print_comparison(found: Comparison) -> None:
    """`peftune adapters compare`."""
    mismatch = found.base_mismatch
    lines(f"not known to be of one base: {mismatch}" if mismatch else "both are adapters of the same base")
    figures(f"{found.first} and {found.second}", "module", _COMPARED, {**found.modules, "all": found.overall})
    for which, names in (("first", found.only_first), ("second", found.only_second)):
        if names:
            lines(f"only in the {which}: {', '.join(map(short, names))}")
    if found.differences:
        rows = [[key, _abbreviated(a), _abbreviated(b)] for key, (a, b) in found.differences.items()]
        print_table("What differs in how they were made", ("", "first", "second"), rows, left=3)
    lines(*(f"note: {note}" for note in found.notes))


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
_IMPORTED: Columns = {"rank": ("rank", str), "relative error": ("relative_error", share)}
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
    text = ", ".join(map(_source, value)) if isinstance(value, list) else "-" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _source(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    return " ".join(str(v) if k == "path" else f"{k}={v}" for k, v in item.items() if v is not None)


def print_description(found: AdapterDescription) -> None:
    """`peftune adapters show`; peftune.json may be another program's, so nothing in it is taken for granted."""
    lines(
        f"{found.name}: {found.variant} for {found.base or 'a base that it does not name'}, {len(found.modules)} "
        f"modules, {found.parameters:,} parameters, {found.megabytes:.2f} MB",
        *([f"its base lies in {found.base_place}"] if found.base_place else []),
        *_ranks(found.modules),
    )
    if found.replaced:
        lines(f"trained or stored whole: {', '.join(found.replaced)}")
    if found.rows:
        lines(f"rows of single tokens: {', '.join(f'{count} of {name}' for name, count in found.rows.items())}")
    lines(*_history(found.provenance))
    _print_metrics(recorded_dict(found.provenance, "metrics"))
    _print_norms(found)
    lines(*_provenance(found))


def _ranks(modules: dict[str, ModuleDescription]) -> Iterator[str]:
    groups: dict[tuple[int, float, float], list[str]] = {}
    for name, module in modules.items():
        groups.setdefault((module.rank, module.alpha, module.scale), []).append(short(name))
    for (rank, alpha, scale), names in sorted(groups.items()):
        where = f": {name_some(names, 4)}"
        yield f"rank {rank}, alpha {alpha:g}, scale {scale:.4g}{where if len(groups) > 1 else ''}"


def _history(provenance: dict[str, Any] | None) -> Iterator[str]:
    """What it was trained on, or made of, as far as peftune.json says."""
    if provenance is None:
        yield "no peftune.json: what it was trained on, for how long and how well is not known"
    sources = recorded(provenance, "recipe", "data", "train")
    if isinstance(sources, list):
        paths = ", ".join(str(source["path"]) for source in sources if isinstance(source, dict) and "path" in source)
        efforts = {unit: recorded(provenance, key) for key, unit in _EFFORT.items()}
        effort = [f"{value:,.0f} {unit}" for unit, value in efforts.items() if isinstance(value, int | float)]
        base = [f"base in {dtype}" for dtype in [recorded(provenance, "recipe", "quantize")] if dtype]
        yield f"trained on {paths}: {', '.join([*effort, str((provenance or {}).get('precision', '')), *base])}"
    for earlier in recorded_list(provenance, INIT):
        step = f", step {earlier['step']}" if isinstance(earlier.get("step"), int) else ""
        yield f"training went on from {earlier.get('adapter')} ({str(earlier.get('adapter_fingerprint'))[:12]}{step})"
    if merged := recorded_list(provenance, "base_merged"):
        yield f"its base is {merged_text(merged)}, and it is relative to that"
    combined = recorded(provenance, "combined", "adapters")
    for part in combined if isinstance(combined, list) else []:
        weight, name, fingerprint = (recorded(part, key) for key in ("weight", "adapter", "fingerprint"))
        yield f"combined from {weight} of {name} ({str(fingerprint)[:12]})"
    tuned = recorded(provenance, "extracted", "tuned")
    if tuned is not None:
        yield f"extracted from {tuned} ({str(recorded(provenance, 'extracted', 'tuned_fingerprint'))[:12]})"
    for error in (recorded(provenance, key, "relative_error") for key in ("combined", "extracted")):
        if isinstance(error, int | float):
            yield f"relative error when it was made: {share(error)}"


def _print_metrics(metrics: dict[str, Any]) -> None:
    rows, before = [], "base"
    for domain, of in metrics.items():
        first = first_row(of)
        before = "at the start" if first == INIT else before
        values = [recorded(of, model, key) for key in ("loss", "perplexity") for model in (first, "adapter")]
        rows.append([domain, *(f"{value:,.3f}" if isinstance(value, int | float) else "-" for value in values)])
    if rows:
        columns = ["validated on", f"loss, {before}", "with adapter", f"perplexity, {before}", "with adapter"]
        print_table("How well", columns, rows)


def _print_norms(found: AdapterDescription) -> None:
    cells: dict[tuple[str, str], str] = {}
    for name, module in found.modules.items():
        relative = "" if module.relative is None else f" ({share(module.relative)})"
        cells[block_of(name), suffix_in_block(name) or "outside"] = figure(module.norm) + relative
    columns = sorted({name for _, name in cells}, key=lambda name: ALL.index(name) if name in ALL else len(ALL))
    layers = found.layers()
    largest = max(layers.values(), default=0.0) or 1.0
    rows = []
    for block, norm in layers.items():
        bar = "█" * round(norm / largest * _BAR) or "▏"
        rows.append([block, *(cells.get((block, name), "-") for name in columns), figure(norm), bar])
    if rows:
        measured = any(module.relative is not None for module in found.modules.values())
        title = f"Norm {found.norms_are}, by block{' (and in % of the norm of the weight)' if measured else ''}"
        print_table(title, ("block", *columns, "all", ""), rows)


def _provenance(found: AdapterDescription) -> Iterator[str]:
    provenance = found.provenance or {}
    fingerprints = {
        "adapter": found.fingerprint, "base": provenance.get("base_fingerprint"),
        "tokenizer": provenance.get("tokenizer_fingerprint"),
        **{f"data {name}": value for name, value in recorded_dict(provenance, "data_fingerprints").items()},
    }  # fmt: skip
    yield "fingerprints: " + ", ".join(f"{name} {str(value)[:12]}" for name, value in fingerprints.items() if value)
    hashes = "match what was recorded" if recorded_hashes(provenance) else "not recorded, so damage would not show"
    yield f"SHA-256 of its files: {hashes}"
    versions = {"peftune": provenance.get("peftune"), **recorded_dict(provenance, "versions")}
    if provenance:
        yield "made with: " + ", ".join(f"{name} {value}" for name, value in versions.items() if value)
