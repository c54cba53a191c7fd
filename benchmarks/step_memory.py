"""B3: how far resident memory grows in a training step, four documents of 512 tokens, against PEFT in bf16.

    python -m benchmarks.step_memory [--shape small] [--batch 4]

Every figure is from a process of its own: the largest resident set from the beginning of the first step to the end of a
round, less the resident set before the first step (Linux; on CUDA the allocator's figures). What the first step alone
allocates (the optimizer's state, compiled code) is in it.
"""

from __future__ import annotations

import math
from argparse import Namespace

from benchmarks.measure import Result, Row, Sense, Spread, finish, spread
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.rounds import Contestant
from benchmarks.training import CALIBRATION, compare, ours_both_ways


def run(arguments: Namespace) -> Result:
    """Gate, rounds one process at a time, rows."""
    with prepared(arguments) as setup:
        mine, peers = ours_both_ways(setup), [setup.peer(peer) for peer in arguments.chosen_peers]
        result = compare(setup, "B3", "growth of memory in a step", [*mine, *peers], at_once=False)
    for entry in result.contestants:
        if entry["name"] != CALIBRATION and entry["rounds"]:
            entry["growth_MB"] = [round(found["grown"] / 1e6) for found in entry["rounds"]]
            result.notes.append(f"{entry['name']} grew by {entry['growth_MB']} MB")
    for peer in peers:
        sense: Sense = "at most" if peer.name == "peft-bf16" else "information"
        share = _share(mine[0], peer)
        result.rows.append(
            Row("B3", "growth of memory in a step", peer.name, share, 0.2, sense, reason=peer.failure or "")
        )
    return result


def _share(ours: Contestant, peer: Contestant) -> Spread | None:
    if not peer.rounds or any(found["grown"] is None for found in (*ours.rounds, *peer.rounds)):
        return None
    return spread([a["grown"] / b["grown"] for a, b in zip(ours.rounds, peer.rounds, strict=True)])


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, rounds=3, warmup=0)
    add_training(made, "peft-bf16,peft-fp32", batch=4, mean=math.inf, documents=40, tokens=4000)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
