"""Several training runs on one group of ranks, which saves their start-up:  launcher many_runs.py JOBS.json…

Each JOBS.json is a list of recipes, or of lists, each of which is a fleet; the ranks wait until it is there, and rank 0
writes JOBS.done after its last run.
With PEFTUNE_CENSUS=FOLDER each rank writes what it holds at the end of the last run of the first list.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

from peftune.config.recipe import recipe_from
from peftune.training import run
from peftune.training.distributed.start import process_group
from peftune.training.fleet.train_fleet import train_fleet

# No test looks at the pictures of these runs; drawing takes as long as a few steps, and Matplotlib a second to import.
NO_PICTURES = types.SimpleNamespace(draw_loss=lambda *_: b"", draw_fleet=lambda *_: b"")
sys.modules["peftune.training.export.plots"] = NO_PICTURES  # type: ignore[assignment]


def take_census(finished: run.Run, folder: Path) -> None:
    """Each rank's own part of AdamW's first moment and of the model, beside the whole, one file a rank."""
    from peftune.training.distributed.zero import ShardedStrategy

    strategy = finished.strategy
    optimizer = strategy.engine.optimizer.optimizer if isinstance(strategy, ShardedStrategy) else strategy.optimizer  # type: ignore[attr-defined]
    parts = [getattr(p, "ds_tensor", p).detach().clone().flatten() for p in finished.adapted.model.parameters()]
    torch.save(
        {
            "moments": [state["exp_avg"].detach().clone().flatten() for state in optimizer.state.values()],
            "parameters": parts,
            "live_elements": sum(p.numel() for p in finished.adapted.model.parameters()),
            "whole": strategy.state_dict(),
        },
        folder / f"rank-{finished.accelerator.process_index}.pt",
    )


def recipes_in(jobs: Path) -> list[Any]:
    while not jobs.exists():
        time.sleep(0.05)
    recipes: list[Any] = json.loads(jobs.read_text(encoding="utf-8"))
    return recipes


def train(job: Any) -> None:
    if isinstance(job, dict):
        run.train(recipe_from(job, []))
    else:
        outcomes = train_fleet([recipe_from(values, []) for values in job])
        assert all(isinstance(outcome, run.Delivery) for outcome in outcomes), outcomes


def main() -> None:
    census = os.environ.get("PEFTUNE_CENSUS")
    export = run.export

    def export_and_count(finished: run.Run) -> run.Delivery:
        if census is not None:
            take_census(finished, Path(census))
        return export(finished)

    run.export = export_and_count
    with process_group():
        for jobs in map(Path, sys.argv[1:]):
            for job in recipes_in(jobs):
                train(job)
            census = None
            if os.environ.get("RANK", "0") == "0":
                jobs.with_suffix(".done").touch()


if __name__ == "__main__":
    main()
