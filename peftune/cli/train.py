"""The verb `train`: its options, no logic."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer

from peftune.cli.options import recipes_and_overrides
from peftune.cli.output.text_output import echo
from peftune.errors import report_once_per_machine

Others = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RECIPE|KEY=VALUE]...", help="More recipes, to learn in the same run; KEY=VALUE wins over every file."
    ),
]

DryRunOption = Annotated[
    bool,
    typer.Option("--dry-run", help="Check everything, print the recipe as it would run and what it takes; train not."),
]


def allocates_in_expandable_segments() -> bool:
    """Whether CUDA's memory is to grow in place: steps differ in shape, and what is free breaks into pieces.

    Not where that fails at the first allocation (WSL, Jetson) or is not there (Windows), nor where somebody has chosen.
    """
    chosen = os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
    elsewhere = "microsoft" in platform.release().lower() or Path("/etc/nv_tegra_release").exists()
    return sys.platform == "linux" and not chosen and not elsewhere


def train(
    recipe: Annotated[Path, typer.Argument(help="YAML file; docs/recipe.md lists every key.")],
    others: Others = None,
    dry_run: DryRunOption = False,
) -> None:
    """Train the adapter that a recipe describes, or those of many; the same command goes on after an interruption.

    Example:  peftune train launch/recipes/poems.yaml optim.lr=1e-4 run.out=adapters/slow

    Many learn together, each as if alone:  peftune train poems.yaml prose.yaml optim.lr=1e-4

    Or from one file with a list `fleet`:  peftune train launch/recipes/fleet.yaml

    This is one process on at most one GPU. `peftune launch` starts several.
    """
    if allocates_in_expandable_segments():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"  # before torch is imported
    speaks = os.environ.get("RANK", "0") == "0"  # of several ranks the first
    with report_once_per_machine():
        paths, overrides = recipes_and_overrides(recipe, others)
    if dry_run:
        from peftune.cli.output.dry_run import print_dry_run

        if speaks:
            print_dry_run(paths, overrides)
        return
    from peftune.config.fleet import load_recipes

    with report_once_per_machine():
        recipes = load_recipes(paths, overrides)  # before torch is imported: a wrong recipe is refused at once
    from peftune.training.distributed.start import process_group

    if len(recipes) > 1:
        from peftune.cli.output.fleet_results import print_results
        from peftune.training.fleet.train_fleet import train_fleet

        with process_group():
            results = train_fleet(recipes)
        return print_results(recipes, results, speaks)
    from peftune.training.run import train

    with process_group():
        delivery = train(recipes[0])
    if speaks:
        echo(delivery.summary())
