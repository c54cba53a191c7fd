"""An adapter that was computed, not trained: a plain PEFT LoRA of given updates, with provenance and a model card.

Each module has its own rank. Its scale is 1 (alpha = rank), so that what PEFT computes is the product of the stored
factors and no more; modules are named in full, because the blocks that a name would match are the base's affair.
"""

from __future__ import annotations

import platform
import re
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import GPT2Config

from peftune import __version__
from peftune.adapters.directory import check_free, write_adapter
from peftune.adapters.layout import layout_of
from peftune.adapters.low_rank import LowRankDelta, delta_of
from peftune.errors import CheckFailed

_PREFIX = "base_model.model."
_VERSIONS = ("torch", "transformers", "peft", "safetensors")


def write_computed_adapter(
    out: Path, base: Mapping[str, str], shape: GPT2Config, updates: list[LowRankDelta], how: dict[str, Any], card: str
) -> None:
    """Write the adapter of these updates; `how` goes into peftune.json, `card` is the text of its model card.

    Before that it is read as any adapter is, for a base of this shape. Raises CheckFailed where PEFT's rules would
    make other updates of it, and what `write_adapter` raises.
    """
    config, tensors = _plain_lora(base["base"], updates)
    _check_read(config, tensors, shape, updates, out)
    check_free(out, "the adapter")
    versions = {"python": platform.python_version()} | {name: version(name) for name in _VERSIONS}
    provenance = {"peftune": __version__, **base, **how, "versions": versions}
    write_adapter(out, config, tensors, provenance, {"README.md": _model_card(out, base["base"], card)})


def _plain_lora(base: str, updates: list[LowRankDelta]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    usual = Counter(update.rank for update in updates).most_common(1)[0][0]
    ranks = {re.escape(update.name): update.rank for update in updates if update.rank != usual}
    lora: Any = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
        r=usual,
        lora_alpha=usual,
        rank_pattern=ranks,
        alpha_pattern=dict(ranks),
        target_modules=sorted(update.name for update in updates),
        fan_in_fan_out=any(update.kind == "conv1d" for update in updates),
    )
    plain = {k: sorted(v) if isinstance(v, set) else getattr(v, "value", v) for k, v in lora.to_dict().items()}
    tensors = {f"{_PREFIX}{u.name}.{part}": tensor for u in updates for part, tensor in u.parts().items()}
    return plain, tensors


def _check_read(
    config: dict[str, Any], tensors: dict[str, torch.Tensor], shape: GPT2Config, updates: list[LowRankDelta], out: Path
) -> None:
    targets = layout_of(config, tensors, shape, str(out)).targets
    for update in updates:
        read = targets.get(update.name)
        if read is None or read.scale != 1.0 or not delta_of(read).equals(update.as_stored()):
            raise CheckFailed(f"{out}: PEFT would read {update.name} as another update; nothing was written")


def _model_card(out: Path, base: str, text: str) -> str:
    return f"""---
base_model: {base}
library_name: peft
tags: [gpt2, lora, peftune]
---

# {out.name}

{text}

`peftune.json` holds fingerprints of what it was made from.

## Use

```
peftune generate --base {base} --adapter {out} --prompt "…"
peftune merge {out} --out {out}-merged
```

It is an ordinary PEFT adapter: `PeftModel.from_pretrained(base, "{out}")` loads it without peftune.
"""
