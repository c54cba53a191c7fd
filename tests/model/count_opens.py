"""Run one command of peftune and write how often each part of a base was opened, as JSON.

python count_opens.py BASE COUNTS COMMAND [ARGUMENT ...]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

base, counts, *command = sys.argv[1:]
opened: Counter[str] = Counter()


def hook(event: str, arguments: tuple[Any, ...]) -> None:
    # open() with an opener is told twice, the second time by os.open, which has no mode
    if event == "open" and str(arguments[0]) == f"{base}/config.json" and arguments[1] is not None:
        opened["config.json"] += 1


sys.addaudithook(hook)

from peftune.cli.main import run  # noqa: E402
from peftune.model import tokenizer, weights  # noqa: E402

# Read by compiled code, which Python's audit does not see: the functions that do so are counted instead.
loads, lists = tokenizer.load_tokenizer, weights._list


def load_tokenizer(directory: Path, *more: Any) -> Any:
    opened["tokenizer"] += str(directory) == base
    return loads(directory, *more)


def list_headers(file: Path) -> Any:
    opened["weight headers"] += str(file.parent) == base
    return lists(file)


tokenizer.load_tokenizer, weights._list = load_tokenizer, list_headers
code = run(command)
Path(counts).write_text(json.dumps(opened))
sys.exit(code)
