"""A corpus larger than memory should need: how far a process grows while it turns text into packed blocks.

    python -m benchmarks.large_corpus [--megabytes 100,1000] [--characters 200,2000]

For each size and each mean length of a document a process of its own reads a file of JSON lines, tokenises it into a
new cache, opens it from there again, packs it, and takes some batches. Growth is the largest resident set less that
before it began, mapped files included (Linux). What grows with a corpus should be a few numbers a document, not its
text.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.corpus import corpus_texts
from benchmarks.memory import MemoryGrowth
from benchmarks.rounds import Channel, Contestant, interleave

_BLOCK, _STEPS = 1024, 100


def serve(job: dict[str, Any], channel: Channel) -> None:
    """One round prepares and packs the file; the value is MB of growth."""
    import numpy as np

    from peftune.config.recipe import Source
    from peftune.data.batches import Blocks
    from peftune.data.sampler import blocks_of_step
    from peftune.data.tokens.store import prepare
    from peftune.model.base import open_base

    tokenizer = open_base("builtin:small").tokenizer
    sources, cache = [Source(path=job["file"])], Path(job["scratch"])
    tokenizer("warm up")
    channel.ready(settings={key: job[key] for key in ("megabytes", "characters")})
    for _ in channel.rounds():
        growth, seconds = MemoryGrowth(), {}
        growth.before_first_step()
        begun = time.perf_counter()
        prepare(sources, tokenizer, "benchmark", " ", "auto", cache)
        seconds["tokenise"] = time.perf_counter() - begun
        tokenising, begun = growth.grown(), time.perf_counter()
        store = prepare(sources, tokenizer, "benchmark", " ", "auto", cache)
        seconds["open"], begun = time.perf_counter() - begun, time.perf_counter()
        blocks = Blocks.of(store, np.arange(len(store)), _BLOCK)
        seconds["pack"] = time.perf_counter() - begun
        for step in range(min(_STEPS, len(blocks) // 8)):
            for _batch in blocks.batches(blocks_of_step(step, len(blocks), 8, 0), 8):
                pass
        grown = growth.grown()
        assert grown is not None and tokenising is not None, "this system does not tell what a process holds"
        tokens = int(store.lengths.sum())
        channel.answer(
            grown / 1e6, tokenising=tokenising / 1e6, seconds=seconds, documents=len(store), tokens=tokens,
            fill=blocks.packing.fill(),
        )  # fmt: skip


def write(path: Path, megabytes: float, characters: int) -> int:
    """JSON lines of about so many characters each, no two alike; the number of documents."""
    written, documents = 0, 0
    with open(path, "w", encoding="utf-8") as file:
        for text in _pieces(characters):
            file.write(json.dumps({"text": f"{documents} {text}"}) + "\n")
            written += len(text)
            documents += 1
            if written >= megabytes * 1e6:
                return documents
    raise AssertionError("the pieces are endless")


def _pieces(characters: int) -> Iterator[str]:
    text = "\n".join(corpus_texts())
    for start in cycle(range(0, len(text) - characters, characters)):
        yield text[start : start + characters]


def main() -> None:
    """Write corpora, measure, tell."""
    made = ArgumentParser(description=__doc__)
    made.add_argument("--megabytes", type=_numbers, default=[100.0, 1000.0], help="sizes, with commas")
    made.add_argument("--characters", type=_numbers, default=[200.0, 2000.0], help="of a document, with commas")
    made.add_argument("--json", type=Path, help="also write what was found")
    arguments = made.parse_args()
    found = run(arguments)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def run(arguments: Namespace) -> list[dict[str, Any]]:
    """One process after the other."""
    found = []
    with tempfile.TemporaryDirectory(prefix="peftune-bench-") as scratch:
        for characters in map(int, arguments.characters):
            for megabytes in arguments.megabytes:
                file, cache = Path(scratch) / "corpus.jsonl", Path(scratch) / "cache"
                documents = write(file, megabytes, characters)
                job = {"file": str(file), "scratch": str(cache), "megabytes": megabytes, "characters": characters}
                one = Contestant(f"{megabytes:g} MB", "benchmarks.large_corpus", job, "MB", must_run=True)
                interleave([one], 1, 0, {}, at_once=False)
                (measured,) = one.rounds
                if measured["documents"] != documents:
                    raise SystemExit(f"the gate is closed: {measured['documents']} of {documents} documents")
                found.append({**job, **measured})
                print(_told(found[-1]), flush=True)
                shutil.rmtree(cache)
    return found


def _told(one: dict[str, Any]) -> str:
    seconds = ", ".join(f"{doing} {value:.1f} s" for doing, value in one["seconds"].items())
    speed = one["megabytes"] / one["seconds"]["tokenise"]
    return (
        f"{one['megabytes']:g} MB in {one['documents']:,} documents, {one['tokens']:,} tokens: grew by "
        f"{one['value']:.0f} MB (tokenising {one['tokenising']:.0f} MB), "
        f"{1e6 * one['value'] / one['documents']:.0f} bytes a document; {seconds}; {speed:.1f} MB/s"
    )


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


if __name__ == "__main__":
    main()
