"""Single rows of an embedding or of the head that an adapter replaces: PEFT's `trainable_token_indices`.

PEFT stores values, not differences: a row of the base, of whatever values, gives way to the adapter's. With a tied base
the head takes the rows of the embedding, so the two stay one matrix (peft#2399).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from torch import nn

from peftune.errors import UserError
from peftune.model.weights import HEAD, WTE

ROWS_PART = "token_adapter.trainable_tokens_delta"
_IN_BOTH = (WTE, HEAD)


@dataclass(frozen=True)
class TokenRows:
    """`values` (n, width) of the rows `indices` (n,) int64; `tensor` is where the adapter stores them."""

    tensor: str
    indices: torch.Tensor
    values: torch.Tensor

    def height(self, rows: int) -> int:
        """Rows of the matrix that has so many without these: tokens that are new to the base come behind."""
        return max(rows, int(self.indices.max()) + 1)

    def put_into(self, chunk: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` float32, of which `chunk` has those that the base has."""
        new = chunk.new_zeros(stop - start - len(chunk), chunk.shape[1], dtype=torch.float32)
        merged = torch.cat([chunk.float(), new])
        here = (self.indices >= start) & (self.indices < stop)
        merged[self.indices[here] - start] = self.values[here].float()
        return merged


Places = dict[str, tuple[str, tuple[int, ...]]]
"""By module, whose tensor holds its rows (its own, or that of the module it is tied to), and which rows they are."""


def places_in(model: nn.Module) -> Places:
    """Where PEFT put single rows into this model; ValueError where it would compute nothing with them."""
    found: Places = {}
    for name, module in model.named_modules():
        if isinstance(module, TrainableTokensWrapper):
            layer = module.token_adapter
            if not isinstance(layer.get_base_layer(), nn.Embedding | nn.Linear):
                raise ValueError(f"{name} is in modules_to_save and has trainable_token_indices too")
            source = name if layer.tied_adapter is None else next(iter(found))
            found[name] = source, tuple(layer.token_indices["default"])
    return found


def named_tokens(config: dict[str, Any]) -> list[int]:
    """Every row that the settings name, of whichever module."""
    named = config.get("trainable_token_indices") or []
    return [index for rows in named.values() for index in rows] if isinstance(named, dict) else list(named)


def token_rows(places: Places, stored: dict[str, torch.Tensor]) -> dict[str, TokenRows]:
    """The rows by the tensor of the base that they go into.

    UserError for a copy of tied rows that is another than they are.
    """
    rows: dict[str, TokenRows] = {}
    for name, (source, indices) in places.items():
        own, tensor = f"{name}.{ROWS_PART}", f"{source}.{ROWS_PART}"
        if own in stored and not torch.equal(stored[own], stored[tensor]):
            raise UserError(f"{own} is not what {tensor} holds; save the adapter again with PEFT")
        rows[f"{name}.weight"] = TokenRows(tensor, torch.tensor(indices), stored[tensor])
    return rows


def vocabulary_with(rows: dict[str, TokenRows], vocabulary: int, positions: int) -> int:
    """How many tokens there are with these rows; UserError for one that the model would have no values of."""
    for name, found in rows.items():
        if name not in _IN_BOTH and found.height(positions) > positions:
            raise UserError(f"trainable_token_indices names row {int(found.indices.max())} of {name}, which has none")
    total = max([vocabulary, *(found.height(vocabulary) for name, found in rows.items() if name in _IN_BOTH)])
    for name in _IN_BOTH if total > vocabulary else ():
        new = rows[name].indices[rows[name].indices >= vocabulary] if name in rows else torch.empty(0)
        if len(new) != total - vocabulary:
            raise UserError(
                f"trainable_token_indices goes up to token {total - 1:,}, the base has {vocabulary:,} tokens, and of "
                f"the new ones {name} has {len(new):,} rows; train a row for each"
            )
    return total
