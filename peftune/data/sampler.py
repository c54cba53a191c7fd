"""Which blocks make up which optimizer step: a pure function of seed and step, the same on every rank.

A step is a set of blocks. How these are laid out in memory (rows packed or padded, micro-batches, ranks) changes
nothing in what is learnt, so all of that is decided later, from this.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np


def steps_per_epoch(blocks: int, global_size: int) -> int:
    """Optimizer steps that one pass takes; the last may hold fewer blocks than `global_size`."""
    return math.ceil(blocks / global_size)


def total_steps(blocks: int, global_size: int, epochs: float, steps: int | None) -> int:
    """Optimizer steps of the run; `steps` wins over `epochs` where it is given."""
    return steps if steps is not None else max(1, round(epochs * steps_per_epoch(blocks, global_size)))


def blocks_of_step(step: int, blocks: int, global_size: int, seed: int) -> np.ndarray:
    """Block numbers of one step (counted from 0), in order; every epoch is a fresh permutation."""
    epoch, within = divmod(step, steps_per_epoch(blocks, global_size))
    return _permutation(blocks, seed, epoch)[within * global_size : (within + 1) * global_size]


@lru_cache(maxsize=2)
def _permutation(blocks: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(blocks)


def share_of(blocks: np.ndarray, micro_size: int, rank: int, ranks: int) -> np.ndarray:
    """A rank's blocks of a step: every `ranks`-th group of `micro_size`, so that micro-batches are those of one rank.

    Groups are smaller where there would not be one for each rank.
    """
    size = max(1, min(micro_size, -(-len(blocks) // ranks)))
    group = np.arange(len(blocks)) // size
    chosen: np.ndarray = blocks[group % ranks == rank]
    return chosen
