"""Bytes that travel per optimizer step, measured on two CPU ranks: DDP, ZeRO-1, ZeRO-2, ZeRO-3.

    python benchmarks/communication.py [--ways ddp zero3] [--steps 3] [--rank 16] [--json F]

Each group of ranks is started as a person starts it (`accelerate launch` with a shipped cpu-2*.yaml), in a network
namespace of its own with nothing in it but a loopback device. What that device has sent is what the two ranks and their
launcher have sent each other, TCP headers included. A run of 2N steps less one of N holds no start-up, evaluation or
ending. Every way learns the same blocks twice: as one micro-batch a step, and as four. The base has random weights, two
blocks of GPT-2's width and few tokens. `zero3-large` is ZeRO-3 that gives every weight back after its forward and
gathers none ahead, as it does with most of a base that is far larger than its reuse distance of 200M weights.

The figures are of both directions together; a rank sends half. Theory for two ranks, with a trained elements in fp32,
W bytes of base weights that ZeRO-3 shares out and s bytes of those that it keeps whole: reducing S bytes in a ring (or
by halving and doubling) takes two rounds, scatter and gather, in each of which each of n ranks sends (n-1)/n of S; for
n = 2 that is S a rank, 2S together.

    ddp           8a         one all-reduce of 4a bytes
    zero1, zero2  12a        an all-reduce (DeepSpeed reduces an adapter so), then a gather of the updated halves, 4a
    zero3         12a+s+kW   a reduce-scatter, which gloo does as an all-reduce, 8a; after the update, a gather of all
                             that is kept whole, of the adapter (4a) and the base (s); and W for each of k gathers

Where a reduce-scatter is one (NCCL), ZeRO-3 sends 4a less. Linux only; exit code 2 where namespaces are not permitted.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import two_ranks
from two_ranks import CONFIGS, ROOT, bytes_sent

if TYPE_CHECKING:
    from transformers import GPT2Config

MICRO_BATCHES = (1, 4)  # of each rank in a step
BLOCKS = 8  # of a step, on both ranks
IDLE_SECONDS = 12.0
GATHERS = {"zero3": 1, "zero3-large": 2}  # of the base in a micro-batch


def main() -> None:
    """Measure every way, print a table beside theory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", default=[*CONFIGS, "zero3-large"], choices=[*CONFIGS, "zero3-large"])
    parser.add_argument("--steps", type=int, default=3, help="N: runs of N and 2N steps are compared")
    parser.add_argument("--rank", type=int, default=16, help="of the adapter")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    two_ranks.require_own_network()
    rows = []
    for way in arguments.ways:
        rows += measured(way, arguments.steps, arguments.rank)
        print(f"{way}: done", file=sys.stderr)
    a, shared, whole = sizes(arguments.rank)
    print(f"\nbytes a step; a = {a:,} trained elements, W = {shared:,} and s = {whole:,} bytes of base in fp32\n")
    print(two_ranks.table(rows))
    if arguments.json:
        found = {"adapter_elements": a, "shared_bytes": shared, "whole_bytes": whole, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1))
    if any(row["theory"] > 2 * row["measured"] for row in rows):
        sys.exit("less than half of what must travel went over the loopback device: gloo found another way")


def measured(way: str, steps: int, rank: int) -> list[dict[str, Any]]:
    """A row for each number of micro-batches."""
    from merge_memory import make_base

    a, shared, whole = sizes(rank)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "base").mkdir()
        make_base(folder / "base", config())
        two_ranks.write_text(folder / "text.txt", 60)
        runs = [(MICRO_BATCHES[0], 1), *((many, n * steps) for many in MICRO_BATCHES for n in (1, 2))]
        two_ranks.write_jobs(folder, [job(folder, f"run-{i}", *run, rank) for i, run in enumerate(runs)])
        two_ranks.launch(config_of(way, folder), Path(__file__), folder, own_network=True)
        figures = json.loads((folder / "figures.json").read_text())
    *runs_of_n, idle = figures[1:]  # connections are made in the first run
    rows = []
    for number, many in enumerate(MICRO_BATCHES):
        short, long = runs_of_n[2 * number : 2 * number + 2]
        expected = theory(way, many, a, shared, whole)
        a_step = (long["bytes"] - short["bytes"]) / steps
        seconds = (long["seconds"] - short["seconds"]) / steps
        chatter = idle["bytes"] / idle["seconds"] * seconds
        rows.append({
            "way": way, "micro-batches": many, "measured": round(a_step), "theory": expected,
            "measured / theory": round(a_step / expected, 4), "in units of a": round(a_step / a, 2),
            "beats and launcher %": round(100 * chatter / a_step, 4),
        })  # fmt: skip
    return rows


def theory(way: str, micro_batches: int, a: int, shared: int, whole: int) -> int:
    """Bytes a step of both ranks together, as explained above."""
    if way == "ddp":
        return 8 * a
    return 12 * a if way in ("zero1", "zero2") else 12 * a + whole + GATHERS[way] * micro_batches * shared


def config() -> GPT2Config:
    """Matrices as large as those of GPT-2, few of them."""
    from transformers import GPT2Config

    return GPT2Config(n_layer=2, vocab_size=2048, n_positions=128, bos_token_id=256, eos_token_id=256)


def job(folder: Path, name: str, micro_batches: int, steps: int, rank: int) -> dict[str, Any]:
    """A recipe that takes so many steps."""
    return two_ranks.recipe(
        folder, name, base=str(folder / "base"), data={"block_size": 64}, lora={"rank": rank}, optim={"steps": steps},
        batch={"global_size": BLOCKS, "micro_size": BLOCKS // 2 // micro_batches}, run={"precision": "fp32"},
    )  # fmt: skip


def config_of(way: str, folder: Path) -> Path:
    """The shipped configuration, or one of `zero3-large` made from it."""
    if way in CONFIGS:
        return ROOT / "accelerate_configs" / f"{CONFIGS[way]}.yaml"
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (folder / "zero3.json").write_text(json.dumps(zero3))
    shipped = (ROOT / "accelerate_configs" / f"{CONFIGS['zero3']}.yaml").read_text()
    config = folder / "zero3-large.yaml"
    config.write_text(shipped.replace("ds_configs/zero3.json", str(folder / "zero3.json")))
    return config


def sizes(rank: int) -> tuple[int, int, int]:
    """Trained elements, and bytes of the base in fp32 that ZeRO-3 shares out and that it keeps whole."""
    from peftune.config.recipe import LoraSection
    from peftune.training.memory_model import ZeroSettings, shapes_of, shared_out

    shapes = shapes_of(config(), LoraSection(rank=rank))
    shared = sum(shared_out(shapes, ZeroSettings()))
    return shapes.adapter, 4 * shared, 4 * (sum(shapes.frozen()) - shared)


def be_a_rank(folder: Path) -> None:
    """Train every recipe of `folder`/jobs.json on one group of ranks; the first rank writes what travelled in each."""
    import torch

    from peftune.config.recipe import recipe_from
    from peftune.training import run
    from peftune.training.distributed import zero
    from peftune.training.distributed.watchdog import watched

    figures = []
    with zero.joined():
        for values in json.loads((folder / "jobs.json").read_text()):
            before, start = bytes_sent(), time.monotonic()
            run.train(recipe_from(values, []))
            torch.distributed.barrier()
            figures.append({"bytes": bytes_sent() - before, "seconds": time.monotonic() - start})
        accelerator = zero.start([], str(folder))
        with watched(accelerator):  # nothing but the beats of the watchdog and the launcher's own
            before = bytes_sent()
            time.sleep(IDLE_SECONDS)
            figures.append({"bytes": bytes_sent() - before, "seconds": IDLE_SECONDS})
            torch.distributed.barrier()
        if accelerator.is_main_process:
            (folder / "figures.json").write_text(json.dumps(figures))


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        be_a_rank(Path(sys.argv[2]))
    else:
        main()
