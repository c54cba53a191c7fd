"""What an adapter adds to a row is A·B of its own, to the bit whatever adapters the rows beside it have."""

from __future__ import annotations

import itertools

import pytest
import torch

from peftune.model.decode.lora_slots import AdapterSlots, add_lora
from peftune.model.decode.lora_stack import LoraWeights, lora_weights

AT = (0, "attn.c_attn")
RANKS = (1, 3, 8, 13, 16, 20, 64)
WIDTHS = [(768, 2304), (3072, 768), (64, 192), (24, 24)]


def _lora(width_in: int, width_out: int, rank: int, seed: int) -> tuple[LoraWeights, torch.Tensor]:
    """An adapter and its B·A, scaled, in float64."""
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, width_in, generator=random), torch.randn(width_out, rank, generator=random)
    return lora_weights({AT: (a, b, 0.5)}), 0.5 * b.double() @ a.double()


@pytest.mark.parametrize(("width_in", "width_out"), WIDTHS)
@pytest.mark.parametrize("tokens", [1, 16, 33])
def test_a_row_gets_what_it_gets_alone_whatever_the_ranks_beside_it(
    width_in: int, width_out: int, tokens: int, threads: int
) -> None:
    made = [_lora(width_in, width_out, rank, seed) for seed, rank in enumerate(RANKS)]
    random = torch.Generator().manual_seed(99)
    x, y = (torch.randn(len(RANKS) + 1, tokens, width, generator=random) for width in (width_in, width_out))
    adapters, exact = [*(lora for lora, _ in made), None], [*(change for _, change in made), None]
    alone = []
    for row, (adapter, change) in enumerate(zip(adapters, exact, strict=True)):
        one = slice(row, row + 1)
        factors = AdapterSlots(1).factors([0], [adapter], one_token=tokens == 1).get(AT)
        alone.append(add_lora(y[one].clone(), x[one].clone(), factors)[0])
        expected = y[row].double() + (x[row].double() @ change.T if change is not None else 0)
        # x·A of rank 1 is one sum of up to 3,072 terms that cancel: 2e-6 was seen
        assert float((alone[row] - expected).norm() / expected.norm()) < 1e-5, row

    shared = AdapterSlots(len(adapters))  # one for all, as a running batch has: what was in a slot must not show
    for rows in [
        list(range(8)),
        [2, 7],
        [5, 0, 3],
        [1, 1],
        [6, 2],
        [7],
        *map(list, itertools.combinations(range(4), 2)),
    ]:
        for slots in (list(range(len(rows))), list(range(8 - len(rows), 8))[::-1]):
            factors = shared.factors(slots, [adapters[row] for row in rows], one_token=tokens == 1)
            together = add_lora(y[rows], x[rows], factors.get(AT))
            for row, got in zip(rows, together, strict=True):
                assert torch.equal(got, alone[row]), (rows, row)


def test_an_adapter_loaded_again_under_its_name_is_not_taken_for_the_first() -> None:
    (first, _), (second, _), (other, _) = (_lora(64, 64, 8, seed) for seed in range(3))
    shared, x, y = AdapterSlots(2), torch.ones(2, 1, 64), torch.zeros(2, 1, 64)
    seen = [
        add_lora(y.clone(), x, shared.factors([0, 1], [lora, other], one_token=True)[AT]) for lora in (first, second)
    ]
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][1], seen[1][1])
