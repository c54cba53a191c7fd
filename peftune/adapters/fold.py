"""The adapter merged into the base: each tensor of the merged model in float32, computed when it is asked for.

Orientation follows from the architecture and never from `fan_in_fan_out`: a `Conv1D` weight is (in, out), so
W += scale·(B·A)ᵀ; a linear head is (out, in), so W += scale·B·A; an embedding is (tokens, width), so W += scale·(B·A)ᵀ.
DoRA (2402.09353): each output's vector is then scaled to its trained magnitude. PiSSA (2404.02948): the top singular
directions that the adapter started from are taken out of W first. Products are float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from peftune.adapters.layout import AdapterLayout, LoraTarget, model_order, module_of
from peftune.model.weights import CHUNK_ELEMENTS, HEAD, WTE, Weights, row_chunks

_CHUNK_VALUES = 250_000  # computed at a time: 1 MB, so that memory is reused


@dataclass
class MergedTensors:
    """Merged tensors by name; `used` collects the adapter's tensors that have been applied."""

    weights: Weights
    layout: AdapterLayout
    used: set[str] = field(default_factory=set)
    changes_a_weight: bool = False
    """Whether a value has been seen, among the tensors that were read so far, that is not the base's."""

    @property
    def tied(self) -> bool:
        """Whether the merged head is still the embedding: a tied base, and an adapter that changes both or none."""
        adapted = {WTE.removesuffix(".weight"), HEAD.removesuffix(".weight")} & set(self.layout.targets)
        first, second = (self.layout.replaced.get(name) for name in (WTE, HEAD))
        same = first is second or (first is not None and second is not None and torch.equal(first, second))
        rows, of_head = (self.layout.rows.get(name) for name in (WTE, HEAD))
        same_rows = rows is of_head or (rows is not None and of_head is not None and rows.tensor == of_head.tensor)
        return self.weights.tied and not adapted and same and same_rows

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor of the merged checkpoint, embeddings first, then in the order of the blocks."""
        names = [name for name in self.weights.names() if name != HEAD] + ([] if self.tied else [HEAD])
        return {name: self._shape(name) for name in sorted(names, key=model_order)}

    def chunks(self, name: str, elements: int = CHUNK_ELEMENTS) -> Iterator[torch.Tensor]:
        """A merged tensor as consecutive chunks of rows, float32; of about so many elements where it is not adapted."""
        start = 0
        for values in self._merged_chunks(name, elements):
            self.changes_a_weight = self.changes_a_weight or self._differs_from_base(name, start, values)
            start += len(values)
            yield values

    def _differs_from_base(self, name: str, start: int, values: torch.Tensor) -> bool:
        stored = self.weights.stored_name(name)
        if not self._parts(name) and name not in self.layout.replaced and name not in self.layout.rows:
            return False
        stop = start + len(values)
        return stop > self.weights.shape(stored)[0] or not torch.equal(
            values, self.weights.rows(stored, start, stop).float()
        )

    def _merged_chunks(self, name: str, elements: int) -> Iterator[torch.Tensor]:
        target = self.layout.targets.get(module_of(name))
        if target is not None and name.endswith(".weight"):
            yield from self._conv1d(name, target) if target.kind == "conv1d" else self._by_rows(name, target)
        else:
            bias = target.parts.get("lora_B.bias") if target is not None else None
            for start, stop in row_chunks(self._shape(name), elements):
                values = self._base(name, start, stop).float()
                if target is not None and bias is not None:
                    values = (values.double() + target.scale * bias[start:stop].double()).float()
                yield values
        self.used |= {f"{module_of(name)}.{part}" for part in self._parts(name)}
        self.used |= {name, HEAD if name == WTE and self.tied else name} & set(self.layout.replaced)
        self.used |= {self.layout.rows[name].tensor} if name in self.layout.rows else set()

    def changed(self) -> set[str]:
        """Names of the merged tensors that the adapter changes; all others are the base's own."""
        names = self.layout.replaced.keys() | self.layout.rows.keys()
        return {name for name in self.shapes() if name in names or self._parts(name)}

    def _parts(self, name: str) -> list[str]:
        """The parts of the adapter that go into this tensor: of a bias there is one, the others change the weight."""
        target = self.layout.targets.get(module_of(name))
        return [p for p in target.parts if (p == "lora_B.bias") == name.endswith(".bias")] if target else []

    def tensor(self, name: str) -> torch.Tensor:
        """A merged tensor, complete."""
        return torch.cat(list(self.chunks(name)))

    def row_slices(self, name: str) -> list[tuple[int, int]]:
        """(start, stop) of the slices of rows in which embedding or head are merged."""
        shape = self._shape(name)
        target = self.layout.targets.get(name.removesuffix(".weight"))
        if target is not None and target.kind == "linear" and target.pissa:
            return [(0, shape[0])]  # the singular vectors need the full matrix
        return row_chunks(shape)

    def _shape(self, name: str) -> tuple[int, ...]:
        shape, rows = self._unchanged_shape(name), self.layout.rows.get(name)
        return shape if rows is None else (rows.height(shape[0]), *shape[1:])

    def _unchanged_shape(self, name: str) -> tuple[int, ...]:
        """Without tokens that single rows add."""
        if name in self.layout.replaced:
            return tuple(self.layout.replaced[name].shape)
        return self.weights.shape(self.weights.stored_name(name))

    def _base(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the tensor that the adapter starts from: of the adapter's own copy where it brings one."""
        if (rows := self.layout.rows.get(name)) is not None:
            height = self._unchanged_shape(name)[0]
            known = self._stored_rows(name, min(start, height), min(stop, height))
            return rows.put_into(known, start, stop)
        return self._stored_rows(name, start, stop)

    def _stored_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        if name in self.layout.replaced:
            return self.layout.replaced[name][start:stop]
        return self.weights.rows(self.weights.stored_name(name), start, stop)

    def _conv1d(self, name: str, target: LoraTarget) -> Iterator[torch.Tensor]:
        """A block's matrix (in, out); plain LoRA in float32 and PEFT's own order, so that all bits are PEFT's."""
        height, width = self._shape(name)
        if target.pissa or self.layout.dora:
            yield _merge_matrix(self._base(name, 0, height).float(), target, self.layout).float()
            return
        update = _update(target)
        rows = max(1, _CHUNK_VALUES // width)
        for start in range(0, height, rows):
            yield self._base(name, start, min(start + rows, height)).float().add_(update[start : start + rows])

    def _by_rows(self, name: str, target: LoraTarget) -> Iterator[torch.Tensor]:
        """Embedding or head: (tokens, width), a few thousand tokens at a time."""
        slices = self.row_slices(name)
        norms = self._column_norms(name, target, slices) if target.kind == "embedding" and self.layout.dora else None
        for start, stop in slices:
            base = self._base(name, start, stop).float()
            if target.kind == "linear":
                yield _merge_matrix(base, _rows_of(target, start, stop), self.layout).float()
                continue
            moved = base.double() + _embedding_delta(target, start, stop)
            yield (moved if norms is None else moved * (target.parts["lora_magnitude_vector"].double() / norms)).float()

    def _column_norms(self, name: str, target: LoraTarget, slices: list[tuple[int, int]]) -> torch.Tensor:
        """(width,) norms over all tokens: what PEFT's DoRA divides an embedding by."""
        squares = torch.zeros(self._shape(name)[1], dtype=torch.float64)
        for start, stop in slices:
            moved = self._base(name, start, stop).double() + _embedding_delta(target, start, stop)
            squares += moved.square().sum(dim=0)
        return squares.sqrt()


def _rows_of(target: LoraTarget, start: int, stop: int) -> LoraTarget:
    cut = {"lora_B.weight", "lora_B.bias", "lora_magnitude_vector"}
    parts = {name: tensor[start:stop] if name in cut else tensor for name, tensor in target.parts.items()}
    return dataclasses.replace(target, parts=parts)


def _embedding_delta(target: LoraTarget, start: int, stop: int) -> torch.Tensor:
    a, b = target.parts["lora_embedding_A"][:, start:stop], target.parts["lora_embedding_B"]
    return target.scale * (a.double().T @ b.double().T)


def _update(target: LoraTarget) -> torch.Tensor:
    """What plain LoRA adds to a block's matrix (in, out), float32, as PEFT computes it."""
    # copies, because the last bit of a product depends on how its factors lie in memory
    a, b = (target.parts[f"lora_{name}.weight"].to(torch.float32, copy=True) for name in "AB")
    return (a.T @ b.T).mul_(target.scale)


def _merge_matrix(weight: torch.Tensor, target: LoraTarget, layout: AdapterLayout) -> torch.Tensor:
    """A weight as it is stored, with its adapter: float64, of the same shape."""
    in_out = target.kind == "conv1d"
    a, b = target.parts["lora_A.weight"].double(), target.parts["lora_B.weight"].double()
    start = weight.double()
    if target.pissa:
        start = _without_principal(weight.T, target.rank).T if in_out else _without_principal(weight, target.rank)
    merged = torch.addmm(start, *((a.T, b.T) if in_out else (b, a)), alpha=target.scale)
    if layout.dora:
        magnitude = target.parts["lora_magnitude_vector"].double()
        norms = torch.linalg.vector_norm(merged, dim=0 if in_out else 1, keepdim=True)
        merged = merged * ((magnitude if in_out else magnitude[:, None]) / norms)
    return merged


def _without_principal(out_in: torch.Tensor, rank: int) -> torch.Tensor:
    """W less its `rank` largest singular directions, from a float32 decomposition as PEFT's `pissa_init` does it."""
    left, values, right = torch.linalg.svd(out_in.clone(), full_matrices=False)  # aligned, for the same bits each time
    principal = torch.mm(left[:, :rank].double() * values[:rank].double(), right[:rank].double())
    return out_in.double() - principal
