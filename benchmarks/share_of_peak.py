"""B4: the share of the machine's bf16 GEMM peak that a training step reaches at 4N + 6TdL + 6a FLOP per token.

    python -m benchmarks.share_of_peak [--shape small] [--batch 8]

The peak is the best of several matrix products (those of the model and a square one), measured in the same rounds as
the step, so that a machine that slows down slows both. Work that the formula does not know (recomputed or padded
places) counts against the share.
"""

from __future__ import annotations

import math
from argparse import Namespace

from benchmarks.measure import Result, Row, Sense, Spread, finish, spread
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.rounds import Contestant
from benchmarks.shapes import adapted_linears, context_of, work_per_token
from benchmarks.training import CALIBRATION, compare, ours_both_ways


def run(arguments: Namespace) -> Result:
    """Gate, rounds, rows."""
    with prepared(arguments) as setup:
        mine = ours_both_ways(setup)
        result = compare(setup, "B4", "share of the bf16 GEMM peak", mine)
        lengths = setup.lengths
    work = work_per_token(arguments.shape, context_of(lengths), arguments.rank, adapted_linears(arguments.targets))
    result.settings["GFLOP per token"] = round(work.total / 1e9, 4)
    peaks = next(c["rounds"] for c in result.contestants if c["name"] == CALIBRATION)
    shares = {c.name: _share(c, [found["value"] for found in peaks], work.total) for c in mine}
    for name, share in shares.items():
        sense: Sense = "at least" if name == mine[0].name else "information"
        result.rows.append(Row("B4", f"share of bf16 peak, {name}", "calibrated GEMM", share, 65, sense, "%"))
    share = shares[mine[0].name]
    result.rows.append(Row("B4", "share of bf16 peak, second goal", "calibrated GEMM", share, 75, "at least", "%"))
    return result


def _share(contestant: Contestant, peaks: list[float], work: float) -> Spread:
    return spread([100e-9 * rate * work / peak for rate, peak in zip(contestant.values(), peaks, strict=True)])


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__)
    add_training(made, "", mean=math.inf, documents=80)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
