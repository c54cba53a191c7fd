"""B1: training GPT-2 small on documents of unequal length, against TRL and Trainer as they come and as tuned.

    python -m benchmarks.train_small [--data FILE] [--shape small] [--tune trl-tuned:per_device_train_batch_size=4]

Same base, same documents, same adapter; the figure is real tokens (no padding) per second of whole optimizer steps in
each trainer's own loop. The rows are against TRL's defaults and against the fastest peer of all that ran, so adding a
peer (`--peer`) or tuning one (`--tune`) can only raise the bar.
"""

from __future__ import annotations

from argparse import Namespace

from benchmarks.machine import LITGPT
from benchmarks.measure import Result, Row, finish, ratio
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.training import compare, fastest, ours_both_ways

PEERS = (
    "trl-default,trl-tuned,trl-tuned-wrapped,trl-tuned-by-length,trainer-default,trainer-tuned,trainer-tuned-by-length"
)


def run(arguments: Namespace) -> Result:
    """Gate, rounds, rows."""
    with prepared(arguments) as setup:
        mine, peers = ours_both_ways(setup), [setup.peer(peer) for peer in arguments.chosen_peers]
        result = compare(setup, "B1", "train small, ragged documents", [*mine, *peers])
    ours, best = mine[0], fastest(peers)
    what = "train small, ragged documents"
    for peer in peers:
        if peer.name == "trl-default":
            result.rows.append(
                Row("B1", what, "TRL, defaults", ratio(ours, peer), 10, "at least", reason=peer.failure or "")
            )
    if best is not None:
        found = ratio(ours, best)
        result.rows.append(Row("B1", what, f"best tuning found ({best.name})", found, 4, "at least"))
        result.rows.append(Row("B1", f"{what}, second goal", f"best tuning found ({best.name})", found, 5, "at least"))
    result.rows += [Row("B1", what, slow.name, ratio(ours, slow), 0, "information") for slow in mine[1:]]
    result.notes.append(f"litgpt {LITGPT}")
    return result


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__)
    add_training(made, PEERS)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
