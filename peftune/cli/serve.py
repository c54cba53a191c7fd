"""The verb `serve`: its options, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.options import BASE_HELP, Adapters, Device, Precision, named
from peftune.cli.output.text_output import echo
from peftune.errors import UserError

Roots = Annotated[
    list[Path] | None,
    typer.Option("--adapter-root", metavar="DIR", help="Clients may load adapters from below it. May be repeated."),
]
Names = Annotated[
    list[str] | None,
    typer.Option("--allowed-host", metavar="NAME", help="Name of this server, needed where no key is set."),
]
Key = Annotated[
    str | None,
    typer.Option(
        show_default=False,
        metavar="KEY",
        help="What clients must send as bearer token. Every user of this machine sees it in the list of processes: "
        "better --api-key-file, or the environment variable PEFTUNE_API_KEY.",
    ),
]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", metavar="FILE", help="The same, from the one line of a file.")
]
NoAuth = Annotated[
    bool,
    typer.Option("--no-auth", help="Without a key, serve on an address that other machines reach all the same."),
]


def serve(
    base: Annotated[str, typer.Option(help=BASE_HELP)],
    adapters: Adapters = None,
    adapter_root: Roots = None,
    host: Annotated[
        str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine, and needs a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    api_key: Key = None,
    api_key_file: KeyFile = None,
    no_auth: NoAuth = False,
    allowed_host: Names = None,
    data_parallel_size: Annotated[
        int, typer.Option(metavar="N", help="Engines, each with the base in a process of its own: one a GPU.")
    ] = 1,
    slots: Annotated[int, typer.Option(help="Sequences that each engine generates at a time.")] = 8,
    queue: Annotated[int, typer.Option(help="Sequences that may wait; further requests get 429.")] = 256,
    max_body: Annotated[int, typer.Option(metavar="BYTES", help="Largest body of a request.")] = 1 << 20,
    max_adapters: Annotated[int, typer.Option(help="Most adapters in memory.")] = 256,
    precision: Precision = "auto",
    device: Device = "auto",
    drain: Annotated[
        float, typer.Option(metavar="SECONDS", help="For requests in flight to finish after SIGTERM.")
    ] = 30.0,
    routing_threshold: Annotated[
        float,
        typer.Option(metavar="X", help="What an adapter's margin over the base must exceed before `auto` takes it."),
    ] = 0.0,
) -> None:
    """Serve one base and many adapters with OpenAI's protocol: the model of a request is an adapter's name.

    Example:  peftune serve --base gpt2 --adapter poems=adapters/poems --adapter code=adapters/code
    """
    directories = {name: Path(directory) for name, directory in named("--adapter", adapters).items()}
    try:
        from peftune.serve import key, server
        from peftune.serve.settings import ServeSettings
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("prometheus_client", "starlette", "uvicorn"):
            raise
        raise UserError(f"peftune serve needs {error.name}; pip install 'peftune[serve]'") from None

    settings = ServeSettings(
        host=host, port=port, api_key=key.find_key(api_key, api_key_file), no_auth=no_auth,
        roots=tuple(adapter_root or ()), allowed_hosts=tuple(allowed_host or ()), slots=slots, queue=queue,
        data_parallel_size=data_parallel_size, max_body=max_body, max_adapters=max_adapters, drain=drain,
        routing_threshold=routing_threshold,
    )  # fmt: skip
    try:
        server.run(base, directories, precision, settings, echo, device)
    except key.NoKeyError as error:
        ways = f"give --api-key-file FILE or set {key.VARIABLE}, or --no-auth if anybody may use it"
        raise UserError(f"{error}; {ways}") from None
