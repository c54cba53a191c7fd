"""Intervals hold the truth as often as they say."""

from __future__ import annotations

import numpy as np

from peftune.inference.evaluation.bootstrap import Statistics, interval, resampled, wilson

RATIO = 3.0  # nats per token of the population below


def documents(random: np.random.Generator, number: int) -> np.ndarray:
    """Summed nats and tokens of documents: long ones are rare, and each has a difficulty of its own."""
    tokens = np.ceil(random.lognormal(3.5, 0.7, number))
    nats = tokens * RATIO * random.gamma(9.0, 1 / 9.0, number)
    return np.stack([nats, tokens], axis=1)


def ratio(sums: np.ndarray) -> np.ndarray:
    return np.asarray(sums[..., 0] / sums[..., 1])


def holds(bounds: tuple[float, float], truth: float) -> bool:
    return bounds[0] <= truth <= bounds[1]


def test_an_interval_over_documents_holds_the_truth_in_about_95_of_100_corpora() -> None:
    """Alone, and for the difference of two models, of which one is better by 0.1 nats per token.

    93 % are to be expected of so skew documents; of an interval narrower by a third it would be 82 %.
    """
    random, corpora, alone, paired, narrower = np.random.default_rng(1), 300, 0, 0, 0
    for _ in range(corpora):
        base = documents(random, 150)
        adapter = base - np.stack([base[:, 1] * random.normal(0.1, 0.2, len(base)), np.zeros(len(base))], axis=1)
        draws = resampled([Statistics(base, ratio), Statistics(adapter, ratio)], samples=200)
        single, pair = interval(draws[0]), interval(draws[1] - draws[0])
        alone, paired = alone + holds(single, RATIO), paired + holds(pair, -0.1)
        narrower += pair[1] - pair[0] < 0.5 * (single[1] - single[0])
    assert 0.89 < alone / corpora < 0.98 and 0.89 < paired / corpora < 0.98
    assert narrower == corpora  # the pairing takes away what documents have in common


def test_intervals_are_the_same_every_time_and_hardly_hang_on_the_seed() -> None:
    items = [Statistics(documents(np.random.default_rng(2), 300), ratio)]
    first = np.array(interval(resampled(items)[0]))
    assert (np.array(interval(resampled(items)[0])) == first).all()
    for seed in (1, 2, 3):
        other = np.array(interval(resampled(items, seed)[0]))
        assert (other != first).any() and np.abs(other - first).max() < 0.1 * (first[1] - first[0])


def test_a_share_s_interval_is_wilson_s() -> None:
    np.testing.assert_allclose(wilson(0, 100), (0.0, 0.036993), atol=1e-6)
    np.testing.assert_allclose(wilson(15, 100), (0.093060, 0.232836), atol=1e-6)
    np.testing.assert_allclose(wilson(100, 100), (0.963007, 1.0), atol=1e-6)
