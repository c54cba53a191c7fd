"""`peftune eval`: the perplexity matrix with its intervals, and what adapters have memorised."""

from __future__ import annotations

from typing import Annotated

import typer

from peftune.cli.options import (
    BASE_HELP,
    Adapters,
    BlockSize,
    Columns,
    Device,
    Json,
    Precision,
    columns_of,
    named,
    save_json,
    source_of,
)


def evaluate(
    data: Annotated[list[str], typer.Option(metavar="NAME=PATH", help="Documents to score. May be repeated.")],
    adapters: Adapters = None,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Default: what the adapter names.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Blocks per forward; changes nothing in the result.")] = 8,
    precision: Precision = "auto",
    device: Device = "auto",
    column: Columns = None,
    block_size: BlockSize = None,
    routing: Annotated[
        bool, typer.Option("--routing", help="Instead: how often a prompt is sent to its domain's adapter.")
    ] = False,
    prompt_tokens: Annotated[
        int, typer.Option(min=1, help="Of --routing and --trained-on: tokens that are given.")
    ] = 32,
    prompts: Annotated[int, typer.Option(min=1, help="Of --routing: at most so many prompts a domain.")] = 500,
    threshold: Annotated[
        float, typer.Option(help="Of --routing: what the margin of an adapter must exceed, in nats per token.")
    ] = 0.0,
    trained_on: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PATH", help="Training text: how much of it is memorised. May be repeated."),
    ] = None,
    continued_tokens: Annotated[
        int, typer.Option(min=1, help="Of --trained-on: tokens that must come after --prompt-tokens of context.")
    ] = 32,
    json_path: Json = None,
) -> None:
    """Print the perplexity matrix: the base and each adapter, on each domain. With --routing, where prompts are sent.

    Example:  peftune eval --base gpt2 --adapter poems=adapters/poems --data poems=held.txt --data code=code.jsonl
    """
    folders, columns, paths = named("--adapter", adapters), columns_of(column), named("--data", data)
    from peftune.cli.output import evaluate as tables
    from peftune.inference.evaluation.memorisation import Window
    from peftune.inference.perplexity import evaluate
    from peftune.inference.routing.accuracy import measure_routing

    domains = {name: source_of(path, columns) for name, path in paths.items()}
    if routing:
        found = measure_routing(base, domains, folders, prompt_tokens, prompts, threshold, precision, device)
        tables.print_routing(found, [*folders, "base"])
    else:
        learnt = {name: source_of(path, columns) for name, path in named("--trained-on", trained_on).items()}
        window = Window(prompt_tokens, continued_tokens)
        found = evaluate(base, domains, folders, batch, precision, block_size, learnt, window, device)
        for key in ("perplexity", "bits_per_byte"):
            tables.print_matrix(found["rows"], key)
        tables.print_intervals(found)
        if learnt:
            tables.print_memorised(found)
        tables.print_not_held_out(found)
    save_json(json_path, found)
