"""What makes two runs the same: the recipe's values that decide what is learnt, fingerprints of base and data."""

from __future__ import annotations

from typing import Any

from peftune.config.recipe import Recipe
from peftune.errors import UserError

HARMLESS = frozenset(
    {
        "run.out", "run.eval_every", "run.save_every", "run.resume", "run.track", "run.samples",
        "run.early_stopping", "run.checkpointing", "run.fast", "run.compile", "batch.micro_size",
    }
)  # fmt: skip
"""Keys that may change between a run and its resumption: none decides what is learnt (beyond rounding)."""


def identity_of(recipe: Recipe, fingerprints: dict[str, str]) -> dict[str, Any]:
    """Flat mapping of every recipe value that decides what is learnt, and the fingerprints of base and data."""
    kept = {k: v for k, v in flatten(recipe.model_dump(mode="json")).items() if k not in HARMLESS}
    return kept | {f"fingerprint of {k}": v for k, v in fingerprints.items()}


def refuse_other_run(saved: dict[str, Any], now: dict[str, Any], where: str) -> None:
    """UserError listing every difference between the run that is there and the one asked for."""
    # What an older release did not record had its default, or cannot be compared.
    unrecorded = _DEFAULTS | {key: now[key] for key in now if key == "fingerprint of config"}
    saved, now = unrecorded | saved, _DEFAULTS | now
    keys = sorted(saved.keys() | now.keys())
    changed = [f"{k} was {_short(saved.get(k))}, is {_short(now.get(k))}" for k in keys if saved.get(k) != now.get(k)]
    if changed:
        raise UserError(
            f"{where} holds a run of another recipe: {'; '.join(changed)}. "
            "Give run.out another name, or remove that directory"
        )


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _short(value: Any) -> str:
    text = "not there" if value is None else str(value)
    return text if len(text) <= 40 else text[:37] + "…"


_EMPTY = Recipe.model_validate({"base": "-", "data": {"train": "-"}, "run": {"out": "-"}})
_DEFAULTS = {k: v for k, v in identity_of(_EMPTY, {}).items() if k not in ("base", "data.train")}
