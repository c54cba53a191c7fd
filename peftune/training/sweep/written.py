"""What a sweep leaves beside its runs: a table for other programs, a picture, and the best recipe."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import yaml

from peftune.config.recipe import load_recipe, recipe_from
from peftune.errors import CheckFailed
from peftune.files import write_text, write_whole
from peftune.training.sweep.grid import Grid, value_text
from peftune.training.sweep.picture import draw_sweep
from peftune.training.sweep.results import Results

TABLE, PICTURE, BEST = "sweep.csv", "sweep.png", "best.yaml"


def write_results(grid: Grid, found: Results) -> None:
    """Write all that there is to write of a sweep into its directory."""
    write_text(grid.out / TABLE, _csv(found))
    if found.best is not None:
        write_whole(grid.out / PICTURE, draw_sweep(found, grid.out.name))
        _write_best(grid, found.best.values)


def _csv(found: Results) -> str:
    """A line for each run."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["combination", *found.axes, "seed", "state", "loss", "perplexity", "step", "seconds", "reason"])
    for row in found.rows:
        values = [value_text(value) for value in row.values.values()]
        for seed, one in row.results.items():
            perplexity = "" if one.loss is None else perplexity_of(one.loss)
            figures = [one.loss, perplexity, one.step, one.seconds, one.reason]
            lines.writerow([row.name, *values, seed, one.ending, *figures])
    return text.getvalue()


def perplexity_of(loss: float) -> float:
    """Infinite where it is beyond any number."""
    return math.exp(loss) if loss < 700 else math.inf


def _write_best(grid: Grid, values: dict[str, Any]) -> None:
    """The best recipe, with a directory of its own, as a file that is read back and compared."""
    overrides = [*grid.overrides(values), f"run.out={json.dumps(str(grid.out / 'best'), ensure_ascii=False)}"]
    path = grid.out / BEST
    text = yaml.safe_dump(grid.recipe_with(overrides), sort_keys=False, allow_unicode=True, width=120)
    write_text(path, text)
    if load_recipe(path) != recipe_from(grid.recipe, overrides):
        raise CheckFailed(f"{path}: is not read as it was meant; the best values are {' '.join(overrides[:-1])}")
