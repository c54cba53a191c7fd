"""Stop `peftune` at each of several places:  stopped_at.py CASES.json; RESULTS.json beside it says how it went.

A case is {"name", "arguments", "place": "module:function", "signal", "how"}. Each runs in a fork of this process, which
has imported what is heavy. When the place is reached, the signal is sent; the function then sleeps, in `how`: "python",
where a handler can run; "pool", as while a large document is tokenised; "soon", a second, after which it does its work.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import peftune.__main__ as program
import peftune.adapters.merge.merge
import peftune.cli.main
import peftune.serve.server
import peftune.training.run  # noqa: F401

LONG = 60.0  # seconds that no stage may take to answer


def dwell(how: str) -> None:
    until = time.monotonic() + (1 if how == "soon" else LONG)
    if how == "pool":
        with ThreadPoolExecutor(1) as pool:
            pool.submit(time.sleep, LONG).result()
    while time.monotonic() < until:
        time.sleep(0.01)


def child(case: dict[str, Any], reached: int) -> None:
    name, function = case["place"].split(":")
    place: Any = importlib.import_module(name)
    *path, last = function.split(".")
    for part in path:
        place = getattr(place, part)
    original = getattr(place, last)
    seen = False

    def stopped(*given: Any, **named: Any) -> Any:
        nonlocal seen
        if not seen:
            seen = True
            os.write(reached, b"!")
            dwell(case["how"])
        return original(*given, **named)

    setattr(place, last, stopped)
    sys.argv = ["peftune", *case["arguments"]]
    program.main()


def run(case: dict[str, Any], folder: Path) -> dict[str, Any]:
    said = folder / f"{case['name']}.err"
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        os.close(here)
        try:
            child(case, there)
        except SystemExit as error:
            os._exit(int(error.code or 0))
        os._exit(99)
    os.close(there)
    reached = os.read(here, 1) == b"!"
    began = time.monotonic()
    if reached:
        os.kill(pid, signal.Signals[case["signal"]])
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return {"reached": reached, "code": code, "seconds": time.monotonic() - began, "said": said.read_text()}


cases = json.loads(Path(sys.argv[1]).read_text())
results = {case["name"]: run(case, Path(sys.argv[1]).parent) for case in cases}
Path(sys.argv[1]).with_name("RESULTS.json").write_text(json.dumps(results))
