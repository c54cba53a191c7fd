#!/usr/bin/env python3
"""Write docs/models.md from the table of tests/family.py; a test fails where the two differ.

python docs/build_models_page.py
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).with_name("models.md")
HEAD = """\
# Which GPT-2s work

Each row is a small checkpoint in the test suite, made as the real ones are. *Works* means: it is loaded, trained,
evaluated, merged, generated from and served, and its losses, logits and greedy tokens are those of Transformers' eager
attention with PEFT in float32. *Refused* means one line with the reason, before anything is computed. Code from a
model's repository is never run. The named checkpoints are examples; they were not downloaded.

This page is written by `python docs/build_models_page.py` from `tests/family.py`.
"""


def page(family: list[Any]) -> str:
    """The whole text of docs/models.md."""
    rows = ["| kind | for example | what is special | outcome |", "|---|---|---|---|"]
    for member in family:
        outcome = f"refused: {member.reason}" if member.refused else "works"
        rows.append(f"| {member.name} | {member.examples} | {member.special} | {outcome} |")
    return HEAD + "\n" + "\n".join(rows) + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from family import FAMILY

    PAGE.write_text(page(FAMILY), encoding="utf-8")
    print(f"written: {PAGE}")
