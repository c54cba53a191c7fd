"""The verbs `launch` and `configs`: their options, no logic."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.options import recipes_and_overrides
from peftune.cli.output.text_output import echo
from peftune.cli.output.verbosity import arguments_of_verbosity
from peftune.cli.train import DryRunOption, Others
from peftune.config.shipped import FOLDERS, shipped
from peftune.errors import UserError


def configs(directory: Annotated[Path, typer.Argument(help="Directory to write them to; made where missing.")]) -> None:
    """Write out the configurations and recipes that come with peftune, to read and to change.

    Example:  peftune configs my
    """
    targets = {name: directory / name for name in FOLDERS}
    if found := [str(path) for path in targets.values() if path.exists()]:
        raise UserError(f"{', '.join(found)}: already there; name another directory")
    for name, path in targets.items():
        path.mkdir(parents=True)
        files = sorted(file for file in shipped(name).iterdir() if file.is_file())
        for file in files:  # the content alone: what is installed may be read-only
            (path / file.name).write_bytes(file.read_bytes())
        echo(f"{path}: {', '.join(file.name for file in files)}")


def launch(
    config: Annotated[str, typer.Argument(help="A name, such as ddp or zero2, or your own Accelerate YAML file.")],
    recipe: Annotated[str, typer.Argument(help="YAML file; docs/recipe.md lists every key.")],
    others: Others = None,
    dry_run: DryRunOption = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Ranks on each machine. Default: what CONFIG says, or one for each GPU.")
    ] = None,
    max_restarts: Annotated[int, typer.Option(min=0, help="Starts after a crash, from the last checkpoint.")] = 0,
    nodes: Annotated[int, typer.Option(min=1, help="Machines; start the same command on each.")] = 1,
    node_rank: Annotated[int, typer.Option(min=0, help="Which of them this is; 0 writes the adapter.")] = 0,
    master_addr: Annotated[str | None, typer.Option(help="Name or address of machine 0.")] = None,
    master_port: Annotated[int, typer.Option(min=1, help="A free port of machine 0.")] = 29400,
    join: Annotated[
        int, typer.Option(envvar="PEFTUNE_JOIN", metavar="SECONDS", help="How long machines wait for each other.")
    ] = 900,
    grace: Annotated[
        int, typer.Option(envvar="PEFTUNE_GRACE", metavar="SECONDS", help="For ranks to save after a signal.")
    ] = 110,
    program: Annotated[
        Path | None,
        typer.Option(envvar="PEFTUNE_RANK_PROGRAM", show_default=False, help="Python file to run instead of `train`."),
    ] = None,
) -> int:
    """Train on several ranks, on one machine or many; the exit code is that of the ranks.

    Example:  peftune launch ddp recipe.yaml --processes 4

    Many recipes, or one file with a list `fleet`, learn in the same run, as with `peftune train`.

    docs/many-ranks.md says which configuration to take, and how to start ranks with plain torchrun or accelerate.
    """
    from peftune.cli.launcher.stop_signals import StopSignals

    stop = StopSignals(grace)  # before torch is imported, which takes seconds
    from peftune.cli.launcher import configuration

    if nodes > 1 and (not master_addr or node_rank >= nodes):
        raise UserError(f"{nodes} machines need --master-addr, and a --node-rank from 0 to {nodes - 1} on each")
    options = configuration.read(config, processes, nodes)
    if dry_run:
        from peftune.cli.output.dry_run import print_dry_run

        on_cpu = "CUDA_VISIBLE_DEVICES" in options.environment
        print_dry_run(*recipes_and_overrides(Path(recipe), others), options.way(), options.ranks(), on_cpu)
        return 0
    options.apply()
    train = ["-m", "peftune", "train", *arguments_of_verbosity()]
    target = [*([str(program)] if program else train), recipe, *(others or [])]
    if options.one_process:
        configuration.become_the_rank(target)
    from peftune.cli.launcher.ranks import Rendezvous, run

    rendezvous = Rendezvous(str(master_addr), master_port, node_rank, join) if nodes > 1 else Rendezvous()
    return run(options.arguments, target, rendezvous, stop, max_restarts)
