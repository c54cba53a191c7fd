"""B9: from a file of text to packed blocks, against `datasets.map` over a fast tokenizer.

    python -m benchmarks.data_path [--megabytes 20] [--data FILE] [--tokenizer DIR]

peftune's time is everything: reading the file, hashing, tokenising, writing and checking the cache, packing. The peers
are timed more kindly: `datasets.map` on a data set that is loaded already, without packing; and with loading and
TRL's packing as a line of its own. Caches are new in each round.
"""

from __future__ import annotations

import importlib
import shutil
import sys
import time
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from benchmarks.corpus import corpus_of_size
from benchmarks.measure import Result, Row, finish, ratio
from benchmarks.options import parse, parser, prepared
from benchmarks.rounds import Channel, Contestant, interleave
from benchmarks.training import fastest

OURS = "peftune, file to blocks"


def serve(job: dict[str, Any], channel: Channel) -> None:
    """One round prepares the whole file in a new cache; the value is MB of text per second."""
    from peftune.model.base import Base

    tokenizer = Base(Path(job["base"])).tokenizer
    work = {"ours": _ours, "map": _map, "whole": _whole}[job["way"]]
    scratch = Path(job["scratch"])
    channel.ready(settings={"way": job["way"], "processes": job["processes"]})
    for _ in channel.rounds():
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        with redirect_stdout(sys.stderr):
            seconds, tokens = work(job, tokenizer, scratch)
        channel.answer(job["megabytes"] / seconds, seconds=seconds, tokens=tokens)


def _ours(job: dict[str, Any], tokenizer: Any, scratch: Path) -> tuple[float, int]:
    import numpy as np

    from peftune.config.recipe import Source
    from peftune.data.batches import Blocks
    from peftune.data.tokens.store import prepare

    start = time.perf_counter()
    store = prepare([Source(path=job["file"])], tokenizer, "benchmark", " ", "auto", scratch)
    blocks = Blocks.of(store, np.arange(len(store)), job["block"])
    return time.perf_counter() - start, blocks.tokens() - len(store)  # without the end of each document


def _map(job: dict[str, Any], tokenizer: Any, scratch: Path) -> tuple[float, int]:
    loaded = _load(job, scratch)
    start = time.perf_counter()
    mapped = _mapped(loaded, job, tokenizer)
    return time.perf_counter() - start, _count(mapped)


def _whole(job: dict[str, Any], tokenizer: Any, scratch: Path) -> tuple[float, int]:
    pack: Any = importlib.import_module("trl").pack_dataset
    start = time.perf_counter()
    mapped = _mapped(_load(job, scratch), job, tokenizer)
    pack(mapped.select_columns(["input_ids"]), job["block"], "bfd")
    return time.perf_counter() - start, _count(mapped)


def _load(job: dict[str, Any], scratch: Path) -> Any:
    from datasets import load_dataset

    return load_dataset("json", data_files=job["file"], cache_dir=str(scratch), split="train")


def _mapped(loaded: Any, job: dict[str, Any], tokenizer: Any) -> Any:
    return loaded.map(
        lambda rows: tokenizer(rows["text"], verbose=False), batched=True, remove_columns=loaded.column_names,
        num_proc=job["processes"], load_from_cache_file=False,
    )  # fmt: skip


def _count(mapped: Any) -> int:
    return sum(len(row) for batch in mapped.select_columns(["input_ids"]).iter(1000) for row in batch["input_ids"])


def run(arguments: Namespace) -> Result:
    """Corpus, rounds, comparison of the number of tokens, row."""
    with prepared(arguments) as setup:
        file = setup.root / "corpus.jsonl"
        size = corpus_of_size(file, arguments.megabytes, arguments.data)
        ways = {
            OURS: ("ours", None), "datasets.map batched": ("map", None),
            f"datasets.map batched, num_proc={arguments.processes}": ("map", arguments.processes),
            "load, datasets.map, TRL's packing": ("whole", None),
        }  # fmt: skip
        job = {"base": str(setup.base), "file": str(file), "block": arguments.block, "megabytes": size / 1e6}
        everyone = []
        for i, (name, (way, count)) in enumerate(ways.items()):
            own = {**job, "way": way, "processes": count, "scratch": str(setup.root / f"scratch-{i}")}
            everyone.append(Contestant(name, "benchmarks.data_path", own, "MB/s", name == OURS))
        interleave(everyone, arguments.rounds, arguments.warmup, setup.environment())
        counts = {c.name: c.rounds[-1]["tokens"] for c in everyone if c.rounds}
        if len(set(counts.values())) > 1:
            raise SystemExit(f"the gate is closed: not the same number of tokens: {counts}")
        gate = {"tokens, the same for all": f"{counts[OURS]:,}"}
        result = Result("B9", "tokenise and pack", {**setup.told(), "text": f"{size / 1e6:.1f} MB"}, gate)
    result.add(everyone)
    best = fastest(everyone[1:3])
    if best is not None:
        result.rows.append(Row("B9", "tokenise and pack", best.name, ratio(everyone[0], best), 3, "at least"))
    whole = everyone[3]
    against = ratio(everyone[0], whole)
    result.rows.append(
        Row("B9", "tokenise and pack", whole.name, against, 0, "information", reason=whole.failure or "")
    )
    return result


def main() -> None:
    """Measure and tell."""
    made = parser(__doc__)
    made.add_argument("--megabytes", type=float, default=20.0, help="text in the corpus (default 20)")
    made.add_argument("--block", type=int, default=1024)
    made.add_argument("--processes", type=int, default=2, help="num_proc of the second datasets.map")
    arguments = parse(made)
    finish(run(arguments), arguments.json)


if __name__ == "__main__":
    main()
