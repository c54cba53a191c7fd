"""Trainings by one of several ranks, each with a pretended GPU of its own:  launcher ranks.py FOLDER

FOLDER/jobs.json lists trainings: their recipes (several: a fleet), and DeepSpeed's file, or null for DDP. What each
step of this rank did goes to FOLDER/rank-R.json: of each training its steps, in each waits by place and collectives.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from pretended_cuda import pretend
from pretended_nccl import pretend_nccl

from peftune.config.recipe import recipe_from
from peftune.training import run
from peftune.training.distributed import start
from peftune.training.fleet import train_fleet

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
told: list[list[dict[str, Any]]] = []
with pytest.MonkeyPatch.context() as patch, pretend(patch, index=rank, count=2) as cuda:
    called = pretend_nccl(patch, cuda)

    def watched(function: Any) -> Any:
        def call(*given: Any) -> Any:
            faults = [*cuda.faults]
            cuda.forget()
            called.clear()
            result = function(*given)
            told[-1].append({"waits": dict(cuda.waits), "collectives": dict(called)})
            cuda.faults[:0] = faults
            return result

        return call

    patch.setattr(run, "train_step", watched(run.train_step))
    patch.setattr(train_fleet, "steps_together", watched(train_fleet.steps_together))
    with start.process_group():
        for listed, engine in json.loads((folder / "jobs.json").read_text()):
            told.append([])
            recipes = [recipe_from(values, []) for values in listed]
            os.environ |= {"ACCELERATE_USE_DEEPSPEED": str(engine is not None).lower()}
            os.environ |= {"ACCELERATE_DEEPSPEED_CONFIG_FILE": engine or ""}
            train_fleet.train_fleet(recipes) if len(recipes) > 1 else run.train(recipes[0])
            assert not cuda.faults, cuda.faults
(folder / f"rank-{rank}.json").write_text(json.dumps(told))
