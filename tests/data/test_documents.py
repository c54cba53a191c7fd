"""Knowing documents again by a sample of their hashes."""

from __future__ import annotations

import numpy as np
import pytest

from peftune.data.documents import count_known, sample_of


def test_a_small_corpus_is_known_in_full_and_of_a_large_one_a_fair_part() -> None:
    chance = np.random.default_rng(0)
    small, large = (chance.integers(2**64, size=n, dtype=np.uint64) for n in (900, 50_000))
    assert count_known(sample_of(small), small) == (900, 900)
    assert count_known(sample_of(small), large) == (0, 50_000)
    assert count_known(sample_of(large), large) == (1000, 1000)
    known, told = count_known(sample_of(large), np.concatenate([large[:10_000], small]))
    assert 150 < known < 250 and known <= told < 260  # a fiftieth of what is asked
    both = np.concatenate([small, large])
    assert sample_of(small, sample_of(large)) == sample_of(large, sample_of(small)) == sample_of(both)
    with pytest.raises(ValueError):
        count_known("no sample", small)
