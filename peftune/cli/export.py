"""`peftune export`: its options, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Kind = Literal["f32", "f16", "q8_0"]


def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A merged model or a base: directory or hub name.")],
    out: Annotated[Path, typer.Option(help="Directory for the files; must not exist.")],
    to: Annotated[Literal["gguf"], typer.Option(help="The format; GGUF is for llama.cpp and Ollama.")] = "gguf",
    adapter: Annotated[
        list[Path] | None, typer.Option(help="Adapter directory, written as a file of its own. Can be repeated.")
    ] = None,
    kind: Annotated[Kind, typer.Option("--type", help="How matrices are stored; f32 loses nothing.")] = "f32",
) -> None:
    """Write a model, and adapters for it, as files for llama.cpp and Ollama.

    Example:  peftune export models/poems --to gguf --type q8_0 --out gguf/poems

    Example:  peftune export gpt2 --to gguf --adapter adapters/poems --out gguf/poems
    """
    from peftune.adapters.gguf.write_gguf import export_gguf
    from peftune.model.base import open_base

    for path in export_gguf(open_base(model), out, adapter or [], kind):
        typer.echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
