"""Intervals of corpus scores by the bootstrap: items are drawn with replacement, and the score is computed anew.

A score is a function of sums over items (summed nats and tokens for a perplexity, matches and totals for BLEU), so a
resample costs one product of counts and statistics. Percentile intervals, Efron and Tibshirani (1993), chapter 13; two
systems are compared on the same draws, as Koehn (2004) does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

SAMPLES = 1000
CONFIDENCE = 0.95
Interval = tuple[float, float]


@dataclass(frozen=True)
class Statistics:
    """What a score is computed from: `items` (n, k) float64, one row a document or test item, and a function of sums.

    `score` takes sums (…, k) and gives scores (…).
    """

    items: np.ndarray
    score: Callable[[np.ndarray], np.ndarray]

    def value(self) -> float:
        """The score of all items."""
        return float(self.score(self.items.sum(axis=0)))


def resampled(systems: list[Statistics], seed: int = 0, samples: int = SAMPLES) -> np.ndarray:
    """Scores (systems, samples) of resamples, of the same items for every system; the same seed gives the same."""
    number = len(systems[0].items)
    random, sums = np.random.default_rng(seed), [np.empty((samples, s.items.shape[1])) for s in systems]
    for sample in range(samples):
        counts = np.bincount(random.integers(number, size=number), minlength=number)
        for system, row in zip(systems, sums, strict=True):
            row[sample] = counts @ system.items
    return np.stack([system.score(row) for system, row in zip(systems, sums, strict=True)])


def interval(scores: np.ndarray) -> Interval:
    """The middle 95 % of resampled scores."""
    low, high = np.quantile(scores, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def wilson(hits: int, trials: int) -> Interval:
    """The 95 % interval of a share of independent trials (Wilson 1927), which is right for none of a few, too."""
    z = 1.959963984540054
    share, spread = hits / trials, z * z / trials
    middle, half = share + spread / 2, z * np.sqrt(share * (1 - share) / trials + spread / trials / 4)
    return float(max(0.0, middle - half) / (1 + spread)), float(min(1 + spread, middle + half) / (1 + spread))
