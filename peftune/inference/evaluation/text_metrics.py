"""Generated texts against references, as papers on text generation score them, with intervals over test items.

| metric  | computed by                                                                                 | in        |
|---------|---------------------------------------------------------------------------------------------|-----------|
| BLEU    | sacrebleu's counts: lower case, 13a tokens, no smoothing                                    | percent   |
| NIST    | here, on the same tokens (Doddington 2002; information from all references)                 | bits      |
| ROUGE-L | here, as pycocoevalcap does, on Penn Treebank tokens (`ptb_tokens`)                         | percent   |
| CIDEr   | pycocoevalcap, on the same; how rare a word is stays as it is when items are drawn          |           |
| METEOR  | METEOR 1.5 through pycocoevalcap, in Java; of the corpus, without an interval               | percent   |

They are those of https://github.com/tuetschek/e2e-metrics, which prints shares of 1 where this has percent.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np

from peftune.errors import UserError
from peftune.inference.evaluation.bootstrap import Statistics, interval, resampled
from peftune.inference.evaluation.ptb_tokens import ptb_words

Texts = Sequence[str]
References = Sequence[Sequence[str]]
_ORDER = 5  # longest n-gram of NIST
_BETA = -math.log(0.5) / math.log(1.5) ** 2  # a text of two thirds the length costs half


def score_texts(systems: Mapping[str, Texts], references: References, meteor: bool = False) -> dict[str, Any]:
    """BLEU, NIST, ROUGE-L, CIDEr and, if asked for, METEOR of each system's texts, with 95 % intervals over items.

    `systems` maps a name to a text for each item, `references` holds one or more for each. All but NIST (bits) and
    CIDEr are in percent. The first system is what the others are compared with, on the same draws: `against` is the
    difference to it. Raises UserError where a library, or Java for METEOR, is missing.
    """
    tidy = [[" ".join(text.split()) for text in texts] for texts in references]
    hypotheses = {name: [" ".join(text.split()) for text in texts] for name, texts in systems.items()}
    scores: dict[str, dict[str, Any]] = {name: {} for name in systems}
    words = [[" ".join(ptb_words(text)) for text in texts] for texts in tidy]
    spoken = {name: [" ".join(ptb_words(text)) for text in texts] for name, texts in hypotheses.items()}
    metrics: dict[str, tuple[Callable[[Texts, References], Statistics], Mapping[str, Texts], References]] = {
        "BLEU": (bleu, hypotheses, tidy), "NIST": (nist, hypotheses, tidy), "ROUGE-L": (rouge_l, spoken, words),
        "CIDEr": (cider, spoken, words),
    }  # fmt: skip
    for metric, (statistics, texts_of, wanted) in metrics.items():
        found = [statistics(texts, wanted) for texts in texts_of.values()]
        draws = resampled(found)
        for name, system, drawn in zip(systems, found, draws, strict=True):
            scores[name][metric] = {"score": system.value(), "interval": interval(drawn)}
            if system is not found[0]:
                against = {"score": system.value() - found[0].value(), "interval": interval(drawn - draws[0])}
                scores[name][metric]["against"] = against
    if meteor:
        for name, texts in spoken.items():
            scores[name]["METEOR"] = {"score": meteor_score(texts, words)}
    return {"items": len(tidy), "references": sum(map(len, tidy)), "systems": scores}


def bleu(hypotheses: Texts, references: References) -> Statistics:
    """Lengths (own, closest reference), then matches and totals of 1- to 4-grams, of each item."""
    scorer = _library("sacrebleu.metrics").BLEU(lowercase=True, tokenize="13a", smooth_method="none")
    rows = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        found = scorer.corpus_score([hypothesis], [[text] for text in texts])
        rows.append([found.sys_len, found.ref_len, *found.counts, *found.totals])
    return Statistics(np.array(rows, dtype=np.float64), _bleu)


def _bleu(sums: np.ndarray) -> np.ndarray:
    own, closest, matches, totals = sums[..., 0], sums[..., 1], sums[..., 2:6], sums[..., 6:]
    with np.errstate(divide="ignore", invalid="ignore"):  # without any match, or any word, it is 0
        brevity = np.exp(np.minimum(0, 1 - closest / own))
        return np.asarray(np.nan_to_num(100 * brevity * np.exp(np.log(matches / totals).mean(axis=-1))))


def nist(hypotheses: Texts, references: References) -> Statistics:
    """Information of matched 1- to 5-grams, numbers of n-grams, and the references' mean length, of each item."""
    tokenize = _library("sacrebleu.tokenizers.tokenizer_13a").Tokenizer13a()
    wanted = [[tokenize(text).lower().split(" ") for text in texts] for texts in references]
    counts: Counter[tuple[str, ...]] = Counter()
    for words in (words for texts in wanted for words in texts):
        counts.update({(): len(words)})
        for order in range(1, _ORDER + 1):
            counts.update(_ngrams(words, order))
    rows = []
    for hypothesis, texts in zip(hypotheses, wanted, strict=True):
        words, information, lengths = tokenize(hypothesis).lower().split(" "), [], []
        for order in range(1, _ORDER + 1):
            most: Counter[tuple[str, ...]] = Counter()
            for reference in texts:
                most |= Counter(_ngrams(reference, order))
            matched = Counter(_ngrams(words, order)) & most
            information.append(sum(math.log2(counts[g[:-1]] / counts[g]) * times for g, times in matched.items()))
            lengths.append(len(words) - order + 1)
        rows.append([*information, *lengths, sum(map(len, texts)) / len(texts)])
    return Statistics(np.array(rows, dtype=np.float64), _nist)


def _nist(sums: np.ndarray) -> np.ndarray:
    information, lengths, mean = sums[..., :_ORDER], sums[..., _ORDER:-1], sums[..., -1]
    ratio = np.minimum(1, lengths[..., 0] / mean)
    gained = np.where(lengths > 0, information / np.maximum(lengths, 1), 0).sum(axis=-1)
    return np.asarray(gained * np.exp(-_BETA * np.log(ratio) ** 2))


def _ngrams(words: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [tuple(words[at : at + order]) for at in range(len(words) - order + 1)]


def rouge_l(hypotheses: Texts, references: References) -> Statistics:
    """The score of each item, of words that `ptb_words` found: best precision and best recall, recall weighs 1.2²."""
    scores = []
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        words, wanted = hypothesis.split(" "), [text.split(" ") for text in texts]
        common = [_longest_common_subsequence(words, reference) for reference in wanted]
        precision = max(common) / len(words)
        recall = max(length / len(reference) for length, reference in zip(common, wanted, strict=True))
        scores.append(100 * (1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if precision else 0.0)
    return _mean(scores)


def _longest_common_subsequence(words: Sequence[str], others: Sequence[str]) -> int:
    """Its length, with a row of the table in the bits of one integer (Hyyrö 2004): texts of any length take no time."""
    places: dict[str, int] = {}
    for at, word in enumerate(words):
        places[word] = places.get(word, 0) | 1 << at
    row = full = (1 << len(words)) - 1
    for word in others:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & full
    return len(words) - row.bit_count()


def cider(hypotheses: Texts, references: References) -> Statistics:
    """The score of each item, of words that `ptb_words` found."""
    found = {item: [text] for item, text in enumerate(hypotheses)}
    return _mean(_library("pycocoevalcap.cider.cider").Cider().compute_score(dict(enumerate(references)), found)[1])


def _mean(scores: Sequence[float] | np.ndarray) -> Statistics:
    rows = np.stack([np.asarray(scores, dtype=np.float64), np.ones(len(scores))], axis=1)
    return Statistics(rows, lambda sums: sums[..., 0] / sums[..., 1])


def meteor_score(hypotheses: Texts, references: References) -> float:
    """METEOR of all items, of words that `ptb_words` found."""
    if shutil.which("java") is None:
        raise UserError("METEOR needs Java, and there is no `java` on the PATH; install it, or leave METEOR out")
    scorer = _library("pycocoevalcap.meteor.meteor").Meteor()
    found = {item: [text] for item, text in enumerate(hypotheses)}
    try:
        return 100 * float(scorer.compute_score(dict(enumerate(references)), found)[0])
    except (OSError, ValueError):
        raise UserError("METEOR's Java program ended without an answer; it needs Java 8 or newer and 2 GB") from None
    finally:
        if scorer.lock.locked():  # after an error; its destructor would wait for ever
            scorer.lock.release()
        scorer.meteor_p.kill()
        scorer.meteor_p.communicate()


def _library(module: str) -> Any:
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(f"scores need {error.name}; pip install 'peftune[score]'") from None
