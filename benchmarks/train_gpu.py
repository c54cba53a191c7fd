"""B11: training on a CUDA device against TRL tuned for it (bf16, fused AdamW, flash attention, packing).

    python -m benchmarks.train_gpu [--shape small] [--batch 32] [--tune trl-cuda-flash:per_device_train_batch_size=64]

Says «not run: no CUDA device» where there is none. A peer whose kernels are not installed is told with its reason.
"""

from __future__ import annotations

from argparse import Namespace

import torch

from benchmarks.measure import Result, Row, finish, ratio, spread
from benchmarks.options import add_training, parse, parser, prepared
from benchmarks.training import compare, fastest, ours_both_ways

PEERS = "trl-cuda-flash,trl-cuda-sdpa,trl-cuda-compiled"
ABSENT = "no CUDA device"


def run(arguments: Namespace) -> Result:
    """Gate, rounds, rows; only rows that say so without a device."""
    what = "train small on a GPU, ragged documents"
    if not torch.cuda.is_available():
        absent = Row("B11", what, "TRL, tuned", None, 1.5, "at least", reason=ABSENT)
        return Result("B11", what, {"shape": str(arguments.shape)}, rows=[absent])
    with prepared(arguments) as setup:
        mine, peers = ours_both_ways(setup), [setup.peer(peer) for peer in arguments.chosen_peers]
        result = compare(setup, "B11", what, [*mine, *peers])
    best = fastest(peers)
    measured, name = (ratio(mine[0], best), best.name) if best else (None, "TRL, tuned")
    reason = "" if best else "no peer ran: " + "; ".join(peer.failure or "" for peer in peers)
    result.rows = [Row("B11", what, name, measured, 1.5, "at least", reason=reason)]
    if "H100" in torch.cuda.get_device_name():
        rate = spread([value / 1000 for value in mine[0].values()])
        result.rows.append(Row("B11", what, "H100", rate, 600, "at least", "thousand tok/s"))
    return result


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__, warmup=2)
    add_training(made, PEERS, device="cuda", documents=4000, tokens=200_000, batch=32, block=1024)
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
