"""A small corpus of long and short documents and a recipe over it, for tests on a GPU and on a pretended one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def values_over_text(base: Path, folder: Path) -> dict[str, Any]:
    """`base`, `data`, `lora`, `optim` and `batch` of a recipe; its text is written to `folder`/text.jsonl."""
    corpus = folder / "text.jsonl"
    texts = [" ".join(["the cat sat on the mat"] * (1 + number % 9)) for number in range(60)]
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {
        "base": str(base),
        "data": {"train": str(corpus), "validation": 0.1},
        "lora": {"rank": 4, "alpha": 8},
        "optim": {"lr": 1e-2, "steps": 8},
        "batch": {"global_size": 8},
    }
