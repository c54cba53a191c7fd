"""B2: training GPT-2 medium on full blocks (two of 512 tokens), against PEFT with bf16 weights and no dropout.

    python -m benchmarks.train_medium [--shape medium] [--batch 2] [--longest 512]

Documents are all as long as a block, so padding and packing play no part: what remains is the arithmetic. The bare loop
around PEFT has no trainer's overhead and is the hardest peer.
"""

from __future__ import annotations

import math
from argparse import Namespace

from benchmarks.measure import Result, Row, finish, ratio
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.shapes import PRESETS
from benchmarks.training import compare, fastest, ours_both_ways


def run(arguments: Namespace) -> Result:
    """Gate, rounds, rows."""
    with prepared(arguments) as setup:
        mine, peers = ours_both_ways(setup), [setup.peer(peer) for peer in arguments.chosen_peers]
        result = compare(setup, "B2", "train medium, full blocks", [*mine, *peers])
    best = fastest(peers)
    if best is not None:
        found = ratio(mine[0], best)
        result.rows.append(Row("B2", "train medium, full blocks", f"PEFT tuned ({best.name})", found, 1.4, "at least"))
    slow = [Row("B2", "train medium, full blocks", c.name, ratio(mine[0], c), 0, "information") for c in mine[1:]]
    result.rows += slow
    return result


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, shape=PRESETS["medium"])
    add_training(made, "peft-bf16,trainer-tuned-2", batch=2, mean=math.inf, documents=60, tokens=2000, gate_blocks=1)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
