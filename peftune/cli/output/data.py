"""`peftune data`: the summary of a corpus as tables, a histogram and a preview, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from peftune.cli.options import save_json
from peftune.console import SafeConsole

if TYPE_CHECKING:
    from peftune.config.data_section import Source
    from peftune.model.base import Base

_BAR_WIDTH = 40  # characters
_TEXT_LIMIT = 700  # characters shown of one part of the preview
_SPAN_LIMIT = 6  # documents shown of the preview


def run(
    sources: list[Source],
    base: Base,
    block_size: int | None,
    split_on: str = "auto",
    json_path: Path | None = None,
    special_tokens: str = "text",
    chat: str = "plain",
) -> None:
    """Print the summary on stdout and, if asked for, write it as JSON; blocks are as long as the context by default."""
    from peftune.data.summary import summarize

    block_size = block_size or base.config.n_positions
    tokenizer, fingerprint = base.tokenizer, base.tokenizer_fingerprint
    options = split_on, None, special_tokens, chat
    summary = summarize(sources, tokenizer, fingerprint, block_size, " ", *options)
    save_json(json_path, summary)
    render(summary, SafeConsole())


def render(summary: dict[str, Any], console: SafeConsole) -> None:
    """Print a summary; what is scored is in colour, or between ⟦ and ⟧ where there is none."""
    _render_numbers(summary, console)
    _render_histogram(summary, console)
    for finding in summary["findings"]:
        problem = "! {what}: {documents:,} documents, first {first}".format(**finding)
        console.print(problem, style="yellow", markup=False, highlight=False)
        console.print(f"  {finding['advice']}", markup=False, highlight=False)
    _render_preview(summary["preview"], console)


def _render_numbers(summary: dict[str, Any], console: SafeConsole) -> None:
    share = summary["supervised_tokens"] / summary["tokens"]
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in (
        ("documents", f"{summary['documents']:,}"),
        ("  blank, left out", f"{summary['blank']:,}"),
        ("  repeats of another", f"{summary['duplicates']:,}"),
        ("tokens", f"{summary['tokens']:,}"),
        ("  scored", f"{summary['supervised_tokens']:,} ({share:.1%})"),
        ("scored text", f"{summary['bytes']:,} bytes"),
        ("tokens per document", "{min:,.0f} … {median:,.0f} (median) … {max:,.0f}".format(**summary["lengths"])),
        (f"blocks of {summary['block_size']:,}", f"{summary['blocks']:,}, {summary['fill']:.1%} full"),
        ("longer than a block", f"{summary['longer_than_block']:,}"),
    ):
        table.add_row(name, value)
    console.print(table, highlight=False)


def _render_histogram(summary: dict[str, Any], console: SafeConsole) -> None:
    most = max(bin["documents"] for bin in summary["histogram"])
    console.print("\ndocuments by length in tokens")
    for bin in summary["histogram"]:
        bar = "█" * -(-bin["documents"] * _BAR_WIDTH // most)
        console.print(f"{bin['from']:>9,} … {bin['below'] - 1:<9,} {bar} {bin['documents']:,}", highlight=False)
    console.print()


def _render_preview(preview: dict[str, Any], console: SafeConsole) -> None:
    coloured = console.color_system is not None
    console.print(f"block {preview['block']}: scored text {'is green' if coloured else 'stands between ⟦ and ⟧'}")
    for span in preview["spans"][:_SPAN_LIMIT]:
        begins = "" if span["first_token"] == 0 else f", continued from token {span['first_token']:,}"
        console.rule(f"document {span['document']:,}{begins}, {span['tokens']:,} tokens", align="left")
        text = Text()
        for part in span["pieces"]:
            scored, words = part["supervised"], _legible(part["text"])
            text.append(f"⟦{words}⟧" if scored and not coloured else words, style="green" if scored else "dim")
        console.print(text, soft_wrap=True)
    if len(preview["spans"]) > _SPAN_LIMIT:
        console.rule(f"and {len(preview['spans']) - _SPAN_LIMIT} more documents", align="left")


def _legible(text: str) -> str:
    """Control characters as pictures, and only the two ends of a long text."""
    if len(text) > _TEXT_LIMIT:
        left_out = len(text) - _TEXT_LIMIT
        text = f"{text[: _TEXT_LIMIT // 2]} [… {left_out:,} characters …] {text[-_TEXT_LIMIT // 2 :]}"
    visible = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text)
    return visible.replace("\x7f", "␡")
