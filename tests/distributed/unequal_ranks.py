"""Runs of `peftune train`'s function on ranks whose files, recipe or versions differ:  launcher unequal_ranks.py FOLDER

FOLDER/cases.json lists cases; rank R of a case runs in FOLDER/CASE/R, on the recipe there, with patch.json there
({name of `agreement.versions`: value}, or {"precision": …}) applied. How it ended goes to FOLDER/CASE/R/ended.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from peftune.config.recipe import load_recipe
from peftune.errors import PeftuneError
from peftune.training import run
from peftune.training.distributed import start

folder = Path(sys.argv[1])
true_versions = start.versions
with start.process_group():
    for case in json.loads((folder / "cases.json").read_text()):
        os.chdir(folder / case / os.environ["RANK"])
        changed = json.loads(Path("patch.json").read_text())
        precision = changed.pop("precision", "fp32")
        with (
            patch.object(start, "versions", lambda more, c=changed: true_versions(more) | c),
            patch.object(run, "choose_precision", lambda *_, p=precision: p),
        ):
            try:
                run.train(load_recipe(Path("recipe.yaml"), []))
                ended = [0, ""]
            except PeftuneError as error:
                ended = [error.exit_code, str(error)]
        Path("ended.json").write_text(json.dumps(ended))
