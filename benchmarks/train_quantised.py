"""B12: training on an int8 or nf4 base against our own bf16: what speed it keeps, what memory the base takes.

python -m benchmarks.train_quantised [--shape medium] [--batch 2]
"""

from __future__ import annotations

import math
from argparse import Namespace

from benchmarks.measure import Result, Row, Sense, Spread, finish, ratio
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.rounds import Contestant
from benchmarks.shapes import PRESETS
from benchmarks.training import compare


def run(arguments: Namespace) -> Result:
    """Gate, rounds, rows."""
    with prepared(arguments) as setup:
        bf16 = setup.ours("bf16", ["run.precision=bf16"])
        packed = [setup.ours(kind, ["run.precision=bf16"], quantize=kind) for kind in ("int8", "nf4")]
        for contestant in packed:
            contestant.must_run = False
        result = compare(setup, "B12", "quantised base, medium", [bf16, *packed])
    for c in packed:
        speed: Sense = "at least" if c.name == "int8" else "information"
        memory: Sense = "at most" if c.name == "int8" else "information"
        why = c.failure or ""
        result.rows += [
            Row("B12", f"speed on a base in {c.name}", "our bf16", ratio(c, bf16), 0.8, speed, reason=why),
            Row("B12", f"memory of a base in {c.name}", "our bf16", _memory(c, bf16), 0.65, memory, reason=why),
        ]
    return result


def _memory(packed: Contestant, bf16: Contestant) -> Spread | None:
    if packed.failure:
        return None
    share = packed.facts["base_bytes"] / bf16.facts["base_bytes"]
    return Spread(share, share, share)


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, shape=PRESETS["medium"], rounds=3)
    add_training(made, "", batch=2, mean=math.inf, documents=60, tokens=2000, gate_blocks=1)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
