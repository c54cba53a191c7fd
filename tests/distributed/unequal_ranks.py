"""Runs of `peftune train`'s function on ranks whose files, recipe or versions differ:  launcher unequal_ranks.py FOLDER

FOLDER/cases.json lists cases; rank R of a case runs in FOLDER/CASE/R, on the recipe there, with patch.json there
({name of `agreement.versions`: value}, or {"precision": …}) applied. How it ended goes to FOLDER/CASE/R/ended.json, and
how often the rank did what the first one alone need do.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from peftune.config.recipe import load_recipe
from peftune.errors import PeftuneError
from peftune.training import inputs, run
from peftune.training.distributed import start
from peftune.training.planning import plan

done: Counter[str] = Counter()


def count(module: Any, name: str) -> None:
    """Count the calls of a function by the name that this module has for it."""
    function = getattr(module, name)

    def counted(*arguments: Any) -> Any:
        done[name] += 1
        return function(*arguments)

    setattr(module, name, counted)


count(inputs, "of_run")
count(plan, "activations")
folder = Path(sys.argv[1])
true_versions = start.versions
with start.process_group():
    for case in json.loads((folder / "cases.json").read_text()):
        os.chdir(folder / case / os.environ["RANK"])
        changed = json.loads(Path("patch.json").read_text())
        precision = changed.pop("precision", "fp32")
        done.clear()
        with (
            patch.object(start, "versions", lambda more, c=changed: true_versions(more) | c),
            patch.object(start, "choose_precision", lambda *_, p=precision: p),
        ):
            try:
                run.train(load_recipe(Path("recipe.yaml"), []))
                ended = [0, ""]
            except PeftuneError as error:
                ended = [error.exit_code, str(error)]
        Path("ended.json").write_text(json.dumps([*ended, done]))
