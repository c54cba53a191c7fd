"""A batch as the bare list of its tokens, and rectangles of its documents for attention, which alone needs them.

Nothing else in a GPT-2 looks at more than one token, so the fast path works on the N real tokens of a batch, end to
end, without padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

FULL = 0.85  # a rectangle takes documents down to this share of its longest: at most 28 % of T² is padding


@dataclass(frozen=True)
class Tokens:
    """`places` (N,) int64: where the tokens of a batch lie in its flattened rows; `lengths` (documents,) int64."""

    places: np.ndarray
    lengths: np.ndarray


def tokens_of(shape: torch.Size, segments: torch.Tensor | None) -> Tokens:
    """The tokens of a batch of `shape` (B, T); `segments` as in `LossModel`, on the CPU."""
    rows, width = shape
    if segments is None:
        return Tokens(np.arange(rows * width), np.full(rows, width))
    numbers = segments.numpy()
    places = np.flatnonzero(numbers.ravel() >= 0)
    document = (numbers + np.arange(rows)[:, None] * (numbers.max() + 1)).ravel()[places]
    starts = np.flatnonzero(np.diff(document, prepend=-1))
    return Tokens(places, np.diff(starts, append=len(places)))


@dataclass(frozen=True)
class Rectangle:
    """Places [first, first + documents · length) of a batch's rectangles: a document a row, padded at its end."""

    first: int
    documents: int
    length: int


@dataclass(frozen=True)
class Rectangles:
    """Documents of about equal length side by side, so that a batched product can take them.

    H heads; P places in all rectangles, N of them hold a token. q, k and v lie rectangle after rectangle as
    (3, documents, H, length), outputs as (documents, H, length). All tensors int64: `to_places` (3·P·H,) is the row
    (token, part, head) of each place, 0 for padding; `to_tokens` (N·3·H,) its inverse; `to_outputs` (N·H,) the place of
    each output row (token, head).
    """

    parts: tuple[Rectangle, ...]
    to_places: torch.Tensor
    to_tokens: torch.Tensor
    to_outputs: torch.Tensor
    padded: bool


def rectangles_of(lengths: np.ndarray, heads: int, device: torch.device) -> Rectangles:
    """Rectangles for documents of these `lengths` (documents,), that lie end to end."""
    parts, token = _grouped(lengths)
    to_places, to_tokens = _rows(parts, token, 3, heads)
    _, to_outputs = _rows(parts, token, 1, heads)
    a, b, c = (torch.from_numpy(array).to(device) for array in (to_places, to_tokens, to_outputs))
    return Rectangles(parts, a, b, c, bool((token < 0).any()))


def _grouped(lengths: np.ndarray) -> tuple[tuple[Rectangle, ...], np.ndarray]:
    """Rectangles, and the token at each of their places, (P,), -1 for padding."""
    starts = np.cumsum(lengths) - lengths
    longest_first = np.argsort(-lengths, kind="stable")
    falling = lengths[longest_first]
    parts, tokens, place, done = [], [], 0, 0
    while done < len(falling):
        length = int(falling[done])
        end = int(np.searchsorted(-falling, -FULL * length, side="right"))
        chosen = longest_first[done:end, None]
        column = np.arange(length)
        tokens.append(np.where(column < lengths[chosen], starts[chosen] + column, -1).ravel())
        parts.append(Rectangle(place, end - done, length))
        place, done = place + (end - done) * length, end
    return tuple(parts), np.concatenate(tokens)


def _rows(parts: tuple[Rectangle, ...], token: np.ndarray, kinds: int, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Row (token, kind, head) of each place (kind, document, head, column), 0 for padding; and the inverse."""
    rows = []
    for part in parts:
        tokens = token[part.first : part.first + part.documents * part.length].reshape(1, part.documents, 1, -1)
        kind, head = np.arange(kinds).reshape(-1, 1, 1, 1), np.arange(heads).reshape(1, 1, -1, 1)
        rows.append(np.where(tokens < 0, -1, (tokens * kinds + kind) * heads + head).ravel())
    row = np.concatenate(rows)
    places = np.flatnonzero(row >= 0)
    inverse = np.empty(len(places), dtype=np.int64)
    inverse[row[places]] = places
    return np.maximum(row, 0), inverse
