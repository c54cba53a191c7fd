"""Thin factors tell the same as the whole matrix in float64."""

from __future__ import annotations

import math

import pytest
import torch

from peftune.adapters.low_rank import LowRankDelta, added, best_of_rank, distance, inner, norm, overlap, spectrum


def random_update(rows: int, columns: int, rank: int, seed: int) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    return LowRankDelta("m", "conv1d", left, torch.randn(rank, columns, generator=generator, dtype=torch.float64))


def dense(update: LowRankDelta) -> torch.Tensor:
    return update.left @ update.right


SHAPES = [(32, 96, 4), (96, 32, 1), (8, 40, 20), (40, 8, 64)]  # the last two hold more directions than a side has


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
def test_norm_product_and_distance_are_those_of_the_whole_matrices(rows: int, columns: int, rank: int) -> None:
    a, b = random_update(rows, columns, rank, 0), random_update(rows, columns, 3, 1)
    assert norm(a) == pytest.approx(float(dense(a).norm()), rel=1e-12)
    assert inner(a, b) == pytest.approx(float((dense(a) * dense(b)).sum()), rel=1e-10)
    assert distance(a, b) == pytest.approx(float((dense(a) - dense(b)).norm()), rel=1e-12)
    assert torch.allclose(dense(added([a, b])), dense(a) + dense(b), rtol=0, atol=1e-12)


def test_a_difference_far_below_the_norms_keeps_its_digits() -> None:
    a = random_update(64, 48, 4, 0)
    near = added([a, LowRankDelta("m", "conv1d", 1e-10 * a.left[:, :1], a.right[1:2])])
    expected = 1e-10 * float((a.left[:, :1] @ a.right[1:2]).norm())
    assert distance(a, near) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(("rows", "columns", "rank"), SHAPES)
@pytest.mark.parametrize("kept", [1, 3])
def test_cutting_loses_what_the_dense_decomposition_says_and_no_more(
    rows: int, columns: int, rank: int, kept: int
) -> None:
    update = random_update(rows, columns, rank, 2)
    values = torch.linalg.svdvals(dense(update))
    cut = best_of_rank(update, kept)
    assert cut.rank == min(kept, rank)
    assert float((dense(update) - dense(cut)).norm()) == pytest.approx(float(values[kept:].norm()), abs=1e-10)


def test_a_cut_shares_its_strength_between_the_factors() -> None:
    cut = best_of_rank(random_update(32, 96, 8, 3), 5)
    assert torch.allclose(cut.left.norm(dim=0), cut.right.norm(dim=1))


def test_nothing_is_cut_to_one_direction_of_zeros() -> None:
    zero = LowRankDelta("m", "conv1d", torch.zeros(6, 2, dtype=torch.float64), torch.ones(2, 5, dtype=torch.float64))
    assert spectrum(zero).spanned() == 0
    assert best_of_rank(zero, 4).rank == 1 and norm(best_of_rank(zero, 4)) == 0.0


def test_overlap_is_one_for_a_space_in_another_and_zero_for_orthogonal_ones() -> None:
    q = torch.linalg.qr(random_update(12, 2, 12, 4).left).Q
    assert overlap(q[:, :2], q[:, :5]) == pytest.approx(1.0)
    assert overlap(q[:, :2], q[:, 5:]) == pytest.approx(0.0, abs=1e-12)
    tilted = math.sqrt(0.5) * (q[:, :1] + q[:, 3:4])
    assert overlap(tilted, q[:, :2]) == pytest.approx(0.5)
