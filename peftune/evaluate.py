"""Exact evaluation: summed nats over scored tokens, per named domain; the matrix of adapters and domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel

from peftune.adapters.directory import base_of, check_fits, load_onto
from peftune.adapters.provenance import check_base
from peftune.config.recipe import Source
from peftune.console import Console, matrix_table
from peftune.data.batches import Blocks
from peftune.data.tokens.store import prepare
from peftune.errors import UserError
from peftune.files import check_writable, write_json
from peftune.model.base import Base, open_base
from peftune.model.load import DTYPES, load_model
from peftune.model.loss import LossModel, nats_to_perplexity

Figures = dict[str, float]


@dataclass(frozen=True)
class Score:
    """Loss of one model on one domain: `nats` summed over `tokens` scored tokens of `text_bytes` UTF-8 bytes."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    def figures(self) -> Figures:
        """loss (nats per token), perplexity (its exponential), bits per byte of the scored text."""
        bits = self.nats / math.log(2) / max(1, self.text_bytes)
        return {"loss": self.loss, "perplexity": nats_to_perplexity(self.loss), "bits_per_byte": bits}


@torch.no_grad()
def summed_nats_over(
    scorer: torch.nn.Module,
    blocks: Blocks,
    chosen: Sequence[int],
    micro_size: int,
    device: torch.device,
    on_batch: Callable[[int], None] | None = None,
) -> float:
    """Summed nats of the chosen blocks in evaluation mode; `on_batch` hears how many blocks a batch had."""
    training = scorer.training
    scorer.eval()
    try:
        total = 0.0
        for batch in blocks.batches(chosen, micro_size):
            moved = batch.to(device)
            total += float(scorer(moved.ids, moved.positions, moved.targets, moved.segments))
            if on_batch is not None:
                on_batch(len(batch.ids))
        return total
    finally:
        scorer.train(training)


def matrix(
    base: Base,
    adapters: Mapping[str, Path],
    domains: Mapping[str, Blocks],
    display: Console,
    batch: int = 8,
    precision: str = "fp32",
) -> dict[str, dict[str, Figures]]:
    """Figures of the base and of each adapter on each domain; one model is in memory at a time.

    `batch` (blocks per forward) does not change the result. Raises UserError for an adapter of another base.
    """
    for directory in adapters.values():
        check_base(directory, base)
        check_fits(directory, base.config)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: dict[str, dict[str, Figures]] = {}
    todo: dict[str, Path | None] = {"base": None, **adapters}
    with display.progress as progress:
        task = progress.add_task("evaluating", total=len(todo) * sum(map(len, domains.values())), note="")
        for name, adapter in todo.items():
            progress.update(task, description=f"evaluating {name}")
            scorer = LossModel(_load(base, adapter, device))
            rows[name] = {}
            for domain, blocks in domains.items():
                with _in_precision(precision, device):
                    nats = summed_nats_over(
                        scorer,
                        blocks,
                        range(len(blocks)),
                        batch,
                        device,
                        on_batch=lambda done: progress.advance(task, done),
                    )
                rows[name][domain] = Score(nats, blocks.tokens(), blocks.text_bytes()).figures()
        progress.remove_task(task)
    return rows


def _load(base: Base, adapter: Path | None, device: torch.device) -> GPT2LMHeadModel | PeftModel:
    model = load_model(base)
    return model.to(device) if adapter is None else load_onto(model, adapter).to(device)  # type: ignore[arg-type]


@contextmanager
def _in_precision(precision: str, device: torch.device) -> Iterator[None]:
    with torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32"):
        yield


def run(
    base: str | None,
    adapters: dict[str, Path],
    data: dict[str, list[Source]],
    batch: int = 8,
    precision: str = "fp32",
    json_path: Path | None = None,
    block_size: int | None = None,
) -> None:
    """`peftune eval`: print the perplexity matrix, write it as JSON; UserError for input that cannot be scored."""
    if not data:
        raise UserError("nothing to evaluate on: give at least one --data NAME=PATH")
    if "base" in adapters:
        raise UserError("an adapter cannot be called base: that row is the base itself; use --adapter OTHER=DIR")
    if json_path is not None:
        check_writable(json_path)
    found = open_base(base or _common_base(adapters))
    domains = read_domains(found, data, block_size)
    display = Console()
    rows = matrix(found, adapters, domains, display, batch, precision)
    _print(rows)
    if json_path is not None:
        write_json(json_path, as_json(domains, rows))


def read_domains(base: Base, data: Mapping[str, list[Source]], block_size: int | None = None) -> dict[str, Blocks]:
    """Tokenise and pack each named domain for a base."""
    positions = base.config.n_positions
    if block_size is not None and not 8 <= block_size <= positions:
        raise UserError(f"--block-size {block_size}: expected 8 to {positions}, the positions of the base")
    stores = {
        name: prepare(sources, base.tokenizer, base.tokenizer_fingerprint, " ", "auto")
        for name, sources in data.items()
    }
    return {name: Blocks.of(s, np.arange(len(s)), block_size or positions) for name, s in stores.items()}


def as_json(domains: Mapping[str, Blocks], rows: Mapping[str, Mapping[str, Figures]]) -> dict[str, object]:
    """The contract of `peftune eval --json`."""
    facts = {
        name: {"documents": len(b.documents), "tokens": b.tokens(), "bytes": b.text_bytes()}
        for name, b in domains.items()
    }
    return {"domains": facts, "rows": rows}


def _common_base(adapters: Mapping[str, Path]) -> str:
    named = {base_of(directory) for directory in adapters.values()}
    if len(named) != 1:
        raise UserError(f"give --base: the adapters name {', '.join(sorted(named)) or 'none'}")
    return named.pop()


def _print(rows: Mapping[str, Mapping[str, Figures]]) -> None:
    from rich.console import Console

    console = Console(highlight=False)
    for key in ("perplexity", "bits_per_byte"):
        console.print(matrix_table(rows, key))
