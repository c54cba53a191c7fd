"""A corpus summarised: documents, tokens, lengths, probable mistakes, and one packed block as text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peftune.config.data_section import DataSection, Source
from peftune.data.batches import Blocks
from peftune.data.documents import ReadStats, first_of_equals
from peftune.data.lint.corpus import of_corpus
from peftune.data.lint.finding import Finding
from peftune.data.lint.token_rules import Places, finding, leaks, repeated, too_long
from peftune.data.packing import Packing
from peftune.data.sources.read import places_of, read_documents, settle_split
from peftune.data.sources.text_files import cut_lines, left_out_lines
from peftune.data.tokens.round_trip import lossy
from peftune.data.tokens.store import TokenStore, prepare

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FEW = 20  # documents


def summarize(
    how: DataSection, tokenizer: PreTrainedTokenizerFast, fingerprint: str, block_size: int, cache: Path | None = None
) -> dict[str, Any]:
    """The summary, as plain values, of what `how` trains on; `fingerprint` is the tokenizer's, `cache` as in `prepare`.

    Token counts include both `<|endoftext|>`, bytes are of the scored text.
    """
    sources = how.read_as(how.train)
    store = prepare(sources, tokenizer, fingerprint, how.join, how.split_on, cache, how.special_tokens, how.chat)
    packing = Blocks.of(store, np.arange(len(store)), block_size).packing
    split_on = settle_split(sources, how.split_on)
    stats = ReadStats()
    again = (document for source in sources for document in read_documents(source, split_on, stats, how.chat))
    parse, numbers = how.special_tokens == "parse", np.arange(len(store))
    places = partial(places_of, sources, split_on)
    unfaithful = lossy(again, tokenizer, parse)
    if any(store.cuts):
        deque(again, maxlen=0)  # to the end, for how each text file was cut
    findings = of_corpus(store, numbers, tokenizer, parse, places)
    findings += _in_several(store, store.report.documents, sources, tokenizer, places)
    findings += unfaithful
    findings += [*too_long(store, numbers, block_size, places), *repeated(store, numbers, places)]
    if len(store) < _FEW:
        advice = "a fraction for validation is coarse; if documents were joined, choose split_on"
        findings += finding("very few documents", numbers, places, advice, True)
    low, median, high, top = np.percentile(store.lengths, [0, 50, 95, 100]).tolist()
    return {
        "sources": [source.path for source in sources],
        "documents": len(store),
        "blank": store.report.blank + sum(count.blank for counts in store.cuts for count in counts),
        "left_out": asdict(store.left_out),
        "duplicates": len(store) - len(first_of_equals(store.digests)),
        "notes": [*cut_lines(sources, store.cuts), *left_out_lines(sources)],
        "files": [asdict(cut) for cuts in stats.cuts for cut in cuts],
        "tokens": int(store.lengths.sum()),
        "supervised_tokens": int(store.supervised_counts.sum()),
        "bytes": int(store.supervised_bytes.sum()),
        "lengths": {"min": low, "median": median, "mean": float(store.lengths.mean()), "p95": high, "max": top},
        "histogram": _histogram(store.lengths),
        "block_size": block_size,
        "blocks": len(packing),
        "fill": packing.fill(),
        "longer_than_block": int((store.lengths > block_size).sum()),
        "findings": [asdict(finding) for finding in findings],
        "chat": any(store.report.chats),
        "preview": preview(store, packing, tokenizer),
        "fingerprint": store.fingerprint,
    }


def _in_several(
    store: TokenStore, sizes: list[int], sources: Sequence[Source], tokenizer: PreTrainedTokenizerFast, places: Places
) -> list[Finding]:
    """Sources whose documents are those of a source before: text for training beside text for validation, perhaps."""
    found, begins = [], np.cumsum([0, *sizes])
    advice = "what is trained on is not held out: validate on other text"
    for source, begin, end in zip(sources[1:], begins[1:], begins[2:], strict=False):
        own, before = np.arange(begin, end), np.arange(begin)
        same = np.isin(store.digests[own], store.digests[before])
        what = f"documents of {source.path} that another source holds too"
        found += finding(what, own[same], places, advice, True)
        found += leaks(source.path, store, own[~same], store, before, tokenizer, places)
    return found


def preview(store: TokenStore, packing: Packing, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """One block as text: its spans, each cut where scoring begins or ends; a block of several documents if any."""
    several = np.flatnonzero(np.diff(packing.first) > 1)
    block = int(several[0]) if len(several) else 0
    spans = []
    for span in packing.spans(block):
        example, start, stop = (int(a[span]) for a in (packing.example, packing.start, packing.stop))
        ids, scored = store.window(example, start, stop)
        scored[0] = False  # the first token of a span is context: nothing before it predicts it
        cuts = [0, *(np.flatnonzero(np.diff(scored)) + 1).tolist(), len(ids)]
        texts = [
            {"text": tokenizer.backend_tokenizer.decode(ids[a:b].tolist(), False), "supervised": bool(scored[a])}
            for a, b in pairwise(cuts)
        ]
        spans.append({"document": example, "first_token": start, "tokens": stop - start, "pieces": texts})
    return {"block": block, "spans": spans}


def _histogram(lengths: np.ndarray) -> list[dict[str, int]]:
    """Documents by length in tokens, in powers of two: [from, below)."""
    powers = np.floor(np.log2(lengths)).astype(np.int64)
    counts = np.bincount(powers)
    first = int(powers.min())
    return [{"from": 2**p, "below": 2 ** (p + 1), "documents": int(counts[p])} for p in range(first, len(counts))]
