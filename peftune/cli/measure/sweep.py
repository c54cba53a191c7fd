"""The verb `sweep`: many settings of a recipe, and which of them is best."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.train import allocates_in_expandable_segments
from peftune.errors import UserError


def sweep(
    recipe: Annotated[Path, typer.Argument(help="YAML file, as for peftune train; it needs data.validation.")],
    changes: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=V1,V2...", help="Several values make an axis; one value is an override."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Train each combination with so many seeds, for intervals.")] = 1,
    halving: Annotated[
        int | None,
        typer.Option(min=2, max=10, metavar="F", help="Keep 1/F of the combinations after 1/F² and 1/F of the steps."),
    ] = None,
    trials: Annotated[
        int | None,
        typer.Option(min=1, max=1024, help="Let Optuna choose so many points; then a range may be given: 1e-5..1e-3."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Directory for all runs and the table. Default: the recipe's run.out.")
    ] = None,
) -> None:
    """Train every combination of settings, and end with a table by validation loss, a picture and the best recipe.

    Example:  peftune sweep recipe.yaml lora.rank=4,8,16 optim.lr=1e-4,2e-4,4e-4 --out sweeps/poems

    The same command goes on after an interruption; with more values or seeds it trains what is new. Lists stay values
    in brackets: lora.layers=[0,1],[2,3]. What matters is the rate, the batch and the rank: docs/sweep.md.
    """
    from peftune.training.sweep.grid import read_grid

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a sweep is one process; start it without a launcher")
    if halving and trials:
        raise UserError("--halving and --trials exclude each other: trials are chosen by what whole runs reached")
    grid = read_grid(recipe, changes or [], seeds, out, may_be_range=trials is not None)
    grid.members(grid.combinations())  # before torch is imported: a wrong recipe is refused at once
    if allocates_in_expandable_segments():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # before torch is imported
    from peftune.cli.output.sweep_table import print_sweep
    from peftune.training.distributed.start import process_group
    from peftune.training.sweep.sweep import sweep
    from peftune.training.sweep.written import write_results

    with process_group():
        found, failure = sweep(grid, halving, trials)
    write_results(grid, found)
    print_sweep(found, grid.out)
    if found.best is None and failure is not None:
        raise failure
