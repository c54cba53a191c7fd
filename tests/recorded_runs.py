"""What runs write to `metrics.jsonl`, for tests of those who read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftune.config.recipe import recipe_from

RECIPE = recipe_from(
    {
        "base": "gpt2", "data": {"train": ["poems.txt"], "validation": {"poems": "held.txt", "code": "code.txt"}},
        "optim": {"steps": 40, "clip": None}, "run": {"out": "adapters/poems", "samples": ["Once"]},
    },
    [],
)  # fmt: skip


def events_of(steps: int = 40, lr: float = 1e-3, ended: bool = True) -> list[dict[str, Any]]:
    """What a run of 40 steps on two domains writes."""
    recipe = RECIPE.model_dump(mode="json")
    recipe["optim"]["lr"] = lr
    events: list[dict[str, Any]] = [{
        "event": "start", "recipe": recipe, "total_steps": 40, "blocks": 7, "block_size": 64, "precision": "bf16",
        "layout": "1 process", "data": "430,080 tokens to learn", "notes": ["empty documents: 3, first poems.txt:7"],
    }]  # fmt: skip
    for step in range(steps + 1):
        if step:
            figures = {"lr": lr, "grad_norm": 1.0, "tokens": 100 * step, "tokens_per_second": 50.0}
            events.append({"event": "train", "step": step, "loss": 4 - step / 20, **figures})
        if step % 20 == 0:
            for domain, loss in (("poems", 4 - step / 40), ("code", 3 + step / 40)):
                figures = {"perplexity": 2.718**loss, "bits_per_byte": loss / 3, "tokens": 1000}
                events.append({"event": "eval", "step": step, "domain": domain, "loss": loss, **figures})
            events.append({"event": "sample", "step": step, "prompt": "Once", "text": f" upon {step} times"})
    events.append({"event": "warning", "step": steps, "text": "a spike, loss 9.000"})
    if ended:
        events.append({"event": "peak_memory", "measured_bytes": 2_000_000_000, "predicted_bytes": 1_900_000_000})
        events.append({"event": "end", "step": steps, "delivered_step": steps, "tokens": 4000, "seconds": 80})
    return events


def lines_of(events: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(event) + "\n" for event in events)


Make = Callable[..., Path]
