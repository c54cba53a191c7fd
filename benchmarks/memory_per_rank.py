"""Bytes that each of two CPU ranks holds, measured and by formula: DDP and ZeRO 1-3, base in fp32, bf16, int8 or nf4.

    python benchmarks/memory_per_rank.py [--layers 12] [--width 768] [--rank 16] [--ways ddp zero3] [--json F]

The base has random weights and the shape of GPT-2 (50,257 tokens, of which a tokenizer of single bytes uses the first
257: only rows matter). Every way of holding it trains three steps. Measured are, after the last step,

- weights: frozen and trained, scales of quantised ones included (`metrics.jsonl`, events "start" and "memory");
- optimizer: AdamW's moments and ZeRO's master copies (event "memory");
- all tensors: every tensor of the process that was not there before the run, each storage once;
- gathered: most bytes of parameters that ZeRO-3 had gathered at one time, looked at every few milliseconds;
- resident growth: largest resident set of the run less that before it (Linux: VmHWM, mapped pages of the base's file,
  activations and what Python holds included; buffers that nothing has written to are not).

Formulas are those of peftune/training/memory_model.py. Ends with code 1 where one of the first three is off by more
than 5 %, or more was gathered than foreseen.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import two_ranks
from two_ranks import CONFIGS, ROOT

if TYPE_CHECKING:
    from transformers import GPT2Config

HELD_AS = ("fp32", "bf16", "int8", "nf4")
TOLERANCE = 0.05


def main() -> None:
    """Measure every way, print a table beside the formulas."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--ways", nargs="+", default=list(CONFIGS), choices=list(CONFIGS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    from merge_memory import make_base
    from transformers import GPT2Config

    config = GPT2Config(n_layer=arguments.layers, n_embd=arguments.width, n_head=arguments.width // 64)
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        base = Path(scratch) / "base"
        base.mkdir()
        make_base(base, config)
        for way in arguments.ways:
            rows += measured(way, base, config, arguments.rank)
            print(f"{way}: done", file=sys.stderr)
    print("\nbytes of the rank that holds most, in MB; each pair is measured, then by formula\n")
    print(two_ranks.table([in_megabytes(row) for row in rows]))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1))
    if wrong := [problem for row in rows for problem in problems(row)]:
        sys.exit("\n".join(wrong))


def measured(way: str, base: Path, config: GPT2Config, rank: int) -> list[dict[str, Any]]:
    """A row for each way of holding the base; ZeRO-3 refuses quantised ones."""
    from peftune.config.recipe import LoraSection
    from peftune.training.memory_model import bytes_per_rank, shapes_of

    shapes = shapes_of(config, LoraSection(rank=rank))
    held_as = HELD_AS[:2] if way == "zero3" else HELD_AS
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        two_ranks.write_text(folder / "text.txt", 30)
        two_ranks.write_jobs(folder, [job(folder, base, kind, rank) for kind in held_as])
        two_ranks.launch(ROOT / "accelerate_configs" / f"{CONFIGS[way]}.yaml", Path(__file__), folder)
        for number, kind in enumerate(held_as):
            looked_at = [json.loads((folder / f"rank-{r}.json").read_text())[number] for r in (0, 1)]
            events = [json.loads(line) for line in (folder / kind / "metrics.jsonl").read_text().splitlines()]
            told = next(event for event in events if event["event"] == "memory")["bytes_per_rank"]
            start = next(event for event in events if event["event"] == "start")
            weights = max(rank["parameters"] for rank in told)
            if kind in HELD_AS[2:]:  # the event "memory" leaves out the scales
                weights = start["base_bytes"] + 4 * shapes.adapter
            quantize = kind if kind in HELD_AS[2:] else None
            foreseen = bytes_per_rank(shapes, way, 2, "bf16" if quantize else kind, quantize)
            rows.append({
                "way": way, "base": kind,
                "weights": [weights, foreseen.base + foreseen.adapter],
                "optimizer": [max(rank["optimizer_state"] for rank in told), foreseen.optimizer_state],
                "gradient": [max(rank["gradient"] for rank in told), foreseen.gradient],
                "all tensors": [max(look["tensors"] for look in looked_at), foreseen.held],
                "gathered": [max(look["gathered"] for look in looked_at), foreseen.gathered if way == "zero3" else 0],
                "resident growth": max(look["growth"] for look in looked_at),
            })  # fmt: skip
    return rows


def job(folder: Path, base: Path, kind: str, rank: int) -> dict[str, Any]:
    """Three steps of two short blocks on each rank."""
    precision = "fp32" if kind == "fp32" else "bf16"
    return two_ranks.recipe(
        folder, kind, base=str(base), quantize=kind if kind in HELD_AS[2:] else None, data={"block_size": 128},
        lora={"rank": rank}, optim={"steps": 3}, batch={"global_size": 4, "micro_size": 1},
        run={"precision": precision},
    )  # fmt: skip


def in_megabytes(row: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    return {
        key: " ".join(f"{part / 1e6:,.1f}" for part in value) if isinstance(value, list)
        else round(value / 1e6) if isinstance(value, int) else value
        for key, value in row.items()
    }  # fmt: skip


def problems(row: dict[str, Any]) -> list[str]:
    """Where a formula is not what was measured."""
    name = f"{row['way']}, {row['base']}"
    wrong = [
        f"{name}: {key} {row[key][0]:,} bytes, by formula {row[key][1]:,}"
        for key in ("weights", "optimizer", "gradient", "all tensors")
        if abs(row[key][0] / row[key][1] - 1) > TOLERANCE
    ]
    if row["gathered"][0] > row["gathered"][1] * (1 + TOLERANCE):
        wrong.append(f"{name}: gathered {row['gathered'][0]:,} bytes, foreseen at most {row['gathered'][1]:,}")
    return wrong


def be_a_rank(folder: Path) -> None:
    """Train every recipe of `folder`/jobs.json on one group of ranks; each rank writes what it held in each."""
    from peftune.config.recipe import recipe_from
    from peftune.training import run
    from peftune.training.distributed import zero
    from peftune.training.setup import Session

    looks: list[dict[str, int]] = []
    deliver, learn, known = run.deliver, run.learn, {"before": 0, "gathered": 0}

    def deliver_and_look(session: Session) -> run.Delivery:
        looks[-1]["tensors"] = tensor_bytes() - known["before"]
        return deliver(session)

    def learn_and_look(session: Session, stop: Any) -> Any:
        parameters = [p for p in session.adapted.model.parameters() if hasattr(p, "ds_tensor")]
        with most_live(parameters) as most:
            learnt = learn(session, stop)
        looks[-1]["gathered"] = max(looks[-1]["gathered"], most[0])
        return learnt

    run.deliver, run.learn = deliver_and_look, learn_and_look
    with zero.joined():
        for values in json.loads((folder / "jobs.json").read_text()):
            known["before"] = tensor_bytes()
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
            before = status("VmRSS")
            looks.append({"gathered": 0})
            run.train(recipe_from(values, []))
            looks[-1]["growth"] = status("VmHWM") - before
        rank = zero.start([], str(folder)).process_index
    (folder / f"rank-{rank}.json").write_text(json.dumps(looks))


@contextmanager
def most_live(parameters: list[Any]) -> Iterator[list[int]]:
    """The most bytes of weights at one time while the block runs, less those that are there at its beginning."""

    def live() -> int:
        return sum(p.numel() * p.element_size() for p in parameters)

    def look() -> None:
        while not done.wait(0.003):
            most[0] = max(most[0], live() - whole)

    most, whole, done = [0], live(), threading.Event()
    watcher = threading.Thread(target=look, daemon=True)
    if parameters:
        watcher.start()
    yield most
    done.set()


def tensor_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def status(key: str) -> int:
    """A figure of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        be_a_rank(Path(sys.argv[2]))
    else:
        main()
