"""`peftune export` and `peftune push`: their options, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from peftune.cli.output.text_output import echo

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
        echo(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")


def push(
    directory: Annotated[Path, typer.Argument(metavar="ADAPTER_OR_MODEL", help="Adapter or merged model.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Its name on the hub, such as me/poems.")],
    yes: Annotated[bool, typer.Option("--yes", help="Send it. Without, what would be sent is listed.")] = False,
    public: Annotated[bool, typer.Option("--public", help="Let everybody see it. Default: private.")] = False,
    with_metrics: Annotated[bool, typer.Option("--with-metrics", help="Figures and plot too.")] = False,
    with_recipe: Annotated[
        bool, typer.Option("--with-recipe", help="The recipe too: it names data sources and sample prompts.")
    ] = False,
    base: Annotated[str | None, typer.Option(help="The base's name on the hub, where it is a directory here.")] = None,
) -> None:
    """Send an adapter or a merged model to the Hugging Face hub, with a card; lists the files unless --yes is given.

    Example:  peftune push adapters/poems me/poems --yes
    """
    from peftune.adapters.hub.publishable import publishable
    from peftune.adapters.hub.push import push

    content = publishable(directory, repository, base, with_metrics, with_recipe)
    for name, size in content.sizes().items():
        echo(f"{name}  {size:,} bytes")
    for name, reason in content.left_out.items():
        echo(f"left out: {name}, {reason}")
    seen_by = "public" if public else "private"
    if yes:
        echo(f"sent: {push(content, repository, public)}")
    else:
        echo(f"nothing was sent; --yes sends these {len(content.files)} files to {repository} ({seen_by})")
