"""Shapes of GPT-2 by name or by numbers, and the floating-point operations that a step on one must cost.

N: elements of the matrices that multiply every token, 12·L·d² in the blocks and V·d in the head. d: width, L: layers,
V: vocabulary, T: tokens that a token may look back on, a: elements of the adapter. One multiply-add is 2 FLOP.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import GPT2Config

POSITIONS = 1024
LINEARS = {"c_attn": (1, 3), "attn.c_proj": (1, 1), "c_fc": (1, 4), "mlp.c_proj": (4, 1)}
"""In and out of each linear layer of a block, in widths."""


@dataclass(frozen=True)
class Shape:
    """A GPT-2 by its numbers."""

    layers: int
    width: int
    heads: int
    vocabulary: int = 50257

    def config(self, end: int = 0) -> GPT2Config:
        """The configuration, dropouts as GPT-2 ships them (0.1), so that a peer's default is what users get.

        `end` is the id of `<|endoftext|>`: GPT-2's own is not in every vocabulary.
        """
        return GPT2Config(
            n_layer=self.layers, n_embd=self.width, n_head=self.heads, vocab_size=self.vocabulary,
            n_positions=POSITIONS, bos_token_id=end, eos_token_id=end,
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.layers} layers of width {self.width}, {self.heads} heads, vocabulary {self.vocabulary:,}"


PRESETS = {
    "tiny": Shape(2, 64, 2, 4097),
    "small": Shape(12, 768, 12),
    "medium": Shape(24, 1024, 16),
    "large": Shape(36, 1280, 20),
    "xl": Shape(48, 1600, 25),
}


def parse_shape(text: str) -> Shape:
    """A preset, or LAYERS,WIDTH,HEADS[,VOCABULARY]; ValueError tells what was expected."""
    if text in PRESETS:
        return PRESETS[text]
    if re.fullmatch(r"[1-9]\d*(,[1-9]\d*){2,3}", text):
        shape = Shape(*map(int, text.split(",")))
        if shape.width % shape.heads == 0:
            return shape
    expected = f"{', '.join(PRESETS)}, or LAYERS,WIDTH,HEADS[,VOCABULARY] with heads | width"
    raise ValueError(f"shape {text!r}: expected {expected}")


def target_modules(text: str) -> list[str]:
    """Module names for PEFT."""
    everything = {"all": ["c_attn", "c_proj", "c_fc"], "attention": ["attn.c_attn", "attn.c_proj"]}
    return everything.get(text) or text.split(",")


@dataclass(frozen=True)
class Work:
    """FLOP of one token in a training step, part by part; what a step cannot avoid, whoever computes it."""

    blocks: float
    head: float
    attention: float
    adapter: float

    @property
    def total(self) -> float:
        return self.blocks + self.head + self.attention + self.adapter


def work_per_token(
    shape: Shape, context: float, rank: int, targets: Sequence[str] = ("c_attn",), supervised: float = 1, first: int = 0
) -> Work:
    """4N + 6TdL + 6a for frozen weights: one product forward and one for the hidden state's gradient, none for weights.

    `context`: T; for documents of unequal length Σn²/Σn (a token sees half its document on average, which the 6
    contains). `supervised`: share of tokens that need the head. `first`: the lowest adapted block; below it there is no
    backward. `targets`: names of the adapted linear layers (keys of LINEARS).
    """
    backward = (shape.layers - first) / shape.layers
    matrices = 12 * shape.layers * shape.width**2
    attention = context * shape.width * shape.layers
    a_layer = sum(rank * shape.width * sum(LINEARS[name]) for name in targets)
    return Work(
        blocks=2 * matrices * (1 + backward),
        head=4 * supervised * shape.vocabulary * shape.width,
        attention=2 * attention * (1 + 2 * backward),
        adapter=6 * a_layer * (shape.layers - first),
    )


def adapted_linears(targets: str) -> tuple[str, ...]:
    """Keys of LINEARS that `lora.targets` of a recipe, or a list of module names with commas, means."""
    names = target_modules(targets)
    return tuple(key for key in LINEARS if any(key.endswith(n) or n.endswith(key) for n in names))


def context_of(lengths: list[int]) -> float:
    """T of documents of these lengths: Σn²/Σn."""
    return sum(n * n for n in lengths) / sum(lengths)
