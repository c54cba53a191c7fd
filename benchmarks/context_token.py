"""What a missing `<|endoftext|>` before a text costs, and whether training on bare beginnings is a cure.

    python -m benchmarks.context_token input.txt                        shares 0, 0.1, 0.3; seeds 0 to 2
    python -m benchmarks.context_token input.txt --shares 0,1 --steps 300

For each share of training documents that begin without the context token, and each seed, an adapter is trained; then
held-out documents are scored with the token before them and without it, over the same tokens: all but the first of
each, which nothing predicts where the token is missing. Figures are nats per token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from peftune.adapters.attach import load_with_rows
from peftune.adapters.base_of import read_for
from peftune.config.data_section import Source
from peftune.config.recipe import recipe_from
from peftune.data import batches
from peftune.data.batches import NOT_SCORED, Blocks
from peftune.data.packing import Windows, cut_into_windows
from peftune.data.sources.read import read_documents
from peftune.data.tokens.store import prepare
from peftune.model.base import Base, open_base
from peftune.model.load import load_model
from peftune.model.loss import LossModel
from peftune.training.run import train

BLOCK = 128
HELD_OUT = 25  # one document in so many


@contextmanager
def bare_beginnings(share: float, seed: int) -> Iterator[None]:
    """While open, this share of the documents is packed without its first token, the context."""

    def cut(lengths: np.ndarray, block_size: int) -> Windows:
        windows = cut_into_windows(lengths, block_size)
        chosen = np.random.default_rng(seed).random(len(lengths)) < share
        bare = chosen[windows.example] & (windows.start == 0) & (windows.stop > 2)
        return replace(windows, start=windows.start + bare)

    batches.cut_into_windows = cut
    try:
        yield
    finally:
        batches.cut_into_windows = cut_into_windows


def split(data: str, folder: Path) -> tuple[str, str]:
    """Files of the documents to learn from, and of every 25th, held out."""
    texts = [document.text for document in read_documents(Source(path=data), "auto")]
    parts = {"train.jsonl": [t for n, t in enumerate(texts) if n % HELD_OUT], "held.jsonl": texts[::HELD_OUT]}
    for name, chosen in parts.items():
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in chosen), encoding="utf-8")
    return str(folder / "train.jsonl"), str(folder / "held.jsonl")


@torch.no_grad()
def scores(base: Base, adapter: Path | None, held_out: str) -> tuple[float, float]:
    """Nats per token of the held-out documents with the context token before them, and without it."""
    model = load_model(base) if adapter is None else load_with_rows(base, *read_for(adapter, base))
    scorer = LossModel(model).eval()
    store = prepare([Source(path=held_out)], base.tokenizer, base.tokenizer_fingerprint, " ", "auto")
    whole = np.flatnonzero((store.lengths > 2) & (store.lengths <= BLOCK))
    found = []
    for share in (0.0, 1.0):
        with bare_beginnings(share, 0):
            blocks = Blocks.of(store, whole, BLOCK)
        nats, tokens = 0.0, 0
        for batch in blocks.batches(range(len(blocks)), 16):
            targets = batch.targets if share else batch.targets.masked_fill(batch.positions == 0, NOT_SCORED)
            nats += float(scorer(batch.ids, batch.positions, targets, batch.segments))
            tokens += int((targets != NOT_SCORED).sum())
        found.append((nats / tokens, tokens))
    assert found[0][1] == found[1][1], "both score the same tokens"
    return found[0][0], found[1][0]


def main() -> None:
    """Print a line for each adapter, then means and standard deviations over seeds; with `--json` write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a text file, or builtin:DOMAIN/PART")
    parser.add_argument("--base", default="builtin:small")
    parser.add_argument("--shares", default="0,0.1,0.3")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=40, help="of 8 blocks of 128 tokens")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    shares = [float(share) for share in options.shares.split(",")]
    found: dict[str, list[tuple[float, float]]] = {"base": [], **{f"share {share:g}": [] for share in shares}}

    def note(name: str, pair: tuple[float, float]) -> None:
        found[name].append(pair)
        print(f"{name}: with the token {pair[0]:.4f}, without {pair[1]:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        train_on, held_out = split(options.data, Path(folder))
        base = open_base(options.base)
        note("base", scores(base, None, held_out))
        for seed in map(int, options.seeds.split(",")):
            for share in shares:
                out = Path(folder) / f"{share}-{seed}"
                values = {
                    "base": options.base,
                    "data": {"train": train_on, "validation": 0, "block_size": BLOCK},
                    "optim": {"steps": options.steps, "lr": 2e-3},
                    "batch": {"global_size": 8},
                    "run": {"out": str(out), "seed": seed, "precision": "fp32", "eval_every": 0},
                }
                with bare_beginnings(share, seed):
                    train(recipe_from(values, []))
                note(f"share {share:g}", scores(base, out, held_out))
    for name, pairs in found.items():
        columns = list(zip(*pairs, strict=True))
        means = [statistics.mean(column) for column in columns]
        spread = [statistics.stdev(column) if len(pairs) > 1 else 0.0 for column in columns]
        print(f"{name}: {means[0]:.4f} ± {spread[0]:.4f}, {means[1]:.4f} ± {spread[1]:.4f} ({len(pairs)} seeds)")
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
