"""Which documents are held out: decided by each document's own hash, so that equal documents fall on one side."""

from __future__ import annotations

import numpy as np


def split_by_digest(digests: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """(train, validation) indices, int64 in rising order, for digests (n,) uint64 and a fraction in [0, 1).

    A document's side depends on its digest alone, so it keeps it when others come and go. Where the fraction would
    leave one side empty and there are two distinct documents, the smallest (largest) digest goes to validation (train).
    """
    held_out = digests.astype(np.float64) < fraction * 2.0**64
    if fraction > 0 and len(digests) and digests.min() != digests.max():
        if not held_out.any():
            held_out = digests == digests.min()
        elif held_out.all():
            held_out = digests != digests.max()
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
