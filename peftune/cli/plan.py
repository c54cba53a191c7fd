"""The verb `plan`: what a recipe will need, as a table, and the command to take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftune.cli.options import Json, save_json
from peftune.cli.output.text_output import echo, print_table
from peftune.console import counted
from peftune.errors import UserError

if TYPE_CHECKING:
    from peftune.config.recipe import Recipe
    from peftune.training.planning.plan import Layout, Option, Plan

_UNITS = {"": 1, "B": 1, "MB": 10**6, "GB": 10**9, "MIB": 2**20, "GIB": 2**30, "G": 10**9, "M": 10**6}


def plan(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/recipe.md lists every key.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Win over the file.")] = None,
    gpu: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Plan for GPUs of this size, such as 24GB. Default: this machine."),
    ] = None,
    count: Annotated[int | None, typer.Option(min=1, help="Ranks on one machine. Default: its GPUs, or 1.")] = None,
    time: Annotated[bool, typer.Option("--time/--no-time", help="Time a block here, for ten seconds.")] = True,
    json_path: Json = None,
) -> None:
    """Say what a recipe will need, before anything is loaded: memory of a rank, time of a step, which way to take.

    Example:  peftune plan recipe.yaml base=gpt2-xl --gpu 24GB --count 4
    """
    from peftune.config.recipe import load_recipe

    asked, memory = load_recipe(recipe, overrides), size_of(gpu) if gpu is not None else None
    import torch

    from peftune.model.load import DTYPES
    from peftune.training.planning import calibration
    from peftune.training.planning.plan import Machine, plan, this_machine, what_is_planned

    machine = this_machine(count, asked.run.device) if memory is None else Machine("cuda", memory, count or 1, False)
    asked, config = what_is_planned(asked)
    found = plan(asked, config, machine)
    batch = asked.batch.global_size
    where = "this machine" if machine.here else "planned, not measured"
    unit = "GPU" if machine.device == "cuda" else "CPU rank"
    echo(
        f"{asked.base}: {found.trained:,} elements to train; {batch} blocks of {found.block_size:,} tokens a step "
        f"({batch * found.block_size:,} tokens at most), {found.precision}"
    )
    echo(f"{counted(machine.count, unit)} with {_gb(machine.memory)} each ({where})")
    _show(found)
    best, seconds = found.recommended, None
    if best is not None:
        if time and machine.here:
            run = asked.run.model_copy(update={"checkpointing": best.layout.checkpointing})
            device = torch.device(machine.device)
            timed = asked.model_copy(update={"run": run})
            seconds = calibration.seconds_per_block(config, timed, DTYPES[found.precision], found.block_size, device)
            echo(
                f"about {seconds * batch / (machine.count if machine.device == 'cuda' else 1):,.1f} s a step, by two "
                f"layers timed here{' without unpacking' if best.layout.quantize else ''}; what ranks send comes on top"
            )
        echo(f"take: {command(best, asked, recipe, overrides or [], machine.device, machine.count)}")
    save_json(json_path, found.json() | {"seconds_per_block": seconds})
    if best is None:
        least = min((option for option in found.options if not option.refused), key=lambda o: o.peak)
        raise UserError(
            f"nothing fits: the least, {_way(least.layout)} with the base in {_held_in(least.layout, found)}, needs "
            f"{_gb(least.peak)} a rank of {_gb(machine.usable)} that may be used; try a smaller data.block_size or base"
        )


def size_of(text: str) -> int:
    """Bytes of 24GB, 24GiB, 500MB; UserError for anything else."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z]{0,3})\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise UserError(f"--gpu {text!r}: expected a size such as 24GB or 80GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def command(option: Option, recipe: Recipe, path: Path, overrides: list[str], device: str, count: int) -> str:
    """What to type."""
    import shlex

    way, changed = option.layout.way, option.overrides(recipe)
    kept = [text for text in overrides if text.partition("=")[0] not in {c.partition("=")[0] for c in changed}]
    rest = [str(path), *kept, *changed]
    if way == "one":
        return shlex.join(["peftune", "train", *rest])
    name = {"cpu": "cpu-2" if way == "ddp" else f"cpu-2-{way}", "cuda": f"{way}{'-offload' * option.layout.offload}"}
    return shlex.join(["peftune", "launch", name[device], *rest, "--processes", str(count)])


def _show(found: Plan) -> None:
    from rich.text import Text

    columns = ("way", "base in", "recomputed", "blocks a forward", "held", "peak", "fits", "sent a step")
    rows: list[list[Text]] = []
    reasons: dict[str, None] = {}
    for option in found.options:
        if option.refused:
            reasons[f"{_way(option.layout)}, {_held_in(option.layout, found)}: {option.refused}"] = None
            continue
        cells = [_way(option.layout), _held_in(option.layout, found), "yes" if option.layout.checkpointing else "no"]
        cells += [str(option.micro_size), _gb(option.held), _gb(option.peak), "yes" if option.fits else "no"]
        cells.append(_gb(option.wire) if found.machine.count > 1 else "")
        style = "bold green" if option is found.recommended else ""
        rows.append([Text(cell, style) for cell in cells])
    print_table("Ways to run it", columns, rows, left=3)
    for reason in reasons:
        echo(f"refused: {reason}")


def _way(layout: Layout) -> str:
    name = {"one": "one process", "ddp": "DDP"}.get(layout.way, f"ZeRO-{layout.way[-1]}")
    return f"{name}, offload" if layout.offload else name


def _held_in(layout: Layout, found: Plan) -> str:
    return layout.quantize or found.precision


def _gb(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 5e6 else f"{size / 1e6:,.1f} MB"
