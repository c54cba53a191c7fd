#!/usr/bin/env python3
"""Write the tables of memory into docs/many-ranks.md from peftune's own formulas; a test fails where the two differ.

python docs/build_memory_table.py
"""

from __future__ import annotations

import re
from pathlib import Path

from transformers import GPT2Config

from peftune.config.recipe import LoraSection
from peftune.training.planning.memory_model import RankMemory, Shapes, Way, bytes_per_rank, shapes_of
from peftune.training.planning.trace import LIVE_TENSORS

PAGE = Path(__file__).with_name("many-ranks.md")
BEGIN, END = "<!-- written by docs/build_memory_table.py -->", "<!-- end -->"
MODELS = {"gpt2": (12, 768, 12), "gpt2-medium": (24, 1024, 16), "gpt2-large": (36, 1280, 20), "gpt2-xl": (48, 1600, 25)}
WAYS: dict[str, tuple[Way, int, str, str | None]] = {
    "one process, fp32": ("one", 1, "fp32", None),
    "one process, bf16": ("one", 1, "bf16", None),
    "one process, int8": ("one", 1, "bf16", "int8"),
    "one process, nf4": ("one", 1, "bf16", "nf4"),
    "DDP, bf16, any number of ranks": ("ddp", 8, "bf16", None),
    "DDP, nf4, any number of ranks": ("ddp", 8, "bf16", "nf4"),
    "ZeRO-1 or 2, bf16, 8 ranks": ("zero2", 8, "bf16", None),
    "ZeRO-1 or 2, nf4, 8 ranks": ("zero2", 8, "bf16", "nf4"),
    "ZeRO-3, bf16, 2 ranks": ("zero3", 2, "bf16", None),
    "ZeRO-3, bf16, 8 ranks": ("zero3", 8, "bf16", None),
}
TOKENS = 1024


def page(text: str) -> str:
    """The page with its tables as they are to be."""
    return re.sub(f"(?s){BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{tables()}\n{END}", text)


def tables() -> str:
    """Bytes between two steps, then what comes on top while a step runs."""
    configs = {name: GPT2Config(n_layer=n, n_embd=width, n_head=heads) for name, (n, width, heads) in MODELS.items()}
    shapes = {name: shapes_of(config, LoraSection()) for name, config in configs.items()}
    head = ["| MB | " + " | ".join(MODELS) + " |", "|---|" + "---|" * len(MODELS)]
    held = [row(way, [held_of(memory(s, *WAYS[way])) for s in shapes.values()]) for way in WAYS]
    trained = row("trained elements, millions", [f"{s.adapter / 1e6:.1f}" for s in shapes.values()])
    live = {  # activations of a micro-batch
        f"activations of {TOKENS:,} tokens, {name}": [
            f"{TOKENS * c.n_layer * c.n_embd * LIVE_TENSORS * size / 1e6:,.0f}" for c in configs.values()
        ]
        for name, size in (("bf16", 2), ("fp32", 4))
    }
    live["ZeRO-3 in bf16: weights gathered at one time, at most"] = [
        f"{memory(s, 'zero3', 8, 'bf16', None).gathered / 1e6:,.0f}" for s in shapes.values()
    ]
    live["int8 or nf4: the one matrix that is unpacked"] = [
        f"{memory(s, 'one', 1, 'bf16', 'nf4').gathered / 1e6:,.0f}" for s in shapes.values()
    ]
    on_top = [row(name, cells) for name, cells in live.items()]
    return "\n".join([*head, *held, trained, "", "On top of it, while a step runs:", "", *head, *on_top])


def memory(shapes: Shapes, way: Way, ranks: int, precision: str, quantize: str | None) -> RankMemory:
    """What a rank holds."""
    return bytes_per_rank(shapes, way, ranks, precision, quantize)  # type: ignore[arg-type]


def held_of(rank: RankMemory) -> str:
    """Frozen weights + everything that belongs to the adapter."""
    return f"{rank.base / 1e6:,.0f} + {(rank.held - rank.base) / 1e6:,.0f}"


def row(name: str, cells: list[str]) -> str:
    """A line of a table."""
    return f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"written: {PAGE}")
