"""An adapter that was computed, not trained: a plain PEFT LoRA of given updates, with provenance and a model card.

Each module has its own rank. Its scale is 1 (alpha = rank) unless another is asked for, so PEFT adds exactly the
product of the stored factors.
Target modules are named in full: a short name would match modules in every block, also in those without an update.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import GPT2Config

from peftune.adapters.directory import check_free, write_adapter
from peftune.adapters.layout import layout_of
from peftune.adapters.low_rank import LowRankDelta, stored_tensors
from peftune.adapters.model_card import model_card
from peftune.adapters.provenance import versions_of
from peftune.errors import CheckFailed
from peftune.model.lora import config_to_json
from peftune.version import __version__

_VERSIONS = ("torch", "transformers", "peft", "safetensors")


def write_computed_adapter(
    out: Path,
    base: Mapping[str, str],
    shape: GPT2Config,
    deltas: list[LowRankDelta],
    source: dict[str, Any],
    card: str,
    scale: float = 1.0,
) -> None:
    """Write the adapter of `scale` times these deltas; `base` and `source` go into peftune.json, `card` into its model
    card.

    It is first read as any adapter is, for a base of this shape. Raises CheckFailed where PEFT would read other
    deltas, and what `write_adapter` raises.
    """
    config = _lora_config(deltas, scale)
    tensors = stored_tensors(deltas)
    targets = layout_of(config, tensors, shape, str(out)).targets
    for delta in deltas:
        read = targets.get(delta.name)
        if read is None or not math.isclose(read.scale, scale) or not _same_factors(read.parts, delta.parts()):
            raise CheckFailed(f"{out}: PEFT would read {delta.name} as another update; nothing was written")
    check_free(out, "the adapter")
    provenance = {"peftune": __version__, **base, **source, "versions": versions_of(*_VERSIONS)}
    body = f"{card}\n\n`peftune.json` holds fingerprints of what it was made from."
    write_adapter(out, config, tensors, provenance, {"README.md": model_card(base["base"], str(out), body)})


def read_as(parses_special_tokens: bool, chat: str | None) -> dict[str, Any]:
    """What `source` says of how texts are read; `chat` is the template of its conversations, if it knows any."""
    special = {"special_tokens": "parse"} if parses_special_tokens else {}
    return special | ({"chat": True, "chat_template": chat} if chat is not None else {})


def _same_factors(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[part], wanted[part]) for part in wanted)


def _lora_config(deltas: list[LowRankDelta], scale: float) -> dict[str, Any]:
    rank = Counter(delta.rank for delta in deltas).most_common(1)[0][0]
    other_ranks = {re.escape(delta.name): delta.rank for delta in deltas if delta.rank != rank}
    alphas = {key: _whole(scale * other) for key, other in other_ranks.items()}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        r=rank,
        lora_alpha=_whole(scale * rank),  # type: ignore[arg-type]
        rank_pattern=other_ranks,
        alpha_pattern=alphas,
        target_modules=sorted(delta.name for delta in deltas),
        fan_in_fan_out=any(delta.kind == "conv1d" for delta in deltas),
    )
    return config_to_json(config)


def _whole(number: float) -> float:
    """A whole number as int, which reads better in the file."""
    return int(number) if float(number).is_integer() else number
