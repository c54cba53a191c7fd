"""`peftune data`: the summary of a corpus as tables, a histogram and a preview, and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from peftune.cli.options import save_json
from peftune.cli.output.text_output import results
from peftune.console import SafeConsole
from peftune.errors import UserError

if TYPE_CHECKING:
    from peftune.config.data_section import DataSection
    from peftune.model.base import Base

_BAR_WIDTH = 40  # characters
_RULE = 80  # columns of a line between documents
_TEXT_LIMIT = 700  # characters shown of one part of the preview
_FILE_LIMIT = 20  # text files shown one by one
_SPAN_LIMIT = 6  # documents shown of the preview


def run(
    how: DataSection, base: Base, block_size: int | None, json_path: Path | None = None, fix: Path | None = None
) -> None:
    """Print the summary of what `how` trains on and, if asked for, write it as JSON; by default a block is the context.

    With `fix` a cleaned copy of the sources is written there. UserError for bad rows, after what the others are.
    """
    from peftune.data.lint.clean import DATA, write_clean
    from peftune.data.summary import summarize

    told = [] if fix is None else [f"  {line}" for line in write_clean(how, fix).lines()]
    of_base = base.tokenizer, base.tokenizer_fingerprint, base.block_size(block_size)
    refused = None
    try:
        summary = summarize(how, *of_base)
    except UserError as error:
        refused, skipping = error, [one.model_copy(update={"on_bad_row": "skip"}) for one in how.train]
        try:  # to show what else there is
            summary = summarize(how.model_copy(update={"train": skipping}), *of_base)
        except UserError:
            raise error from None
    save_json(json_path, summary)
    render(summary, results())
    if fix is not None:
        for line in (f"{fix}: a cleaned copy is in {fix / DATA}, what was done in report.txt and report.json", *told):
            results().print(line, soft_wrap=True)
    if refused is not None:
        raise refused


def render(summary: dict[str, Any], console: SafeConsole) -> None:
    """Print a summary; what is scored is in colour, or between ⟦ and ⟧ where there is none."""
    for line in summary["notes"]:
        console.print(line, soft_wrap=True)
    _render_files(summary["files"], console)
    _render_numbers(summary, console)
    _render_histogram(summary, console)
    from peftune.data.lint.finding import Finding

    for finding in summary["findings"]:
        console.print(f"! {Finding(**finding).head()}", style="yellow", soft_wrap=True)
        console.print(f"  {finding['advice']}", soft_wrap=True)
    if summary["chat"]:
        console.print(
            "of a chat, what the assistant says is scored, and what ends its turn: a blank line and User:, or the end",
            soft_wrap=True,
        )
    _render_preview(summary["preview"], console)


def _render_files(files: list[dict[str, Any]], console: SafeConsole) -> None:
    for cut in files[:_FILE_LIMIT] if len(files) > 1 else ():
        line = f"  {cut['documents']:>9,}  {' '.join(cut['file'].split())}  ({cut['rule']})"
        console.print(line, soft_wrap=True)
    if len(files) > _FILE_LIMIT:
        console.print(f"  and {len(files) - _FILE_LIMIT:,} more files")


def _render_numbers(summary: dict[str, Any], console: SafeConsole) -> None:
    share = summary["supervised_tokens"] / summary["tokens"]
    table = Table(box=None, show_header=False, pad_edge=False)
    left_out = summary["left_out"]
    skipped = sum(group["rows"] for group in left_out["skipped"].values())
    counted = (("where leaves out", left_out["unwanted"]), ("bad rows, skipped", skipped))
    for name, value in (
        *((name, f"{count:,} of {left_out['rows']:,} rows") for name, count in counted if count),
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
    console.print(table)


def _render_histogram(summary: dict[str, Any], console: SafeConsole) -> None:
    most = max(bin["documents"] for bin in summary["histogram"])
    console.print("\ndocuments by length in tokens")
    for bin in summary["histogram"]:
        bar = "█" * -(-bin["documents"] * _BAR_WIDTH // most)
        console.print(f"{bin['from']:>9,} … {bin['below'] - 1:<9,} {bar} {bin['documents']:,}")
    console.print()


def _render_preview(preview: dict[str, Any], console: SafeConsole) -> None:
    coloured = console.color_system is not None
    console.print(f"block {preview['block']}: scored text {'is green' if coloured else 'stands between ⟦ and ⟧'}")
    for span in preview["spans"][:_SPAN_LIMIT]:
        begins = "" if span["first_token"] == 0 else f", continued from token {span['first_token']:,}"
        _rule(f"document {span['document']:,}{begins}, {span['tokens']:,} tokens", console)
        text = Text()
        for part in span["pieces"]:
            scored, words = part["supervised"], _legible(part["text"])
            text.append(f"⟦{words}⟧" if scored and not coloured else words, style="green" if scored else "dim")
        console.print(text, soft_wrap=True)
    if len(preview["spans"]) > _SPAN_LIMIT:
        _rule(f"and {len(preview['spans']) - _SPAN_LIMIT} more documents", console)


def _rule(title: str, console: SafeConsole) -> None:
    console.print(Rule(title, align="left"), width=min(console.width, _RULE))


def _legible(text: str) -> str:
    """Control characters as pictures, and only the two ends of a long text."""
    if len(text) > _TEXT_LIMIT:
        left_out = len(text) - _TEXT_LIMIT
        text = f"{text[: _TEXT_LIMIT // 2]} [… {left_out:,} characters …] {text[-_TEXT_LIMIT // 2 :]}"
    visible = "".join(chr(0x2400 + ord(c)) if c < " " and c not in "\n\t" else c for c in text)
    return visible.replace("\x7f", "␡")
