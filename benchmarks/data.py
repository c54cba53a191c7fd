"""From a file of text to packed blocks: speed against `datasets.map`, and memory of a corpus of a gigabyte."""

from __future__ import annotations

import importlib
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness.corpus import write_corpus
from benchmarks.harness.memory import MemoryGrowth
from benchmarks.harness.options import Setup, fresh, main
from benchmarks.harness.report import Result, compare, fastest, row
from benchmarks.harness.workers import Channel, Contestant
from peftune.config.data_section import Source
from peftune.data.batches import Blocks, blocks_of_step
from peftune.data.tokens.store import prepare
from peftune.model.base import Base

OURS = "peftune, file to blocks"


def speed_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round prepares the file in a new cache; the value is MB of text per second."""
    tokenizer, scratch = Base(Path(job["base"])).tokenizer, Path(job["scratch"])
    work = _by_peftune if job["way"] == "ours" else _by_map
    for _ in channel.rounds(way=job["way"], processes=job["processes"]):
        fresh(scratch)
        with redirect_stdout(sys.stderr):
            seconds, tokens = work(job, tokenizer, scratch)
        channel.send(value=job["megabytes"] / seconds, seconds=seconds, tokens=tokens)


def _by_peftune(job: dict[str, Any], tokenizer: Any, scratch: Path) -> tuple[float, int]:
    start = time.perf_counter()
    store = prepare([Source(path=job["file"])], tokenizer, "benchmark", " ", "auto", scratch)
    blocks = Blocks.of(store, np.arange(len(store)), job["block"])
    return time.perf_counter() - start, blocks.tokens() - len(store)  # without the end of each document


def _by_map(job: dict[str, Any], tokenizer: Any, scratch: Path) -> tuple[float, int]:
    """`datasets.map` over data that is loaded already; «packed» times loading and TRL's packing too."""
    from datasets import load_dataset

    pack: Any = importlib.import_module("trl").pack_dataset if job["way"] == "packed" else None
    start = time.perf_counter()
    loaded = load_dataset("json", data_files=job["file"], cache_dir=str(scratch), split="train")
    if pack is None:
        start = time.perf_counter()
    mapped = loaded.map(
        lambda rows: tokenizer(rows["text"], verbose=False), batched=True, remove_columns=loaded.column_names,
        num_proc=job["processes"], load_from_cache_file=False,
    ).select_columns(["input_ids"])  # fmt: skip
    if pack is not None:
        pack(mapped, job["block"], "bfd")
    seconds = time.perf_counter() - start
    return seconds, sum(len(row) for batch in mapped.iter(1000) for row in batch["input_ids"])


def speed(setup: Setup) -> Result:
    """B9: from a file of text to packed blocks, against `datasets.map` over a fast tokenizer.

    python -m benchmarks.data speed [--megabytes 20] [--data FILE] [--tokenizer DIR]

    peftune's time is everything: reading the file, hashing, tokenising, writing and checking the cache, packing. The
    peers are timed more kindly: `datasets.map` on a data set that is loaded already, without packing; and with loading
    and TRL's packing as a line of its own. Caches are new in each round. The gate compares the number of tokens.
    """
    a, file = setup.arguments, setup.root / "corpus.jsonl"
    write_corpus(file, a.megabytes, data=a.data)
    ways = {
        OURS: ("ours", None), "datasets.map batched": ("map", None),
        f"datasets.map batched, num_proc={a.processes}": ("map", a.processes),
        "load, datasets.map, TRL's packing": ("packed", None),
    }  # fmt: skip
    job = {"base": str(setup.base), "file": str(file), "block": a.block, "megabytes": a.megabytes}
    everyone = []
    for name, (way, processes) in ways.items():
        own = {"way": way, "processes": processes, "scratch": str(setup.root / f"scratch-{len(everyone)}")}
        everyone.append(Contestant(name, "benchmarks.data:speed_worker", job | own, "MB/s", name == OURS))
    setup.interleave(everyone)
    counts = {c.name: c.rounds[-1]["tokens"] for c in everyone if c.rounds}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"the gate is closed: not the same number of tokens: {counts}")
    gate = {"tokens, the same for all": f"{counts[OURS]:,}"}
    result = Result("B9", "tokenise and pack", setup.settings(text=f"{a.megabytes:.1f} MB"), gate).add(everyone)
    ours, *maps, packed = everyone
    best = fastest(maps)
    result.rows = [compare("B9 map", "tokenise and pack", ours, best)] if best else []
    result.rows.append(compare("B9", "tokenise and pack", ours, packed))
    return result


def large_worker(job: dict[str, Any], channel: Channel) -> None:
    """One round prepares and packs the file; the value is MB of growth."""
    tokenizer = Base(Path(job["base"])).tokenizer
    wanted = ([Source(path=job["file"])], tokenizer, "benchmark", " ", "auto", Path(job["scratch"]))
    tokenizer("warm up")
    for _ in channel.rounds():
        growth, marks = MemoryGrowth().begin(), [time.perf_counter()]
        prepare(*wanted)
        marks.append(time.perf_counter())
        tokenising = growth.grown()
        store = prepare(*wanted)
        marks.append(time.perf_counter())
        blocks = Blocks.of(store, np.arange(len(store)), 1024)
        marks.append(time.perf_counter())
        for step in range(min(100, len(blocks) // 8)):
            for _batch in blocks.batches(blocks_of_step(step, len(blocks), 8, 0), 8):
                pass
        grown = growth.grown()
        assert grown is not None and tokenising is not None, "this system does not say what a process holds"
        seconds = dict(zip(("tokenise", "open", "pack"), np.diff(marks).tolist(), strict=True))
        channel.send(
            value=grown / 1e6, tokenising=tokenising / 1e6, seconds=seconds, documents=len(store),
            tokens=int(store.lengths.sum()), fill=blocks.packing.fill(),
        )  # fmt: skip


def large(setup: Setup) -> Result:
    """A corpus larger than memory should need: how far a process grows while it turns text into packed blocks.

    python -m benchmarks.data large [--sizes 100,1000] [--characters 200,2000]

    For each size in MB and each mean length of a document a process of its own reads a file of JSON lines, tokenises it
    into a new cache, opens it from there again, packs it, and takes some batches. Growth is the largest resident set
    less that before it began, mapped files included (Linux). What grows with a corpus should be a few numbers a
    document, not its text.
    """
    a, result = setup.arguments, Result("large", "growth of memory with a corpus", {"block": 1024})
    file, cache = setup.root / "corpus.jsonl", setup.root / "prepared"
    cases = [(int(length), float(size)) for length in a.characters.split(",") for size in a.sizes.split(",")]
    for characters, megabytes in cases:
        documents = write_corpus(file, megabytes, characters)
        job = {"base": str(setup.base), "file": str(file), "scratch": str(fresh(cache))}
        name = f"{megabytes:g} MB, {characters} characters each"
        one = Contestant(name, "benchmarks.data:large_worker", job, "MB", must_run=True)
        setup.interleave([one], at_once=False)
        found = one.rounds[-1]
        if found["documents"] != documents:
            raise SystemExit(f"the gate is closed: {found['documents']} of {documents} documents")
        result.add([one])
        what = f"{name}: {documents:,} documents, {found['tokens']:,} tokens"
        result.rows.append(row("large", what, "before", one.values(), "MB grown"))
        seconds = ", ".join(f"{doing} {value:.1f} s" for doing, value in found["seconds"].items())
        grown = f"{found['tokenising']:.0f} MB while tokenising, {1e6 * found['value'] / documents:.0f} bytes each"
        result.notes.append(f"{name}: {grown}; {seconds}")
    return result


BENCHMARKS = {"speed": speed, "large": large}

if __name__ == "__main__":
    main("data", BENCHMARKS)
