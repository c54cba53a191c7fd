"""What is in a corpus, what is wrong with it, and how one packed block of it looks: `peftune data`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftune.config.recipe import Source
from peftune.data.batches import Blocks
from peftune.data.lint import Finding, lint
from peftune.data.packing import Packing
from peftune.data.sources.read import read_documents
from peftune.data.tokens.store import TokenStore, prepare
from peftune.errors import UserError
from peftune.files import check_writable, write_json

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerFast

_BAR = 40  # characters
_SHOWN = 700  # characters of one piece of the preview
_FEW = 20  # documents
_SPANS = 6  # documents of the preview


def run(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_fingerprint: str,
    block_size: int,
    json_path: Path | None = None,
    columns: dict[str, str] | None = None,
    split_on: str = "auto",
    join: str = " ",
) -> None:
    """Print the report on stdout and, if asked for, write it as JSON.

    `columns` maps `text`, `prompt`, `completion`, `messages`, `split` or `subset` to names, for all sources.
    """
    from rich.console import Console

    if json_path is not None:
        check_writable(json_path)
    chosen = [source_of(path, columns) for path in sources]
    report = describe(chosen, tokenizer, tokenizer_fingerprint, block_size, join, split_on)
    if json_path is not None:
        write_json(json_path, report)
    render(report, Console())


def source_of(path: str, columns: dict[str, str] | None = None) -> Source:
    """A `Source` from the command line; UserError for columns that do not go together."""
    try:
        return Source(path=path, **(columns or {}))
    except ValueError as error:
        reason = str(error.errors()[0]["msg"]) if hasattr(error, "errors") else str(error)
        raise UserError(f"{path}: {reason.removeprefix('Value error, ')}") from None


def describe(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerFast,
    tokenizer_fingerprint: str,
    block_size: int,
    join: str = " ",
    split_on: str = "auto",
    cache: Path | None = None,
) -> dict[str, Any]:
    """The whole report as plain values; token counts include both `<|endoftext|>`, bytes are of the scored text."""
    store = prepare(sources, tokenizer, tokenizer_fingerprint, join, split_on, cache)
    packing = Blocks.of(store, np.arange(len(store)), block_size).packing
    findings = lint(chain.from_iterable(read_documents(source, split_on) for source in sources))
    if len(store) < _FEW:
        advice = "a fraction for validation is coarse; if documents were joined, choose split_on"
        findings.append(Finding("very few documents", len(store), sources[0].path, advice))
    return {
        "sources": [source.path for source in sources],
        "documents": len(store),
        "blank": store.blank,
        "duplicates": len(store) - len(np.unique(store.digests)),
        "tokens": int(store.lengths.sum()),
        "supervised_tokens": int(store.supervised_counts.sum()),
        "bytes": int(store.supervised_bytes.sum()),
        "lengths": _lengths(store.lengths),
        "histogram": _histogram(store.lengths),
        "block_size": block_size,
        "blocks": len(packing),
        "fill": packing.fill(),
        "longer_than_block": int((store.lengths > block_size).sum()),
        "findings": [asdict(finding) for finding in findings],
        "preview": preview(store, packing, tokenizer),
        "fingerprint": store.fingerprint,
    }


def preview(store: TokenStore, packing: Packing, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """One block as text: its spans, each cut where scoring begins or ends; a block of several documents if any."""
    several = np.flatnonzero(np.diff(packing.first) > 1)
    block = int(several[0]) if len(several) else 0
    spans = []
    for span in packing.spans(block):
        example, start, stop = (int(a[span]) for a in (packing.example, packing.start, packing.stop))
        ids, scored = store.window(example, start, stop)
        scored[0] = False  # the first token of a span is context: nothing before it predicts it
        cuts = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]
        texts = [
            {"text": tokenizer.backend_tokenizer.decode(ids[a:b].tolist(), False), "supervised": bool(scored[a])}
            for a, b in pairwise(cuts)
        ]
        spans.append({"document": example, "first_token": start, "tokens": stop - start, "pieces": texts})
    return {"block": block, "spans": spans}


def _lengths(lengths: np.ndarray) -> dict[str, float]:
    low, median, high, top = np.percentile(lengths, [0, 50, 95, 100]).tolist()
    return {"min": low, "median": median, "mean": float(lengths.mean()), "p95": high, "max": top}


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents by length in tokens, in powers of two: [from, below)."""
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(powers)
    first = int(powers.min())
    return [{"from": 2**p, "below": 2 ** (p + 1), "documents": int(counts[p])} for p in range(first, len(counts))]


def render(report: dict[str, Any], console: Console) -> None:
    """The report for a person; what is scored stands in colour, or between ⟦ and ⟧ where there is none."""
    _render_numbers(report, console)
    _render_histogram(report, console)
    for finding in report["findings"]:
        what, count, place = finding["what"], finding["documents"], finding["first"]
        console.print(f"! {what}: {count:,} documents, first {place}", style="yellow", markup=False, highlight=False)
        console.print(f"  {finding['advice']}", markup=False, highlight=False)
    _render_preview(report["preview"], console)


def _render_numbers(report: dict[str, Any], console: Console) -> None:
    from rich.table import Table

    lengths = report["lengths"]
    share = report["supervised_tokens"] / report["tokens"]
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("documents", f"{report['documents']:,}"),
        ("  blank, left out", f"{report['blank']:,}"),
        ("  repeats of another", f"{report['duplicates']:,}"),
        ("tokens", f"{report['tokens']:,}"),
        ("  scored", f"{report['supervised_tokens']:,} ({share:.1%})"),
        ("scored text", f"{report['bytes']:,} bytes"),
        ("tokens per document", "{min:,.0f} … {median:,.0f} (median) … {max:,.0f}".format(**lengths)),
        (f"blocks of {report['block_size']:,}", f"{report['blocks']:,}, {report['fill']:.1%} full"),
        ("longer than a block", f"{report['longer_than_block']:,}"),
    ):
        table.add_row(name, value)
    console.print(table, highlight=False)


def _render_histogram(report: dict[str, Any], console: Console) -> None:
    most = max(bin["documents"] for bin in report["histogram"])
    console.print("\ndocuments by length in tokens")
    for bin in report["histogram"]:
        bar = "█" * -(-bin["documents"] * _BAR // most)
        console.print(f"{bin['from']:>9,} … {bin['below'] - 1:<9,} {bar} {bin['documents']:,}", highlight=False)
    console.print()


def _render_preview(shown: dict[str, Any], console: Console) -> None:
    from rich.text import Text

    coloured = console.color_system is not None
    console.print(f"block {shown['block']}: scored text {'is green' if coloured else 'stands between ⟦ and ⟧'}")
    for span in shown["spans"][:_SPANS]:
        begins = "" if span["first_token"] == 0 else f", continued from token {span['first_token']:,}"
        console.rule(f"document {span['document']:,}{begins}, {span['tokens']:,} tokens", align="left")
        text = Text()
        for piece in span["pieces"]:
            words = _legible(piece["text"])
            marked = f"⟦{words}⟧" if piece["supervised"] and not coloured else words
            text.append(marked, style="green" if piece["supervised"] else "dim")
        console.print(text, soft_wrap=True)
    if len(shown["spans"]) > _SPANS:
        console.rule(f"and {len(shown['spans']) - _SPANS} more documents", align="left")


def _legible(text: str) -> str:
    """Control characters as pictures, and only the two ends of a long text."""
    if len(text) > _SHOWN:
        left_out = len(text) - _SHOWN
        text = f"{text[: _SHOWN // 2]} [… {left_out:,} characters …] {text[-_SHOWN // 2 :]}"
    visible = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text)
    return visible.replace("\x7f", "␡")
