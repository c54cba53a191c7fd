"""The verbs of `peftune adapters`: their options, no logic; heavy modules are imported inside the verbs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from peftune.cli.options import Json, save_json
from peftune.errors import UserError

app = typer.Typer(
    name="adapters",
    help="List, show, compare and combine adapters; extract one from a full fine-tune; import what others made.",
    rich_markup_mode="rich",
)

_RANK_HELP = "Cut every module to at most this rank. Default: exact, ranks add up."
_SHARED_HELP = "The base that all of them share, where they do not say it themselves."
_TARGETS_HELP = "all, attention, mlp, or modules with commas between: attn.c_attn,mlp.c_fc."

Out = Annotated[Path, typer.Option(help="Directory for the new adapter; must not exist.")]


@app.command("list")
def list_adapters(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Where to look, and below.")],
    json_path: Json = None,
) -> None:
    """List the adapters in a directory and below, and say why some of them cannot be used.

    Example:  peftune adapters list adapters
    """
    from peftune.adapters.inspect.scan import scan
    from peftune.cli.output.adapter_tables import print_scan

    _show(scan(directory), print_scan, json_path)


@app.command()
def show(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, of peftune or of PEFT.")],
    base: Annotated[str | None, typer.Option(help="Also set norms against those of this base.")] = None,
    json_path: Json = None,
) -> None:
    """Show what an adapter was trained on, how well, and how strong its update is in each layer.

    Example:  peftune adapters show adapters/poems --base gpt2
    """
    from peftune.adapters.inspect.describe import describe
    from peftune.cli.output.adapter_tables import print_description

    _show(describe(adapter, base), print_description, json_path)


@app.command()
def combine(
    adapters: Annotated[list[Path], typer.Argument(metavar="ADAPTER...", help="Adapters of one base.")],
    weights: Annotated[str, typer.Option(metavar="W,W,...", help="One number for each adapter, in order.")],
    out: Out,
    rank: Annotated[int | None, typer.Option(min=1, help=_RANK_HELP)] = None,
    base: Annotated[str | None, typer.Option(help=_SHARED_HELP)] = None,
    json_path: Json = None,
) -> None:
    """Make one adapter whose update is the weighted sum of others: exact, or the nearest of a given rank.

    Example:  peftune adapters combine adapters/poems adapters/code --weights 0.7,0.3 --out adapters/both
    """
    numbers = _numbers(weights)
    from peftune.adapters.edit.combine import combine
    from peftune.cli.output.adapter_tables import print_combination

    _show(combine(adapters, numbers, out, rank, base), print_combination, json_path)


@app.command()
def extract(
    base: Annotated[str, typer.Option(help="What was fine-tuned: hub name, directory, or builtin:small.")],
    tuned: Annotated[str, typer.Option(help="The full fine-tune: directory or hub name.")],
    rank: Annotated[int, typer.Option(min=1, help="Of the adapter, in each module.")],
    out: Out,
    targets: Annotated[str, typer.Option(help=_TARGETS_HELP)] = "all",
    json_path: Json = None,
) -> None:
    """Take an adapter out of a full fine-tune and its base, and say what of the fine-tune it holds.

    Example:  peftune adapters extract --base gpt2 --tuned models/poems --rank 16 --out adapters/poems
    """
    from peftune.adapters.edit.extract import extract
    from peftune.cli.output.adapter_tables import print_extraction

    _show(extract(base, tuned, rank, out, targets), print_extraction, json_path)


@app.command("import")
def import_(
    source: Annotated[Path, typer.Argument(metavar="FILE_OR_DIR", help="loralib's .pt, or a directory of PEFT's.")],
    out: Out,
    base: Annotated[str | None, typer.Option(help="What it was trained on, where it does not say so itself.")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of a converted PEFT method: cut each module to it.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Of loralib, which does not store it. Default: 32.")] = None,
    parts: Annotated[str | None, typer.Option(help="Of loralib: the adapted parts of c_attn, such as q,v.")] = None,
    json_path: Json = None,
) -> None:
    """Take over an adapter of loralib, of another PEFT method, or out of a trainer's output directory.

    Example:  peftune adapters import gpt2_md_lora_e2e.pt --base gpt2-medium --out adapters/e2e
    """
    if alpha is not None and not 0 < alpha < float("inf"):
        raise UserError(f"--alpha {alpha:g}: expected a number above 0")
    from peftune.adapters.imported.import_adapter import import_adapter
    from peftune.adapters.imported.loralib import parts_of
    from peftune.cli.output.adapter_tables import print_import

    _show(import_adapter(source, out, base, rank, alpha, parts_of(parts)), print_import, json_path)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="Adapter directory.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    json_path: Json = None,
) -> None:
    """Compare two adapters: angle and distance of their updates by module, and how they were made.

    Example:  peftune adapters compare adapters/poems adapters/code
    """
    from peftune.adapters.inspect.compare import compare
    from peftune.cli.output.adapter_tables import print_comparison

    _show(compare(first, second), print_comparison, json_path)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _show(result: Any, show: Callable[[Any], None], json_path: Path | None) -> None:
    show(result)
    save_json(json_path, result.as_json())


def _numbers(weights: str) -> list[float]:
    try:
        return [float(weight) for weight in weights.split(",")]
    except ValueError:
        raise UserError(f"--weights {weights!r}: expected numbers with commas between, such as 0.7,0.3") from None
