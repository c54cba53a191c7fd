"""Documents of a wanted length distribution, cut from real text: the same file for every contestant.

A document is text whose tokens were counted after it was cut, so that whoever tokenises it again finds as many.
peftune adds `<|endoftext|>` at both ends and scores all but the first; the peers add one at the end. A document of n
tokens is therefore n + 1 real tokens to everyone.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from statistics import NormalDist
from typing import Any

from peftune.config.recipe import Source
from peftune.data.sources.read import read_documents

BUILTIN = ("builtin:docs/train", "builtin:code/train")
SPREAD = 0.75
"""Standard deviation of the logarithm of lengths, before they are cut at the longest."""
_SHORTEST = 4


def write_documents(
    path: Path,
    tokenizer: Any,
    count: int,
    mean: float,
    longest: int,
    data: str | None = None,
    seed: int = 0,
    prompted: float = 0.0,
) -> list[int]:
    """Write `count` documents as JSON lines; returns real tokens of each (at most `longest` - 1).

    Lengths are log-normal with this mean, cut at `longest`, the tokens of a block that the document takes with both its
    `<|endoftext|>`. Where the mean is not below the longest, all are exactly that long. Text repeats only when the
    source is used up. `prompted` is the share of a document's tokens that become a prompt, unsupervised.
    """
    chance = random.Random(seed)
    source = _endless(corpus_texts(data), tokenizer, chance)
    median = _median(mean, longest)
    lengths: list[int] = []
    with open(path, "w", encoding="utf-8") as file:
        while len(lengths) < count:
            wanted = _length(median * chance.lognormvariate(0, SPREAD), longest)
            text, found = _cut(source, tokenizer, wanted - 2)
            if not text.strip() or found > longest - 2 or (mean >= longest and found != longest - 2):
                continue  # cutting moved a token boundary
            row = _parted(text, tokenizer, round(prompted * found)) if prompted else {"text": text}
            if row is None:
                continue
            file.write(json.dumps(row) + "\n")
            lengths.append(found + 1)
    return lengths


def supervised_share(longest: int, prompted: float) -> float:
    """Of the real tokens of a document of this length, those that are supervised."""
    return 1 - round(prompted * (longest - 2)) / (longest - 1)


def statistics_of(lengths: list[int]) -> dict[str, float]:
    """What a reader needs to know of these documents."""
    return {
        "documents": len(lengths),
        "real_tokens": sum(lengths),
        "mean": round(sum(lengths) / len(lengths), 1),
        "longest": max(lengths),
        "padded_in_batches_of_8": round(1 - sum(lengths) / _padded(lengths, 8), 3),
    }


def digest(path: Path) -> str:
    """Of the documents, so that two runs can be told to have had the same."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def write_corpus(path: Path, megabytes: float, characters: int | None = None, data: str | None = None) -> int:
    """Write JSON lines until their text is this large, repeating the corpus if need be; the number of documents.

    Documents are those of the corpus, or of so many characters each. Each ends with its number, so that no two are
    alike and no tokenizer's cache of whole texts helps anyone.
    """
    texts, written, documents = corpus_texts(data), 0, 0
    if characters is not None:
        text = "\n".join(texts)
        texts = [text[start : start + characters] for start in range(0, len(text) - characters, characters)]
    with open(path, "w", encoding="utf-8") as file:
        for documents, text in enumerate(cycle(texts), 1):
            line = f"{text}\n{documents}"
            file.write(json.dumps({"text": line}) + "\n")
            written += len(line.encode())
            if written >= megabytes * 1e6:
                break
    return documents


def corpus_texts(data: str | None = None) -> list[str]:
    """All documents of a file, or of the built-in corpora."""
    sources = BUILTIN if data is None else (data,)
    return [document.text for name in sources for document in read_documents(Source(path=name), "auto")]


def _endless(texts: list[str], tokenizer: Any, chance: random.Random) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Texts in random order with the offsets of their tokens, again and again."""
    while True:
        for i in chance.sample(range(len(texts)), len(texts)):
            yield texts[i], tokenizer(texts[i], return_offsets_mapping=True, verbose=False)["offset_mapping"]


def _median(mean: float, longest: int) -> float:
    """Of lengths before they are cut, such that their mean after it is the wanted one; infinite for equal lengths."""
    if mean >= longest:
        return math.inf
    quantiles = [math.exp(SPREAD * NormalDist().inv_cdf((i + 0.5) / 400)) for i in range(400)]
    low, high = 0.0, 100.0 * longest
    for _ in range(60):
        middle = (low + high) / 2
        found = sum(_length(middle * q, longest) for q in quantiles) / len(quantiles)
        low, high = (middle, high) if found < mean else (low, middle)
    return low


def _length(drawn: float, longest: int) -> int:
    return longest if drawn >= longest else max(_SHORTEST, round(drawn))


def _cut(texts: Iterator[tuple[str, list[tuple[int, int]]]], tokenizer: Any, wanted: int) -> tuple[str, int]:
    """Text of about this many tokens, and how many it has when it is tokenised by itself."""
    text, tokens = "", 0
    while tokens < wanted:
        source, offsets = next(texts)
        take = min(wanted - tokens, len(offsets))
        text += source[: offsets[take - 1][1]] if take else ""
        tokens += take
        if tokens < wanted:
            text += "\n\n"
            tokens += 1
    return text, len(tokenizer(text, verbose=False)["input_ids"])


def _parted(text: str, tokenizer: Any, tokens: int) -> dict[str, str] | None:
    """Prompt of so many tokens and the rest; None where cutting moved a token boundary."""
    offsets = tokenizer(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    cut = offsets[tokens][0]
    row = {"prompt": text[:cut], "completion": text[cut:]}
    sizes = [len(ids) for ids in tokenizer(list(row.values()), verbose=False)["input_ids"]]
    return row if sizes == [tokens, len(offsets) - tokens] and text[cut:].strip() else None


def _padded(lengths: list[int], batch: int) -> int:
    groups = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return sum(max(group) * len(group) for group in groups)
