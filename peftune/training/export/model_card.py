"""The model card of an adapter: what it is, what it learnt, how to use it."""

from __future__ import annotations

from typing import Any


def model_card(provenance: dict[str, Any]) -> str:
    """Markdown with the front matter that hubs read; `provenance` is what peftune.json holds."""
    recipe = provenance["recipe"]
    lora, optim, out = recipe["lora"], recipe["optim"], recipe["run"]["out"]
    targets = lora["targets"] if isinstance(lora["targets"], str) else ", ".join(lora["targets"])
    sources = ", ".join(f"`{source['path']}`" for source in recipe["data"]["train"])
    return f"""---
base_model: {recipe["base"]}
library_name: peft
tags: [gpt2, lora, peftune]
---

# {out.rstrip("/").split("/")[-1]}

A {lora["variant"]} adapter (rank {lora["rank"]}, alpha {lora["alpha"]:g}, targets: {targets}) for `{recipe["base"]}`,
{provenance["trainable_parameters"]:,} trained parameters, trained with peftune {provenance["peftune"]} on {sources}.

{_held(recipe)}{_table(provenance["metrics"])}

Learning: {provenance["step"]} steps of {recipe["batch"]["global_size"]} blocks, {provenance["tokens"]:,} tokens,
peak rate {optim["lr"]:g} ({optim["schedule"]}), {provenance["precision"]}, seed {recipe["run"]["seed"]},
{provenance["seconds"]:,.0f} seconds. `peftune.json` holds the whole recipe and the fingerprints of base and data,
`metrics.jsonl` every step.

![Course of the loss](loss.png)

## Use

```
peftune generate --base {recipe["base"]} --adapter {out} --prompt "…"
peftune merge {out} --out {out.rstrip("/")}-merged
```

It is an ordinary PEFT adapter: `PeftModel.from_pretrained(base, "{out}")` loads it without peftune.
"""


def _held(recipe: dict[str, Any]) -> str:
    if recipe.get("quantize") is None:
        return ""
    kind = recipe["quantize"]
    return f"""The base was held in {kind} meanwhile, and the figures below were measured on that; the adapter is one
for the full-precision base.

"""


def _table(metrics: dict[str, dict[str, dict[str, float]]]) -> str:
    if not metrics:
        return "It was not evaluated: the recipe has no validation data."
    rows = [
        "| held-out domain | scored tokens | perplexity, base | with adapter | bits per byte, base | with adapter |",
        "|---|---|---|---|---|---|",
    ]
    for domain, figures in metrics.items():
        base, adapter = figures.get("base"), figures.get("adapter")
        cells = [
            f"{row[key]:.3f}" if row else "not measured"
            for key in ("perplexity", "bits_per_byte")
            for row in (base, adapter)
        ]
        tokens = (adapter or base or {}).get("tokens", 0)
        rows.append(f"| {domain} | {int(tokens):,} | {' | '.join(cells)} |")
    return "\n".join(rows)
