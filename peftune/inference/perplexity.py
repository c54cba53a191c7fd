"""Exact evaluation: summed nats over scored tokens, per named domain; the matrix of adapters and domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from peftune.adapters.attach import fit, load_with_rows
from peftune.adapters.base_of import base_of
from peftune.adapters.provenance import chat_of, parses_special_tokens, recorded
from peftune.config.data_section import Documents, as_sources
from peftune.console import Console
from peftune.data.batches import Blocks
from peftune.data.documents import count_known
from peftune.data.sources.text_files import cut_lines
from peftune.data.tokens.store import prepare
from peftune.device import choose_device, device_name, inference_precision
from peftune.errors import CheckFailed, UserError
from peftune.inference.evaluation.documents import loss_intervals, nats_by_document
from peftune.inference.evaluation.memorisation import Window, share_reproduced, windows_of
from peftune.model.base import Base, open_base
from peftune.model.load import dtype_of, load_model
from peftune.model.loss import LossModel, nats_to_perplexity

Figures = dict[str, float]
Model = GPT2LMHeadModel | PeftModel


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
        """loss (nats per token), perplexity (its exponential), bits per byte of the scored text.

        Raises CheckFailed where one is not finite: a perplexity is none from 700 nats per token up.
        """
        perplexity = nats_to_perplexity(self.loss)
        if not math.isfinite(self.loss) or not math.isfinite(perplexity):
            raise CheckFailed(
                f"loss {self.loss:.6g} nats per token, perplexity {perplexity:.6g}: not a finite result; "
                "the weights hold values that are not finite, or are broken"
            )
        bits = self.nats / math.log(2) / max(1, self.text_bytes)
        return {"loss": self.loss, "perplexity": perplexity, "bits_per_byte": bits}


def evaluate(
    base: str | Path | Base | None,
    data: Mapping[str, Documents | Blocks],
    adapters: Mapping[str, Path | str] | None = None,
    batch: int = 8,
    precision: str = "auto",
    block_size: int | None = None,
    trained_on: Mapping[str, Documents] | None = None,
    window: Window | None = None,
    device: str = "auto",
) -> dict[str, Any]:
    """Figures of the base and of each adapter on each named domain, as `peftune eval` writes them as JSON.

    `base` None is the one that all adapters name. `data` maps the name of a domain to a file, to several, or to blocks
    made before; `adapters` names adapter directories. `batch` (blocks per forward) does not change the result;
    `block_size` None is the base's context; `precision` and `device` are as in `AdapterBank`. One model is in memory at
    a time. Raises UserError for input that cannot be scored, and for an adapter of another base.

    `intervals` are those of `loss_intervals`, over documents. With `trained_on`, named texts that adapters have learnt,
    also `memorised`: what share of their windows (`window`: of how many tokens) each model reproduces.
    """
    folders, window = _named_adapters(data, adapters or {}), window or Window()
    used = choose_device(device)
    precision = inference_precision(precision, used)
    base = base if isinstance(base, Base) else open_base(base or base_of(*folders.values()))
    fitted = {name: fit(directory, base) for name, directory in folders.items()}
    origins = {name: adapter.provenance for name, (adapter, _, _) in fitted.items()}
    read = partial(read_blocks, base, how=how_to_read(base, origins))
    domains = {name: read(documents, block_size) for name, documents in data.items()}
    own = {name: tokenizer for name, (_, _, tokenizer) in fitted.items() if tokenizer is not base.tokenizer}
    if own:
        Console().say(
            f"{', '.join(own)}: with tokens of its own (data.new_tokens): compare bits per byte with other rows"
        )
    learnt = {name: read(texts).store for name, texts in (trained_on or {}).items()}
    windows = {name: windows_of(store, name, window, base.config.n_positions) for name, store in learnt.items()}
    models: dict[str, Callable[[], Model]] = {"base": partial(load_model, base)}
    for name, (adapter, layout, _) in fitted.items():
        models[name] = partial(load_with_rows, base, adapter, layout)
    rows: dict[str, dict[str, Figures]] = {}
    found: dict[str, dict[str, np.ndarray]] = {}
    memorised: dict[str, dict[str, Any]] = {}
    with Console().progress as progress:
        task = progress.add_task("evaluating", total=len(models) * sum(map(len, domains.values())), note="")
        for name, load in models.items():
            progress.update(task, description=f"evaluating {name}")
            blocks, done = domains, partial(progress.advance, task)
            if name in own:
                blocks = {domain: read(texts, block_size, tokenizer=own[name]) for domain, texts in data.items()}
            found[name], memorised[name] = _measured(load(), used, blocks, windows, window, batch, precision, done)
            rows[name] = {domain: _figures(name, domain, nats, blocks[domain]) for domain, nats in found[name].items()}
    facts = {
        name: {"documents": len(blocks.documents), "tokens": blocks.tokens(), "bytes": blocks.text_bytes()}
        for name, blocks in domains.items()
    }
    computed = {"precision": precision, "device": device_name(used)}
    result = {"domains": facts, "rows": rows, **computed, "intervals": loss_intervals(found)}
    result |= not_held_out(origins, domains)
    return result | ({"memorised": memorised, "window": vars(window)} if windows else {})


def _named_adapters(data: Mapping[str, Any], adapters: Mapping[str, Path | str]) -> dict[str, Path]:
    """The adapters' directories; UserError where a name is missing or means something else."""
    for what, named in (("data", data), ("adapters", adapters)):
        if not isinstance(named, Mapping):
            raise UserError(f"{what} is {str(named)[:40]!r}, expected a mapping of names, such as {{'poems': {what}}}")
    if not data:
        raise UserError("nothing to evaluate on; give at least one domain by name, with its documents")
    if "base" in adapters:
        raise UserError("an adapter cannot be called base: that row is the base itself; name the adapter otherwise")
    return {name: Path(directory) for name, directory in adapters.items()}


def _measured(
    model: Model, device: torch.device, domains: Mapping[str, Blocks], windows: Mapping[str, torch.Tensor],
    window: Window, batch: int, precision: str, done: Callable[[int], None],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:  # fmt: skip
    """`nats_by_document` of each domain, and `share_reproduced` of each text's windows; `done` hears of batches."""
    scorer = LossModel(model).to(device)
    with torch.autocast(device.type, dtype_of(precision), enabled=precision != "fp32"):
        found = {name: nats_by_document(scorer, blocks, batch, device, done) for name, blocks in domains.items()}
        shares = {name: share_reproduced(scorer, chosen, window, batch, device) for name, chosen in windows.items()}
    return found, shares


def _figures(model: str, domain: str, by_document: np.ndarray, blocks: Blocks) -> Figures:
    """Of what `nats_by_document` found; CheckFailed where one is not finite."""
    try:
        return Score(float(by_document[:, 0].sum()), blocks.tokens(), blocks.text_bytes()).figures()
    except CheckFailed as error:
        raise CheckFailed(f"{model} on {domain}: {error}") from None


def not_held_out(origins: Mapping[str, Any], domains: Mapping[str, Blocks]) -> dict[str, Any]:
    """`trained_on`, where adapters record that they were trained on documents of a domain: how many, of how many.

    `origins` are their peftune.json by name. A record of many documents tells of some of them only; one of an older
    release of equal corpora alone.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for name, origin in origins.items():
        sample = recorded(origin, "training_documents")
        for domain, blocks in domains.items():
            known, told = 0, len(blocks.documents)
            if isinstance(sample, str):
                with suppress(ValueError):
                    known, told = count_known(sample, blocks.store.digests[blocks.documents])
            elif recorded(origin, "data_fingerprints", "train") == blocks.store.fingerprint:
                known = told
            if known:
                found.setdefault(name, {})[domain] = [known, told]
    return {"trained_on": found} if found else {}


class Reading(NamedTuple):
    """How texts are read: special tokens that they spell out, `parse` or `text`; conversations, by which template."""

    special_tokens: str = "text"
    chat: str = "plain"


def how_to_read(base: Base, origins: Mapping[str, Any]) -> Reading:
    """As adapters were trained; where none tells, as the base was.

    `origins` are their peftune.json by name. UserError where they differ: their figures would be of different tokens.
    """
    parse = {name: parses_special_tokens(origin) for name, origin in origins.items()}
    if len(set(parse.values())) > 1:
        names = ", ".join(name for name in parse if parse[name])
        raise UserError(f"{names}: trained with data.special_tokens: parse, the others not; evaluate them separately")
    chats = {name: chat for name, origin in origins.items() if (chat := chat_of(origin)) is not None}
    if len(set(chats.values())) > 1:
        names = ", ".join(name for name, chat in chats.items() if chat == "eos-turns")
        raise UserError(f"{names}: trained with data.chat: eos-turns, others not; evaluate them separately")
    parses = next(iter(parse.values()), base.parses_special_tokens)
    return Reading("parse" if parses else "text", next(iter(chats.values()), base.chat or "plain"))


def read_blocks(
    base: Base,
    documents: Documents | Blocks,
    block_size: int | None = None,
    how: Reading | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Blocks:
    """Tokenise (with the base's tokenizer or this one) and pack a domain; what is packed already stays as it is."""
    if isinstance(documents, Blocks):
        return documents
    block_size, sources = base.block_size(block_size), as_sources(documents)
    store = prepare(
        sources, tokenizer or base.tokenizer, base.tokenizer_fingerprint, " ", "auto", None, *(how or Reading())
    )
    for line in cut_lines(sources, store.cuts, chosen=True):
        Console().say(line)
    return Blocks.of(store, np.arange(len(store)), block_size)
