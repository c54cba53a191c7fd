"""Exact evaluation: summed nats over scored tokens, per named domain; the matrix of adapters and domains."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from peftune.adapters.attach import fit, load_with_rows
from peftune.adapters.base_of import base_of
from peftune.adapters.provenance import chat_of, check_base, parses_special_tokens, read_provenance, recorded
from peftune.config.data_section import Source
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
Documents = str | Path | Source | Sequence[str | Path | Source]


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
    for what, named in (("data", data), ("adapters", adapters or {})):
        if not isinstance(named, Mapping):
            raise UserError(f"{what} is {str(named)[:40]!r}, expected a mapping of names, such as {{'poems': {what}}}")
    folders = {name: Path(directory) for name, directory in (adapters or {}).items()}
    if not data:
        raise UserError("nothing to evaluate on; give at least one domain by name, with its documents")
    if "base" in folders:
        raise UserError("an adapter cannot be called base: that row is the base itself; name the adapter otherwise")
    used = choose_device(device)
    base = base if isinstance(base, Base) else open_base(base or base_of(*folders.values()))
    read, chat = special_tokens_of(base, folders), chat_of_all(base, folders)
    domains = {name: read_blocks(base, documents, block_size, read, chat) for name, documents in data.items()}
    for directory in folders.values():
        check_base(directory, base)
    fitting = {name: fit(directory, base)[1:] for name, directory in folders.items()}
    own = {name: tokenizer for name, (_, tokenizer) in fitting.items() if tokenizer is not base.tokenizer}
    if own:
        Console().say(
            f"{', '.join(own)}: with tokens of its own (data.new_tokens): compare bits per byte with other rows"
        )
    window = window or Window()
    learnt = {name: read_blocks(base, texts, None, read, chat).store for name, texts in (trained_on or {}).items()}
    windows = {name: windows_of(store, name, window, base.config.n_positions) for name, store in learnt.items()}
    precision = inference_precision(precision, used)
    autocast = torch.autocast(used.type, dtype_of(precision), enabled=precision != "fp32")
    rows: dict[str, dict[str, Figures]] = {}
    by_document: dict[str, dict[str, np.ndarray]] = {}
    memorised: dict[str, dict[str, Any]] = {}
    with Console().progress as progress:
        task = progress.add_task("evaluating", total=(1 + len(folders)) * sum(map(len, domains.values())), note="")
        for name, adapter in {"base": None, **folders}.items():
            progress.update(task, description=f"evaluating {name}")
            model = load_model(base) if adapter is None else load_with_rows(base, adapter, fitting[name][0])
            scorer = LossModel(model).to(used)
            rows[name], by_document[name] = {}, {}
            with autocast:
                for domain, packed in domains.items():
                    blocks = packed
                    if name in own:
                        blocks = read_blocks(base, data[domain], block_size, read, chat, own[name])
                    found = nats_by_document(scorer, blocks, batch, used, lambda n: progress.advance(task, n))
                    score = Score(float(found[:, 0].sum()), blocks.tokens(), blocks.text_bytes())
                    try:
                        rows[name][domain] = score.figures()
                    except CheckFailed as error:
                        raise CheckFailed(f"{name} on {domain}: {error}") from None
                    by_document[name][domain] = found
                memorised[name] = {
                    source: share_reproduced(scorer, ids, window, batch, used) for source, ids in windows.items()
                }
    facts = {
        name: {"documents": len(blocks.documents), "tokens": blocks.tokens(), "bytes": blocks.text_bytes()}
        for name, blocks in domains.items()
    }
    computed = {"precision": precision, "device": device_name(used)}
    result = {"domains": facts, "rows": rows, **computed, "intervals": loss_intervals(by_document)}
    result |= not_held_out(folders, domains)
    return result | ({"memorised": memorised, "window": vars(window)} if windows else {})


def not_held_out(adapters: Mapping[str, Path], domains: Mapping[str, Blocks]) -> dict[str, Any]:
    """`trained_on`, where adapters record that they were trained on documents of a domain: how many, of how many.

    A record of many documents tells of some of them only; one of an older release of equal corpora alone.
    """
    found: dict[str, dict[str, list[int]]] = {}
    for name, directory in adapters.items():
        provenance = read_provenance(directory)
        sample = recorded(provenance, "training_documents")
        for domain, blocks in domains.items():
            known, told = 0, len(blocks.documents)
            if isinstance(sample, str):
                with suppress(ValueError):
                    known, told = count_known(sample, blocks.store.digests[blocks.documents])
            elif recorded(provenance, "data_fingerprints", "train") == blocks.store.fingerprint:
                known = told
            if known:
                found.setdefault(name, {})[domain] = [known, told]
    return {"trained_on": found} if found else {}


def special_tokens_of(base: Base, adapters: Mapping[str, Path]) -> str:
    """How a text's special tokens are read, `parse` or `text`: as the adapters were trained, without any as the base.

    UserError where adapters differ in it: their figures would be of different tokens.
    """
    parse = {name: parses_special_tokens(read_provenance(directory)) for name, directory in adapters.items()}
    if len(set(parse.values())) > 1:
        names = ", ".join(name for name in parse if parse[name])
        raise UserError(f"{names}: trained with data.special_tokens: parse, the others not; evaluate them separately")
    return "parse" if next(iter(parse.values()), base.parses_special_tokens) else "text"


def chat_of_all(base: Base, adapters: Mapping[str, Path]) -> str:
    """By which template conversations are read: as the adapters were trained that know any, without one as the base.

    UserError where adapters differ in it.
    """
    found = {name: chat_of(read_provenance(directory)) for name, directory in adapters.items()}
    known = {chat for chat in found.values() if chat is not None} or {base.chat or "plain"}
    if len(known) > 1:
        names = ", ".join(name for name, chat in found.items() if chat == "eos-turns")
        raise UserError(f"{names}: trained with data.chat: eos-turns, others not; evaluate them separately")
    return known.pop()


def read_blocks(
    base: Base,
    documents: Documents | Blocks,
    block_size: int | None = None,
    special_tokens: str = "text",
    chat: str = "plain",
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Blocks:
    """Tokenise (with the base's tokenizer or this one) and pack a domain; what is packed already stays as it is."""
    if isinstance(documents, Blocks):
        return documents
    positions = base.config.n_positions
    if block_size is not None and not 8 <= block_size <= positions:
        raise UserError(f"block size {block_size}: expected 8 to {positions}, the positions of the base")
    several = [documents] if isinstance(documents, str | Path | Source) else documents
    sources = [one if isinstance(one, Source) else Source(path=str(one)) for one in several]
    store = prepare(
        sources, tokenizer or base.tokenizer, base.tokenizer_fingerprint, " ", "auto", None, special_tokens, chat
    )
    for line in cut_lines(sources, store.cuts, chosen=True):
        Console().say(line)
    return Blocks.of(store, np.arange(len(store)), block_size or positions)
