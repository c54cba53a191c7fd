"""The verb `generate`: its options, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.options import (
    BASE_HELP,
    Adapters,
    Columns,
    Device,
    Json,
    Precision,
    columns_of,
    named,
    source_of,
    writable,
)
from peftune.errors import UserError


def generate(
    prompt: Annotated[list[str] | None, typer.Option(help="Text to continue. May be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="File with one prompt a line.")] = None,
    test_set: Annotated[
        str | None, typer.Option(metavar="SOURCE", help="Prompts with references, read as in training.")
    ] = None,
    column: Columns = None,
    out: Annotated[
        list[Path] | None,
        typer.Option(
            callback=writable,
            help="File for the texts: .jsonl with prompts and references, else one a line. May be repeated.",
        ),
    ] = None,
    adapters: Adapters = None,
    use: Annotated[str | None, typer.Option(help="Which adapter; `base` for none. Default: the only one.")] = None,
    base: Annotated[str | None, typer.Option(help=f"{BASE_HELP} Default: what the adapter names.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 128,
    temperature: Annotated[float | None, typer.Option(help="0 takes the likeliest token. Default: 0.8.")] = None,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest; 0 is all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest that hold this share.")] = 0.95,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repeats less; 1 is off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Choose among those this many times the likeliest; 0 is all.")] = 0.0,
    presence_penalty: Annotated[float, typer.Option(help="Off the logit of what the text holds; 0 is off.")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option(help="The same, each time that it does; 0 is off.")] = 0.0,
    min_new_tokens: Annotated[int, typer.Option(help="At least so many tokens.")] = 0,
    no_repeat_ngram_size: Annotated[int, typer.Option(help="No run of so many tokens comes twice; 0 is off.")] = 0,
    repeat_prompt: Annotated[
        bool, typer.Option("--repeat-prompt", help="There what the prompt holds does not count.")
    ] = False,
    stop_token_id: Annotated[list[int] | None, typer.Option(help="Token that ends a text. May be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="The end-of-text token ends no text.")] = False,
    beams: Annotated[int, typer.Option(help="Beam search with so many beams; 1 is off.")] = 1,
    length_penalty: Annotated[float, typer.Option(help="Of beams: above 1 favours longer texts; 0 is off.")] = 1.0,
    num_return_sequences: Annotated[int, typer.Option(help="Texts for each prompt: samples, or the best beams.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Same seed, same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string. May be repeated.")] = None,
    precision: Precision = "auto",
    device: Device = "auto",
    interactive: Annotated[bool, typer.Option("--interactive", help="Prompts at the terminal; /help there.")] = False,
    json_path: Json = None,
) -> None:
    """Continue prompts with the base or with an adapter on it, printed as it is written.

    Example:  peftune generate --adapter adapters/poems --prompt "The sea" --temperature 0.7
    """
    from peftune.cli.writing.generate import generate_texts
    from peftune.inference.settings import GenerationSettings

    settings = GenerationSettings(
        max_new_tokens, temperature, top_k, top_p, repetition_penalty, beams, seed, tuple(stop or ()), min_new_tokens,
        min_p, presence_penalty, frequency_penalty, (), tuple(stop_token_id or ()), ignore_eos, length_penalty,
        no_repeat_ngram_size, num_return_sequences, repeat_prompt,
    )  # fmt: skip
    folders = {name: Path(folder) for name, folder in named("--adapter", adapters).items()}
    if test_set is not None and (prompt or prompts):
        raise UserError("--test-set has prompts of its own; drop --prompt and --prompts")
    if column and test_set is None:
        raise UserError("--column names columns of --test-set; give it, or in --prompts FILE call the column prompt")
    if not interactive:
        source = source_of(test_set, columns_of(column)) if test_set is not None else None
        given = base, folders, use, prompt or [], prompts
        generate_texts(*given, settings, json_path, precision, source, out or [], device)
        return
    if prompt or prompts or json_path or test_set or out:
        raise UserError("--interactive reads its prompts from the terminal; drop other prompts, --out and --json")
    from peftune.cli.writing.repl import start_repl

    start_repl(base, folders, use, settings, precision, device)
