"""What cannot be combined, refused before any weight is loaded, with the reason."""

from __future__ import annotations

from pathlib import Path

from peftune.config.recipe import Recipe
from peftune.errors import UserError
from peftune.files import read_object


def refuse_for_zero3(recipe: Recipe) -> None:
    """UserError, before anything is loaded, for a recipe that ZeRO-3 would train wrongly or not at all."""
    lora, quantize = recipe.lora, recipe.quantize
    outside = {"wte", "wpe", "lm_head"} & (set() if isinstance(lora.targets, str) else set(lora.targets))
    refused = {
        f"quantize: {quantize} (8-bit trains to a wrong loss there, 4-bit weights cannot be sharded)": quantize,
        f"lora.variant: {lora.variant} (it reads full weights, and a rank has a shard)": lora.variant
        not in ("lora", "rslora"),
        "lora.modules_to_save (modules would be copied from shards)": lora.modules_to_save,
        "lora.targets outside the blocks (wte, wpe, lm_head)": outside,
        "run.samples (no rank has the full model to generate with)": recipe.run.samples,
    }
    problems = [text for text, applies in refused.items() if applies]
    if problems:
        raise UserError(f"ZeRO-3 cannot be combined with {'; '.join(problems)}; use ZeRO-2, or leave these out")


def check_engine_file(path: Path) -> None:
    """UserError where the file is missing, or decides what the recipe decides."""
    values = read_object(path)
    problems = [f"{key} (peftune has its own)" for key in ("optimizer", "scheduler") if key in values]
    problems += [f"{key} (run.precision says it)" for key in ("bf16", "fp16", "amp", "torch_autocast") if key in values]
    owned = {"gradient_accumulation_steps": (1, "auto"), "gradient_clipping": ("auto",)}
    problems += [
        f'{key}: {values[key]} (the recipe says it, use "auto")'
        for key, allowed in owned.items()
        if values.get(key, "auto") not in allowed
    ]
    if problems:
        raise UserError(f"{path}: cannot be used because of {', '.join(problems)}; see ds_configs/")
