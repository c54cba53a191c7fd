"""Two CPU ranks, started as a person starts them: bytes that travel in a step, bytes that each rank holds.

Each group of ranks is started with `accelerate launch` and a shipped cpu-2*.yaml (`launch`).

Traffic: each group of ranks is in a network namespace of its own with nothing in it but a loopback device. What that
device has sent is what the two ranks and their launcher have sent each other, TCP headers included. A run of 2N steps
less one of N holds no start-up, evaluation or ending. Every way learns the same blocks twice: as one micro-batch a
step, and as four. The base has random weights, two blocks of GPT-2's width and few tokens. `zero3-large` is ZeRO-3 that
gives every weight back after its forward and gathers none ahead, as it does with most of a base that is far larger than
its reuse distance of 200M weights.

The figures are of both directions together; a rank sends half. Theory for two ranks, with a trained elements in fp32,
W bytes of base weights that ZeRO-3 shares out and s bytes of those that it replicates: reducing S bytes in a ring (or
by halving and doubling) takes two rounds, scatter and gather, in each of which each of n ranks sends (n-1)/n of S; for
n = 2 that is S a rank, 2S together.

    ddp           8a         one all-reduce of 4a bytes
    zero1, zero2  12a        an all-reduce (DeepSpeed reduces an adapter so), then a gather of the updated halves, 4a
    zero3         12a+s+kW   a reduce-scatter, which gloo does as an all-reduce, 8a; after the update, a gather of all
                             that is replicated, of the adapter (4a) and the base (s); and W for each of k gathers

Where a reduce-scatter is one (NCCL), ZeRO-3 sends 4a less. Linux only; exit code 2 where namespaces are not permitted.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from benchmarks.harness.corpus import write_corpus
from benchmarks.harness.memory import MemoryGrowth, largest, tensor_bytes
from benchmarks.harness.options import Setup, fresh, main
from benchmarks.harness.report import Result
from benchmarks.harness.workers import ROOT
from peftune.config.recipe import LoraSection, Recipe, recipe_from
from peftune.training import run
from peftune.training.distributed import start
from peftune.training.distributed.watchdog import watch_peers
from peftune.training.planning.memory_model import ZeroSettings, bytes_per_rank, shapes_of, shared_out

CONFIGS = {"ddp": "cpu-2", "zero1": "cpu-2-zero1", "zero2": "cpu-2-zero2", "zero3": "cpu-2-zero3"}
_OWN_NETWORK = ["unshare", "--user", "--map-root-user", "--net"]  # begins with its only device off
MICRO_BATCHES = (1, 4)  # of each rank in a step
BLOCKS = 8  # of a step, on both ranks
IDLE_SECONDS = 12.0
GATHERS = {"zero3": 1, "zero3-large": 2}  # of the base in a micro-batch
TOLERANCE = 0.05


def traffic(setup: Setup) -> Result:
    """Bytes that travel per optimizer step, measured on two CPU ranks: DDP, ZeRO-1, ZeRO-2, ZeRO-3.

    python -m benchmarks.ranks traffic [--ways ddp,zero3] [--steps 3] [--rank 16] [--json F]

    Each group of ranks runs in a network namespace of its own with nothing in it but a loopback device, whose bytes are
    counted; what theory expects stands at the top of benchmarks/ranks.py. Linux only; exit code 2 where namespaces are
    not permitted.
    """
    require_own_network()
    a = setup.arguments
    elements, shared, replicated = sizes(a.rank)
    result = Result("traffic", "bytes a step", {"trained elements a": elements, "W": shared, "s": replicated})
    rows = [row for way in a.ways.split(",") for row in traffic_of(setup, way)]
    result.notes = [", ".join(f"{key} {value}" for key, value in row.items()) for row in rows]
    if any(row["theory"] > 2 * row["measured"] for row in rows):
        sys.exit("less than half of what must travel went over the loopback device: gloo found another way")
    return result


def traffic_of(setup: Setup, way: str) -> list[dict[str, Any]]:
    """A row for each number of micro-batches."""
    rank, steps, folder = setup.arguments.rank, setup.arguments.steps, fresh(setup.root / way)
    a, shared, replicated = sizes(rank)
    write_base(folder / "base")
    runs = [(MICRO_BATCHES[0], 1), *((many, n * steps) for many in MICRO_BATCHES for n in (1, 2))]
    fixed = {"base": str(folder / "base"), "data.block_size": 64, "lora.rank": rank, "run.precision": "fp32"}
    fixed |= {"batch.global_size": BLOCKS}
    recipes = [fixed | {"batch.micro_size": BLOCKS // 2 // many, "optim.steps": n} for many, n in runs]
    launch(config_of(way, folder), folder, recipes, own_network=True)
    figures = json.loads((folder / "rank-0.json").read_text())
    *runs_of_n, idle = figures[1:]  # connections are made in the first run
    rows = []
    for many, short, long in zip(MICRO_BATCHES, runs_of_n[::2], runs_of_n[1::2], strict=True):
        expected = theory(way, many, a, shared, replicated)
        a_step, seconds = ((long[key] - short[key]) / steps for key in ("bytes", "seconds"))
        chatter = idle["bytes"] / idle["seconds"] * seconds
        rows.append({
            "way": way, "micro-batches": many, "measured": round(a_step), "theory": expected,
            "measured / theory": round(a_step / expected, 4), "in units of a": round(a_step / a, 2),
            "beats and launcher %": round(100 * chatter / a_step, 4),
        })  # fmt: skip
    return rows


def theory(way: str, micro_batches: int, a: int, shared: int, replicated: int) -> int:
    """Bytes a step of both ranks together, as explained above."""
    if way == "ddp":
        return 8 * a
    return 12 * a if way in ("zero1", "zero2") else 12 * a + replicated + GATHERS[way] * micro_batches * shared


def config() -> GPT2Config:
    """Matrices as large as those of GPT-2, few of them."""
    return GPT2Config(n_layer=2, vocab_size=2048, n_positions=128, bos_token_id=256, eos_token_id=256)


def write_base(directory: Path) -> None:
    """Random weights, and a tokenizer of single bytes: no vocabulary of text fits into so few rows."""
    GPT2LMHeadModel(config()).save_pretrained(directory)
    symbols = {symbol: number for number, symbol in enumerate(sorted(ByteLevel.alphabet()))}
    GPT2Tokenizer(vocab=symbols, merges=[]).save_pretrained(directory)


def config_of(way: str, folder: Path) -> Path:
    """The shipped configuration, or one of `zero3-large` made from it."""
    if way in CONFIGS:
        return ROOT / "accelerate_configs" / f"{CONFIGS[way]}.yaml"
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    zero3["zero_optimization"] |= {"stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}
    (folder / "zero3.json").write_text(json.dumps(zero3))
    shipped, config = config_of("zero3", folder).read_text(), folder / "zero3-large.yaml"
    config.write_text(shipped.replace("ds_configs/zero3.json", str(folder / "zero3.json")))
    return config


def sizes(rank: int) -> tuple[int, int, int]:
    """Trained elements, and bytes of the base in fp32 that ZeRO-3 shares out and that it replicates."""
    shapes = shapes_of(config(), LoraSection(rank=rank))
    shared = sum(shared_out(shapes, ZeroSettings()))
    return shapes.adapter, 4 * shared, 4 * (sum(shapes.frozen()) - shared)


def memory(setup: Setup) -> Result:
    """Bytes that each of two CPU ranks holds, measured and by formula: DDP and ZeRO 1-3, base in fp32 to nf4.

    python -m benchmarks.ranks memory [--shape small] [--rank 16] [--ways ddp,zero3] [--json F]

    Every way of holding the base trains three steps. Printed are megabytes of the rank that holds most, measured and
    then by the formulas of peftune/training/planning/memory_model.py, after the last step:

    - weights: frozen and trained, scales of quantised ones included (`metrics.jsonl`, events "start" and "memory");
    - optimizer: AdamW's moments and ZeRO's master copies (event "memory");
    - all tensors: every tensor of the process that was not there before the run, each storage once;
    - gathered: most bytes of parameters that ZeRO-3 had gathered at one time, looked at every few milliseconds;
    - resident growth: largest resident set of the run less that before it (Linux: VmHWM, mapped pages of the base's
      file, activations and what Python holds included; buffers that nothing has written to are not).

    Ends with code 1 where one of the first three is off by more than 5 %, or more was gathered than foreseen.
    """
    result = Result("ranks", "bytes of a rank", setup.settings())
    rows = [row for way in setup.arguments.ways.split(",") for row in memory_of(setup, way)]
    result.notes = [", ".join(f"{key} {_megabytes(value)}" for key, value in row.items()) for row in rows]
    if wrong := [problem for row in rows for problem in problems(row)]:
        print(result.description())
        sys.exit("\n".join(wrong))
    return result


def _megabytes(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(f"{part / 1e6:,.1f}" for part in value)
    return f"{value / 1e6:,.0f} MB" if isinstance(value, int) else str(value)


def memory_of(setup: Setup, way: str) -> list[dict[str, Any]]:
    """A row for each way of holding the base; ZeRO-3 refuses quantised ones."""
    rank, folder = setup.arguments.rank, fresh(setup.root / way)
    shapes = shapes_of(setup.arguments.shape.config(), LoraSection(rank=rank))
    packed = () if way == "zero3" else ("int8", "nf4")
    kinds: list[tuple[Any, Any]] = [("fp32", None), ("bf16", None), *(("bf16", kind) for kind in packed)]
    fixed = {"base": str(setup.base), "data.block_size": 128, "lora.rank": rank, "optim.steps": 3}
    fixed |= {"batch.global_size": 4, "batch.micro_size": 1}
    recipes = [fixed | {"run.precision": precision, "quantize": kind} for precision, kind in kinds]
    launch(config_of(way, folder), folder, recipes)
    rows = []
    for number, (precision, quantize) in enumerate(kinds):
        looked_at = [json.loads((folder / f"rank-{r}.json").read_text())[number] for r in (0, 1)]
        lines = (folder / f"run-{number}" / "metrics.jsonl").read_text().splitlines()
        events = {event["event"]: event for event in map(json.loads, lines)}
        held = {key: max(each[key] for each in events["memory"]["bytes_per_rank"]) for key in
                ("parameters", "optimizer_state", "gradient")}  # fmt: skip
        if quantize:  # the event "memory" leaves out the scales
            held["parameters"] = events["start"]["base_bytes"] + 4 * shapes.adapter
        seen = {key: max(look[key] for look in looked_at) for key in ("tensors", "gathered", "growth")}
        foreseen = bytes_per_rank(shapes, way, 2, precision, quantize)  # type: ignore[arg-type]
        rows.append({
            "way": way, "base": quantize or precision,
            "weights": [held["parameters"], foreseen.base + foreseen.adapter],
            "optimizer": [held["optimizer_state"], foreseen.optimizer_state],
            "gradient": [held["gradient"], foreseen.gradient],
            "all tensors": [seen["tensors"], foreseen.held],
            "gathered": [seen["gathered"], foreseen.gathered if way == "zero3" else 0],
            "resident growth": seen["growth"],
        })  # fmt: skip
    return rows


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


def worker(folder: Path) -> None:
    """Train every recipe of `folder` on one group of ranks; each rank writes what travelled in each, and what it held.

    Last comes a rest, in which nothing travels but the beats of the watchdog and the launcher's own.
    """
    looks: list[dict[str, float]] = []
    export, train_step = run.export, run.train_step

    def export_and_look(running: run.Run) -> run.Delivery:
        looks[-1]["tensors"] += tensor_bytes()
        return export(running)

    def step_and_look(learner: Any, *rest: Any) -> Any:
        parameters = [p for p in learner.forward.module.parameters() if hasattr(p, "ds_tensor")]
        with largest(lambda: sum(p.numel() * p.element_size() for p in parameters)) as most:
            result = train_step(learner, *rest)
        looks[-1]["gathered"] = max(looks[-1]["gathered"], most[0])
        return result

    run.export, run.train_step = export_and_look, step_and_look
    with start.process_group():
        for recipe in recipes_of(folder):
            looks.append({"bytes": -bytes_sent(), "gathered": 0, "tensors": -tensor_bytes()})
            growth, begun = MemoryGrowth().begin(), time.monotonic()
            run.train(recipe)
            torch.distributed.barrier()
            looks[-1] |= {"growth": growth.grown() or 0, "seconds": time.monotonic() - begun}
            looks[-1]["bytes"] += bytes_sent()
        accelerator = start.start([], str(folder))
        with watch_peers(accelerator):
            looks.append({"bytes": -bytes_sent(), "seconds": IDLE_SECONDS})
            time.sleep(IDLE_SECONDS)
            looks[-1]["bytes"] += bytes_sent()
            torch.distributed.barrier()
    (folder / f"rank-{accelerator.process_index}.json").write_text(json.dumps(looks))


def launch(config: Path, folder: Path, recipes: list[dict[str, Any]], own_network: bool = False) -> None:
    """Run a worker over recipes on two ranks, as a person would."""
    write_corpus(folder / "text.jsonl", megabytes=0.05)
    (folder / "recipes.json").write_text(json.dumps(recipes), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += [__file__, "rank", str(folder)]
    settings = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    settings |= {"PEFTUNE_CACHE": str(folder / "cache"), "GLOO_SOCKET_IFNAME": "lo"}
    if own_network:  # where nothing but one loopback device is, unused so far
        command = [*_OWN_NETWORK, "sh", "-c", 'ip link set lo up && exec "$@"', "sh", *command]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-4000:]}\n{config.name}: the ranks ended with {done.returncode}")


def recipes_of(folder: Path) -> Iterator[Recipe]:
    """What a rank is to train, one after the other: `base` and the like, by keys with dots."""
    for number, keys in enumerate(json.loads((folder / "recipes.json").read_text())):
        fixed = {"data.train": str(folder / "text.jsonl"), "data.validation": 0}
        fixed |= {"run.out": str(folder / f"run-{number}"), "run.eval_every": 0, "run.save_every": 0}
        yield recipe_from({}, [f"{key}={json.dumps(value)}" for key, value in {**fixed, **keys}.items()])


def require_own_network() -> None:
    """End with one line and code 2 where the system gives nobody a network of his own."""
    if shutil.which("unshare") is None or subprocess.run([*_OWN_NETWORK, "true"], stderr=subprocess.DEVNULL).returncode:
        print("cannot count bytes here: network namespaces are not permitted (Linux, `unshare`)", file=sys.stderr)
        sys.exit(2)


def bytes_sent() -> int:
    """What the loopback device of this network has sent; both ends of every connection are here."""
    return int(psutil.net_io_counters(pernic=True, nowrap=False)["lo"].bytes_sent)


BENCHMARKS = {"traffic": traffic, "memory": memory}

if __name__ == "__main__":
    if sys.argv[1] == "rank":
        worker(Path(sys.argv[2]))
    else:
        main("ranks", BENCHMARKS)
